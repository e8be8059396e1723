//! Attention of many queries: lanes over packed query rows.
//!
//! ```text
//! for each (sequence, group of heads), each tile of up to 48 packed rows (a task; the longest first):
//!     Q panel = rows, transposed                              [head dim, rows]
//!     O = 0, m = -inf, l = 0
//!     for each visit (a range of at most 128 keys):
//!         S = K * Q panel                                     [keys, rows]
//!         S = score_mod(scale * S)                            if there is one
//!         S = -inf where the visit is masked and a row does not attend a key
//!         P, m, l, alpha = online softmax of S                (rescale O by alpha if any m moved)
//!         O += V^T * P                                        [value dim, rows]
//!     O / l, transposed, rounded once
//! ```
//! Departures: (1) K and V are read in place by broadcast, Q alone is packed; (2) a reference m moves only when scores
//! grow by more than 2^8, so O is hardly ever rescaled; (3) values that are not finite are taken out of a masked
//! visit and added back to the rows that attend them, because 0 * NaN would poison the others; (4) weights are dropped
//! after their sum is taken, in the accumulator's type.
//! A result depends on its own tile alone: not on the number of threads, nor on the batch.

use super::dropout::Dropout;
use super::finish;
use super::mods::{Mods, Worker};
use super::operands::{Operands, all_finite, panels, query_line};
use super::problem::Problem;
use super::schedule::{Schedule, Visit};
use super::tile::{self, Tile};
use crate::arch::{Kernel, Online};
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::threads;
use crate::view::{Matrix, Rows};

/// Keys in a visit.
const STEP: usize = 128;

/// What all tiles share.
struct Stage<'s, 'p, 'a, S: Arithmetic> {
    problem: &'p Problem<'a>,
    operands: Operands<'p, 'a, S>,
    mods: &'s Mods<'a, S::Acc>,
    dropout: Option<Dropout>,
    out: &'s Rows<'s, S>,
    lse: &'s Rows<'s, S::Acc>,
}

/// Buffers of one thread.
struct Scratch<'m, 'a, S: Arithmetic> {
    lines: Vec<S::Unit>,
    panel: Vec<S::Unit>,
    scores: Vec<S::Acc>,
    weights: Vec<S::Unit>,
    sums: Vec<S::Acc>,
    wide: Vec<S::Acc>,
    state: Online<S::Acc>,
    worker: Worker<'m, 'a, S::Acc>,
}

/// Runs the tiles of `groups`.
pub fn run<'a, S: Arithmetic>(
    problem: &Problem<'a>,
    mods: &Mods<'a, S::Acc>,
    groups: &[(usize, usize)],
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) -> Result<()> {
    let size = problem.size;
    let mut tiles = Vec::new();
    for &(sequence, head) in groups {
        // The last tile of causal attention is the longest.
        tiles.extend(tile::cut(problem, sequence, head, S::panel()).into_iter().rev());
    }
    if tiles.is_empty() {
        return Ok(());
    }
    let rows: usize = tiles.iter().map(|tile| tile.count).sum();
    let serial = rows.saturating_mul(size.keys).saturating_mul(size.head_dim + size.value_dim) <= SERIAL_WORK;
    let operands = Operands::<S>::forward(problem, serial)?;
    let width = tiles.iter().map(|tile| tile.count).max().unwrap_or(1).next_multiple_of(S::lanes());
    let stage = Stage { problem, operands, mods, dropout: Dropout::of(problem), out, lse };
    let scratch = || Scratch::<'_, 'a, S> {
        lines: Vec::new(),
        panel: vec![S::Unit::default(); S::units(size.head_dim) * width],
        scores: vec![S::Acc::ZERO; STEP * width],
        weights: vec![S::Unit::default(); STEP * width],
        sums: vec![S::Acc::ZERO; size.value_dim * width],
        wide: vec![S::Acc::ZERO; width * size.value_dim],
        state: Online::new(width).with_threshold(problem.rules.threshold),
        worker: mods.worker(),
    };
    threads::for_each(tiles.len(), serial, scratch, |task, scratch| one_tile(&stage, &tiles[task], scratch))
}

fn one_tile<S: Arithmetic>(stage: &Stage<'_, '_, '_, S>, tile: &Tile, scratch: &mut Scratch<'_, '_, S>) {
    let (problem, table) = (stage.problem, S::Acc::table());
    let size = problem.size;
    let width = tile.count.next_multiple_of(S::lanes());
    let mut schedule = Schedule::new(problem, tile, STEP, S::PER_UNIT, stage.mods.has_mask());
    scratch.worker.prune(tile, &mut schedule.visits, S::PER_UNIT);
    {
        let Scratch { lines, panel, .. } = scratch;
        panels::<S>(tile.count, size.head_dim, width, lines, panel, |lane, line| {
            query_line::<S>(problem, tile, lane, line);
        });
    }
    let Scratch { panel, scores, weights, sums, state, worker, .. } = scratch;
    worker.tile(tile);
    state.reset(width);
    sums[..size.value_dim * width].fill(S::Acc::ZERO);
    let depth = S::units(size.head_dim);
    let queries = Matrix::new(&panel[..depth * width], depth, width, width);
    let factor = exponent::<S::Acc>(problem, stage.mods.has_score());
    let finite = stage.operands.are_finite(tile);
    for &visit in &schedule.visits {
        let keys = visit.start..visit.start + visit.len;
        let scores = &mut scores[..visit.len * width];
        S::tile(stage.operands.keys(tile, keys.clone()), queries, scores, width, false);
        if stage.mods.has_score() {
            scale(problem, scores);
            worker.score(keys.clone(), scores, width);
        }
        if visit.partial {
            schedule.mask(visit, scores, width, 1, finish::blank(factor));
        }
        if visit.program.1 > 0 {
            let (from, count) = visit.program;
            let part = &mut scores[from * width..(from + count) * width];
            worker.mask(visit.asked(), part, width, finish::blank(factor));
        }
        if let Some(dropout) = &stage.dropout {
            if table.softmax(scores, visit.len, width, factor, state) {
                table.scale_rows(sums, size.value_dim, width, &state.alpha);
            }
            dropout.apply(problem, tile, keys.clone(), scores, (width, 1));
            S::seal_over(scores, visit.len, width, weights);
        } else if S::online(scores, visit.len, width, factor, state, weights) {
            table.scale_rows(sums, size.value_dim, width, &state.alpha);
        }
        let units = S::units(visit.len);
        let weights = S::weights(scores, weights, units * width);
        if visit.is_masked() && !finite && !finite_values::<S>(problem, tile, visit) {
            without_poison(stage, &schedule, tile, visit, weights, width, sums, worker);
        } else {
            S::tile(stage.operands.values(tile, keys), Matrix::new(weights, units, width, width), sums, width, true);
        }
    }
    write(stage, tile, width, scratch);
}

/// What a score is multiplied by before 2^x. With scale 0 every score is 0, whatever the (finite) product: the panel was
/// zeroed instead, since -inf * 0 is NaN.
pub(super) fn exponent<T: Real>(problem: &Problem<'_>, scaled: bool) -> T {
    T::of(if scaled || problem.rules.scale == 0.0 { 1.0 } else { problem.rules.scale } * std::f64::consts::LOG2_E)
}

/// Multiplies scores by the scale (unless the panel of queries was zeroed).
pub(super) fn scale<T: Real>(problem: &Problem<'_>, scores: &mut [T]) {
    if problem.rules.scale != 0.0 {
        let scale = T::of(problem.rules.scale);
        scores.iter_mut().for_each(|score| *score = *score * scale);
    }
}

fn write<S: Arithmetic>(stage: &Stage<'_, '_, '_, S>, tile: &Tile, width: usize, scratch: &mut Scratch<'_, '_, S>) {
    let problem = stage.problem;
    let size = problem.size;
    let Scratch { sums, state, wide, .. } = scratch;
    // All rows first: each is claimed by a locked instruction, which would wait for what was written before it.
    let numbers: Vec<usize> = (0..tile.count).map(|lane| tile.number(problem, lane)).collect();
    let mut slots: Vec<&mut [S::Acc]> = numbers.iter().map(|&number| stage.lse.take(number)).collect();
    let mut targets: Vec<&mut [S]> = numbers.iter().map(|&number| stage.out.take(number)).collect();
    for lane in 0..width {
        let mut factor = S::Acc::ONE;
        if lane < tile.count {
            if let Some(sinks) = &problem.sinks {
                factor = finish::add_sink(state, lane, sinks[tile.at(lane).1]);
            }
            slots[lane][0] = finish::lse(state, lane);
        }
        state.alpha[lane] = factor * finish::inverse(state, lane);
    }
    let table = S::Acc::table();
    table.scale_rows(sums, size.value_dim, width, &state.alpha);
    let mut rows: Vec<&mut [S::Acc]> = wide.chunks_mut(size.value_dim).take(tile.count).collect();
    table.unpack(sums, size.value_dim, width, &mut rows);
    for (row, target) in rows.iter().zip(&mut targets) {
        S::round(row, target);
    }
}

fn finite_values<S: Arithmetic>(problem: &Problem<'_>, tile: &Tile, visit: Visit) -> bool {
    let mut finite = true;
    tile.values(problem).runs::<S>(visit.start..visit.start + visit.len, |_, run| finite &= all_finite(run));
    finite
}

/// `O += V^T P` where some values are not finite and some rows must not see them.
///
/// A weight is exactly 0 only where a key is masked, or so far below the largest that its value would count for nothing.
fn without_poison<S: Arithmetic>(
    stage: &Stage<'_, '_, '_, S>,
    schedule: &Schedule<'_>,
    tile: &Tile,
    visit: Visit,
    weights: &[S::Unit],
    width: usize,
    sums: &mut [S::Acc],
    worker: &mut Worker<'_, '_, S::Acc>,
) {
    let (problem, dim) = (stage.problem, stage.problem.size.value_dim);
    let keys = visit.keys();
    let mut kept = vec![S::Acc::ZERO; visit.len * width];
    schedule.mask(visit, &mut kept, width, 1, S::Acc::ONE);
    if visit.program.1 > 0 {
        worker.mask(visit.asked(), &mut kept[visit.program.0 * width..], width, S::Acc::ONE);
    }
    let mut clean = Vec::with_capacity(visit.len * dim);
    tile.values(problem).runs::<S>(keys, |key, run| {
        for i in 0..run.rows() {
            let k = key + i - visit.start;
            for c in 0..dim {
                let value = run.at(i, c);
                let poison = value.is_special();
                clean.push(if poison { S::narrow(S::Acc::ZERO) } else { value });
                for lane in 0..tile.count {
                    if poison && kept[k * width + lane] == S::Acc::ZERO {
                        sums[c * width + lane] = sums[c * width + lane] + value.widen();
                    }
                }
            }
        }
    });
    let units = S::units(visit.len);
    let mut stacked = vec![S::Unit::default(); units * dim];
    let clean = Matrix::new(&clean, visit.len, dim, dim);
    for (i, line) in stacked.chunks_mut(dim).enumerate() {
        S::stack(clean.part(i * S::PER_UNIT..((i + 1) * S::PER_UNIT).min(visit.len), 0..dim), line);
    }
    let stacked = Matrix::new(&stacked, units, dim, dim).transposed();
    S::tile(stacked, Matrix::new(weights, units, width, width), sums, width, true);
}
