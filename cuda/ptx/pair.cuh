// Two f32 become one word of two 16-bit elements, `low` in the low half. Rounds to nearest, ties to even.
#pragma once

#include "../common/types.cuh"

namespace tilewise {

template <class T> __device__ __forceinline__ u32 pack_pair(f32 low, f32 high);

template <> __device__ __forceinline__ u32 pack_pair<f16>(f32 low, f32 high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <> __device__ __forceinline__ u32 pack_pair<bf16>(f32 low, f32 high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

}  // namespace tilewise
