//! Gradients of the weights: for each expert, products over its rows, `dW_out = dO^T (s A)` and `dW_in = dH^T X`.
//!
//! ```text
//! for each expert, each block of lines of the result:
//!     stack the left operand's columns (rows gathered), a few lines a block
//!     for each group of columns of the result:
//!         stack the right operand's columns (rows gathered)
//!         for each strip of lines, each panel of the group:
//!             C = left^T right                        one pass over the expert's rows, rounded once
//! ```
//! Departures: (1) the gather is the packing: neither X nor dO is ever copied row by row; (2) the result is cut into
//! tasks, never the rows, so nothing is reduced across threads; (3) experts without rows get zeros here, since their
//! memory is not initialised; (4) what a strip will write is asked for while the one before is multiplied.

use super::backward::Stage;
use super::slopes::widen;
use crate::arch::{Ahead, Kernel};
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::{self, Lines};
use crate::gemm::{accumulate_across, across};
use crate::threads;
use crate::view::{ArrayMut, Matrix, Rows};
use std::ops::Range;

/// Columns of the result whose right operand is stacked at a time.
const GROUP: usize = 384;
/// Lines of the result that are multiplied at a time: a multiple of every block of the left operand.
const STRIP: usize = 96;
/// Most lines of the result in a task.
const LINES: usize = 2048;
/// Size of the stacked left operand.
const LEFT_BYTES: usize = 768 << 10;

/// Buffers of one thread.
struct Scratch<S: Arithmetic> {
    left: Vec<S::Unit>,
    right: Vec<S::Unit>,
    line: Vec<S::Unit>,
    block: Vec<S::Acc>,
    ahead: Ahead,
}

/// One product: `out[number(i), j] = sum over rows r of left[r, i] * right[r, j]` for lines i.
struct Product<'a, S: Arithmetic> {
    left: Lines<'a, S>,
    right: Lines<'a, S>,
    lines: Range<usize>,
    columns: Range<usize>,
}

impl<S: Arithmetic> Product<'_, S> {
    fn run(&self, out: &Rows<'_, S>, number: impl Fn(usize) -> usize, scratch: &mut Scratch<S>) {
        let Scratch { left, right, line, block, ahead } = scratch;
        let full = S::panel();
        let units = S::units(self.left.len());
        let across = across::<S>(units);
        if units > 0 {
            pack::stacked(&self.left, self.lines.clone(), across, left, line);
            block.resize((STRIP * full).max(block.len()), S::Acc::ZERO);
        }
        let origin = self.columns.start;
        let segment = |i: usize| out.take(number(i) * out.per_row() + origin / out.segment());
        let mut targets: Vec<&mut [S]> = self.lines.clone().map(segment).collect();
        if units == 0 {
            return targets.iter_mut().for_each(|target| target.fill(S::narrow(S::Acc::ZERO)));
        }
        for start in self.columns.clone().step_by(GROUP) {
            let end = self.columns.end.min(start + GROUP);
            pack::stacked(&self.right, start..end, full, right, line);
            for first in self.lines.clone().step_by(STRIP) {
                let lines = STRIP.min(self.lines.end - first);
                let at = first - self.lines.start;
                let columns = start - origin..end - origin;
                let next = (at + lines).min(targets.len())..(at + lines + STRIP).min(targets.len());
                ahead.set(targets[next].iter().map(|target| &target[columns.clone()]));
                let targets = &mut targets[at..at + lines];
                let strip = &left[(first - self.lines.start) / across * pack::block_step(units, across)..];
                for (p, column) in (start..end).step_by(full).enumerate() {
                    let count = full.min(end - column);
                    let width = count.next_multiple_of(S::lanes());
                    let panel = Matrix::new(&right[p * pack::block_step(units, full)..], units, width, full);
                    accumulate_across::<S>(strip, lines, panel, block, full, ahead);
                    S::round_rows(block, full, targets, column - origin..column - origin + count);
                }
            }
        }
    }
}

/// Gradients of both weights; those without an output are left out.
pub(super) fn weights<S: Arithmetic>(
    stage: &Stage<'_, S>,
    slopes: Matrix<'_, S>,
    active: Matrix<'_, S>,
    gate_up: Option<ArrayMut<'_>>,
    down: Option<ArrayMut<'_>>,
) -> Result<()> {
    let layer = stage.layer;
    let (d, n, halves) = (layer.width, layer.hidden, layer.halves());
    let gate_up = gate_up.map(|array| array.fresh().segments::<S>(wide(d)));
    let down = down.map(|array| array.fresh().segments::<S>(wide(n)));
    let x = layer.x.matrix::<S>(&[]);
    let mut tasks = Vec::new();
    for expert in 0..layer.experts() {
        if gate_up.is_some() && d > 0 && n > 0 {
            cut::<S>(layer.routing.of(expert).len(), halves * n, d, |lines, columns| {
                tasks.push((expert, true, lines, columns));
            });
        }
        if down.is_some() && d > 0 && n > 0 {
            cut::<S>(layer.routing.of(expert).len(), d, n, |lines, columns| {
                tasks.push((expert, false, lines, columns));
            });
        }
    }
    let size = |(expert, _, lines, columns): &(usize, bool, Range<usize>, Range<usize>)| {
        (layer.routing.of(*expert).len() + 8) * lines.len() * columns.len()
    };
    tasks.sort_by_key(|task| std::cmp::Reverse(size(task)));
    let scratch = || Scratch::<S> {
        left: Vec::new(),
        right: Vec::new(),
        line: Vec::new(),
        block: Vec::new(),
        ahead: Ahead::default(),
    };
    threads::for_each(tasks.len(), stage.serial, scratch, |task, scratch| {
        let (expert, first, lines, columns) = tasks[task].clone();
        let rows = layer.routing.of(expert);
        let tokens = &layer.routing.tokens[rows.clone()];
        if let (true, Some(out)) = (first, &gate_up) {
            let left = Lines::all(slopes.part(rows, 0..halves * n));
            let number = |i: usize| expert * halves * n + layer.column_row(i);
            Product { left, right: Lines::gathered(x, tokens), lines, columns }.run(out, number, scratch);
        } else if let Some(out) = &down {
            let right = Lines::all(active.part(rows, 0..n));
            let left = Lines::gathered(stage.grad, tokens);
            Product { left, right, lines, columns }.run(out, |i| expert * d + i, scratch);
        }
    })
}

/// Columns of the result in a task: few enough that one hot expert makes tasks for all, as many as keep the left
/// operand from being stacked again and again.
fn wide(columns: usize) -> usize {
    let parts = columns.div_ceil(GROUP).div_ceil(6).max(1);
    columns.div_ceil(parts).next_multiple_of(GROUP).max(GROUP)
}

/// Cuts a result of `lines` x `columns` over `rows` rows into tasks whose left operand fits the second-level cache.
fn cut<S: Arithmetic>(rows: usize, lines: usize, columns: usize, mut task: impl FnMut(Range<usize>, Range<usize>)) {
    let units = S::units(rows).max(1);
    let across = across::<S>(units);
    let fitting = LEFT_BYTES / (size_of::<S::Unit>() * units) / across * across;
    let most = fitting.clamp(4 * across, LINES);
    let blocks = lines.div_ceil(most).max(1);
    let each = lines.div_ceil(blocks).next_multiple_of(across);
    let wide = wide(columns);
    for first in (0..lines).step_by(each) {
        for start in (0..columns).step_by(wide) {
            task(first..lines.min(first + each), start..columns.min(start + wide));
        }
    }
}

/// Gradients of both biases: sums over an expert's rows in ascending order.
pub(super) fn biases<S: Arithmetic>(
    stage: &Stage<'_, S>,
    slopes: Matrix<'_, S>,
    gate_up: Option<ArrayMut<'_>>,
    down: Option<ArrayMut<'_>>,
) -> Result<()> {
    let layer = stage.layer;
    let features = layer.halves() * layer.hidden;
    let gate_up = gate_up.map(|array| array.rows::<S>());
    let down = down.map(|array| array.rows::<S>());
    let scratch = || (vec![S::Acc::ZERO; features.max(layer.width)], vec![S::Acc::ZERO; features.max(layer.width)]);
    threads::for_each(layer.experts(), stage.serial, scratch, |expert, (sum, line)| {
        if let Some(out) = &gate_up {
            total(layer.routing.of(expert), |row| (slopes.part(row..row + 1, 0..features), S::Acc::ONE), sum, line);
            // Both layouts hold one bias a row of the weight.
            let target = out.take(expert);
            for (i, &value) in sum[..features].iter().enumerate() {
                target[layer.column_row(i)] = S::narrow(value);
            }
        }
        if let Some(out) = &down {
            let scaled = |row: usize| {
                let token = layer.routing.tokens[row];
                let score = stage.scores[layer.routing.pairs[row]];
                (stage.grad.part(token..token + 1, 0..layer.width), score)
            };
            total(layer.routing.of(expert), scaled, sum, line);
            S::round(&sum[..layer.width], out.take(expert));
        }
    })
}

/// `sum = sum over rows of factor * row`.
fn total<'a, S: Arithmetic>(
    rows: Range<usize>,
    of: impl Fn(usize) -> (Matrix<'a, S>, S::Acc),
    sum: &mut [S::Acc],
    line: &mut [S::Acc],
) {
    sum.fill(S::Acc::ZERO);
    for row in rows {
        let (values, factor) = of(row);
        let line = &mut line[..values.cols()];
        widen(values, line);
        S::Acc::table().add_scaled(&mut sum[..line.len()], line, factor);
    }
}
