//! Routers.

use super::unknown;
use crate::arrays::hold;
use crate::door::enter;
use pyo3::prelude::*;
use tilewise_core::moe::route::{Router, Scoring};

/// Chooses experts: `ids` and `weights` are filled.
#[pyfunction]
#[pyo3(signature = (logits, ids, weights, *, top_k, scoring, bias, renormalise, scale))]
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
) -> PyResult<()> {
    let scoring = match scoring {
        "softmax_topk" => Scoring::SoftmaxTopk,
        "softmax" => Scoring::Softmax,
        "softmax_renormalised" => Scoring::SoftmaxRenormalised,
        "sigmoid" => Scoring::Sigmoid,
        other => return Err(unknown(py, "scoring", "softmax_topk, softmax, softmax_renormalised or sigmoid", other)),
    };
    let (logits, mut ids, mut weights) = (hold("logits", logits)?, hold("expert_ids", ids)?, hold("weights", weights)?);
    let (logits, ids, weights) = (logits.array()?, ids.array_mut()?, weights.array_mut()?);
    let router = Router { top_k, scoring, bias: bias.as_deref(), renormalise, scale };
    enter(py, || tilewise_core::moe::route::route(&router, &logits, ids, weights))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(route, module)?)
}
