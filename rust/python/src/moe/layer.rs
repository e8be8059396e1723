//! The expert layer.

use super::unknown;
use crate::arrays::{hold, hold_optional};
use crate::door::enter;
use pyo3::prelude::*;
use tilewise_core::arch::Activation;
use tilewise_core::moe::layer::{self, Layout, Weights};

/// The expert layer into `out`.
#[pyfunction]
#[pyo3(signature = (x, ids, scores, gate_up, down, out, *, gate_up_bias, down_bias, activation, alpha, limit, layout))]
fn experts(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    ids: &Bound<'_, PyAny>,
    scores: &Bound<'_, PyAny>,
    gate_up: &Bound<'_, PyAny>,
    down: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    gate_up_bias: Option<&Bound<'_, PyAny>>,
    down_bias: Option<&Bound<'_, PyAny>>,
    activation: &str,
    alpha: f64,
    limit: f64,
    layout: &str,
) -> PyResult<()> {
    let activation = match activation {
        "swiglu" => Activation::Swiglu,
        "geglu" => Activation::Geglu,
        "geglu_tanh" => Activation::GegluTanh,
        "reglu" => Activation::Reglu,
        "swiglu_clamped" => Activation::SwigluClamped { alpha, limit },
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        other => {
            let allowed = "swiglu, geglu, geglu_tanh, reglu, swiglu_clamped, silu, gelu, gelu_tanh, relu or relu2";
            return Err(unknown(py, "activation", allowed, other));
        }
    };
    let layout = match layout {
        "concatenated" => Layout::Concatenated,
        "interleaved" => Layout::Interleaved,
        other => return Err(unknown(py, "layout", "concatenated or interleaved", other)),
    };
    let (x, ids, scores) = (hold("x", x)?, hold("expert_ids", ids)?, hold("weights", scores)?);
    let (gate_up, down, mut out) = (hold("gate_up", gate_up)?, hold("down", down)?, hold("out", out)?);
    let (in_bias, out_bias) = (hold_optional("gate_up_bias", gate_up_bias)?, hold_optional("down_bias", down_bias)?);
    let weights = Weights {
        gate_up: gate_up.array()?,
        down: down.array()?,
        gate_up_bias: in_bias.as_ref().map(|bias| bias.array()).transpose()?,
        down_bias: out_bias.as_ref().map(|bias| bias.array()).transpose()?,
        layout,
        activation,
    };
    let (x, ids, scores, out) = (x.array()?, ids.array()?, scores.array()?, out.array_mut()?);
    enter(py, || layer::forward(x, &ids, &scores, weights, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(experts, module)?)
}
