// Stands in for cuda/common/memory.cuh; an address that a GPU would refuse is a fault.
#pragma once

#include "types.cuh"

namespace tilewise {

inline void check_16(const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) emulator::fault = "a 16-byte access is not aligned";
}

inline void load_once_16(const void* source, u32 (&word)[4]) {
    check_16(source);
    std::memcpy(word, source, 16);
}

inline void store_16(void* target, const u32 (&word)[4]) {
    check_16(target);
    std::memcpy(target, word, 16);
}

inline void atomic_add(f32* target, f32 value) { *target += value; }

}  // namespace tilewise
