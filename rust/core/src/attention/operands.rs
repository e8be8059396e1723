//! Keys and values in the order the kernels read them.
//!
//! | operand | order | read by |
//! |---|---|---|
//! | lines | a key a row, units along its width | `S = K Q`, `dP = V dO` (broadcast) |
//! | stacked | a unit of keys a row, columns adjacent | `O += V P` (broadcast, turned), `dQ += dS K` (lanes) |
//!
//! In single and double precision both are the memory as it lies. They are copied, once per key/value head, where that
//! cannot be: half types (a stacked unit of bfloat16 holds two neighbouring *keys*; f16 is converted), pages, and rows
//! whose distance is a multiple of 4 KiB (all of them would fall into the same set of the first-level cache).

use super::problem::Problem;
use super::sequence::Accessor;
use super::tile::Tile;
use crate::dtype::{Float, Real};
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::scratch::Buffer;
use crate::threads;
use crate::view::{Array, Matrix};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Keys copied by one task: a multiple of every unit.
const KEYS: usize = 512;

/// Up to this many tiles a head, each looks at the values that it visits; more would look at them again and again.
const FEW_TILES: usize = 4;

/// Copies of one array for all sequences and heads.
struct Copied<S: Arithmetic> {
    units: Buffer<S::Unit>,
    /// First row of each (sequence, head).
    starts: Vec<usize>,
    width: usize,
    stride: usize,
}

impl<S: Arithmetic> Copied<S> {
    /// All rows of a (sequence, head).
    fn of(&self, place: usize) -> Matrix<'_, S::Unit> {
        let rows = self.starts[place]..self.starts[place + 1];
        let units = &self.units[rows.start * self.stride..rows.end * self.stride];
        Matrix::new(units, rows.len(), self.width, self.stride)
    }

    /// Fills rows by `line(place, row, units)`; `keys_a_row` keys are in a row.
    fn new(
        problem: &Problem<'_>,
        width: usize,
        keys_a_row: usize,
        serial: bool,
        line: impl Fn(usize, usize, &mut [S::Unit]) + Sync,
    ) -> Result<Self> {
        let mut starts = vec![0];
        for sequence in &problem.sequences {
            for _ in 0..problem.size.key_heads {
                starts.push(starts.last().copied().unwrap_or(0) + sequence.keys.div_ceil(keys_a_row));
            }
        }
        let stride = line_stride(width);
        let mut units = Buffer::new(starts.last().copied().unwrap_or(0) * stride);
        let mut parts = Vec::new();
        let mut rest = &mut units[..];
        for (place, ends) in starts.windows(2).enumerate() {
            let (own, after) = rest.split_at_mut((ends[1] - ends[0]) * stride);
            rest = after;
            let chunk = KEYS / keys_a_row * stride;
            parts.extend(
                own.chunks_mut(chunk).enumerate().map(|(i, part)| (place, i * KEYS / keys_a_row, Mutex::new(part))),
            );
        }
        threads::for_each(
            parts.len(),
            serial,
            || (),
            |task, ()| {
                let (place, first, part) = &parts[task];
                let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
                for (i, units) in part.chunks_mut(stride).enumerate() {
                    line(*place, first + i, &mut units[..width]);
                }
            },
        )?;
        drop(parts);
        Ok(Self { units, starts, width, stride })
    }
}

/// Keys and values of all heads, in the orders that were asked for.
pub struct Operands<'p, 'a, S: Arithmetic> {
    problem: &'p Problem<'a>,
    key_lines: Option<Copied<S>>,
    value_lines: Option<Copied<S>>,
    key_stack: Option<Copied<S>>,
    value_stack: Option<Copied<S>>,
    /// Whether all values of a (sequence, head) are finite; empty where nobody asked for all.
    finite: Vec<bool>,
}

/// Whether rows can be read where they lie.
fn readable<S: Arithmetic>(matrix: Matrix<'_, S>) -> bool {
    let distance = matrix.row_stride().unsigned_abs() * std::mem::size_of::<S>();
    S::borrow(matrix).is_some() && (distance == 0 || !distance.is_multiple_of(4096))
}

/// Whether nothing is infinite or NaN.
pub fn all_finite<S: Float>(values: Matrix<'_, S>) -> bool {
    // No early end: a reduction the compiler can vectorise.
    let line = |row: &[S]| !row.iter().fold(false, |any, x| any | x.is_special());
    (0..values.rows()).all(|i| match values.row(i) {
        Some(row) => line(row),
        None => (0..values.cols()).all(|j| line(&[values.at(i, j)])),
    })
}

/// Stacks a unit of rows with zeros where they are not finite.
pub fn stack_finite<S: Arithmetic>(rows: Matrix<'_, S>, units: &mut [S::Unit]) {
    if all_finite(rows) {
        return S::stack(rows, units);
    }
    let finite = |x: S| if x.is_special() { S::narrow(S::Acc::ZERO) } else { x };
    let clean: Vec<S> =
        (0..rows.rows() * rows.cols()).map(|i| finite(rows.at(i / rows.cols(), i % rows.cols()))).collect();
    S::stack(Matrix::new(&clean, rows.rows(), rows.cols(), rows.cols()), units);
}

impl<'p, 'a, S: Arithmetic> Operands<'p, 'a, S> {
    /// What the forward pass reads: key lines and stacked values.
    pub fn forward(problem: &'p Problem<'a>, serial: bool) -> Result<Self> {
        let place = |place: usize| (place / problem.size.key_heads, place % problem.size.key_heads);
        let key_lines = Self::lines(problem, &problem.key, serial)?;
        let mut value_stack = None;
        if S::PER_UNIT > 1 || !Self::in_place(problem, &problem.value) {
            value_stack = Some(Copied::new(problem, problem.size.value_dim, S::PER_UNIT, serial, |at, row, units| {
                let (sequence, head) = place(at);
                Self::unit_of(problem.accessor(&problem.value, sequence, head), row, units, S::stack);
            })?);
        }
        // Few tiles ask for what they visit.
        let longest = problem.sequences.iter().map(|sequence| sequence.queries).max().unwrap_or(0);
        let many = longest * problem.pack() > FEW_TILES * S::panel();
        let finite = if many && problem.hides_keys() { Self::finite(problem, serial)? } else { Vec::new() };
        Ok(Self { problem, key_lines, value_lines: None, key_stack: None, value_stack, finite })
    }

    fn finite(problem: &'p Problem<'a>, serial: bool) -> Result<Vec<bool>> {
        let heads = problem.size.key_heads;
        let flags: Vec<AtomicBool> = (0..problem.sequences.len() * heads).map(|_| AtomicBool::new(true)).collect();
        let parts: Vec<(usize, Range<usize>)> = (0..flags.len())
            .flat_map(|place| {
                let keys = problem.sequences[place / heads].keys;
                (0..keys).step_by(KEYS).map(move |start| (place, start..keys.min(start + KEYS)))
            })
            .collect();
        threads::for_each(
            parts.len(),
            serial,
            || (),
            |task, ()| {
                let (place, keys) = &parts[task];
                let values = problem.accessor(&problem.value, place / heads, place % heads);
                values.runs::<S>(keys.clone(), |_, run| {
                    if !all_finite(run) {
                        flags[*place].store(false, Ordering::Relaxed);
                    }
                });
            },
        )?;
        Ok(flags.into_iter().map(AtomicBool::into_inner).collect())
    }

    /// Whether it is known that no value of the tile's head can poison a row that must not see it.
    pub fn are_finite(&self, tile: &Tile) -> bool {
        self.finite.get(self.place(tile)).is_some_and(|&finite| finite)
    }

    /// What the backward pass reads: lines of both, and stacked keys that are finite, as wide as whole registers.
    pub fn backward(problem: &'p Problem<'a>, serial: bool) -> Result<Self> {
        let place = |place: usize| (place / problem.size.key_heads, place % problem.size.key_heads);
        let width = problem.size.head_dim;
        let padded = width.next_multiple_of(S::lanes());
        let key_stack = Copied::new(problem, padded, S::PER_UNIT, serial, |at, row, units| {
            let (sequence, head) = place(at);
            units[width..].fill(S::Unit::default());
            Self::unit_of(problem.accessor(&problem.key, sequence, head), row, &mut units[..width], stack_finite::<S>);
        })?;
        Ok(Self {
            problem,
            key_lines: Self::lines(problem, &problem.key, serial)?,
            value_lines: Self::lines(problem, &problem.value, serial)?,
            key_stack: Some(key_stack),
            value_stack: None,
            finite: Vec::new(),
        })
    }

    fn in_place(problem: &Problem<'a>, array: &Array<'a>) -> bool {
        problem.pages.is_none()
            && (array.is_empty()
                || (0..array.shape()[0] * array.shape()[1])
                    .all(|i| readable::<S>(array.matrix(&[i / array.shape()[1], i % array.shape()[1]]))))
    }

    fn lines(problem: &'p Problem<'a>, array: &'p Array<'a>, serial: bool) -> Result<Option<Copied<S>>> {
        if Self::in_place(problem, array) {
            return Ok(None);
        }
        let heads = problem.size.key_heads;
        let copied = Copied::new(problem, S::units(array.shape()[3]), 1, serial, |at, row, units| {
            S::copy(problem.accessor(array, at / heads, at % heads).run(row, 1), units);
        })?;
        Ok(Some(copied))
    }

    /// One row of stacked units: the keys may lie in two pages.
    fn unit_of(
        from: Accessor<'p, 'a>,
        row: usize,
        units: &mut [S::Unit],
        stack: impl Fn(Matrix<'_, S>, &mut [S::Unit]),
    ) {
        let first = row * S::PER_UNIT;
        let count = S::PER_UNIT.min(from.sequence.keys - first);
        let run = from.run::<S>(first, count);
        if run.rows() == count {
            return stack(run, units);
        }
        let mut both = Vec::with_capacity(count * run.cols());
        for key in first..first + count {
            let line = from.run::<S>(key, 1);
            both.extend((0..line.cols()).map(|c| line.at(0, c)));
        }
        stack(Matrix::new(&both, count, run.cols(), run.cols()), units);
    }

    fn place(&self, tile: &Tile) -> usize {
        tile.sequence * self.problem.size.key_heads + tile.key_head
    }

    fn line<'s>(
        &'s self,
        copied: Option<&'s Copied<S>>,
        from: Accessor<'p, 'a>,
        tile: &Tile,
        keys: Range<usize>,
    ) -> Matrix<'s, S::Unit> {
        if let Some(copied) = copied {
            return copied.of(self.place(tile)).part(keys, 0..copied.width);
        }
        S::borrow(from.run(keys.start, keys.len()))
            .unwrap_or_else(|| unreachable!("rows that cannot be read in place were copied"))
    }

    /// Keys of a range: [keys, units of the head dimension].
    pub fn keys(&self, tile: &Tile, keys: Range<usize>) -> Matrix<'_, S::Unit> {
        self.line(self.key_lines.as_ref(), tile.keys(self.problem), tile, keys)
    }

    /// Values of a range: [keys, units of the value dimension].
    pub fn value_lines(&self, tile: &Tile, keys: Range<usize>) -> Matrix<'_, S::Unit> {
        self.line(self.value_lines.as_ref(), tile.values(self.problem), tile, keys)
    }

    /// Stacked values of a range that starts on a unit, turned: [value dim, units of keys].
    pub fn values(&self, tile: &Tile, keys: Range<usize>) -> Matrix<'_, S::Unit> {
        let rows = keys.start / S::PER_UNIT..keys.end.div_ceil(S::PER_UNIT);
        if let Some(copied) = &self.value_stack {
            return copied.of(self.place(tile)).part(rows, 0..self.problem.size.value_dim).transposed();
        }
        S::borrow(tile.values(self.problem).run(keys.start, keys.len()))
            .unwrap_or_else(|| unreachable!("rows that cannot be read in place were copied"))
            .transposed()
    }

    /// Stacked keys of a range that starts on a unit: [units of keys, head dimension in whole registers].
    pub fn key_stack(&self, tile: &Tile, keys: Range<usize>) -> Matrix<'_, S::Unit> {
        let copied = self.key_stack.as_ref().unwrap_or_else(|| unreachable!("asked of the backward pass alone"));
        let rows = keys.start / S::PER_UNIT..keys.end.div_ceil(S::PER_UNIT);
        copied.of(self.place(tile)).part(rows, 0..copied.width)
    }
}

/// A lane's query as units: zeros where the scale is 0, since every score is 0 then, but -inf * 0 is NaN.
pub fn query_line<S: Arithmetic>(problem: &Problem<'_>, tile: &Tile, lane: usize, line: &mut [S::Unit]) {
    if problem.rules.scale == 0.0 {
        line.fill(S::Unit::default());
    } else {
        S::copy(tile.row(problem, &problem.query, lane), line);
    }
}

/// Lanes `0..count` as panels of at most [`Arithmetic::panel`] lanes, `width` in all, each `units(dim)` long.
pub fn panels<S: Arithmetic>(
    count: usize,
    dim: usize,
    width: usize,
    lines: &mut Vec<S::Unit>,
    panels: &mut [S::Unit],
    fill: impl Fn(usize, &mut [S::Unit]),
) {
    let depth = S::units(dim);
    let stride = line_stride(depth);
    lines.resize((S::panel() * stride).max(lines.len()), S::Unit::default());
    for first in (0..width).step_by(S::panel()) {
        let lanes = S::panel().min(width - first);
        let own = lanes.min(count.saturating_sub(first));
        for i in 0..own {
            fill(first + i, &mut lines[i * stride..i * stride + depth]);
        }
        let mut sources: [&[S::Unit]; 64] = [&[]; 64];
        for (i, source) in sources.iter_mut().enumerate().take(own) {
            *source = &lines[i * stride..i * stride + depth];
        }
        S::pack(&sources[..own], depth, lanes, &mut panels[depth * first..depth * (first + lanes)]);
    }
}
