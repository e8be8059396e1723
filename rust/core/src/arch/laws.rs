//! The kernels of laws, by level: as `ranking`, for `kernel/laws.rs`. The same bits on every level.

use super::kernel::laws;
use super::{Level, level};
use crate::dtype::Float;
use half::{bf16, f16};

pub(crate) use laws::BLOCK;

/// Kernels on rows of one floating-point type.
pub struct Laws<T> {
    largest: unsafe fn(&[T]) -> (f64, bool),
    exponentials: unsafe fn(&[T], f64, f64, &mut [f64]),
    mass: unsafe fn(&[T], f64, f64) -> f64,
    total: unsafe fn(&[T]) -> f64,
    block_sums: unsafe fn(&[T], &mut [f64]) -> bool,
    subtract: unsafe fn(&mut [f64], &[T], f64),
    position: unsafe fn(&[T], f64) -> Option<usize>,
}

impl<T> Laws<T> {
    /// The largest element (-inf of nothing), and whether none is NaN (if one is, the first result means nothing).
    pub fn largest(&self, row: &[T]) -> (f64, bool) {
        // SAFETY: the level is available: a table is chosen by `level`.
        unsafe { (self.largest)(row) }
    }

    /// `out[i] = e^((row[i] - top) / temperature)`; no element may be NaN or above `top`, which is finite.
    pub fn exponentials(&self, row: &[T], top: f64, temperature: f64, out: &mut [f64]) {
        assert_eq!(row.len(), out.len());
        // SAFETY: as above.
        unsafe { (self.exponentials)(row, top, temperature, out) }
    }

    /// The sum of [`Laws::exponentials`], in the order of [`crate::speculation::law::total`].
    pub fn mass(&self, row: &[T], top: f64, temperature: f64) -> f64 {
        // SAFETY: as above.
        unsafe { (self.mass)(row, top, temperature) }
    }

    /// The sum of weights; see [`crate::speculation::law::total`].
    pub fn total(&self, weights: &[T]) -> f64 {
        // SAFETY: as above.
        unsafe { (self.total)(weights) }
    }

    /// The sum of each block of weights, and whether none is negative.
    pub fn block_sums(&self, weights: &[T], sums: &mut [f64]) -> bool {
        assert_eq!(sums.len(), weights.len().div_ceil(BLOCK));
        // SAFETY: as above.
        unsafe { (self.block_sums)(weights, sums) }
    }

    /// `out[i] = max(out[i] - scale * q[i], 0)`.
    pub fn subtract(&self, out: &mut [f64], q: &[T], scale: f64) {
        assert_eq!(out.len(), q.len());
        // SAFETY: as above.
        unsafe { (self.subtract)(out, q, scale) }
    }

    /// The first element equal to `value`.
    pub fn position(&self, row: &[T], value: f64) -> Option<usize> {
        // SAFETY: as above.
        unsafe { (self.position)(row, value) }
    }
}

/// Element types that rows of logits and laws have.
pub trait Lawful: Float {
    /// The table of the level in use.
    fn laws() -> &'static Laws<Self>;
}

macro_rules! instances {
    ($module:ident, $(#[$gate:meta])*) => {
        mod $module {
            use super::*;
            $(#[$gate])*
            unsafe fn largest<T: Float>(row: &[T]) -> (f64, bool) {
                laws::largest(row)
            }
            $(#[$gate])*
            unsafe fn exponentials<T: Float>(row: &[T], top: f64, temperature: f64, out: &mut [f64]) {
                laws::exponentials(row, top, temperature, out);
            }
            $(#[$gate])*
            unsafe fn mass<T: Float>(row: &[T], top: f64, temperature: f64) -> f64 {
                laws::mass(row, top, temperature)
            }
            $(#[$gate])*
            unsafe fn total<T: Float>(weights: &[T]) -> f64 {
                laws::total(weights)
            }
            $(#[$gate])*
            unsafe fn block_sums<T: Float>(weights: &[T], sums: &mut [f64]) -> bool {
                laws::block_sums(weights, sums)
            }
            $(#[$gate])*
            unsafe fn subtract<T: Float>(out: &mut [f64], q: &[T], scale: f64) {
                laws::subtract(out, q, scale);
            }
            $(#[$gate])*
            unsafe fn position<T: Float>(row: &[T], value: f64) -> Option<usize> {
                laws::position(row, value)
            }
            pub struct Tables<T>(std::marker::PhantomData<T>);
            impl<T: Float> Tables<T> {
                pub const TABLE: Laws<T> = Laws {
                    largest: largest::<T>,
                    exponentials: exponentials::<T>,
                    mass: mass::<T>,
                    total: total::<T>,
                    block_sums: block_sums::<T>,
                    subtract: subtract::<T>,
                    position: position::<T>,
                };
            }
        }
    };
}

instances!(portable,);
#[cfg(target_arch = "x86_64")]
instances!(avx2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
instances!(avx512, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);

macro_rules! lawful {
    ($($t:ty),*) => { $(
        impl Lawful for $t {
            fn laws() -> &'static Laws<$t> {
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => &const { avx2::Tables::<$t>::TABLE },
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Avx512Bf16 => &const { avx512::Tables::<$t>::TABLE },
                    // NEON is part of its machines' baseline: the portable loops have it already.
                    _ => &const { portable::Tables::<$t>::TABLE },
                }
            }
        }
    )* };
}
lawful!(f32, f64, f16, bf16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exponential::exponential;
    use crate::gemm::tests::at_every_level;
    use crate::speculation::law::total;

    fn row(length: usize) -> Vec<f64> {
        (0..length).map(|i| ((i * 7919) % 1009) as f64 * 0.037 - 30.0).collect()
    }

    fn compare<T: Lawful>(row: &[T]) {
        let wide: Vec<f64> = row.iter().map(|x| crate::dtype::Real::f64(x.widen())).collect();
        let top = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        at_every_level(|_| {
            let laws = T::laws();
            assert_eq!(laws.largest(row), (top, true));
            assert_eq!(laws.position(row, top), wide.iter().position(|x| *x == top));
            for temperature in [1.0, 0.7, 3.1] {
                let wanted: Vec<f64> = wide.iter().map(|x| exponential((x - top) / temperature)).collect();
                let mut found = vec![f64::NAN; row.len()];
                laws.exponentials(row, top, temperature, &mut found);
                assert!(found.iter().zip(&wanted).all(|(a, b)| a.to_bits() == b.to_bits()));
                assert_eq!(laws.mass(row, top, temperature).to_bits(), total(&wanted).to_bits());
                let mut sums = vec![f64::NAN; row.len().div_ceil(BLOCK)];
                assert!(f64::laws().block_sums(&wanted, &mut sums));
                assert_eq!(sums.iter().fold(0.0, |a, b| a + b).to_bits(), total(&wanted).to_bits());
                laws.subtract(&mut found, row, -0.25);
                let less = |(w, x): (&f64, &f64)| (w - x * -0.25).max(0.0).to_bits();
                assert!(found.iter().map(|x| x.to_bits()).eq(wanted.iter().zip(&wide).map(less)));
            }
        });
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for length in [0, 1, 7, 8, 63, 64, 65, 511, 512, 513, 1500, 5003] {
            let row = row(length);
            compare(&row);
            compare(&row.iter().map(|&x| x as f32).collect::<Vec<_>>());
            compare(&row.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>());
            compare(&row.iter().map(|&x| f16::from_f64(x)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nan_is_seen_wherever_it_is() {
        at_every_level(|_| {
            for at in [0, 63, 64, 700, 999] {
                let mut row: Vec<f32> = row(1000).iter().map(|&x| x as f32).collect();
                row[at] = f32::NAN;
                assert!(!f32::laws().largest(&row).1);
                row[at] = -1.0;
                assert!(!f32::laws().block_sums(&row, &mut [0.0; 2]));
            }
        });
    }
}
