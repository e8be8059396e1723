//! What the draft expects: its most probable tokens at a place, in order, and where a token stands in that order.
//!
//! The order is that of falling logits, ties by rising id. A drafted token that is refused is not what replaces it, so
//! after fewer accepted tokens than were drafted, that one is left out (at the end of a chain none is).

use super::input::{Results, fill, floating, integers, logit, shaped, widen};
use super::process::SERIAL;
use super::select::kth_largest;
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
    type Scratch = (Vec<f64>, Vec<f64>, Vec<(f64, usize)>);
    threads::for_each(rows, logits.len() < SERIAL, Scratch::default, |row, (z, buffer, best)| {
        let mut work = || {
            let out = ids.take(row);
            out.fill(-1);
            let count = usize::try_from(counts[row]).ok().filter(|count| *count <= width).ok_or_else(|| {
                Error::value(&format!("counts[{row}]"), format!("an integer in [0, W = {width}]"), counts[row])
            })?;
            widen(logits, &[row], z);
            without_nan(z, row)?;
            if let Some(token) = exclude[row] {
                z[token] = f64::NEG_INFINITY;
            }
            if count == 0 || z.is_empty() {
                return Ok(());
            }
            let bar = kth_largest(z, count.min(z.len()), buffer).max(f64::MIN);
            best.clear();
            best.extend(z.iter().enumerate().filter(|(_, value)| **value >= bar).map(|(token, value)| (*value, token)));
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
