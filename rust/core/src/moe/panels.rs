//! Experts with many rows: tokens in lanes, weights by broadcast.
//!
//! ```text
//! X panels = gathered tokens, transposed                  [d, up to 48 tokens] each
//! for each block of features:
//!     for each panel: H = W_in X;  A panel[features] = act(H)
//! for each block of outputs:
//!     for each panel: Y = W_out A;  transposed into the rows' sums
//! ```
//! Departures: (1) the gather is the packing of the panel, tokens are never copied otherwise; (2) lanes are tokens in
//! both products, so the activation's output *is* the second product's panel: no transposition, no store to memory in
//! between; (3) weights are streamed once per block of up to [`ROWS`] tokens, asked for a
//! block ahead while the one before is multiplied; rows that cannot be read in place (bytes among them) are copied
//! compactly, as units.

use super::lines;
use super::problem::Layer;
use super::weight::{Scale, Weight};
use crate::arch::{Ahead, Kernel};
use crate::dtype::Real;
use crate::gemm::accumulate;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::{self, Lines, line_stride};
use crate::view::{Matrix, Rows};
use std::ops::Range;

/// Tokens in a task.
pub const ROWS: usize = 288;
/// Features or outputs whose weights are copied at a time, and features in a segment of the pre-activation.
const FEATURES: usize = lines::SEGMENT;

/// Buffers of one thread.
pub struct Scratch<S: Arithmetic> {
    lines: Vec<S::Unit>,
    tokens: Vec<S::Unit>,
    active: Vec<S::Unit>,
    weights: Vec<S::Unit>,
    gate: Vec<S::Acc>,
    up: Vec<S::Acc>,
    ahead: Ahead,
}

impl<S: Arithmetic> Default for Scratch<S> {
    fn default() -> Self {
        Self {
            lines: Vec::new(),
            tokens: Vec::new(),
            active: Vec::new(),
            weights: Vec::new(),
            gate: Vec::new(),
            up: Vec::new(),
            ahead: Ahead::default(),
        }
    }
}

/// Panels of a block of tokens: (first row, rows, lanes), as even as registers allow: a panel of one register reads
/// as much to multiply as one of three.
fn panels<S: Arithmetic>(rows: &Range<usize>) -> Vec<(usize, usize, usize)> {
    let registers = rows.len().div_ceil(S::lanes());
    let count = rows.len().div_ceil(S::panel());
    let mut start = rows.start;
    let mut cut = |panel: usize| {
        let width = S::lanes() * (registers / count + usize::from(panel < registers % count));
        let part = (start, width.min(rows.end - start), width);
        start += part.1;
        part
    };
    (0..count).map(&mut cut).collect()
}

/// One task: all products of `rows` (rows of `expert`), into `sums`.
pub fn run<S: Arithmetic>(
    layer: &Layer<'_>,
    expert: usize,
    rows: Range<usize>,
    scratch: &mut Scratch<S>,
    pre: Option<&Rows<'_, S>>,
    sums: &Rows<'_, S::Acc>,
) {
    let panels = panels::<S>(&rows);
    let (depth, hidden) = (S::units(layer.width), S::units(layer.hidden));
    let full = S::panel();
    let Scratch { lines, tokens, active, weights, gate, up, ahead } = scratch;
    grow(tokens, panels.len() * full * depth);
    grow(active, panels.len() * full * hidden);
    grow(gate, FEATURES * full);
    grow(up, FEATURES * full);
    let x = layer.x.matrix::<S>(&[]);
    for (p, &(start, count, width)) in panels.iter().enumerate() {
        let gathered = Lines::gathered(x, &layer.routing.tokens[start..start + count]);
        pack::panel(&gathered, 0, count, width, lines, &mut tokens[p * full * depth..][..width * depth]);
    }
    let table = S::Acc::table();
    let down = Weight::<S>::of(&layer.weights.down, expert);
    let weight = Weight::<S>::of(&layer.weights.gate_up, expert);
    let scale = Scale::of(layer.weights.gate_up_scale.as_ref(), expert);
    let stride = line_stride(depth);
    for first in (0..layer.hidden).step_by(FEATURES) {
        let count = FEATURES.min(layer.hidden - first);
        let (gates, ups) = layer.feature_rows(first, count);
        let all: Vec<usize> = gates.iter().chain(&ups).copied().collect();
        let (gate_lines, up_lines) = weight.in_place(&gates).zip(weight.in_place(&ups)).unwrap_or_else(|| {
            weight.compact(&all, stride, weights);
            let copied = Matrix::new(weights, all.len(), depth, stride);
            (copied.part(0..count, 0..depth), copied.part(count..all.len(), 0..depth))
        });
        let following = first + FEATURES..layer.hidden.min(first + 2 * FEATURES).max(first + FEATURES);
        if following.is_empty() {
            down.ask(0..FEATURES.min(layer.width), ahead);
        } else {
            let (gates, ups) = layer.feature_rows(following.start, following.len());
            weight.ask(gates.into_iter().chain(ups), ahead);
        }
        for (p, &(row, tokens_in, width)) in panels.iter().enumerate() {
            let panel = Matrix::new(&tokens[p * full * depth..][..depth * width], depth, width, width);
            accumulate::<S>(gate_lines, panel, gate, width, ahead);
            finish(gate, &gates, width, scale, |row| layer.gate_up_bias::<S>(expert, row));
            if !ups.is_empty() {
                accumulate::<S>(up_lines, panel, up, width, ahead);
                finish(up, &ups, width, scale, |row| layer.gate_up_bias::<S>(expert, row));
            }
            if let Some(pre) = pre {
                for (half, block) in [&*gate, &*up].into_iter().enumerate().take(layer.halves()) {
                    let number = |r: usize| ((row + r) * layer.halves() + half) * pre.per_row() + first / FEATURES;
                    let mut parts: Vec<&mut [S]> = (0..tokens_in).map(|r| pre.take(number(r))).collect();
                    S::unpack(block, count, width, &mut parts);
                }
            }
            let block = count * width;
            table.activation(layer.weights.activation, &mut gate[..block], (!ups.is_empty()).then_some(&up[..block]));
            S::seal(gate, count, width, &mut active[p * full * hidden + first / S::PER_UNIT * width..]);
        }
    }
    let scale = Scale::of(layer.weights.down_scale.as_ref(), expert);
    let stride = line_stride(hidden);
    for first in (0..layer.width).step_by(lines::SEGMENT) {
        let segment = lines::SEGMENT.min(layer.width - first);
        let mut targets: Vec<&mut [S::Acc]> =
            rows.clone().map(|row| sums.take(row * sums.per_row() + first / lines::SEGMENT)).collect();
        for start in (0..segment).step_by(FEATURES) {
            let count = FEATURES.min(segment - start);
            let outputs: Vec<usize> = (first + start..first + start + count).collect();
            let down_lines = down.in_place(&outputs).unwrap_or_else(|| {
                down.compact(&outputs, stride, weights);
                Matrix::new(weights, count, hidden, stride)
            });
            let next = first + start + count;
            down.ask(next..layer.width.min(next + FEATURES), ahead);
            for (p, &(row, tokens, width)) in panels.iter().enumerate() {
                let panel = Matrix::new(&active[p * full * hidden..][..hidden * width], hidden, width, width);
                accumulate::<S>(down_lines, panel, gate, width, ahead);
                finish(gate, &outputs, width, scale, |output| layer.down_bias::<S>(expert, output));
                let place = row - rows.start;
                let mut parts: Vec<&mut [S::Acc]> =
                    targets[place..place + tokens].iter_mut().map(|target| &mut target[start..start + count]).collect();
                table.unpack(gate, count, width, &mut parts);
            }
        }
    }
}

fn grow<U: Copy + Default>(buffer: &mut Vec<U>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, U::default());
    }
}

/// Scales, then biases.
fn finish<T: Real>(block: &mut [T], rows: &[usize], width: usize, scale: Scale<'_>, bias: impl Fn(usize) -> T) {
    for (line, &row) in block.chunks_mut(width).zip(rows) {
        scale.apply_all(row, line);
        let bias = bias(row);
        if bias != T::ZERO {
            for value in line {
                *value = *value + bias;
            }
        }
    }
}
