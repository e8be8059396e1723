//! Coupled sampling: target and draft read the same random numbers, so equal laws give equal tokens.
//!
//! Every token x of every position n of a request has a number E(n, x), exponentially distributed with mean 1. The
//! token drawn from a law w is the winner of a race: the x with the least E(n, x) / w(x), which is x with probability
//! w(x) / sum(w) (independent exponential clocks; the same draw as the Gumbel-max trick). Target and draft race over
//! the same E. So
//!
//! * the output *is* that of plain sampling, token for token, whatever was drafted: a draft can only be equal or not.
//!   No law of the draft is compared, so none has to be sent;
//! * tokens that a draft gives about the target's probability win in both races: the probability that two laws p and q
//!   draw the same token is at least (1 - d) / (1 + d), d their total variation (maximal coupling: 1 - d);
//! * the draft's *second* in the race is the best guess of what the target draws where it refuses the first. At
//!   temperature 0 the race is the order of the logits.
//!
//! Numbers: the block (position, request, Race) of the run's seed is the key, and the token the counter.
//!
//! ```text
//! for each row:  w = law(logits);  for x in support:  r(x) = E(n, x) / w(x);  the `count` least r, in order
//! ```
//! Departure 1: E(n, .) is kept for the positions last used; the branches of a build race at few positions.

use super::input::{Results, floating, shaped, widen};
use super::law::Law;
use super::process::{Processor, SERIAL, Sampling};
use super::sample::Streams;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rng::{Purpose, philox4x32};
use crate::threads;
use crate::view::{Array, ArrayMut};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Numbers kept for later rows: positions times vocabulary.
const KEPT: usize = 1 << 22;

/// ln 2 in two parts, as in `exponential`.
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// -ln(u) for normal u > 0, in plain operations, so with the same bits on every instruction set.
///
/// u = m 2^e with m in [1/sqrt 2, sqrt 2); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 0.172: eleven terms.
#[inline(always)]
fn minus_log(u: f64) -> f64 {
    let bits = u.to_bits();
    // Moves the cut between exponents from 1 to 1 / sqrt 2.
    let shifted = bits.wrapping_sub(std::f64::consts::FRAC_1_SQRT_2.to_bits());
    let exponent = (shifted as i64) >> 52;
    let m = f64::from_bits(bits.wrapping_sub((exponent as u64) << 52));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut sum = 1.0 / 21.0;
    let mut k = 19.0;
    while k >= 1.0 {
        sum = sum * square + 1.0 / k;
        k -= 2.0;
    }
    let e = exponent as f64;
    -(e * LN2_HIGH + (2.0 * s * sum + e * LN2_LOW))
}

/// E(position, x) for all x.
fn clocks(seed: u64, request: u32, position: u64, vocabulary: usize) -> Vec<f64> {
    let name = [position as u32, (position >> 32) as u32, request, Purpose::Race as u32];
    let [key0, key1, ..] = philox4x32(name, [seed as u32, (seed >> 32) as u32]);
    let number = |high: u32, low: u32| {
        let bits = (u64::from(high) << 21) ^ (u64::from(low) >> 11);
        minus_log((bits as f64 + 0.5) * (1.0 / (1u64 << 53) as f64))
    };
    let mut out = Vec::with_capacity(vocabulary + 1);
    for pair in 0..vocabulary.div_ceil(2) as u64 {
        let [a, b, c, d] = philox4x32([pair as u32, (pair >> 32) as u32, 0, 0], [key0, key1]);
        out.extend([number(a, b), number(c, d)]);
    }
    out.truncate(vocabulary);
    out
}

#[derive(Debug, Default)]
struct Kept {
    clocks: HashMap<(u32, u64), Arc<Vec<f64>>>,
    order: VecDeque<(u32, u64)>,
}

/// The random numbers of a run, and the races over them.
#[derive(Debug)]
pub struct Races {
    seed: u64,
    vocabulary: usize,
    kept: Mutex<Kept>,
}

impl Races {
    /// Races of a run over laws of `vocabulary` tokens.
    ///
    /// # Errors
    /// A vocabulary of 0.
    pub fn new(seed: u64, vocabulary: usize) -> Result<Self> {
        if vocabulary == 0 {
            return Err(Error::value("vocabulary", "at least 1 token", vocabulary));
        }
        Ok(Self { seed, vocabulary, kept: Mutex::default() })
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    fn at(&self, request: u32, position: u64) -> Arc<Vec<f64>> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let name = (request, position);
        if let Some(found) = lock().clocks.get(&name) {
            return found.clone();
        }
        let made = Arc::new(clocks(self.seed, request, position, self.vocabulary));
        let mut kept = lock();
        if kept.clocks.insert(name, made.clone()).is_none() {
            kept.order.push_back(name);
            while kept.order.len() > 1 && kept.order.len() * self.vocabulary > KEPT {
                if let Some(oldest) = kept.order.pop_front() {
                    kept.clocks.remove(&oldest);
                }
            }
        }
        made
    }

    /// The first `count` of each row's race: `logits [B, V]` to `out [B, count]` (int64); -1 where a law has fewer.
    /// Column 0 is the token drawn. Rows at temperature 0 rank by their logits (ties: the lower id).
    ///
    /// `scores [B, count]` (float64), where asked for, says how far ahead: -ln of the time in the race, the logit at
    /// temperature 0, -inf where there is no token.
    ///
    /// # Errors
    /// Wrong ranks, extents or types; NaN or wholly masked rows.
    pub fn rank(
        &self,
        logits: &Array<'_>,
        rules: &[Sampling],
        streams: &Streams,
        out: ArrayMut<'_>,
        scores: Option<ArrayMut<'_>>,
    ) -> Result<()> {
        let rows = rules.len();
        floating("logits", logits)?;
        let axes = format!("[B = {rows}, V = {}], the vocabulary of these races", self.vocabulary);
        shaped("logits", logits, &axes, &[Some(rows), Some(self.vocabulary)])?;
        if out.shape().len() != 2 || out.shape()[0] != rows {
            return Err(Error::shape("out", format!("[B = {rows}, count]"), out.shape()));
        }
        if out.dtype() != Dtype::I64 {
            return Err(Error::dtype("out", "int64", out.dtype()));
        }
        let count = out.shape()[1];
        if let Some(scores) = &scores {
            if scores.shape() != [rows, count] {
                return Err(Error::shape("scores", format!("[B = {rows}, count = {count}]"), scores.shape()));
            }
            if scores.dtype() != Dtype::F64 {
                return Err(Error::dtype("scores", "float64", scores.dtype()));
            }
        }
        let (out, results) = (out.rows::<i64>(), Results::new(rows));
        let scores = scores.map(|scores| scores.rows::<f64>());
        threads::for_each(rows, logits.len() < SERIAL, Default::default, |row, scratch: &mut Scratch| {
            let done = self.race(logits, row, rules[row], streams, count, scratch);
            results.put(
                row,
                done.map(|()| {
                    let out = out.take(row);
                    out.fill(-1);
                    for (slot, &(_, token)) in out.iter_mut().zip(&scratch.order) {
                        *slot = token as i64;
                    }
                    if let Some(scores) = &scores {
                        let scores = scores.take(row);
                        scores.fill(f64::NEG_INFINITY);
                        for (slot, &(value, _)) in scores.iter_mut().zip(&scratch.order) {
                            *slot = if rules[row].is_greedy() { -value } else { minus_log(value) };
                        }
                    }
                }),
            );
        })?;
        results.collect().map(|_: Vec<()>| ())
    }

    /// `scratch.order` becomes the first `count` of a row's race.
    fn race(
        &self,
        logits: &Array<'_>,
        row: usize,
        rule: Sampling,
        streams: &Streams,
        count: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { processor, law, order, z } = scratch;
        order.clear();
        if rule.is_greedy() {
            processor.check(logits, &[row])?;
            widen(logits, &[row], z);
            // The best first; those at -inf never.
            for (token, &logit) in z.iter().enumerate() {
                first(order, count, -logit, token, logit > f64::NEG_INFINITY);
            }
            return Ok(());
        }
        processor.law(logits, &[row], rule, law)?;
        let (request, position) = streams.at(row);
        let clocks = self.at(request, position);
        law.each(|token, weight| first(order, count, clocks[token] / weight, token, weight > 0.0));
        Ok(())
    }
}

/// Keeps the `count` least values, in order; of equal ones the lower id, which comes first.
#[inline(always)]
fn first(order: &mut Vec<(f64, usize)>, count: usize, value: f64, token: usize, runs: bool) {
    let full = order.len() == count;
    if !runs || (full && order.last().is_none_or(|&(last, _)| value >= last)) {
        return;
    }
    if full {
        order.pop();
    }
    let place = order.partition_point(|&(other, _)| other <= value);
    order.insert(place, (value, token));
}

#[derive(Debug, Default)]
struct Scratch {
    processor: Processor,
    law: Law,
    order: Vec<(f64, usize)>,
    z: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_those_of_the_library() {
        let mut u = 1e-17;
        while u < 1.0 {
            let (got, want) = (minus_log(u), -f64::ln(u));
            assert!((got - want).abs() <= 4e-16 * want.abs().max(1e-3), "{u}: {got} {want}");
            u *= 1.000_37;
        }
        for u in [
            0.5,
            0.25,
            1.0 - f64::EPSILON / 2.0,
            std::f64::consts::FRAC_1_SQRT_2,
            std::f64::consts::FRAC_1_SQRT_2.next_up(),
        ] {
            assert!((minus_log(u) + f64::ln(u)).abs() <= 1e-16 + 4e-16 * f64::ln(u).abs(), "{u}");
        }
    }

    #[test]
    fn clocks_are_exponential_and_named_by_their_use() {
        let all: Vec<f64> = (0..200).flat_map(|position| clocks(3, 1, position, 101)).collect();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let beyond = all.iter().filter(|&&e| e > 2.0).count() as f64 / n;
        assert!((mean - 1.0).abs() < 4.0 / n.sqrt(), "{mean}");
        let want = (-2.0f64).exp();
        assert!((beyond - want).abs() < 4.0 * (want / n).sqrt(), "{beyond}");
        assert!(all.iter().all(|e| *e > 0.0 && e.is_finite()));
        assert_ne!(clocks(3, 1, 0, 4), clocks(3, 1, 1, 4));
        assert_ne!(clocks(3, 1, 0, 4), clocks(3, 2, 0, 4));
        assert_ne!(clocks(3, 1, 0, 4), clocks(4, 1, 0, 4));
        assert_eq!(clocks(3, 1, 0, 4), clocks(3, 1, 0, 5)[..4]); // a larger vocabulary only adds
    }

    #[test]
    fn the_least_are_kept_in_order() {
        let mut order = Vec::new();
        for (token, value) in [3.0, 1.0, 2.0, 1.0, 0.5, 9.0].into_iter().enumerate() {
            first(&mut order, 3, value, token, value != 0.5);
        }
        assert_eq!(order.iter().map(|&(_, token)| token).collect::<Vec<_>>(), [1, 3, 2]);
        let mut none = Vec::new();
        first(&mut none, 0, 1.0, 7, true);
        assert!(none.is_empty());
    }
}
