// Stands in for cuda/ptx/pair.cuh.
#pragma once

#include "../common/types.cuh"

namespace tilewise {

template <class T> inline u32 pack_pair(f32 low, f32 high) {
    return from_f32<T>(low).bits | static_cast<u32>(from_f32<T>(high).bits) << 16;
}

}  // namespace tilewise
