//! The kernels of laws, by level: as `ranking`, for `kernel/laws.rs`. The same bits on every level.

use super::kernel::laws;
use super::{Level, level};
use crate::dtype::Float;
use half::{bf16, f16};

pub(crate) use laws::{BLOCK, ROUGH};

/// Kernels on rows of one floating-point type.
pub struct Laws<T> {
    largest: unsafe fn(&[T]) -> (f64, bool),
    weigh: unsafe fn(&[T], f64, f64, &mut [f64]) -> f64,
    mass: unsafe fn(&[T], f64, f64) -> f64,
    rough_mass: Option<unsafe fn(&[T], f32, f32) -> f64>,
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

    /// `out[i] = e^((row[i] - top) / temperature)`, and their sum in the order of [`crate::speculation::law::total`]; no
    /// element may be NaN or above `top`, which is finite.
    pub fn weigh(&self, row: &[T], top: f64, temperature: f64, out: &mut [f64]) -> f64 {
        assert_eq!(row.len(), out.len());
        // SAFETY: as above.
        unsafe { (self.weigh)(row, top, temperature, out) }
    }

    /// The sum alone, without a place for the terms.
    pub fn mass(&self, row: &[T], top: f64, temperature: f64) -> f64 {
        // SAFETY: as above.
        unsafe { (self.mass)(row, top, temperature) }
    }

    /// The sum of that [`Laws::weigh`] returns, within a relative `ROUGH` / 2, in a fraction of the time; `None` for types that
    /// single precision does not hold, and where `top` or `temperature` are too large or small for it.
    pub fn rough_mass(&self, row: &[T], top: f64, temperature: f64) -> Option<f64> {
        let scale = std::f64::consts::LOG2_E / temperature;
        let inside = (1e-20..1e20).contains(&scale) && top.abs() < 1e15;
        // SAFETY: as above.
        self.rough_mass.filter(|_| inside).map(|sum| unsafe { sum(row, top as f32, scale as f32) })
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
            unsafe fn weigh<T: Float>(row: &[T], top: f64, temperature: f64, out: &mut [f64]) -> f64 {
                laws::weigh(row, top, temperature, out)
            }
            $(#[$gate])*
            unsafe fn mass<T: Float>(row: &[T], top: f64, temperature: f64) -> f64 {
                laws::mass(row, top, temperature)
            }
            $(#[$gate])*
            unsafe fn rough_mass<T: Float<Acc = f32>>(row: &[T], top: f32, scale: f32) -> f64 {
                laws::rough_mass(row, top, scale)
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
            pub const fn table<T: Float>() -> Laws<T> {
                Laws {
                    largest: largest::<T>,
                    weigh: weigh::<T>,
                    mass: mass::<T>,
                    rough_mass: None,
                    total: total::<T>,
                    block_sums: block_sums::<T>,
                    subtract: subtract::<T>,
                    position: position::<T>,
                }
            }
            pub const fn single<T: Float<Acc = f32>>() -> Laws<T> {
                Laws { rough_mass: Some(rough_mass::<T>), ..table::<T>() }
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
    ($($t:ty: $table:ident),*) => { $(
        impl Lawful for $t {
            fn laws() -> &'static Laws<$t> {
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => &const { avx2::$table::<$t>() },
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Avx512Bf16 => &const { avx512::$table::<$t>() },
                    // NEON is part of its machines' baseline: the portable loops have it already.
                    _ => &const { portable::$table::<$t>() },
                }
            }
        }
    )* };
}
lawful!(f32: single, f64: table, f16: single, bf16: single);

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
                let sum = laws.weigh(row, top, temperature, &mut found);
                assert_eq!(sum.to_bits(), total(&wanted).to_bits());
                assert!(found.iter().zip(&wanted).all(|(a, b)| a.to_bits() == b.to_bits()));
                assert_eq!(laws.mass(row, top, temperature).to_bits(), total(&wanted).to_bits());
                if let Some(rough) = laws.rough_mass(row, top, temperature).filter(|_| !row.is_empty()) {
                    assert!((rough / total(&wanted) - 1.0).abs() < ROUGH / 4.0, "{rough} for {}", total(&wanted));
                }
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

    /// Where terms are far below the largest, and there are many of them.
    #[test]
    fn the_rough_sum_is_near_the_exact_one() {
        at_every_level(|_| {
            for (spread, temperature) in [(0.0, 1.0), (9.0, 0.7), (60.0, 0.9), (87.0, 1.0), (400.0, 0.3), (0.01, 1e-4)]
            {
                let row: Vec<f32> = (0..131_072)
                    .map(|i| (f64::from((i * 7919) % 131_071) / 131_071.0 * -spread) as f32 + 0.3)
                    .collect();
                let top = f64::from(f32::laws().largest(&row).0 as f32);
                let (exact, rough) =
                    (f32::laws().mass(&row, top, temperature), f32::laws().rough_mass(&row, top, temperature).unwrap());
                assert!((rough / exact - 1.0).abs() < ROUGH / 4.0, "{spread} {temperature}: {rough} {exact}");
            }
            assert!(f64::laws().rough_mass(&[0.0], 0.0, 1.0).is_none());
            assert!(f32::laws().rough_mass(&[0.0], 0.0, 1e-30).is_none());
        });
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
