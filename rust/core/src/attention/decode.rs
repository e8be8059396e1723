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
use super::operands::all_finite;
use super::prefill::{exponent, scale};
use super::problem::Problem;
use super::schedule::{Schedule, Visit};
use super::sequence::Accessor;
use super::tile::{self, Tile};
use crate::arch::lanes::FloatLane;
use crate::arch::{Kernel, Online, Piece};
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::gemm::{SERIAL_WORK, inner_products};
use crate::threads;
use crate::view::{Listed, Matrix, Rows};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Keys in a visit.
const STEP: usize = 512;
/// Keys whose values are weighted at a time.
const BLOCK: usize = 64;
/// Memory of one key that tasks take together: a page.
const ROW_BYTES: usize = 4096;

/// Result of one visit: per row the reference, the normaliser, and the accumulator.
struct Partial<T> {
    reference: Vec<T>,
    normaliser: Vec<T>,
    sums: Vec<T>,
}

/// Runs `groups`, each a tile of its own.
pub fn run<'a, S: Arithmetic>(
    problem: &Problem<'a>,
    mods: &Mods<'a, S::Acc>,
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
    let tasks = tasks(problem, &tiles, &schedules);
    let partials: Vec<Mutex<Vec<Partial<S::Acc>>>> = tasks.iter().map(|_| Mutex::new(Vec::new())).collect();
    let work: usize =
        tasks.iter().flat_map(|task| tiles[task.tiles.clone()].iter().map(|tile| tile.count * task.visit.len)).sum();
    let serial = work.saturating_mul(size.head_dim + size.value_dim) <= SERIAL_WORK;
    let stage = Stage { problem, mods, dropout: Dropout::of(problem) };
    threads::for_each(
        tasks.len(),
        serial,
        || Scratch::<'_, 'a, S>::new(mods),
        |number, scratch| {
            let task = &tasks[number];
            let own = task.tiles.clone();
            let results = one_visit::<S>(&stage, &schedules[own.clone()], &tiles[own], task.visit, scratch);
            *partials[number].lock().unwrap_or_else(PoisonError::into_inner) = results;
        },
    )?;
    let mut states: Vec<_> =
        tiles.iter().map(|tile| (Online::new(tile.count), vec![S::Acc::ZERO; tile.count * size.value_dim])).collect();
    for (task, results) in tasks.iter().zip(partials) {
        let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (number, partial) in task.tiles.clone().zip(results) {
            let (state, sums) = &mut states[number];
            fold(state, sums, &partial, size.value_dim);
        }
    }
    for (tile, (mut state, mut sums)) in tiles.iter().zip(states) {
        write(problem, tile, &mut state, &mut sums, out, lse);
    }
    Ok(())
}

/// One visit of one key/value head, or of several that lie side by side.
struct Task {
    tiles: Range<usize>,
    visit: Visit,
}

/// All tasks, in ascending order of keys for each tile.
///
/// Where the heads of a key lie side by side, a head alone would take a piece of every page of memory, which is read at
/// half the speed: heads that visit the same keys then share a task, as many as fill [`ROW_BYTES`].
fn tasks(problem: &Problem<'_>, tiles: &[Tile], schedules: &[Schedule<'_>]) -> Vec<Task> {
    let strides = problem.key.strides();
    let aside = strides[1].unsigned_abs() < strides[2].unsigned_abs();
    let most = if aside { (ROW_BYTES / (problem.size.head_dim * problem.dtype.bytes())).max(1) } else { 1 };
    let mut tasks = Vec::new();
    let mut first = 0;
    while first < tiles.len() {
        let joins = |other: &usize| {
            tiles[*other].sequence == tiles[first].sequence && schedules[*other].visits == schedules[first].visits
        };
        let count = (first..tiles.len()).take(most).take_while(joins).count();
        tasks.extend(schedules[first].visits.iter().map(|&visit| Task { tiles: first..first + count, visit }));
        first += count;
    }
    tasks
}

/// What all visits share.
struct Stage<'s, 'p, 'a, T> {
    problem: &'p Problem<'a>,
    mods: &'s Mods<'a, T>,
    dropout: Option<Dropout>,
}

/// Buffers of one thread.
struct Scratch<'m, 'a, S: Arithmetic> {
    lines: Vec<S::Unit>,
    converted: Vec<S::Unit>,
    values: Vec<S::Acc>,
    scores: Vec<S::Acc>,
    worker: Worker<'m, 'a, S::Acc>,
}

impl<'m, 'a, S: Arithmetic> Scratch<'m, 'a, S> {
    fn new(mods: &'m Mods<'a, S::Acc>) -> Self {
        let (lines, converted, values, scores) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { lines, converted, values, scores, worker: mods.worker() }
    }
}

fn one_visit<S: Arithmetic>(
    stage: &Stage<'_, '_, '_, S::Acc>,
    schedules: &[Schedule<'_>],
    tiles: &[Tile],
    visit: Visit,
    scratch: &mut Scratch<'_, '_, S>,
) -> Vec<Partial<S::Acc>> {
    let (problem, size) = (stage.problem, stage.problem.size);
    let depth = S::units(size.head_dim);
    let stride = line_stride(depth);
    let Scratch { lines, converted, values, scores, worker } = scratch;
    let starts: Vec<usize> =
        tiles.iter().scan(0, |sum, tile| Some(std::mem::replace(sum, *sum + tile.count))).collect();
    let rows = tiles.iter().map(|tile| tile.count).sum::<usize>();
    lines.resize(rows * stride, S::Unit::default());
    for (tile, start) in tiles.iter().zip(&starts) {
        for lane in 0..tile.count {
            let line = &mut lines[(start + lane) * stride..(start + lane) * stride + depth];
            S::copy(tile.row(problem, &problem.query, lane), line);
        }
    }
    // Heads side by side are read together, a block of keys after the other.
    let keys = visit.start..visit.start + visit.len;
    let block = if tiles.len() == 1 { visit.len } else { BLOCK };
    let blocks = || keys.clone().step_by(block).map(|start| start..keys.end.min(start + block));
    scores.resize((rows * visit.len).max(scores.len()), S::Acc::ZERO);
    let scores = &mut scores[..rows * visit.len];
    let cached: Vec<_> = tiles.iter().map(|tile| Source::<S>::of(tile.keys(problem), &keys).units()).collect();
    for part in blocks() {
        for ((tile, start), source) in tiles.iter().zip(&starts).zip(&cached) {
            let queries = Matrix::new(&lines[start * stride..], tile.count, depth, stride);
            let own = &mut scores[start * visit.len..];
            if let Source::Listed(list) = source {
                let rows = part.start - visit.start..part.end - visit.start;
                S::rows_listed(queries, list, rows, &mut own[part.start - visit.start..], visit.len);
                continue;
            }
            tile.keys(problem).runs::<S>(part.clone(), |key, run| {
                inner_products::<S>(queries, run, converted, &mut own[key - visit.start..], visit.len);
            });
        }
    }
    let width = size.value_dim.next_multiple_of(S::lanes());
    let mut results = Vec::with_capacity(tiles.len());
    let mut hidden = Vec::with_capacity(tiles.len());
    for ((tile, schedule), start) in tiles.iter().zip(schedules).zip(&starts) {
        let own = &mut scores[start * visit.len..(start + tile.count) * visit.len];
        let (partial, masked) = weigh(stage, schedule, tile, visit, own, worker);
        results.push(Partial { sums: vec![S::Acc::ZERO; tile.count * width], ..partial });
        hidden.push(masked);
    }
    let cached: Vec<_> = tiles.iter().map(|tile| Source::<S>::of(tile.values(problem), &keys)).collect();
    for part in blocks() {
        for (number, (tile, start)) in tiles.iter().zip(&starts).enumerate() {
            let own = &scores[start * visit.len..(start + tile.count) * visit.len];
            let weights = Matrix::new(own, tile.count, visit.len, visit.len);
            let (masked, sums) = (&hidden[number], &mut results[number].sums);
            if let Source::Listed(list) = &cached[number]
                && masked.is_empty()
                && listed_values(weights, list, part.start - visit.start..part.end - visit.start, sums)
            {
                continue;
            }
            tile.values(problem).runs::<S>(part.clone(), |key, run| {
                let first = key - visit.start;
                let weights = weights.part(0..tile.count, first..first + run.rows());
                let hides = |row: usize, at: usize| !masked.is_empty() && masked[row * visit.len + first + at];
                let poisoned = !masked.is_empty() && !all_finite(run);
                weighted_values(weights, run, poisoned, hides, sums, values);
            });
        }
    }
    if width != size.value_dim {
        for partial in &mut results {
            partial.sums = partial.sums.chunks(width).flat_map(|line| &line[..size.value_dim]).copied().collect();
        }
    }
    results
}

/// Scores to weights, rows of `visit.len` keys. Also says which keys a row must not see, if there may be any.
fn weigh<T: Kernel + FloatLane>(
    stage: &Stage<'_, '_, '_, T>,
    schedule: &Schedule<'_>,
    tile: &Tile,
    visit: Visit,
    scores: &mut [T],
    worker: &mut Worker<'_, '_, T>,
) -> (Partial<T>, Vec<bool>) {
    let (problem, table) = (stage.problem, T::table());
    let keys = visit.start..visit.start + visit.len;
    if problem.rules.scale == 0.0 {
        // Every score is 0 then; -inf * 0 under the mask would be NaN.
        scores.fill(T::ZERO);
    }
    let factor = exponent::<T>(problem, stage.mods.has_score());
    if stage.mods.has_score() {
        scale(problem, scores);
        worker.score_rows(tile, keys.clone(), scores, visit.len);
    }
    let blank = finish::blank(factor);
    if visit.partial {
        schedule.mask(visit, scores, 1, visit.len, blank);
    }
    if visit.program.1 > 0 {
        worker.mask_rows(tile, keys.clone(), scores, visit.len, blank);
    }
    // Asked before the scores become weights.
    let masked = if visit.is_masked() { scores.iter().map(|&score| score == blank).collect() } else { Vec::new() };
    let (mut reference, mut normaliser) = (vec![T::NEG_INFINITY; tile.count], vec![T::ZERO; tile.count]);
    for (row, line) in scores.chunks_mut(visit.len).enumerate() {
        let top = table.row_max(line, factor);
        let empty = top == T::NEG_INFINITY;
        let sum = table.row_exp2(line, factor, if empty { T::ZERO } else { top });
        normaliser[row] = sum;
        // A row of NaN scores has no largest one, yet must not pass for empty.
        reference[row] = if empty && sum != T::ZERO { T::ZERO } else { top };
    }
    if let Some(dropout) = &stage.dropout {
        dropout.apply(problem, tile, keys, scores, (1, visit.len));
    }
    (Partial { reference, normaliser, sums: Vec::new() }, masked)
}

/// How a visit's keys or values are read.
enum Source<'a, T> {
    /// Evenly spaced, or converted.
    Even,
    /// From pages: a call for each would cost as much as reading it.
    Listed(Listed<'a, T>),
}

impl<'a, S: Arithmetic> Source<'a, S> {
    fn of(from: Accessor<'_, 'a>, keys: &Range<usize>) -> Self {
        from.list(keys.clone()).map_or(Source::Even, Source::Listed)
    }

    /// The same rows as units, if they can be read so.
    fn units(self) -> Source<'a, S::Unit> {
        match self {
            Source::Listed(list) => S::borrow_listed(list).map_or(Source::Even, Source::Listed),
            Source::Even => Source::Even,
        }
    }
}

/// `sums += P V` for values from pages, if there is a kernel for their type.
fn listed_values<S: Arithmetic>(
    weights: Matrix<'_, S::Acc>,
    list: &Listed<'_, S>,
    keys: Range<usize>,
    sums: &mut [S::Acc],
) -> bool {
    let (rows, width) = (weights.rows(), list.cols());
    if !width.is_multiple_of(S::lanes()) {
        return false;
    }
    for first in keys.clone().step_by(BLOCK) {
        let own = first..keys.end.min(first + BLOCK);
        for c in (0..width).step_by(S::panel()) {
            let piece = Piece { of: list, rows: own.clone(), columns: c..width.min(c + S::panel()) };
            if !S::mixed_listed(weights.part(0..rows, own.clone()), piece, &mut sums[c..], width) {
                return false;
            }
        }
    }
    true
}

/// `sums += P V`: blocks of keys that stay in the first-level cache, a strip of registers at a time. `hidden` says which
/// keys a row must not see, where some values are not finite (`poisoned`).
fn weighted_values<S: Arithmetic>(
    weights: Matrix<'_, S::Acc>,
    value: Matrix<'_, S>,
    poisoned: bool,
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
            let whole = c + strip <= dim && !poisoned;
            if whole && S::mixed(weights, value.part(keys.clone(), c..c + strip), &mut sums[c..], width) {
                continue;
            }
            // Converted, or completed to whole registers; what is not finite is left to the rows that attend it.
            let columns = strip.min(dim - c);
            scratch.clear();
            scratch.resize(keys.len() * strip, S::Acc::ZERO);
            for (line, key) in scratch.chunks_mut(strip).zip(keys.clone()) {
                for j in 0..columns {
                    let v = value.at(key, c + j).widen();
                    if !poisoned || v.f64().is_finite() {
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
