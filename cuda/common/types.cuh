// Element types and the two conversions every kernel uses: widen to f32, round once from f32.
//
// f16 and bf16 are storage only: all arithmetic is f32. They are 16 bits in a struct and convert by one PTX
// instruction, so no toolkit header is needed and NVRTC alone compiles a kernel.
#pragma once

namespace tilewise {

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using u16 = unsigned short;
using f32 = float;

__device__ __forceinline__ f32 infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ f32 not_a_number() { return __uint_as_float(0x7fc00000u); }

struct f16 {
    u16 bits;
};

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ f32 to_f32(f32 x) { return x; }

__device__ __forceinline__ f32 to_f32(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ f32 to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

// Round to nearest, ties to even.
template <class T> __device__ __forceinline__ T from_f32(f32 x);

template <> __device__ __forceinline__ f32 from_f32<f32>(f32 x) { return x; }

template <> __device__ __forceinline__ f16 from_f32<f16>(f32 x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <> __device__ __forceinline__ bf16 from_f32<bf16>(f32 x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

}  // namespace tilewise
