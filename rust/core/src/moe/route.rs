//! Routers: which experts a token goes to, and with what weight.
//!
//! Selection is exact (no truncated mantissas), ties go to the lower expert, NaN is refused by name. Scores are computed
//! in double precision and rounded once.

use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};
use std::sync::Mutex;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// The K largest logits, then a softmax over those K.
    SoftmaxTopk,
    /// A softmax over all experts, then the K largest.
    Softmax,
    /// As `Softmax`, the K scores divided by their sum (mathematically `SoftmaxTopk`).
    SoftmaxRenormalised,
    /// A sigmoid per expert; the bias takes part in the selection alone.
    Sigmoid,
}

/// A router.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    /// Experts per token.
    pub top_k: usize,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Added to a sigmoid's scores when choosing, not to the weights.
    pub bias: Option<&'a [f64]>,
    /// Divide the K weights by their sum (those of `SoftmaxTopk` and `SoftmaxRenormalised` sum to 1 already).
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f64,
}

/// Chooses `top_k` experts for every row of `logits` [tokens, experts]. `ids` (int32) and `weights` (float32) are
/// [tokens, top_k], by descending score.
///
/// # Errors
/// Wrong shapes or types; `top_k` outside 1..=experts; a NaN among the logits.
pub fn route(router: &Router<'_>, logits: &Array<'_>, ids: ArrayMut<'_>, weights: ArrayMut<'_>) -> Result<()> {
    if logits.shape().len() != 2 {
        return Err(Error::shape("logits", "rank 2 [tokens, experts]", logits.shape()));
    }
    let (tokens, experts) = (logits.shape()[0], logits.shape()[1]);
    if !(1..=experts).contains(&router.top_k) {
        return Err(Error::value("top_k", format!("1..={experts} (the number of experts)"), router.top_k));
    }
    if let Some(bias) = router.bias
        && bias.len() != experts
    {
        return Err(Error::shape("bias", format!("[experts] = [{experts}]"), &[bias.len()]));
    }
    if router.bias.is_some() && router.scoring != Scoring::Sigmoid {
        return Err(Error::value("bias", "a selection bias with scoring 'sigmoid' only", "one with a softmax"));
    }
    for (name, array, dtype) in [("expert_ids", &ids, Dtype::I32), ("weights", &weights, Dtype::F32)] {
        if array.shape() != [tokens, router.top_k] || array.dtype() != dtype {
            return Err(Error::shape(name, format!("[{tokens}, {}] of {dtype}", router.top_k), array.shape()));
        }
    }
    match logits.dtype() {
        Dtype::F32 => typed::<f32>(router, logits.matrix(&[]), ids, weights),
        Dtype::F64 => typed::<f64>(router, logits.matrix(&[]), ids, weights),
        Dtype::F16 => typed::<f16>(router, logits.matrix(&[]), ids, weights),
        Dtype::Bf16 => typed::<bf16>(router, logits.matrix(&[]), ids, weights),
        other => Err(Error::dtype("logits", "float32, float64, float16 or bfloat16", other)),
    }
}

fn typed<S: Float>(router: &Router<'_>, logits: Matrix<'_, S>, ids: ArrayMut<'_>, weights: ArrayMut<'_>) -> Result<()> {
    const TOKENS: usize = 64;
    let (ids, weights) = (ids.rows::<i32>(), weights.rows::<f32>());
    let (count, experts) = (logits.rows(), logits.cols());
    let failure = Mutex::new(None);
    threads::for_each(
        count.div_ceil(TOKENS),
        count * experts < 1 << 14,
        || (vec![0.0; experts], Vec::new()),
        |task, (row, best)| {
            for token in task * TOKENS..count.min((task + 1) * TOKENS) {
                for (expert, value) in row.iter_mut().enumerate() {
                    *value = logits.at(token, expert).widen().f64();
                    if value.is_nan() {
                        let error = Error::value("logits", "numbers", format!("NaN at token {token}, expert {expert}"));
                        *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                        return;
                    }
                }
                one_token(router, row, best, ids.take(token), weights.take(token));
            }
        },
    )?;
    failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

fn one_token(router: &Router<'_>, logits: &[f64], best: &mut Vec<usize>, ids: &mut [i32], weights: &mut [f32]) {
    let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
    let rank = |expert: usize| match (router.scoring, router.bias) {
        (Scoring::Sigmoid, Some(bias)) => sigmoid(logits[expert]) + bias[expert],
        _ => logits[expert],
    };
    largest(logits.len(), router.top_k, rank, best);
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // A row of -inf alone has no scale: its experts share evenly. +inf shares among the infinite ones.
    let exponential = |x: f64| if x == top { 1.0 } else { libm::exp(x - top) };
    let score = |expert: usize| match router.scoring {
        Scoring::Sigmoid => sigmoid(logits[expert]),
        _ => exponential(logits[expert]),
    };
    let chosen: f64 = best.iter().map(|&expert| score(expert)).sum();
    let total = match router.scoring {
        Scoring::Softmax if !router.renormalise => logits.iter().map(|&x| exponential(x)).sum(),
        Scoring::Sigmoid if !router.renormalise => 1.0,
        _ => chosen,
    };
    for ((&expert, id), weight) in best.iter().zip(ids).zip(weights) {
        *id = expert as i32;
        // A sigmoid may underflow to 0 for all chosen experts; then nothing can be renormalised.
        *weight = if total == 0.0 { 0.0 } else { (score(expert) / total * router.scale) as f32 };
    }
}

/// The `k` largest by `rank`, descending, ties by ascending index: an insertion list with a threshold.
fn largest(count: usize, k: usize, rank: impl Fn(usize) -> f64, best: &mut Vec<usize>) {
    best.clear();
    for candidate in 0..count {
        let value = rank(candidate);
        if best.len() == k && best.last().is_some_and(|&last| value <= rank(last)) {
            continue;
        }
        let place = best.partition_point(|&other| rank(other) >= value);
        best.truncate(k - 1);
        best.insert(place, candidate);
    }
}
