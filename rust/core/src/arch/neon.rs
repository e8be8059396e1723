//! NEON: two registers of four single lanes, or of two double lanes.
//!
//! Written against the stable `core::arch::aarch64` intrinsics. Not compiled or run on the machines this
//! project has used so far (x86-64 only).

use super::vector::{Half, Vector};
use std::arch::aarch64::*;

/// Eight single-precision lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x4x2(float32x4_t, float32x4_t);

/// Four double-precision lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct F64x2x2(float64x2_t, float64x2_t);

macro_rules! neon {
    ($name:ident, $t:ty, $half:literal, $load:ident, $store:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $fma:ident, $floor:ident, $gt:ident, $lt:ident, $select:ident, $any:expr, $sum:ident, { $($rest:item)* }) => {
        // SAFETY: NEON is part of the aarch64 baseline; pointers as the trait demands.
        #[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
        unsafe impl Vector for $name {
            type Elem = $t;
            const LANES: usize = 2 * $half;
            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self { unsafe { Self($load(from), $load(from.add($half))) } }
            #[inline(always)]
            unsafe fn store(self, to: *mut $t) { unsafe { $store(to, self.0); $store(to.add($half), self.1) } }
            #[inline(always)]
            unsafe fn splat(value: $t) -> Self { unsafe { Self($splat(value), $splat(value)) } }
            #[inline(always)]
            unsafe fn add(self, o: Self) -> Self { unsafe { Self($add(self.0, o.0), $add(self.1, o.1)) } }
            #[inline(always)]
            unsafe fn sub(self, o: Self) -> Self { unsafe { Self($sub(self.0, o.0), $sub(self.1, o.1)) } }
            #[inline(always)]
            unsafe fn mul(self, o: Self) -> Self { unsafe { Self($mul(self.0, o.0), $mul(self.1, o.1)) } }
            #[inline(always)]
            unsafe fn div(self, o: Self) -> Self { unsafe { Self($div(self.0, o.0), $div(self.1, o.1)) } }
            #[inline(always)]
            unsafe fn max(self, o: Self) -> Self {
                unsafe { Self($select($gt(self.0, o.0), self.0, o.0), $select($gt(self.1, o.1), self.1, o.1)) }
            }
            #[inline(always)]
            unsafe fn min(self, o: Self) -> Self {
                unsafe { Self($select($lt(self.0, o.0), self.0, o.0), $select($lt(self.1, o.1), self.1, o.1)) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, a: Self, b: Self) -> Self {
                unsafe { Self($fma(b.0, self.0, a.0), $fma(b.1, self.1, a.1)) }
            }
            #[inline(always)]
            unsafe fn floor(self) -> Self { unsafe { Self($floor(self.0), $floor(self.1)) } }
            #[inline(always)]
            unsafe fn where_greater(self, o: Self, a: Self, b: Self) -> Self {
                unsafe { Self($select($gt(self.0, o.0), a.0, b.0), $select($gt(self.1, o.1), a.1, b.1)) }
            }
            #[inline(always)]
            unsafe fn any_greater(self, o: Self) -> bool { unsafe { $any($gt(self.0, o.0)) || $any($gt(self.1, o.1)) } }
            #[inline(always)]
            unsafe fn sum(self) -> $t { unsafe { $sum($add(self.0, self.1)) } }
            $($rest)*
        }
    };
}

neon!(
    F32x4x2,
    f32,
    4,
    vld1q_f32,
    vst1q_f32,
    vdupq_n_f32,
    vaddq_f32,
    vsubq_f32,
    vmulq_f32,
    vdivq_f32,
    vfmaq_f32,
    vrndmq_f32,
    vcgtq_f32,
    vcltq_f32,
    vbslq_f32,
    |mask| vmaxvq_u32(mask) != 0,
    vaddvq_f32,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe {
                let wide = vmovl_s8(vld1_s8(from));
                let half = |part: int16x4_t| vcvtq_f32_s32(vmovl_s16(part));
                Self(half(vget_low_s16(wide)), half(vget_high_s16(wide)))
            }
        }
        #[inline(always)]
        unsafe fn exp2_integer_times(self, factor: Self) -> Self {
            // Exponent added to the factor's bits; results below the smallest normal number are 0, as on AVX2.
            unsafe fn half(n: float32x4_t, factor: float32x4_t) -> float32x4_t {
                unsafe {
                    let clamped = vbslq_f32(vcltq_f32(n, vdupq_n_f32(-127.0)), vdupq_n_f32(-127.0), n);
                    let bits = vshlq_n_s32::<23>(vcvtq_s32_f32(clamped));
                    let scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(factor), bits));
                    vbslq_f32(vcltq_f32(n, vdupq_n_f32(-126.0)), vdupq_n_f32(0.0), scaled)
                }
            }
            unsafe { Self(half(self.0, factor.0), half(self.1, factor.1)) }
        }
    }
);

neon!(
    F64x2x2,
    f64,
    2,
    vld1q_f64,
    vst1q_f64,
    vdupq_n_f64,
    vaddq_f64,
    vsubq_f64,
    vmulq_f64,
    vdivq_f64,
    vfmaq_f64,
    vrndmq_f64,
    vcgtq_f64,
    vcltq_f64,
    vbslq_f64,
    |mask| (vgetq_lane_u64::<0>(mask) | vgetq_lane_u64::<1>(mask)) != 0,
    vaddvq_f64,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            // Double precision is for correctness: byte by byte.
            let lanes: [f64; 4] = std::array::from_fn(|i| unsafe { f64::from(*from.add(i)) });
            unsafe { Self::load(lanes.as_ptr()) }
        }
        #[inline(always)]
        unsafe fn exp2_integer_times(self, factor: Self) -> Self {
            unsafe { self.exp2().mul(factor) }
        }
        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            let mut lanes = [0.0; 4];
            unsafe {
                self.store(lanes.as_mut_ptr());
                Self::load(lanes.map(libm::exp2).as_ptr())
            }
        }
    }
);

// SAFETY: as above.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
unsafe impl Half for F32x4x2 {
    #[inline(always)]
    unsafe fn load_low(from: *const u32) -> Self {
        unsafe {
            let widen = |at: *const u32| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vld1q_u32(at)));
            Self(widen(from), widen(from.add(4)))
        }
    }
    #[inline(always)]
    unsafe fn load_high(from: *const u32) -> Self {
        unsafe {
            let widen = |at: *const u32| vreinterpretq_f32_u32(vandq_u32(vld1q_u32(at), vdupq_n_u32(0xffff_0000)));
            Self(widen(from), widen(from.add(4)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let widen = |at: *const u16| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at)));
            Self(widen(from), widen(from.add(4)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let mut lanes = [0f32; 8];
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.into_iter().enumerate() {
                to.add(i).write_unaligned(half::bf16::from_f32(lane).to_bits());
            }
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(low: Self, high: Self, to: *mut u32) {
        let (mut a, mut b) = ([0f32; 8], [0f32; 8]);
        unsafe {
            low.store(a.as_mut_ptr());
            high.store(b.as_mut_ptr());
            for i in 0..8 {
                let round = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
                to.add(i).write_unaligned(round(a[i]) | (round(b[i]) << 16));
            }
        }
    }
}
