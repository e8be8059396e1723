//! Token rounding: a routing changed so that every expert's number of rows is a multiple of a tile (SonicMoE,
//! arXiv 2512.14080, algorithm 4). Only the last tile of an expert changes.
//!
//! ```text
//! for each expert e:
//!     f = number of tokens that chose e
//!     c = f rounded to a multiple of the tile, by the rule; at most the number of tokens
//!     rank all tokens for e by (chose e first, score descending, token ascending)
//!     e keeps the first c
//! pairs = all kept (token, expert), by token, then expert
//! ```
//!
//! Departures, for speed alone:
//! 1. Nothing is sorted. Rounding down selects the lowest of the f chosen tokens; rounding up selects the best of the
//!    others, at most a tile.
//! 2. The others are found in one pass over the scores, which lie by token: each expert has a bar, the score of its worst
//!    candidate so far, and a row is compared with all bars by registers. Few scores pass.
//! 3. Ranges of tokens do so side by side, each with bars of its own. The ranking has no ties, so the best of their
//!    candidates do not depend on how the tokens were cut.

use super::rounding_rules::{Choice, Rounding, Rule};
use super::route::FirstNan;
use super::routing::Routing;
use super::score::{Score, copied, floats, integers, with_score};
use crate::arch::ranking::Ranked;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use std::cmp::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The slot of a pair that no token chose: a fill.
pub const FILL: i32 = -1;

/// A rounded routing: its pairs by ascending token, then expert.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rounded {
    /// Expert of each pair.
    pub expert_ids: Vec<i32>,
    /// Token of each pair.
    pub token_ids: Vec<i32>,
    /// Which of its token's slots the pair was chosen in, or [`FILL`].
    pub slots: Vec<i32>,
    /// Weight of each pair.
    pub weights: Vec<f64>,
}

impl Rounded {
    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.expert_ids.len()
    }

    /// True if every expert lost all its tokens.
    pub fn is_empty(&self) -> bool {
        self.expert_ids.is_empty()
    }

    /// Copies the pairs into arrays of one axis: int32, and float32 or float64 for the weights.
    ///
    /// # Errors
    /// Wrong shapes or types.
    pub fn write(
        &self,
        ids: ArrayMut<'_>,
        tokens: ArrayMut<'_>,
        slots: ArrayMut<'_>,
        weights: ArrayMut<'_>,
    ) -> Result<()> {
        let integers = [("expert_ids", ids, &self.expert_ids), ("token_ids", tokens, &self.token_ids)];
        for (name, out, values) in integers.into_iter().chain([("slots", slots, &self.slots)]) {
            if out.shape() != [self.len()] || out.dtype() != Dtype::I32 {
                return Err(Error::shape(name, format!("[{}] of int32", self.len()), out.shape()));
            }
            out.rows::<i32>().take(0).copy_from_slice(values);
        }
        if weights.shape() != [self.len()] || !matches!(weights.dtype(), Dtype::F32 | Dtype::F64) {
            return Err(Error::shape("weights", format!("[{}] of float32 or float64", self.len()), weights.shape()));
        }
        if weights.dtype() == Dtype::F64 {
            weights.rows::<f64>().take(0).copy_from_slice(&self.weights);
        } else {
            weights.rows::<f32>().take(0).iter_mut().zip(&self.weights).for_each(|(to, from)| *to = *from as f32);
        }
        Ok(())
    }
}

/// Rounds the routing `expert_ids` [tokens, slots] of a router that gives every expert a score: `scores`
/// [tokens, experts]. A pair weighs `weights` [tokens, slots] if it was chosen (its score without them), its score if it
/// is a fill; chosen pairs are ranked by that too. `renormalise` divides by the sum over the token's kept pairs. Ids
/// outside the experts are left out.
///
/// # Errors
/// Wrong shapes or types; a tile of 0; an expert twice for one token; NaN.
pub fn round_tokens(
    rounding: &Rounding,
    scores: &Array<'_>,
    expert_ids: &Array<'_>,
    weights: Option<&Array<'_>>,
    renormalise: bool,
) -> Result<Rounded> {
    let &[tokens, experts] = scores.shape() else {
        return Err(Error::shape("scores", "rank 2 [tokens, experts]", scores.shape()));
    };
    if tokens > i32::MAX as usize || experts > i32::MAX as usize {
        return Err(Error::shape("scores", "fewer than 2^31 tokens and experts", scores.shape()));
    }
    if expert_ids.shape().len() != 2 || expert_ids.shape()[0] != tokens {
        return Err(Error::shape("expert_ids", format!("[tokens, slots] = [{tokens}, any]"), expert_ids.shape()));
    }
    if !matches!(expert_ids.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("expert_ids", "int32 or int64", expert_ids.dtype()));
    }
    if let Some(weights) = weights {
        if weights.shape() != expert_ids.shape() {
            let allowed = format!("the shape of expert_ids {:?}", expert_ids.shape());
            return Err(Error::shape("weights", allowed, weights.shape()));
        }
        if !matches!(weights.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16) {
            return Err(Error::dtype("weights", "float32, float64, float16 or bfloat16", weights.dtype()));
        }
    }
    if rounding.tile == 0 {
        return Err(Error::value("tile", "at least 1", 0));
    }
    with_score!("scores", scores, typed(rounding, scores, expert_ids, weights, renormalise))
}

fn typed<S: Score>(
    rounding: &Rounding,
    scores: &Array<'_>,
    expert_ids: &Array<'_>,
    weights: Option<&Array<'_>>,
    renormalise: bool,
) -> Result<Rounded> {
    let scores = scores.matrix::<S>(&[]);
    let chosen = Chosen::new(expert_ids, scores.cols())?;
    let targets = rounding.targets(&chosen.counts, scores.rows());
    // How many candidates each expert may need.
    let needs: Vec<usize> = (chosen.counts.iter().zip(&targets))
        .map(|(&count, target)| target.unwrap_or(rounding.choice(count, scores.rows()).up).saturating_sub(count))
        .collect();
    let weights = weights.map(floats);
    let (ranks, candidates) = scan(&scores, &chosen, weights.as_deref(), &needs)?;
    let changes = decide(rounding, scores.rows(), &chosen, &targets, &ranks, &candidates)?;
    assemble(&scores, &chosen, &ranks, &changes, renormalise)
}

/// The routing before rounding.
struct Chosen {
    slots: usize,
    /// Expert of each pair (token * slots + slot), or a sentinel.
    ids: Vec<i64>,
    /// Pairs of each expert.
    counts: Vec<usize>,
    routing: Routing,
}

impl Chosen {
    fn new(ids: &Array<'_>, experts: usize) -> Result<Self> {
        let slots = ids.shape()[1];
        let ids = integers(ids);
        let routing = Routing::new(&ids, slots, experts);
        let counts: Vec<usize> = (0..experts).map(|expert| routing.of(expert).len()).collect();
        for expert in 0..experts {
            // Rows of an expert stand in the order of tokens.
            if let Some(twice) = routing.tokens[routing.of(expert)].windows(2).find(|two| two[0] == two[1]) {
                let got = format!("expert {expert} twice at token {}", twice[0]);
                return Err(Error::value("expert_ids", "different experts for a token", got));
            }
        }
        Ok(Self { slots, ids, counts, routing })
    }

    /// Pairs of an expert, ascending.
    fn of(&self, expert: usize) -> &[usize] {
        &self.routing.pairs[self.routing.of(expert)]
    }

    /// Pairs of a token that have an expert: (slot, expert).
    fn slots_of(&self, token: usize) -> impl Iterator<Item = (usize, usize)> {
        let ids = &self.ids[token * self.slots..(token + 1) * self.slots];
        let experts = self.counts.len();
        let valid = move |id: i64| usize::try_from(id).ok().filter(|&expert| expert < experts);
        ids.iter().enumerate().filter_map(move |(slot, &id)| valid(id).map(|expert| (slot, expert)))
    }
}

/// A token that did not choose an expert, with its score for it.
type Candidate<T> = (T, usize);
/// For each range of tokens, for each expert: at least as many of the range's best candidates as the expert needs.
type Candidates<T> = Vec<Vec<Vec<Candidate<T>>>>;

/// Score descending, token ascending: no two candidates of an expert are equal.
fn by_rank<T: PartialOrd>(a: &Candidate<T>, b: &Candidate<T>) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// One pass over the scores: what the chosen pairs are ranked by [tokens * slots], and the candidates.
fn scan<S: Score>(
    scores: &Matrix<'_, S>,
    chosen: &Chosen,
    weights: Option<&[f64]>,
    needs: &[usize],
) -> Result<(Vec<f64>, Candidates<S::Acc>)> {
    let (tokens, experts) = (scores.rows(), scores.cols());
    let mut ranks = vec![0.0; tokens * chosen.slots];
    let serial = tokens * experts < 1 << 16;
    let ranges = if serial { 1 } else { (2 * threads::threads()).min(tokens.div_ceil(512)) };
    let length = tokens.div_ceil(ranges);
    let found: Vec<Mutex<Vec<Vec<Candidate<S::Acc>>>>> = (0..ranges).map(|_| Mutex::new(Vec::new())).collect();
    let (bad_score, bad_weight) = (FirstNan::default(), FirstNan::default());
    let kernels = S::Acc::ranking();
    let nan = S::Acc::of(f64::NAN);
    let filling = needs.iter().any(|&need| need > 0);
    let rows = ArrayMut::from_slice(&mut ranks, &[tokens, chosen.slots])?.rows::<f64>();
    threads::for_each(
        ranges,
        serial,
        || (vec![S::Acc::ZERO; experts], vec![0u32; experts]),
        |range, (copy, hits)| {
            let mut best = vec![Vec::new(); experts];
            // NaN lets nothing pass: for experts that need no token.
            let mut bars: Vec<S::Acc> =
                needs.iter().map(|&need| if need == 0 { nan } else { S::Acc::NEG_INFINITY }).collect();
            for token in (range * length).min(tokens)..((range + 1) * length).min(tokens) {
                let row = copied(scores, token, copy);
                if kernels.has_nan(row) {
                    return bad_score.note(token, row);
                }
                let own = rows.take(token);
                for (slot, expert) in chosen.slots_of(token) {
                    own[slot] = weights.map_or(row[expert].f64(), |weights| weights[token * chosen.slots + slot]);
                    row[expert] = nan; // chosen: not a candidate
                }
                if own.iter().any(|rank| rank.is_nan()) {
                    return bad_weight.note(token, own);
                }
                if !filling {
                    continue;
                }
                let count = kernels.at_least_each(row, &bars, hits);
                for &expert in &hits[..count] {
                    let (expert, list) = (expert as usize, &mut best[expert as usize]);
                    list.push((row[expert], token));
                    if list.len() >= 32.max(2 * needs[expert]) {
                        let need = needs[expert];
                        bars[expert] = list.select_nth_unstable_by(need - 1, by_rank).1.0.above();
                        list.truncate(need);
                    }
                }
            }
            *found[range].lock().unwrap_or_else(PoisonError::into_inner) = best;
        },
    )?;
    bad_score.into_result("scores", "expert")?;
    bad_weight.into_result("weights", "slot")?;
    Ok((ranks, found.into_iter().map(|range| range.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()))
}

/// What rounding does to an expert.
enum Change<T> {
    Nothing,
    /// Pairs that it loses.
    Drop(Vec<usize>),
    /// Tokens that it gets.
    Fill(Vec<Candidate<T>>),
}

fn decide<T: Ranked>(
    rounding: &Rounding,
    tokens: usize,
    chosen: &Chosen,
    targets: &[Option<usize>],
    ranks: &[f64],
    candidates: &Candidates<T>,
) -> Result<Vec<Change<T>>> {
    let changes: Vec<OnceLock<Change<T>>> = targets.iter().map(|_| OnceLock::new()).collect();
    // The last `count - keep` of an expert's pairs in its ranking.
    let drop = |expert: usize, keep: usize| {
        let mut pairs = chosen.of(expert).to_vec();
        if keep < pairs.len() {
            let order = |a: &usize, b: &usize| by_rank(&(ranks[*a], *a), &(ranks[*b], *b));
            pairs.select_nth_unstable_by(keep, order);
        }
        pairs.split_off(keep)
    };
    let fill = |expert: usize, need: usize| {
        let mut all: Vec<Candidate<T>> = candidates.iter().flat_map(|range| &range[expert]).copied().collect();
        if need < all.len() {
            all.select_nth_unstable_by(need, by_rank);
        }
        all.truncate(need);
        all
    };
    let decide = |expert: usize| {
        let count = chosen.counts[expert];
        match targets[expert] {
            Some(target) if target == count => Change::Nothing,
            Some(target) if target < count => Change::Drop(drop(expert, target)),
            Some(target) => Change::Fill(fill(expert, target - count)),
            None => {
                debug_assert_eq!(rounding.rule, Rule::NearestScore);
                let Choice { down, up } = rounding.choice(count, tokens);
                let (mut last, mut fills) = (drop(expert, down), fill(expert, up - count));
                // In the order of the ranking, so that the sums have one value.
                last.sort_unstable_by(|a, b| by_rank(&(ranks[*a], *a), &(ranks[*b], *b)));
                fills.sort_unstable_by(by_rank);
                let own: f64 = last.iter().map(|&pair| ranks[pair]).sum();
                let other: f64 = fills.iter().map(|fill| fill.0.f64()).sum();
                // 0 / 0 and the like: a tile without score is not worth keeping.
                if rounding.coin(expert) < own / (own + other) { Change::Fill(fills) } else { Change::Drop(last) }
            }
        }
    };
    threads::for_each(
        targets.len(),
        chosen.routing.count() < 1 << 13,
        || (),
        |expert, ()| {
            let _ = changes[expert].set(decide(expert));
        },
    )?;
    Ok(changes.into_iter().map(|change| change.into_inner().unwrap_or(Change::Nothing)).collect())
}

fn assemble<S: Score>(
    scores: &Matrix<'_, S>,
    chosen: &Chosen,
    ranks: &[f64],
    changes: &[Change<S::Acc>],
    renormalise: bool,
) -> Result<Rounded> {
    const TOKENS: usize = 1024;
    let tokens = scores.rows();
    let mut kept = vec![true; chosen.ids.len()];
    let mut fills: Vec<(usize, usize)> = Vec::new(); // (token, expert)
    for (expert, change) in changes.iter().enumerate() {
        match change {
            Change::Nothing => {}
            Change::Drop(pairs) => pairs.iter().for_each(|&pair| kept[pair] = false),
            Change::Fill(candidates) => fills.extend(candidates.iter().map(|&(_, token)| (token, expert))),
        }
    }
    fills.sort_unstable();
    let parts: Vec<Mutex<Rounded>> = (0..tokens.div_ceil(TOKENS)).map(|_| Mutex::default()).collect();
    threads::for_each(parts.len(), tokens * chosen.slots < 1 << 14, Vec::<(i32, i32, f64)>::new, |part, pairs| {
        let mut rounded = Rounded::default();
        let range = part * TOKENS..tokens.min((part + 1) * TOKENS);
        let mut next = fills.partition_point(|fill| fill.0 < range.start);
        for token in range {
            pairs.clear();
            for (slot, expert) in chosen.slots_of(token) {
                let pair = token * chosen.slots + slot;
                if kept[pair] {
                    pairs.push((expert as i32, slot as i32, ranks[pair]));
                }
            }
            while let Some(&(_, expert)) = fills.get(next).filter(|fill| fill.0 == token) {
                pairs.push((expert as i32, FILL, scores.at(token, expert).widen().f64()));
                next += 1;
            }
            pairs.sort_unstable_by_key(|pair| pair.0);
            let total: f64 = if renormalise { pairs.iter().map(|pair| pair.2).sum() } else { 1.0 };
            for &(expert, slot, pick) in pairs.iter() {
                rounded.expert_ids.push(expert);
                rounded.token_ids.push(token as i32);
                rounded.slots.push(slot);
                rounded.weights.push(if total == 0.0 { 0.0 } else { pick / total });
            }
        }
        *parts[part].lock().unwrap_or_else(PoisonError::into_inner) = rounded;
    })?;
    let mut all = Rounded::default();
    for part in parts {
        let part = part.into_inner().unwrap_or_else(PoisonError::into_inner);
        all.expert_ids.extend(part.expert_ids);
        all.token_ids.extend(part.token_ids);
        all.slots.extend(part.slots);
        all.weights.extend(part.weights);
    }
    Ok(all)
}
