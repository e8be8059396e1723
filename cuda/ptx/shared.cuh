// Addresses in shared memory as instructions take them, and plain loads and stores through them.
#pragma once

#include "../common/types.cuh"

namespace tilewise {

using shared_t = u32;

__device__ __forceinline__ shared_t shared_address(const void* pointer) {
    return static_cast<shared_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared_16(shared_t target, const u32 (&word)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(target), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}

__device__ __forceinline__ void load_shared_16(shared_t source, f32 (&value)[4]) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
                 : "r"(source));
}

__device__ __forceinline__ f32 load_shared(shared_t source) {
    f32 value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(source));
    return value;
}

}  // namespace tilewise
