//! The portable level: arrays of lanes in plain Rust. It is also what the other levels are compared against.

use super::vector::{Half, Vector};

/// Lanes in an array; the compiler may use whatever the baseline target has.
#[derive(Clone, Copy)]
pub(crate) struct Lanes<T, const N: usize>([T; N]);

macro_rules! scalar {
    ($t:tt, $n:literal, $exp2:expr) => {
        // SAFETY: no special instruction is used; loads and stores stay inside the N elements the caller grants.
        unsafe impl Vector for Lanes<$t, $n> {
            type Elem = $t;
            const LANES: usize = $n;

            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self {
                // SAFETY: N readable elements (trait contract).
                Self(unsafe { from.cast::<[$t; $n]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $t) {
                // SAFETY: N writable elements (trait contract).
                unsafe { to.cast::<[$t; $n]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const i8) -> Self {
                // SAFETY: N readable bytes (trait contract).
                Self(unsafe { from.cast::<[i8; $n]>().read_unaligned() }.map(<$t>::from))
            }
            #[inline(always)]
            unsafe fn splat(value: $t) -> Self {
                Self([value; $n])
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
            }
            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
            }
            #[inline(always)]
            unsafe fn div(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] / other.0[i]))
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] }))
            }
            #[inline(always)]
            unsafe fn min(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] }))
            }
            #[inline(always)]
            unsafe fn mul_add(self, a: Self, b: Self) -> Self {
                // Two roundings: a fused operation would be a call into libm on a machine without FMA.
                Self(std::array::from_fn(|i| self.0[i] * a.0[i] + b.0[i]))
            }
            #[inline(always)]
            unsafe fn floor(self) -> Self {
                Self(std::array::from_fn(|i| self.0[i].floor()))
            }
            #[inline(always)]
            unsafe fn where_greater(self, other: Self, a: Self, b: Self) -> Self {
                Self(std::array::from_fn(|i| if self.0[i] > other.0[i] { a.0[i] } else { b.0[i] }))
            }
            #[inline(always)]
            unsafe fn any_greater(self, other: Self) -> bool {
                (0..$n).any(|i| self.0[i] > other.0[i])
            }
            #[inline(always)]
            unsafe fn exp2_integer_times(self, factor: Self) -> Self {
                Self(std::array::from_fn(|i| factor.0[i] * $exp2(self.0[i])))
            }
            #[inline(always)]
            unsafe fn sum(self) -> $t {
                self.0.iter().sum()
            }
            scalar!(@exp2 $t, $n);
        }
    };
    (@exp2 f32, $n:literal) => {};
    (@exp2 f64, $n:literal) => {
        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            Self(self.0.map(libm::exp2))
        }
    };
}

/// 2^n for integral n, exact down to the smallest normal number; smaller results are 0.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    if n.is_nan() {
        n
    } else if n < -126.0 {
        0.0
    } else if n > 127.0 {
        f32::INFINITY
    } else {
        f32::from_bits((((n as i32) + 127) << 23) as u32)
    }
}

scalar!(f32, 8, power_of_two);
scalar!(f64, 4, libm::exp2);

// SAFETY: as above.
unsafe impl Half for Lanes<f32, 8> {
    #[inline(always)]
    unsafe fn load_low(from: *const u32) -> Self {
        // SAFETY: N readable units (trait contract).
        let pairs = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Self(pairs.map(|pair| f32::from_bits(pair << 16)))
    }
    #[inline(always)]
    unsafe fn load_high(from: *const u32) -> Self {
        // SAFETY: N readable units (trait contract).
        let pairs = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Self(pairs.map(|pair| f32::from_bits(pair & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: N readable elements (trait contract).
        let raw = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        Self(raw.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: N writable elements (trait contract).
        unsafe { to.cast::<[u16; 8]>().write_unaligned(self.0.map(|x| half::bf16::from_f32(x).to_bits())) }
    }
    #[inline(always)]
    unsafe fn store_pairs(low: Self, high: Self, to: *mut u32) {
        let round = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
        let pairs: [u32; 8] = std::array::from_fn(|i| round(low.0[i]) | (round(high.0[i]) << 16));
        // SAFETY: N writable units (trait contract).
        unsafe { to.cast::<[u32; 8]>().write_unaligned(pairs) }
    }
}
