//! The expert layer: `out[t] = sum over slots k of weight[t, k] * expert[id[t, k]](x[t])`.
//!
//! `expert(x) = act(x W_in^T + b_in) W_out^T + b_out`. Three stages, each a parallel loop over independent tasks:
//!
//! ```text
//! 1. experts with many rows: whole tasks (gather, first product, activation, second product)
//!    experts with few rows:  first product and activation, by segments of features
//! 2. experts with few rows:  second product, by segments of outputs
//! 3. per token: the weighted sum of its rows, in slot order, in the accumulator's type, rounded once
//! ```
//! A row's value depends on its token and expert alone, so results depend on neither the threads nor the batch split.

use super::routing::{NONE, Routing};
use super::{lines, panels};
use crate::arch::{Activation, Kernel};
use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::scratch::Buffer;
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};

/// Where the gate and up rows of the first weight stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// All gates, then all ups.
    Concatenated,
    /// Gate 0, up 0, gate 1, up 1, ...
    Interleaved,
}

/// Weights of a layer; any strides.
#[derive(Debug, Clone)]
pub struct Weights<'a> {
    /// [experts, 2n (n for a plain activation), d]
    pub gate_up: Array<'a>,
    /// [experts, d, n]
    pub down: Array<'a>,
    /// [experts, 2n or n]
    pub gate_up_bias: Option<Array<'a>>,
    /// [experts, d]
    pub down_bias: Option<Array<'a>>,
    /// Order of gate and up rows.
    pub layout: Layout,
    /// The function between the products.
    pub activation: Activation,
}

/// A checked problem, as the stages see it.
pub(super) struct Layer<'a> {
    pub x: Array<'a>,
    pub weights: Weights<'a>,
    pub routing: Routing,
    /// d
    pub width: usize,
    /// n
    pub hidden: usize,
}

impl Layer<'_> {
    pub fn experts(&self) -> usize {
        self.weights.gate_up.shape()[0]
    }

    /// Rows of the first weight that make features `first..first + count`: gates, then ups (if gated).
    pub fn feature_rows(&self, first: usize, count: usize) -> (Vec<usize>, Vec<usize>) {
        match (self.weights.activation.gated(), self.weights.layout) {
            (false, _) => ((first..first + count).collect(), Vec::new()),
            (true, Layout::Concatenated) => {
                ((first..first + count).collect(), (self.hidden + first..self.hidden + first + count).collect())
            }
            (true, Layout::Interleaved) => {
                ((first..first + count).map(|j| 2 * j).collect(), (first..first + count).map(|j| 2 * j + 1).collect())
            }
        }
    }

    /// Bias of one row of the first product; 0 without biases.
    pub fn gate_up_bias<S: Float>(&self, expert: usize, row: usize) -> S::Acc {
        self.weights.gate_up_bias.as_ref().map_or(S::Acc::ZERO, |bias| bias.get::<S>(&[expert, row]).widen())
    }

    /// Bias of one output; 0 without biases.
    pub fn down_bias<S: Float>(&self, expert: usize, output: usize) -> S::Acc {
        self.weights.down_bias.as_ref().map_or(S::Acc::ZERO, |bias| bias.get::<S>(&[expert, output]).widen())
    }
}

/// Runs the layer. `x` [tokens, d], `ids` int32 or int64 [tokens, slots] (outside 0..experts: sentinel, skipped),
/// `scores` floating [tokens, slots], `out` [tokens, d] of x's type.
///
/// # Errors
/// Wrong ranks, extents or types; see the messages.
pub fn forward(
    x: Array<'_>,
    ids: &Array<'_>,
    scores: &Array<'_>,
    weights: Weights<'_>,
    out: ArrayMut<'_>,
) -> Result<()> {
    let (width, hidden) = check(&x, ids, scores, &weights)?;
    if out.shape() != x.shape() || out.dtype() != x.dtype() {
        return Err(Error::shape("out", format!("{:?} of {}, as x", x.shape(), x.dtype()), out.shape()));
    }
    let (tokens, slots) = (ids.shape()[0], ids.shape()[1]);
    let id = |pair: usize| ids.integer(&[pair / slots, pair % slots]);
    let routing = Routing::new((0..tokens * slots).map(id), slots, weights.gate_up.shape()[0]);
    let layer = Layer { x, weights, routing, width, hidden };
    match layer.x.dtype() {
        Dtype::F32 => typed::<f32>(&layer, scores, out),
        Dtype::F64 => typed::<f64>(&layer, scores, out),
        Dtype::F16 => typed::<f16>(&layer, scores, out),
        _ => typed::<bf16>(&layer, scores, out),
    }
}

fn check(x: &Array<'_>, ids: &Array<'_>, scores: &Array<'_>, weights: &Weights<'_>) -> Result<(usize, usize)> {
    let Weights { gate_up, down, gate_up_bias, down_bias, activation, .. } = weights;
    if x.shape().len() != 2 {
        return Err(Error::shape("x", "rank 2 [tokens, width]", x.shape()).hint("flatten batch and sequence"));
    }
    if !matches!(x.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16) {
        return Err(Error::dtype("x", "float32, float64, float16 or bfloat16", x.dtype()));
    }
    let (tokens, width) = (x.shape()[0], x.shape()[1]);
    if gate_up.shape().len() != 3 || gate_up.shape()[2] != width {
        return Err(Error::shape("gate_up", format!("[experts, features, {width}], to match x"), gate_up.shape()));
    }
    let (experts, features) = (gate_up.shape()[0], gate_up.shape()[1]);
    if activation.gated() && !features.is_multiple_of(2) {
        return Err(Error::shape(
            "gate_up",
            "an even number of features (gates and ups) for a gated activation",
            gate_up.shape(),
        ));
    }
    let hidden = if activation.gated() { features / 2 } else { features };
    if down.shape() != [experts, width, hidden] {
        return Err(Error::shape(
            "down",
            format!("[experts, width, hidden] = [{experts}, {width}, {hidden}]"),
            down.shape(),
        ));
    }
    for (name, bias, shape) in
        [("gate_up_bias", gate_up_bias, [experts, features]), ("down_bias", down_bias, [experts, width])]
    {
        if let Some(bias) = bias
            && bias.shape() != shape
        {
            return Err(Error::shape(name, format!("{shape:?}"), bias.shape()));
        }
    }
    let others = [
        ("gate_up", Some(gate_up)),
        ("down", Some(down)),
        ("gate_up_bias", gate_up_bias.as_ref()),
        ("down_bias", down_bias.as_ref()),
    ];
    for (name, array) in others {
        if let Some(array) = array
            && array.dtype() != x.dtype()
        {
            return Err(Error::dtype(name, format!("{}, as x", x.dtype()), array.dtype()).hint("convert one of them"));
        }
    }
    if !matches!(ids.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("expert_ids", "int32 or int64", ids.dtype()));
    }
    if ids.shape().len() != 2 || ids.shape()[0] != tokens {
        return Err(Error::shape("expert_ids", format!("[{tokens}, slots], to match x"), ids.shape()));
    }
    if scores.shape() != ids.shape() {
        return Err(Error::shape("weights", format!("{:?}, as expert_ids", ids.shape()), scores.shape()));
    }
    Ok((width, hidden))
}

fn typed<S: Arithmetic>(layer: &Layer<'_>, scores: &Array<'_>, out: ArrayMut<'_>) -> Result<()> {
    let slots = scores.shape()[1];
    let scores: Vec<S::Acc> = match scores.dtype() {
        Dtype::F32 => read::<f32, S::Acc>(scores),
        Dtype::F64 => read::<f64, S::Acc>(scores),
        Dtype::F16 => read::<f16, S::Acc>(scores),
        Dtype::Bf16 => read::<bf16, S::Acc>(scores),
        other => return Err(Error::dtype("weights", "a floating type", other)),
    };
    let count = layer.routing.tokens.len();
    // Every row is written by stage 1 or 2 before stage 3 reads it.
    let mut sums = Buffer::<S::Acc>::new(count * layer.width);
    if count > 0 && layer.width > 0 {
        let sums = ArrayMut::from_slice(&mut sums, &[count, layer.width])?.segments::<S::Acc>(lines::SEGMENT);
        let (many, few) = plan(layer);
        let hidden_rows = if few.is_empty() { 0 } else { count };
        let mut hidden = vec![S::narrow(S::Acc::ZERO); hidden_rows * layer.hidden];
        let serial = count.saturating_mul(layer.width).saturating_mul(layer.hidden) <= SERIAL_WORK;
        {
            let hidden = ArrayMut::from_slice(&mut hidden, &[hidden_rows, layer.hidden])?.segments::<S>(lines::SEGMENT);
            let first = many.len();
            let segments = layer.hidden.div_ceil(lines::SEGMENT);
            threads::for_each(
                first + few.len() * segments,
                serial,
                || (panels::Scratch::<S>::default(), lines::Scratch::<S>::default()),
                |task, (wide, thin)| {
                    if task < first {
                        let (expert, rows) = &many[task];
                        panels::run(layer, *expert, rows.clone(), wide, &sums);
                    } else {
                        let task = task - first;
                        lines::first_product(layer, few[task / segments], task % segments, thin, &hidden);
                    }
                },
            )?;
        }
        let hidden = Matrix::new(&hidden, hidden_rows, layer.hidden, layer.hidden);
        let segments = layer.width.div_ceil(lines::SEGMENT);
        threads::for_each(few.len() * segments, serial, lines::Scratch::<S>::default, |task, thin| {
            lines::second_product(layer, few[task / segments], task % segments, hidden, thin, &sums);
        })?;
    }
    aggregate::<S>(layer, &sums, &scores, slots, out)
}

fn read<F: Float, A: Real>(array: &Array<'_>) -> Vec<A> {
    let matrix = array.matrix::<F>(&[]);
    (0..matrix.rows()).flat_map(|i| (0..matrix.cols()).map(move |j| A::of(matrix.at(i, j).widen().f64()))).collect()
}

/// Tasks of experts with many rows (expert, rows), longest first, and the experts with few.
fn plan(layer: &Layer<'_>) -> (Vec<(usize, std::ops::Range<usize>)>, Vec<usize>) {
    let (mut many, mut few) = (Vec::new(), Vec::new());
    for expert in 0..layer.experts() {
        let rows = layer.routing.of(expert);
        if rows.is_empty() {
            continue;
        }
        if rows.len() <= lines::FEW {
            few.push(expert);
            continue;
        }
        let blocks = rows.len().div_ceil(panels::ROWS);
        let each = rows.len().div_ceil(blocks).next_multiple_of(16);
        many.extend(rows.clone().step_by(each).map(|start| (expert, start..rows.end.min(start + each))));
    }
    many.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.len()));
    (many, few)
}

/// Stage 3.
fn aggregate<S: Arithmetic>(
    layer: &Layer<'_>,
    sums: &[S::Acc],
    scores: &[S::Acc],
    slots: usize,
    out: ArrayMut<'_>,
) -> Result<()> {
    const TOKENS: usize = 32;
    let tokens = layer.x.shape()[0];
    let width = layer.width;
    let out = out.rows::<S>();
    let table = S::Acc::table();
    threads::for_each(
        tokens.div_ceil(TOKENS),
        tokens * width * slots <= SERIAL_WORK,
        || vec![S::Acc::ZERO; width],
        |task, sum| {
            for token in task * TOKENS..tokens.min((task + 1) * TOKENS) {
                sum.fill(S::Acc::ZERO);
                for pair in token * slots..(token + 1) * slots {
                    let row = layer.routing.rows[pair];
                    if row != NONE {
                        table.add_scaled(sum, &sums[row * width..(row + 1) * width], scores[pair]);
                    }
                }
                S::round(sum, out.take(token));
            }
        },
    )
}
