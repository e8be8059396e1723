// Stands in for cuda/common/types.cuh: the same names, conversions in plain C++.
#pragma once

namespace tilewise {

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using u16 = unsigned short;
using f32 = float;

inline u32 __float_as_uint(f32 x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline f32 __uint_as_float(u32 bits) {
    f32 x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline f32 __expf(f32 x) { return expf(x); }
inline f32 __fdividef(f32 x, f32 y) { return x / y; }

inline f32 infinity() { return __uint_as_float(0x7f800000u); }
inline f32 not_a_number() { return __uint_as_float(0x7fc00000u); }

struct f16 {
    u16 bits;
};

struct bf16 {
    u16 bits;
};

inline f32 to_f32(f32 x) { return x; }
inline f32 to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

inline f32 to_f32(f16 x) {
    const u32 sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<f32>(mantissa), -24), __uint_as_float(sign));
    return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

template <class T> inline T from_f32(f32 x);

template <> inline f32 from_f32<f32>(f32 x) { return x; }

template <> inline bf16 from_f32<bf16>(f32 x) {
    if (x != x) return {0x7fff};
    const u32 bits = __float_as_uint(x);
    return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <> inline f16 from_f32<f16>(f32 x) {
    if (x != x) return {0x7fff};
    const u32 sign = __float_as_uint(x) >> 16 & 0x8000, size = __float_as_uint(x) & 0x7fffffff;
    u32 half;
    if (size >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
    else if (size < 0x38800000) half = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000;  // rounds at 2^-24
    else half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
    return {static_cast<u16>(sign | half)};
}

}  // namespace tilewise
