//! AVX-512 (F, BW, VL, DQ): sixteen single or eight double lanes; and the bfloat16 dot-product unit.

use super::vector::{Dot, Half, Vector};
use std::arch::x86_64::*;

/// Sixteen single-precision lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m512);

/// Eight double-precision lanes.
#[derive(Clone, Copy)]
pub(crate) struct F64x8(__m512d);

macro_rules! avx512 {
    ($name:ident, $t:ty, $n:literal, $load:ident, $store:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $max:ident, $min:ident, $fma:ident, $round:ident, $cmp:ident, $blend:ident, $scalef:ident, $sum:ident, { $($rest:item)* }) => {
        // SAFETY: the methods run only where AVX-512 was detected; pointers as the trait demands.
        #[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
        unsafe impl Vector for $name {
            type Elem = $t;
            const LANES: usize = $n;
            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self { unsafe { Self($load(from)) } }
            #[inline(always)]
            unsafe fn store(self, to: *mut $t) { unsafe { $store(to, self.0) } }
            #[inline(always)]
            unsafe fn prefetch<T>(address: *const T) { unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) } }
            #[inline(always)]
            unsafe fn prefetch_once<T>(address: *const T) { unsafe { _mm_prefetch::<_MM_HINT_NTA>(address.cast()) } }
            #[inline(always)]
            unsafe fn splat(value: $t) -> Self { unsafe { Self($splat(value)) } }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self { unsafe { Self($add(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self { unsafe { Self($sub(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self { unsafe { Self($mul(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn div(self, other: Self) -> Self { unsafe { Self($div(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self { unsafe { Self($max(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn min(self, other: Self) -> Self { unsafe { Self($min(self.0, other.0)) } }
            #[inline(always)]
            unsafe fn mul_add(self, a: Self, b: Self) -> Self { unsafe { Self($fma(self.0, a.0, b.0)) } }
            #[inline(always)]
            unsafe fn floor(self) -> Self { unsafe { Self($round::<9>(self.0)) } }
            #[inline(always)]
            unsafe fn where_greater(self, other: Self, a: Self, b: Self) -> Self {
                unsafe { Self($blend($cmp::<_CMP_GT_OQ>(self.0, other.0), b.0, a.0)) }
            }
            #[inline(always)]
            unsafe fn any_greater(self, other: Self) -> bool {
                unsafe { $cmp::<_CMP_GT_OQ>(self.0, other.0) != 0 }
            }
            #[inline(always)]
            unsafe fn at_least(self, other: Self) -> u32 {
                unsafe { u32::from($cmp::<_CMP_GE_OQ>(self.0, other.0)) }
            }
            #[inline(always)]
            unsafe fn exp2_integer_times(self, factor: Self) -> Self { unsafe { Self($scalef(factor.0, self.0)) } }
            #[inline(always)]
            unsafe fn sum(self) -> $t { unsafe { $sum(self.0) } }
            $($rest)*
        }
    };
}

avx512!(
    F32x16,
    f32,
    16,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_max_ps,
    _mm512_min_ps,
    _mm512_fmadd_ps,
    _mm512_roundscale_ps,
    _mm512_cmp_ps_mask,
    _mm512_mask_blend_ps,
    _mm512_scalef_ps,
    _mm512_reduce_add_ps,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self; 16]) {
            unsafe {
                let mut t = [_mm512_setzero_ps(); 16];
                for i in 0..8 {
                    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].0, rows[2 * i + 1].0);
                    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].0, rows[2 * i + 1].0);
                }
                // u[4 g + j]: column j of each 128-bit part, for the four rows of group g
                let mut u = [_mm512_setzero_ps(); 16];
                for g in 0..4 {
                    u[4 * g] = _mm512_shuffle_ps::<0x44>(t[4 * g], t[4 * g + 2]);
                    u[4 * g + 1] = _mm512_shuffle_ps::<0xee>(t[4 * g], t[4 * g + 2]);
                    u[4 * g + 2] = _mm512_shuffle_ps::<0x44>(t[4 * g + 1], t[4 * g + 3]);
                    u[4 * g + 3] = _mm512_shuffle_ps::<0xee>(t[4 * g + 1], t[4 * g + 3]);
                }
                for j in 0..4 {
                    let a = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]); // parts 0, 2 of groups 0, 1
                    let b = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]); // parts 1, 3
                    let c = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
                    let d = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
                    rows[j].0 = _mm512_shuffle_f32x4::<0x88>(a, c);
                    rows[4 + j].0 = _mm512_shuffle_f32x4::<0x88>(b, d);
                    rows[8 + j].0 = _mm512_shuffle_f32x4::<0xdd>(a, c);
                    rows[12 + j].0 = _mm512_shuffle_f32x4::<0xdd>(b, d);
                }
            }
        }
    }
);

avx512!(
    F64x8,
    f64,
    8,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_set1_pd,
    _mm512_add_pd,
    _mm512_sub_pd,
    _mm512_mul_pd,
    _mm512_div_pd,
    _mm512_max_pd,
    _mm512_min_pd,
    _mm512_fmadd_pd,
    _mm512_roundscale_pd,
    _mm512_cmp_pd_mask,
    _mm512_mask_blend_pd,
    _mm512_scalef_pd,
    _mm512_reduce_add_pd,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self(_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())))) }
        }
        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            // Double precision is for correctness: lane by lane through libm, one rounding.
            let mut lanes = [0.0; 8];
            unsafe {
                self.store(lanes.as_mut_ptr());
                Self::load(lanes.map(libm::exp2).as_ptr())
            }
        }
    }
);

// SAFETY: runs only where AVX-512 was detected; pointers as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
unsafe impl Half for F32x16 {
    #[inline(always)]
    unsafe fn load_low(from: *const u32) -> Self {
        unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_high(from: *const u32) -> Self {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            Self(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32))))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let upper = _mm512_srli_epi32::<16>(round_bf16(self.0));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_two(first: Self, second: Self, to: *mut u16) {
        unsafe {
            // The odd 16-bit elements of both registers, in order.
            #[rustfmt::skip]
            let odd = _mm512_set_epi16(
                63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
            );
            let both = _mm512_permutex2var_epi16(round_bf16(first.0), odd, round_bf16(second.0));
            _mm512_storeu_si512(to.cast(), both);
        }
    }
    #[inline(always)]
    unsafe fn pair_up(low: *const u16, high: *const u16, to: *mut u32) {
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.cast()));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(low: Self, high: Self, to: *mut u32) {
        unsafe {
            let (low, high) = (round_bf16(low.0), round_bf16(high.0));
            // 0xf8 = a | (b & c): the low halves, and the high ones under a mask
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_storeu_si512(to.cast(), _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(low), high, mask));
        }
    }
}

/// Rounds to nearest even in the upper 16 bits (the lower ones are left dirty); NaN becomes a quiet NaN.
#[inline(always)]
unsafe fn round_bf16(x: __m512) -> __m512i {
    // SAFETY: called by the methods above only.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x0001_0000));
        let up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

/// bfloat16 pairs through the dot-product unit: two products and two additions a lane and instruction.
pub(crate) struct DotUnit;

// SAFETY: runs only where AVX512_BF16 was detected; pointers as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
unsafe impl Dot for DotUnit {
    type V = F32x16;
    type A = u32;
    type B = u32;
    type AReg = __m512bh;
    type BReg = __m512bh;

    #[inline(always)]
    unsafe fn splat_a(from: *const u32) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_set1_epi32(from.read_unaligned() as i32)) }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const u32) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512bh, b: __m512bh, acc: F32x16) -> F32x16 {
        unsafe { F32x16(_mm512_dpbf16_ps(acc.0, a, b)) }
    }
}
