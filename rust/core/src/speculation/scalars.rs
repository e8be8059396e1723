//! Verification in two steps, for a draft and a target that do not share their laws: first the chain is cut by the two
//! probabilities of each drafted token, then the one token that follows is drawn from one law of each side.
//!
//! ```text
//! accept:   q(x_i), p(x_i)  ->  how many are kept          the coins of verify
//! correct:  p, q at that place, or p alone after a whole chain  ->  the token that follows     its draws
//! ```
//! The tokens are those of [`verify`](super::verify::verify()), draw for draw.

use super::input::{Results, fill, floating, integers, lengths_of, shaped};
use super::law::{BLOCK, Law, draw, draw_block, draw_within, total};
use super::process::{Processor, SERIAL, Sampling};
use super::proposal::{Kind, Proposal, Proposals, acceptance, residual};
use super::sample::{Row, Streams, block_sums, lawful, laws_dtype, tokens_out};
use crate::arch::laws::Lawful;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::rng::Purpose;
use crate::threads;
use crate::view::{Array, ArrayMut};

/// A probability of each drafted token.
fn probabilities(name: &str, array: &Array<'_>, row: usize, i: usize, least: f64) -> Result<f64> {
    let value = match array.dtype() {
        Dtype::F32 => f64::from(array.get::<f32>(&[row, i])),
        _ => array.get::<f64>(&[row, i]),
    };
    // One unit of single precision above 1 is a rounded 1.
    if value >= least && value <= 1.0 + f64::from(f32::EPSILON) {
        return Ok(value);
    }
    let allowed = if least > 0.0 { "a probability in (0, 1]" } else { "a probability in [0, 1]" };
    Err(Error::value(&format!("{name}[{row}, {i}]"), allowed, value))
}

/// How many drafted tokens of each row are kept: `draft [B, K]` holds q(x_i) (point masses: 1), `target [B, K]` p(x_i),
/// both float32 or float64; what lies beyond `lengths [B]` is not read. `accepted [B]`: int32.
///
/// # Errors
/// Wrong ranks, extents or types; numbers that are no probabilities, and a q of 0: what cannot be drawn was not drafted.
pub fn accept(
    draft: &Array<'_>,
    target: &Array<'_>,
    lengths: Option<&Array<'_>>,
    streams: &Streams,
    accepted: ArrayMut<'_>,
) -> Result<()> {
    let rows = streams.rows();
    for (name, array) in [("draft_probabilities", draft), ("target_probabilities", target)] {
        laws_dtype(name, array)?;
        shaped(name, array, &format!("[B = {rows}, K]"), &[Some(rows), None])?;
    }
    let depth = draft.shape()[1];
    shaped("target_probabilities", target, "the shape of draft_probabilities", &[Some(rows), Some(depth)])?;
    if accepted.shape() != [rows] || accepted.dtype() != Dtype::I32 {
        return Err(Error::shape("accepted", format!("[{rows}] of int32"), accepted.shape()));
    }
    let lengths = lengths_of(lengths, rows, depth)?;
    let mut kept = Vec::with_capacity(rows);
    for (row, &length) in lengths.iter().enumerate() {
        let mut count = None;
        for i in 0..length {
            let q = probabilities("draft_probabilities", draft, row, i, f64::MIN_POSITIVE * f64::EPSILON)?;
            let p = probabilities("target_probabilities", target, row, i, 0.0)?;
            if count.is_none() && streams.uniform(row, i, Purpose::Accept) >= acceptance(p, q) {
                count = Some(i); // the rest is checked, not decided
            }
        }
        kept.push(count.unwrap_or(length) as i32);
    }
    fill(accepted, kept.into_iter());
    Ok(())
}

/// The target's side of a correction, one law a row.
#[derive(Debug)]
pub enum Laws<'a> {
    /// `[B, V]`, float32 or float64.
    Probabilities(Array<'a>),
    /// `[B, V]`, any floating type, and a rule for each row.
    Logits(Array<'a>, Vec<Sampling>),
}

#[derive(Debug, Default)]
struct Scratch {
    processor: Processor,
    target: Law,
    residual: Law,
    sums: Vec<f64>,
    block: Vec<f64>,
}

/// The token that follows the accepted ones, for each row: from max(p - q, 0) where drafted token `refused[b]` was
/// refused, from p where the whole chain was kept (`refused[b] = -1`). `laws`: of the drafted token at that place, one a
/// row, `[B, V]` or lists `[B, m]`. `accepted [B]` gives the place, counted from the streams' positions.
///
/// # Errors
/// Wrong ranks, extents or types; rows that are not laws; ids out of range.
pub fn correct(
    target: &Laws<'_>,
    accepted: &Array<'_>,
    refused: &Array<'_>,
    laws: &Proposals<'_>,
    streams: &Streams,
    tokens: ArrayMut<'_>,
) -> Result<()> {
    let rows = streams.rows();
    let array = match target {
        Laws::Probabilities(array) => {
            laws_dtype("target", array)?;
            array
        }
        Laws::Logits(array, rules) => {
            floating("target", array)?;
            assert_eq!(rules.len(), rows, "a rule for each row");
            array
        }
    };
    shaped("target", array, &format!("[B = {rows}, V >= 1]"), &[Some(rows), None])?;
    let vocabulary = array.shape()[1];
    if vocabulary == 0 && rows > 0 {
        return Err(Error::shape("target", "[B, V >= 1]", array.shape()));
    }
    match laws {
        Proposals::Points => {}
        Proposals::Dense(laws) => {
            laws_dtype("draft_laws", laws)?;
            let axes = format!("[B = {rows}, V = {vocabulary}], the vocabulary of the target");
            shaped("draft_laws", laws, &axes, &[Some(rows), Some(vocabulary)])?;
        }
        Proposals::Sparse(laws) => laws.shaped(&[rows])?,
    }
    tokens_out(&tokens, rows)?;
    let accepted = integers("accepted", accepted, rows)?;
    let refused = integers("refused", refused, rows)?;
    let results = Results::new(rows);
    threads::for_each(rows, array.len() < SERIAL, Scratch::default, |row, scratch| {
        let mut work = || {
            let place = usize::try_from(accepted[row])
                .map_err(|_| Error::value(&format!("accepted[{row}]"), "an integer >= 0", accepted[row]))?;
            let refused = match refused[row] {
                -1 => None,
                id => Some(usize::try_from(id).ok().filter(|id| *id < vocabulary).ok_or_else(|| {
                    let allowed = format!("a token id in [0, V = {vocabulary}), or -1 for none");
                    Error::value(&format!("refused[{row}]"), allowed, id)
                })?),
            };
            let purpose = if refused.is_some() { Purpose::Residual } else { Purpose::Target };
            let uniform = streams.uniform(row, place, purpose);
            let proposal = refused.map(|token| laws.at(&[row], token, vocabulary, true)).transpose()?;
            match target {
                Laws::Logits(logits, rules) => {
                    scratch.processor.law(logits, &[row], rules[row], &mut scratch.target)?;
                    let Some(proposal) = proposal else { return Ok(scratch.target.draw(uniform)) };
                    residual(&scratch.target, &proposal, &mut scratch.residual);
                    Ok(scratch.residual.draw(uniform))
                }
                Laws::Probabilities(array) => match array.dtype() {
                    Dtype::F32 => from_row::<f32>(array, row, proposal.as_ref(), uniform, scratch),
                    _ => from_row::<f64>(array, row, proposal.as_ref(), uniform, scratch),
                },
            }
        };
        results.put(row, work());
    })?;
    fill(tokens, results.collect()?.into_iter().map(|token| token as i64));
    Ok(())
}

/// What [`Law`] does with a row of probabilities, without making a copy of it: the sums of its blocks are enough to find
/// the block that a draw falls into, and a refused token changes only the blocks that its law has tokens in.
fn from_row<T: Lawful>(
    array: &Array<'_>,
    row: usize,
    proposal: Option<&Proposal<'_>>,
    uniform: f64,
    scratch: &mut Scratch,
) -> Result<usize> {
    let view = array.vector::<T>(&[row]);
    let copied: Vec<T>;
    let p = match view.row(0) {
        Some(slice) => slice,
        None => {
            copied = (0..view.cols()).map(|token| view.at(0, token)).collect();
            &copied
        }
    };
    let sums = &mut scratch.sums;
    let positive = block_sums(p, sums);
    let all = lawful("target", &[row], positive, sums)?;
    let Some(q) = proposal else { return Ok(draw(p, all, uniform)) };

    let at = |token: usize| p[token].widen().f64();
    let block = &mut scratch.block;
    let whole = |index: usize, block: &mut Vec<f64>| {
        block.clear();
        block.extend(p[index * BLOCK..p.len().min((index + 1) * BLOCK)].iter().map(|weight| weight.widen().f64()));
        lessen(q, all, index * BLOCK, block);
        if at(q.token) / all < q.probability(q.token) && q.token / BLOCK == index {
            block[q.token % BLOCK] = 0.0;
        }
    };
    let mut touched: Vec<usize> = match &q.kind {
        Kind::Point => vec![q.token / BLOCK],
        Kind::List(list) => list.iter().map(|(token, _)| token / BLOCK).chain([q.token / BLOCK]).collect(),
        Kind::Row(..) => (0..sums.len()).collect(),
    };
    touched.sort_unstable();
    touched.dedup();
    for index in touched {
        whole(index, block);
        sums[index] = total(block);
    }
    let left = sums.iter().fold(0.0, |all, sum| all + sum);
    if left <= 0.0 {
        return Ok(draw(p, all, uniform));
    }
    let target = uniform * left;
    let (index, before) = draw_block(sums.iter().copied(), target);
    whole(index, block);
    Ok(index * BLOCK + draw_within(block.iter().copied(), before, target))
}

/// Takes q, on the scale of weights that add up to `all`, off a block of them that starts at token `first`.
fn lessen(q: &Proposal<'_>, all: f64, first: usize, block: &mut [f64]) {
    let take = |block: &mut [f64], token: usize, weight: f64| {
        if (first..first + block.len()).contains(&token) {
            let excess = block[token - first] - weight;
            block[token - first] = if excess > 0.0 { excess } else { 0.0 };
        }
    };
    match &q.kind {
        Kind::Point => take(block, q.token, all),
        Kind::List(list) => {
            let scale = all / list.total();
            list.iter().for_each(|(token, weight)| take(block, token, weight * scale));
        }
        Kind::Row(row, sum) => {
            let (scale, range) = (all / sum, first..first + block.len());
            match row {
                Row::Single(row) => match row.row(0) {
                    Some(row) => f32::laws().subtract(block, &row[range], scale),
                    None => range.for_each(|token| take(block, token, f64::from(row.at(0, token)) * scale)),
                },
                Row::Double(row) => match row.row(0) {
                    Some(row) => f64::laws().subtract(block, &row[range], scale),
                    None => range.for_each(|token| take(block, token, row.at(0, token) * scale)),
                },
            }
        }
    }
}
