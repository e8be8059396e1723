// Neighbouring elements that travel together: 16 bytes where alignment allows, one element otherwise.
#pragma once

#include "memory.cuh"
#include "types.cuh"

namespace tilewise {

template <class T, i32 WIDTH> struct Packet {
    static_assert(WIDTH * sizeof(T) == 16, "a packet is 16 bytes or one element");
    union {
        u32 word[4];
        T element[WIDTH];
    };

    __device__ __forceinline__ void clear() { word[0] = word[1] = word[2] = word[3] = 0; }
    __device__ __forceinline__ void load_once(const T* source) { load_once_16(source, word); }
    __device__ __forceinline__ void store(T* target) const { store_16(target, word); }
};

template <class T> struct Packet<T, 1> {
    T element[1];

    __device__ __forceinline__ void clear() { element[0] = from_f32<T>(0.0f); }
    __device__ __forceinline__ void load_once(const T* source) { element[0] = *source; }
    __device__ __forceinline__ void store(T* target) const { *target = element[0]; }
};

}  // namespace tilewise
