//! The way back through the layer, down to its input.
//!
//! ```text
//! hidden: for each block of an expert's rows, each group of features:
//!     gather the rows of dO; stack W_out's columns
//!     A' = dO W_out                                   [rows, features], accumulators
//!     for each row: (dH, s A, <A', A>) from (H, A', s)
//! input:  for each block of an expert's rows, each group of columns:
//!     stack W_in's columns; dXt = dH W_in             [rows, columns], accumulators
//! ```
//! Departures: (1) lanes are features (columns), tokens are broadcast: dO, H, dH and dXt are read and written as rows,
//! and weights need no transposition, as the reduction runs across their rows; (2) a group of features is fixed at
//! [`GROUP`], so the parts of a weight's gradient do not depend on how work is cut.

use super::backward::Stage;
use crate::arch::{Ahead, Kernel};
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::chunk;
use crate::gemm::pack::{self, Lines, line_stride};
use crate::threads;
use crate::view::{ArrayMut, Matrix};
use std::ops::Range;

/// Features (columns) in a group: a multiple of every panel's width.
pub const GROUP: usize = 384;
/// Rows in a block.
const ROWS: usize = 288;

/// Buffers of one thread.
struct Scratch<S: Arithmetic> {
    left: Vec<S::Unit>,
    right: Vec<S::Unit>,
    block: Vec<S::Acc>,
    gate: Vec<S::Acc>,
    up: Vec<S::Acc>,
    line: Vec<S::Unit>,
    ahead: Ahead,
}

impl<S: Arithmetic> Scratch<S> {
    fn new() -> Self {
        Self {
            left: Vec::new(),
            right: Vec::new(),
            block: vec![S::Acc::ZERO; ROWS * GROUP],
            gate: vec![S::Acc::ZERO; GROUP],
            up: vec![S::Acc::ZERO; GROUP],
            line: Vec::new(),
            ahead: Ahead::default(),
        }
    }
}

/// `block[r, c] = sum over k of left[r, k] * lines[k, columns.start + c]`, rows `GROUP` apart; lanes past the columns,
/// up to whole registers, are zero.
///
/// The lines are stacked chunk by chunk: what is stacked stays in the second-level cache until it is multiplied,
/// and the next chunk comes from memory meanwhile.
fn product<S: Arithmetic>(
    left: Matrix<'_, S::Unit>,
    lines: &Lines<'_, S>,
    columns: Range<usize>,
    scratch: (&mut Vec<S::Unit>, &mut Vec<S::Unit>, &mut Ahead),
    block: &mut [S::Acc],
) {
    let (right, line, ahead) = scratch;
    let full = S::panel();
    let chunk = chunk::<S>(full);
    let mut start = 0;
    loop {
        let end = left.cols().min(start + chunk);
        let part = lines.range(start * S::PER_UNIT..lines.len().min(end * S::PER_UNIT));
        let units = pack::stacked(&part, columns.clone(), full, right, line);
        let following = end * S::PER_UNIT..lines.len().min((end + chunk) * S::PER_UNIT).max(end * S::PER_UNIT);
        ahead.set(following.filter_map(|k| lines.line(k).part(0..1, columns.clone()).row(0)));
        for (p, first) in columns.clone().step_by(full).enumerate() {
            let width = full.min((columns.end - first).next_multiple_of(S::lanes()));
            let panel = Matrix::new(&right[p * pack::block_step(units, full)..], units, width, full);
            let left = left.part(0..left.rows(), start..end);
            S::tile_ahead(left, panel, &mut block[p * full..], GROUP, start > 0, ahead);
        }
        start = end;
        if start >= left.cols() {
            break;
        }
    }
}

/// dH into `slopes` (rows [`Stage::slope_stride`] apart: all gates, then all ups), `s A` into `active`, and the parts of
/// `<A', A> + <g, b_out>` into `products` [rows, groups].
pub(super) fn hidden<S: Arithmetic>(
    stage: &Stage<'_, S>,
    slopes: &mut [S],
    active: &mut [S],
    products: &mut [S::Acc],
) -> Result<()> {
    let layer = stage.layer;
    let (n, halves, count) = (layer.hidden, layer.halves(), layer.routing.count());
    let groups = n.div_ceil(GROUP).max(1);
    let slopes = ArrayMut::from_slice_strided(slopes, &[count, halves, n], &[stage.slope_stride, n, 1])?;
    let slopes = slopes.segments::<S>(GROUP);
    let active = ArrayMut::from_slice(active, &[count, n])?.segments::<S>(GROUP);
    let products = ArrayMut::from_slice(products, &[count, groups])?.segments::<S::Acc>(1);
    let blocks = layer.routing.blocks(ROWS, 1);
    let stride = line_stride(S::units(layer.width));
    let table = S::Acc::table();
    threads::for_each(blocks.len() * groups, stage.serial, Scratch::<S>::new, |task, scratch| {
        let (expert, rows) = &blocks[task / groups];
        let group = task % groups;
        let columns = group * GROUP..n.min((group + 1) * GROUP);
        let padded = columns.len().next_multiple_of(S::lanes());
        let Scratch { left, right, block, gate, up, line, ahead } = scratch;
        let gathered = Lines::gathered(stage.grad, &layer.routing.tokens[rows.clone()]);
        pack::compact(&gathered, 0, rows.len(), stride, left);
        let left = Matrix::new(left, rows.len(), S::units(layer.width), stride);
        let weights = layer.weights.down.matrix::<S>(&[*expert]);
        product::<S>(left, &Lines::all(weights), columns.clone(), (right, line, ahead), block);
        let bias = if group == 0 { down_bias::<S>(stage, *expert) } else { Vec::new() };
        for (row, grad) in rows.clone().zip(block.chunks_mut(GROUP)) {
            let grad = &mut grad[..padded];
            let score = stage.scores[layer.routing.pairs[row]];
            let load = |half: usize, to: &mut [S::Acc]| {
                let source = stage.pre.part(row..row + 1, half * n + columns.start..half * n + columns.end);
                widen(source, &mut to[..columns.len()]);
                to[columns.len()..padded].fill(S::Acc::ZERO);
            };
            load(0, gate);
            if halves == 2 {
                load(1, up);
            }
            let other = (halves == 2).then_some(&mut up[..padded]);
            let mut dot = table.gradient(layer.weights.activation, &mut gate[..padded], other, grad, score);
            for (c, &value) in bias.iter().enumerate() {
                dot = dot + value * stage.grad.at(layer.routing.tokens[row], c).widen();
            }
            products.take(row * groups + group)[0] = dot;
            for (half, slope) in [&*gate, &*up].into_iter().enumerate().take(halves) {
                if !columns.is_empty() {
                    S::round(&slope[..columns.len()], slopes.take((row * halves + half) * groups + group));
                }
            }
            if !columns.is_empty() {
                S::round(&grad[..columns.len()], active.take(row * groups + group));
            }
        }
    })
}

/// The bias of an expert's output; empty without one.
fn down_bias<S: Arithmetic>(stage: &Stage<'_, S>, expert: usize) -> Vec<S::Acc> {
    if stage.layer.weights.down_bias.is_none() {
        return Vec::new();
    }
    (0..stage.layer.width).map(|c| stage.layer.down_bias::<S>(expert, c)).collect()
}

/// A row of any stride, widened.
pub(super) fn widen<S: Arithmetic>(from: Matrix<'_, S>, to: &mut [S::Acc]) {
    match from.row(0) {
        Some(row) => S::widen_row(row, to),
        None => (0..from.cols()).for_each(|c| to[c] = from.at(0, c).widen()),
    }
}

/// Gradients of the rows' inputs, `dH W_in`, into `out` [rows, d].
pub(super) fn input<S: Arithmetic>(stage: &Stage<'_, S>, slopes: Matrix<'_, S>, out: &mut [S::Acc]) -> Result<()> {
    let layer = stage.layer;
    let (d, count) = (layer.width, layer.routing.count());
    let groups = d.div_ceil(GROUP);
    let out = ArrayMut::from_slice(out, &[count, d])?.segments::<S::Acc>(GROUP);
    let blocks = layer.routing.blocks(ROWS, 1);
    // dH holds all gates, then all ups; the weights' rows in that order.
    let order: Vec<usize> = (0..layer.halves() * layer.hidden).map(|i| layer.column_row(i)).collect();
    let natural = order.iter().enumerate().all(|(at, &row)| at == row);
    let units = S::units(order.len());
    let stride = line_stride(units);
    threads::for_each(blocks.len() * groups, stage.serial, Scratch::<S>::new, |task, scratch| {
        let (expert, rows) = &blocks[task / groups];
        let group = task % groups;
        let columns = group * GROUP..d.min((group + 1) * GROUP);
        let Scratch { left, right, block, line, ahead, .. } = scratch;
        let own = slopes.part(rows.clone(), 0..order.len());
        let left = S::borrow(own).unwrap_or_else(|| {
            pack::compact(&Lines::all(own), 0, rows.len(), stride, left);
            Matrix::new(left, rows.len(), units, stride)
        });
        let matrix = layer.weights.gate_up.matrix::<S>(&[*expert]);
        let lines = if natural { Lines::all(matrix) } else { Lines::gathered(matrix, &order) };
        product::<S>(left, &lines, columns.clone(), (right, line, ahead), block);
        for (row, sums) in rows.clone().zip(block.chunks(GROUP)) {
            out.take(row * groups + group).copy_from_slice(&sums[..columns.len()]);
        }
    })
}
