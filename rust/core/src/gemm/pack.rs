//! Operands in the order the kernels read them: compact lines, and panels of lines.
//!
//! A *line* runs along the reduction. Lines come from a matrix, in order or gathered by an index list.

use super::arithmetic::Arithmetic;
use crate::arch::prefetch;
use crate::view::Matrix;

/// Steps of a reduction whose rows are asked for in advance: gathered or cut rows are too short for the machine to guess.
const AHEAD: usize = 6;

/// Lines of a matrix: all of them, or the ones an index list names.
#[derive(Clone, Copy)]
pub struct Lines<'a, S> {
    matrix: Matrix<'a, S>,
    gather: Option<&'a [usize]>,
}

impl<'a, S: Arithmetic> Lines<'a, S> {
    /// Every row of `matrix`.
    pub fn all(matrix: Matrix<'a, S>) -> Self {
        Self { matrix, gather: None }
    }

    /// The rows that `gather` names, in its order.
    pub fn gathered(matrix: Matrix<'a, S>, gather: &'a [usize]) -> Self {
        Self { matrix, gather: Some(gather) }
    }

    /// Number of lines.
    pub fn len(&self) -> usize {
        self.gather.map_or(self.matrix.rows(), <[usize]>::len)
    }

    /// True if there is no line.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements in a line.
    pub fn depth(&self) -> usize {
        self.matrix.cols()
    }

    /// Lines `range` of these.
    pub fn range(&self, range: std::ops::Range<usize>) -> Self {
        match self.gather {
            Some(gather) => Self { matrix: self.matrix, gather: Some(&gather[range]) },
            None => Self { matrix: self.matrix.part(range, 0..self.matrix.cols()), gather: None },
        }
    }

    /// Lines `first` and, where there is one, `first + 1`, as a matrix: what one unit of a reduction across lines holds.
    pub fn step(&self, first: usize) -> Matrix<'a, S> {
        let at = |i: usize| self.gather.map_or(i, |gather| gather[i]);
        if S::PER_UNIT == 1 || first + 1 == self.len() {
            return self.line(first);
        }
        self.matrix.pick(at(first), at(first + 1))
    }

    /// Line `i`, as a matrix of one row.
    pub fn line(&self, i: usize) -> Matrix<'a, S> {
        let row = self.gather.map_or(i, |gather| gather[i]);
        self.matrix.part(row..row + 1, 0..self.matrix.cols())
    }
}

/// Distance, in units, between compact lines of `units` units: not a multiple of 4 KiB, or the lines that a kernel
/// reads side by side would fall into one set of the first-level cache.
pub fn line_stride(units: usize) -> usize {
    units.next_multiple_of(16) + 16
}

/// Copies lines `first..first + count` compactly; line `i` starts at `i * stride`.
pub fn compact<S: Arithmetic>(
    lines: &Lines<'_, S>,
    first: usize,
    count: usize,
    stride: usize,
    buffer: &mut Vec<S::Unit>,
) {
    if buffer.len() < count * stride {
        buffer.resize(count * stride, S::Unit::default());
    }
    compact_into(lines, first, count, stride, buffer);
}

/// As [`compact`], into a slice.
pub fn compact_into<S: Arithmetic>(
    lines: &Lines<'_, S>,
    first: usize,
    count: usize,
    stride: usize,
    buffer: &mut [S::Unit],
) {
    let units = S::units(lines.depth());
    let matrix = lines.matrix;
    if lines.gather.is_none() && count > 1 && matrix.row_stride().abs() < matrix.col_stride().abs() {
        return turned(matrix.part(first..first + count, 0..matrix.cols()), stride, buffer, |i| i);
    }
    for i in 0..count {
        S::copy(lines.line(first + i), &mut buffer[i * stride..i * stride + units]);
    }
}

/// [`compact_into`] for lines that lie across the rows of their memory: read row by row, turned in registers. Line `i`
/// goes to place `place(i)`, another one for each.
pub fn turned<S: Arithmetic>(
    lines: Matrix<'_, S>,
    stride: usize,
    buffer: &mut [S::Unit],
    place: impl Fn(usize) -> usize,
) {
    let width = S::lanes();
    // A chunk of the reduction, so that what is stacked stays in the first-level cache.
    let chunk = 64 * S::PER_UNIT;
    let mut block = vec![S::Unit::default(); 64 * width];
    let mut places: Vec<Option<&mut [S::Unit]>> = buffer.chunks_mut(stride.max(1)).map(Some).collect();
    for rows in (0..lines.rows()).step_by(width) {
        let count = width.min(lines.rows() - rows);
        let mut strip: Vec<&mut [S::Unit]> = (rows..rows + count).filter_map(|i| places[place(i)].take()).collect();
        for start in (0..lines.cols()).step_by(chunk) {
            let end = lines.cols().min(start + chunk);
            let units = S::units(end - start);
            let across = Lines::all(lines.part(rows..rows + count, start..end).transposed());
            for k in 0..units {
                S::stack_blocks(across.step(k * S::PER_UNIT), width, 0, &mut block[k * width..][..width]);
            }
            let from = start / S::PER_UNIT;
            let mut targets: Vec<&mut [S::Unit]> = strip.iter_mut().map(|line| &mut line[from..from + units]).collect();
            S::turn(&block, units, width, &mut targets);
        }
    }
}

/// Distance, in units, between the blocks of [`stacked`]: one line of the cache more than they hold, so that blocks
/// written side by side do not fall into one set of the first level.
pub fn block_step(units: usize, width: usize) -> usize {
    units * width + 16
}

/// Columns of lines that the reduction runs *across*, in blocks: block b holds unit k of columns
/// `first + b * width ..` at `blocks[b * block_step(units, width) + k * width ..]`. The last block is zero up to whole registers and
/// unspecified beyond. Returns the units of the reduction. `scratch` is as in [`panel`].
pub fn stacked<S: Arithmetic>(
    lines: &Lines<'_, S>,
    columns: std::ops::Range<usize>,
    width: usize,
    blocks: &mut Vec<S::Unit>,
    scratch: &mut Vec<S::Unit>,
) -> usize {
    let units = S::units(lines.len());
    let step = block_step(units, width);
    let len = columns.len().div_ceil(width) * step;
    if len == 0 {
        return units;
    }
    if blocks.len() < len {
        blocks.resize(len, S::Unit::default());
    }
    let matrix = lines.matrix;
    if lines.gather.is_none() && matrix.row_stride() == 1 && matrix.col_stride() != 1 {
        // A transposed matrix: its columns are what runs along the reduction in memory.
        let across = Lines::all(matrix.transposed());
        for (block, first) in columns.clone().step_by(width).enumerate() {
            let count = width.min(columns.end - first);
            panel(&across, first, count, width, scratch, &mut blocks[block * step..][..step]);
        }
        return units;
    }
    let rows_of = |k: usize| {
        let rows = lines.step(k * S::PER_UNIT);
        rows.part(0..rows.rows(), columns.clone())
    };
    for k in 0..units {
        if k + AHEAD < units {
            prefetch(rows_of(k + AHEAD));
        }
        let rows = rows_of(k);
        S::stack_blocks(rows, width, step, &mut blocks[k * width..len]);
    }
    units
}

/// Lines `first..first + count` as a panel of `width` lanes (missing lines are zero). `scratch` holds the compact
/// lines of a type that is not read in place.
pub fn panel<S: Arithmetic>(
    lines: &Lines<'_, S>,
    first: usize,
    count: usize,
    width: usize,
    scratch: &mut Vec<S::Unit>,
    panel: &mut [S::Unit],
) {
    let units = S::units(lines.depth());
    let mut sources: [&[S::Unit]; 64] = [&[]; 64];
    let mut in_place = true;
    for (i, source) in sources.iter_mut().enumerate().take(count) {
        match S::borrow(lines.line(first + i)).and_then(|line| line.row(0)) {
            Some(row) => *source = row,
            None => {
                in_place = false;
                break;
            }
        }
    }
    if !in_place {
        let stride = line_stride(units);
        compact(lines, first, count, stride, scratch);
        for (i, source) in sources.iter_mut().enumerate().take(count) {
            *source = &scratch[i * stride..i * stride + units];
        }
    }
    S::pack(&sources[..count], units, width, panel);
}
