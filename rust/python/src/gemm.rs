//! The gemm room.

use crate::arrays::{hold, hold_optional};
use crate::door::{enter, to_python};
use pyo3::prelude::*;
use tilewise_core::dtype::Dtype;
use tilewise_core::error::Error;
use tilewise_core::view::Array;

/// `out = a[rows] @ b`.
#[pyfunction]
fn matmul(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    rows: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (a, b, rows, mut out) = (hold("a", a)?, hold("b", b)?, hold_optional("rows", rows)?, hold("out", out)?);
    let (a, b, out) = (a.array()?, b.array()?, out.array_mut()?);
    let rows = rows.as_ref().map(|rows| rows.array()).transpose()?;
    let rows = rows.map(|rows| integers("rows", &rows)).transpose().map_err(|error| to_python(py, &error))?;
    enter(py, || tilewise_core::gemm::matmul(&a, &b, rows.as_deref(), out))
}

/// A list of integers of either width.
pub fn integers(name: &str, array: &Array<'_>) -> Result<Vec<i64>, Error> {
    if array.shape().len() != 1 {
        return Err(Error::shape(name, "rank 1", array.shape()));
    }
    let count = array.shape()[0];
    match array.dtype() {
        Dtype::I32 => Ok((0..count).map(|i| i64::from(array.get::<i32>(&[i]))).collect()),
        Dtype::I64 => Ok((0..count).map(|i| array.get::<i64>(&[i])).collect()),
        other => Err(Error::dtype(name, "int32 or int64", other)),
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(matmul, module)?)
}
