//! A program over all its elements, through the tile interpreter.

use super::bind::Bound;
use super::program::Kind;
use super::tile::{CaptureGradient, Evaluator, Side};
use crate::arch::lanes::FloatLane;
use crate::dtype::{Dtype, Flag};
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use std::sync::{Mutex, PoisonError};

/// Which side of a block runs along the lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lanes {
    /// Queries, as in attention over many queries.
    Queries,
    /// Keys, as in attention of few queries.
    Keys,
}

/// Elements a side of a block.
const BLOCK: usize = 128;

/// Fills `out` [batch, heads, queries, keys]: bool for a mask, the evaluating type otherwise. `score` and `grad` have its
/// shape; without a score it is 0. A gradient program adds into `gradients`, in the order of blocks: heads of one batch
/// after another.
///
/// # Errors
/// Shapes or types that do not fit; an index that leaves its capture, a division by zero.
pub fn evaluate<T: FloatLane>(
    bound: &Bound<'_, T>,
    out: ArrayMut<'_>,
    score: Option<&Array<'_>>,
    grad: Option<&Array<'_>>,
    gradients: &mut [Option<CaptureGradient<T>>],
    lanes: Lanes,
) -> Result<()> {
    let extents = bound.extents;
    let shape = [extents.batch, extents.heads, extents.queries, extents.keys];
    let kind = bound.program.kind();
    let dtype = if kind == Kind::Mask { Dtype::Bool } else { T::DTYPE };
    let axes = format!("[batch, heads, queries, keys] = {shape:?}");
    if out.shape() != shape {
        return Err(Error::shape("out", axes, out.shape()));
    }
    if out.dtype() != dtype {
        return Err(Error::dtype("out", dtype.name(), out.dtype()));
    }
    for (name, array) in [("score", score), ("grad", grad)] {
        let Some(array) = array else { continue };
        if array.shape() != shape {
            return Err(Error::shape(name, axes, array.shape()));
        }
        if array.dtype() != T::DTYPE {
            return Err(Error::dtype(name, T::DTYPE.name(), array.dtype()));
        }
    }
    if kind == Kind::Gradient && grad.is_none() {
        return Err(Error::value("grad", "an array for a gradient program", "None"));
    }
    if shape.contains(&0) {
        return Ok(());
    }
    // Gradients of captures are sums over everything: one thread keeps their order.
    let serial = !gradients.is_empty();
    let gradients = Mutex::new(gradients);
    let work = Work { bound, score, grad, gradients: &gradients, lanes };
    let blocks = extents.queries.div_ceil(BLOCK);
    let tasks = extents.batch * extents.heads * blocks;
    let scratch = || (Evaluator::new(bound), Vec::new(), Vec::new());
    if kind == Kind::Mask {
        let rows = out.rows::<Flag>();
        threads::for_each(tasks, serial, scratch, |task, (evaluator, block, scores)| {
            work.strip(task, evaluator, block, scores, |row| rows.take(row), |value| Flag(u8::from(value != T::ZERO)));
        })?;
    } else {
        let rows = out.rows::<T>();
        threads::for_each(tasks, serial, scratch, |task, (evaluator, block, scores)| {
            work.strip(task, evaluator, block, scores, |row| rows.take(row), |value| value);
        })?;
    }
    bound.out_of_range().map_or(Ok(()), Err)
}

struct Work<'w, 'a, T> {
    bound: &'w Bound<'a, T>,
    score: Option<&'w Array<'w>>,
    grad: Option<&'w Array<'w>>,
    gradients: &'w Mutex<&'w mut [Option<CaptureGradient<T>>]>,
    lanes: Lanes,
}

impl<T: FloatLane> Work<'_, '_, T> {
    /// The rows of one block of queries.
    fn strip<'o, O: 'o>(
        &self,
        task: usize,
        evaluator: &mut Evaluator<'_, '_, T>,
        block: &mut Vec<T>,
        scores: &mut Vec<T>,
        row: impl Fn(usize) -> &'o mut [O],
        convert: impl Fn(T) -> O,
    ) {
        let extents = self.bound.extents;
        let blocks = extents.queries.div_ceil(BLOCK);
        let (line, first) = (task / blocks, task % blocks * BLOCK);
        let (batch, head) = (line / extents.heads, line % extents.heads);
        let queries: Vec<usize> = (first..(first + BLOCK).min(extents.queries)).collect();
        let heads = vec![head; queries.len()];
        let mut rows: Vec<&mut [O]> = queries.iter().map(|query| row(line * extents.queries + query)).collect();
        let at = [batch, head];
        let (score, grad) = (self.score.map(|x| x.matrix::<T>(&at)), self.grad.map(|x| x.matrix::<T>(&at)));
        for start in (0..extents.keys).step_by(BLOCK) {
            let keys = start..(start + BLOCK).min(extents.keys);
            let side = Side::Queries { heads: &heads, queries: &queries };
            // A width that is no multiple of anything, with lanes to spare: what the interpreter promises to take.
            let (lanes, others) = match self.lanes {
                Lanes::Queries => (side, Side::Keys(keys.clone())),
                Lanes::Keys => (Side::Keys(keys.clone()), side),
            };
            let (width, count) = (lanes.len() + 3, others.len());
            let place = |query: usize, key: usize| match self.lanes {
                Lanes::Queries => key * width + query,
                Lanes::Keys => query * width + key,
            };
            let load = |array: Option<Matrix<'_, T>>, buffer: &mut Vec<T>| {
                buffer.clear();
                buffer.resize(count * width, T::ZERO);
                if let Some(array) = array {
                    for query in 0..queries.len() {
                        for key in 0..keys.len() {
                            buffer[place(query, key)] = array.at(first + query, start + key);
                        }
                    }
                }
            };
            evaluator.lanes(batch, lanes);
            match self.bound.program.kind() {
                Kind::Mask => {
                    block.clear();
                    block.resize(count * width, T::ONE);
                    evaluator.mask(others, block, width, T::ZERO);
                }
                Kind::Score => {
                    load(score, block);
                    evaluator.score(others, block, width);
                }
                Kind::Gradient => {
                    load(score, scores);
                    load(grad, block);
                    let mut gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut captures: Vec<_> = gradients.iter_mut().map(Option::as_mut).collect();
                    evaluator.gradient(others, scores, block, width, &mut captures);
                }
            }
            for (query, row) in rows.iter_mut().enumerate() {
                for key in keys.clone() {
                    row[key] = convert(block[place(query, key - start)]);
                }
            }
        }
    }
}
