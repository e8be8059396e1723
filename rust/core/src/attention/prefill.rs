//! Attention of many queries: lanes over packed query rows.
//!
//! ```text
//! for each key/value head, each tile of up to 48 packed rows (a task; the longest first):
//!     Q panel = rows, transposed                              [head dim, rows]
//!     O = 0, m = -inf, l = 0
//!     for each visit (a range of at most 128 keys):
//!         S = K * Q panel                                     [keys, rows]
//!         S = -inf where the visit is partial and a row does not attend a key
//!         P, m, l, alpha = online softmax of S                (rescale O by alpha if any m moved)
//!         O += V^T * P                                        [value dim, rows]
//!     O / l, transposed, rounded once
//! ```
//! Departures: (1) K and V are read in place by broadcast, Q alone is packed; (2) a reference m moves only when scores
//! grow by more than 2^8, so O is hardly ever rescaled; (3) values that are not finite are taken out of a partial
//! visit and added back to the rows that attend them, because 0 * NaN would poison the others.
//! A result depends on its own tile alone: not on the number of threads, nor on the batch.

use super::finish;
use super::operands::Operands;
use super::problem::Problem;
use super::schedule::{Schedule, Visit};
use crate::arch::{Kernel, Online};
use crate::dtype::{Float, Real};
use crate::error::Result;
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::threads;
use crate::view::{Matrix, Rows};
use half::{bf16, f16};

/// Keys in a visit.
const STEP: usize = 128;

/// Buffers of one thread.
struct Scratch<S: Arithmetic> {
    lines: Vec<S::Unit>,
    panel: Vec<S::Unit>,
    scores: Vec<S::Acc>,
    weights: Vec<S::Unit>,
    sums: Vec<S::Acc>,
    wide: Vec<S::Acc>,
    state: Online<S::Acc>,
}

/// Runs all tiles.
pub fn run<S: Arithmetic>(problem: &Problem<'_>, out: &Rows<'_, S>, lse: &Rows<'_, S::Acc>) -> Result<()> {
    let size = problem.size;
    let packed = size.queries * size.group();
    let width = S::panel().min(packed.next_multiple_of(S::lanes()));
    let tiles = packed.div_ceil(width);
    let heads = size.batch * size.key_heads;
    let work = heads.saturating_mul(packed).saturating_mul(size.keys).saturating_mul(size.head_dim + size.value_dim);
    let operands = Operands::<S>::new(problem, work <= SERIAL_WORK)?;
    let scratch = || Scratch::<S> {
        lines: Vec::new(),
        panel: vec![S::Unit::default(); S::units(size.head_dim) * width],
        scores: vec![S::Acc::ZERO; STEP * width],
        weights: vec![S::Unit::default(); STEP * width],
        sums: vec![S::Acc::ZERO; size.value_dim * width],
        wide: vec![S::Acc::ZERO; width * size.value_dim],
        state: Online::new(width),
    };
    threads::for_each(heads * tiles, work <= SERIAL_WORK, scratch, |task, scratch| {
        let (head, tile) = (task / tiles, tiles - 1 - task % tiles);
        let (batch, key_head) = (head / size.key_heads, head % size.key_heads);
        let first = tile * width;
        let count = width.min(packed - first);
        let width = count.next_multiple_of(S::lanes());
        one_tile(problem, &operands, batch, key_head, first, count, width, scratch, out, lse);
    })
}

fn one_tile<S: Arithmetic>(
    problem: &Problem<'_>,
    operands: &Operands<'_, '_, S>,
    batch: usize,
    key_head: usize,
    first: usize,
    count: usize,
    width: usize,
    scratch: &mut Scratch<S>,
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) {
    let (size, table) = (problem.size, S::Acc::table());
    let schedule = Schedule::new(problem, batch, key_head, first, count, STEP, S::PER_UNIT);
    pack_queries(problem, batch, key_head, first, count, width, scratch);
    let Scratch { panel, scores, weights, sums, state, .. } = scratch;
    state.reset(width);
    sums[..size.value_dim * width].fill(S::Acc::ZERO);
    let depth = S::units(size.head_dim);
    let queries = Matrix::new(&panel[..depth * width], depth, width, width);
    // With scale 0 every score is 0, whatever the (finite) product: the panel was zeroed instead, since -inf * 0 is NaN.
    let factor = S::Acc::of(if problem.scale == 0.0 { 1.0 } else { problem.scale * std::f64::consts::LOG2_E });
    for &visit in &schedule.visits {
        let scores = &mut scores[..visit.len * width];
        S::tile(operands.keys(batch, key_head, visit.start, visit.len), queries, scores, width, false);
        if visit.partial {
            schedule.mask(visit, scores, width, 1, finish::blank(factor));
        }
        if S::online(scores, visit.len, width, factor, state, weights) {
            table.scale_rows(sums, size.value_dim, width, &state.alpha);
        }
        let units = S::units(visit.len);
        let values = operands.values(batch, key_head, visit.start, visit.len);
        let weights = S::weights(scores, weights, units * width);
        if visit.partial && !all_finite(problem, batch, key_head, visit) {
            without_poison::<S>(problem, &schedule, batch, key_head, visit, weights, width, sums);
        } else {
            S::tile(values, Matrix::new(weights, units, width, width), sums, width, true);
        }
    }
    write(problem, batch, key_head, first, count, width, scratch, out, lse);
}

fn pack_queries<S: Arithmetic>(
    problem: &Problem<'_>,
    batch: usize,
    key_head: usize,
    first: usize,
    count: usize,
    width: usize,
    scratch: &mut Scratch<S>,
) {
    let (group, dim) = (problem.size.group(), problem.size.head_dim);
    let depth = S::units(dim);
    let stride = line_stride(depth);
    let Scratch { lines, panel, .. } = scratch;
    lines.resize((count * stride).max(lines.len()), S::Unit::default());
    for lane in 0..count {
        let row = first + lane;
        let queries = problem.query.matrix::<S>(&[batch, key_head * group + row % group]);
        let line = &mut lines[lane * stride..lane * stride + depth];
        if problem.scale == 0.0 {
            line.fill(S::Unit::default());
        } else {
            S::copy(queries.part(row / group..row / group + 1, 0..dim), line);
        }
    }
    let mut sources: [&[S::Unit]; 64] = [&[]; 64];
    for (lane, source) in sources.iter_mut().enumerate().take(count) {
        *source = &lines[lane * stride..lane * stride + depth];
    }
    S::pack(&sources[..count], depth, width, panel);
}

fn write<S: Arithmetic>(
    problem: &Problem<'_>,
    batch: usize,
    key_head: usize,
    first: usize,
    count: usize,
    width: usize,
    scratch: &mut Scratch<S>,
    out: &Rows<'_, S>,
    lse: &Rows<'_, S::Acc>,
) {
    let (size, group) = (problem.size, problem.size.group());
    let Scratch { sums, state, wide, .. } = scratch;
    let number = |lane: usize| {
        let (query, head) = ((first + lane) / group, key_head * group + (first + lane) % group);
        (batch * size.query_heads + head) * size.queries + query
    };
    for lane in 0..width {
        let mut factor = S::Acc::ONE;
        if lane < count {
            if let Some(sinks) = &problem.sinks {
                factor = finish::add_sink(state, lane, sinks[key_head * group + (first + lane) % group]);
            }
            lse.take(number(lane))[0] = finish::lse(state, lane);
        }
        state.alpha[lane] = factor * finish::inverse(state, lane);
    }
    let table = S::Acc::table();
    table.scale_rows(sums, size.value_dim, width, &state.alpha);
    let mut rows: Vec<&mut [S::Acc]> = wide.chunks_mut(size.value_dim).take(count).collect();
    table.unpack(sums, size.value_dim, width, &mut rows);
    for (lane, row) in rows.iter().enumerate() {
        S::round(row, out.take(number(lane)));
    }
}

fn all_finite(problem: &Problem<'_>, batch: usize, key_head: usize, visit: Visit) -> bool {
    fn check<S: Float>(values: Matrix<'_, S>) -> bool {
        // x * 0 is 0 for finite x alone; the sum is a reduction the compiler can vectorise.
        let line = |row: &[S]| row.iter().fold(S::Acc::ZERO, |sum, x| sum + x.widen() * S::Acc::ZERO) == S::Acc::ZERO;
        (0..values.rows()).all(|i| match values.row(i) {
            Some(row) => line(row),
            None => (0..values.cols()).all(|j| line(&[values.at(i, j)])),
        })
    }
    let keys = visit.start..visit.start + visit.len;
    let lead = [batch, key_head];
    let columns = 0..problem.size.value_dim;
    match problem.dtype {
        crate::dtype::Dtype::F32 => check(problem.value.matrix::<f32>(&lead).part(keys, columns)),
        crate::dtype::Dtype::F64 => check(problem.value.matrix::<f64>(&lead).part(keys, columns)),
        crate::dtype::Dtype::F16 => check(problem.value.matrix::<f16>(&lead).part(keys, columns)),
        _ => check(problem.value.matrix::<bf16>(&lead).part(keys, columns)),
    }
}

/// `O += V^T P` where some values are not finite and some rows must not see them.
fn without_poison<S: Arithmetic>(
    problem: &Problem<'_>,
    schedule: &Schedule<'_>,
    batch: usize,
    key_head: usize,
    visit: Visit,
    weights: &[S::Unit],
    width: usize,
    sums: &mut [S::Acc],
) {
    let dim = problem.size.value_dim;
    let values = problem.value.matrix::<S>(&[batch, key_head]).part(visit.start..visit.start + visit.len, 0..dim);
    let mut clean = Vec::with_capacity(visit.len * dim);
    for k in 0..visit.len {
        for c in 0..dim {
            let value = values.at(k, c);
            let poison = !value.widen().f64().is_finite();
            clean.push(if poison { S::narrow(S::Acc::ZERO) } else { value });
            for lane in 0..width.min(schedule.rows()) {
                if poison && schedule.keeps(lane, visit.start + k) {
                    sums[c * width + lane] = sums[c * width + lane] + value.widen();
                }
            }
        }
    }
    let units = S::units(visit.len);
    let mut stacked = vec![S::Unit::default(); units * dim];
    let clean = Matrix::new(&clean, visit.len, dim, dim);
    for (i, line) in stacked.chunks_mut(dim).enumerate() {
        S::stack(clean.part(i * S::PER_UNIT..((i + 1) * S::PER_UNIT).min(visit.len), 0..dim), line);
    }
    S::tile(
        Matrix::new(&stacked, units, dim, dim).transposed(),
        Matrix::new(weights, units, width, width),
        sums,
        width,
        true,
    );
}
