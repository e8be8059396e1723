//! Routers: which experts a token goes to, and with what weight.
//!
//! Selection is exact (no truncated mantissas), ties go to the lower expert, NaN is refused by name. Scores are computed
//! in double precision and rounded once, with the same bits on every level.

use super::largest::Largest;
use super::score::{Score, with_score};
use crate::arch::ranking::{Ranked, sigmoid};
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::exponential::exponential;
use crate::threads;
use crate::view::{Array, ArrayMut};
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
    /// A sigmoid per expert; bias and groups take part in the selection alone.
    Sigmoid,
}

/// Selection limited to groups of neighbouring experts (DeepSeek-V3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups that a token may choose from: those whose two largest choice scores have the largest sum.
    pub kept: usize,
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
    /// Limits a sigmoid's choice; one kept group of one is no limit.
    pub groups: Groups,
}

impl Router<'_> {
    /// What the weights are relative to.
    pub(super) fn over(&self) -> Over {
        match (self.scoring, self.renormalise) {
            (Scoring::Softmax, false) => Over::AllSoftmax,
            (Scoring::Sigmoid, false) => Over::NothingSigmoid,
            (Scoring::Sigmoid, true) => Over::ChosenSigmoid,
            _ => Over::ChosenSoftmax,
        }
    }

    fn check(&self, experts: usize) -> Result<()> {
        if !(1..=experts).contains(&self.top_k) {
            return Err(Error::value("top_k", format!("1..={experts} (the number of experts)"), self.top_k));
        }
        let Groups { count, kept } = self.groups;
        if !(1..=experts).contains(&count) || !experts.is_multiple_of(count) {
            return Err(Error::value("groups", format!("a divisor of {experts} (the number of experts)"), count));
        }
        if !(1..=count).contains(&kept) {
            return Err(Error::value("top_groups", format!("1..={count} (the number of groups)"), kept));
        }
        let open = kept * (experts / count);
        if self.top_k > open {
            let allowed = format!("1..={open}, the experts of {kept} groups of {}", experts / count);
            return Err(Error::value("top_k", allowed, self.top_k).hint("keep more groups"));
        }
        if let Some(bias) = self.bias {
            if bias.len() != experts {
                return Err(Error::shape("bias", format!("[experts] = [{experts}]"), &[bias.len()]));
            }
            if let Some((expert, value)) = bias.iter().enumerate().find(|(_, b)| b.is_nan() || **b == f64::INFINITY) {
                return Err(Error::value("bias", "finite numbers or -inf", format!("{value} at expert {expert}")));
            }
        }
        if self.scoring != Scoring::Sigmoid {
            if self.bias.is_some() {
                return Err(Error::value("bias", "a selection bias with scoring 'sigmoid' only", "one with a softmax"));
            }
            if count > 1 {
                let got = format!("{count} with a softmax");
                return Err(Error::value("groups", "1, or groups with scoring 'sigmoid'", got));
            }
        }
        Ok(())
    }
}

/// What the weights of a token are divided by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    ChosenSoftmax,
    AllSoftmax,
    NothingSigmoid,
    ChosenSigmoid,
}

impl Over {
    /// Whether the weights depend on logits of experts that were not chosen.
    pub(super) fn needs_row(self) -> bool {
        self == Over::AllSoftmax
    }
}

/// Extents of logits [tokens, experts], for a router that fits them.
pub(super) fn checked(router: &Router<'_>, logits: &Array<'_>) -> Result<(usize, usize)> {
    let &[tokens, experts] = logits.shape() else {
        return Err(Error::shape("logits", "rank 2 [tokens, experts]", logits.shape()));
    };
    if experts > i32::MAX as usize {
        return Err(Error::shape("logits", "fewer than 2^31 experts", logits.shape()));
    }
    router.check(experts)?;
    Ok((tokens, experts))
}

/// Chooses `top_k` experts for every row of `logits` [tokens, experts]. `ids` (int32) and `weights` (float32; float64
/// for float64 logits) are [tokens, top_k], by descending choice.
///
/// # Errors
/// Wrong shapes or types; `top_k`, bias or groups that do not fit; a NaN among the logits.
pub fn route(router: &Router<'_>, logits: &Array<'_>, ids: ArrayMut<'_>, weights: ArrayMut<'_>) -> Result<()> {
    let (tokens, _) = checked(router, logits)?;
    let wide = if logits.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    for (name, array, dtype) in [("expert_ids", &ids, Dtype::I32), ("weights", &weights, wide)] {
        if array.shape() != [tokens, router.top_k] || array.dtype() != dtype {
            return Err(Error::shape(name, format!("[{tokens}, {}] of {dtype}", router.top_k), array.shape()));
        }
    }
    with_score!("logits", logits, typed(router, logits, ids, weights))
}

/// Tokens of a task.
pub(super) const TOKENS: usize = 64;

fn typed<S: Score>(router: &Router<'_>, logits: &Array<'_>, ids: ArrayMut<'_>, weights: ArrayMut<'_>) -> Result<()> {
    let logits = logits.matrix::<S>(&[]);
    let (ids, weights) = (ids.rows::<i32>(), weights.rows::<S::Acc>());
    let (count, experts) = (logits.rows(), logits.cols());
    let refused = FirstNan::default();
    threads::for_each(
        count.div_ceil(TOKENS),
        count * experts < 1 << 14,
        || (vec![S::Acc::ZERO; experts], Scratch::new(router, experts)),
        |task, (copy, scratch)| {
            for token in task * TOKENS..count.min((task + 1) * TOKENS) {
                let row = S::widened(&logits, token, copy);
                if S::Acc::ranking().has_nan(row) {
                    return refused.note(token, row);
                }
                scratch.choose(router, row);
                scratch.logits.clear();
                scratch.logits.extend(scratch.chosen.iter().map(|&expert| row[expert as usize].f64()));
                scratch.weigh(router, row);
                for (id, &expert) in ids.take(token).iter_mut().zip(&scratch.chosen) {
                    *id = expert as i32;
                }
                for (weight, &score) in weights.take(token).iter_mut().zip(&scratch.scores) {
                    *weight = S::Acc::of(score * router.scale);
                }
            }
        },
    )?;
    refused.into_result("logits", "expert")
}

/// The first NaN that tasks came across, whichever of them finished first.
#[derive(Default)]
pub(super) struct FirstNan(Mutex<Option<(usize, usize)>>);

impl FirstNan {
    pub(super) fn note<T: Real>(&self, token: usize, row: &[T]) {
        let place = (token, row.iter().position(|x| x.f64().is_nan()).unwrap_or(0));
        let mut first = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *first = Some(first.map_or(place, |other| other.min(place)));
    }

    /// The error that names the place: a token, and what the second axis counts.
    pub(super) fn into_result(self, name: &str, axis: &str) -> Result<()> {
        let first = self.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        first.map_or(Ok(()), |(token, place)| {
            Err(Error::value(name, "numbers", format!("NaN at token {token}, {axis} {place}")))
        })
    }
}

/// What one thread needs for a token.
pub(super) struct Scratch<T> {
    largest: Largest<T>,
    largest_choice: Largest<f64>,
    largest_group: Largest<f64>,
    choices: Vec<f64>,
    group_scores: Vec<f64>,
    open: Vec<f64>,
    /// Logits of the chosen experts.
    pub(super) logits: Vec<f64>,
    /// e^(logit - top) of all experts, and their sum, where the weights need them.
    pub(super) all: Vec<f64>,
    pub(super) total: f64,
    /// Experts of the token at hand.
    pub(super) chosen: Vec<u32>,
    /// Their weights before the factor.
    pub(super) scores: Vec<f64>,
}

impl<T: Ranked> Scratch<T> {
    pub(super) fn new(router: &Router<'_>, experts: usize) -> Self {
        let choices = if router.bias.is_some() || router.groups.count > 1 { experts } else { 0 };
        Self {
            largest: Largest::new(),
            largest_choice: Largest::new(),
            largest_group: Largest::new(),
            choices: vec![0.0; choices],
            group_scores: Vec::new(),
            open: Vec::new(),
            logits: Vec::new(),
            all: vec![0.0; if router.over().needs_row() { experts } else { 0 }],
            total: 0.0,
            chosen: Vec::with_capacity(router.top_k),
            scores: vec![0.0; router.top_k],
        }
    }

    /// Fills `chosen`. Without bias or groups the logits rank: scores rise with them, so no tie arises from rounding.
    fn choose(&mut self, router: &Router<'_>, logits: &[T]) {
        self.chosen.clear();
        if self.choices.is_empty() {
            self.chosen.extend_from_slice(self.largest.of(logits, router.top_k));
            return;
        }
        T::ranking().sigmoids(logits, &mut self.choices);
        if let Some(bias) = router.bias {
            self.choices.iter_mut().zip(bias).for_each(|(choice, b)| *choice += b);
        }
        let Groups { count, kept } = router.groups;
        if kept == count {
            self.chosen.extend_from_slice(self.largest_choice.of(&self.choices, router.top_k));
            return;
        }
        let size = logits.len() / count;
        self.group_scores.clear();
        self.group_scores.extend(self.choices.chunks_exact(size).map(best_two));
        let mut groups = self.largest_group.of(&self.group_scores, kept).to_vec();
        groups.sort_unstable(); // so that ties within the open groups go to the lower expert
        self.open.clear();
        for &group in &groups {
            self.open.extend_from_slice(&self.choices[group as usize * size..][..size]);
        }
        let open = self.largest_choice.of(&self.open, router.top_k);
        self.chosen.extend(open.iter().map(|&at| groups[at as usize / size] * size as u32 + at % size as u32));
    }

    /// Fills `scores` (and `all`) for the experts in `chosen`, whose `logits` are known; `row` is read only where
    /// [`Over::needs_row`].
    pub(super) fn weigh(&mut self, router: &Router<'_>, row: &[T]) {
        let top = self.logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = match router.over() {
            // A row of -inf alone has no scale: its experts share evenly. +inf shares among the infinite ones.
            Over::ChosenSoftmax => f64::ranking().exponentials(&self.logits, top, &mut self.scores),
            Over::AllSoftmax => {
                let top = T::table().row_max(row, T::ONE).f64();
                self.total = T::ranking().exponentials(row, top, &mut self.all);
                for (score, &expert) in self.scores.iter_mut().zip(&self.chosen) {
                    *score = self.all[expert as usize];
                }
                self.total
            }
            Over::NothingSigmoid => return f64::ranking().sigmoids(&self.logits, &mut self.scores),
            Over::ChosenSigmoid => {
                // Scaled by the largest: their quotients survive where every sigmoid underflows.
                let shift = if top < 0.0 && top > f64::NEG_INFINITY { top } else { 0.0 };
                for (score, &x) in self.scores.iter_mut().zip(&self.logits) {
                    *score = if x < 0.0 { exponential(x - shift) / (1.0 + exponential(x)) } else { sigmoid(x) };
                }
                self.scores.iter().sum()
            }
        };
        // Sigmoids of -inf alone: nothing can be renormalised.
        self.scores.iter_mut().for_each(|score| *score = if total == 0.0 { 0.0 } else { *score / total });
    }
}

/// The sum of the two largest; the one there is in a group of one. Four streams, so that no step waits for the last.
fn best_two(choices: &[f64]) -> f64 {
    let larger = |a: f64, b: f64| if a > b { a } else { b };
    let smaller = |a: f64, b: f64| if a < b { a } else { b };
    let (mut first, mut second) = ([f64::NEG_INFINITY; 4], [f64::NEG_INFINITY; 4]);
    let (whole, rest) = choices.as_chunks::<4>();
    for chunk in whole {
        for (lane, &choice) in chunk.iter().enumerate() {
            second[lane] = larger(second[lane], smaller(choice, first[lane]));
            first[lane] = larger(first[lane], choice);
        }
    }
    let (mut best, mut next) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    for &choice in first.iter().chain(&second).chain(rest) {
        next = larger(next, smaller(choice, best));
        best = larger(best, choice);
    }
    if choices.len() == 1 { best } else { best + next }
}
