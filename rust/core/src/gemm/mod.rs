//! Matrix products: `C[i, j] = sum over k of A[row(i), k] * B[k, j]`.
//!
//! * [`arithmetic`]: how each source type multiplies;
//! * [`pack`]: compact lines and panels;
//! * this file: the blocking around them.
//!
//! ```text
//! pack all of B into panels of up to 3 registers of columns, in parallel
//! for each block of A's rows, each group of panels (a task):
//!     copy the block's rows compactly
//!     for each panel: C block = tile(A block, panel)
//! ```
//! Departures: (1) the reduction is cut into chunks whose piece of a panel stays in the first-level cache ([`accumulate`]);
//! (2) few rows of A against adjacent lines of B^T go through the memory-bound kernel and pack nothing;
//! (3) B is packed in pieces of at most [`PACKED_BYTES`].

pub mod arithmetic;
pub mod pack;
#[cfg(test)]
pub(crate) mod tests;

use crate::arch::{Ahead, Round};
use crate::dtype::{Dtype, Element, Real};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix, Rows};
use arithmetic::Arithmetic;
use half::{bf16, f16};
use pack::Lines;

/// Size of the piece of a panel that strips share.
const CHUNK_BYTES: usize = 24 << 10;
/// Rows of A in a task.
const ROWS: usize = 96;
/// Up to this many rows of A the memory-bound kernel is used.
const FEW_ROWS: usize = 8;
/// Columns in a task of the memory-bound kernel, and in an output segment.
const SEGMENT: usize = 192;
/// Segments in a task.
const SEGMENTS: usize = 8;
/// Size of the packed part of B.
const PACKED_BYTES: usize = 64 << 20;
/// Below this many multiplications nobody is woken up.
pub const SERIAL_WORK: usize = 1 << 17;

/// `out = A[rows] B`. A is [M, K], B is [K, N], any strides; `rows` gathers rows of A; `out` is [M or rows, N], of
/// A's type or of its accumulator's.
///
/// # Errors
/// Wrong ranks, extents that do not match, mixed or unsupported types, row numbers outside A.
pub fn matmul(a: &Array<'_>, b: &Array<'_>, rows: Option<&[i64]>, out: ArrayMut<'_>) -> Result<()> {
    if a.shape().len() != 2 {
        return Err(Error::shape("a", "rank 2 [rows, depth]", a.shape()));
    }
    if b.shape().len() != 2 {
        return Err(Error::shape("b", "rank 2 [depth, columns]", b.shape()));
    }
    if a.dtype() != b.dtype() {
        return Err(Error::dtype("b", format!("{}, as a", a.dtype()), b.dtype()).hint("convert one of them"));
    }
    if a.shape()[1] != b.shape()[0] {
        return Err(Error::shape("b", format!("[{}, columns], to match a's depth", a.shape()[1]), b.shape()));
    }
    let gather = rows.map(|rows| gather_list(rows, a.shape()[0])).transpose()?;
    let m = gather.as_ref().map_or(a.shape()[0], Vec::len);
    let n = b.shape()[1];
    if out.shape() != [m, n] {
        return Err(Error::shape("out", format!("[{m}, {n}]"), out.shape()));
    }
    match a.dtype() {
        Dtype::F32 => typed_out::<f32>(a, b, gather.as_deref(), out),
        Dtype::F64 => typed_out::<f64>(a, b, gather.as_deref(), out),
        Dtype::F16 => typed_out::<f16>(a, b, gather.as_deref(), out),
        Dtype::Bf16 => typed_out::<bf16>(a, b, gather.as_deref(), out),
        other => Err(Error::dtype("a", "float32, float64, float16 or bfloat16", other)),
    }
}

/// Row numbers, checked against the number of rows.
///
/// # Errors
/// A number outside `0..count`, named with its place.
pub fn gather_list(rows: &[i64], count: usize) -> Result<Vec<usize>> {
    let check = |(at, &row): (usize, &i64)| {
        usize::try_from(row).ok().filter(|&row| row < count).ok_or_else(|| {
            Error::value("rows", format!("row numbers in 0..{count}"), format!("{row} at position {at}"))
        })
    };
    rows.iter().enumerate().map(check).collect()
}

fn typed_out<S: Arithmetic>(a: &Array<'_>, b: &Array<'_>, gather: Option<&[usize]>, out: ArrayMut<'_>) -> Result<()> {
    let (a, b) = (a.matrix::<S>(&[]), b.matrix::<S>(&[]));
    let a = gather.map_or(Lines::all(a), |gather| Lines::gathered(a, gather));
    if out.dtype() == S::DTYPE {
        product::<S, S>(a, b, &out.segments::<S>(SEGMENT))
    } else if out.dtype() == <S::Acc as Element>::DTYPE {
        product::<S, S::Acc>(a, b, &out.segments::<S::Acc>(SEGMENT))
    } else {
        Err(Error::dtype("out", format!("{} or {}", S::DTYPE, <S::Acc as Element>::DTYPE), out.dtype()))
    }
}

fn product<S: Arithmetic, O: Round<Acc = S::Acc>>(a: Lines<'_, S>, b: Matrix<'_, S>, out: &Rows<'_, O>) -> Result<()> {
    let (m, n, depth) = (a.len(), b.cols(), b.rows());
    if m == 0 || n == 0 {
        return Ok(());
    }
    let work = m.saturating_mul(n).saturating_mul(depth);
    let by_line = Lines::all(b.transposed());
    if m <= FEW_ROWS && depth > 0 && (b.row_stride() == 1 || depth == 1) {
        return few_rows(a, b.transposed(), out, work <= SERIAL_WORK);
    }
    let unit = std::mem::size_of::<S::Unit>();
    let chunk = (PACKED_BYTES / (unit * S::units(depth).max(1)) / SEGMENT * SEGMENT)
        .clamp(SEGMENT, n.next_multiple_of(SEGMENT));
    for first in (0..n).step_by(chunk) {
        panels(&a, &by_line, first..n.min(first + chunk), out, work <= SERIAL_WORK)?;
    }
    Ok(())
}

/// One piece of B: pack it, then multiply every block of rows with every segment of columns.
fn panels<S: Arithmetic, O: Round<Acc = S::Acc>>(
    a: &Lines<'_, S>,
    b: &Lines<'_, S>,
    columns: std::ops::Range<usize>,
    out: &Rows<'_, O>,
    serial: bool,
) -> Result<()> {
    let units = S::units(b.depth());
    let width = S::panel().min(columns.len().next_multiple_of(S::lanes()));
    let count = columns.len().div_ceil(width);
    let mut packed = vec![S::Unit::default(); count * units * width];
    {
        let slots: Vec<_> = packed.chunks_mut((units * width).max(1)).map(std::sync::Mutex::new).collect();
        threads::for_each(if units == 0 { 0 } else { count }, serial, Vec::new, |task, scratch| {
            let first = columns.start + task * width;
            let lines = width.min(columns.end - first);
            let mut slot = slots[task].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            pack::panel(b, first, lines, width, scratch, &mut slot);
        })?;
    }
    let segments = columns.len().div_ceil(SEGMENT);
    let per_segment = SEGMENT / width.min(SEGMENT);
    // A copied block of rows serves several segments: the copy costs as much as a few columns.
    let groups = segments.div_ceil(SEGMENTS);
    let stride = pack::line_stride(units);
    let blocks = a.len().div_ceil(ROWS);
    threads::for_each(
        blocks * groups,
        serial,
        || (Vec::new(), Vec::new()),
        |task, (lines, block)| {
            let (row, group) = (task / groups * ROWS, task % groups);
            let rows = ROWS.min(a.len() - row);
            pack::compact(a, row, rows, stride, lines);
            block.resize((ROWS * width).max(block.len()), S::Acc::ZERO);
            let left = Matrix::new(lines, rows, units, stride);
            for segment in group * SEGMENTS..segments.min((group + 1) * SEGMENTS) {
                let number = |r: usize| (row + r) * out.per_row() + columns.start / SEGMENT + segment;
                let mut targets: Vec<&mut [O]> = (0..rows).map(|r| out.take(number(r))).collect();
                for panel in (segment * per_segment..(segment + 1) * per_segment).take_while(|&panel| panel < count) {
                    let right = Matrix::new(&packed[panel * units * width..], units, width, width);
                    accumulate::<S>(left, right, block, width, &mut Ahead::default());
                    let at = panel * width - segment * SEGMENT;
                    for (target, line) in targets.iter_mut().zip(block.chunks(width)) {
                        let end = target.len().min(at + width);
                        let part = &mut target[at.min(end)..end];
                        O::round(&line[..part.len()], part);
                    }
                }
            }
        },
    )
}

/// `block = A * panel`, chunk by chunk along the reduction: the piece of the panel that all strips of A read stays in the
/// first-level cache. Rows of `block` are `block_row` apart; `ahead` is asked for meanwhile.
pub(crate) fn accumulate<S: Arithmetic>(
    a: Matrix<'_, S::Unit>,
    panel: Matrix<'_, S::Unit>,
    block: &mut [S::Acc],
    block_row: usize,
    ahead: &mut Ahead,
) {
    let units = a.cols();
    let chunk = chunk::<S>(panel.cols());
    let mut start = 0;
    loop {
        let end = units.min(start + chunk);
        let piece = panel.part(start..end, 0..panel.cols());
        S::tile_ahead(a.part(0..a.rows(), start..end), piece, block, block_row, start > 0, ahead);
        start = end;
        if start >= units {
            break;
        }
    }
}

/// Lines in a block of the left operand of [`accumulate_across`]: a register of them where the reduction is long, since
/// every step of it starts a new line of the cache; more where all of a block stays in the first level.
pub(crate) fn across<S: Arithmetic>(units: usize) -> usize {
    const BLOCK_BYTES: usize = 12 << 10;
    [96, 48].into_iter().find(|lines| lines * units * size_of::<S::Unit>() <= BLOCK_BYTES).unwrap_or(16)
}

/// As [`accumulate`], for an A whose lines the reduction runs across: `left` holds blocks of [`across`] lines as
/// [`pack::stacked`] left them, of which `lines` count.
pub(crate) fn accumulate_across<S: Arithmetic>(
    left: &[S::Unit],
    lines: usize,
    panel: Matrix<'_, S::Unit>,
    block: &mut [S::Acc],
    block_row: usize,
    ahead: &mut Ahead,
) {
    let units = panel.rows();
    let (chunk, across) = (chunk::<S>(panel.cols()), across::<S>(units));
    let step = pack::block_step(units, across);
    let mut start = 0;
    loop {
        let end = units.min(start + chunk);
        let piece = panel.part(start..end, 0..panel.cols());
        for (number, first) in (0..lines).step_by(across).enumerate() {
            let count = across.min(lines - first);
            let part = Matrix::new(&left[number * step + start * across..], end - start, across, across);
            let a = part.part(0..end - start, 0..count).transposed();
            S::tile_ahead(a, piece, &mut block[first * block_row..], block_row, start > 0, ahead);
        }
        start = end;
        if start >= units {
            break;
        }
    }
}

/// Units of the reduction whose piece of a panel fits the first-level cache.
pub(crate) fn chunk<S: Arithmetic>(width: usize) -> usize {
    (CHUNK_BYTES / (width * size_of::<S::Unit>())).max(16)
}

/// Few rows of A against the lines of B^T, each read once.
fn few_rows<S: Arithmetic, O: Round<Acc = S::Acc>>(
    a: Lines<'_, S>,
    b: Matrix<'_, S>,
    out: &Rows<'_, O>,
    serial: bool,
) -> Result<()> {
    let units = S::units(a.depth());
    let (m, stride) = (a.len(), pack::line_stride(units));
    let mut left = Vec::new();
    pack::compact(&a, 0, m, stride, &mut left);
    let left = Matrix::new(&left, m, units, stride);
    threads::for_each(
        b.rows().div_ceil(SEGMENT),
        serial,
        || (Vec::new(), Vec::new()),
        |segment, (scratch, sums)| {
            let first = segment * SEGMENT;
            let count = SEGMENT.min(b.rows() - first);
            let part = b.part(first..first + count, 0..b.cols());
            sums.resize(m * SEGMENT, S::Acc::ZERO);
            inner_products::<S>(left, part, scratch, sums, SEGMENT);
            for (r, line) in sums.chunks(SEGMENT).enumerate().take(m) {
                let target = out.take(r * out.per_row() + segment);
                O::round(&line[..target.len()], target);
            }
        },
    )
}

/// `out[x, w] = <X[x], W[w]>` for lines of any layout: W is read in place if it can be.
pub(crate) fn inner_products<S: Arithmetic>(
    x: Matrix<'_, S::Unit>,
    w: Matrix<'_, S>,
    scratch: &mut Vec<S::Unit>,
    out: &mut [S::Acc],
    out_row: usize,
) {
    if let Some(lines) = S::borrow(w).filter(|lines| lines.col_stride() == 1 || lines.cols() <= 1) {
        return S::rows(x, lines, out, out_row);
    }
    let stride = pack::line_stride(x.cols());
    let count = w.rows();
    pack::compact(&Lines::all(w), 0, count, stride, scratch);
    S::rows(x, Matrix::new(scratch, count, x.cols(), stride), out, out_row);
}
