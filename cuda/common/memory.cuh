// 16 bytes in one instruction. Addresses are 16-byte aligned and in global memory.
#pragma once

#include "types.cuh"

namespace tilewise {

// For memory that is constant during the kernel and that one thread reads once: it stays out of L1.
__device__ __forceinline__ void load_once_16(const void* source, u32 (&word)[4]) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
        : "l"(source));
}

__device__ __forceinline__ void store_16(void* target, const u32 (&word)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(target), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}

// The order in which threads add is the machine's.
__device__ __forceinline__ void atomic_add(f32* target, f32 value) { atomicAdd(target, value); }

}  // namespace tilewise
