//! The expert layer, forward and backward.

use super::unknown;
use crate::arrays::{Held, hold, hold_optional};
use crate::door::enter;
use pyo3::prelude::*;
use tilewise_core::arch::Activation;
use tilewise_core::moe::backward::{self, Gradients, Inputs};
use tilewise_core::moe::forward;
use tilewise_core::moe::problem::{Layout, Pairs, Weights};

/// Arrays of the layer, held for the length of a call.
struct Operands<'py> {
    x: Held<'py>,
    ids: Held<'py>,
    scores: Held<'py>,
    token_ids: Option<Held<'py>>,
    gate_up: Held<'py>,
    down: Held<'py>,
    gate_up_bias: Option<Held<'py>>,
    down_bias: Option<Held<'py>>,
    gate_up_scale: Option<Held<'py>>,
    down_scale: Option<Held<'py>>,
    activation: Activation,
    layout: Layout,
}

impl<'py> Operands<'py> {
    /// From the arguments (x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias, gate_up_scale,
    /// down_scale) and (activation, alpha, limit, layout).
    fn take(
        py: Python<'py>,
        arrays: &[Option<Bound<'py, PyAny>>; 10],
        (activation, alpha, limit, layout): &(String, f64, f64, String),
    ) -> PyResult<Self> {
        let [x, ids, scores, token_ids, gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale] = arrays;
        let required = |name: &'static str, array: &Option<Bound<'py, PyAny>>| match array {
            Some(array) => hold(name, array),
            None => Err(unknown(py, name, "an array", "None")),
        };
        Ok(Self {
            x: required("x", x)?,
            ids: required("expert_ids", ids)?,
            scores: required("weights", scores)?,
            token_ids: hold_optional("token_ids", token_ids.as_ref())?,
            gate_up: required("gate_up", gate_up)?,
            down: required("down", down)?,
            gate_up_bias: hold_optional("gate_up_bias", gate_up_bias.as_ref())?,
            down_bias: hold_optional("down_bias", down_bias.as_ref())?,
            gate_up_scale: hold_optional("gate_up_scale", gate_up_scale.as_ref())?,
            down_scale: hold_optional("down_scale", down_scale.as_ref())?,
            activation: named(py, activation, *alpha, *limit)?,
            layout: match layout.as_str() {
                "concatenated" => Layout::Concatenated,
                "interleaved" => Layout::Interleaved,
                other => return Err(unknown(py, "layout", "concatenated or interleaved", other)),
            },
        })
    }

    fn pairs(&self) -> PyResult<Pairs<'_>> {
        let tokens = self.token_ids.as_ref().map(|tokens| tokens.array()).transpose()?;
        Ok(Pairs { ids: self.ids.array()?, scores: self.scores.array()?, tokens })
    }

    fn weights(&self) -> PyResult<Weights<'_>> {
        Ok(Weights {
            gate_up: self.gate_up.array()?,
            down: self.down.array()?,
            gate_up_scale: self.gate_up_scale.as_ref().map(|scale| scale.array()).transpose()?,
            down_scale: self.down_scale.as_ref().map(|scale| scale.array()).transpose()?,
            gate_up_bias: self.gate_up_bias.as_ref().map(|bias| bias.array()).transpose()?,
            down_bias: self.down_bias.as_ref().map(|bias| bias.array()).transpose()?,
            layout: self.layout,
            activation: self.activation,
        })
    }
}

fn named(py: Python<'_>, activation: &str, alpha: f64, limit: f64) -> PyResult<Activation> {
    Ok(match activation {
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
    })
}

/// The layer into `out`, and the pre-activation if there is an array for it.
#[pyfunction]
fn experts<'py>(
    py: Python<'py>,
    arrays: [Option<Bound<'py, PyAny>>; 10],
    options: (String, f64, f64, String),
    out: &Bound<'py, PyAny>,
    pre_activation: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let operands = Operands::take(py, &arrays, &options)?;
    let (mut out, mut pre) = (hold("out", out)?, hold_optional("pre_activation", pre_activation)?);
    let (x, pairs, weights) = (operands.x.array()?, operands.pairs()?, operands.weights()?);
    let (out, pre) = (out.array_mut()?, pre.as_mut().map(Held::array_mut).transpose()?);
    enter(py, || forward::forward(x, &pairs, weights, out, pre))
}

/// Gradients of the layer into `outputs`: (x, weights, gate_up, down, gate_up_bias, down_bias), `None` where not wanted.
#[pyfunction]
fn experts_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    pre_activation: &Bound<'py, PyAny>,
    arrays: [Option<Bound<'py, PyAny>>; 10],
    options: (String, f64, f64, String),
    outputs: [Option<Bound<'py, PyAny>>; 6],
) -> PyResult<()> {
    let operands = Operands::take(py, &arrays, &options)?;
    let (grad, pre) = (hold("grad", grad)?, hold("pre_activation", pre_activation)?);
    let mut held = Vec::with_capacity(outputs.len());
    let names = ["grad_x", "grad_weights", "grad_gate_up", "grad_down", "grad_gate_up_bias", "grad_down_bias"];
    for (name, output) in names.into_iter().zip(&outputs) {
        held.push(hold_optional(name, output.as_ref())?);
    }
    let mut views = Vec::with_capacity(held.len());
    for output in &mut held {
        views.push(output.as_mut().map(Held::array_mut).transpose()?);
    }
    let [x, scores, gate_up, down, gate_up_bias, down_bias] =
        <[_; 6]>::try_from(views).unwrap_or_else(|_| unreachable!("six outputs"));
    let inputs = Inputs {
        grad: grad.array()?,
        x: operands.x.array()?,
        pairs: operands.pairs()?,
        weights: operands.weights()?,
        pre_activation: pre.array()?,
    };
    let gradients = Gradients { x, scores, gate_up, down, gate_up_bias, down_bias };
    enter(py, || backward::backward(inputs, gradients))
}

/// A weight [experts, rows, columns] as bytes and scales.
#[pyfunction]
fn quantise<'py>(
    py: Python<'py>,
    name: &str,
    weight: &Bound<'py, PyAny>,
    bytes: &Bound<'py, PyAny>,
    scale: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (weight, mut bytes, mut scale) = (hold("weight", weight)?, hold("bytes", bytes)?, hold("scale", scale)?);
    let (weight, bytes, scale) = (weight.array()?, bytes.array_mut()?, scale.array_mut()?);
    enter(py, || tilewise_core::moe::quantise::quantise(name, &weight, bytes, scale))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(experts, module)?)?;
    module.add_function(wrap_pyfunction!(experts_backward, module)?)?;
    module.add_function(wrap_pyfunction!(quantise, module)?)
}
