// Floats as unsigned integers of the same order, so that the warp's integer reductions can rank them exactly.
//
//   absent < NaN < -inf < ... < -0 = +0 < ... < +inf
//
// No mantissa bit is given up. The two zeros tie, as they do for `==`; all NaNs tie below every number.
#pragma once

#include "types.cuh"

namespace tilewise {

constexpr u32 KEY_ABSENT = 0;
constexpr u32 KEY_NAN = 1;

__device__ __forceinline__ u32 order_key(f32 x) {
    if (x != x) return KEY_NAN;
    const u32 bits = x == 0.0f ? 0u : __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);  // -inf becomes 0x007fffff, above both special keys
}

}  // namespace tilewise
