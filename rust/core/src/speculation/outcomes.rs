//! What the draft expects: its most probable tokens at a place, in order, and where a token stands in that order.
//!
//! The order is that of falling logits, ties by rising id. A drafted token that is refused is not what replaces it, so
//! after fewer accepted tokens than were drafted, that one is left out (at the end of a chain none is).

use super::input::{Results, fill, floating, integers, logit, shaped, widen};
use super::process::SERIAL;
use super::select::{candidates, kth_largest, reach};
use crate::arch::laws::Lawful;
use crate::arch::ranking::Ranked;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut};

fn excluded(name: &str, exclude: Option<&Array<'_>>, rows: usize, vocabulary: usize) -> Result<Vec<Option<usize>>> {
    let Some(exclude) = exclude else { return Ok(vec![None; rows]) };
    let checked = |(row, id): (usize, i64)| match usize::try_from(id) {
        Ok(token) if token < vocabulary => Ok(Some(token)),
        Err(_) if id == -1 => Ok(None),
        _ => {
            let allowed = format!("a token id in [0, V = {vocabulary}), or -1 for none");
            Err(Error::value(&format!("{name}[{row}]"), allowed, id))
        }
    };
    integers(name, exclude, rows)?.into_iter().enumerate().map(checked).collect()
}

fn without_nan(z: &[f64], row: usize) -> Result<()> {
    match z.iter().position(|value| value.is_nan()) {
        None => Ok(()),
        Some(token) => Err(Error::value(&format!("logits[{row}]"), "numbers", format!("NaN at token {token}"))
            .hint("-inf masks a token")),
    }
}

#[derive(Default)]
struct Scratch {
    z: Vec<f64>,
    buffer: Vec<f64>,
    best: Vec<(f64, usize)>,
    found: Vec<u32>,
    singles: Vec<f32>,
    doubles: Vec<f64>,
}

/// Puts a few tokens into `best`, among them the `count` + 1 first (one may be left out later); false: too many are
/// wanted, or the row is not contiguous.
fn list<T: Lawful + Ranked>(
    row: Option<&[T]>,
    index: usize,
    count: usize,
    found: &mut Vec<u32>,
    tops: &mut Vec<T>,
    best: &mut Vec<(f64, usize)>,
) -> Result<bool> {
    let Some(row) = row.filter(|row| count > 0 && count < reach::<T>().min(row.len())) else { return Ok(false) };
    if !T::laws().largest(row).1 {
        without_nan(&row.iter().map(|value| value.f64()).collect::<Vec<_>>(), index)?;
    }
    let passed = candidates(row, count + 1, found, tops);
    best.extend(found[..passed].iter().map(|token| (row[*token as usize].f64() + 0.0, *token as usize)));
    Ok(true)
}

/// The `counts[b]` first tokens of each row of `logits [B, V]`, without `exclude[b]` (-1: none), into the rows of
/// `ids [B, W]` (int32); -1 in what is left of a row. Masked tokens (-inf) are never among them.
///
/// # Errors
/// Wrong ranks, extents or types; NaN; counts outside [0, W].
pub fn predict(logits: &Array<'_>, exclude: Option<&Array<'_>>, counts: &Array<'_>, ids: ArrayMut<'_>) -> Result<()> {
    floating("logits", logits)?;
    shaped("logits", logits, "[B, V]", &[None, None])?;
    let [rows, vocabulary] = [logits.shape()[0], logits.shape()[1]];
    if ids.shape().len() != 2 || ids.shape()[0] != rows {
        return Err(Error::shape("ids", format!("[B = {rows}, W]"), ids.shape()));
    }
    if ids.dtype() != Dtype::I32 || i32::try_from(vocabulary).is_err() {
        return Err(Error::dtype("ids", "int32, for a vocabulary below 2^31", ids.dtype()));
    }
    let width = ids.shape()[1];
    let exclude = excluded("exclude", exclude, rows, vocabulary)?;
    let counts = integers("counts", counts, rows)?;
    if width == 0 || rows == 0 {
        return Ok(());
    }
    let ids = ids.rows::<i32>();
    let results = Results::new(rows);
    threads::for_each(rows, logits.len() < SERIAL, Scratch::default, |row, scratch| {
        let mut work = || {
            let out = ids.take(row);
            out.fill(-1);
            let count = usize::try_from(counts[row]).ok().filter(|count| *count <= width).ok_or_else(|| {
                Error::value(&format!("counts[{row}]"), format!("an integer in [0, W = {width}]"), counts[row])
            })?;
            let Scratch { z, buffer, best, found, singles, doubles } = scratch;
            best.clear();
            let listed = match logits.dtype() {
                Dtype::F32 => list(logits.vector::<f32>(&[row]).row(0), row, count, found, singles, best)?,
                Dtype::F64 => list(logits.vector::<f64>(&[row]).row(0), row, count, found, doubles, best)?,
                _ => false,
            };
            if listed {
                best.retain(|(value, token)| *value > f64::NEG_INFINITY && Some(*token) != exclude[row]);
            } else {
                widen(logits, &[row], z);
                without_nan(z, row)?;
                if let Some(token) = exclude[row] {
                    z[token] = f64::NEG_INFINITY;
                }
                if count == 0 || z.is_empty() {
                    return Ok(());
                }
                let bar = kth_largest(z, count.min(z.len()), buffer).max(f64::MIN);
                let reached = z.iter().enumerate().filter(|(_, value)| **value >= bar);
                best.extend(reached.map(|(token, value)| (*value, token)));
            }
            best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for (slot, (_, token)) in out.iter_mut().zip(best.iter().take(count)) {
                *slot = *token as i32;
            }
            Ok(())
        };
        results.put(row, work());
    })?;
    results.collect().map(|_: Vec<()>| ())
}

/// Where `tokens[b]` stands among the tokens of each row, `exclude[b]` (-1: none) left out: 0 is the first. `ranks [B]`:
/// int64. A masked token ranks behind all that are not; the excluded one itself has no rank: -1.
///
/// # Errors
/// Wrong ranks, extents or types; NaN; ids out of range.
pub fn rank(logits: &Array<'_>, tokens: &Array<'_>, exclude: Option<&Array<'_>>, ranks: ArrayMut<'_>) -> Result<()> {
    floating("logits", logits)?;
    shaped("logits", logits, "[B, V]", &[None, None])?;
    let [rows, vocabulary] = [logits.shape()[0], logits.shape()[1]];
    super::sample::tokens_out(&ranks, rows)?;
    let exclude = excluded("exclude", exclude, rows, vocabulary)?;
    let tokens = integers("tokens", tokens, rows)?;
    let results = Results::new(rows);
    threads::for_each(rows, logits.len() < SERIAL, Vec::new, |row, z: &mut Vec<f64>| {
        let mut work = || {
            let token = usize::try_from(tokens[row]).ok().filter(|token| *token < vocabulary).ok_or_else(|| {
                Error::value(&format!("tokens[{row}]"), format!("a token id in [0, V = {vocabulary})"), tokens[row])
            })?;
            if exclude[row] == Some(token) {
                return Ok(-1);
            }
            widen(logits, &[row], z);
            without_nan(z, row)?;
            let own = logit(logits, &[row, token]);
            let before = z[..token].iter().filter(|value| **value >= own).count()
                + z[token + 1..].iter().filter(|value| **value > own).count();
            let gone = exclude[row].is_some_and(|other| z[other] > own || (z[other] == own && other < token));
            Ok((before - usize::from(gone)) as i64)
        };
        results.put(row, work());
    })?;
    fill(ranks, results.collect()?.into_iter());
    Ok(())
}
