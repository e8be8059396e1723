//! Exact attention, forward: `O = softmax(scale * Q K^T, restricted to the kept keys) V`, with LSE.
//!
//! * [`problem`]: what is asked, validated: extents, types, which key each query may attend; [`sequence`], [`blocks`],
//!   [`mods`]: its parts;
//! * [`schedule`]: for a tile of queries, the key ranges to visit and whether each needs a mask;
//! * [`prefill`]: tiles of many queries (lanes over queries);
//! * [`decode`]: few queries over many keys (split into chunks, bound by memory);
//! * [`finish`]: sinks, normalisation, LSE, and the merge of partial results.
//!
//! Causal, window, boolean masks and selected blocks differ only in what `schedule` writes.

pub mod backward;
pub mod blocks;
mod decode;
mod dropout;
mod finish;
pub mod mods;
mod operands;
mod prefill;
pub mod problem;
mod schedule;
pub mod sequence;
#[cfg(test)]
mod tests;
mod tile;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::arithmetic::Arithmetic;
use crate::view::ArrayMut;
use half::{bf16, f16};
use mods::Mods;
use problem::Problem;

/// Up to this many packed rows (queries times heads of a group) a key/value head goes through the decode path.
const FEW_ROWS: usize = 8;

/// Computes O and LSE. `out` is [batch, query heads, queries, value dim] of the inputs' type; `lse` is
/// [batch, query heads, queries], float32 (float64 for float64).
///
/// A query that may attend nothing gives O = 0 and LSE = -inf (the sink's value, if there is one).
///
/// # Errors
/// Outputs of the wrong shape or type; see [`Problem`] for the inputs.
pub fn forward(problem: &Problem<'_>, out: ArrayMut<'_>, lse: ArrayMut<'_>) -> Result<()> {
    let size = &problem.size;
    let shape = [size.batch, size.query_heads, size.queries, size.value_dim];
    if out.shape() != shape {
        return Err(Error::shape("out", format!("[batch, query_heads, queries, value_dim] = {shape:?}"), out.shape()));
    }
    if out.dtype() != problem.dtype {
        return Err(Error::dtype("out", problem.dtype.name(), out.dtype()));
    }
    if lse.shape() != &shape[..3] {
        return Err(Error::shape("lse", format!("[batch, query_heads, queries] = {:?}", &shape[..3]), lse.shape()));
    }
    let wide = if problem.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    if lse.dtype() != wide {
        return Err(Error::dtype("lse", wide.name(), lse.dtype()));
    }
    match problem.dtype {
        Dtype::F32 => typed::<f32>(problem, out, lse),
        Dtype::F64 => typed::<f64>(problem, out, lse),
        Dtype::F16 => typed::<f16>(problem, out, lse),
        _ => typed::<bf16>(problem, out, lse),
    }
}

fn typed<S: Arithmetic>(problem: &Problem<'_>, out: ArrayMut<'_>, lse: ArrayMut<'_>) -> Result<()> {
    let size = &problem.size;
    if size.batch * size.query_heads * size.queries == 0 {
        return Ok(());
    }
    let mods = Mods::<S::Acc>::bind(problem, None)?;
    let lse = lse.segments::<S::Acc>(1);
    let out = out.rows::<S>();
    let few = |&(sequence, _): &(usize, usize)| problem.sequences[sequence].queries * problem.pack() <= FEW_ROWS;
    let (short, long): (Vec<_>, Vec<_>) = tile::groups(problem).into_iter().partition(few);
    decode::run::<S>(problem, &mods, &short, &out, &lse)?;
    prefill::run::<S>(problem, &mods, &long, &out, &lse)?;
    mods.check()
}
