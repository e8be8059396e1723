// The hooks that a kernel calls per element, and the words that rendered programs are written in.
//
// A *mod* is a struct that python/tilewise/cuda/expr.py writes from program texts (docs/architecture.md, room expr):
//
//   struct NAME {
//       static constexpr bool SCORE, MASK;                      // whether it changes scores, whether it drops elements
//       struct Captures { ... };                                // a kernel argument: captured arrays and a fault flag
//       f32 score(captures, score, batch, head, query, key)     // the modified score; `score` is already scaled
//       bool mask(captures, batch, head, query, key)            // true: keep
//       f32 gradient<SCATTER>(captures, score, grad, batch, ..) // d loss / d score from d loss / d modified score;
//   };                                                          // adds to the gradients of captures if SCATTER
//
// Kernels call `mask` for elements inside the sequence only, and `score` and `gradient` for kept elements only. So a
// capture is never read for an element that does not exist. An index outside its array reads nothing, counts as 0 and
// sets the fault flag.
#pragma once

#include "common/memory.cuh"
#include "common/types.cuh"

namespace tilewise {

// No program at all.
struct NoMod {
    static constexpr bool SCORE = false, MASK = false;
    struct Captures {
        i32* fault;
    };
    static __device__ __forceinline__ f32 score(const Captures&, f32 score, i64, i64, i64, i64) { return score; }
    static __device__ __forceinline__ bool mask(const Captures&, i64, i64, i64, i64) { return true; }
    template <bool SCATTER> static __device__ __forceinline__ f32 gradient(const Captures&, f32, f32 grad, i64, i64, i64, i64) {
        return grad;
    }
};

namespace expr {

// A captured array. `sums` is the f32 gradient beside it, contiguous, or null. Strides in elements.
template <i32 RANK> struct Array {
    const void* data;
    f32* sums;
    i64 extent[RANK > 0 ? RANK : 1];
    i64 stride[RANK > 0 ? RANK : 1];
};

// Python's meaning of an index: negative counts from the end, once. False: outside.
__device__ __forceinline__ bool wrap(i64& index, i64 extent) {
    if (index < 0) index += extent;
    return index >= 0 && index < extent;
}

// Values of a capture as programs see them: f32, i64 or bool.
template <class T> __device__ __forceinline__ f32 as_float(T x) { return to_f32(x); }
__device__ __forceinline__ f32 as_float(double x) { return static_cast<f32>(x); }
template <class T> __device__ __forceinline__ i64 as_int(T x) { return static_cast<i64>(x); }
template <class T> __device__ __forceinline__ bool as_bool(T x) { return x != 0; }

template <class T> __device__ __forceinline__ T zero() { return T(0); }
template <> __device__ __forceinline__ f16 zero<f16>() { return {0}; }
template <> __device__ __forceinline__ bf16 zero<bf16>() { return {0}; }

template <class T, i32 RANK, class... I>
__device__ __forceinline__ T gather(const Array<RANK>& array, i32* fault, I... given) {
    static_assert(sizeof...(I) == RANK, "one index an axis");
    i64 index[RANK > 0 ? RANK : 1] = {static_cast<i64>(given)...}, place = 0;
    bool inside = true;
#pragma unroll
    for (i32 axis = 0; axis < RANK; ++axis) {
        inside &= wrap(index[axis], array.extent[axis]);
        place += index[axis] * array.stride[axis];
    }
    if (!inside) {
        *fault = 1;
        return zero<T>();
    }
    return static_cast<const T*>(array.data)[place];
}

// Adds to a capture's gradient: by atomics, so that the order of the sum is the machine's.
template <i32 RANK, class... I>
__device__ __forceinline__ void scatter(const Array<RANK>& array, i32* fault, f32 value, I... given) {
    static_assert(sizeof...(I) == RANK, "one index an axis");
    if (array.sums == nullptr) return;
    i64 index[RANK > 0 ? RANK : 1] = {static_cast<i64>(given)...}, place = 0;
    bool inside = true;
#pragma unroll
    for (i32 axis = 0; axis < RANK; ++axis) {
        inside &= wrap(index[axis], array.extent[axis]);
        place = place * array.extent[axis] + index[axis];
    }
    if (inside) {
        atomic_add(array.sums + place, value);
    } else {
        *fault = 1;
    }
}

// --- what is not one operator or one function of C ---------------------------------------------------------------

__device__ __forceinline__ bool is_nan(f32 x) { return x != x; }

// NaN wins; torch's and NumPy's maximum and minimum. Of the two zeros either may come.
__device__ __forceinline__ f32 larger(f32 a, f32 b) { return is_nan(a) || a > b ? a : b; }
__device__ __forceinline__ f32 smaller(f32 a, f32 b) { return is_nan(a) || a < b ? a : b; }
__device__ __forceinline__ i64 larger(i64 a, i64 b) { return a > b ? a : b; }
__device__ __forceinline__ i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// As torch has it: the sign of NaN is 0.
__device__ __forceinline__ f32 sign(f32 x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }
__device__ __forceinline__ i64 sign(i64 x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }
__device__ __forceinline__ f32 relu(f32 x) { return x < 0.0f ? 0.0f : x; }

__device__ __forceinline__ f32 sigmoid(f32 x) {
    const f32 e = expf(-fabsf(x));
    return x >= 0.0f || is_nan(x) ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

// Wraps at 64 bits, as torch and NumPy do; C leaves overflow of signed numbers undefined.
__device__ __forceinline__ i64 add(i64 a, i64 b) { return static_cast<i64>(static_cast<u64>(a) + static_cast<u64>(b)); }
__device__ __forceinline__ i64 subtract(i64 a, i64 b) { return static_cast<i64>(static_cast<u64>(a) - static_cast<u64>(b)); }
__device__ __forceinline__ i64 multiply(i64 a, i64 b) { return static_cast<i64>(static_cast<u64>(a) * static_cast<u64>(b)); }
__device__ __forceinline__ i64 negate(i64 a) { return subtract(0, a); }
__device__ __forceinline__ i64 absolute(i64 a) { return a < 0 ? negate(a) : a; }

// By zero: 0, and the fault flag. I is i32 or i64; -1 apart, because the smallest number has no negative.
template <class I> __device__ __forceinline__ I truncating_divide(I a, I b, i32* fault) {
    if (b == 0) {
        *fault = 2;
        return 0;
    }
    return b == -1 ? static_cast<I>(negate(a)) : static_cast<I>(a / b);
}

template <class I> __device__ __forceinline__ I floor_divide(I a, I b, i32* fault) {
    const I quotient = truncating_divide(a, b, fault);
    const bool exact = b == 0 || b == -1 || a % b == 0;
    return !exact && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

template <class I> __device__ __forceinline__ I modulo(I a, I b, i32* fault) {
    if (b == 0) *fault = 2;
    if (b == 0 || b == -1) return 0;
    const I rest = a % b;
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// Python's: of floats the remainder has the sign of b; the quotient is the floor of the exact one.
__device__ __forceinline__ f32 modulo(f32 a, f32 b) {
    const f32 rest = fmodf(a, b);
    if (rest != 0.0f && (rest < 0.0f) != (b < 0.0f)) return rest + b;
    return rest == 0.0f ? copysignf(0.0f, b) : rest;
}

__device__ __forceinline__ f32 floor_divide(f32 a, f32 b) {
    if (b == 0.0f) return a / b;
    const f32 rest = fmodf(a, b);
    f32 quotient = (a - rest) / b;
    if (rest != 0.0f && (rest < 0.0f) != (b < 0.0f)) quotient -= 1.0f;
    if (quotient == 0.0f) return copysignf(0.0f, a / b);
    const f32 floored = floorf(quotient);
    return quotient - floored > 0.5f ? floored + 1.0f : floored;
}

// Shifts by less than 0 or more than 63 places give what an endless shift would.
__device__ __forceinline__ i64 shift_left(i64 a, i64 b) {
    return b < 0 || b > 63 ? 0 : static_cast<i64>(static_cast<u64>(a) << b);
}
__device__ __forceinline__ i64 shift_right(i64 a, i64 b) { return a >> (b < 0 || b > 63 ? 63 : b); }

// Toward zero; what no 64-bit number can hold goes to the nearest that can, NaN to 0.
__device__ __forceinline__ i64 to_int(f32 x) {
    if (is_nan(x)) return 0;
    if (x >= 9223372036854775808.0f) return 0x7fffffffffffffffLL;
    if (x < -9223372036854775808.0f) return -0x7fffffffffffffffLL - 1;
    return static_cast<i64>(x);
}

}  // namespace expr
}  // namespace tilewise
