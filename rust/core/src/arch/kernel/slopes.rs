//! The step back through a softmax, lanes over queries.
//!
//! ```text
//! S, dP [rows, width]: scores (masked ones are -inf), and the products dO V^T; per lane: L = log2 of the sum of 2^S, D
//! P = 2^min(S * c - L, 0)                              c = scale * log2(e), or log2(e)
//! dS = P * (dP - D)                                    0 where P is 0, whatever dP is
//! ```
//! A weight is at most 1, so what rounding of huge scores adds to the exponent is cut off at 0. The last rule keeps
//! values that are not finite away from rows that do not attend them.

use crate::arch::vector::{Half, Vector};
use crate::dtype::Real;

/// What one call computes; pointers hold `rows * width` elements and `width` lanes.
pub(crate) struct Args<T> {
    pub scores: *mut T,
    pub slopes: *mut T,
    pub rows: usize,
    pub width: usize,
    pub factor: T,
    pub lse: *const T,
    pub delta: *const T,
}

/// Where [`sealed`] writes, as bfloat16.
pub(crate) struct Sealed {
    /// P and dS by rows: `rows * width` elements.
    pub weights: *mut u16,
    pub slopes: *mut u16,
    /// dS as pairs of rows: `ceil(rows / 2) * width` units.
    pub pairs: *mut u32,
}

/// Weights below this count as 0: their products vanish beside any other.
const NOTHING: f64 = 1e-37;

#[inline(always)]
unsafe fn one<V: Vector>(args: &Args<V::Elem>, row: usize, lane: usize, factor: V, lse: V, delta: V) -> (V, V) {
    // SAFETY: inside both blocks.
    unsafe {
        let at = row * args.width + lane;
        let zero = V::splat(V::Elem::ZERO);
        // The constant comes first, so NaN passes.
        let p = zero.min(V::load(args.scores.add(at)).mul_add(factor, zero.sub(lse))).exp2();
        let slope = p.mul(V::load(args.slopes.add(at)).sub(delta));
        (p, V::splat(V::Elem::of(NOTHING)).where_greater(p, zero, slope))
    }
}

/// P over the scores, dS over dP.
///
/// # Safety
/// As in [`Args`]; `width` is a multiple of the lanes; the machine must have the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn in_place<V: Vector>(args: &Args<V::Elem>) {
    // SAFETY: inside the blocks.
    unsafe {
        let factor = V::splat(args.factor);
        for row in 0..args.rows {
            let mut lane = 0;
            while lane < args.width {
                let (lse, delta) = (V::load(args.lse.add(lane)), V::load(args.delta.add(lane)));
                let (p, slope) = one(args, row, lane, factor, lse, delta);
                p.store(args.scores.add(row * args.width + lane));
                slope.store(args.slopes.add(row * args.width + lane));
                lane += V::LANES;
            }
        }
    }
}

/// As bfloat16, in the orders that the three products after it read.
///
/// # Safety
/// As [`in_place`]; `to` holds what it says.
#[inline(always)]
pub(crate) unsafe fn sealed<V: Half>(args: &Args<f32>, to: &Sealed) {
    // SAFETY: inside the blocks.
    unsafe {
        let (factor, zero) = (V::splat(args.factor), V::splat(0.0));
        for pair in 0..args.rows.div_ceil(2) {
            let (first, second) = (2 * pair, 2 * pair + 1);
            let mut lane = 0;
            while lane < args.width {
                let (lse, delta) = (V::load(args.lse.add(lane)), V::load(args.delta.add(lane)));
                let (p, low) = one(args, first, lane, factor, lse, delta);
                p.store_bf16(to.weights.add(first * args.width + lane));
                low.store_bf16(to.slopes.add(first * args.width + lane));
                let mut high = zero;
                if second < args.rows {
                    let (p, slope) = one(args, second, lane, factor, lse, delta);
                    p.store_bf16(to.weights.add(second * args.width + lane));
                    slope.store_bf16(to.slopes.add(second * args.width + lane));
                    high = slope;
                }
                V::store_pairs(low, high, to.pairs.add(pair * args.width + lane));
                lane += V::LANES;
            }
        }
    }
}
