// Copies from global to shared memory that need no register and run while the thread goes on (sm_80 and up).
//
// A thread's copies since its last `async_commit` form a group. After `async_wait<N>` all but its N latest groups have
// arrived, for this thread alone: a barrier makes them visible to the block.
#pragma once

#include "../common/types.cuh"
#include "shared.cuh"

namespace tilewise {

// 16 bytes, both addresses aligned to 16; zeros instead if not `wanted`, and then `source` is not read.
__device__ __forceinline__ void async_copy_16(shared_t target, const void* source, bool wanted) {
    const i32 bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(target), "l"(source), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

template <i32 PENDING> __device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

}  // namespace tilewise
