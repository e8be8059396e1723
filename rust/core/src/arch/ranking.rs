//! The kernels of choosing, by level: as `table`, for `kernel/rank.rs`. What they compute has the same bits on every
//! level: comparisons are exact, and the scores use no fused operation.

use super::kernel::rank;
use super::table::Kernel;
use super::vector::Vector;
use super::{Level, level, scalar};
use crate::dtype::Real;

pub(crate) use rank::sigmoid;

/// Kernels of choosing on one floating-point type.
pub struct Ranking<T: Real> {
    lanes: usize,
    has_nan: unsafe fn(*const T, usize) -> bool,
    bins: unsafe fn(*const T, usize, *mut T, usize),
    kth: unsafe fn(*const T, usize, u32) -> T,
    ranks: unsafe fn(*const T, usize, usize, *mut u32),
    at_least: unsafe fn(*const T, usize, T, *mut u32) -> usize,
    at_least_each: unsafe fn(*const T, usize, *const T, *mut u32) -> usize,
    exponentials: unsafe fn(&[T], f64, &mut [f64]) -> f64,
    sigmoids: unsafe fn(&[T], &mut [f64]),
}

impl<T: Real> Ranking<T> {
    /// The most registers of bins.
    pub const REGISTERS: usize = 8;

    /// Lanes of a register.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Whether any element is NaN.
    pub fn has_nan(&self, row: &[T]) -> bool {
        // SAFETY: one slice; the level is available (see `table`).
        unsafe { (self.has_nan)(row.as_ptr(), row.len()) }
    }

    /// Fills 1, 2, 4 or 8 registers of bins with the largest elements of disjoint parts of the row. The k-th largest of
    /// them is at most the row's k-th largest element. No element may be NaN.
    pub fn bins(&self, row: &[T], tops: &mut [T]) {
        let registers = tops.len() / self.lanes;
        assert!(tops.len().is_multiple_of(self.lanes) && [1, 2, 4, Self::REGISTERS].contains(&registers));
        // SAFETY: extents checked; level as above.
        unsafe { (self.bins)(row.as_ptr(), row.len(), tops.as_mut_ptr(), registers) }
    }

    /// The k-th largest of one or two whole registers; 1 <= k, no NaN.
    pub fn kth(&self, values: &[T], k: usize) -> T {
        let registers = values.len() / self.lanes;
        assert!(values.len().is_multiple_of(self.lanes) && [1, 2].contains(&registers) && k <= values.len());
        // SAFETY: extents checked; level as above.
        unsafe { (self.kth)(values.as_ptr(), registers, k as u32) }
    }

    /// The most elements that [`Ranking::ranks`] takes.
    pub fn ranked(&self) -> usize {
        4 * self.lanes
    }

    /// The place of each of the first elements by falling value, ties by rising index; as many as there are `ranks`.
    /// `values` is 1, 2 or 4 whole registers, filled up with -inf; no NaN.
    pub fn ranks(&self, values: &[T], ranks: &mut [u32]) {
        let registers = values.len() / self.lanes;
        assert!(values.len().is_multiple_of(self.lanes) && [1, 2, 4].contains(&registers));
        assert!(ranks.len() <= values.len());
        // SAFETY: extents checked (four registers hold at most 64 lanes); level as above.
        unsafe { (self.ranks)(values.as_ptr(), registers, ranks.len(), ranks.as_mut_ptr()) }
    }

    /// The indices of the elements that are at least `bar`, ascending, into `out`; returns how many.
    pub fn at_least(&self, row: &[T], bar: T, out: &mut [u32]) -> usize {
        assert!(out.len() >= row.len() && u32::try_from(row.len()).is_ok());
        // SAFETY: extents checked; level as above.
        unsafe { (self.at_least)(row.as_ptr(), row.len(), bar, out.as_mut_ptr()) }
    }

    /// As [`Ranking::at_least`], each element with its own bar; a NaN bar lets nothing pass.
    pub fn at_least_each(&self, row: &[T], bars: &[T], out: &mut [u32]) -> usize {
        assert!(out.len() >= row.len() && bars.len() == row.len() && u32::try_from(row.len()).is_ok());
        // SAFETY: extents checked; level as above.
        unsafe { (self.at_least_each)(row.as_ptr(), row.len(), bars.as_ptr(), out.as_mut_ptr()) }
    }

    /// `out[i] = e^(row[i] - top)`, 1 where an element equals `top`; returns the sum. No NaN, nothing above `top`.
    pub fn exponentials(&self, row: &[T], top: f64, out: &mut [f64]) -> f64 {
        assert_eq!(row.len(), out.len());
        // SAFETY: slices; level as above.
        unsafe { (self.exponentials)(row, top, out) }
    }

    /// `out[i] = 1 / (1 + e^(-row[i]))`. No NaN.
    pub fn sigmoids(&self, row: &[T], out: &mut [f64]) {
        assert_eq!(row.len(), out.len());
        // SAFETY: slices; level as above.
        unsafe { (self.sigmoids)(row, out) }
    }
}

/// Types that can be ranked.
pub trait Ranked: Kernel {
    /// The table of the level in use.
    fn ranking() -> &'static Ranking<Self>;
    /// The next larger number; +inf of itself.
    fn above(self) -> Self;
}

macro_rules! ranking {
    ($module:ident, $t:ty, $v:ty, $(#[$gate:meta])*) => {
        mod $module {
            use super::*;
            type V = $v;
            $(#[$gate])*
            unsafe fn has_nan(row: *const $t, count: usize) -> bool {
                // SAFETY: the caller of a table's entry guarantees the extents.
                unsafe { rank::has_nan::<V>(row, count) }
            }
            $(#[$gate])*
            unsafe fn bins(row: *const $t, count: usize, tops: *mut $t, registers: usize) {
                // SAFETY: as above.
                unsafe {
                    match registers {
                        1 => rank::bins::<V, 1>(row, count, tops),
                        2 => rank::bins::<V, 2>(row, count, tops),
                        4 => rank::bins::<V, 4>(row, count, tops),
                        _ => rank::bins::<V, 8>(row, count, tops),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn kth(values: *const $t, registers: usize, k: u32) -> $t {
                // SAFETY: as above.
                unsafe { if registers == 1 { rank::kth::<V, 1>(values, k) } else { rank::kth::<V, 2>(values, k) } }
            }
            $(#[$gate])*
            unsafe fn ranks(values: *const $t, registers: usize, count: usize, ranks: *mut u32) {
                // SAFETY: as above.
                unsafe {
                    match registers {
                        1 => rank::ranks::<V, 1>(values, count, ranks),
                        2 => rank::ranks::<V, 2>(values, count, ranks),
                        _ => rank::ranks::<V, 4>(values, count, ranks),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn at_least(row: *const $t, count: usize, bar: $t, out: *mut u32) -> usize {
                // SAFETY: as above.
                unsafe {
                    let bars = V::splat(bar);
                    rank::at_least::<V>(row, count, |_| bars, |_| bar, out)
                }
            }
            $(#[$gate])*
            unsafe fn at_least_each(row: *const $t, count: usize, bars: *const $t, out: *mut u32) -> usize {
                // SAFETY: as above; the bars are as many as the elements.
                unsafe { rank::at_least::<V>(row, count, |i| V::load(bars.add(i)), |i| *bars.add(i), out) }
            }
            $(#[$gate])*
            unsafe fn exponentials(row: &[$t], top: f64, out: &mut [f64]) -> f64 {
                rank::exponentials(row, top, out)
            }
            $(#[$gate])*
            unsafe fn sigmoids(row: &[$t], out: &mut [f64]) {
                rank::sigmoids(row, out);
            }
            pub static TABLE: Ranking<$t> = Ranking {
                lanes: <V as Vector>::LANES,
                has_nan,
                bins,
                kth,
                ranks,
                at_least,
                at_least_each,
                exponentials,
                sigmoids,
            };
        }
    };
}

ranking!(scalar_f32, f32, scalar::Lanes<f32, 8>,);
ranking!(scalar_f64, f64, scalar::Lanes<f64, 4>,);
#[cfg(target_arch = "x86_64")]
ranking!(avx2_f32, f32, crate::arch::avx2::F32x8, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
ranking!(avx2_f64, f64, crate::arch::avx2::F64x4, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
ranking!(avx512_f32, f32, crate::arch::avx512::F32x16, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
ranking!(avx512_f64, f64, crate::arch::avx512::F64x8, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
#[cfg(target_arch = "aarch64")]
ranking!(neon_f32, f32, crate::arch::neon::F32x4x2, #[target_feature(enable = "neon")]);
#[cfg(target_arch = "aarch64")]
ranking!(neon_f64, f64, crate::arch::neon::F64x2x2, #[target_feature(enable = "neon")]);

macro_rules! ranked {
    ($t:ident, $scalar:ident, $avx2:ident, $avx512:ident, $neon:ident) => {
        impl Ranked for $t {
            fn ranking() -> &'static Ranking<$t> {
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => &$avx2::TABLE,
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Avx512Bf16 => &$avx512::TABLE,
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon => &$neon::TABLE,
                    _ => &$scalar::TABLE,
                }
            }
            fn above(self) -> $t {
                self.next_up()
            }
        }
    };
}
ranked!(f32, scalar_f32, avx2_f32, avx512_f32, neon_f32);
ranked!(f64, scalar_f64, avx2_f64, avx512_f64, neon_f64);
