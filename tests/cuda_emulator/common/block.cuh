// Stands in for cuda/common/block.cuh.
#pragma once

#include "types.cuh"

namespace tilewise {

inline void block_barrier() { emulator::barrier(); }

inline char* dynamic_shared() { return emulator::dynamic_shared; }

}  // namespace tilewise
