//! One expert's weight as the stages read it: of the layer's type, or bytes (int8) whose rows have a scale.
//!
//! The scale is a factor of a whole row, so it multiplies the row's *sums*: `<x, s q> = s <x, q>`. Bytes are exact in every
//! unit, so the products of q are as exact as those of any weight, and memory gives one byte an element instead of two
//! or four.

use crate::arch::{Ahead, Kernel};
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
        match self {
            Weight::Plain(matrix) => pack::compact(&Lines::gathered(*matrix, rows), 0, rows.len(), stride, buffer),
            Weight::Bytes(matrix) => {
                if buffer.len() < rows.len() * stride {
                    buffer.resize(rows.len() * stride, S::Unit::default());
                }
                for (&row, units) in rows.iter().zip(buffer.chunks_mut(stride.max(1))) {
                    S::copy_i8(matrix.part(row..row + 1, 0..matrix.cols()), &mut units[..S::units(matrix.cols())]);
                }
            }
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
    units: Vec<S::Unit>,
    wide: Vec<S::Acc>,
    rows: usize,
    depth: usize,
    /// Rows of a weight that cannot be read in place.
    converted: Vec<S::Unit>,
    bytes: Vec<i8>,
}

impl<S: Arithmetic> Default for Few<S> {
    fn default() -> Self {
        Self { units: Vec::new(), wide: Vec::new(), rows: 0, depth: 0, converted: Vec::new(), bytes: Vec::new() }
    }
}

impl<S: Arithmetic> Few<S> {
    /// Copies lines `rows` of x, to be multiplied with rows of `weight`.
    pub fn load(&mut self, x: &Lines<'_, S>, rows: Range<usize>, weight: Weight<'_, S>) {
        (self.rows, self.depth) = (rows.len(), x.depth());
        if let Weight::Plain(_) = weight {
            return pack::compact(x, rows.start, rows.len(), line_stride(S::units(self.depth)), &mut self.units);
        }
        let stride = line_stride(self.depth);
        self.wide.resize(self.wide.len().max(rows.len() * stride), S::Acc::ZERO);
        for (line, wide) in rows.map(|row| x.line(row)).zip(self.wide.chunks_mut(stride)) {
            match line.row(0) {
                Some(row) => S::widen_row(row, &mut wide[..row.len()]),
                None => (0..line.cols()).for_each(|k| wide[k] = line.at(0, k).widen()),
            }
        }
    }

    /// `out[r * out_row + w] = <x[r], weight[w]>`, without the scale. Every row of the weight is read once.
    pub fn products(&mut self, weight: Weight<'_, S>, out: &mut [S::Acc], out_row: usize) {
        match weight {
            Weight::Plain(rows) => {
                let units = S::units(self.depth);
                let x = Matrix::new(&self.units, self.rows, units, line_stride(units));
                inner_products::<S>(x, rows, &mut self.converted, out, out_row);
            }
            Weight::Bytes(mut rows) => {
                if rows.col_stride() != 1 && rows.cols() > 1 {
                    self.bytes.clear();
                    self.bytes
                        .extend((0..rows.rows() * rows.cols()).map(|i| rows.at(i / rows.cols(), i % rows.cols())));
                    rows = Matrix::new(&self.bytes, rows.rows(), rows.cols(), rows.cols());
                }
                let x = Matrix::new(&self.wide, self.rows, self.depth, line_stride(self.depth));
                S::Acc::table().rows_i8(x, rows, out, out_row);
            }
        }
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
