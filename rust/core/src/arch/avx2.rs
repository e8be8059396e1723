//! AVX2 with FMA and F16C: eight single or four double lanes.

use super::vector::{Half, Vector};
use std::arch::x86_64::*;

/// Eight single-precision lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x8(__m256);

/// Four double-precision lanes.
#[derive(Clone, Copy)]
pub(crate) struct F64x4(__m256d);

macro_rules! avx2 {
    ($name:ident, $t:ty, $n:literal, $load:ident, $store:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident,
     $div:ident, $max:ident, $min:ident, $fma:ident, $floor:ident, $cmp:ident, $blend:ident, $mask:ident, { $($rest:item)* }) => {
        // SAFETY: the methods run only where AVX2 and FMA were detected; pointers as the trait demands.
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
            unsafe fn floor(self) -> Self { unsafe { Self($floor(self.0)) } }
            #[inline(always)]
            unsafe fn where_greater(self, other: Self, a: Self, b: Self) -> Self {
                unsafe { Self($blend(b.0, a.0, $cmp::<_CMP_GT_OQ>(self.0, other.0))) }
            }
            #[inline(always)]
            unsafe fn any_greater(self, other: Self) -> bool {
                unsafe { $mask($cmp::<_CMP_GT_OQ>(self.0, other.0)) != 0 }
            }
            #[inline(always)]
            unsafe fn at_least(self, other: Self) -> u32 {
                unsafe { $mask($cmp::<_CMP_GE_OQ>(self.0, other.0)) as u32 }
            }
            #[inline(always)]
            unsafe fn sum(self) -> $t {
                let mut lanes = [0.0; $n];
                unsafe { self.store(lanes.as_mut_ptr()) };
                let mut width = $n / 2;
                while width > 0 {
                    for i in 0..width { lanes[i] += lanes[i + width]; }
                    width /= 2;
                }
                lanes[0]
            }
            $($rest)*
        }
    };
}

avx2!(
    F32x8,
    f32,
    8,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_max_ps,
    _mm256_min_ps,
    _mm256_fmadd_ps,
    _mm256_floor_ps,
    _mm256_cmp_ps,
    _mm256_blendv_ps,
    _mm256_movemask_ps,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())))) }
        }
        #[inline(always)]
        unsafe fn exp2_integer_times(self, factor: Self) -> Self {
            // The exponent is added to the factor's bits. Below -127 nothing is left: -127 turns the factor 1 into
            // exactly 0, which is what -inf must give; subnormal results are not built. NaN lanes keep the NaN of
            // the factor (cvtps of NaN is 0x80000000, whose shift by 23 is 0).
            unsafe {
                let n = _mm256_max_ps(_mm256_set1_ps(-127.0), self.0);
                let bits = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
                let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(factor.0), bits));
                let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, _mm256_set1_ps(-126.0));
                Self(_mm256_andnot_ps(tiny, scaled))
            }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self; 16]) {
            unsafe {
                let mut t = [_mm256_setzero_ps(); 8];
                for i in 0..4 {
                    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].0, rows[2 * i + 1].0);
                    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].0, rows[2 * i + 1].0);
                }
                let mut u = [_mm256_setzero_ps(); 8];
                for i in 0..2 {
                    u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                    u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                    u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
                }
                for i in 0..4 {
                    rows[i].0 = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
                    rows[i + 4].0 = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
                }
            }
        }
    }
);

avx2!(
    F64x4,
    f64,
    4,
    _mm256_loadu_pd,
    _mm256_storeu_pd,
    _mm256_set1_pd,
    _mm256_add_pd,
    _mm256_sub_pd,
    _mm256_mul_pd,
    _mm256_div_pd,
    _mm256_max_pd,
    _mm256_min_pd,
    _mm256_fmadd_pd,
    _mm256_floor_pd,
    _mm256_cmp_pd,
    _mm256_blendv_pd,
    _mm256_movemask_pd,
    {
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe {
                Self(_mm256_cvtepi32_pd(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(from.cast::<i32>().read_unaligned()))))
            }
        }
        #[inline(always)]
        unsafe fn exp2_integer_times(self, factor: Self) -> Self {
            unsafe { self.exp2().mul(factor) }
        }
        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            // Double precision is for correctness: lane by lane through libm, one rounding.
            let mut lanes = [0.0; 4];
            unsafe {
                self.store(lanes.as_mut_ptr());
                Self::load(lanes.map(libm::exp2).as_ptr())
            }
        }
    }
);

// SAFETY: runs only where AVX2 was detected; pointers as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all: the line above
unsafe impl Half for F32x8 {
    #[inline(always)]
    unsafe fn load_low(from: *const u32) -> Self {
        unsafe { Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_high(from: *const u32) -> Self {
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast());
            Self(_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32))))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let upper = _mm256_srli_epi32::<16>(round_bf16(self.0));
            // The pack works on 128-bit halves: bring its two useful quarters together.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(upper, upper));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(low: Self, high: Self, to: *mut u32) {
        unsafe {
            let (low, high) = (round_bf16(low.0), round_bf16(high.0));
            let high = _mm256_and_si256(high, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            _mm256_storeu_si256(to.cast(), _mm256_or_si256(_mm256_srli_epi32::<16>(low), high));
        }
    }
}

/// Rounds to nearest even in the upper 16 bits (the lower ones are left dirty); NaN becomes a quiet NaN.
#[inline(always)]
unsafe fn round_bf16(x: __m256) -> __m256i {
    // SAFETY: called by the methods above only.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}
