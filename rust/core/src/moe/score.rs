//! Rows of scores of any floating type, as the kernels of choosing read them; small arrays as vectors.

use crate::arch::ranking::Ranked;
use crate::dtype::{Dtype, Element, Float, Real};
use crate::view::{Array, Matrix};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A type that logits and scores come in.
pub trait Score: Float<Acc: Ranked> {
    /// Row `row` in the type it widens to: itself where it already is that, else in `copy`, which has its length.
    fn widened<'a>(scores: &Matrix<'a, Self>, row: usize, copy: &'a mut [Self::Acc]) -> &'a [Self::Acc];
    /// Rounds to nearest even, once.
    fn rounded(value: f64) -> Self;
}

/// The row in `copy`, whatever its strides.
pub(super) fn copied<'a, S: Score>(scores: &Matrix<'_, S>, row: usize, copy: &'a mut [S::Acc]) -> &'a mut [S::Acc] {
    match scores.row(row) {
        Some(adjacent) => copy.iter_mut().zip(adjacent).for_each(|(to, from)| *to = from.widen()),
        None => copy.iter_mut().enumerate().for_each(|(column, to)| *to = scores.at(row, column).widen()),
    }
    copy
}

macro_rules! own {
    ($t:ty) => {
        impl Score for $t {
            fn widened<'a>(scores: &Matrix<'a, Self>, row: usize, copy: &'a mut [$t]) -> &'a [$t] {
                match scores.row(row) {
                    Some(adjacent) => adjacent,
                    None => copied(scores, row, copy),
                }
            }
            fn rounded(value: f64) -> $t {
                value as $t
            }
        }
    };
}
own!(f32);
own!(f64);

impl Score for bf16 {
    fn widened<'a>(scores: &Matrix<'a, Self>, row: usize, copy: &'a mut [f32]) -> &'a [f32] {
        copied(scores, row, copy)
    }
    fn rounded(value: f64) -> Self {
        bf16::from_f64(value)
    }
}

impl Score for f16 {
    fn widened<'a>(scores: &Matrix<'a, Self>, row: usize, copy: &'a mut [f32]) -> &'a [f32] {
        match scores.row(row) {
            Some(adjacent) => adjacent.convert_to_f32_slice(copy),
            None => drop(copied(scores, row, copy)),
        }
        copy
    }
    fn rounded(value: f64) -> Self {
        f16::from_f64(value)
    }
}

/// The elements of an int32 or int64 array of one or two axes, row-major.
pub(super) fn integers(array: &Array<'_>) -> Vec<i64> {
    match array.dtype() {
        Dtype::I32 => flat(array, |x: i32| i64::from(x)),
        _ => flat(array, |x: i64| x),
    }
}

/// The elements of a floating array of one or two axes, row-major.
pub(super) fn floats(array: &Array<'_>) -> Vec<f64> {
    match array.dtype() {
        Dtype::F32 => flat(array, |x: f32| x.f64()),
        Dtype::F16 => flat(array, |x: f16| x.to_f64()),
        Dtype::Bf16 => flat(array, |x: bf16| x.to_f64()),
        _ => flat(array, |x: f64| x),
    }
}

fn flat<E: Element, O>(array: &Array<'_>, convert: impl Fn(E) -> O) -> Vec<O> {
    let rows: Matrix<'_, E> = if array.shape().len() == 1 { array.vector(&[]) } else { array.matrix(&[]) };
    let mut all = Vec::with_capacity(array.len());
    for row in 0..rows.rows() {
        match rows.row(row) {
            Some(adjacent) => all.extend(adjacent.iter().map(|&x| convert(x))),
            None => all.extend((0..rows.cols()).map(|col| convert(rows.at(row, col)))),
        }
    }
    all
}

/// Calls `$function::<S>(...)` for the floating type of an array, or returns the error that names it.
macro_rules! with_score {
    ($name:literal, $array:expr, $function:ident($($argument:expr),*)) => {
        match $array.dtype() {
            Dtype::F32 => $function::<f32>($($argument),*),
            Dtype::F64 => $function::<f64>($($argument),*),
            Dtype::F16 => $function::<half::f16>($($argument),*),
            Dtype::Bf16 => $function::<half::bf16>($($argument),*),
            other => Err(Error::dtype($name, "float32, float64, float16 or bfloat16", other)),
        }
    };
}
pub(super) use with_score;
