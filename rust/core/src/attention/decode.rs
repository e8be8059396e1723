//! Attention of few queries over many keys, bound by reading the cache once.
//!
//! ```text
//! for each (sequence, group of heads), each visit of at most 512 keys (a task):
//!     S = Q K^T by inner products                     [rows, keys]
//!     partial m, l; P = 2^(S - m)
//!     partial O = P V, lanes across the value         [rows, value dim]
//! per head: merge the partial results in ascending order of keys
//! ```
//! The cut depends on the keys alone, so results depend neither on the number of threads nor on the batch. K and V are
//! read where they lie; P stays in the accumulator's type.

use super::dropout::Dropout;
use super::finish;
use super::mods::{Mods, Worker};
use super::prefill::{exponent, scale};
use super::problem::Problem;
use super::schedule::{Schedule, Visit};
use super::tile::{self, Tile};
use crate::arch::{Kernel, Online};
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::gemm::{SERIAL_WORK, inner_products};
use crate::threads;
use crate::view::{Matrix, Rows};
use std::sync::{Mutex, PoisonError};

/// Keys in a visit.
const STEP: usize = 512;
/// Keys whose values are weighted at a time.
const BLOCK: usize = 32;

/// Result of one visit: per row the reference, the normaliser, and the accumulator.
struct Partial<T> {
    reference: Vec<T>,
    normaliser: Vec<T>,
    sums: Vec<T>,
}

/// Runs `groups`, each a tile of its own.
pub fn run<'a, S: Arithmetic>(
    problem: &Problem<'a>,
    mods: &Mods<'_, 'a, S::Acc>,
    groups: &[(usize, usize)],
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) -> Result<()> {
    let size = problem.size;
    let tiles: Vec<Tile> =
        groups.iter().flat_map(|&(sequence, head)| tile::cut(problem, sequence, head, usize::MAX)).collect();
    let plan = |tile: &Tile| {
        let keys = tile.of(problem).keys;
        let step = if problem.rules.splits == 0 { STEP } else { keys.div_ceil(problem.rules.splits).max(1) };
        Schedule::new(problem, tile, step, 1, mods.has_mask())
    };
    let schedules: Vec<_> = tiles.iter().map(plan).collect();
    let tasks: Vec<(usize, Visit)> = schedules
        .iter()
        .enumerate()
        .flat_map(|(number, s)| s.visits.iter().map(move |&visit| (number, visit)))
        .collect();
    let partials: Vec<Mutex<Option<Partial<S::Acc>>>> = tasks.iter().map(|_| Mutex::new(None)).collect();
    let work: usize = tasks.iter().map(|(number, visit)| visit.len * tiles[*number].count).sum();
    let serial = work.saturating_mul(size.head_dim + size.value_dim) <= SERIAL_WORK;
    let stage = Stage { problem, mods, dropout: Dropout::of(problem) };
    threads::for_each(
        tasks.len(),
        serial,
        || Scratch::<S>::new(mods),
        |task, scratch| {
            let (number, visit) = tasks[task];
            let partial = one_visit::<S>(&stage, &schedules[number], &tiles[number], visit, scratch);
            *partials[task].lock().unwrap_or_else(PoisonError::into_inner) = Some(partial);
        },
    )?;
    let mut partials = tasks.iter().map(|(number, _)| *number).zip(partials).peekable();
    for (number, tile) in tiles.iter().enumerate() {
        let mut state = Online::new(tile.count);
        let mut sums = vec![S::Acc::ZERO; tile.count * size.value_dim];
        while let Some((_, slot)) = partials.next_if(|(of, _)| *of == number) {
            if let Some(partial) = slot.into_inner().unwrap_or_else(PoisonError::into_inner) {
                fold(&mut state, &mut sums, &partial, size.value_dim);
            }
        }
        write(problem, tile, &mut state, &mut sums, out, lse);
    }
    Ok(())
}

/// What all visits share.
struct Stage<'s, 'p, 'a, T> {
    problem: &'p Problem<'a>,
    mods: &'s Mods<'p, 'a, T>,
    dropout: Option<Dropout>,
}

/// Buffers of one thread.
struct Scratch<S: Arithmetic> {
    lines: Vec<S::Unit>,
    converted: Vec<S::Unit>,
    values: Vec<S::Acc>,
    scores: Vec<S::Acc>,
    worker: Worker<S::Acc>,
}

impl<S: Arithmetic> Scratch<S> {
    fn new(mods: &Mods<'_, '_, S::Acc>) -> Self {
        let (lines, converted, values, scores) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { lines, converted, values, scores, worker: mods.worker() }
    }
}

fn one_visit<S: Arithmetic>(
    stage: &Stage<'_, '_, '_, S::Acc>,
    schedule: &Schedule<'_>,
    tile: &Tile,
    visit: Visit,
    scratch: &mut Scratch<S>,
) -> Partial<S::Acc> {
    let (problem, table, rows) = (stage.problem, S::Acc::table(), tile.count);
    let size = problem.size;
    let depth = S::units(size.head_dim);
    let stride = line_stride(depth);
    let Scratch { lines, converted, values, scores, worker } = scratch;
    lines.resize(rows * stride, S::Unit::default());
    for lane in 0..rows {
        let line = &mut lines[lane * stride..lane * stride + depth];
        S::copy(tile.row(problem, &problem.query, lane), line);
    }
    let keys = visit.start..visit.start + visit.len;
    scores.resize((rows * visit.len).max(scores.len()), S::Acc::ZERO);
    let scores = &mut scores[..rows * visit.len];
    let queries = Matrix::new(lines, rows, depth, stride);
    tile.keys(problem).runs::<S>(keys.clone(), |key, run| {
        inner_products::<S>(queries, run, converted, &mut scores[key - visit.start..], visit.len);
    });
    if problem.rules.scale == 0.0 {
        // Every score is 0 then; -inf * 0 under the mask would be NaN.
        scores.fill(S::Acc::ZERO);
    }
    let factor = exponent::<S::Acc>(problem, stage.mods.has_score());
    if stage.mods.has_score() {
        scale(problem, scores);
        worker.score_rows(tile, keys.clone(), scores, visit.len);
    }
    if visit.partial {
        schedule.mask(visit, scores, 1, visit.len, finish::blank(factor));
    }
    if visit.program {
        worker.mask_rows(tile, keys.clone(), scores, visit.len, finish::blank(factor));
    }
    // Which values that are not finite a row must not see: asked before the scores become weights.
    let blank = finish::blank(factor);
    let masked: Vec<bool> =
        if visit.is_masked() { scores.iter().map(|&score| score == blank).collect() } else { Vec::new() };
    let mut partial =
        Partial { reference: vec![S::Acc::NEG_INFINITY; rows], normaliser: vec![S::Acc::ZERO; rows], sums: Vec::new() };
    for (row, line) in scores.chunks_mut(visit.len).enumerate() {
        let top = table.row_max(line, factor);
        let empty = top == S::Acc::NEG_INFINITY;
        let sum = table.row_exp2(line, factor, if empty { S::Acc::ZERO } else { top });
        partial.normaliser[row] = sum;
        // A row of NaN scores has no largest one, yet must not pass for empty.
        partial.reference[row] = if empty && sum != S::Acc::ZERO { S::Acc::ZERO } else { top };
    }
    if let Some(dropout) = &stage.dropout {
        dropout.apply(problem, tile, keys.clone(), scores, (1, visit.len));
    }
    let width = size.value_dim.next_multiple_of(S::lanes());
    let mut sums = vec![S::Acc::ZERO; rows * width];
    let weights = Matrix::new(scores, rows, visit.len, visit.len);
    tile.values(problem).runs::<S>(keys, |key, run| {
        let first = key - visit.start;
        let weights = weights.part(0..rows, first..first + run.rows());
        let hidden = |row: usize, at: usize| !masked.is_empty() && masked[row * visit.len + first + at];
        weighted_values(weights, run, !masked.is_empty(), hidden, &mut sums, values);
    });
    partial.sums = sums;
    if width != size.value_dim {
        partial.sums = partial.sums.chunks(width).flat_map(|line| &line[..size.value_dim]).copied().collect();
    }
    partial
}

/// `sums += P V`: blocks of keys that stay in the first-level cache, a strip of registers at a time. `hidden` says which
/// keys of a masked range a row must not see.
fn weighted_values<S: Arithmetic>(
    weights: Matrix<'_, S::Acc>,
    value: Matrix<'_, S>,
    masked: bool,
    hidden: impl Fn(usize, usize) -> bool,
    sums: &mut [S::Acc],
    scratch: &mut Vec<S::Acc>,
) {
    let (rows, dim) = (weights.rows(), value.cols());
    let width = dim.next_multiple_of(S::lanes());
    for first in (0..value.rows()).step_by(BLOCK) {
        let keys = first..value.rows().min(first + BLOCK);
        let weights = weights.part(0..rows, keys.clone());
        for c in (0..width).step_by(S::panel()) {
            let strip = S::panel().min(width - c);
            let whole = c + strip <= dim && !masked;
            if whole && S::mixed(weights, value.part(keys.clone(), c..c + strip), &mut sums[c..], width, true) {
                continue;
            }
            // Converted, or completed to whole registers; what is not finite is left to the rows that attend it.
            let columns = strip.min(dim - c);
            scratch.clear();
            scratch.resize(keys.len() * strip, S::Acc::ZERO);
            for (line, key) in scratch.chunks_mut(strip).zip(keys.clone()) {
                for j in 0..columns {
                    let v = value.at(key, c + j).widen();
                    if !masked || v.f64().is_finite() {
                        line[j] = v;
                        continue;
                    }
                    for row in (0..rows).filter(|&row| !hidden(row, key)) {
                        sums[row * width + c + j] = sums[row * width + c + j] + v;
                    }
                }
            }
            S::Acc::table().tile(weights, Matrix::new(scratch, keys.len(), strip, strip), &mut sums[c..], width, true);
        }
    }
}

fn fold<T: Kernel>(state: &mut Online<T>, sums: &mut [T], partial: &Partial<T>, dim: usize) {
    for (row, (sum, part)) in sums.chunks_mut(dim).zip(partial.sums.chunks(dim)).enumerate() {
        let (old, new) = finish::merge(state, row, partial.reference[row], partial.normaliser[row]);
        if new == T::ZERO && old == T::ONE {
            continue;
        }
        for (value, &other) in sum.iter_mut().zip(part) {
            *value = *value * old + other * new;
        }
    }
}

fn write<S: Arithmetic>(
    problem: &Problem<'_>,
    tile: &Tile,
    state: &mut Online<S::Acc>,
    sums: &mut [S::Acc],
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) {
    for row in 0..tile.count {
        let (_, head) = tile.at(row);
        let factor = problem.sinks.as_ref().map_or(S::Acc::ONE, |sinks| finish::add_sink(state, row, sinks[head]));
        let number = tile.number(problem, row);
        lse.take(number)[0] = finish::lse(state, row);
        let factor = factor * finish::inverse(state, row);
        for (value, &sum) in out.take(number).iter_mut().zip(&sums[row * problem.size.value_dim..]) {
            *value = S::narrow(sum * factor);
        }
    }
}
