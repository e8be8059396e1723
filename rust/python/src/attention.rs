//! The attention room.

use crate::arrays::{hold, hold_optional};
use crate::door::{enter, to_python};
use pyo3::prelude::*;
use tilewise_core::attention::problem::{Problem, Rules};

/// Forward attention into `out` and `lse`; `left` and `right` bound the window (`None` = unlimited).
#[pyfunction]
#[pyo3(signature = (query, key, value, out, lse, *, scale, causal, left, right, mask, sinks, block_indices, block_size))]
fn attention(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    scale: f64,
    causal: bool,
    left: Option<usize>,
    right: Option<usize>,
    mask: Option<&Bound<'_, PyAny>>,
    sinks: Option<&Bound<'_, PyAny>>,
    block_indices: Option<&Bound<'_, PyAny>>,
    block_size: usize,
) -> PyResult<()> {
    let (query, key, value) = (hold("query", query)?, hold("key", key)?, hold("value", value)?);
    let (mut out, mut lse) = (hold("out", out)?, hold("lse", lse)?);
    let (mask, sinks) = (hold_optional("mask", mask)?, hold_optional("sinks", sinks)?);
    let blocks = hold_optional("block_indices", block_indices)?;
    let sinks = sinks.as_ref().map(|sinks| sinks.array()).transpose()?;
    let rules = Rules {
        causal,
        left,
        right,
        mask: mask.as_ref().map(|mask| mask.array()).transpose()?,
        block_indices: blocks.as_ref().map(|blocks| blocks.array()).transpose()?,
        block_size,
    };
    let problem = Problem::new(query.array()?, key.array()?, value.array()?, scale, rules, sinks.as_ref());
    let problem = problem.map_err(|error| to_python(py, &error))?;
    let (out, lse) = (out.array_mut()?, lse.array_mut()?);
    enter(py, || tilewise_core::attention::forward(&problem, out, lse))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(attention, module)?)
}
