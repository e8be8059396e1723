//! Attention of few queries over many keys, bound by reading the cache once.
//!
//! ```text
//! for each key/value head, each visit of at most 512 keys (a task):
//!     S = Q K^T by inner products                     [rows, keys]
//!     partial m, l; P = 2^(S - m)
//!     partial O = P V, lanes across the value         [rows, value dim]
//! per head: merge the partial results in ascending order of keys
//! ```
//! The cut depends on the keys alone, so results depend neither on the number of threads nor on the batch. K and V are
//! read where they lie; P stays in the accumulator's type.

use super::finish;
use super::problem::Problem;
use super::schedule::{Schedule, Visit};
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

/// Runs all heads.
pub fn run<S: Arithmetic>(problem: &Problem<'_>, out: &Rows<'_, S>, lse: &Rows<'_, S::Acc>) -> Result<()> {
    let size = problem.size;
    let rows = size.queries * size.group();
    let heads = size.batch * size.key_heads;
    let lead = |head: usize| (head / size.key_heads, head % size.key_heads);
    let schedules: Vec<_> =
        (0..heads).map(|head| Schedule::new(problem, lead(head).0, lead(head).1, 0, rows, STEP, 1)).collect();
    let tasks: Vec<(usize, Visit)> =
        schedules.iter().enumerate().flat_map(|(head, s)| s.visits.iter().map(move |&visit| (head, visit))).collect();
    let partials: Vec<Mutex<Option<Partial<S::Acc>>>> = tasks.iter().map(|_| Mutex::new(None)).collect();
    let keys: usize = tasks.iter().map(|(_, visit)| visit.len).sum();
    let serial = keys * rows * (size.head_dim + size.value_dim) <= SERIAL_WORK;
    threads::for_each(tasks.len(), serial, Scratch::<S>::default, |task, scratch| {
        let (head, visit) = tasks[task];
        let partial = one_visit(problem, &schedules[head], lead(head), rows, visit, scratch);
        *partials[task].lock().unwrap_or_else(PoisonError::into_inner) = Some(partial);
    })?;
    let mut partials = tasks.iter().map(|(head, _)| *head).zip(partials).peekable();
    for head in 0..heads {
        let mut state = Online::new(rows);
        let mut sums = vec![S::Acc::ZERO; rows * size.value_dim];
        while let Some((_, slot)) = partials.next_if(|(of, _)| *of == head) {
            if let Some(partial) = slot.into_inner().unwrap_or_else(PoisonError::into_inner) {
                fold(&mut state, &mut sums, &partial, size.value_dim);
            }
        }
        write(problem, lead(head), rows, &mut state, &mut sums, out, lse);
    }
    Ok(())
}

/// Buffers of one thread.
struct Scratch<S: Arithmetic> {
    lines: Vec<S::Unit>,
    converted: Vec<S::Unit>,
    values: Vec<S::Acc>,
    scores: Vec<S::Acc>,
}

impl<S: Arithmetic> Default for Scratch<S> {
    fn default() -> Self {
        Self { lines: Vec::new(), converted: Vec::new(), values: Vec::new(), scores: Vec::new() }
    }
}

fn one_visit<S: Arithmetic>(
    problem: &Problem<'_>,
    schedule: &Schedule<'_>,
    (batch, key_head): (usize, usize),
    rows: usize,
    visit: Visit,
    scratch: &mut Scratch<S>,
) -> Partial<S::Acc> {
    let (size, group, table) = (problem.size, problem.size.group(), S::Acc::table());
    let depth = S::units(size.head_dim);
    let stride = line_stride(depth);
    let Scratch { lines, converted, values, scores } = scratch;
    lines.resize(rows * stride, S::Unit::default());
    for row in 0..rows {
        let query = problem
            .query
            .matrix::<S>(&[batch, key_head * group + row % group])
            .part(row / group..row / group + 1, 0..size.head_dim);
        S::copy(query, &mut lines[row * stride..row * stride + depth]);
    }
    let keys = visit.start..visit.start + visit.len;
    let key = problem.key.matrix::<S>(&[batch, key_head]).part(keys.clone(), 0..size.head_dim);
    scores.resize((rows * visit.len).max(scores.len()), S::Acc::ZERO);
    let scores = &mut scores[..rows * visit.len];
    inner_products::<S>(Matrix::new(lines, rows, depth, stride), key, converted, scores, visit.len);
    let mut factor = S::Acc::of(problem.scale * std::f64::consts::LOG2_E);
    if problem.scale == 0.0 {
        // Every score is 0 then; -inf * 0 under the mask would be NaN.
        scores.fill(S::Acc::ZERO);
        factor = S::Acc::ONE;
    }
    if visit.partial {
        schedule.mask(visit, scores, 1, visit.len, finish::blank(factor));
    }
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
    let value = problem.value.matrix::<S>(&[batch, key_head]).part(keys, 0..size.value_dim);
    partial.sums = weighted_values(schedule, visit, Matrix::new(scores, rows, visit.len, visit.len), value, values);
    partial
}

/// `P V`: blocks of keys that stay in the first-level cache, a strip of registers at a time.
fn weighted_values<S: Arithmetic>(
    schedule: &Schedule<'_>,
    visit: Visit,
    weights: Matrix<'_, S::Acc>,
    value: Matrix<'_, S>,
    scratch: &mut Vec<S::Acc>,
) -> Vec<S::Acc> {
    let (rows, dim) = (weights.rows(), value.cols());
    let width = dim.next_multiple_of(S::lanes());
    let mut sums = vec![S::Acc::ZERO; rows * width];
    for first in (0..visit.len).step_by(BLOCK) {
        let keys = first..visit.len.min(first + BLOCK);
        let weights = weights.part(0..rows, keys.clone());
        for c in (0..width).step_by(S::panel()) {
            let strip = S::panel().min(width - c);
            let whole = c + strip <= dim && !visit.partial;
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
                    if !visit.partial || v.f64().is_finite() {
                        line[j] = v;
                        continue;
                    }
                    for row in (0..rows).filter(|&row| schedule.keeps(row, visit.start + key)) {
                        sums[row * width + c + j] = sums[row * width + c + j] + v;
                    }
                }
            }
            S::Acc::table().tile(weights, Matrix::new(scratch, keys.len(), strip, strip), &mut sums[c..], width, true);
        }
    }
    if width == dim {
        return sums;
    }
    sums.chunks(width).flat_map(|line| line[..dim].iter().copied()).collect()
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
    (batch, key_head): (usize, usize),
    rows: usize,
    state: &mut Online<S::Acc>,
    sums: &mut [S::Acc],
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) {
    let (size, group) = (problem.size, problem.size.group());
    for row in 0..rows {
        let (query, head) = (row / group, key_head * group + row % group);
        let factor = problem.sinks.as_ref().map_or(S::Acc::ONE, |sinks| finish::add_sink(state, row, sinks[head]));
        let number = (batch * size.query_heads + head) * size.queries + query;
        lse.take(number)[0] = finish::lse(state, row);
        let factor = factor * finish::inverse(state, row);
        for (value, &sum) in out.take(number).iter_mut().zip(&sums[row * size.value_dim..]) {
            *value = S::narrow(sum * factor);
        }
    }
}
