//! Routers.

use super::unknown;
use crate::arrays::hold;
use crate::door::enter;
use pyo3::prelude::*;
use tilewise_core::moe::route::{Groups, Router, Scoring};

fn router<'a>(
    py: Python<'_>,
    top_k: usize,
    scoring: &str,
    bias: Option<&'a [f64]>,
    renormalise: bool,
    scale: f64,
    groups: usize,
    top_groups: usize,
) -> PyResult<Router<'a>> {
    let scoring = match scoring {
        "softmax_topk" => Scoring::SoftmaxTopk,
        "softmax" => Scoring::Softmax,
        "softmax_renormalised" => Scoring::SoftmaxRenormalised,
        "sigmoid" => Scoring::Sigmoid,
        other => return Err(unknown(py, "scoring", "softmax_topk, softmax, softmax_renormalised or sigmoid", other)),
    };
    let groups = Groups { count: groups, kept: top_groups };
    Ok(Router { top_k, scoring, bias, renormalise, scale, groups })
}

/// Chooses experts: `ids` and `weights` are filled.
#[pyfunction]
#[pyo3(signature = (logits, ids, weights, *, top_k, scoring, bias, renormalise, scale, groups, top_groups))]
fn route(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    ids: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    top_k: usize,
    scoring: &str,
    bias: Option<Vec<f64>>,
    renormalise: bool,
    scale: f64,
    groups: usize,
    top_groups: usize,
) -> PyResult<()> {
    let router = router(py, top_k, scoring, bias.as_deref(), renormalise, scale, groups, top_groups)?;
    let (logits, mut ids, mut weights) = (hold("logits", logits)?, hold("expert_ids", ids)?, hold("weights", weights)?);
    let (logits, ids, weights) = (logits.array()?, ids.array_mut()?, weights.array_mut()?);
    enter(py, || tilewise_core::moe::route::route(&router, &logits, ids, weights))
}

/// The gradient of the logits into `out`.
#[pyfunction]
#[pyo3(signature = (logits, ids, grad, out, *, scoring, renormalise, scale))]
fn route_backward(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    ids: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scoring: &str,
    renormalise: bool,
    scale: f64,
) -> PyResult<()> {
    let (logits, ids, grad) = (hold("logits", logits)?, hold("expert_ids", ids)?, hold("grad", grad)?);
    let mut out = hold("out", out)?;
    let (logits, ids, grad, out) = (logits.array()?, ids.array()?, grad.array()?, out.array_mut()?);
    // Bias and groups chose the experts; the gradient does not know them.
    let top_k = ids.shape().last().copied().unwrap_or(0);
    let router = router(py, top_k, scoring, None, renormalise, scale, 1, 1)?;
    enter(py, || tilewise_core::moe::route_backward::route_backward(&router, &logits, &ids, &grad, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(route, module)?)?;
    module.add_function(wrap_pyfunction!(route_backward, module)?)
}
