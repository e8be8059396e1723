//! One block of the online softmax, lanes over queries.
//!
//! ```text
//! S [rows, width]: scores of `rows` keys (masked ones are -inf); per lane: reference m, normaliser l
//! top = max over keys of S * c                         c = scale * log2(e)
//! if top > m + tau: alpha = 2^(m - top), m = top       (else alpha = 1)
//! P = 2^(S * c - m);  l = alpha * l + sum(P)
//! ```
//! The caller multiplies the output accumulator by alpha. Any reference m gives the same O / l and the same
//! m + log2(l) in exact arithmetic, so m moves only when the scores grew by more than tau (usually 8) powers of two: P
//! stays below 2^tau, far from overflow, and nearly all rescaling passes vanish (FlashAttention-4's conditional rescale).
//! A lane whose scores so far are all -inf keeps m = -inf and is computed against 0, so that P is 0, not NaN.
//! S * c - m is one fused operation, which keeps what the rounding of m lost; beyond [`LARGE`] that rest would be a power of
//! two of its own, so there the product is rounded first, as m was.

use crate::arch::vector::{Half, Vector};
use crate::dtype::Real;

/// References beyond this lose more than a thousandth to rounding in single precision.
pub(crate) const LARGE: f64 = 8192.0;

/// One block; pointers hold `rows * width` scores and `width` lanes of state.
pub(crate) struct Args<T> {
    pub scores: *mut T,
    pub rows: usize,
    pub width: usize,
    /// scale * log2(e)
    pub factor: T,
    /// tau
    pub threshold: T,
    pub reference: *mut T,
    pub normaliser: *mut T,
    pub alpha: *mut T,
    /// Where to write P as bfloat16 pairs of keys; null to write it over the scores.
    pub pairs: *mut u32,
}

/// Returns whether any lane's reference moved (then `alpha` differs from 1).
///
/// # Safety
/// As in [`Args`]; the machine must have the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn softmax<V: Vector>(
    args: &Args<V::Elem>,
    finish: impl Fn(&Args<V::Elem>, usize, V, V, bool) -> V,
) -> bool {
    let mut moved = false;
    // SAFETY: all addresses are inside the buffers described in `Args`.
    unsafe {
        let low = V::splat(V::Elem::NEG_INFINITY);
        let (zero, one) = (V::splat(V::Elem::ZERO), V::splat(V::Elem::ONE));
        let factor = V::splat(args.factor);
        let tau = V::splat(args.threshold);
        let mut lane = 0;
        while lane < args.width {
            let before = V::load(args.reference.add(lane));
            let mut top = [low; 4];
            let mut row = 0;
            while row + 4 <= args.rows {
                for i in 0..4 {
                    top[i] = V::load(args.scores.add((row + i) * args.width + lane)).mul(factor).max(top[i]);
                }
                row += 4;
            }
            while row < args.rows {
                top[0] = V::load(args.scores.add(row * args.width + lane)).mul(factor).max(top[0]);
                row += 1;
            }
            let top = top[0].max(top[1]).max(top[2].max(top[3]));
            let limit = before.add(tau);
            let after = top.where_greater(limit, top, before);
            let mut alpha = one;
            if top.any_greater(limit) {
                moved = true;
                // -inf - -inf never reaches here: a lane moves only if `after` is finite or +inf.
                alpha = top.where_greater(limit, before.sub(after).exp2(), one);
                after.store(args.reference.add(lane));
            }
            alpha.store(args.alpha.add(lane));
            let safe = after.where_greater(low, after, zero);
            let large = V::splat(V::Elem::of(LARGE));
            let sum = if safe.any_greater(large) || zero.sub(safe).any_greater(large) {
                finish(args, lane, factor, safe, true)
            } else {
                finish(args, lane, factor, safe, false)
            };
            V::load(args.normaliser.add(lane)).mul_add(alpha, sum).store(args.normaliser.add(lane));
            lane += V::LANES;
        }
    }
    moved
}

/// `score * factor + minus`, exact where the product is the reference.
#[inline(always)]
pub(crate) unsafe fn exponent<V: Vector>(score: V, factor: V, minus: V, large: bool) -> V {
    // SAFETY: lane arithmetic.
    unsafe { if large { score.mul(factor).add(minus) } else { score.mul_add(factor, minus) } }
}

/// Writes P over the scores; returns the lanes' sums.
///
/// # Safety
/// As in [`Args`].
#[inline(always)]
pub(crate) unsafe fn in_place<V: Vector>(args: &Args<V::Elem>, lane: usize, factor: V, reference: V, large: bool) -> V {
    // SAFETY: as in `Args`.
    unsafe {
        let mut sums = [V::splat(V::Elem::ZERO); 2];
        let minus = V::splat(V::Elem::ZERO).sub(reference);
        for row in 0..args.rows {
            let at = args.scores.add(row * args.width + lane);
            let p = exponent(V::load(at), factor, minus, large).exp2();
            sums[row % 2] = sums[row % 2].add(p);
            p.store(at);
        }
        sums[0].add(sums[1])
    }
}

/// Writes P as bfloat16 pairs of adjacent keys (an odd last row is paired with zeros); the sums are of the
/// unrounded values.
///
/// # Safety
/// As in [`Args`].
#[inline(always)]
pub(crate) unsafe fn to_pairs<V: Half>(args: &Args<f32>, lane: usize, factor: V, reference: V, large: bool) -> V {
    // SAFETY: as in `Args`; the pair buffer holds ceil(rows / 2) * width units.
    unsafe {
        let zero = V::splat(0.0);
        let mut sums = [zero; 2];
        let minus = zero.sub(reference);
        for pair in 0..args.rows.div_ceil(2) {
            let at = args.scores.add(2 * pair * args.width + lane);
            let low = exponent(V::load(at), factor, minus, large).exp2();
            let mut high = zero;
            if 2 * pair + 1 < args.rows {
                high = exponent(V::load(at.add(args.width)), factor, minus, large).exp2();
            }
            sums[0] = sums[0].add(low);
            sums[1] = sums[1].add(high);
            V::store_pairs(low, high, args.pairs.add(pair * args.width + lane));
        }
        sums[0].add(sums[1])
    }
}
