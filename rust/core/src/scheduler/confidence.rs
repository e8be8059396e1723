//! Confidence of reasoning traces (DeepConf, Fu et al. 2025, arXiv 2508.15260).
//!
//! ```text
//! token    C_i = -(1/k) sum of log P_i over the k most probable tokens          higher is more peaked
//! group    G_i = mean of C over the n tokens that end at i, for every i >= n    a window, one token a step
//! trace    mean: of all C;  tail: of the last tokens;  lowest: min of G;
//!          bottom: mean of the lowest max(1, floor(fraction * windows)) G
//! ```
//! A trace shorter than n has one group, its mean; an empty trace has confidence 0. Nothing is rounded.
//!
//! One [`Window`] serves whole arrays ([`traces`]) and running requests ([`Monitor`]), so both give the same bits. It
//! never subtracts: tokens come in blocks of n, and a window is what is left of the block before plus what there is of
//! this one,
//!
//! ```text
//! G_i = (sum of the block before, from this place on) + (sum of this block, up to here)
//! ```
//! so sums do not drift, and an infinite or undefined C leaves no trace once it is out of the window.
//!
//! A token of probability 0 among the k gives C = +inf; NaN stays NaN, in every group and trace confidence it is in.

use crate::arch::ranking::{Ranked, Ranking};
use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::moe::largest::Largest;
use crate::threads;
use crate::view::{Array, ArrayMut, Matrix};
use half::{bf16, f16};

/// Below this many numbers nobody is woken.
const SERIAL: usize = 1 << 15;
/// Exponentials at a time: they stay in the first cache.
const CHUNK: usize = 1 << 10;
/// Columns of the trace metrics: mean, tail, bottom, lowest.
pub const METRICS: usize = 4;

// ---------------------------------------------------------------------------------------------- tokens from logits

/// Token confidence from logits `[N, V]` into `out [N, 1]` (float64), over the `k` largest logits of each row.
///
/// With t the largest logit, `C = ln(sum of e^(z - t)) - (1/k) sum over the k largest of (z - t)`: adding a constant to
/// a row changes nothing but rounding.
///
/// # Errors
/// Wrong ranks or types; k outside 1..=V.
pub fn tokens(logits: &Array<'_>, k: usize, out: ArrayMut<'_>) -> Result<()> {
    let &[rows, width] = logits.shape() else {
        return Err(Error::shape("logits", "[N, V]", logits.shape()));
    };
    if !(1..=width).contains(&k) && rows > 0 {
        return Err(Error::value("top_k", format!("1 to the vocabulary, {width}"), k));
    }
    output("out", &out, &[rows, 1])?;
    let out = out.rows::<f64>();
    macro_rules! run {
        ($t:ty, $acc:ty) => {
            threads::for_each(rows, logits.len() < SERIAL, Rows::<$acc>::new, |row, state| {
                out.take(row)[0] = state.confidence(logits.vector::<$t>(&[row]), k);
            })
        };
    }
    match logits.dtype() {
        Dtype::F32 => run!(f32, f32),
        Dtype::F64 => run!(f64, f64),
        Dtype::F16 => run!(f16, f32),
        Dtype::Bf16 => run!(bf16, f32),
        other => Err(Error::dtype("logits", "float32, float64, float16 or bfloat16", other)),
    }
}

/// What one thread needs for rows of logits.
struct Rows<A> {
    row: Vec<A>,
    largest: Largest<A>,
    powers: Vec<f64>,
}

impl<A: Ranked> Rows<A> {
    fn new() -> Self {
        Self { row: Vec::new(), largest: Largest::new(), powers: vec![0.0; CHUNK] }
    }

    fn confidence<T: Float<Acc = A>>(&mut self, logits: Matrix<'_, T>, k: usize) -> f64 {
        self.row.clear();
        match logits.row(0) {
            Some(slice) => self.row.extend(slice.iter().map(|z| z.widen())),
            None => self.row.extend((0..logits.cols()).map(|token| logits.at(0, token).widen())),
        }
        let kernels: &Ranking<A> = A::ranking();
        if kernels.has_nan(&self.row) {
            return f64::NAN;
        }
        let best = self.largest.of(&self.row, k);
        let top = self.row[best[0] as usize].f64();
        if top == f64::NEG_INFINITY {
            return f64::NAN; // every token is masked: there is no law
        }
        // Equal infinities differ by nothing.
        let below = |index: u32| {
            let z = self.row[index as usize].f64();
            if z == top { 0.0 } else { z - top }
        };
        let depth: f64 = best.iter().map(|&index| below(index)).sum();
        let mut mass = 0.0;
        for part in self.row.chunks(CHUNK) {
            mass += kernels.exponentials(part, top, &mut self.powers[..part.len()]);
        }
        libm::log(mass) - depth / k as f64
    }
}

// ---------------------------------------------------------------------------------------------- the window

/// The confidence of a growing trace: the mean over a window, the lowest such mean, the mean of everything.
#[derive(Debug, Clone)]
pub struct Window {
    /// Place j: token j of this block below `at`, and the sum of the block before from j on above it.
    ring: Vec<f64>,
    at: usize,
    /// Sum of this block.
    block: f64,
    /// Tokens seen.
    count: usize,
    /// Sum of all of them.
    total: f64,
    group: f64,
    lowest: f64,
}

impl Window {
    /// A window of `length` tokens, at least one.
    pub fn new(length: usize) -> Self {
        assert!(length > 0, "a window holds at least one token");
        let mut window =
            Self { ring: vec![0.0; length], at: 0, block: 0.0, count: 0, total: 0.0, group: 0.0, lowest: 0.0 };
        window.reset();
        window
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        (self.at, self.count) = (0, 0);
        (self.block, self.total) = (0.0, 0.0);
        (self.group, self.lowest) = (f64::NAN, f64::INFINITY);
    }

    /// Adds a token; the mean of the window that ends at it, if that is full.
    #[inline]
    pub fn push(&mut self, confidence: f64) -> Option<f64> {
        let length = self.ring.len();
        self.count += 1;
        self.total += confidence;
        self.block += confidence;
        self.ring[self.at] = confidence;
        self.at += 1;
        let sum = if self.at < length {
            if self.count < length {
                return None;
            }
            self.ring[self.at] + self.block
        } else {
            let mut rest = 0.0;
            for slot in self.ring.iter_mut().rev() {
                rest += *slot;
                *slot = rest;
            }
            self.at = 0;
            std::mem::take(&mut self.block)
        };
        self.group = sum / length as f64;
        // An undefined group stays: `min` alone would drop it.
        let undefined = self.group.is_nan() || self.lowest.is_nan();
        self.lowest = if undefined { f64::NAN } else { self.lowest.min(self.group) };
        Some(self.group)
    }

    /// Tokens seen.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether the window has been full.
    pub fn is_full(&self) -> bool {
        self.count >= self.ring.len()
    }

    /// The mean of all tokens; 0 without any.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.total / self.count as f64 }
    }

    /// The mean of the last full window; of everything before there is one.
    pub fn group(&self) -> f64 {
        if self.is_full() { self.group } else { self.mean() }
    }

    /// The lowest mean of a window; the mean of everything before one was full.
    pub fn lowest(&self) -> f64 {
        if self.is_full() { self.lowest } else { self.mean() }
    }
}

// ---------------------------------------------------------------------------------------------- whole traces

/// What is asked of traces.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Tokens of a group.
    pub window: usize,
    /// Tokens of the tail.
    pub tail: usize,
    /// Share of the groups that make the bottom, in [0, 1].
    pub fraction: f64,
}

/// Where [`traces`] writes, all float64.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// `[N, 4]`: mean, tail, bottom, lowest.
    pub metrics: ArrayMut<'a>,
    /// `[N, T]`: token confidences, NaN beyond a trace's length.
    pub tokens: Option<ArrayMut<'a>>,
    /// `[N, max(T - window + 1, 1)]`: group confidences, NaN beyond a trace's last.
    pub groups: Option<ArrayMut<'a>>,
}

/// Confidences of traces from log probabilities `[N, T, k]` of the k most probable tokens, or from token confidences
/// `[N, T]`. `lengths [N]` says how many tokens of each count (all, if not given). One task is one trace.
///
/// # Errors
/// Wrong ranks, extents or types, lengths outside 0..=T, windows of no token, a fraction outside [0, 1].
pub fn traces(values: &Array<'_>, lengths: Option<&Array<'_>>, rules: Rules, outputs: Outputs<'_>) -> Result<()> {
    let (count, longest) = match *values.shape() {
        [count, longest] => (count, longest),
        [_, _, 0] => return Err(Error::shape("logprobs", "[traces, tokens, k] with k >= 1", values.shape())),
        [count, longest, _] => (count, longest),
        _ => {
            let allowed = "log probabilities [traces, tokens, k] or token confidences [traces, tokens]";
            return Err(Error::shape("values", allowed, values.shape()));
        }
    };
    for (name, length) in [("window", rules.window), ("tail", rules.tail)] {
        if length == 0 {
            return Err(Error::value(name, "at least 1 token", length));
        }
    }
    if !(0.0..=1.0).contains(&rules.fraction) {
        return Err(Error::value("bottom", "a share of the windows, in [0, 1]", rules.fraction));
    }
    let windows = (longest + 1).saturating_sub(rules.window).max(1);
    output("metrics", &outputs.metrics, &[count, METRICS])?;
    if let Some(tokens) = &outputs.tokens {
        output("tokens", tokens, &[count, longest])?;
    }
    if let Some(groups) = &outputs.groups {
        output("groups", groups, &[count, windows])?;
    }
    let lengths = checked_lengths(lengths, count, longest)?;
    let read: fn(&Array<'_>, usize, usize, &mut Vec<f64>) = match values.dtype() {
        Dtype::F32 => token_row::<f32>,
        Dtype::F64 => token_row::<f64>,
        Dtype::F16 => token_row::<f16>,
        Dtype::Bf16 => token_row::<bf16>,
        other => return Err(Error::dtype("values", "float32, float64, float16 or bfloat16", other)),
    };
    let metrics = outputs.metrics.rows::<f64>();
    let tokens = outputs.tokens.map(|tokens| tokens.rows::<f64>());
    let groups = outputs.groups.map(|groups| groups.rows::<f64>());
    let scratch = || (Window::new(rules.window), Vec::new(), Vec::new());
    threads::for_each(count, values.len() < SERIAL, scratch, |trace, (window, own, means)| {
        read(values, trace, lengths[trace], own);
        metrics.take(trace).copy_from_slice(&measure(own, rules, window, means));
        if let Some(tokens) = &tokens {
            copy_padded(own, tokens.take(trace));
        }
        if let Some(groups) = &groups {
            copy_padded(means, groups.take(trace));
        }
    })
}

fn copy_padded(from: &[f64], to: &mut [f64]) {
    to[..from.len()].copy_from_slice(from);
    to[from.len()..].fill(f64::NAN);
}

/// Mean, tail, bottom and lowest of a trace; leaves its group confidences in `means`.
fn measure(tokens: &[f64], rules: Rules, window: &mut Window, means: &mut Vec<f64>) -> [f64; METRICS] {
    window.reset();
    means.clear();
    means.extend(tokens.iter().filter_map(|&confidence| window.push(confidence)));
    if tokens.is_empty() {
        return [0.0; METRICS];
    }
    if means.is_empty() {
        means.push(window.mean());
    }
    let tail = &tokens[tokens.len().saturating_sub(rules.tail)..];
    let tail = tail.iter().sum::<f64>() / tail.len() as f64;
    [window.mean(), tail, bottom(means, rules.fraction), window.lowest()]
}

/// The mean of the lowest groups, added up by rising value; NaN if any group is.
fn bottom(means: &[f64], fraction: f64) -> f64 {
    if means.iter().any(|mean| mean.is_nan()) {
        return f64::NAN;
    }
    let count = ((fraction * means.len() as f64).floor() as usize).max(1);
    let mut lowest = means.to_vec();
    if count < lowest.len() {
        lowest.select_nth_unstable_by(count - 1, f64::total_cmp);
        lowest.truncate(count);
    }
    lowest.sort_unstable_by(f64::total_cmp);
    lowest.iter().sum::<f64>() / count as f64
}

/// The token confidences of the first `length` tokens of a trace.
fn token_row<T: Float>(values: &Array<'_>, trace: usize, length: usize, out: &mut Vec<f64>) {
    out.clear();
    if values.shape().len() == 2 {
        let row = values.vector::<T>(&[trace]);
        out.extend((0..length).map(|token| row.at(0, token).widen().f64()));
        return;
    }
    let rows = values.matrix::<T>(&[trace]);
    let mut spare = Vec::new();
    out.extend((0..length).map(|token| match rows.row(token) {
        Some(slice) => mean_surprise(slice),
        None => {
            spare.clear();
            spare.extend((0..rows.cols()).map(|index| rows.at(token, index)));
            mean_surprise(&spare)
        }
    }));
}

/// `-mean`, added up in four columns: the compiler makes lanes of them, and the bits are the same without.
#[inline]
fn mean_surprise<T: Float>(logprobs: &[T]) -> f64 {
    let mut columns = [0.0f64; 4];
    let (whole, rest) = logprobs.as_chunks::<4>();
    for chunk in whole {
        for (column, value) in columns.iter_mut().zip(chunk) {
            *column += value.widen().f64();
        }
    }
    for (column, value) in columns.iter_mut().zip(rest) {
        *column += value.widen().f64();
    }
    let [a, b, c, d] = columns;
    0.0 - ((a + c) + (b + d)) / logprobs.len() as f64
}

fn checked_lengths(lengths: Option<&Array<'_>>, count: usize, longest: usize) -> Result<Vec<usize>> {
    let Some(lengths) = lengths else {
        return Ok(vec![longest; count]);
    };
    if lengths.shape() != [count] {
        return Err(Error::shape("lengths", format!("[{count}], one number per trace"), lengths.shape()));
    }
    if !matches!(lengths.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("lengths", "int32 or int64", lengths.dtype()));
    }
    (0..count)
        .map(|trace| {
            let length = lengths.integer(&[trace]);
            usize::try_from(length)
                .ok()
                .filter(|&length| length <= longest)
                .ok_or_else(|| Error::value(&format!("lengths[{trace}]"), format!("0 to {longest} tokens"), length))
        })
        .collect()
}

fn output(name: &str, out: &ArrayMut<'_>, shape: &[usize]) -> Result<()> {
    if out.shape() != shape {
        return Err(Error::shape(name, format!("{shape:?}"), out.shape()));
    }
    if out.dtype() != Dtype::F64 {
        return Err(Error::dtype(name, "float64", out.dtype()));
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------- running requests

/// One [`Window`] for each row of a running batch.
#[derive(Debug, Clone)]
pub struct Monitor {
    windows: Vec<Window>,
}

/// Columns that [`Monitor::update`] writes: group, lowest, mean, tokens.
pub const READINGS: usize = 4;

impl Monitor {
    /// Windows of `length` tokens for `rows` requests.
    ///
    /// # Errors
    /// A window of no token.
    pub fn new(rows: usize, length: usize) -> Result<Self> {
        if length == 0 {
            return Err(Error::value("window", "at least 1 token", length));
        }
        Ok(Self { windows: vec![Window::new(length); rows] })
    }

    fn row(&self, at: usize, row: i64) -> Result<usize> {
        usize::try_from(row)
            .ok()
            .filter(|&row| row < self.windows.len())
            .ok_or_else(|| Error::value(&format!("rows[{at}]"), format!("a row below {}", self.windows.len()), row))
    }

    /// The rows that are meant, all different.
    ///
    /// # Errors
    /// Rows outside, or named twice.
    pub fn rows(&self, rows: &Array<'_>) -> Result<Vec<usize>> {
        if rows.shape().len() != 1 {
            return Err(Error::shape("rows", "[R]", rows.shape()));
        }
        if !matches!(rows.dtype(), Dtype::I32 | Dtype::I64) {
            return Err(Error::dtype("rows", "int32 or int64", rows.dtype()));
        }
        let mut seen = vec![false; self.windows.len()];
        let mut chosen = Vec::with_capacity(rows.len());
        for at in 0..rows.len() {
            let row = self.row(at, rows.integer(&[at]))?;
            if std::mem::replace(&mut seen[row], true) {
                return Err(Error::value("rows", "rows that differ", format!("row {row} twice")));
            }
            chosen.push(row);
        }
        Ok(chosen)
    }

    /// Forgets what some rows have seen.
    pub fn reset(&mut self, rows: &[usize]) {
        for &row in rows {
            self.windows[row].reset();
        }
    }

    /// Adds one token to each of `rows` (unless `values` is absent) and writes `[R, 4]`: the confidence of the window
    /// (NaN before it is full), the lowest so far, the mean, and how many tokens there were.
    ///
    /// # Errors
    /// Wrong shapes or types.
    pub fn update(&mut self, rows: &[usize], values: Option<&Array<'_>>, out: ArrayMut<'_>) -> Result<()> {
        output("out", &out, &[rows.len(), READINGS])?;
        if let Some(values) = values {
            if values.shape() != [rows.len()] {
                return Err(Error::shape("confidence", format!("[{}], one per row", rows.len()), values.shape()));
            }
            if values.dtype() != Dtype::F64 {
                return Err(Error::dtype("confidence", "float64", values.dtype()));
            }
        }
        let out = out.rows::<f64>();
        for (at, &row) in rows.iter().enumerate() {
            let window = &mut self.windows[row];
            if let Some(values) = values {
                window.push(values.get::<f64>(&[at]));
            }
            let group = if window.is_full() { window.group() } else { f64::NAN };
            out.take(at).copy_from_slice(&[group, window.lowest(), window.mean(), window.count() as f64]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::tests::at_every_level;
    use proptest::prelude::*;

    fn naive(tokens: &[f64], n: usize) -> Vec<f64> {
        tokens.windows(n).map(|window| window.iter().sum::<f64>() / n as f64).collect()
    }

    proptest! {
        #[test]
        fn a_window_is_the_mean_of_its_tokens(tokens in prop::collection::vec(0.0f64..30.0, 0..200), n in 1usize..40) {
            let mut window = Window::new(n);
            let got: Vec<f64> = tokens.iter().filter_map(|&c| window.push(c)).collect();
            let want = naive(&tokens, n);
            prop_assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                prop_assert!((got - want).abs() <= 1e-13 * want.abs().max(1.0));
            }
            if !want.is_empty() {
                let least = want.iter().copied().fold(f64::INFINITY, f64::min);
                prop_assert!((window.lowest() - least).abs() <= 1e-13 * least.abs().max(1.0));
            }
        }
    }

    #[test]
    fn what_is_not_finite_leaves_with_its_token() {
        for odd in [f64::INFINITY, f64::NAN] {
            let mut window = Window::new(3);
            let groups: Vec<f64> = [1.0, odd, 1.0, 1.0, 1.0, 2.0].iter().filter_map(|&c| window.push(c)).collect();
            assert!(!groups[0].is_finite() && !groups[1].is_finite());
            assert_eq!(&groups[2..], &[1.0, 4.0 / 3.0]);
            assert_eq!(window.lowest().is_nan(), odd.is_nan());
        }
    }

    #[test]
    fn sums_do_not_drift() {
        // A huge token would leave its rounding error for ever in a sum that is added to and subtracted from.
        let mut window = Window::new(7);
        window.push(1e17);
        (0..100_000).for_each(|_| _ = window.push(0.1));
        assert!((window.group() - 0.1).abs() < 1e-15);
    }

    #[test]
    fn logits_have_the_same_bits_at_every_level() {
        let row: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1009) as f32 * 0.013 - 5.0).collect();
        let first = std::sync::OnceLock::new();
        at_every_level(|level| {
            let array = Array::from_slice(&row, &[1, row.len()]).unwrap();
            let mut out = [0.0f64];
            tokens(&array, 20, ArrayMut::from_slice(&mut out, &[1, 1]).unwrap()).unwrap();
            assert_eq!(*first.get_or_init(|| out[0].to_bits()), out[0].to_bits(), "{}", level.name());
        });
    }
}
