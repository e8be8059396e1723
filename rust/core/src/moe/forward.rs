//! The expert layer: `out[t] = sum over slots k of weight[t, k] * expert[id[t, k]](x[t])`.
//!
//! `expert(x) = act(x W_in^T + b_in) W_out^T + b_out`. Three stages, each a parallel loop over independent tasks:
//!
//! ```text
//! 1. experts with many rows: whole tasks (gather, first product, activation, second product)
//!    experts with few rows:  first product and activation, by segments of features
//! 2. experts with few rows:  second product, by segments of outputs
//! 3. per token: the weighted sum of its rows, in pair order, in the accumulator's type, rounded once
//! ```
//! A row's value depends on its token and expert alone, so results depend on neither the threads nor the batch split.
//! Training asks for the pre-activation (the first product with its bias) too: it is all that the backward pass needs
//! beside the inputs.

use super::aggregate::aggregate;
use super::problem::{Layer, Pairs, Weights};
use super::{lines, panels};
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::scratch::Buffer;
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix, Rows};
use half::{bf16, f16};

/// Runs the layer. `x` [tokens, d]; `out` [tokens, d] of x's type; `pre_activation` [pairs, 2n or n] of x's type: the
/// first product, rows grouped by expert (see [`Routing`](super::routing::Routing)), all gates then all ups whatever
/// the weights' layout, zeros where there is no row.
///
/// # Errors
/// Wrong ranks, extents or types; see the messages.
pub fn forward(
    x: Array<'_>,
    pairs: &Pairs<'_>,
    weights: Weights<'_>,
    out: ArrayMut<'_>,
    pre_activation: Option<ArrayMut<'_>>,
) -> Result<()> {
    let layer = Layer::new(x, pairs, weights)?;
    let x = &layer.x;
    if out.shape() != x.shape() || out.dtype() != x.dtype() {
        return Err(Error::shape("out", format!("{:?} of {}, as x", x.shape(), x.dtype()), out.shape()));
    }
    if pre_activation.is_some() {
        layer.refuse_int8()?;
    }
    let shape = [layer.routing.rows.len(), layer.halves() * layer.hidden];
    if let Some(array) = &pre_activation
        && (array.shape() != shape || array.dtype() != x.dtype())
    {
        return Err(Error::shape("pre_activation", format!("{shape:?} of {}, as x", x.dtype()), array.shape()));
    }
    match x.dtype() {
        Dtype::F32 => typed::<f32>(&layer, pairs, out, pre_activation),
        Dtype::F64 => typed::<f64>(&layer, pairs, out, pre_activation),
        Dtype::F16 => typed::<f16>(&layer, pairs, out, pre_activation),
        _ => typed::<bf16>(&layer, pairs, out, pre_activation),
    }
}

fn typed<S: Arithmetic>(
    layer: &Layer<'_>,
    pairs: &Pairs<'_>,
    out: ArrayMut<'_>,
    pre_activation: Option<ArrayMut<'_>>,
) -> Result<()> {
    let scores = Layer::scores::<S::Acc>(pairs)?;
    let count = layer.routing.count();
    // Every row is written by stage 1 or 2 before stage 3 reads it.
    let mut sums = Buffer::<S::Acc>::new(count * layer.width);
    let pre = pre_activation.map(|array| array.fresh().split_last(layer.halves()).segments::<S>(lines::SEGMENT));
    if let Some(pre) = &pre {
        // Pairs without a row leave the last rows over.
        for segment in count * layer.halves() * pre.per_row()..pre.len() {
            pre.take(segment).fill(S::narrow(S::Acc::ZERO));
        }
    }
    if count > 0 && (layer.width > 0 || pre.is_some()) {
        products::<S>(layer, &mut sums, pre.as_ref())?;
    }
    aggregate::<S>(&layer.routing, layer.tokens(), layer.width, &sums, Some(&scores), out)
}

/// Stages 1 and 2.
fn products<S: Arithmetic>(layer: &Layer<'_>, sums: &mut [S::Acc], pre: Option<&Rows<'_, S>>) -> Result<()> {
    let count = layer.routing.count();
    let sums = ArrayMut::from_slice(sums, &[count, layer.width])?.segments::<S::Acc>(lines::SEGMENT);
    let many = layer.routing.blocks(panels::ROWS, lines::FEW + 1);
    let few: Vec<usize> =
        (0..layer.experts()).filter(|&expert| (1..=lines::FEW).contains(&layer.routing.of(expert).len())).collect();
    let hidden_rows = if few.is_empty() { 0 } else { count };
    let mut hidden = vec![S::narrow(S::Acc::ZERO); hidden_rows * layer.hidden];
    let serial = layer.work() <= SERIAL_WORK;
    // The expert after task `task`, where it is the last of its own.
    let next = |task: usize, segments: usize| {
        let last = (task + 1).is_multiple_of(segments);
        few.get((task + 1) / segments).filter(|_| last).copied()
    };
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
                    panels::run(layer, *expert, rows.clone(), wide, pre, &sums);
                } else {
                    let task = task - first;
                    lines::first_product(
                        layer,
                        few[task / segments],
                        next(task, segments),
                        task % segments,
                        thin,
                        pre,
                        &hidden,
                    );
                }
            },
        )?;
    }
    let hidden = Matrix::new(&hidden, hidden_rows, layer.hidden, layer.hidden);
    let segments = layer.width.div_ceil(lines::SEGMENT);
    threads::for_each(few.len() * segments, serial, lines::Scratch::<S>::default, |task, thin| {
        lines::second_product(layer, few[task / segments], next(task, segments), task % segments, hidden, thin, &sums);
    })
}
