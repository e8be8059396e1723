//! The way back through one tile of queries.
//!
//! ```text
//! Q and dO panels, L = LSE * log2(e), D = sum of O dO - dLSE, dQ = 0
//! for each visit (a range of at most 128 keys):
//!     S = K Q, dP = V dO                                   [keys, rows]: lanes over rows
//!     S = -inf where a row does not attend a key
//!     P = 2^(S c - L), dS = P (dP - D)
//!     dV += P dO,  dK += dS Q                              [keys, dim]: lanes over columns
//!     dQ += dS^T K                                         [rows, dim]
//! ```
//! Departures: (1) with programs or dropped weights the step from S to dS is three: the score program before, its
//! derivative after, in the accumulator's type; (2) Q, K and dO enter the last three products with zeros where they are
//! not finite: whoever attends such an element has a P or dS that is not finite either, and nobody else may see it; a row
//! of dO that is not finite makes its P so, for dV.

use super::{Partial, Stage};
use crate::arch::{Kernel, Slopes};
use crate::attention::finish;
use crate::attention::mods::{Worker, harmless};
use crate::attention::operands::{all_finite, panels, query_line, stack_finite};
use crate::attention::prefill::{exponent, scale};
use crate::attention::schedule::{Schedule, Visit};
use crate::attention::tile::Tile;
use crate::dtype::{Float, Real};
use crate::expr::CaptureGradient;
use crate::gemm::arithmetic::{Arithmetic, Sealed, Views};
use crate::view::Matrix;

/// Keys in a visit.
const STEP: usize = 128;

/// Buffers of one thread.
pub struct Scratch<'m, 'a, S: Arithmetic> {
    lines: Vec<S::Unit>,
    query_panels: Vec<S::Unit>,
    grad_panels: Vec<S::Unit>,
    query_stack: Vec<S::Unit>,
    grad_stack: Vec<S::Unit>,
    scores: Vec<S::Acc>,
    slopes: Vec<S::Acc>,
    before: Vec<S::Acc>,
    sealed: Sealed<S::Unit>,
    sums: Vec<S::Acc>,
    lse: Vec<S::Acc>,
    delta: Vec<S::Acc>,
    /// Lanes whose dO is not finite.
    poisoned: Vec<usize>,
    worker: Worker<'m, 'a, S::Acc>,
}

impl<'m, 'a, S: Arithmetic> Scratch<'m, 'a, S> {
    pub(super) fn new(stage: &Stage<'m, '_, 'a, S>) -> Self {
        let size = stage.problem.size;
        let width = super::plan::PANELS * S::panel();
        let units = |count: usize| vec![S::Unit::default(); count];
        Self {
            lines: Vec::new(),
            query_panels: units(S::units(size.head_dim) * width),
            grad_panels: units(S::units(size.value_dim) * width),
            query_stack: units(S::units(width) * stage.key_width),
            grad_stack: units(S::units(width) * stage.value_width),
            scores: vec![S::Acc::ZERO; STEP * width],
            slopes: vec![S::Acc::ZERO; STEP * width],
            before: Vec::new(),
            sealed: Sealed::new(STEP * width),
            sums: vec![S::Acc::ZERO; width * stage.key_width],
            lse: vec![S::Acc::ZERO; width],
            delta: vec![S::Acc::ZERO; width],
            poisoned: Vec::new(),
            worker: stage.mods.worker(),
        }
    }
}

/// One tile: writes dQ, adds to dK, dV and the sinks.
pub(super) fn one_tile<S: Arithmetic>(
    stage: &Stage<'_, '_, '_, S>,
    tile: &Tile,
    scratch: &mut Scratch<'_, '_, S>,
    partial: &mut Partial<S::Acc>,
    captures: &mut [Option<&mut CaptureGradient<S::Acc>>],
) {
    let problem = stage.problem;
    let width = tile.count.next_multiple_of(S::lanes());
    let mut schedule = Schedule::new(problem, tile, STEP, S::PER_UNIT, stage.mods.has_mask());
    scratch.worker.prune(tile, &mut schedule.visits, S::PER_UNIT);
    scratch.prepare(stage, tile, width, partial);
    scratch.worker.tile(tile);
    scratch.sums[..width * stage.key_width].fill(S::Acc::ZERO);
    for &visit in &schedule.visits {
        scratch.visit(stage, tile, &schedule, visit, width, partial, captures);
    }
    let Some(query) = &stage.query else { return };
    let scale = S::Acc::of(problem.rules.scale);
    let targets: Vec<&mut [S]> = (0..tile.count).map(|lane| query.take(tile.number(problem, lane))).collect();
    for (sums, target) in scratch.sums.chunks_mut(stage.key_width).zip(targets) {
        let sums = &mut sums[..problem.size.head_dim];
        sums.iter_mut().for_each(|x| *x = *x * scale);
        S::round(sums, target);
    }
}

impl<S: Arithmetic> Scratch<'_, '_, S> {
    /// Panels and stacks of Q and dO, and each lane's L and D.
    fn prepare(&mut self, stage: &Stage<'_, '_, '_, S>, tile: &Tile, width: usize, partial: &mut Partial<S::Acc>) {
        let (problem, upstream) = (stage.problem, stage.upstream);
        let sequence = tile.of(problem);
        self.poisoned.clear();
        for lane in 0..width {
            // A lane that is not there, like one that attended nothing, has weights of 2^-inf.
            self.lse[lane] = -S::Acc::NEG_INFINITY;
            self.delta[lane] = S::Acc::ZERO;
            if lane >= tile.count {
                continue;
            }
            let (query, head) = tile.at(lane);
            let at = [sequence.query_batch, head, sequence.query_start + query];
            let (out, grad) =
                (tile.row::<S>(problem, &upstream.out, lane), tile.row::<S>(problem, &upstream.grad_out, lane));
            let grad_lse = upstream.grad_lse.as_ref().map_or(S::Acc::ZERO, |array| array.get::<S::Acc>(&at));
            let delta = dot(out, grad) - grad_lse;
            let lse = upstream.lse.get::<S::Acc>(&at);
            if !all_finite(grad) && !lse.f64().is_nan() {
                self.poisoned.push(lane);
            }
            if lse.f64().is_nan() {
                // Weights of 2^NaN would reach keys that the row does not attend.
                self.lse[lane] = S::Acc::ZERO;
                self.delta[lane] = lse;
                self.poisoned.push(lane);
            } else if lse != S::Acc::NEG_INFINITY {
                self.lse[lane] = lse * S::Acc::of(std::f64::consts::LOG2_E);
                self.delta[lane] = delta;
                if let Some(sinks) = &problem.sinks {
                    partial.sinks[head] -= libm::exp(sinks[head] - lse.f64()) * delta.f64();
                }
            }
        }
        let (key_dim, value_dim) = (problem.size.head_dim, problem.size.value_dim);
        let query = |lane: usize| tile.row::<S>(problem, &problem.query, lane);
        let grad = |lane: usize| tile.row::<S>(problem, &upstream.grad_out, lane);
        panels::<S>(tile.count, key_dim, width, &mut self.lines, &mut self.query_panels, |lane, line| {
            query_line::<S>(problem, tile, lane, line);
        });
        panels::<S>(tile.count, value_dim, width, &mut self.lines, &mut self.grad_panels, |lane, line| {
            S::copy(grad(lane), line);
        });
        stack::<S>(tile.count, key_dim, stage.key_width, width, &mut self.query_stack, query);
        stack::<S>(tile.count, value_dim, stage.value_width, width, &mut self.grad_stack, grad);
    }

    fn visit(
        &mut self,
        stage: &Stage<'_, '_, '_, S>,
        tile: &Tile,
        schedule: &Schedule<'_>,
        visit: Visit,
        width: usize,
        partial: &mut Partial<S::Acc>,
        captures: &mut [Option<&mut CaptureGradient<S::Acc>>],
    ) {
        let (problem, count) = (stage.problem, visit.len * width);
        let keys = visit.start..visit.start + visit.len;
        let (scores, slopes) = (&mut self.scores[..count], &mut self.slopes[..count]);
        let (key_units, value_units) = (S::units(problem.size.head_dim), S::units(problem.size.value_dim));
        for first in (0..width).step_by(S::panel()) {
            let lanes = S::panel().min(width - first);
            let queries = Matrix::new(&self.query_panels[key_units * first..], key_units, lanes, lanes);
            let grads = Matrix::new(&self.grad_panels[value_units * first..], value_units, lanes, lanes);
            S::tile(stage.operands.keys(tile, keys.clone()), queries, &mut scores[first..], width, false);
            S::tile(stage.operands.value_lines(tile, keys.clone()), grads, &mut slopes[first..], width, false);
        }
        let has_score = stage.mods.has_score();
        let factor = exponent::<S::Acc>(problem, has_score);
        if has_score {
            scale(problem, scores);
            self.before.clear();
            self.before.extend_from_slice(scores);
            self.worker.score(keys.clone(), scores, width);
        }
        if visit.partial {
            schedule.mask(visit, scores, width, 1, finish::blank(factor));
        }
        if visit.program.1 > 0 {
            let (from, count) = visit.program;
            let part = &mut scores[from * width..(from + count) * width];
            self.worker.mask(visit.asked(), part, width, finish::blank(factor));
        }
        if tile.count < width {
            // Lanes that are not there: 0 * NaN of a key is a score too.
            scores.chunks_mut(width).for_each(|line| line[tile.count..].fill(finish::blank(factor)));
        }
        if let Some(dropout) = &stage.dropout {
            dropout.apply(problem, tile, keys.clone(), slopes, (width, 1));
        }
        let (lse, delta) = (&self.lse[..width], &self.delta[..width]);
        let mut block = Slopes { scores, slopes, rows: visit.len, width, factor, lse, delta };
        if has_score || stage.dropout.is_some() || !self.poisoned.is_empty() {
            S::Acc::table().slopes(&mut block);
            if let Some(dropout) = &stage.dropout {
                dropout.apply(problem, tile, keys.clone(), scores, (width, 1));
            }
            for &lane in &self.poisoned {
                let weights = scores.iter_mut().skip(lane).step_by(width).filter(|weight| **weight != S::Acc::ZERO);
                weights.for_each(|weight| *weight = S::Acc::of(f64::NAN));
            }
            if has_score {
                let pairs = self.before.iter_mut().zip(&*scores);
                pairs.filter(|(_, weight)| **weight == S::Acc::ZERO).for_each(|(score, _)| *score = harmless());
                self.worker.gradient(keys.clone(), &self.before, slopes, width, captures);
            }
            S::seal_slopes(scores, slopes, visit.len, width, &mut self.sealed);
        } else {
            S::slopes(&mut block, &mut self.sealed);
        }
        let views = S::views(scores, slopes, visit.len, width, &self.sealed);
        products(stage, tile, visit, width, views, (&self.query_stack, &self.grad_stack), &mut self.sums, partial);
    }
}

/// The three products after dS.
fn products<S: Arithmetic>(
    stage: &Stage<'_, '_, '_, S>,
    tile: &Tile,
    visit: Visit,
    width: usize,
    views: Views<'_, S::Unit>,
    (queries, grads): (&[S::Unit], &[S::Unit]),
    sums: &mut [S::Acc],
    partial: &mut Partial<S::Acc>,
) {
    let units = S::units(width);
    let at = (visit.start - partial.keys.start) * stage.stride;
    if stage.value.is_some() {
        let right = Matrix::new(grads, units, stage.value_width, stage.value_width);
        by_panel::<S>(views.weights, right, &mut partial.sums[at..], stage.stride);
    }
    if stage.key.is_some() {
        let right = Matrix::new(queries, units, stage.key_width, stage.key_width);
        by_panel::<S>(views.slopes, right, &mut partial.sums[at + stage.value_width..], stage.stride);
    }
    if stage.query.is_some() {
        let keys = stage.operands.key_stack(tile, visit.start..visit.start + visit.len);
        by_panel::<S>(views.turned, keys, sums, stage.key_width);
    }
}

/// `c += a b`, a panel of columns at a time.
fn by_panel<S: Arithmetic>(a: Matrix<'_, S::Unit>, b: Matrix<'_, S::Unit>, c: &mut [S::Acc], c_row: usize) {
    for first in (0..b.cols()).step_by(S::panel()) {
        let columns = first..b.cols().min(first + S::panel());
        S::tile(a, b.part(0..b.rows(), columns), &mut c[first..], c_row, true);
    }
}

/// Lanes stacked along the reduction, finite, in rows of `padded` columns; lanes past `count` are zero.
fn stack<'a, S: Arithmetic>(
    count: usize,
    dim: usize,
    padded: usize,
    width: usize,
    stacked: &mut [S::Unit],
    row: impl Fn(usize) -> Matrix<'a, S>,
) {
    let mut pair: Vec<S> = Vec::with_capacity(S::PER_UNIT * dim);
    for (unit, line) in stacked.chunks_mut(padded).enumerate().take(S::units(width)) {
        let first = unit * S::PER_UNIT;
        line.fill(S::Unit::default());
        let lanes = S::PER_UNIT.min(count.saturating_sub(first));
        if lanes == 1 {
            stack_finite(row(first), &mut line[..dim]);
        } else if lanes > 1 {
            pair.clear();
            for lane in first..first + lanes {
                let own = row(lane);
                match own.row(0) {
                    Some(own) => pair.extend_from_slice(own),
                    None => pair.extend((0..dim).map(|c| own.at(0, c))),
                }
            }
            stack_finite(Matrix::new(&pair, lanes, dim, dim), &mut line[..dim]);
        }
    }
}

/// The inner product of two rows, in a fixed order.
fn dot<S: Float>(a: Matrix<'_, S>, b: Matrix<'_, S>) -> S::Acc {
    let mut sums = [S::Acc::ZERO; 8];
    for c in 0..a.cols() {
        sums[c % 8] = sums[c % 8] + a.at(0, c).widen() * b.at(0, c).widen();
    }
    sums.into_iter().fold(S::Acc::ZERO, |sum, part| sum + part)
}
