// Addresses. Every product of an extent and a stride is 64 bits wide: no size is too large to be right.
#pragma once

#include "types.cuh"

namespace tilewise {

// First element of a row; `stride` in elements.
template <class T> __device__ __forceinline__ T* row_of(T* base, i64 row, i64 stride) { return base + row * stride; }

}  // namespace tilewise
