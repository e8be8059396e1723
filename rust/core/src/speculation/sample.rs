//! One token from a law and a uniform number: the inverse of the cumulative distribution.

use super::input::{Results, fill, floating, integers, shaped};
use super::process::{Law, Processor, SERIAL, Sampling, total};
use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::rng::{self, Purpose};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};

/// How far a law's sum may be from 1. Laws are divided by their sum wherever they are used, so this only catches
/// mistakes (logits, or a law cut by top-p and not renormalised); single-precision softmax stays far inside.
pub const NORMALISED: f64 = 1e-4;

/// The index at `uniform` in [0, 1): the first whose cumulative weight exceeds `uniform * total`.
///
/// Never an index of weight zero: those do not move the cumulative weight, and where rounding leaves it short of the
/// product at the end, the last index with a positive weight is taken. There must be one.
pub fn draw(weights: impl Iterator<Item = f64>, total: f64, uniform: f64) -> usize {
    let target = uniform * total;
    let (mut cumulative, mut last) = (0.0, 0);
    for (index, weight) in weights.enumerate() {
        if weight > 0.0 {
            cumulative += weight;
            last = index;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

/// Where a batch's random numbers come from: one stream per row, named by its request.
#[derive(Debug, Clone)]
pub struct Streams {
    seed: u64,
    requests: Vec<u32>,
    positions: Vec<u64>,
}

impl Streams {
    /// Checked streams: `requests` and `positions` `[rows]`, integers.
    ///
    /// # Errors
    /// Wrong shapes or types; requests outside [0, 2^32), negative positions.
    pub fn new(seed: u64, requests: &Array<'_>, positions: &Array<'_>, rows: usize) -> Result<Self> {
        let row_of = |name: &str, row: usize| format!("{name}[{row}]");
        let requests = integers("requests", requests, rows)?.into_iter().enumerate().map(|(row, request)| {
            u32::try_from(request)
                .map_err(|_| Error::value(&row_of("requests", row), "an integer in [0, 2^32)", request))
        });
        let positions = integers("positions", positions, rows)?.into_iter().enumerate().map(|(row, position)| {
            u64::try_from(position).map_err(|_| {
                Error::value(&row_of("positions", row), "an integer >= 0", position)
                    .hint("count tokens from the start of the request")
            })
        });
        Ok(Self { seed, requests: requests.collect::<Result<_>>()?, positions: positions.collect::<Result<_>>()? })
    }

    /// The name of a row's stream, and its position.
    pub(super) fn at(&self, row: usize) -> (u32, u64) {
        (self.requests[row], self.positions[row])
    }

    /// The number of a row, `offset` tokens after its position.
    pub fn uniform(&self, row: usize, offset: usize, purpose: Purpose) -> f64 {
        rng::uniform(self.seed, self.requests[row], self.positions[row] + offset as u64, purpose)
    }
}

/// A row of a law as it was passed, and its checked sum.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    Single(Matrix<'a, f32>),
    Double(Matrix<'a, f64>),
}

impl<'a> Row<'a> {
    /// The last axis of a law at `lead`.
    pub(super) fn new(laws: &Array<'a>, lead: &[usize]) -> Self {
        match laws.dtype() {
            Dtype::F32 => Row::Single(laws.vector(lead)),
            _ => Row::Double(laws.vector(lead)),
        }
    }

    pub(super) fn get(&self, token: usize) -> f64 {
        match self {
            Row::Single(row) => f64::from(row.at(0, token)),
            Row::Double(row) => row.at(0, token),
        }
    }

    /// The sum, if this is a law; `name` and `at` name it in errors.
    pub(super) fn total(&self, name: &str, at: &[usize]) -> Result<f64> {
        fn sum<T: Float>(row: Matrix<'_, T>) -> (f64, bool) {
            let scan =
                |slice: &[T]| (total(slice), slice.iter().fold(false, |any, value| any | (value.widen().f64() < 0.0)));
            match row.row(0) {
                Some(slice) => scan(slice),
                None => scan(&(0..row.cols()).map(|token| row.at(0, token)).collect::<Vec<_>>()),
            }
        }
        let (sum, negative) = match *self {
            Row::Single(row) => sum(row),
            Row::Double(row) => sum(row),
        };
        if !negative && (sum - 1.0).abs() <= NORMALISED {
            return Ok(sum);
        }
        let at: Vec<_> = at.iter().map(usize::to_string).collect();
        let got = if negative { "a negative entry".to_string() } else { format!("a sum of {sum}") };
        let allowed = format!("probabilities >= 0 that add up to 1 within {NORMALISED}");
        Err(Error::value(&format!("{name}[{}]", at.join(", ")), allowed, got)
            .hint("pass the law the token was drawn from, after temperature, top-k and top-p, renormalised"))
    }
}

/// Refuses laws that are not single or double precision: in less, a law is no longer what was sampled.
pub(super) fn laws_dtype(name: &str, laws: &Array<'_>) -> Result<()> {
    match laws.dtype() {
        Dtype::F32 | Dtype::F64 => Ok(()),
        other => Err(Error::dtype(name, "float32 or float64", other)),
    }
}

pub(super) fn tokens_out(out: &ArrayMut<'_>, rows: usize) -> Result<()> {
    if out.shape() != [rows] {
        return Err(Error::shape("out", format!("[{rows}]"), out.shape()));
    }
    if out.dtype() != Dtype::I64 {
        return Err(Error::dtype("out", "int64", out.dtype()));
    }
    Ok(())
}

/// Draws one token per row of `laws [B, V]` into `tokens [B]` (int64).
///
/// # Errors
/// Wrong ranks, extents or types; rows that are not laws.
pub fn sample_laws(laws: &Array<'_>, streams: &Streams, purpose: Purpose, tokens: ArrayMut<'_>) -> Result<()> {
    let rows = streams.requests.len();
    laws_dtype("probabilities", laws)?;
    shaped("probabilities", laws, "[B, V]", &[Some(rows), None])?;
    tokens_out(&tokens, rows)?;
    let results = Results::new(rows);
    threads::for_each(
        rows,
        laws.len() < SERIAL,
        || (),
        |row, ()| {
            let law = Row::new(laws, &[row]);
            results.put(
                row,
                law.total("probabilities", &[row]).map(|sum| {
                    let uniform = streams.uniform(row, 0, purpose);
                    draw((0..laws.shape()[1]).map(|token| law.get(token)), sum, uniform)
                }),
            );
        },
    )?;
    fill(tokens, results.collect()?.into_iter().map(|token| token as i64));
    Ok(())
}

/// Draws one token per row of `logits [B, V]` into `tokens [B]` (int64); with `laws [B, V]` (float32 or float64) also
/// writes the law each was drawn from. Then the law is rounded first and the token drawn from the rounded one, so what
/// is recorded is what was sampled.
///
/// # Errors
/// Wrong ranks, extents or types; NaN or wholly masked rows.
pub fn sample_logits(
    logits: &Array<'_>,
    rules: &[Sampling],
    streams: &Streams,
    purpose: Purpose,
    tokens: ArrayMut<'_>,
    laws: Option<ArrayMut<'_>>,
) -> Result<()> {
    floating("logits", logits)?;
    shaped("logits", logits, "[B, V]", &[Some(rules.len()), None])?;
    tokens_out(&tokens, rules.len())?;
    match laws {
        None => sample::<f64>(logits, rules, streams, purpose, tokens, None),
        Some(laws) if laws.shape() != logits.shape() => {
            Err(Error::shape("laws", "the shape of logits, [B, V]", laws.shape()))
        }
        Some(laws) => match laws.dtype() {
            Dtype::F32 => sample::<f32>(logits, rules, streams, purpose, tokens, Some(laws)),
            Dtype::F64 => sample::<f64>(logits, rules, streams, purpose, tokens, Some(laws)),
            other => Err(Error::dtype("laws", "float32 or float64", other)),
        },
    }
}

fn sample<T: Float>(
    logits: &Array<'_>,
    rules: &[Sampling],
    streams: &Streams,
    purpose: Purpose,
    tokens: ArrayMut<'_>,
    laws: Option<ArrayMut<'_>>,
) -> Result<()> {
    let laws = laws.map(ArrayMut::rows::<T>);
    let results = Results::new(rules.len());
    let serial = logits.len() < SERIAL;
    threads::for_each(rules.len(), serial, Default::default, |row, (processor, law): &mut (Processor, Law)| {
        let result = processor.law(logits, &[row], rules[row], law).map(|()| {
            let uniform = streams.uniform(row, 0, purpose);
            let Some(laws) = &laws else { return law.draw(uniform) };
            let recorded = laws.take(row);
            law.write(recorded);
            draw(recorded.iter().map(|weight| weight.widen().f64()), total(recorded), uniform)
        });
        results.put(row, result);
    })?;
    fill(tokens, results.collect()?.into_iter().map(|token| token as i64));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The largest number `uniform` returns.
    const LAST: f64 = 1.0 - 1.0 / (1u64 << 53) as f64;

    fn at(weights: &[f64], uniform: f64) -> usize {
        draw(weights.iter().copied(), total(weights), uniform)
    }

    #[test]
    fn edges_of_the_cumulative_distribution() {
        let law = [0.0, 0.25, 0.0, 0.5, 0.25, 0.0];
        assert_eq!([0.0, 0.249, 0.25, 0.749, 0.75, LAST].map(|u| at(&law, u)), [1, 1, 3, 3, 4, 4]);
        // A total that rounding left too large must not lead to a token of probability zero.
        assert_eq!(draw([0.3, 0.7, 0.0].into_iter(), 1.0 + 1e-9, LAST), 1);
    }

    proptest! {
        #[test]
        fn no_token_of_probability_zero(weights in prop::collection::vec(prop_oneof![Just(0.0), 1e-300f64..1e-290, 0.0f64..1.0], 1..50), u in 0.0f64..1.0) {
            prop_assume!(weights.iter().any(|&w| w > 0.0));
            for u in [u, 0.0, LAST] {
                prop_assert!(weights[at(&weights, u)] > 0.0);
            }
        }
    }

    #[test]
    fn what_is_recorded_is_what_was_drawn() {
        let logits = [0.1f32, 0.2, 0.3, -0.4, 0.0, 1.0, 2.0, f32::NEG_INFINITY];
        let logits = Array::from_slice(&logits, &[1, 8]).unwrap();
        let rules = [Sampling::new(0, 0.8, 0, 0.95).unwrap()];
        for position in 0..200 {
            let (request, position) = ([3i64], [position as i64]);
            let streams = Streams::new(
                7,
                &Array::from_slice(&request, &[1]).unwrap(),
                &Array::from_slice(&position, &[1]).unwrap(),
                1,
            )
            .unwrap();
            let (mut drawn, mut redrawn, mut law) = ([-1i64], [-1i64], [f32::NAN; 8]);
            let out = ArrayMut::from_slice(&mut drawn, &[1]).unwrap();
            sample_logits(
                &logits,
                &rules,
                &streams,
                Purpose::Draft,
                out,
                Some(ArrayMut::from_slice(&mut law, &[1, 8]).unwrap()),
            )
            .unwrap();
            let out = ArrayMut::from_slice(&mut redrawn, &[1]).unwrap();
            sample_laws(&Array::from_slice(&law, &[1, 8]).unwrap(), &streams, Purpose::Draft, out).unwrap();
            assert_eq!(drawn, redrawn);
            assert!(law[drawn[0] as usize] > 0.0);
        }
    }
}
