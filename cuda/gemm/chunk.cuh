// Sixteen bytes of a row on their way between memory and f32 registers; the last chunk of a row may be cut short.
#pragma once

#include "../common/packet.cuh"
#include "../common/types.cuh"
#include "../ptx/shared.cuh"
#include "operand.cuh"

namespace tilewise {
namespace gemm {

// If ALIGNED, the address is aligned to 16 bytes and a chunk is whole; else only `count` elements are touched.
template <class T, bool ALIGNED>
__device__ __forceinline__ void load_chunk(const T* source, i64 count, f32 (&value)[CHUNK<T>]) {
    if (ALIGNED) {
        Packet<T, CHUNK<T>> packet;
        packet.load_once(source);
#pragma unroll
        for (i32 i = 0; i < CHUNK<T>; ++i) value[i] = to_f32(packet.element[i]);
    } else {
#pragma unroll
        for (i32 i = 0; i < CHUNK<T>; ++i) value[i] = i < count ? to_f32(source[i]) : 0.0f;
    }
}

template <class T, bool ALIGNED>
__device__ __forceinline__ void store_chunk(T* target, i64 count, const f32 (&value)[CHUNK<T>]) {
    if (ALIGNED) {
        Packet<T, CHUNK<T>> packet;
#pragma unroll
        for (i32 i = 0; i < CHUNK<T>; ++i) packet.element[i] = from_f32<T>(value[i]);
        packet.store(target);
    } else {
#pragma unroll
        for (i32 i = 0; i < CHUNK<T>; ++i) {
            if (i < count) target[i] = from_f32<T>(value[i]);
        }
    }
}

// Of unloaded sums.
template <i32 COUNT> __device__ __forceinline__ void load_sums(const f32* source, f32 (&value)[COUNT]) {
#pragma unroll
    for (i32 i = 0; i < COUNT; i += 4) {
        f32 four[4];
        load_shared_16(shared_address(source + i), four);
#pragma unroll
        for (i32 k = 0; k < 4; ++k) value[i + k] = four[k];
    }
}

}  // namespace gemm
}  // namespace tilewise
