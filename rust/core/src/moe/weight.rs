//! One expert's weight as the stages read it: of the layer's type, or bytes (int8) whose rows have a scale.
//!
//! The scale is a factor of a whole row, so it multiplies the row's *sums*: `<x, s q> = s <x, q>`. Bytes are exact in every
//! unit, so the products of q are as exact as those of any weight, and memory gives one byte an element instead of two
//! or four.

use crate::arch::{Ahead, Kernel, prefetch};
use crate::dtype::{Dtype, Real};
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::inner_products;
use crate::gemm::pack::{self, Lines, line_stride};
use crate::view::{Array, Matrix};
use std::ops::Range;

/// Rows of an expert's weight.
#[derive(Clone, Copy)]
pub enum Weight<'a, S> {
    /// As x.
    Plain(Matrix<'a, S>),
    /// To be scaled.
    Bytes(Matrix<'a, i8>),
}

impl<'a, S: Arithmetic> Weight<'a, S> {
    /// The rows of `expert`.
    pub fn of(array: &Array<'a>, expert: usize) -> Self {
        match array.dtype() {
            Dtype::I8 => Weight::Bytes(array.matrix(&[expert])),
            _ => Weight::Plain(array.matrix(&[expert])),
        }
    }

    /// `count` rows from `first`, `step` apart.
    pub fn every(&self, first: usize, count: usize, step: usize) -> Self {
        match self {
            Weight::Plain(matrix) => Weight::Plain(matrix.every(first, count, step)),
            Weight::Bytes(matrix) => Weight::Bytes(matrix.every(first, count, step)),
        }
    }

    /// These rows, evenly apart, as units where they are: most weights of x's type. (Rows a multiple of 4 KiB apart
    /// share a set of the first-level cache; the dozen that are read side by side fit its ways, and copying them costs
    /// more.)
    pub fn in_place(&self, rows: &[usize]) -> Option<Matrix<'a, S::Unit>> {
        let Weight::Plain(matrix) = self else { return None };
        let step = rows.get(1).map_or(1, |second| second - rows[0]);
        let first = rows.first().copied().unwrap_or(0);
        S::borrow(matrix.every(first, rows.len(), step)).filter(|lines| lines.col_stride() == 1 || lines.cols() <= 1)
    }

    /// Copies these rows compactly, as units; row `i` of them starts at `i * stride`.
    pub fn compact(&self, rows: &[usize], stride: usize, buffer: &mut Vec<S::Unit>) {
        if buffer.len() < rows.len() * stride {
            buffer.resize(rows.len() * stride, S::Unit::default());
        }
        match self {
            Weight::Plain(matrix) => {
                let across = matrix.row_stride().abs() < matrix.col_stride().abs();
                let half = rows.len() / 2;
                if across
                    && half > 0
                    && rows.len() == 2 * half
                    && (0..half).all(|i| rows[i] == rows[0] + 2 * i && rows[half + i] == rows[i] + 1)
                {
                    // Interleaved gates and ups lie side by side in memory: one pass over both.
                    let both = matrix.part(rows[0]..rows[0] + 2 * half, 0..matrix.cols());
                    return pack::turned(both, stride, buffer, |i| i / 2 + i % 2 * half);
                }
                let mut start = 0;
                while start < rows.len() {
                    // Gates, then ups: each evenly apart, whatever the layout.
                    let run = &rows[start..];
                    let step = run.get(1).filter(|&&second| second > run[0]).map_or(1, |second| second - run[0]);
                    let count = 1 + run.windows(2).take_while(|pair| pair[1] == pair[0] + step).count();
                    let part = Lines::all(matrix.every(run[0], count, step));
                    pack::compact_into(&part, 0, count, stride, &mut buffer[start * stride..]);
                    start += count;
                }
            }
            Weight::Bytes(matrix) => {
                for (&row, units) in rows.iter().zip(buffer.chunks_mut(stride.max(1))) {
                    S::copy_i8(matrix.part(row..row + 1, 0..matrix.cols()), &mut units[..S::units(matrix.cols())]);
                }
            }
        }
    }

    /// Asks for the memory of the first rows from `row` on, as far as a walk over rows asks ahead on its own: what it
    /// jumps to would otherwise start with a wait.
    pub fn ask_start(&self, row: usize) {
        const BYTES: usize = 8192;
        fn start<T: Copy>(matrix: &Matrix<'_, T>, row: usize) {
            let rows = BYTES / (matrix.cols() * size_of::<T>()).max(1);
            prefetch(matrix.part(row..matrix.rows().min(row + rows.max(1)), 0..matrix.cols()));
        }
        match self {
            Weight::Plain(matrix) => start(matrix, row),
            Weight::Bytes(matrix) => start(matrix, row),
        }
    }

    /// Asks for these rows during the products that follow, if each is contiguous.
    pub fn ask(&self, rows: impl Iterator<Item = usize>, ahead: &mut Ahead) {
        match self {
            Weight::Plain(matrix) => ahead.set(rows.filter_map(|row| matrix.row(row))),
            Weight::Bytes(matrix) => ahead.set(rows.filter_map(|row| matrix.row(row))),
        }
    }
}

/// Few rows of x, as the products with a weight read them: its units, or accumulators beside bytes.
pub struct Few<S: Arithmetic> {
    units: Lined<S::Unit>,
    wide: Lined<S::Acc>,
    depth: usize,
    /// Rows of a weight that cannot be read in place.
    converted: Vec<S::Unit>,
    bytes: Vec<i8>,
}

impl<S: Arithmetic> Default for Few<S> {
    fn default() -> Self {
        Self { units: Lined::default(), wide: Lined::default(), depth: 0, converted: Vec::new(), bytes: Vec::new() }
    }
}

impl<S: Arithmetic> Few<S> {
    /// Copies lines `rows` of x, to be multiplied with rows of `weight`.
    pub fn load(&mut self, x: &Lines<'_, S>, rows: Range<usize>, weight: Weight<'_, S>) {
        self.depth = x.depth();
        let lines = rows.clone().map(|row| x.line(row));
        match weight {
            Weight::Plain(_) => {
                self.units.fit(rows.len(), S::units(self.depth));
                lines.enumerate().for_each(|(i, line)| S::copy(line, self.units.row(i)));
            }
            Weight::Bytes(_) => {
                self.wide.fit(rows.len(), self.depth);
                for (i, line) in lines.enumerate() {
                    let wide = self.wide.row(i);
                    match line.row(0) {
                        Some(row) => S::widen_row(row, wide),
                        None => wide.iter_mut().enumerate().for_each(|(k, wide)| *wide = line.at(0, k).widen()),
                    }
                }
            }
        }
    }

    /// `out[r * out_row + w] = <x[r], weight[w]>`, without the scale. Every row of the weight is read once.
    pub fn products(&mut self, weight: Weight<'_, S>, out: &mut [S::Acc], out_row: usize) {
        match weight {
            Weight::Plain(rows) => {
                inner_products::<S>(self.units.matrix(), rows, &mut self.converted, out, out_row);
            }
            Weight::Bytes(mut rows) => {
                if rows.col_stride() != 1 && rows.cols() > 1 {
                    self.bytes.clear();
                    self.bytes
                        .extend((0..rows.rows() * rows.cols()).map(|i| rows.at(i / rows.cols(), i % rows.cols())));
                    rows = Matrix::new(&self.bytes, rows.rows(), rows.cols(), rows.cols());
                }
                S::Acc::table().rows_i8(self.wide.matrix(), rows, out, out_row);
            }
        }
    }
}

/// Rows that start with a line of the cache: a register that straddles two costs two loads, and rows of x are read
/// again for every row of a weight.
#[derive(Default)]
struct Lined<T> {
    elements: Vec<T>,
    first: usize,
    rows: usize,
    width: usize,
}

impl<T: Copy + Default> Lined<T> {
    const LINE: usize = 64;

    fn fit(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        let len = rows * line_stride(width) + Self::LINE / size_of::<T>();
        if self.elements.len() < len {
            self.elements.resize(len, T::default());
        }
        // A hint: where the alignment cannot be had, rows start where they may.
        self.first = self.elements.as_ptr().align_offset(Self::LINE).min(Self::LINE / size_of::<T>());
    }

    fn row(&mut self, i: usize) -> &mut [T] {
        &mut self.elements[self.first + i * line_stride(self.width)..][..self.width]
    }

    fn matrix(&self) -> Matrix<'_, T> {
        Matrix::new(&self.elements[self.first..], self.rows, self.width, line_stride(self.width))
    }
}

/// The scales of an expert's rows; all one unless its weight is bytes.
#[derive(Clone, Copy)]
pub struct Scale<'a>(Option<Matrix<'a, f32>>);

impl<'a> Scale<'a> {
    /// The scales of `expert`.
    pub fn of(array: Option<&Array<'a>>, expert: usize) -> Self {
        Self(array.map(|array| array.vector(&[expert])))
    }

    /// A sum of row `row`, scaled.
    #[inline(always)]
    pub fn apply<A: Real>(&self, row: usize, sum: A) -> A {
        match &self.0 {
            Some(scales) => sum * A::of(f64::from(scales.at(0, row))),
            None => sum,
        }
    }

    /// `line[i] *= scale of row`.
    pub fn apply_all<A: Real>(&self, row: usize, line: &mut [A]) {
        if let Some(scales) = &self.0 {
            let scale = A::of(f64::from(scales.at(0, row)));
            for value in line {
                *value = *value * scale;
            }
        }
    }
}
