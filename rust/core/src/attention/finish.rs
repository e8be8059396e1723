//! The end of a row: sink, normalisation, LSE; and the merge of partial results.

use crate::arch::Online;
use crate::dtype::Real;

/// The score that times `factor` is -inf: what a masked score becomes.
pub fn blank<T: Real>(factor: T) -> T {
    if factor < T::ZERO { -T::NEG_INFINITY } else { T::NEG_INFINITY }
}

/// Adds a sink to a row's state (log2 domain): returns the factor by which its accumulator must be multiplied.
///
/// The reference moves up to the sink first, so a sink far above all scores does not overflow.
pub fn add_sink<T: Real>(state: &mut Online<T>, lane: usize, sink: f64) -> T {
    let sink = T::of(sink * std::f64::consts::LOG2_E);
    let before = state.reference[lane];
    if sink == T::NEG_INFINITY {
        return T::ONE;
    }
    let after = if sink > before { sink } else { before };
    let shrink = exp2(before - after);
    state.normaliser[lane] = state.normaliser[lane] * shrink + exp2(sink - after);
    state.reference[lane] = after;
    shrink
}

/// Natural-log LSE of a row; -inf if nothing was attended.
pub fn lse<T: Real>(state: &Online<T>, lane: usize) -> T {
    let sum = state.normaliser[lane];
    if sum == T::ZERO {
        return T::NEG_INFINITY;
    }
    T::of((state.reference[lane].f64() + sum.f64().log2()) * std::f64::consts::LN_2)
}

/// 1 / normaliser; 0 for a row that attended nothing (its accumulator is 0).
pub fn inverse<T: Real>(state: &Online<T>, lane: usize) -> T {
    if state.normaliser[lane] == T::ZERO { T::ZERO } else { T::ONE / state.normaliser[lane] }
}

/// Folds the partial result of one more range of keys into a row: `(reference, normaliser)` beside an accumulator.
/// Returns the factors of the old accumulator and of the new one.
pub fn merge<T: Real>(state: &mut Online<T>, lane: usize, reference: T, normaliser: T) -> (T, T) {
    let before = state.reference[lane];
    if reference == T::NEG_INFINITY {
        // An empty part; a NaN in its normaliser would have had a NaN or finite reference.
        return (T::ONE, T::ZERO);
    }
    let after = if reference > before { reference } else { before };
    let (old, new) = (exp2(before - after), exp2(reference - after));
    state.normaliser[lane] = state.normaliser[lane] * old + normaliser * new;
    state.reference[lane] = after;
    (old, new)
}

fn exp2<T: Real>(x: T) -> T {
    T::of(libm::exp2(x.f64()))
}
