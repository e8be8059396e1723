// What the threads of a block share: a barrier, and memory whose size the host says at launch.
#pragma once

#include "types.cuh"

namespace tilewise {

// All threads must arrive. What each wrote to shared or global memory before, all see after.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ __align__(1024) char tilewise_dynamic_shared[];
    return tilewise_dynamic_shared;
}

}  // namespace tilewise
