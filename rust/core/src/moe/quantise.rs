//! Weights as bytes: `W[e, r, :] ~ scale[e, r] * q[e, r, :]`, symmetric, one scale a row.
//!
//! ```text
//! for each row w:
//!     scale = max |w| / 127, rounded to float32
//!     q = w / scale, rounded to nearest even
//! ```
//! In double precision throughout, so `|w - scale q| <= scale / 2` but for the rounding of the quotient. A row of zeros
//! has scale 0. A scale that is subnormal has few bits and is rounded up, or the largest q would not fit.

use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::gemm::SERIAL_WORK;
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The largest byte; -128 is not used.
const TOP: f64 = 127.0;
/// Rows in a task.
const ROWS: usize = 64;

/// `weight` [experts, rows, columns], floating, any strides, into `bytes` of that shape (int8) and `scale` [experts, rows]
/// (float32). `name` is the weight's, for messages.
///
/// # Errors
/// Another rank or type; a row that holds NaN or infinity, or that float32 cannot scale: the first place is named.
pub fn quantise(name: &str, weight: &Array<'_>, bytes: ArrayMut<'_>, scale: ArrayMut<'_>) -> Result<()> {
    if weight.shape().len() != 3 {
        return Err(Error::shape(name, "rank 3 [experts, rows, columns]", weight.shape()));
    }
    if bytes.shape() != weight.shape() || bytes.dtype() != Dtype::I8 {
        return Err(Error::shape("bytes", format!("{:?} of int8, as {name}", weight.shape()), bytes.shape()));
    }
    if scale.shape() != &weight.shape()[..2] || scale.dtype() != Dtype::F32 {
        return Err(Error::shape("scale", format!("{:?} of float32", &weight.shape()[..2]), scale.shape()));
    }
    match weight.dtype() {
        Dtype::F32 => typed::<f32>(name, weight, bytes, scale),
        Dtype::F64 => typed::<f64>(name, weight, bytes, scale),
        Dtype::F16 => typed::<f16>(name, weight, bytes, scale),
        Dtype::Bf16 => typed::<bf16>(name, weight, bytes, scale),
        other => Err(Error::dtype(name, "float32, float64, float16 or bfloat16", other)),
    }
}

fn typed<S: Float>(name: &str, weight: &Array<'_>, bytes: ArrayMut<'_>, scale: ArrayMut<'_>) -> Result<()> {
    let &[experts, rows, columns] = weight.shape() else { return Ok(()) };
    let (bytes, scale) = (bytes.fresh().rows::<i8>(), scale.segments::<f32>(1));
    let bad = AtomicUsize::new(usize::MAX);
    threads::for_each(
        (experts * rows).div_ceil(ROWS),
        weight.len() <= SERIAL_WORK,
        || vec![0f64; columns],
        |task, wide| {
            for at in task * ROWS..(experts * rows).min((task + 1) * ROWS) {
                widen(weight.matrix::<S>(&[at / rows]).part(at % rows..at % rows + 1, 0..columns), wide);
                match row(wide, bytes.take(at)) {
                    Some(value) => scale.take(at)[0] = value,
                    None => _ = bad.fetch_min(at, Ordering::Relaxed),
                }
            }
        },
    )?;
    let at = bad.into_inner();
    if at == usize::MAX {
        return Ok(());
    }
    let (expert, row) = (at / rows, at % rows);
    let values = (0..columns).map(|column| weight.get::<S>(&[expert, row, column]).widen().f64());
    let place = |column: usize| format!("at expert {expert}, row {row}, column {column}");
    Err(match values.enumerate().find(|(_, value)| !value.is_finite()) {
        Some((column, value)) => Error::value(name, "finite weights", format!("{value} {}", place(column))),
        None => Error::value(name, "weights that float32 can scale", format!("a larger one in row {row} of {expert}")),
    })
}

fn widen<S: Float>(line: Matrix<'_, S>, wide: &mut [f64]) {
    match line.row(0) {
        Some(row) => wide.iter_mut().zip(row).for_each(|(wide, value)| *wide = value.widen().f64()),
        None => wide.iter_mut().enumerate().for_each(|(k, wide)| *wide = line.at(0, k).widen().f64()),
    }
}

/// One row; its scale, or none for a row that has none.
fn row(values: &[f64], bytes: &mut [i8]) -> Option<f32> {
    // Adding and taking away 1.5 * 2^52 leaves the nearest integer, ties to even.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let (mut top, mut finite) = (0f64, true);
    for value in values {
        let size = value.abs();
        top = if size > top { size } else { top };
        finite &= size < f64::INFINITY; // false for NaN too
    }
    let mut scale = (top / TOP) as f32;
    if !finite || scale.is_infinite() {
        return None;
    }
    if top > 0.0 && scale < f32::MIN_POSITIVE && f64::from(scale) * TOP < top {
        scale = scale.next_up();
    }
    // A zero row divided by anything is zeros.
    let divisor = if scale == 0.0 { 1.0 } else { f64::from(scale) };
    for (byte, value) in bytes.iter_mut().zip(values) {
        *byte = (value / divisor + ROUND - ROUND) as i8;
    }
    Some(scale)
}
