//! Checked arguments: what every batched function of the room does with the arrays it is given.

use super::process::Sampling;
use super::saguaro::Saguaro;
use crate::dtype::{Dtype, Element, Float, Real};
use crate::error::{Error, Result};
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Refuses element types that are not floating point.
pub(super) fn floating(name: &str, array: &Array<'_>) -> Result<()> {
    match array.dtype() {
        Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16 => Ok(()),
        other => Err(Error::dtype(name, "float32, float64, float16 or bfloat16", other)),
    }
}

/// Refuses a shape; `None` is any extent.
pub(super) fn shaped(name: &str, array: &Array<'_>, axes: &str, extents: &[Option<usize>]) -> Result<()> {
    let fits = array.shape().len() == extents.len()
        && extents.iter().zip(array.shape()).all(|(wanted, got)| wanted.is_none_or(|wanted| wanted == *got));
    if fits { Ok(()) } else { Err(Error::shape(name, axes, array.shape())) }
}

/// The last axis of `array` at `lead`, widened; -0 becomes +0, so that "equal" and "same bits" agree.
pub(super) fn widen(array: &Array<'_>, lead: &[usize], out: &mut Vec<f64>) {
    fn fill<T: Float>(row: Matrix<'_, T>, out: &mut Vec<f64>) {
        out.clear();
        match row.row(0) {
            Some(slice) => out.extend(slice.iter().map(|value| value.widen().f64() + 0.0)),
            None => out.extend((0..row.cols()).map(|token| row.at(0, token).widen().f64() + 0.0)),
        }
    }
    match array.dtype() {
        Dtype::F32 => fill(array.vector::<f32>(lead), out),
        Dtype::F64 => fill(array.vector::<f64>(lead), out),
        Dtype::F16 => fill(array.vector::<f16>(lead), out),
        Dtype::Bf16 => fill(array.vector::<bf16>(lead), out),
        other => unreachable!("checked by floating(): {other}"),
    }
}

/// One integer per row of a batch.
pub(super) fn integers(name: &str, array: &Array<'_>, rows: usize) -> Result<Vec<i64>> {
    shaped(name, array, &format!("[{rows}], one number per row"), &[Some(rows)])?;
    match array.dtype() {
        Dtype::I32 => Ok((0..rows).map(|row| i64::from(array.get::<i32>(&[row]))).collect()),
        Dtype::I64 => Ok((0..rows).map(|row| array.get::<i64>(&[row])).collect()),
        other => Err(Error::dtype(name, "int32 or int64", other)),
    }
}

/// How many of a row's `depth` tokens are drafted: all where nothing is said.
pub(super) fn lengths_of(lengths: Option<&Array<'_>>, rows: usize, depth: usize) -> Result<Vec<usize>> {
    let Some(lengths) = lengths else { return Ok(vec![depth; rows]) };
    let checked = |(row, length): (usize, i64)| match usize::try_from(length) {
        Ok(length) if length <= depth => Ok(length),
        _ => Err(Error::value(&format!("draft_lengths[{row}]"), format!("an integer in [0, K = {depth}]"), length)),
    };
    integers("draft_lengths", lengths, rows)?.into_iter().enumerate().map(checked).collect()
}

/// One logit, widened as [`widen`] does.
pub(super) fn logit(array: &Array<'_>, at: &[usize]) -> f64 {
    0.0 + match array.dtype() {
        Dtype::F32 => f64::from(array.get::<f32>(at)),
        Dtype::F64 => array.get::<f64>(at),
        Dtype::F16 => f64::from(array.get::<f16>(at)),
        Dtype::Bf16 => f64::from(array.get::<bf16>(at)),
        other => unreachable!("checked by floating(): {other}"),
    }
}

/// One double per row of a batch.
fn doubles(name: &str, array: &Array<'_>, rows: usize) -> Result<Vec<f64>> {
    shaped(name, array, &format!("[{rows}], one number per row"), &[Some(rows)])?;
    match array.dtype() {
        Dtype::F64 => Ok((0..rows).map(|row| array.get::<f64>(&[row])).collect()),
        other => Err(Error::dtype(name, "float64", other)),
    }
}

/// The sampling rule of each row, checked.
///
/// # Errors
/// Arrays that are not `[rows]`, or a rule that [`Sampling::new`] refuses.
pub fn rules(temperature: &Array<'_>, top_k: &Array<'_>, top_p: &Array<'_>, rows: usize) -> Result<Vec<Sampling>> {
    let temperature = doubles("temperature", temperature, rows)?;
    let top_k = integers("top_k", top_k, rows)?;
    let top_p = doubles("top_p", top_p, rows)?;
    (0..rows).map(|row| Sampling::new(row, temperature[row], top_k[row], top_p[row])).collect()
}

/// The reweighing of each row's law, checked: `constant [rows]` (float64) and `fan_out [rows]`.
///
/// # Errors
/// Arrays that are not `[rows]`, or a rule that [`Saguaro::new`] refuses.
pub fn saguaro_rules(constant: &Array<'_>, fan_out: &Array<'_>, rows: usize) -> Result<Vec<Saguaro>> {
    let constant = doubles("saguaro", constant, rows)?;
    let fan_out = integers("fan_out", fan_out, rows)?;
    (0..rows).map(|row| Saguaro::new(row, constant[row], fan_out[row])).collect()
}

/// Writes one result per row to an output of shape `[rows]` (whose memory may be absent if there are none).
pub(super) fn fill<T: Element>(out: ArrayMut<'_>, values: impl ExactSizeIterator<Item = T>) {
    if values.len() == 0 {
        return;
    }
    for (slot, value) in out.rows::<T>().take(0).iter_mut().zip(values) {
        *slot = value;
    }
}

/// One result per row, from any thread; the error of the lowest row wins, whatever the order of the tasks.
pub(super) struct Results<R>(Vec<OnceLock<Result<R>>>);

impl<R> Results<R> {
    pub(super) fn new(rows: usize) -> Self {
        Self((0..rows).map(|_| OnceLock::new()).collect())
    }

    pub(super) fn put(&self, row: usize, result: Result<R>) {
        assert!(self.0[row].set(result).is_ok(), "row {row} computed twice");
    }

    pub(super) fn collect(self) -> Result<Vec<R>> {
        let missing = || Err(Error::Internal("a row was not computed".into()));
        self.0.into_iter().map(|cell| cell.into_inner().unwrap_or_else(missing)).collect()
    }
}
