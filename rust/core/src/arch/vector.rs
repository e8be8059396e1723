//! The vocabulary that every kernel is written in: a register of lanes, and a way to multiply and accumulate.
//!
//! Kernels (`kernel/`) are generic over these two traits and know no instruction; the files named after an
//! instruction set implement the traits and hold no algorithm. All methods are `inline(always)`, so they become
//! part of the entry point that enables the instructions (see `table.rs`).

use crate::dtype::Real;

/// A register of floating-point lanes.
///
/// # Safety
/// All methods may only run on a machine that has the implementor's instructions; pointers must be valid for
/// `LANES` elements (any alignment).
pub(crate) unsafe trait Vector: Copy {
    /// Lane type.
    type Elem: Real;
    /// Number of lanes.
    const LANES: usize;

    unsafe fn load(from: *const Self::Elem) -> Self;
    unsafe fn store(self, to: *mut Self::Elem);
    /// `LANES` bytes, widened (exact).
    unsafe fn load_i8(from: *const i8) -> Self;
    unsafe fn splat(value: Self::Elem) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The larger lane; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller lane; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * a + b`, fused where the machine can.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    unsafe fn floor(self) -> Self;
    /// `a` where `self > other`, else `b`.
    unsafe fn where_greater(self, other: Self, a: Self, b: Self) -> Self;
    /// Whether any lane of `self` is greater than `other`'s.
    unsafe fn any_greater(self, other: Self) -> bool;
    /// One bit a lane, lane 0 lowest: `self >= other`, false where either is NaN. The default goes through memory.
    #[inline(always)]
    unsafe fn at_least(self, other: Self) -> u32 {
        let (mut own, mut others) = ([Self::Elem::ZERO; 16], [Self::Elem::ZERO; 16]);
        // SAFETY: LANES is at most 16.
        unsafe {
            self.store(own.as_mut_ptr());
            other.store(others.as_mut_ptr());
        }
        (0..Self::LANES).fold(0, |bits, lane| bits | u32::from(own[lane] >= others[lane]) << lane)
    }
    /// `2^n` for integral lanes: exact, 0 below -126 - 23 (or -127 where subnormals are not built), inf from 128 on.
    unsafe fn exp2_integer_times(self, factor: Self) -> Self;
    /// Sum of the lanes, in a fixed order.
    unsafe fn sum(self) -> Self::Elem;
    /// Asks for the cache line at an address, which may be anything. A hint: the default does nothing.
    #[inline(always)]
    unsafe fn prefetch<T>(_address: *const T) {}
    /// As [`prefetch`](Self::prefetch), for what is read once: it need not displace anything from the larger caches.
    #[inline(always)]
    unsafe fn prefetch_once<T>(_address: *const T) {}
    /// The sums of sixteen registers, each over its lanes, in a fixed order.
    #[inline(always)]
    unsafe fn sum_each(registers: &mut [Self; 16]) -> [Self::Elem; 16] {
        // SAFETY: lane arithmetic; LANES divides 16.
        unsafe {
            let mut sums = [Self::Elem::ZERO; 16];
            for group in 0..16 / Self::LANES {
                let mut square = [Self::splat(Self::Elem::ZERO); 16];
                for i in 0..Self::LANES {
                    square[i] = registers[group * Self::LANES + i];
                }
                Self::transpose(&mut square);
                let mut width = Self::LANES / 2;
                while width > 0 {
                    for i in 0..width {
                        square[i] = square[i].add(square[i + width]);
                    }
                    width /= 2;
                }
                square[0].store(sums.as_mut_ptr().add(group * Self::LANES));
            }
            sums
        }
    }
    /// `LANES` rows to `LANES` columns. The default goes through memory.
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; 16]) {
        // SAFETY: the scratch holds 16 x 16 lanes and LANES is at most 16.
        unsafe {
            let mut scratch = [[Self::Elem::ZERO; 16]; 16];
            for (row, line) in rows.iter().zip(&mut scratch).take(Self::LANES) {
                row.store(line.as_mut_ptr());
            }
            for j in 0..Self::LANES {
                let mut column = [Self::Elem::ZERO; 16];
                for i in 0..Self::LANES {
                    column[i] = scratch[i][j];
                }
                rows[j] = Self::load(column.as_ptr());
            }
        }
    }

    /// 2^x by lanes. Single precision: relative error below 2e-7 for results above 2^-126; 0 for -inf; NaN stays NaN.
    /// Double precision overrides it with an exact function.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: forwarded.
        unsafe { self.exp2_by(&EXP2_DEGREE_5) }
    }

    /// 2^x by a polynomial for 2^f, p1 first: x = n + f with n = floor(x), and 2^n by the exponent.
    #[inline(always)]
    unsafe fn exp2_by(self, polynomial: &[f64]) -> Self {
        // SAFETY: lane arithmetic only.
        unsafe {
            let c = |value: f64| Self::splat(Self::Elem::of(value));
            // The constants come first, so a NaN lane passes through the comparisons.
            let x = c(128.0).min(c(-150.0).max(self));
            let n = x.floor();
            let f = x.sub(n);
            let mut p = c(polynomial[polynomial.len() - 1]);
            for &coefficient in polynomial.iter().rev().skip(1) {
                p = p.mul_add(f, c(coefficient));
            }
            n.exp2_integer_times(p.mul_add(f, c(1.0)))
        }
    }
}

/// The minimax polynomial for 2^f on [0, 1) that FlashAttention-4 lists: relative error 1.5e-7.
///
/// Its degree 3 (8.8e-5, hidden by rounding to bfloat16 in 99 of 100 weights) is 3 to 10 % faster in bfloat16 here, but
/// the normaliser is a sum of unrounded weights: the LSE then is off by 5e-5, a hundred times what a plain run loses.
pub(crate) const EXP2_DEGREE_5: [f64; 5] = [
    0.693_151_414_394_378_7,
    0.240_163_609_385_094_9,
    5.580_218_806_236_87e-2,
    9.014_522_656_798_367e-3,
    1.868_101_535_324_855e-3,
];
/// See [`EXP2_DEGREE_5`].
#[cfg(test)]
pub(crate) const EXP2_DEGREE_3: [f64; 3] =
    [0.695_146_143_436_431_9, 0.227_564_394_474_029_54, 7.711_908_966_302_872e-2];

/// A way to multiply and accumulate units of two operands into lanes of an accumulator.
///
/// A *unit* is what one step along the reduction reads: one element, or a pair of bfloat16.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait Dot {
    /// The accumulator register.
    type V: Vector;
    /// Unit of the operand that is broadcast.
    type A: Copy;
    /// Unit of the operand that is loaded by lanes.
    type B: Copy;
    /// A broadcast unit.
    type AReg: Copy;
    /// A register of units.
    type BReg: Copy;

    unsafe fn splat_a(from: *const Self::A) -> Self::AReg;
    unsafe fn load_b(from: *const Self::B) -> Self::BReg;
    unsafe fn fma(a: Self::AReg, b: Self::BReg, acc: Self::V) -> Self::V;
}

/// Both operands are lanes of the accumulator's own type.
pub(crate) struct Plain<V>(std::marker::PhantomData<V>);

// SAFETY: forwards to the vector's own operations.
unsafe impl<V: Vector> Dot for Plain<V> {
    type V = V;
    type A = V::Elem;
    type B = V::Elem;
    type AReg = V;
    type BReg = V;

    #[inline(always)]
    unsafe fn splat_a(from: *const V::Elem) -> V {
        // SAFETY: the caller passes a readable unit.
        unsafe { V::splat(from.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const V::Elem) -> V {
        // SAFETY: the caller passes LANES readable units.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, acc: V) -> V {
        // SAFETY: lane arithmetic.
        unsafe { a.mul_add(b, acc) }
    }
}

/// Single-precision registers that also know bfloat16, as pairs (32-bit units) and as single 16-bit elements.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait Half: Vector<Elem = f32> {
    /// The low (even) elements of `LANES` pairs, widened.
    unsafe fn load_low(from: *const u32) -> Self;
    /// The high (odd) elements of `LANES` pairs, widened.
    unsafe fn load_high(from: *const u32) -> Self;
    /// `LANES` bfloat16 elements, widened.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Rounds a register to bfloat16 and stores `LANES` elements.
    unsafe fn store_bf16(self, to: *mut u16);
    /// Rounds two registers to bfloat16 and stores `2 * LANES` elements.
    #[inline(always)]
    unsafe fn store_bf16_two(first: Self, second: Self, to: *mut u16) {
        // SAFETY: forwarded.
        unsafe {
            first.store_bf16(to);
            second.store_bf16(to.add(Self::LANES));
        }
    }
    /// Rounds two registers to bfloat16 (nearest even, NaN kept) and stores them as `LANES` pairs.
    unsafe fn store_pairs(low: Self, high: Self, to: *mut u32);
    /// `LANES` pairs from two rows of bfloat16. The default goes through single precision, which is exact.
    #[inline(always)]
    unsafe fn pair_up(low: *const u16, high: *const u16, to: *mut u32) {
        // SAFETY: forwarded.
        unsafe { Self::store_pairs(Self::load_bf16(low), Self::load_bf16(high), to) }
    }
}

/// bfloat16 pairs multiplied as two single-precision products: for machines without a dot-product unit.
pub(crate) struct Pairs<V>(std::marker::PhantomData<V>);

// SAFETY: forwards to the vector's own operations.
unsafe impl<V: Half> Dot for Pairs<V> {
    type V = V;
    type A = u32;
    type B = u32;
    type AReg = (V, V);
    type BReg = (V, V);

    #[inline(always)]
    unsafe fn splat_a(from: *const u32) -> (V, V) {
        // SAFETY: the caller passes a readable unit.
        unsafe {
            let pair = from.read_unaligned();
            (V::splat(f32::from_bits(pair << 16)), V::splat(f32::from_bits(pair & 0xffff_0000)))
        }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const u32) -> (V, V) {
        // SAFETY: the caller passes LANES readable units.
        unsafe { (V::load_low(from), V::load_high(from)) }
    }
    #[inline(always)]
    unsafe fn fma(a: (V, V), b: (V, V), acc: V) -> V {
        // SAFETY: lane arithmetic. Low before high on every level, as the dot-product unit does.
        unsafe { a.1.mul_add(b.1, a.0.mul_add(b.0, acc)) }
    }
}

/// A way to multiply lanes of two rows that run along the reduction; see [`rows`](super::kernel::rows).
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait Along {
    /// The accumulator register.
    type V: Vector;
    /// Unit of the rows that are read again and again.
    type X: Copy + Default;
    /// Unit of the rows that come from memory, each once.
    type W: Copy + Default;
    /// A register of X.
    type XReg: Copy;
    /// A register of W.
    type WReg: Copy;

    unsafe fn load_x(from: *const Self::X) -> Self::XReg;
    unsafe fn load_w(from: *const Self::W) -> Self::WReg;
    unsafe fn fma(x: Self::XReg, w: Self::WReg, acc: Self::V) -> Self::V;
}

/// Both rows hold the units of `D`.
pub(crate) struct Both<D>(std::marker::PhantomData<D>);

// SAFETY: forwards to the units' own operations.
unsafe impl<U: Copy + Default, D: Dot<A = U, B = U, BReg = <D as Dot>::AReg>> Along for Both<D> {
    type V = D::V;
    type X = U;
    type W = U;
    type XReg = D::BReg;
    type WReg = D::BReg;

    #[inline(always)]
    unsafe fn load_x(from: *const U) -> D::BReg {
        // SAFETY: forwarded.
        unsafe { D::load_b(from) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const U) -> D::BReg {
        // SAFETY: forwarded.
        unsafe { D::load_b(from) }
    }
    #[inline(always)]
    unsafe fn fma(x: D::BReg, w: D::BReg, acc: D::V) -> D::V {
        // SAFETY: lane arithmetic.
        unsafe { D::fma(x, w, acc) }
    }
}

/// W holds bytes, widened on load; X lanes of the accumulator's type.
pub(crate) struct Bytes<V>(std::marker::PhantomData<V>);

// SAFETY: forwards to the vector's own operations.
unsafe impl<V: Vector> Along for Bytes<V> {
    type V = V;
    type X = V::Elem;
    type W = i8;
    type XReg = V;
    type WReg = V;

    #[inline(always)]
    unsafe fn load_x(from: *const V::Elem) -> V {
        // SAFETY: forwarded.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const i8) -> V {
        // SAFETY: forwarded.
        unsafe { V::load_i8(from) }
    }
    #[inline(always)]
    unsafe fn fma(x: V, w: V, acc: V) -> V {
        // SAFETY: lane arithmetic.
        unsafe { x.mul_add(w, acc) }
    }
}

/// Single-precision broadcast times bfloat16 lanes, widened on load.
pub(crate) struct Widen<V>(std::marker::PhantomData<V>);

// SAFETY: forwards to the vector's own operations.
unsafe impl<V: Half> Dot for Widen<V> {
    type V = V;
    type A = f32;
    type B = u16;
    type AReg = V;
    type BReg = V;

    #[inline(always)]
    unsafe fn splat_a(from: *const f32) -> V {
        // SAFETY: the caller passes a readable unit.
        unsafe { V::splat(from.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const u16) -> V {
        // SAFETY: the caller passes LANES readable units.
        unsafe { V::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, acc: V) -> V {
        // SAFETY: lane arithmetic.
        unsafe { a.mul_add(b, acc) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Kernel;
    use crate::arch::scalar::Lanes;
    use crate::gemm::tests::at_every_level;

    /// Largest relative error over every number of [1, 2) and of [-2, -1): there the fraction takes all its values.
    fn worst(mut exp2: impl FnMut(&mut [f32])) -> f64 {
        let mut worst = 0f64;
        for sign in [1f32, -1.0] {
            for first in (0..1u32 << 23).step_by(1 << 12) {
                let x: Vec<f32> = (first..first + (1 << 12)).map(|i| sign * f32::from_bits(0x3f80_0000 + i)).collect();
                let mut y = x.clone();
                exp2(&mut y);
                for (x, y) in x.iter().zip(y) {
                    let exact = libm::exp2(f64::from(*x));
                    worst = worst.max((f64::from(y) / exact - 1.0).abs());
                }
            }
        }
        worst
    }

    fn by(polynomial: &[f64], row: &mut [f32]) {
        for chunk in row.as_chunks_mut::<8>().0 {
            // SAFETY: eight elements; the scalar level runs anywhere.
            unsafe { Lanes::<f32, 8>::load(chunk.as_ptr()).exp2_by(polynomial).store(chunk.as_mut_ptr()) }
        }
    }

    #[test]
    fn both_polynomials_are_as_good_as_listed() {
        let (three, five) = (worst(|row| by(&EXP2_DEGREE_3, row)), worst(|row| by(&EXP2_DEGREE_5, row)));
        assert!((8.6e-5..8.8e-5).contains(&three), "degree 3: {three:e}");
        assert!((1.0e-7..2.0e-7).contains(&five), "degree 5: {five:e}");
    }

    #[test]
    fn every_level_is_as_good_everywhere() {
        at_every_level(|_| {
            let table = f32::table();
            let exp2 = |row: &mut [f32]| _ = table.row_exp2(row, 1.0, 0.0);
            assert!(worst(exp2) <= 2.0e-7);
            let mut previous = 0f32;
            for i in -149_000..=127_000 {
                let x = i as f32 / 1000.0;
                let mut y = [x];
                exp2(&mut y);
                let exact = libm::exp2(f64::from(x));
                // Below 2^-126 a level may round to a subnormal or to 0.
                let allowed = 2.0e-7 * exact + if x < -126.0 { f64::from(f32::MIN_POSITIVE) } else { 0.0 };
                assert!((f64::from(y[0]) - exact).abs() <= allowed, "2^{x} gave {}", y[0]);
                assert!(y[0] >= previous, "2^x falls at {x}");
                previous = y[0];
            }
            let mut special = [f32::NEG_INFINITY, 0.0, -0.0, f32::NAN, -1e30];
            exp2(&mut special);
            assert!(special[0] == 0.0 && special[1] == 1.0 && special[2] == 1.0 && special[4] == 0.0);
            assert!(special[3].is_nan());
        });
    }
}
