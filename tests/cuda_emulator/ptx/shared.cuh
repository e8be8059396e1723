// Stands in for cuda/ptx/shared.cuh: an address is a pointer, and must lie in the dynamic shared memory that
// the launch asked for.
#pragma once

#include "../common/types.cuh"

namespace tilewise {

using shared_t = std::uintptr_t;

inline shared_t shared_address(const void* pointer) { return reinterpret_cast<shared_t>(pointer); }

template <class T> inline T* shared_pointer(shared_t address, std::size_t bytes) {
    const shared_t first = shared_address(emulator::dynamic_shared);
    if (address % bytes != 0) emulator::fault = "an access to shared memory is not aligned";
    if (address < first || address + bytes > first + emulator::dynamic_shared_used) {
        emulator::fault = "an access outside shared memory";
        return reinterpret_cast<T*>(emulator::dynamic_shared);
    }
    return reinterpret_cast<T*>(address);
}

inline void store_shared_16(shared_t target, const u32 (&word)[4]) {
    std::memcpy(shared_pointer<char>(target, 16), word, 16);
    emulator::wrote(reinterpret_cast<const void*>(target));
}

inline void load_shared_16(shared_t source, f32 (&value)[4]) {
    std::memcpy(value, shared_pointer<char>(source, 16), 16);
}

inline f32 load_shared(shared_t source) { return *shared_pointer<f32>(source, 4); }

}  // namespace tilewise
