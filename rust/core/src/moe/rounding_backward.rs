//! Gradients of token rounding. Which pairs are kept is a constant; every kept pair's gradient reaches the number its
//! weight came from: the router's weight of a chosen pair (its score where no weights were given), the score of a fill.
//!
//! Renormalised, w = p / P with P the sum over the token's pairs: `dL/dp_i = (g_i - sum_j g_j w_j) / P`; 0 where P is 0,
//! as the weights are.

use super::score::{Score, floats, integers, with_score};
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};

/// A rounded routing, as it was handed out: arrays of one axis.
#[derive(Debug, Clone)]
pub struct Pairs<'a> {
    /// int32.
    pub expert_ids: Array<'a>,
    /// int32, ascending.
    pub token_ids: Array<'a>,
    /// int32.
    pub slots: Array<'a>,
}

/// The gradients of the scores [tokens, experts] and, where weights were given, of the weights [tokens, slots], from that
/// of the rounded weights (`grad`, float32 or float64). Each in its array's type, rounded once.
///
/// # Errors
/// Wrong shapes or types; pairs that are not those of a rounded routing of these scores.
pub fn round_tokens_backward(
    pairs: &Pairs<'_>,
    grad: &Array<'_>,
    scores: &Array<'_>,
    weights: Option<&Array<'_>>,
    renormalise: bool,
    score_grad: ArrayMut<'_>,
    weight_grad: Option<ArrayMut<'_>>,
) -> Result<()> {
    let count = grad.len();
    let integers = [("expert_ids", &pairs.expert_ids), ("token_ids", &pairs.token_ids), ("slots", &pairs.slots)];
    for (name, array) in integers {
        if array.shape() != [count] || array.dtype() != Dtype::I32 {
            return Err(Error::shape(name, format!("[{count}] of int32"), array.shape()));
        }
    }
    if grad.shape() != [count] || !matches!(grad.dtype(), Dtype::F32 | Dtype::F64) {
        return Err(Error::shape("grad", "[pairs] of float32 or float64", grad.shape()));
    }
    if scores.shape().len() != 2 || score_grad.shape() != scores.shape() || score_grad.dtype() != scores.dtype() {
        return Err(Error::shape(
            "score_grad",
            format!("{:?} of {}", scores.shape(), scores.dtype()),
            score_grad.shape(),
        ));
    }
    match (weights, &weight_grad) {
        (None, None) => {}
        (Some(w), Some(d)) if w.shape().len() == 2 && w.shape() == d.shape() && w.dtype() == d.dtype() => {}
        _ => {
            return Err(Error::shape(
                "weight_grad",
                "shape and type of the weights",
                weights.map_or(&[], |w| w.shape()),
            ));
        }
    }
    with_score!("scores", scores, by_score(pairs, grad, scores, weights, renormalise, score_grad, weight_grad))
}

fn by_score<S: Score>(
    pairs: &Pairs<'_>,
    grad: &Array<'_>,
    scores: &Array<'_>,
    weights: Option<&Array<'_>>,
    renormalise: bool,
    score_grad: ArrayMut<'_>,
    weight_grad: Option<ArrayMut<'_>>,
) -> Result<()> {
    let (Some(weights), Some(weight_grad)) = (weights, weight_grad) else {
        return typed::<S, S>(pairs, grad, scores, None, renormalise, score_grad, None);
    };
    fn both<W: Score, S: Score>(
        pairs: &Pairs<'_>,
        grad: &Array<'_>,
        scores: &Array<'_>,
        weights: &Array<'_>,
        renormalise: bool,
        score_grad: ArrayMut<'_>,
        weight_grad: ArrayMut<'_>,
    ) -> Result<()> {
        typed::<S, W>(pairs, grad, scores, Some(weights), renormalise, score_grad, Some(weight_grad))
    }
    match weights.dtype() {
        Dtype::F32 => both::<f32, S>(pairs, grad, scores, weights, renormalise, score_grad, weight_grad),
        Dtype::F64 => both::<f64, S>(pairs, grad, scores, weights, renormalise, score_grad, weight_grad),
        Dtype::F16 => both::<half::f16, S>(pairs, grad, scores, weights, renormalise, score_grad, weight_grad),
        Dtype::Bf16 => both::<half::bf16, S>(pairs, grad, scores, weights, renormalise, score_grad, weight_grad),
        other => Err(Error::dtype("weights", "float32, float64, float16 or bfloat16", other)),
    }
}

fn typed<S: Score, W: Score>(
    pairs: &Pairs<'_>,
    grad: &Array<'_>,
    scores: &Array<'_>,
    weights: Option<&Array<'_>>,
    renormalise: bool,
    score_grad: ArrayMut<'_>,
    weight_grad: Option<ArrayMut<'_>>,
) -> Result<()> {
    const TOKENS: usize = 64;
    let (tokens, experts) = (scores.shape()[0], scores.shape()[1]);
    let scores: Matrix<'_, S> = scores.matrix(&[]);
    let (slots, weights) = (weights.map_or(0, |w| w.shape()[1]), weights.map(|w| w.matrix::<W>(&[])));
    let (grad, ids, places) = (floats(grad), integers(&pairs.expert_ids), integers(&pairs.slots));
    let offsets =
        offsets(&integers(&pairs.token_ids), &ids, &places, tokens, experts, weights.is_some().then_some(slots))?;
    let (score_grad, weight_grad) = (score_grad.rows::<S>(), weight_grad.map(|array| array.rows::<W>()));
    threads::for_each(
        tokens.div_ceil(TOKENS),
        tokens * experts < 1 << 14,
        || (),
        |task, ()| {
            for token in task * TOKENS..tokens.min((task + 1) * TOKENS) {
                let row = score_grad.take(token);
                row.fill(S::rounded(0.0));
                let mut own = weight_grad.as_ref().map(|rows| rows.take(token));
                if let Some(own) = &mut own {
                    own.fill(W::rounded(0.0));
                }
                let range = offsets[token]..offsets[token + 1];
                let g = |pair: usize| grad[pair];
                let expert = |pair: usize| ids[pair] as usize;
                let slot = |pair: usize| usize::try_from(places[pair]).ok();
                let pick = |pair: usize| match (&weights, slot(pair)) {
                    (Some(weights), Some(slot)) => weights.at(token, slot).widen().f64(),
                    _ => scores.at(token, expert(pair)).widen().f64(),
                };
                let (mut total, mut mean) = (1.0, 0.0);
                if renormalise {
                    total = range.clone().map(pick).sum::<f64>();
                    mean = range.clone().map(|pair| g(pair) * pick(pair)).sum::<f64>() / total;
                    if total == 0.0 {
                        continue;
                    }
                }
                for pair in range {
                    let value = (g(pair) - mean) / total;
                    match (&mut own, slot(pair)) {
                        (Some(own), Some(slot)) => own[slot] = W::rounded(value),
                        _ => row[expert(pair)] = S::rounded(value),
                    }
                }
            }
        },
    )
}

/// Where each token's pairs begin; checks the pairs. `weighed` is the number of weights a token has, if there are any.
fn offsets(
    token_ids: &[i64],
    ids: &[i64],
    slots: &[i64],
    tokens: usize,
    experts: usize,
    weighed: Option<usize>,
) -> Result<Vec<usize>> {
    let mut offsets = vec![0; tokens + 1];
    let mut before = 0;
    for (pair, ((&token, &expert), &slot)) in token_ids.iter().zip(ids).zip(slots).enumerate() {
        let inside = (before..tokens as i64).contains(&token) && (0..experts as i64).contains(&expert);
        if !inside || weighed.is_some_and(|weighed| slot >= weighed as i64) {
            let got = format!("token {token}, expert {expert}, slot {slot} at pair {pair}");
            return Err(Error::value("pairs", "those of a rounded routing of these scores", got));
        }
        before = token;
        offsets[token as usize + 1] += 1;
    }
    for token in 0..tokens {
        offsets[token + 1] += offsets[token];
    }
    Ok(offsets)
}
