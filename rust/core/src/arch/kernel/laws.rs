//! Inner loops over a row of logits or probabilities, in plain Rust: the compiler makes lanes of them for the level that
//! `laws.rs` instantiates them for. Nothing is fused and every sum has one order, so all levels give the same bits.

use crate::dtype::{Float, Real};
use crate::exponential::exponential;

/// Weights that are added up together; see [`crate::speculation::law::total`].
pub(crate) const BLOCK: usize = 512;

#[inline(always)]
fn wide<T: Float>(x: T) -> f64 {
    x.widen().f64()
}

/// The largest element (-inf of nothing), and whether none is NaN (if one is, the first result means nothing).
#[inline(always)]
pub(crate) fn largest<T: Float>(row: &[T]) -> (f64, bool) {
    const LANES: usize = 64;
    let mut tops = [T::Acc::NEG_INFINITY; LANES];
    let mut odd = [false; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let x = chunk[lane].widen();
            tops[lane] = if x > tops[lane] { x } else { tops[lane] };
            odd[lane] |= x.partial_cmp(&x).is_none();
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        let x = x.widen();
        tops[lane] = if x > tops[lane] { x } else { tops[lane] };
        odd[lane] |= x.partial_cmp(&x).is_none();
    }
    let top = tops.iter().fold(f64::NEG_INFINITY, |top, x| if x.f64() > top { x.f64() } else { top });
    (top, !odd.contains(&true))
}

/// `out[i] = e^((row[i] - top) / temperature)`; no element may be NaN or above `top`, which is finite.
#[inline(always)]
pub(crate) fn exponentials<T: Float>(row: &[T], top: f64, temperature: f64, out: &mut [f64]) {
    if temperature == 1.0 {
        // The quotient would be the same number.
        for (out, &x) in out.iter_mut().zip(row) {
            *out = exponential(wide(x) - top);
        }
    } else {
        for (out, &x) in out.iter_mut().zip(row) {
            *out = exponential((wide(x) - top) / temperature);
        }
    }
}

/// The sum of at most a block of weights: eight columns, then a tree.
#[inline(always)]
pub(crate) fn column_sum<T: Float>(weights: &[T]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (chunks, rest) = weights.as_chunks::<8>();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] += wide(chunk[lane]);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        lanes[lane] += wide(x);
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

/// [`exponentials`], and their sum, block by block.
#[inline(always)]
pub(crate) fn weigh<T: Float>(row: &[T], top: f64, temperature: f64, out: &mut [f64]) -> f64 {
    let mut sum = 0.0;
    for (part, out) in row.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        exponentials(part, top, temperature, out);
        sum += column_sum(out);
    }
    sum
}

/// The sum of [`exponentials`], block by block.
#[inline(always)]
pub(crate) fn mass<T: Float>(row: &[T], top: f64, temperature: f64) -> f64 {
    let mut block = [0.0; BLOCK];
    let mut sum = 0.0;
    for part in row.chunks(BLOCK) {
        let block = &mut block[..part.len()];
        exponentials(part, top, temperature, block);
        sum += column_sum(block);
    }
    sum
}

/// Twice the largest relative error of [`rough_mass`] with room to spare; see there.
pub(crate) const ROUGH: f64 = 1e-4;

/// The sum of 2^((row[i] - top) * scale) in single precision: within [`ROUGH`] / 2 of the truth, relatively.
///
/// With u = 2^-24: the exponent x is wrong by at most 3 u |x|, and terms below 2^-100 are cut off there (all of them
/// together weigh less than 2^-60 of a sum that is at least about 1), so a term is wrong by 2^(3 u 100) - 1 < 1.3e-5;
/// the polynomial adds 2e-7 and its roundings 10 u; 32 additions a column 2e-6; blocks are added up in double precision.
#[inline(always)]
pub(crate) fn rough_mass<T: Float<Acc = f32>>(row: &[T], top: f32, scale: f32) -> f64 {
    const LANES: usize = 16;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23 leaves the nearest integer in the low bits
    let term = |x: T| -> f32 {
        let x = (x.widen() - top) * scale;
        let x = if x > -100.0 { x } else { -100.0 };
        let shifted = x + ROUND;
        let f = x - (shifted - ROUND); // in [-1/2, 1/2]
        // e^(f ln 2) by its Taylor series to degree 6: the next term is (ln 2 / 2)^7 / 7! = 1.2e-7.
        let mut p = 1.540_353e-4;
        p = p * f + 1.333_355_8e-3;
        p = p * f + 9.618_129e-3;
        p = p * f + 5.550_411e-2;
        p = p * f + 2.402_265e-1;
        p = p * f + 6.931_472e-1;
        p = p * f + 1.0;
        f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
    };
    let mut sum = 0.0f64;
    for part in row.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = part.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += term(chunk[lane]);
            }
        }
        for (lane, &x) in rest.iter().enumerate() {
            lanes[lane] += term(x);
        }
        sum += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    sum
}

/// The sum of any number of weights, block by block.
#[inline(always)]
pub(crate) fn total<T: Float>(weights: &[T]) -> f64 {
    weights.chunks(BLOCK).fold(0.0, |sum, part| sum + column_sum(part))
}

/// The sum of each block of weights, and whether none is negative (NaN is not).
#[inline(always)]
pub(crate) fn block_sums<T: Float>(weights: &[T], sums: &mut [f64]) -> bool {
    let mut negative = false;
    for (sum, part) in sums.iter_mut().zip(weights.chunks(BLOCK)) {
        *sum = column_sum(part);
        negative |= part.iter().fold(false, |any, &x| any | (x.widen() < T::Acc::ZERO));
    }
    !negative
}

/// `out[i] = max(out[i] - scale * q[i], 0)`.
#[inline(always)]
pub(crate) fn subtract<T: Float>(out: &mut [f64], q: &[T], scale: f64) {
    for (out, &q) in out.iter_mut().zip(q) {
        let excess = *out - wide(q) * scale;
        *out = if excess > 0.0 { excess } else { 0.0 };
    }
}

/// The first element equal to `value`.
#[inline(always)]
pub(crate) fn position<T: Float>(row: &[T], value: f64) -> Option<usize> {
    const LANES: usize = 64;
    let value = T::Acc::of(value);
    let (chunks, rest) = row.as_chunks::<LANES>();
    for (index, chunk) in chunks.iter().enumerate() {
        if chunk.iter().fold(false, |any, x| any | (x.widen() == value)) {
            return chunk.iter().position(|x| x.widen() == value).map(|lane| index * LANES + lane);
        }
    }
    rest.iter().position(|x| x.widen() == value).map(|lane| chunks.len() * LANES + lane)
}
