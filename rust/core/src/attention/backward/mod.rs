//! The way back: gradients of Q, K, V, the sinks and what the score program captured, from O and LSE alone.
//!
//! ```text
//! for each (sequence, key/value head), each chunk of its tiles of queries (a task; the longest first):
//!     dK, dV = 0 over the keys that the chunk visits            accumulators
//!     for each tile of rows, each visit: five products          (see `step`)
//! for each (sequence, key/value head): dK, dV = sum over its chunks, in order, rounded once
//! ```
//! Departures from FlashAttention's loops: (1) a task owns queries, not keys, so that the schedule, the masks and the
//! programs are those of the forward pass, dQ never leaves the first caches, and nothing is recomputed; (2) few heads
//! are cut into chunks, each with its own dK and dV, which are added in order: a fixed number of them that depends on the
//! problem, never on the number of threads, so neither do the bits; (3) what is not finite is kept away from rows that
//! do not attend it (see `step`).
//!
//! * [`plan`]: chunks; * [`step`]: one tile.

mod plan;
mod step;

use super::mods::Mods;
use super::operands::Operands;
use super::problem::Problem;
use crate::arch::Kernel;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::scratch::Buffer;
use crate::threads;
use crate::view::{Array, ArrayMut, Rows};
use half::{bf16, f16};
use plan::Chunk;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// What comes from the forward pass and from the loss.
#[derive(Debug)]
pub struct Upstream<'a> {
    /// O [batch, query heads, queries, value dim]
    pub out: Array<'a>,
    /// Natural-log LSE [batch, query heads, queries]
    pub lse: Array<'a>,
    /// Gradient of O.
    pub grad_out: Array<'a>,
    /// Gradient of the LSE.
    pub grad_lse: Option<Array<'a>>,
}

/// What is asked for; the arrays are overwritten, but rows outside every sequence are left.
#[derive(Debug, Default)]
pub struct Gradients<'g> {
    /// As the query.
    pub query: Option<ArrayMut<'g>>,
    /// As the key.
    pub key: Option<ArrayMut<'g>>,
    /// As the value.
    pub value: Option<ArrayMut<'g>>,
    /// [query heads], of the LSE's type.
    pub sinks: Option<ArrayMut<'g>>,
    /// One a capture of the score program, of its shape and the LSE's type.
    pub captures: Vec<Option<ArrayMut<'g>>>,
}

/// Fills the gradients.
///
/// # Errors
/// Arrays of the wrong shape or type; pages, or sequences that share keys (their gradients would overlap).
pub fn backward(problem: &Problem<'_>, upstream: &Upstream<'_>, gradients: Gradients<'_>) -> Result<()> {
    check(problem, upstream, &gradients)?;
    match problem.dtype {
        Dtype::F32 => typed::<f32>(problem, upstream, gradients),
        Dtype::F64 => typed::<f64>(problem, upstream, gradients),
        Dtype::F16 => typed::<f16>(problem, upstream, gradients),
        _ => typed::<bf16>(problem, upstream, gradients),
    }
}

fn check(problem: &Problem<'_>, upstream: &Upstream<'_>, gradients: &Gradients<'_>) -> Result<()> {
    let size = &problem.size;
    let wide = if problem.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
    let rows = [size.batch, size.query_heads, size.queries];
    let out = [rows[0], rows[1], rows[2], size.value_dim];
    let expect = |name: &str, shape: &[usize], dtype: Dtype, want: &[usize], kind: Dtype| {
        if shape != want {
            return Err(Error::shape(name, format!("{want:?}"), shape));
        }
        if dtype == kind { Ok(()) } else { Err(Error::dtype(name, kind.name(), dtype)) }
    };
    for (name, array) in [("out", &upstream.out), ("grad_out", &upstream.grad_out)] {
        expect(name, array.shape(), array.dtype(), &out, problem.dtype)?;
    }
    for (name, array) in [("lse", Some(&upstream.lse)), ("grad_lse", upstream.grad_lse.as_ref())] {
        array.map_or(Ok(()), |array| expect(name, array.shape(), array.dtype(), &rows, wide))?;
    }
    let own = [
        ("grad_query", &gradients.query, problem.query.shape()),
        ("grad_key", &gradients.key, problem.key.shape()),
        ("grad_value", &gradients.value, problem.value.shape()),
    ];
    for (name, array, want) in own {
        array.as_ref().map_or(Ok(()), |array| expect(name, array.shape(), array.dtype(), want, problem.dtype))?;
    }
    if let Some(sinks) = &gradients.sinks {
        expect("grad_sinks", sinks.shape(), sinks.dtype(), &[size.query_heads], wide)?;
        if problem.sinks.is_none() {
            return Err(Error::value("grad_sinks", "none without sinks", "an array"));
        }
    }
    if problem.pages.is_some() {
        return Err(Error::value("block_table", "contiguous keys for a gradient", "a paged cache")
            .hint("gather the pages first"));
    }
    let mut spans: Vec<_> =
        problem.sequences.iter().filter(|s| s.keys > 0).map(|s| (s.key_batch, s.key_start, s.keys)).collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1 {
            let got = format!("key {} of row {} in two of them", pair[1].1, pair[1].0);
            return Err(Error::value("sequences", "sequences that share no key, for a gradient", got));
        }
    }
    Ok(())
}

/// What all tasks share.
pub(super) struct Stage<'s, 'p, 'a, S: Arithmetic> {
    problem: &'p Problem<'a>,
    upstream: &'s Upstream<'a>,
    operands: Operands<'p, 'a, S>,
    mods: &'s Mods<'p, 'a, S::Acc>,
    query: Option<Rows<'s, S>>,
    key: Option<Rows<'s, S>>,
    value: Option<Rows<'s, S>>,
    /// Width of dV and of dK in whole registers, and the distance between rows of both.
    value_width: usize,
    key_width: usize,
    stride: usize,
}

/// dV and dK over a range of keys, side by side, and the sinks' gradients.
struct Partial<T: crate::scratch::Kept> {
    keys: Range<usize>,
    sums: Buffer<T>,
    sinks: Vec<f64>,
}

fn typed<S: Arithmetic>(problem: &Problem<'_>, upstream: &Upstream<'_>, gradients: Gradients<'_>) -> Result<()> {
    let size = problem.size;
    let mods = Mods::<S::Acc>::bind(problem, true)?;
    let pad = |width: usize| width.next_multiple_of(S::lanes());
    let chunks = plan::chunks::<S>(problem);
    let work: usize = chunks.iter().map(|chunk| chunk.cost).sum();
    let serial = work.saturating_mul(size.head_dim + size.value_dim) <= SERIAL_WORK;
    let stage = Stage {
        problem,
        upstream,
        operands: Operands::backward(problem, serial)?,
        mods: &mods,
        query: gradients.query.map(|array| array.fresh().rows::<S>()),
        key: gradients.key.map(|array| array.fresh().rows::<S>()),
        value: gradients.value.map(|array| array.fresh().rows::<S>()),
        value_width: pad(size.value_dim),
        key_width: pad(size.head_dim),
        // A cache line more than whole registers: rows side by side must not fall into one set.
        stride: pad(size.value_dim) + pad(size.head_dim) + 16,
    };
    let mut order: Vec<usize> = (0..chunks.len()).collect();
    order.sort_by_key(|&number| std::cmp::Reverse(chunks[number].cost));
    let partials: Vec<Mutex<Option<Partial<S::Acc>>>> = chunks.iter().map(|_| Mutex::new(None)).collect();
    threads::for_each(
        order.len(),
        serial,
        || step::Scratch::<S>::new(&stage),
        |task, scratch| {
            let chunk = &chunks[order[task]];
            let mut partial = stage.run(chunk, scratch);
            if chunk.alone {
                stage.finish(chunk.place, &[&partial], 0..problem.sequences[chunk.place / size.key_heads].keys);
                partial.sums = Buffer::new(0);
            }
            *partials[order[task]].lock().unwrap_or_else(PoisonError::into_inner) = Some(partial);
        },
    )?;
    let partials: Vec<Partial<S::Acc>> =
        partials.into_iter().filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
    stage.join(&chunks, &partials, serial)?;
    if let Some(sinks) = gradients.sinks {
        let lines = sinks.segments::<S::Acc>(1);
        for head in 0..size.query_heads {
            let sum: f64 = partials.iter().map(|partial| partial.sinks.get(head).copied().unwrap_or(0.0)).sum();
            lines.take(head)[0] = S::Acc::of(sum);
        }
    }
    mods.check()
}

/// Keys whose sums one task adds up.
const JOINED: usize = 256;

impl<S: Arithmetic> Stage<'_, '_, '_, S> {
    /// One chunk.
    fn run(&self, chunk: &Chunk, scratch: &mut step::Scratch<S>) -> Partial<S::Acc> {
        let mut sums = Buffer::new(chunk.keys.len() * self.stride);
        if self.key.is_some() || self.value.is_some() {
            sums.fill(S::Acc::ZERO);
        }
        let sinks = vec![0.0; if self.problem.sinks.is_some() { self.problem.size.query_heads } else { 0 }];
        let mut partial = Partial { keys: chunk.keys.clone(), sums, sinks };
        for tile in &chunk.tiles {
            step::one_tile(self, tile, scratch, &mut partial);
        }
        partial
    }

    /// Adds up the chunks of each place that has several.
    fn join(&self, chunks: &[Chunk], partials: &[Partial<S::Acc>], serial: bool) -> Result<()> {
        let mut tasks = Vec::new();
        let mut first = 0;
        while first < chunks.len() {
            let place = chunks[first].place;
            let count = chunks[first..].iter().take_while(|chunk| chunk.place == place).count();
            if !chunks[first].alone {
                let keys = self.problem.sequences[place / self.problem.size.key_heads].keys;
                let part = |start: usize| (place, first..first + count, start..keys.min(start + JOINED));
                tasks.extend((0..keys).step_by(JOINED).map(part));
            }
            first += count;
        }
        threads::for_each(
            tasks.len(),
            serial,
            || (),
            |task, ()| {
                let (place, own, keys) = &tasks[task];
                let own: Vec<&Partial<S::Acc>> = partials[own.clone()].iter().collect();
                self.finish(*place, &own, keys.clone());
            },
        )
    }

    /// Writes dK and dV of some keys: the sum over partial results, rounded once.
    fn finish(&self, place: usize, partials: &[&Partial<S::Acc>], keys: Range<usize>) {
        let size = self.problem.size;
        let (sequence, head) = (self.problem.sequences[place / size.key_heads], place % size.key_heads);
        let rows = self.problem.key.shape()[2];
        let table = S::Acc::table();
        let scale = S::Acc::of(self.problem.rules.scale);
        let mut sum = vec![S::Acc::ZERO; self.stride];
        for key in keys {
            let number = (sequence.key_batch * size.key_heads + head) * rows + sequence.key_start + key;
            let mut lines = partials.iter().filter(|partial| partial.keys.contains(&key)).map(|partial| {
                let at = (key - partial.keys.start) * self.stride;
                &partial.sums[at..at + self.stride]
            });
            match lines.next() {
                Some(line) => sum.copy_from_slice(line),
                None => sum.fill(S::Acc::ZERO),
            }
            lines.for_each(|line| table.add_scaled(&mut sum, line, S::Acc::ONE));
            if let Some(value) = &self.value {
                S::round(&sum[..size.value_dim], value.take(number));
            }
            if let Some(out) = &self.key {
                let part = &mut sum[self.value_width..self.value_width + size.head_dim];
                part.iter_mut().for_each(|x| *x = *x * scale);
                S::round(part, out.take(number));
            }
        }
    }
}
