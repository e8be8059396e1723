// Functions of one number in f32, each in two grades: to the last bits, or by the fast instructions of the GPU, whose
// few parts in 2^21 vanish where the result is rounded to 16 bits.
#pragma once

#include "types.cuh"

namespace tilewise {

template <bool FAST> __device__ __forceinline__ f32 exponential_of(f32 x) { return FAST ? __expf(x) : expf(x); }

// 1 / x for x >= 1, infinity included.
template <bool FAST> __device__ __forceinline__ f32 reciprocal(f32 x) { return FAST ? __fdividef(1.0f, x) : 1.0f / x; }

template <bool FAST> __device__ __forceinline__ f32 logistic(f32 x) {
    return reciprocal<FAST>(1.0f + exponential_of<FAST>(-x));
}

}  // namespace tilewise
