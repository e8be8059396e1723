//! One token per row of a batch, from given laws or from logits, and the record of what it was drawn from.

use super::input::{Results, fill, floating, integers, shaped};
use super::law::{BLOCK, Law, draw, total};
use super::process::{Processor, SERIAL, Sampling};
use super::saguaro::Saguaro;
use crate::arch::laws::Lawful;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::rng::{self, Purpose};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};

/// How far a law's sum may be from 1. Laws are divided by their sum wherever they are used, so this only catches
/// mistakes (logits, or a law cut by top-p and not renormalised); single-precision softmax stays far inside.
pub const NORMALISED: f64 = 1e-4;

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

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.requests.len()
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

    /// Takes these probabilities, times `scale`, off a law's weights.
    pub(super) fn take_from(&self, law: &mut Law, scale: f64) {
        fn take<T: Lawful>(row: Matrix<'_, T>, law: &mut Law, scale: f64) {
            match row.row(0) {
                Some(row) if law.dense => T::laws().subtract(&mut law.weights, row, scale),
                _ if law.dense => (0..row.cols()).for_each(|token| {
                    law.take_off(token, row.at(0, token).widen().f64() * scale);
                }),
                _ => {
                    for (&token, weight) in law.ids.iter().zip(&mut law.weights) {
                        let excess = *weight - row.at(0, token).widen().f64() * scale;
                        *weight = if excess > 0.0 { excess } else { 0.0 };
                    }
                }
            }
        }
        match *self {
            Row::Single(row) => take(row, law, scale),
            Row::Double(row) => take(row, law, scale),
        }
    }

    /// The token at a uniform number, by the sum.
    fn draw(&self, sum: f64, uniform: f64) -> usize {
        fn at<T: Lawful>(row: Matrix<'_, T>, sum: f64, uniform: f64) -> usize {
            match row.row(0) {
                Some(slice) => draw(slice, sum, uniform),
                None => draw(&(0..row.cols()).map(|token| row.at(0, token)).collect::<Vec<_>>(), sum, uniform),
            }
        }
        match *self {
            Row::Single(row) => at(row, sum, uniform),
            Row::Double(row) => at(row, sum, uniform),
        }
    }

    /// The sum, if this is a law; `name` and `at` name it in errors.
    pub(super) fn total(&self, name: &str, at: &[usize]) -> Result<f64> {
        fn sum<T: Lawful>(row: Matrix<'_, T>, sums: &mut Vec<f64>) -> bool {
            match row.row(0) {
                Some(slice) => block_sums(slice, sums),
                None => block_sums(&(0..row.cols()).map(|token| row.at(0, token)).collect::<Vec<_>>(), sums),
            }
        }
        let mut sums = Vec::new();
        let positive = match *self {
            Row::Single(row) => sum(row, &mut sums),
            Row::Double(row) => sum(row, &mut sums),
        };
        lawful(name, at, positive, &sums)
    }
}

/// The sum of each block of weights, in `sums`; whether none is negative.
pub(super) fn block_sums<T: Lawful>(weights: &[T], sums: &mut Vec<f64>) -> bool {
    sums.clear();
    sums.resize(weights.len().div_ceil(BLOCK), 0.0);
    T::laws().block_sums(weights, sums)
}

/// The sum of a row with these block sums, if it is a law.
pub(super) fn lawful(name: &str, at: &[usize], positive: bool, sums: &[f64]) -> Result<f64> {
    let sum = sums.iter().fold(0.0, |all, sum| all + sum);
    if positive && (sum - 1.0).abs() <= NORMALISED {
        return Ok(sum);
    }
    let at: Vec<_> = at.iter().map(usize::to_string).collect();
    let got = if positive { format!("a sum of {sum}") } else { "a negative entry".to_string() };
    let allowed = format!("probabilities >= 0 that add up to 1 within {NORMALISED}");
    Err(Error::value(&format!("{name}[{}]", at.join(", ")), allowed, got)
        .hint("pass the law the token was drawn from, after temperature, top-k and top-p, renormalised"))
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
                    law.draw(sum, uniform)
                }),
            );
        },
    )?;
    fill(tokens, results.collect()?.into_iter().map(|token| token as i64));
    Ok(())
}

/// Where the law of a drafted token is written: `[B, V]` probabilities, or `[B, m]` ids (int32) and probabilities of the
/// m most probable tokens, to which the law is cut.
#[derive(Debug)]
pub enum Record<'a> {
    /// Nowhere.
    None,
    /// All tokens (float32 or float64).
    Dense(ArrayMut<'a>),
    /// Ids and their probabilities (float32 or float64).
    Sparse(ArrayMut<'a>, ArrayMut<'a>),
}

/// Draws one token per row of `logits [B, V]` into `tokens [B]` (int64) and records the law each was drawn from. The law
/// is rounded to the record's type first and the token drawn from the rounded one, so what is recorded is what was
/// sampled. `saguaro`: one rule a row, or none.
///
/// # Errors
/// Wrong ranks, extents or types; NaN or wholly masked rows; a record of no tokens.
pub fn sample_logits(
    logits: &Array<'_>,
    rules: &[Sampling],
    saguaro: &[Saguaro],
    streams: &Streams,
    purpose: Purpose,
    tokens: ArrayMut<'_>,
    record: Record<'_>,
) -> Result<()> {
    floating("logits", logits)?;
    shaped("logits", logits, "[B, V]", &[Some(rules.len()), None])?;
    tokens_out(&tokens, rules.len())?;
    assert!(saguaro.is_empty() || saguaro.len() == rules.len());
    let dtype = match &record {
        Record::None => Dtype::F64,
        Record::Dense(laws) => {
            if laws.shape() != logits.shape() {
                return Err(Error::shape("laws", "the shape of logits, [B, V]", laws.shape()));
            }
            laws.dtype()
        }
        Record::Sparse(ids, laws) => {
            if ids.shape().len() != 2 || ids.shape()[0] != rules.len() || ids.shape()[1] == 0 {
                return Err(Error::shape("ids", format!("[B = {}, m >= 1]", rules.len()), ids.shape()));
            }
            if ids.dtype() != Dtype::I32 {
                return Err(Error::dtype("ids", "int32", ids.dtype()));
            }
            if laws.shape() != ids.shape() {
                return Err(Error::shape("laws", format!("the shape of ids, {:?}", ids.shape()), laws.shape()));
            }
            if i32::try_from(logits.shape()[1]).is_err() {
                return Err(Error::shape("logits", "[B, V] with V < 2^31, for int32 ids", logits.shape()));
            }
            laws.dtype()
        }
    };
    match dtype {
        Dtype::F32 => sample::<f32>(logits, rules, saguaro, streams, purpose, tokens, record),
        Dtype::F64 => sample::<f64>(logits, rules, saguaro, streams, purpose, tokens, record),
        other => Err(Error::dtype("laws", "float32 or float64", other)),
    }
}

fn sample<T: Lawful>(
    logits: &Array<'_>,
    rules: &[Sampling],
    saguaro: &[Saguaro],
    streams: &Streams,
    purpose: Purpose,
    tokens: ArrayMut<'_>,
    record: Record<'_>,
) -> Result<()> {
    let (laws, lists) = match record {
        Record::None => (None, None),
        Record::Dense(laws) => (Some(laws.rows::<T>()), None),
        Record::Sparse(ids, laws) => (None, Some((ids.rows::<i32>(), laws.rows::<T>()))),
    };
    let support = lists.as_ref().map_or(0, |(ids, _)| ids.width());
    let results = Results::new(rules.len());
    let serial = logits.len() < SERIAL;
    threads::for_each(rules.len(), serial, Default::default, |row, (processor, law): &mut (Processor, Law)| {
        let rule = saguaro.get(row).copied().unwrap_or(Saguaro::OFF);
        let result = processor.draft_law(logits, &[row], rules[row], rule, support, law).map(|()| {
            let uniform = streams.uniform(row, 0, purpose);
            if let Some(laws) = &laws {
                let recorded = laws.take(row);
                law.write(recorded);
                return draw(recorded, total(recorded), uniform);
            }
            let Some((ids, laws)) = &lists else { return law.draw(uniform) };
            let (ids, recorded) = (ids.take(row), laws.take(row));
            let count = law.write_sparse(ids, recorded);
            ids[draw(&recorded[..count], total(&recorded[..count]), uniform)] as usize
        });
        results.put(row, result);
    })?;
    fill(tokens, results.collect()?.into_iter().map(|token| token as i64));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
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
                &[],
                &streams,
                Purpose::Draft,
                out,
                Record::Dense(ArrayMut::from_slice(&mut law, &[1, 8]).unwrap()),
            )
            .unwrap();
            let out = ArrayMut::from_slice(&mut redrawn, &[1]).unwrap();
            sample_laws(&Array::from_slice(&law, &[1, 8]).unwrap(), &streams, Purpose::Draft, out).unwrap();
            assert_eq!(drawn, redrawn);
            assert!(law[drawn[0] as usize] > 0.0);
        }
    }
}
