//! Kernels by level: tables of entry points that enable their instructions, behind safe methods.
//!
//! Every method checks its slices against the extents it is given (a violated check is a bug in a room, so it
//! panics) and then calls the level's entry point. A table can only be had from [`Kernel::table`] or
//! [`half_table`], which look at the chosen level, and a level can only be chosen where the machine has it:
//! that is why the calls are sound.

use super::kernel::activation::{self, Activation};
use super::kernel::{pack, pointwise, rows, slopes, softmax, tile};
use super::vector::{Both, Bytes, Pairs, Plain, Vector, Widen};
use super::{Level, level, scalar};

use crate::dtype::{Float, Real};
use crate::scratch::Kept;
use crate::view::{Listed, Matrix};
use half::bf16;
use std::ops::Range;

/// Kernels on one floating-point type.
pub struct Table<T: Real> {
    lanes: usize,
    registers: usize,
    tile: unsafe fn(&tile::Args<T, T, T>),
    walk: unsafe fn(&tile::Args<T, T, T>),
    stream: unsafe fn(&tile::Args<T, T, T>),
    rows: unsafe fn(&rows::Args<T, T, T>),
    rows_i8: unsafe fn(&rows::Args<T, i8, T>),
    widen_i8: unsafe fn(*const i8, *mut T, usize),
    softmax: unsafe fn(&softmax::Args<T>) -> bool,
    slopes: unsafe fn(&slopes::Args<T>),
    pack: unsafe fn(&[*const T], usize, usize, *mut T),
    unpack: unsafe fn(*const T, usize, usize, &[*mut T]),
    stack: unsafe fn(*const T, usize, usize, usize, *mut T),
    activation: unsafe fn(Activation, *mut T, *const T, usize),
    gradient: unsafe fn(Activation, *mut T, *mut T, *mut T, T, usize) -> T,
    scale_rows: unsafe fn(*mut T, usize, usize, *const T),
    add_scaled: unsafe fn(*mut T, *const T, T, usize),
    row_max: unsafe fn(*const T, T, usize) -> T,
    row_exp2: unsafe fn(*mut T, T, T, usize) -> T,
}

/// Kernels on bfloat16, accumulating in single precision.
pub struct HalfTable {
    lanes: usize,
    registers: usize,
    tile: unsafe fn(&tile::Args<u32, u32, f32>),
    walk: unsafe fn(&tile::Args<u32, u32, f32>),
    widen: unsafe fn(&tile::Args<f32, u16, f32>),
    rows: unsafe fn(&rows::Args<u32, u32, f32>),
    pairs_i8: unsafe fn(*const i8, *mut u32, usize),
    softmax: unsafe fn(&softmax::Args<f32>) -> bool,
    slopes: unsafe fn(&slopes::Args<f32>, &slopes::Sealed),
    interleave: unsafe fn(*const f32, usize, usize, *mut u32),
    round: unsafe fn(*const f32, *mut u16, usize),
    widen_row: unsafe fn(*const u16, *mut f32, usize),
    round_rows: unsafe fn(*const f32, usize, usize, &[*mut u16]),
    unpack: unsafe fn(*const f32, usize, usize, &[*mut u16]),
    stack: unsafe fn(*const u16, *const u16, usize, usize, usize, *mut u32),
}

/// The state of an online softmax: one entry a lane.
#[derive(Debug, Clone)]
pub struct Online<T> {
    /// Reference exponent (log2 domain); -inf while nothing was attended.
    pub reference: Vec<T>,
    /// Sum of 2^(score - reference).
    pub normaliser: Vec<T>,
    /// Factor by which the last block asks the accumulator to be rescaled.
    pub alpha: Vec<T>,
    /// Growth of the maximum, in powers of two, that is tolerated before the reference moves.
    threshold: T,
}

impl<T: Real> Online<T> {
    /// State for `width` lanes that have attended nothing.
    pub fn new(width: usize) -> Self {
        let (reference, normaliser) = (vec![T::NEG_INFINITY; width], vec![T::ZERO; width]);
        Self { reference, normaliser, alpha: vec![T::ONE; width], threshold: T::ZERO }
    }

    /// The same, tolerating growth by `threshold` powers of two before the reference moves.
    pub fn with_threshold(mut self, threshold: f64) -> Self {
        self.threshold = T::of(threshold);
        self
    }

    /// Back to the start, for `width` lanes.
    pub fn reset(&mut self, width: usize) {
        for (lanes, value) in
            [(&mut self.reference, T::NEG_INFINITY), (&mut self.normaliser, T::ZERO), (&mut self.alpha, T::ONE)]
        {
            lanes.clear();
            lanes.resize(width, value);
        }
    }
}

/// One block of the step back through a softmax (see [`slopes`]): `rows * width` scores and products dO V^T, and a lane's
/// log2-sum and delta.
#[derive(Debug)]
pub struct Slopes<'b, T> {
    /// S, then P.
    pub scores: &'b mut [T],
    /// dP, then dS.
    pub slopes: &'b mut [T],
    /// Keys.
    pub rows: usize,
    /// Lanes, whole registers.
    pub width: usize,
    /// What a score is multiplied by before 2^x.
    pub factor: T,
    /// L of each lane.
    pub lse: &'b [T],
    /// D of each lane.
    pub delta: &'b [T],
}

impl<T: Real> Slopes<'_, T> {
    fn args(&mut self, lanes: usize) -> slopes::Args<T> {
        let (rows, width, size) = (self.rows, self.width, self.rows * self.width);
        assert!(width.is_multiple_of(lanes) && size <= self.scores.len() && size <= self.slopes.len());
        assert!(width <= self.lse.len() && width <= self.delta.len(), "slopes: lanes too short");
        slopes::Args {
            scores: self.scores.as_mut_ptr(),
            slopes: self.slopes.as_mut_ptr(),
            rows,
            width,
            factor: self.factor,
            lse: self.lse.as_ptr(),
            delta: self.delta.as_ptr(),
        }
    }
}

fn tile_args<A: Copy, B: Copy, T>(
    lanes: usize,
    registers: usize,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: &mut [T],
    c_row: usize,
    accumulate: bool,
) -> tile::Args<A, B, T> {
    let width = b.cols();
    assert!(width > 0 && width.is_multiple_of(lanes) && width / lanes <= registers, "tile: width {width}");
    assert!(a.cols() == b.rows() && (b.rows() == 0 || b.col_stride() == 1), "tile: operands do not match");
    assert!(a.rows() == 0 || (a.rows() - 1) * c_row + width <= c.len(), "tile: output too short");
    tile::Args {
        a: a.as_ptr(),
        a_row: a.row_stride(),
        a_step: a.col_stride(),
        b: b.as_ptr(),
        b_step: b.row_stride(),
        depth: a.cols(),
        c: c.as_mut_ptr(),
        c_row,
        rows: a.rows(),
        width,
        accumulate,
        ahead: std::ptr::null_mut(),
        toward: tile::AHEAD as isize * b.row_stride() * size_of::<B>() as isize,
        list: std::ptr::null(),
        listed: 0,
        b_first: 0,
    }
}

/// Some rows and columns of a matrix whose rows lie anywhere.
pub struct Piece<'l, 'a, T> {
    /// All rows; those after the piece are asked for meanwhile.
    pub of: &'l Listed<'a, T>,
    /// Rows of the piece.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: Range<usize>,
}

fn listed_tile_args<A: Copy, B: Copy, T>(
    lanes: usize,
    registers: usize,
    a: Matrix<'_, A>,
    b: Piece<'_, '_, B>,
    c: &mut [T],
    c_row: usize,
) -> tile::Args<A, B, T> {
    let (rows, columns) = (b.rows, b.columns);
    assert!(rows.end <= b.of.len() && columns.end <= b.of.cols() && rows.len() == a.cols(), "tile: outside the list");
    let width = columns.len();
    assert!(width > 0 && width.is_multiple_of(lanes) && width / lanes <= registers, "tile: width {width}");
    assert!(a.rows() == 0 || (a.rows() - 1) * c_row + width <= c.len(), "tile: output too short");
    let list = &b.of.rows()[rows.start..];
    tile::Args {
        a: a.as_ptr(),
        a_row: a.row_stride(),
        a_step: a.col_stride(),
        b: list.first().copied().unwrap_or(std::ptr::null()),
        b_step: 0,
        depth: rows.len(),
        c: c.as_mut_ptr(),
        c_row,
        rows: a.rows(),
        width,
        accumulate: true,
        ahead: std::ptr::null_mut(),
        toward: 0,
        list: list.as_ptr(),
        listed: list.len(),
        b_first: columns.start,
    }
}

/// The same call, of the bits of bfloat16 (`bf16` is a transparent `u16`).
fn bits(args: &tile::Args<f32, bf16, f32>) -> tile::Args<f32, u16, f32> {
    tile::Args {
        a: args.a,
        a_row: args.a_row,
        a_step: args.a_step,
        b: args.b.cast(),
        b_step: args.b_step,
        depth: args.depth,
        c: args.c,
        c_row: args.c_row,
        rows: args.rows,
        width: args.width,
        accumulate: args.accumulate,
        ahead: args.ahead,
        toward: args.toward,
        list: args.list.cast(),
        listed: args.listed,
        b_first: args.b_first,
    }
}

fn listed_rows_args<X: Copy, W: Copy, T>(
    x: Matrix<'_, X>,
    w: &Listed<'_, W>,
    rows: Range<usize>,
    out: &mut [T],
    out_row: usize,
) -> rows::Args<X, W, T> {
    assert!(x.cols() == w.cols() && rows.end <= w.len(), "rows: outside the list");
    assert!(x.cols() <= 1 || x.col_stride() == 1, "rows: units must be adjacent");
    assert!(
        x.rows() == 0 || rows.is_empty() || (x.rows() - 1) * out_row + rows.len() <= out.len(),
        "rows: output too short"
    );
    let list = &w.rows()[rows.start..];
    rows::Args {
        x: x.as_ptr(),
        x_row: x.row_stride(),
        x_rows: x.rows(),
        w: std::ptr::null(),
        w_row: 0,
        w_rows: rows.len(),
        depth: x.cols(),
        out: out.as_mut_ptr(),
        out_row,
        toward: 0,
        list: list.as_ptr(),
        listed: list.len(),
    }
}

fn rows_args<X: Copy, W: Copy, T>(
    x: Matrix<'_, X>,
    w: Matrix<'_, W>,
    out: &mut [T],
    out_row: usize,
) -> rows::Args<X, W, T> {
    assert!(x.cols() == w.cols(), "rows: depths differ");
    assert!(x.cols() <= 1 || (x.col_stride() == 1 && w.col_stride() == 1), "rows: units must be adjacent");
    assert!(
        x.rows() == 0 || w.rows() == 0 || (x.rows() - 1) * out_row + w.rows() <= out.len(),
        "rows: output too short"
    );
    rows::Args {
        x: x.as_ptr(),
        x_row: x.row_stride(),
        x_rows: x.rows(),
        w: w.as_ptr(),
        w_row: w.row_stride(),
        w_rows: w.rows(),
        depth: x.cols(),
        out: out.as_mut_ptr(),
        out_row,
        toward: (rows::AHEAD_BYTES / (x.cols() * size_of::<W>()).max(1)).max(1) as isize
            * w.row_stride()
            * size_of::<W>() as isize,
        list: std::ptr::null(),
        listed: 0,
    }
}

fn softmax_args<T: Real>(
    lanes: usize,
    scores: &mut [T],
    rows: usize,
    width: usize,
    factor: T,
    state: &mut Online<T>,
    pairs: &mut [u32],
) -> softmax::Args<T> {
    assert!(width.is_multiple_of(lanes) && rows * width <= scores.len(), "softmax: scores too short");
    assert!([&state.reference, &state.normaliser, &state.alpha].iter().all(|lanes| lanes.len() >= width));
    softmax::Args {
        scores: scores.as_mut_ptr(),
        rows,
        width,
        factor,
        threshold: state.threshold,
        reference: state.reference.as_mut_ptr(),
        normaliser: state.normaliser.as_mut_ptr(),
        alpha: state.alpha.as_mut_ptr(),
        pairs: pairs.as_mut_ptr(),
    }
}

/// Units that [`Table::stack`] may write.
fn stack_extent(lanes: usize, columns: usize, width: usize, step: usize) -> usize {
    assert!(width > 0 && width.is_multiple_of(lanes), "stack: a width of {width}");
    let last = columns.saturating_sub(1) / width;
    if columns == 0 { 0 } else { last * step + (columns - last * width).next_multiple_of(lanes) }
}

impl<T: Real> Table<T> {
    /// Lanes of a register.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// The widest panel, in lanes.
    pub fn panel(&self) -> usize {
        self.lanes * self.registers
    }

    /// `C[r, lane] (+)= sum over k of A[r, k] * B[k, lane]`; the rows of B are adjacent lanes, as many as B has columns
    /// (whole registers); row r of C starts at `c[r * c_row]`.
    pub fn tile(&self, a: Matrix<'_, T>, b: Matrix<'_, T>, c: &mut [T], c_row: usize, accumulate: bool) {
        let args = tile_args(self.lanes, self.registers, a, b, c, c_row, accumulate);
        // SAFETY: extents checked; `Matrix` covers its own; the level is available (module docs).
        unsafe { (self.tile)(&args) }
    }

    /// As [`tile`](Self::tile), asking for memory meanwhile.
    pub fn tile_ahead(
        &self,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        c: &mut [T],
        c_row: usize,
        accumulate: bool,
        ahead: &mut tile::Ahead,
    ) {
        if ahead.is_done() {
            return self.tile(a, b, c, c_row, accumulate);
        }
        let mut args = tile_args(self.lanes, self.registers, a, b, c, c_row, accumulate);
        args.ahead = ahead;
        // SAFETY: as above; `ahead` is borrowed for the call.
        unsafe { (self.walk)(&args) }
    }

    /// As [`tile`](Self::tile), added to C, for a B that comes from memory.
    pub fn stream(&self, a: Matrix<'_, T>, b: Matrix<'_, T>, c: &mut [T], c_row: usize) {
        let args = tile_args(self.lanes, self.registers, a, b, c, c_row, true);
        // SAFETY: as in `tile`.
        unsafe { (self.stream)(&args) }
    }

    /// As [`stream`](Self::stream), for some rows and columns of a B whose rows lie anywhere.
    pub fn stream_listed(&self, a: Matrix<'_, T>, b: Piece<'_, '_, T>, c: &mut [T], c_row: usize) {
        let args = listed_tile_args(self.lanes, self.registers, a, b, c, c_row);
        // SAFETY: extents checked by `listed_tile_args`; level as above.
        unsafe { (self.stream)(&args) }
    }

    /// `out[x, w] = <X[x], W[w]>`, units adjacent in both.
    pub fn rows(&self, x: Matrix<'_, T>, w: Matrix<'_, T>, out: &mut [T], out_row: usize) {
        // SAFETY: extents checked by `rows_args`; level as above.
        unsafe { (self.rows)(&rows_args(x, w, out, out_row)) }
    }

    /// As [`rows`](Self::rows), for some rows of a W whose rows lie anywhere.
    pub fn rows_listed(&self, x: Matrix<'_, T>, w: &Listed<'_, T>, rows: Range<usize>, out: &mut [T], out_row: usize) {
        // SAFETY: extents checked by `listed_rows_args`; level as above.
        unsafe { (self.rows)(&listed_rows_args(x, w, rows, out, out_row)) }
    }

    /// As [`rows`](Self::rows), on rows of bytes.
    pub fn rows_i8(&self, x: Matrix<'_, T>, w: Matrix<'_, i8>, out: &mut [T], out_row: usize) {
        // SAFETY: extents checked by `rows_args`; level as above.
        unsafe { (self.rows_i8)(&rows_args(x, w, out, out_row)) }
    }

    /// Widens a row of bytes.
    pub fn widen_i8(&self, from: &[i8], to: &mut [T]) {
        assert_eq!(from.len(), to.len());
        // SAFETY: extents checked; level as above.
        unsafe { (self.widen_i8)(from.as_ptr(), to.as_mut_ptr(), from.len()) }
    }

    /// One block of the online softmax; P overwrites the scores. Returns whether `state.alpha` is not all one.
    pub fn softmax(&self, scores: &mut [T], rows: usize, width: usize, factor: T, state: &mut Online<T>) -> bool {
        // SAFETY: extents checked by `softmax_args`; level as above.
        unsafe { (self.softmax)(&softmax_args(self.lanes, scores, rows, width, factor, state, &mut [])) }
    }

    /// One block of the step back through a softmax, in place.
    pub fn slopes(&self, block: &mut Slopes<'_, T>) {
        // SAFETY: extents checked by `args`; level as above.
        unsafe { (self.slopes)(&block.args(self.lanes)) }
    }

    /// Packs rows into a panel: `panel[k * width + r] = sources[r][k]`; missing rows are zero.
    pub fn pack(&self, sources: &[&[T]], depth: usize, width: usize, panel: &mut [T]) {
        assert!(sources.len() <= width && width.is_multiple_of(self.lanes) && depth * width <= panel.len());
        let mut pointers = [std::ptr::null(); 64];
        for (slot, source) in pointers.iter_mut().zip(sources) {
            assert!(source.len() >= depth, "pack: row too short");
            *slot = source.as_ptr();
        }
        // SAFETY: rows and panel checked (at most 48 lanes a panel); level as above.
        unsafe { (self.pack)(&pointers[..sources.len()], depth, width, panel.as_mut_ptr()) }
    }

    /// `rows[r][j] = block[j * width + r]` for `j < count`.
    pub fn unpack(&self, block: &[T], count: usize, width: usize, rows: &mut [&mut [T]]) {
        assert!(rows.len() <= width && width.is_multiple_of(self.lanes) && count * width <= block.len());
        let mut pointers = [std::ptr::null_mut(); 64];
        for (slot, row) in pointers.iter_mut().zip(rows.iter_mut()) {
            assert!(row.len() >= count, "unpack: row too short");
            *slot = row.as_mut_ptr();
        }
        // SAFETY: rows and block checked; level as above.
        unsafe { (self.unpack)(block.as_ptr(), count, width, &pointers[..rows.len()]) }
    }

    /// `gate = act(gate, up)` over whole registers.
    pub fn activation(&self, kind: Activation, gate: &mut [T], up: Option<&[T]>) {
        assert!(gate.len().is_multiple_of(self.lanes) && up.is_none_or(|up| up.len() == gate.len()));
        let other = up.map_or(gate.as_ptr(), <[T]>::as_ptr);
        // SAFETY: extents checked; level as above.
        unsafe { (self.activation)(kind, gate.as_mut_ptr(), other, gate.len()) }
    }

    /// Cuts a row into blocks of `width` columns, `step` apart: `out[b * step + c] = row[b * width + c]`, the last block
    /// filled with zeros up to whole registers.
    pub fn stack(&self, row: &[T], width: usize, step: usize, out: &mut [T]) {
        assert!(stack_extent(self.lanes, row.len(), width, step) <= out.len(), "stack: blocks too short");
        // SAFETY: extents checked; level as above.
        unsafe { (self.stack)(row.as_ptr(), row.len(), width, step, out.as_mut_ptr()) }
    }

    /// One row's step back through the activation, in place (see [`activation::gradient`]): `grad` becomes the scaled
    /// activation, `gate` and `up` their gradients; returns the gradient of `scale`.
    pub fn gradient(&self, kind: Activation, gate: &mut [T], up: Option<&mut [T]>, grad: &mut [T], scale: T) -> T {
        assert!(grad.len().is_multiple_of(self.lanes) && gate.len() == grad.len());
        assert!(up.as_ref().map_or(!kind.gated(), |up| kind.gated() && up.len() == grad.len()));
        let other = up.map_or(std::ptr::null_mut(), <[T]>::as_mut_ptr);
        // SAFETY: extents checked; level as above.
        unsafe { (self.gradient)(kind, gate.as_mut_ptr(), other, grad.as_mut_ptr(), scale, grad.len()) }
    }

    /// `block[r, lane] *= factor[lane]`.
    pub fn scale_rows(&self, block: &mut [T], rows: usize, width: usize, factor: &[T]) {
        assert!(width.is_multiple_of(self.lanes) && rows * width <= block.len() && width <= factor.len());
        // SAFETY: extents checked; level as above.
        unsafe { (self.scale_rows)(block.as_mut_ptr(), rows, width, factor.as_ptr()) }
    }

    /// `sum += weight * x`.
    pub fn add_scaled(&self, sum: &mut [T], x: &[T], weight: T) {
        assert_eq!(sum.len(), x.len());
        // SAFETY: extents checked; level as above.
        unsafe { (self.add_scaled)(sum.as_mut_ptr(), x.as_ptr(), weight, x.len()) }
    }

    /// The largest `row[i] * factor`; -inf for an empty row. NaN entries are passed over.
    pub fn row_max(&self, row: &[T], factor: T) -> T {
        // SAFETY: one slice; level as above.
        unsafe { (self.row_max)(row.as_ptr(), factor, row.len()) }
    }

    /// `row[i] = 2^(row[i] * factor - reference)`; returns the sum.
    pub fn row_exp2(&self, row: &mut [T], factor: T, reference: T) -> T {
        // SAFETY: one slice; level as above.
        unsafe { (self.row_exp2)(row.as_mut_ptr(), factor, reference, row.len()) }
    }
}

impl HalfTable {
    /// Lanes of a register.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// As [`Table::tile`], on bfloat16 pairs.
    pub fn tile(&self, a: Matrix<'_, u32>, b: Matrix<'_, u32>, c: &mut [f32], c_row: usize, accumulate: bool) {
        let args = tile_args(self.lanes, self.registers, a, b, c, c_row, accumulate);
        // SAFETY: extents checked; level as in `Table`.
        unsafe { (self.tile)(&args) }
    }

    /// As [`Table::tile_ahead`], on bfloat16 pairs.
    pub fn tile_ahead(
        &self,
        a: Matrix<'_, u32>,
        b: Matrix<'_, u32>,
        c: &mut [f32],
        c_row: usize,
        accumulate: bool,
        ahead: &mut tile::Ahead,
    ) {
        if ahead.is_done() {
            return self.tile(a, b, c, c_row, accumulate);
        }
        let mut args = tile_args(self.lanes, self.registers, a, b, c, c_row, accumulate);
        args.ahead = ahead;
        // SAFETY: extents checked; `ahead` is borrowed for the call; level as in `Table`.
        unsafe { (self.walk)(&args) }
    }

    /// As [`Table::stream`], single precision times bfloat16 lanes.
    pub fn widen(&self, a: Matrix<'_, f32>, b: Matrix<'_, bf16>, c: &mut [f32], c_row: usize) {
        let args = tile_args(self.lanes, self.registers, a, b, c, c_row, true);
        // SAFETY: extents checked; level as in `Table`.
        unsafe { (self.widen)(&bits(&args)) }
    }

    /// As [`Table::stream_listed`], single precision times bfloat16 lanes.
    pub fn widen_listed(&self, a: Matrix<'_, f32>, b: Piece<'_, '_, bf16>, c: &mut [f32], c_row: usize) {
        let args = listed_tile_args(self.lanes, self.registers, a, b, c, c_row);
        // SAFETY: extents checked by `listed_tile_args`; level as in `Table`.
        unsafe { (self.widen)(&bits(&args)) }
    }

    /// As [`Table::pack`], on bfloat16 pairs: a move of 32-bit units, whatever they mean.
    pub fn pack(&self, sources: &[&[u32]], depth: usize, width: usize, panel: &mut [u32]) {
        assert!(sources.len() <= width && width.is_multiple_of(self.lanes) && depth * width <= panel.len());
        let mut pointers = [std::ptr::null::<f32>(); 64];
        for (slot, source) in pointers.iter_mut().zip(sources) {
            assert!(source.len() >= depth, "pack: row too short");
            *slot = source.as_ptr().cast();
        }
        // SAFETY: as in `Table::pack`; f32 and u32 have one size, and moving bits does not look at their meaning.
        unsafe { (f32::table().pack)(&pointers[..sources.len()], depth, width, panel.as_mut_ptr().cast()) }
    }

    /// As [`Table::rows`], on bfloat16 pairs.
    pub fn rows(&self, x: Matrix<'_, u32>, w: Matrix<'_, u32>, out: &mut [f32], out_row: usize) {
        // SAFETY: extents checked by `rows_args`; level as in `Table`.
        unsafe { (self.rows)(&rows_args(x, w, out, out_row)) }
    }

    /// As [`Table::rows_listed`], on bfloat16 pairs.
    pub fn rows_listed(
        &self,
        x: Matrix<'_, u32>,
        w: &Listed<'_, u32>,
        rows: Range<usize>,
        out: &mut [f32],
        out_row: usize,
    ) {
        // SAFETY: extents checked by `listed_rows_args`; level as in `Table`.
        unsafe { (self.rows)(&listed_rows_args(x, w, rows, out, out_row)) }
    }

    /// A row of bytes as bfloat16 pairs (exact); an odd last one is paired with zero.
    pub fn pairs_i8(&self, from: &[i8], to: &mut [u32]) {
        assert_eq!(from.len().div_ceil(2), to.len());
        // SAFETY: extents checked; level as in `Table`.
        unsafe { (self.pairs_i8)(from.as_ptr(), to.as_mut_ptr(), from.len()) }
    }

    /// As [`Table::softmax`]; P goes to `pairs` (pairs of keys), the scores stay.
    pub fn softmax(
        &self,
        scores: &mut [f32],
        rows: usize,
        width: usize,
        factor: f32,
        state: &mut Online<f32>,
        pairs: &mut [u32],
    ) -> bool {
        assert!(rows.div_ceil(2) * width <= pairs.len(), "softmax: pairs too short");
        // SAFETY: extents checked here and by `softmax_args`; level as in `Table`.
        unsafe { (self.softmax)(&softmax_args(self.lanes, scores, rows, width, factor, state, pairs)) }
    }

    /// Rounds a row to bfloat16 (nearest even; NaN stays NaN).
    pub fn round(&self, from: &[f32], to: &mut [half::bf16]) {
        assert_eq!(from.len(), to.len());
        // SAFETY: extents checked; `bf16` is a transparent `u16`; level as in `Table`.
        unsafe { (self.round)(from.as_ptr(), to.as_mut_ptr().cast(), from.len()) }
    }

    /// Rounds the rows of a block, `step` apart, to `rows[r][first..first + count]`.
    pub fn round_rows(&self, block: &[f32], step: usize, rows: &mut [&mut [half::bf16]], columns: Range<usize>) {
        let mut pointers = [std::ptr::null_mut(); 64];
        for (part, rows) in rows.chunks_mut(pointers.len()).enumerate() {
            let block = &block[part * pointers.len() * step..];
            assert!((rows.len() - 1) * step + columns.len() <= block.len(), "round_rows: block too short");
            for (slot, row) in pointers.iter_mut().zip(rows.iter_mut()) {
                *slot = row[columns.clone()].as_mut_ptr().cast();
            }
            // SAFETY: block and rows checked; `bf16` is a transparent `u16`; level as in `Table`.
            unsafe { (self.round_rows)(block.as_ptr(), step, columns.len(), &pointers[..rows.len()]) }
        }
    }

    /// Widens a row.
    pub fn widen_row(&self, from: &[half::bf16], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        // SAFETY: extents checked; `bf16` is a transparent `u16`; level as in `Table`.
        unsafe { (self.widen_row)(from.as_ptr().cast(), to.as_mut_ptr(), from.len()) }
    }

    /// As [`Table::unpack`], rounding to bfloat16.
    pub fn unpack(&self, block: &[f32], count: usize, width: usize, rows: &mut [&mut [half::bf16]]) {
        assert!(rows.len() <= width && width.is_multiple_of(self.lanes) && count * width <= block.len());
        let mut pointers = [std::ptr::null_mut(); 64];
        for (slot, row) in pointers.iter_mut().zip(rows.iter_mut()) {
            assert!(row.len() >= count, "unpack: row too short");
            *slot = row.as_mut_ptr().cast();
        }
        // SAFETY: rows and block checked; level as in `Table`.
        unsafe { (self.unpack)(block.as_ptr(), count, width, &pointers[..rows.len()]) }
    }

    /// As [`Table::unpack`], on bfloat16 pairs: a move of 32-bit units, whatever they mean.
    pub fn turn(&self, block: &[u32], count: usize, width: usize, rows: &mut [&mut [u32]]) {
        assert!(rows.len() <= width && width.is_multiple_of(self.lanes) && count * width <= block.len());
        let mut pointers = [std::ptr::null_mut::<f32>(); 64];
        for (slot, row) in pointers.iter_mut().zip(rows.iter_mut()) {
            assert!(row.len() >= count, "turn: row too short");
            *slot = row.as_mut_ptr().cast();
        }
        // SAFETY: as in `Table::unpack`; f32 and u32 have one size, and moving bits does not look at their meaning.
        unsafe { (f32::table().unpack)(block.as_ptr().cast(), count, width, &pointers[..rows.len()]) }
    }

    /// As [`Table::stack`], for two rows at once: unit c is the pair (`low[c]`, `high[c]`), or (`low[c]`, 0).
    pub fn stack(&self, low: &[half::bf16], high: Option<&[half::bf16]>, width: usize, step: usize, out: &mut [u32]) {
        assert!(high.is_none_or(|high| high.len() == low.len()), "stack: rows differ");
        assert!(stack_extent(self.lanes, low.len(), width, step) <= out.len(), "stack: blocks too short");
        let second = high.map_or(std::ptr::null(), |high| high.as_ptr().cast());
        // SAFETY: extents checked; `bf16` is a transparent `u16`; level as in `Table`.
        unsafe { (self.stack)(low.as_ptr().cast(), second, low.len(), width, step, out.as_mut_ptr()) }
    }

    /// As [`Table::slopes`], to bfloat16: P and dS as pairs of adjacent lanes, dS as pairs of rows too.
    pub fn slopes(&self, block: &mut Slopes<'_, f32>, weights: &mut [u32], own: &mut [u32], pairs: &mut [u32]) {
        let (args, size) = (block.args(self.lanes), block.rows * block.width);
        assert!(
            size <= 2 * weights.len() && size <= 2 * own.len() && block.rows.div_ceil(2) * block.width <= pairs.len()
        );
        let (weights, slopes) = (weights.as_mut_ptr().cast(), own.as_mut_ptr().cast());
        // SAFETY: extents checked; level as in `Table`.
        unsafe { (self.slopes)(&args, &slopes::Sealed { weights, slopes, pairs: pairs.as_mut_ptr() }) }
    }

    /// Rounds a block to bfloat16, as pairs of adjacent elements.
    pub fn round_pairs(&self, block: &[f32], pairs: &mut [u32]) {
        assert!(block.len() <= 2 * pairs.len(), "round_pairs: units too short");
        // SAFETY: extents checked; two elements fill a unit; level as in `Table`.
        unsafe { (self.round)(block.as_ptr(), pairs.as_mut_ptr().cast(), block.len()) }
    }

    /// Rounds a lane-major block to bfloat16 pairs of rows.
    pub fn interleave(&self, block: &[f32], rows: usize, width: usize, pairs: &mut [u32]) {
        assert!(
            width.is_multiple_of(self.lanes) && rows * width <= block.len() && rows.div_ceil(2) * width <= pairs.len()
        );
        // SAFETY: extents checked; level as in `Table`.
        unsafe { (self.interleave)(block.as_ptr(), rows, width, pairs.as_mut_ptr()) }
    }
}

/// Types that accumulators are rounded to.
pub trait Round: Float + Kept {
    /// Rounds a row of accumulators (nearest even); rows of one length.
    fn round(from: &[Self::Acc], to: &mut [Self]);
    /// Rounds the rows of a block, `step` apart, to the same columns of `rows`.
    fn round_rows(block: &[Self::Acc], step: usize, rows: &mut [&mut [Self]], columns: Range<usize>) {
        for (row, sums) in rows.iter_mut().zip(block.chunks(step)) {
            Self::round(&sums[..columns.len()], &mut row[columns.clone()]);
        }
    }
    /// Widens a row, exactly; rows of one length.
    fn widen_row(from: &[Self], to: &mut [Self::Acc]);
    /// A lane-major block, rounded, into rows: `rows[r][j] = block[j * width + r]` for `j < count`.
    fn unpack(block: &[Self::Acc], count: usize, width: usize, rows: &mut [&mut [Self]]);
}

macro_rules! itself {
    ($t:ty) => {
        impl Round for $t {
            fn round(from: &[$t], to: &mut [$t]) {
                to.copy_from_slice(from);
            }
            fn widen_row(from: &[$t], to: &mut [$t]) {
                to.copy_from_slice(from);
            }
            fn unpack(block: &[$t], count: usize, width: usize, rows: &mut [&mut [$t]]) {
                <$t>::table().unpack(block, count, width, rows);
            }
        }
    };
}
itself!(f32);
itself!(f64);

impl Round for half::f16 {
    fn round(from: &[f32], to: &mut [half::f16]) {
        use half::slice::HalfFloatSliceExt;
        to.convert_from_f32_slice(from);
    }
    fn widen_row(from: &[half::f16], to: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        from.convert_to_f32_slice(to);
    }
    fn unpack(block: &[f32], count: usize, width: usize, rows: &mut [&mut [half::f16]]) {
        for (r, row) in rows.iter_mut().enumerate() {
            for (j, element) in row[..count].iter_mut().enumerate() {
                *element = half::f16::from_f32(block[j * width + r]);
            }
        }
    }
}

impl Round for half::bf16 {
    fn round(from: &[f32], to: &mut [half::bf16]) {
        half_table().round(from, to);
    }
    fn round_rows(block: &[f32], step: usize, rows: &mut [&mut [half::bf16]], columns: Range<usize>) {
        half_table().round_rows(block, step, rows, columns);
    }
    fn widen_row(from: &[half::bf16], to: &mut [f32]) {
        half_table().widen_row(from, to);
    }
    fn unpack(block: &[f32], count: usize, width: usize, rows: &mut [&mut [half::bf16]]) {
        half_table().unpack(block, count, width, rows);
    }
}

/// Floating-point types that have kernels.
pub trait Kernel: Real + Round {
    /// The table of the level in use.
    fn table() -> &'static Table<Self>;
}

macro_rules! table {
    ($module:ident, $t:ty, $v:ty, $registers:literal, [$m1:literal, $m2:literal, $m3:literal], $(#[$gate:meta])*) => {
        pub(super) mod $module {
            use super::*;
            type V = $v;
            $(#[$gate])*
            unsafe fn tile_entry(args: &tile::Args<$t, $t, $t>) {
                // SAFETY: the caller of a table's entry guarantees `Args`.
                unsafe { tile::tile::<Plain<V>, $m1, $m2, $m3, false, false>(args) }
            }
            $(#[$gate])*
            unsafe fn walk_entry(args: &tile::Args<$t, $t, $t>) {
                // SAFETY: as above.
                unsafe { tile::tile::<Plain<V>, $m1, $m2, $m3, false, true>(args) }
            }
            $(#[$gate])*
            unsafe fn stream_entry(args: &tile::Args<$t, $t, $t>) {
                // SAFETY: as above.
                unsafe { tile::tile::<Plain<V>, $m1, $m2, $m3, true, false>(args) }
            }
            $(#[$gate])*
            unsafe fn rows_entry(args: &rows::Args<$t, $t, $t>) {
                // SAFETY: as above.
                unsafe { rows::rows::<Both<Plain<V>>>(args) }
            }
            $(#[$gate])*
            unsafe fn rows_i8_entry(args: &rows::Args<$t, i8, $t>) {
                // SAFETY: as above.
                unsafe { rows::rows::<Bytes<V>>(args) }
            }
            $(#[$gate])*
            unsafe fn widen_i8_entry(from: *const i8, to: *mut $t, count: usize) {
                // SAFETY: as above.
                unsafe { pointwise::widen_i8::<V>(from, to, count) }
            }
            $(#[$gate])*
            unsafe fn softmax_entry(args: &softmax::Args<$t>) -> bool {
                // SAFETY: as above.
                unsafe { softmax::softmax::<V>(args, |args, lane, factor, reference, large| softmax::in_place::<V>(args, lane, factor, reference, large)) }
            }
            $(#[$gate])*
            unsafe fn slopes_entry(args: &slopes::Args<$t>) {
                // SAFETY: as above.
                unsafe { slopes::in_place::<V>(args) }
            }
            $(#[$gate])*
            unsafe fn pack_entry(sources: &[*const $t], depth: usize, width: usize, panel: *mut $t) {
                // SAFETY: as above.
                unsafe { pack::pack::<V>(sources, depth, width, panel) }
            }
            $(#[$gate])*
            unsafe fn unpack_entry(block: *const $t, count: usize, width: usize, rows: &[*mut $t]) {
                // SAFETY: as above.
                unsafe { pack::unpack::<V>(block, count, width, rows) }
            }
            $(#[$gate])*
            unsafe fn activation_entry(kind: Activation, gate: *mut $t, up: *const $t, count: usize) {
                // SAFETY: as above.
                unsafe { activation::activation::<V>(kind, gate, up, count) }
            }
            $(#[$gate])*
            unsafe fn gradient_entry(kind: Activation, gate: *mut $t, up: *mut $t, grad: *mut $t, scale: $t, count: usize) -> $t {
                // SAFETY: as above.
                unsafe { activation::gradient::<V>(kind, gate, up, grad, scale, count) }
            }
            $(#[$gate])*
            unsafe fn stack_entry(row: *const $t, columns: usize, width: usize, step: usize, out: *mut $t) {
                // SAFETY: as above.
                unsafe { pack::stack::<V>(row, columns, width, step, out) }
            }
            $(#[$gate])*
            unsafe fn scale_rows_entry(block: *mut $t, rows: usize, width: usize, factor: *const $t) {
                // SAFETY: as above.
                unsafe { pointwise::scale_rows::<V>(block, rows, width, factor) }
            }
            $(#[$gate])*
            unsafe fn add_scaled_entry(sum: *mut $t, x: *const $t, weight: $t, count: usize) {
                // SAFETY: as above.
                unsafe { pointwise::add_scaled::<V>(sum, x, weight, count) }
            }
            $(#[$gate])*
            unsafe fn row_max_entry(row: *const $t, factor: $t, count: usize) -> $t {
                // SAFETY: as above.
                unsafe { pointwise::row_max::<V>(row, factor, count) }
            }
            $(#[$gate])*
            unsafe fn row_exp2_entry(row: *mut $t, factor: $t, reference: $t, count: usize) -> $t {
                // SAFETY: as above.
                unsafe { pointwise::row_exp2::<V>(row, factor, reference, count) }
            }
            pub static TABLE: Table<$t> = Table {
                row_max: row_max_entry,
                row_exp2: row_exp2_entry,
                lanes: <V as Vector>::LANES,
                registers: $registers,
                tile: tile_entry,
                walk: walk_entry,
                stream: stream_entry,
                rows: rows_entry,
                rows_i8: rows_i8_entry,
                widen_i8: widen_i8_entry,
                softmax: softmax_entry,
                slopes: slopes_entry,
                pack: pack_entry,
                unpack: unpack_entry,
                activation: activation_entry,
                gradient: gradient_entry,
                stack: stack_entry,
                scale_rows: scale_rows_entry,
                add_scaled: add_scaled_entry,
            };
        }
    };
}

macro_rules! half_table {
    ($module:ident, $v:ty, $dot:ty, $registers:literal, [$m1:literal, $m2:literal, $m3:literal], $(#[$gate:meta])*) => {
        pub(super) mod $module {
            use super::*;
            type V = $v;
            $(#[$gate])*
            unsafe fn tile_entry(args: &tile::Args<u32, u32, f32>) {
                // SAFETY: the caller of a table's entry guarantees `Args`.
                unsafe { tile::tile::<$dot, $m1, $m2, $m3, false, false>(args) }
            }
            $(#[$gate])*
            unsafe fn walk_entry(args: &tile::Args<u32, u32, f32>) {
                // SAFETY: as above.
                unsafe { tile::tile::<$dot, $m1, $m2, $m3, false, true>(args) }
            }
            $(#[$gate])*
            unsafe fn widen_entry(args: &tile::Args<f32, u16, f32>) {
                // SAFETY: as above.
                unsafe { tile::tile::<Widen<V>, $m1, $m2, $m3, true, false>(args) }
            }
            $(#[$gate])*
            unsafe fn rows_entry(args: &rows::Args<u32, u32, f32>) {
                // SAFETY: as above.
                unsafe { rows::rows::<Both<$dot>>(args) }
            }
            $(#[$gate])*
            unsafe fn pairs_i8_entry(from: *const i8, to: *mut u32, count: usize) {
                // SAFETY: as above.
                unsafe { pointwise::pairs_i8::<V>(from, to, count) }
            }
            $(#[$gate])*
            unsafe fn softmax_entry(args: &softmax::Args<f32>) -> bool {
                // SAFETY: as above.
                unsafe { softmax::softmax::<V>(args, |args, lane, factor, reference, large| softmax::to_pairs::<V>(args, lane, factor, reference, large)) }
            }
            $(#[$gate])*
            unsafe fn slopes_entry(args: &slopes::Args<f32>, to: &slopes::Sealed) {
                // SAFETY: as above.
                unsafe { slopes::sealed::<V>(args, to) }
            }
            $(#[$gate])*
            unsafe fn interleave_entry(block: *const f32, rows: usize, width: usize, pairs: *mut u32) {
                // SAFETY: as above.
                unsafe { pointwise::interleave::<V>(block, rows, width, pairs) }
            }
            $(#[$gate])*
            unsafe fn round_entry(from: *const f32, to: *mut u16, count: usize) {
                // SAFETY: as above.
                unsafe { pointwise::round::<V>(from, to, count) }
            }
            $(#[$gate])*
            unsafe fn round_rows_entry(block: *const f32, step: usize, count: usize, rows: &[*mut u16]) {
                // SAFETY: as above.
                unsafe { pointwise::round_rows::<V>(block, step, count, rows) }
            }
            $(#[$gate])*
            unsafe fn widen_row_entry(from: *const u16, to: *mut f32, count: usize) {
                // SAFETY: as above.
                unsafe { pointwise::widen::<V>(from, to, count) }
            }
            $(#[$gate])*
            unsafe fn unpack_entry(block: *const f32, count: usize, width: usize, rows: &[*mut u16]) {
                // SAFETY: as above.
                unsafe { pack::unpack_bf16::<V>(block, count, width, rows) }
            }
            $(#[$gate])*
            unsafe fn stack_entry(low: *const u16, high: *const u16, columns: usize, width: usize, step: usize, out: *mut u32) {
                // SAFETY: as above.
                unsafe { pack::stack_pairs::<V>(low, high, columns, width, step, out) }
            }
            pub static TABLE: HalfTable = HalfTable {
                round: round_entry,
                widen_row: widen_row_entry,
                round_rows: round_rows_entry,
                unpack: unpack_entry,
                stack: stack_entry,
                lanes: <V as Vector>::LANES,
                registers: $registers,
                tile: tile_entry,
                walk: walk_entry,
                widen: widen_entry,
                rows: rows_entry,
                pairs_i8: pairs_i8_entry,
                softmax: softmax_entry,
                slopes: slopes_entry,
                interleave: interleave_entry,
            };
        }
    };
}

// Strip heights: as many accumulators as the register file takes beside the lane units and one broadcast.
table!(scalar_f32, f32, scalar::Lanes<f32, 8>, 2, [4, 2, 0],);
table!(scalar_f64, f64, scalar::Lanes<f64, 4>, 2, [4, 2, 0],);
half_table!(scalar_half, scalar::Lanes<f32, 8>, Pairs<V>, 2, [4, 2, 0],);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::arch::{avx2, avx512};
    table!(avx2_f32, f32, avx2::F32x8, 2, [8, 6, 0], #[target_feature(enable = "avx2,fma,f16c")]);
    table!(avx2_f64, f64, avx2::F64x4, 2, [8, 6, 0], #[target_feature(enable = "avx2,fma,f16c")]);
    half_table!(avx2_half, avx2::F32x8, Pairs<V>, 2, [8, 4, 0], #[target_feature(enable = "avx2,fma,f16c")]);
    table!(avx512_f32, f32, avx512::F32x16, 3, [16, 12, 8], #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    table!(avx512_f64, f64, avx512::F64x8, 3, [16, 12, 8], #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    half_table!(avx512_half, avx512::F32x16, Pairs<V>, 3, [16, 8, 4], #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    half_table!(avx512_bf16, avx512::F32x16, avx512::DotUnit, 3, [16, 12, 8], #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]);
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::*;
    use crate::arch::neon;
    table!(neon_f32, f32, neon::F32x4x2, 2, [8, 5, 0], #[target_feature(enable = "neon")]);
    table!(neon_f64, f64, neon::F64x2x2, 2, [8, 5, 0], #[target_feature(enable = "neon")]);
    half_table!(neon_half, neon::F32x4x2, Pairs<V>, 2, [8, 4, 0], #[target_feature(enable = "neon")]);
}

impl Kernel for f32 {
    fn table() -> &'static Table<f32> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &x86::avx2_f32::TABLE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => &x86::avx512_f32::TABLE,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => &arm::neon_f32::TABLE,
            _ => &scalar_f32::TABLE,
        }
    }
}

impl Kernel for f64 {
    fn table() -> &'static Table<f64> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &x86::avx2_f64::TABLE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => &x86::avx512_f64::TABLE,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => &arm::neon_f64::TABLE,
            _ => &scalar_f64::TABLE,
        }
    }
}

/// The bfloat16 table of the level in use.
pub fn half_table() -> &'static HalfTable {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => &x86::avx2_half::TABLE,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => &x86::avx512_half::TABLE,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => &x86::avx512_bf16::TABLE,
        #[cfg(target_arch = "aarch64")]
        Level::Neon => &arm::neon_half::TABLE,
        _ => &scalar_half::TABLE,
    }
}
