//! Keys and values in the order the kernels read them.
//!
//! Keys are read by broadcast along their width, values across it, so single and double precision are read where they
//! lie. They are copied, once per key/value head, when that cannot be: half types (a unit of bfloat16 values holds two
//! neighbouring *keys*; f16 is converted), and rows whose distance is a multiple of 4 KiB (all of them would fall into
//! the same set of the first-level cache).

use super::problem::Problem;
use crate::error::Result;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::pack::line_stride;
use crate::threads;
use crate::view::Matrix;
use std::sync::{Mutex, PoisonError};

/// Keys copied by one task.
const KEYS: usize = 512;

/// Copies of one array for all heads; empty where the array is read in place.
struct Copied<U> {
    units: Vec<U>,
    rows: usize,
    width: usize,
    stride: usize,
}

impl<U: Copy + Default> Copied<U> {
    fn head(&self, head: usize) -> Option<Matrix<'_, U>> {
        if self.units.is_empty() {
            return None;
        }
        let size = self.rows * self.stride;
        Some(Matrix::new(&self.units[head * size..(head + 1) * size], self.rows, self.width, self.stride))
    }
}

/// Keys and values of all heads.
pub struct Operands<'p, 'a, S: Arithmetic> {
    problem: &'p Problem<'a>,
    keys: Copied<S::Unit>,
    values: Copied<S::Unit>,
}

fn readable<S: Arithmetic>(matrix: Matrix<'_, S>) -> bool {
    let distance = matrix.row_stride().unsigned_abs() * std::mem::size_of::<S>();
    S::borrow(matrix).is_some() && (distance == 0 || !distance.is_multiple_of(4096))
}

impl<'p, 'a, S: Arithmetic> Operands<'p, 'a, S> {
    /// Copies what must be copied.
    pub fn new(problem: &'p Problem<'a>, serial: bool) -> Result<Self> {
        let size = problem.size;
        let heads = size.batch * size.key_heads;
        let at = |head: usize| [head / size.key_heads, head % size.key_heads];
        let empty = || Copied { units: Vec::new(), rows: 0, width: 0, stride: 0 };
        let (mut keys, mut values) = (empty(), empty());
        if heads == 0 || size.keys == 0 {
            return Ok(Self { problem, keys, values });
        }
        if !readable::<S>(problem.key.matrix(&at(0))) {
            let width = S::units(size.head_dim);
            keys = Copied { units: Vec::new(), rows: size.keys, width, stride: line_stride(width) };
            fill(&mut keys, heads, KEYS, serial, |head, row, units| {
                S::copy(problem.key.matrix::<S>(&at(head)).part(row..row + 1, 0..size.head_dim), units);
            })?;
        }
        if S::PER_UNIT > 1 || !readable::<S>(problem.value.matrix(&at(0))) {
            let width = size.value_dim;
            values = Copied { units: Vec::new(), rows: S::units(size.keys), width, stride: line_stride(width) };
            fill(&mut values, heads, KEYS / S::PER_UNIT, serial, |head, row, units| {
                let keys = row * S::PER_UNIT..((row + 1) * S::PER_UNIT).min(size.keys);
                S::stack(problem.value.matrix::<S>(&at(head)).part(keys, 0..width), units);
            })?;
        }
        Ok(Self { problem, keys, values })
    }

    /// Keys `start..start + len` of a head: [len, units of the head dimension].
    pub fn keys(&self, batch: usize, head: usize, start: usize, len: usize) -> Matrix<'_, S::Unit> {
        let width = S::units(self.problem.size.head_dim);
        if let Some(copy) = self.keys.head(batch * self.problem.size.key_heads + head) {
            return copy.part(start..start + len, 0..width);
        }
        let keys = self.problem.key.matrix::<S>(&[batch, head]).part(start..start + len, 0..self.problem.size.head_dim);
        S::borrow(keys).unwrap_or_else(|| unreachable!("keys that cannot be read in place were copied"))
    }

    /// Values of the keys from `start` (a multiple of the unit): [value dim, units of `len` keys].
    pub fn values(&self, batch: usize, head: usize, start: usize, len: usize) -> Matrix<'_, S::Unit> {
        let (first, count) = (start / S::PER_UNIT, S::units(len));
        let width = self.problem.size.value_dim;
        if let Some(copy) = self.values.head(batch * self.problem.size.key_heads + head) {
            return copy.part(first..first + count, 0..width).transposed();
        }
        let values = self.problem.value.matrix::<S>(&[batch, head]).part(start..start + len, 0..width);
        S::borrow(values)
            .unwrap_or_else(|| unreachable!("values that cannot be read in place were copied"))
            .transposed()
    }
}

fn fill<U: Copy + Default + Send + Sync>(
    copied: &mut Copied<U>,
    heads: usize,
    rows: usize,
    serial: bool,
    line: impl Fn(usize, usize, &mut [U]) + Sync,
) -> Result<()> {
    let (count, width, stride) = (copied.rows, copied.width, copied.stride);
    copied.units = vec![U::default(); heads * count * stride];
    let per_head = count.div_ceil(rows);
    let mut parts = Vec::with_capacity(heads * per_head);
    for head in copied.units.chunks_mut(count * stride) {
        parts.extend(head.chunks_mut(rows * stride).map(Mutex::new));
    }
    threads::for_each(
        parts.len(),
        serial,
        || (),
        |task, ()| {
            let mut part = parts[task].lock().unwrap_or_else(PoisonError::into_inner);
            for (i, units) in part.chunks_mut(stride).enumerate() {
                line(task / per_head, task % per_head * rows + i, &mut units[..width]);
            }
        },
    )
}
