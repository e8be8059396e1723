//! Gradients of the expert layer, from its inputs and the pre-activation H alone (SonicMoE's algebra).
//!
//! With `g = dO[t]`, weight s, `A = act(H)` for a row of expert e (nothing of size rows x d is kept or recomputed):
//!
//! ```text
//! A' = g W_out          (its gradient before s)        slopes::hidden
//! ds = <A', A> + <g, b_out>                            slopes::hidden
//! dH = act'(H)[s A']                                   slopes::hidden
//! dX = dH W_in, summed over the token's rows           slopes::input, aggregate
//! dW_out = g^T (s A) , dW_in = dH^T X                  outer
//! db_out = sum of s g, db_in = sum of dH               outer
//! ```
//! A zero s has its gradient too, since A' is taken before s. Rows are grouped as in the forward pass. Every number is
//! a sum in an order that the routing alone decides, so results do not depend on the threads. Experts without rows get
//! zeros.

use super::aggregate::aggregate;
use super::problem::{Layer, Pairs, Weights};
use super::routing::NONE;
use super::{outer, slopes};
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::scratch::Buffer;
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};

/// What the gradients are taken of.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// Gradient of the output, [tokens, d]; any strides.
    pub grad: Array<'a>,
    /// [tokens, d]
    pub x: Array<'a>,
    /// The routing.
    pub pairs: Pairs<'a>,
    /// The layer's weights.
    pub weights: Weights<'a>,
    /// As [`forward`](super::forward::forward) left it.
    pub pre_activation: Array<'a>,
}

/// Where the gradients go; those that are `None` are not computed. All of x's type and of their argument's shape, but
/// `scores`: the shape of `ids`, of the accumulator's type.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Gradients<'a> {
    pub x: Option<ArrayMut<'a>>,
    pub scores: Option<ArrayMut<'a>>,
    pub gate_up: Option<ArrayMut<'a>>,
    pub down: Option<ArrayMut<'a>>,
    pub gate_up_bias: Option<ArrayMut<'a>>,
    pub down_bias: Option<ArrayMut<'a>>,
}

/// Computes the gradients that are asked for.
///
/// # Errors
/// Wrong ranks, extents or types; see the messages.
pub fn backward(inputs: Inputs<'_>, gradients: Gradients<'_>) -> Result<()> {
    let Inputs { grad, x, pairs, weights, pre_activation } = inputs;
    let layer = Layer::new(x, &pairs, weights)?;
    layer.refuse_int8()?;
    let x = &layer.x;
    for (name, array, shape) in [
        ("grad", &grad, [layer.tokens(), layer.width]),
        ("pre_activation", &pre_activation, [layer.routing.rows.len(), layer.halves() * layer.hidden]),
    ] {
        if array.shape() != shape {
            return Err(Error::shape(name, format!("{shape:?}"), array.shape()));
        }
        if array.dtype() != x.dtype() {
            return Err(Error::dtype(name, format!("{}, as x", x.dtype()), array.dtype()));
        }
    }
    let (Weights { gate_up, down, gate_up_bias, down_bias, .. }, g) = (&layer.weights, &gradients);
    let shape = |array: Option<&Array<'_>>| array.map(|array| array.shape().to_vec());
    let accumulator = if x.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    for (name, out, expected, dtype) in [
        ("grad_x", &g.x, shape(Some(x)), x.dtype()),
        ("grad_weights", &g.scores, shape(Some(&pairs.ids)), accumulator),
        ("grad_gate_up", &g.gate_up, shape(Some(gate_up)), x.dtype()),
        ("grad_down", &g.down, shape(Some(down)), x.dtype()),
        ("grad_gate_up_bias", &g.gate_up_bias, shape(gate_up_bias.as_ref()), x.dtype()),
        ("grad_down_bias", &g.down_bias, shape(down_bias.as_ref()), x.dtype()),
    ] {
        let Some(out) = out else { continue };
        let Some(expected) = expected else {
            return Err(Error::value(name, "nothing: the layer has no such bias", "an output"));
        };
        if out.shape() != expected || out.dtype() != dtype {
            return Err(Error::shape(name, format!("{expected:?} of {dtype}"), out.shape()));
        }
    }
    match x.dtype() {
        Dtype::F32 => typed::<f32>(&layer, &pairs, &grad, &pre_activation, gradients),
        Dtype::F64 => typed::<f64>(&layer, &pairs, &grad, &pre_activation, gradients),
        Dtype::F16 => typed::<f16>(&layer, &pairs, &grad, &pre_activation, gradients),
        _ => typed::<bf16>(&layer, &pairs, &grad, &pre_activation, gradients),
    }
}

/// What the stages share.
pub(super) struct Stage<'a, S: Arithmetic> {
    pub layer: &'a Layer<'a>,
    /// dO
    pub grad: Matrix<'a, S>,
    /// H
    pub pre: Matrix<'a, S>,
    /// s, by pair
    pub scores: &'a [S::Acc],
    /// Rows of dH are this many elements apart.
    pub slope_stride: usize,
    /// Too little work to wake anybody for.
    pub serial: bool,
}

fn typed<S: Arithmetic>(
    layer: &Layer<'_>,
    pairs: &Pairs<'_>,
    grad: &Array<'_>,
    pre: &Array<'_>,
    gradients: Gradients<'_>,
) -> Result<()> {
    let scores = Layer::scores::<S::Acc>(pairs)?;
    let features = layer.halves() * layer.hidden;
    let stage = Stage::<S> {
        layer,
        grad: grad.matrix(&[]),
        pre: pre.matrix(&[]),
        scores: &scores,
        slope_stride: line_stride(S::units(features)) * S::PER_UNIT,
        serial: layer.work() <= SERIAL_WORK,
    };
    let Gradients { x, scores: grad_scores, gate_up, down, gate_up_bias, down_bias } = gradients;
    let count = layer.routing.count();
    // dH, then A scaled; every element that is read was written before.
    let mut slopes = Buffer::<S>::new(count * stage.slope_stride);
    let mut active = Buffer::<S>::new(count * layer.hidden);
    let groups = layer.hidden.div_ceil(slopes::GROUP).max(1);
    let mut products = vec![S::Acc::ZERO; count * groups];
    let inner = x.is_some() || grad_scores.is_some() || gate_up.is_some() || down.is_some() || gate_up_bias.is_some();
    if inner && count > 0 {
        slopes::hidden(&stage, &mut slopes, &mut active, &mut products)?;
    }
    let slopes = Matrix::new(&slopes, count, features, stage.slope_stride);
    if let Some(out) = x {
        let mut rows = Buffer::<S::Acc>::new(count * layer.width);
        if count > 0 && layer.width > 0 {
            slopes::input(&stage, slopes, &mut rows)?;
        }
        aggregate::<S>(&layer.routing, layer.tokens(), layer.width, &rows, None, out)?;
    }
    if let Some(out) = grad_scores {
        score_gradients::<S>(layer, &products, out);
    }
    let active = Matrix::new(&active, count, layer.hidden, layer.hidden);
    outer::weights(&stage, slopes, active, gate_up, down)?;
    outer::biases(&stage, slopes, gate_up_bias, down_bias)
}

/// Sums the groups' parts in order, and puts them where the pairs are.
fn score_gradients<S: Arithmetic>(layer: &Layer<'_>, products: &[S::Acc], out: ArrayMut<'_>) {
    let width = out.shape().last().copied().unwrap_or(0);
    let groups = products.len().checked_div(layer.routing.count()).unwrap_or(1);
    let rows = out.rows::<S::Acc>();
    for r in 0..rows.len() {
        for (pair, value) in (r * width..).zip(rows.take(r)) {
            let row = layer.routing.rows[pair];
            *value = S::Acc::ZERO;
            if row != NONE {
                for &part in &products[row * groups..(row + 1) * groups] {
                    *value = *value + part;
                }
            }
        }
    }
}
