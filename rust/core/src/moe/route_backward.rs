//! Gradients of routers. The selection is a constant; gradients flow through the weights alone.
//!
//! With g = scale * dL/dweight of the chosen experts (0 elsewhere):
//!
//! | weights | dL/dlogit |
//! |---|---|
//! | S = softmax over the chosen (or renormalised over them) | `S_k (g_k - sum_j S_j g_j)` on the chosen, 0 elsewhere |
//! | p = softmax over all | `p_e (g_e - sum_j p_j g_j)` on all experts |
//! | s = sigmoid | `g_k s_k (1 - s_k)` on the chosen |
//! | w = s / sum of s | `w_k (1 - s_k) (g_k - sum_j w_j g_j)` on the chosen |
//!
//! The last has no division by a sum that may underflow, and 1 - s is the sigmoid of the opposite logit.

use super::route::{FirstNan, Over, Router, Scratch, TOKENS, checked};
use super::score::{Score, floats, integers, with_score};
use crate::arch::ranking::{Ranked, sigmoid};
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut};

/// The gradient of the logits: `out`, of their shape and type. `ids` and the weights' gradient `grad` (float32 or
/// float64) are [tokens, top_k]. Computed in double precision, rounded once.
///
/// # Errors
/// Wrong shapes or types; an expert outside the logits; a NaN among the logits.
pub fn route_backward(
    router: &Router<'_>,
    logits: &Array<'_>,
    ids: &Array<'_>,
    grad: &Array<'_>,
    out: ArrayMut<'_>,
) -> Result<()> {
    let (tokens, experts) = checked(router, logits)?;
    let pairs = [tokens, router.top_k];
    if ids.shape() != pairs || !matches!(ids.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::shape("expert_ids", format!("[{tokens}, {}] of int32 or int64", pairs[1]), ids.shape()));
    }
    if grad.shape() != pairs || !matches!(grad.dtype(), Dtype::F32 | Dtype::F64) {
        return Err(Error::shape("grad", format!("[{tokens}, {}] of float32 or float64", pairs[1]), grad.shape()));
    }
    if out.shape() != [tokens, experts] || out.dtype() != logits.dtype() {
        return Err(Error::shape("out", format!("[{tokens}, {experts}] of {}", logits.dtype()), out.shape()));
    }
    let (ids, grad) = (integers(ids), floats(grad));
    if let Some(pair) = ids.iter().position(|id| !(0..experts as i64).contains(id)) {
        let got = format!("{} at token {}", ids[pair], pair / router.top_k);
        return Err(Error::value("expert_ids", format!("0..{experts}"), got));
    }
    with_score!("logits", logits, typed(router, logits, &ids, &grad, out))
}

fn typed<S: Score>(
    router: &Router<'_>,
    logits: &Array<'_>,
    ids: &[i64],
    grad: &[f64],
    out: ArrayMut<'_>,
) -> Result<()> {
    let logits = logits.matrix::<S>(&[]);
    let out = out.rows::<S>();
    let (count, experts) = (logits.rows(), logits.cols());
    let refused = FirstNan::default();
    threads::for_each(
        count.div_ceil(TOKENS),
        count * experts < 1 << 14,
        || (vec![S::Acc::ZERO; experts], Scratch::new(router, experts), vec![0.0; router.top_k]),
        |task, (copy, scratch, g)| {
            for token in task * TOKENS..count.min((task + 1) * TOKENS) {
                // Only one scoring looks at the whole row; the others leave it in memory.
                let row = if router.over().needs_row() { S::widened(&logits, token, copy) } else { &[] };
                if S::Acc::ranking().has_nan(row) {
                    return refused.note(token, row);
                }
                let pairs = token * router.top_k..(token + 1) * router.top_k;
                scratch.chosen.clear();
                scratch.chosen.extend(ids[pairs.clone()].iter().map(|&id| id as u32));
                scratch.logits.clear();
                scratch.logits.extend(scratch.chosen.iter().map(|&id| logits.at(token, id as usize).widen().f64()));
                scratch.weigh(router, row);
                g.iter_mut().zip(&grad[pairs]).for_each(|(g, own)| *g = own * router.scale);
                one_token(router.over(), scratch, g, out.take(token));
            }
        },
    )?;
    refused.into_result("logits", "expert")
}

fn one_token<S: Score>(over: Over, scratch: &Scratch<S::Acc>, g: &[f64], out: &mut [S]) {
    let mean: f64 = scratch.scores.iter().zip(g).map(|(score, g)| score * g).sum();
    if over == Over::AllSoftmax {
        let factor = -mean / scratch.total;
        out.iter_mut().zip(&scratch.all).for_each(|(out, e)| *out = S::rounded(e * factor));
    } else {
        out.fill(S::rounded(0.0));
    }
    for (slot, &expert) in scratch.chosen.iter().enumerate() {
        let (score, g) = (scratch.scores[slot], g[slot]);
        let against = || sigmoid(-scratch.logits[slot]); // 1 - sigmoid, without cancellation
        out[expert as usize] = S::rounded(match over {
            Over::ChosenSoftmax | Over::AllSoftmax => score * (g - mean),
            Over::NothingSigmoid => g * score * against(),
            Over::ChosenSigmoid => score * against() * (g - mean),
        });
    }
}
