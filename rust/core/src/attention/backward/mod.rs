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

use super::dropout::Dropout;
use super::mods::Mods;
use super::operands::Operands;
use super::problem::Problem;
use crate::arch::Kernel;
use crate::arch::lanes::FloatLane;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::expr::CaptureGradient;
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::scratch::Buffer;
use crate::threads;
use crate::view::{Array, ArrayMut, Rows};
use half::{bf16, f16};
use plan::Chunk;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    if problem.key.shape()[1] == 0 {
        return Ok(());
    }
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
    let captures = problem.rules.score_mod.as_ref().map_or(&[][..], |score| &score.captures);
    if !gradients.captures.is_empty() && gradients.captures.len() != captures.len() {
        let got = gradients.captures.len();
        return Err(Error::value("grad_captures", format!("{} entries, one a capture", captures.len()), got));
    }
    for (number, (array, capture)) in gradients.captures.iter().zip(captures).enumerate() {
        let name = format!("grad_captures[{number}]");
        array.as_ref().map_or(Ok(()), |array| expect(&name, array.shape(), array.dtype(), capture.shape(), wide))?;
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
    mods: &'s Mods<'a, S::Acc>,
    dropout: Option<Dropout>,
    /// Of the captures' gradients that are wanted.
    shapes: Vec<Option<Vec<usize>>>,
    query: Option<Rows<'s, S>>,
    key: Option<Rows<'s, S>>,
    value: Option<Rows<'s, S>>,
    /// Width of dV and of dK in whole registers, and the distance between rows of both.
    value_width: usize,
    key_width: usize,
    stride: usize,
}

fn typed<S: Arithmetic>(problem: &Problem<'_>, upstream: &Upstream<'_>, gradients: Gradients<'_>) -> Result<()> {
    let size = problem.size;
    let wanted: Vec<bool> = gradients.captures.iter().map(Option::is_some).collect();
    let mods = Mods::<S::Acc>::bind(problem, Some(&wanted))?;
    let pad = |width: usize| width.next_multiple_of(S::lanes());
    let chunks = plan::chunks::<S>(problem);
    let work: usize = chunks.iter().map(|chunk| chunk.cost).sum();
    let serial = work.saturating_mul(size.head_dim + size.value_dim) <= SERIAL_WORK;
    let stage = Stage {
        problem,
        upstream,
        operands: Operands::backward(problem, serial)?,
        mods: &mods,
        dropout: Dropout::of(problem),
        shapes: gradients.captures.iter().map(|array| array.as_ref().map(|array| array.shape().to_vec())).collect(),
        query: gradients.query.map(|array| array.fresh().rows::<S>()),
        key: gradients.key.map(|array| array.fresh().rows::<S>()),
        value: gradients.value.map(|array| array.fresh().rows::<S>()),
        value_width: pad(size.value_dim),
        key_width: pad(size.head_dim),
        // A cache line more than whole registers: rows side by side must not fall into one set.
        stride: pad(size.value_dim) + pad(size.head_dim) + 16,
    };
    let bytes = stage.shapes.iter().flatten().map(|shape| shape.iter().product::<usize>() * size_of::<S::Acc>()).sum();
    let groups = plan::groups(&chunks, wanted.contains(&true).then_some(bytes));
    let results = Results {
        partials: chunks.iter().map(|_| Mutex::new(None)).collect(),
        left: plan::counts(&chunks).into_iter().map(AtomicUsize::new).collect(),
        captures: groups.iter().map(|_| Mutex::new(Vec::new())).collect(),
    };
    let scratch = || step::Scratch::<S>::new(&stage);
    threads::for_each(groups.len(), serial, scratch, |task, scratch| {
        let mut captures = stage.zeros();
        for &number in &groups[task] {
            stage.run(&chunks, number, &results, scratch, &mut captures);
        }
        *results.captures[task].lock().unwrap_or_else(PoisonError::into_inner) = captures;
    })?;
    stage.join(&chunks, &results, serial)?;
    results.write(gradients.sinks, gradients.captures);
    mods.check()
}

/// dV and dK over a range of keys, side by side, and the sinks' gradients.
struct Partial<T: crate::scratch::Kept> {
    keys: Range<usize>,
    sums: Buffer<T>,
    sinks: Vec<f64>,
}

/// What tasks leave.
struct Results<T: crate::scratch::Kept> {
    /// One a chunk.
    partials: Vec<Mutex<Option<Partial<T>>>>,
    /// Chunks of each place that are not done.
    left: Vec<AtomicUsize>,
    /// Gradients of captures, one list a task.
    captures: Vec<Mutex<Vec<Option<CaptureGradient<T>>>>>,
}

impl<T: FloatLane + crate::scratch::Kept> Results<T> {
    /// Sums over chunks and tasks, in order.
    fn write(self, sinks: Option<ArrayMut<'_>>, captures: Vec<Option<ArrayMut<'_>>>) {
        if let Some(sinks) = sinks {
            let mut sums = vec![0.0; sinks.shape()[0]];
            for slot in self.partials {
                let partial = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
                let own = partial.map_or_else(Vec::new, |partial| partial.sinks);
                sums.iter_mut().zip(own).for_each(|(sum, part)| *sum += part);
            }
            let lines = sinks.segments::<T>(1);
            sums.into_iter().enumerate().for_each(|(head, sum)| lines.take(head)[0] = T::of(sum));
        }
        let mut lists = self.captures.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
        let empty =
            || captures.iter().map(|array| array.as_ref().map(|array| CaptureGradient::new(array.shape()))).collect();
        let mut sums: Vec<Option<CaptureGradient<T>>> = lists.next().unwrap_or_else(empty);
        for list in lists {
            for (sum, part) in sums.iter_mut().zip(&list) {
                if let (Some(sum), Some(part)) = (sum, part) {
                    sum.add(part);
                }
            }
        }
        for (array, sum) in captures.into_iter().zip(sums) {
            if let (Some(array), Some(sum)) = (array, sum) {
                sum.write(array);
            }
        }
    }
}

/// Keys whose sums one task adds up.
const JOINED: usize = 256;

impl<S: Arithmetic> Stage<'_, '_, '_, S> {
    fn zeros(&self) -> Vec<Option<CaptureGradient<S::Acc>>> {
        self.shapes.iter().map(|shape| shape.as_ref().map(|shape| CaptureGradient::new(shape))).collect()
    }

    /// One chunk. The last one of a place whose chunks are not joined in parallel adds them up.
    fn run(
        &self,
        chunks: &[Chunk],
        number: usize,
        results: &Results<S::Acc>,
        scratch: &mut step::Scratch<'_, '_, S>,
        captures: &mut [Option<CaptureGradient<S::Acc>>],
    ) {
        let chunk = &chunks[number];
        let mut sums = Buffer::new(chunk.keys.len() * self.stride);
        if self.key.is_some() || self.value.is_some() {
            sums.fill(S::Acc::ZERO);
        }
        let sinks = vec![0.0; if self.problem.sinks.is_some() { self.problem.size.query_heads } else { 0 }];
        let mut partial = Partial { keys: chunk.keys.clone(), sums, sinks };
        let mut captures: Vec<_> = captures.iter_mut().map(Option::as_mut).collect();
        for tile in &chunk.tiles {
            step::one_tile(self, tile, scratch, &mut partial, &mut captures);
        }
        let slot = |number: usize| results.partials[number].lock().unwrap_or_else(PoisonError::into_inner);
        *slot(number) = Some(partial);
        if results.left[chunk.place].fetch_sub(1, Ordering::AcqRel) == 1 && !chunk.joined {
            let own: Vec<usize> = (0..chunks.len()).filter(|&other| chunks[other].place == chunk.place).collect();
            let mut taken: Vec<_> = own.iter().filter_map(|&other| slot(other).take()).collect();
            let partials: Vec<_> = taken.iter().collect();
            self.finish(chunk.place, &partials, 0..self.keys_of(chunk.place));
            for (other, mut partial) in own.into_iter().zip(taken.drain(..)) {
                partial.sums = Buffer::new(0);
                *slot(other) = Some(partial);
            }
        }
    }

    fn keys_of(&self, place: usize) -> usize {
        self.problem.sequences[place / self.problem.size.key_heads].keys
    }

    /// Adds up the chunks of places that are left, all threads together.
    fn join(&self, chunks: &[Chunk], results: &Results<S::Acc>, serial: bool) -> Result<()> {
        let slots: Vec<_> =
            results.partials.iter().map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let mut tasks = Vec::new();
        for place in 0..results.left.len() {
            let own: Vec<_> = (0..chunks.len()).filter(|&n| chunks[n].place == place && chunks[n].joined).collect();
            if !own.is_empty() {
                let keys = self.keys_of(place);
                tasks.extend((0..keys).step_by(JOINED).map(|start| (own.clone(), start..keys.min(start + JOINED))));
            }
        }
        let partials: Vec<Option<&Partial<S::Acc>>> = slots.iter().map(|slot| slot.as_ref()).collect();
        threads::for_each(
            tasks.len(),
            serial,
            || (),
            |task, ()| {
                let (own, keys) = &tasks[task];
                let list: Vec<_> = own.iter().filter_map(|&number| partials[number]).collect();
                self.finish(chunks[own[0]].place, &list, keys.clone());
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
