//! Experts with few rows: every weight is read once, so memory decides. Work is cut by segments of features (first
//! product) and of outputs (second product), so that one hot expert keeps all cores busy, and so do many tiny ones.

use super::problem::Layer;
use super::weight::{Few, Scale, Weight};
use crate::arch::Kernel;
use crate::dtype::Real;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::Lines;
use crate::view::{Array, Matrix, Rows};

/// Up to this many rows an expert is one of few.
pub const FEW: usize = 12;
/// Features or outputs in a task.
pub const SEGMENT: usize = 96;

/// Buffers of one thread.
pub struct Scratch<S: Arithmetic> {
    left: Few<S>,
    gate: Vec<S::Acc>,
    up: Vec<S::Acc>,
}

impl<S: Arithmetic> Default for Scratch<S> {
    fn default() -> Self {
        Self { left: Few::default(), gate: Vec::new(), up: Vec::new() }
    }
}

/// Activated features of segment `segment` (the last one before expert `next`) for all rows of `expert`, into `hidden` (rounded to the source type, as
/// the second product reads them).
pub fn first_product<S: Arithmetic>(
    layer: &Layer<'_>,
    expert: usize,
    next: Option<usize>,
    segment: usize,
    scratch: &mut Scratch<S>,
    pre: Option<&Rows<'_, S>>,
    hidden: &Rows<'_, S>,
) {
    let rows = layer.routing.of(expert);
    let first = segment * SEGMENT;
    let count = SEGMENT.min(layer.hidden - first);
    // The activation works on whole registers.
    let padded = count.next_multiple_of(S::lanes());
    let Scratch { left, gate, up } = scratch;
    let x = Lines::gathered(layer.x.matrix::<S>(&[]), &layer.routing.tokens[rows.clone()]);
    let weight = Weight::of(&layer.weights.gate_up, expert);
    let scale = Scale::of(layer.weights.gate_up_scale.as_ref(), expert);
    left.load(&x, 0..rows.len(), weight);
    ask_next::<S>(&layer.weights.gate_up, next);
    let (gates, ups) = layer.feature_rows(first, count);
    let mut half = |numbers: &[usize], sums: &mut Vec<S::Acc>| {
        sums.clear();
        sums.resize(rows.len() * padded, S::Acc::ZERO);
        // Adjacent rows are one matrix; interleaved ones are every other row: a matrix with twice the distance.
        let step = numbers.get(1).map_or(1, |second| second - numbers[0]);
        left.products(weight.every(numbers[0], numbers.len(), step), sums, padded);
        for line in sums.chunks_mut(padded) {
            for (value, &row) in line.iter_mut().zip(numbers) {
                *value = scale.apply(row, *value) + layer.gate_up_bias::<S>(expert, row);
            }
        }
    };
    if let Some(&first) = ups.first() {
        weight.ask_start(first);
    }
    half(&gates, gate);
    if !ups.is_empty() {
        half(&ups, up);
    }
    if let Some(pre) = pre {
        for (half, block) in [&*gate, &*up].into_iter().enumerate().take(layer.halves()) {
            for (line, row) in block.chunks(padded).zip(rows.clone()) {
                let target = pre.take((row * layer.halves() + half) * pre.per_row() + segment);
                S::round(&line[..target.len()], target);
            }
        }
    }
    S::Acc::table().activation(layer.weights.activation, gate, (!ups.is_empty()).then_some(&up[..]));
    for (line, row) in gate.chunks(padded).zip(rows) {
        let target = hidden.take(row * hidden.per_row() + segment);
        S::round(&line[..target.len()], target);
    }
}

/// Outputs of segment `segment` for all rows of `expert`, into `sums`.
pub fn second_product<S: Arithmetic>(
    layer: &Layer<'_>,
    expert: usize,
    next: Option<usize>,
    segment: usize,
    hidden: Matrix<'_, S>,
    scratch: &mut Scratch<S>,
    sums: &Rows<'_, S::Acc>,
) {
    let rows = layer.routing.of(expert);
    let first = segment * SEGMENT;
    let count = SEGMENT.min(layer.width - first);
    let Scratch { left, gate, .. } = scratch;
    let weight = Weight::of(&layer.weights.down, expert);
    let scale = Scale::of(layer.weights.down_scale.as_ref(), expert);
    left.load(&Lines::all(hidden), rows.clone(), weight);
    ask_next::<S>(&layer.weights.down, next);
    gate.clear();
    gate.resize(rows.len() * count, S::Acc::ZERO);
    left.products(weight.every(first, count, 1), gate, count);
    for (line, row) in gate.chunks(count).zip(rows) {
        for ((value, &sum), output) in sums.take(row * sums.per_row() + segment).iter_mut().zip(line).zip(first..) {
            *value = scale.apply(output, sum) + layer.down_bias::<S>(expert, output);
        }
    }
}

/// Asks for the start of the expert that follows, in an expert's last segment.
fn ask_next<S: Arithmetic>(weight: &Array<'_>, next: Option<usize>) {
    if let Some(expert) = next {
        Weight::<S>::of(weight, expert).ask_start(0);
    }
}
