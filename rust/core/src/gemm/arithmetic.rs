//! How a reduction over a source type is carried out: its units, its kernels, and the copies in between.
//!
//! Everything above this file is written once for all four floating types.
//!
//! | source | unit | accumulator | product |
//! |---|---|---|---|
//! | f32 | f32 | f32 | fused multiply-add |
//! | f64 | f64 | f64 | fused multiply-add |
//! | bf16 | two bf16 in 32 bits | f32 | dot-product unit, or two fused multiply-adds |
//! | f16 | f32 (converted) | f32 | fused multiply-add |

use crate::arch::lanes::FloatLane;
use crate::arch::{Ahead, Kernel, Online, Piece, Round, Slopes, half_table};
use crate::dtype::{Float, Real};
use crate::scratch::Kept;
use crate::view::{Listed, Matrix};
use half::{bf16, f16};
use std::ops::Range;

/// Weights and slopes as the products of the backward pass read them; unused where those are the blocks themselves.
#[derive(Debug, Default)]
pub struct Sealed<U> {
    weights: Vec<U>,
    slopes: Vec<U>,
    turned: Vec<U>,
}

impl<U: Copy + Default> Sealed<U> {
    /// Room for a block of `size` elements.
    pub fn new(size: usize) -> Self {
        let room = || vec![U::default(); size];
        Self { weights: room(), slopes: room(), turned: room() }
    }
}

/// Views of sealed blocks: P and dS [keys, units of queries], dS turned [queries, units of keys].
pub struct Views<'v, U> {
    /// P
    pub weights: Matrix<'v, U>,
    /// dS
    pub slopes: Matrix<'v, U>,
    /// dS, turned
    pub turned: Matrix<'v, U>,
}

impl<'v, U: Copy> Views<'v, U> {
    fn of(weights: &'v [U], slopes: &'v [U], rows: usize, width: usize) -> Self {
        let (weights, slopes) = (Matrix::new(weights, rows, width, width), Matrix::new(slopes, rows, width, width));
        Self { weights, slopes, turned: slopes.transposed() }
    }
}

/// A source type with its way to multiply.
pub trait Arithmetic: Round + Float<Acc: Kernel + FloatLane> {
    /// What one step along the reduction reads.
    type Unit: Kept + Default + Sync;
    /// Elements in a unit.
    const PER_UNIT: usize;

    /// Copies a line of elements into units; what is past its end becomes zero.
    fn copy(line: Matrix<'_, Self>, units: &mut [Self::Unit]);
    /// As [`copy`](Self::copy), of bytes, which every unit holds exactly.
    fn copy_i8(line: Matrix<'_, i8>, units: &mut [Self::Unit]);
    /// The same memory as units, where the layout allows.
    fn borrow(matrix: Matrix<'_, Self>) -> Option<Matrix<'_, Self::Unit>>;
    /// As [`borrow`](Self::borrow), of rows that lie anywhere.
    fn borrow_listed(rows: Listed<'_, Self>) -> Option<Listed<'_, Self::Unit>>;
    /// Lines into a panel; see [`Table::pack`](crate::arch::Table::pack).
    fn pack(lines: &[&[Self::Unit]], depth: usize, width: usize, panel: &mut [Self::Unit]);
    /// Broadcast A times lanes of B; see [`Table::tile`](crate::arch::Table::tile).
    fn tile(a: Matrix<'_, Self::Unit>, b: Matrix<'_, Self::Unit>, c: &mut [Self::Acc], c_row: usize, accumulate: bool);
    /// As [`tile`](Self::tile), asking for memory meanwhile.
    fn tile_ahead(
        a: Matrix<'_, Self::Unit>,
        b: Matrix<'_, Self::Unit>,
        c: &mut [Self::Acc],
        c_row: usize,
        accumulate: bool,
        ahead: &mut Ahead,
    );
    /// Inner products along the units; see [`Table::rows`](crate::arch::Table::rows).
    fn rows(x: Matrix<'_, Self::Unit>, w: Matrix<'_, Self::Unit>, out: &mut [Self::Acc], out_row: usize);
    /// As [`rows`](Self::rows), for some rows of a W whose rows lie anywhere.
    fn rows_listed(
        x: Matrix<'_, Self::Unit>,
        w: &Listed<'_, Self::Unit>,
        rows: Range<usize>,
        out: &mut [Self::Acc],
        out_row: usize,
    );
    /// A lane-major block of accumulators as units along its rows (rounded to the source type).
    fn seal(block: &[Self::Acc], rows: usize, width: usize, units: &mut [Self::Unit]);
    /// As [`seal`](Self::seal), to where [`weights`](Self::weights) looks: nothing to do where that is the block itself.
    fn seal_over(block: &[Self::Acc], rows: usize, width: usize, units: &mut [Self::Unit]);
    /// Up to [`PER_UNIT`](Self::PER_UNIT) rows stacked into one row of units: unit c holds element c of each row.
    fn stack(rows: Matrix<'_, Self>, units: &mut [Self::Unit]);
    /// As [`stack`](Self::stack), cut into blocks of `width` columns (whole registers), `step` units apart:
    /// `units[b * step + c]` is column `b * width + c`; the last block is filled with zeros up to whole registers.
    fn stack_blocks(rows: Matrix<'_, Self>, width: usize, step: usize, units: &mut [Self::Unit]);
    /// A lane-major block of units into lines: `lines[r][k] = block[k * width + r]` for `k < count`.
    fn turn(block: &[Self::Unit], count: usize, width: usize, lines: &mut [&mut [Self::Unit]]);
    /// `c +=` accumulators times lanes of source elements that come from memory, if the kernel for it exists and B's rows
    /// are adjacent lanes.
    fn mixed(a: Matrix<'_, Self::Acc>, b: Matrix<'_, Self>, c: &mut [Self::Acc], c_row: usize) -> bool;
    /// As [`mixed`](Self::mixed), for some rows and columns of a B whose rows lie anywhere.
    fn mixed_listed(a: Matrix<'_, Self::Acc>, b: Piece<'_, '_, Self>, c: &mut [Self::Acc], c_row: usize) -> bool;

    /// One block of the online softmax over a lane-major score block; see [`Table::softmax`](crate::arch::Table::softmax).
    /// The weights lie where [`weights`](Self::weights) says. Returns whether a reference moved.
    fn online(
        scores: &mut [Self::Acc],
        rows: usize,
        width: usize,
        factor: Self::Acc,
        state: &mut Online<Self::Acc>,
        units: &mut [Self::Unit],
    ) -> bool;
    /// The weights that [`online`](Self::online) left: over the scores, or in `units`.
    fn weights<'w>(scores: &'w [Self::Acc], units: &'w [Self::Unit], count: usize) -> &'w [Self::Unit];

    /// One block of the step back through a softmax; what [`views`](Self::views) then shows.
    fn slopes(block: &mut Slopes<'_, Self::Acc>, sealed: &mut Sealed<Self::Unit>);
    /// Seals weights and slopes that were changed after [`Table::slopes`](crate::arch::Table::slopes).
    fn seal_slopes(
        weights: &[Self::Acc],
        slopes: &[Self::Acc],
        rows: usize,
        width: usize,
        sealed: &mut Sealed<Self::Unit>,
    );
    /// What the products read.
    fn views<'v>(
        weights: &'v [Self::Acc],
        slopes: &'v [Self::Acc],
        rows: usize,
        width: usize,
        sealed: &'v Sealed<Self::Unit>,
    ) -> Views<'v, Self::Unit>;

    /// Units that cover `depth` elements.
    fn units(depth: usize) -> usize {
        depth.div_ceil(Self::PER_UNIT)
    }
    /// Lanes of a register.
    fn lanes() -> usize {
        Self::Acc::table().lanes()
    }
    /// Lanes of the widest panel.
    fn panel() -> usize {
        Self::Acc::table().panel()
    }
}

macro_rules! plain {
    ($t:ty) => {
        impl Arithmetic for $t {
            type Unit = $t;
            const PER_UNIT: usize = 1;

            fn copy(line: Matrix<'_, $t>, units: &mut [$t]) {
                match line.row(0) {
                    Some(row) => {
                        units[..row.len()].copy_from_slice(row);
                        units[row.len()..].fill(0.0);
                    }
                    None => copy_line(line, units, |x| x),
                }
            }
            fn copy_i8(line: Matrix<'_, i8>, units: &mut [$t]) {
                match line.row(0) {
                    Some(row) => <$t>::table().widen_i8(row, &mut units[..row.len()]),
                    None => (0..line.cols()).for_each(|k| units[k] = <$t>::from(line.at(0, k))),
                }
                units[line.cols()..].fill(0.0);
            }
            fn borrow(matrix: Matrix<'_, $t>) -> Option<Matrix<'_, $t>> {
                Some(matrix)
            }
            fn borrow_listed(rows: Listed<'_, $t>) -> Option<Listed<'_, $t>> {
                Some(rows)
            }
            fn pack(lines: &[&[$t]], depth: usize, width: usize, panel: &mut [$t]) {
                <$t>::table().pack(lines, depth, width, panel);
            }
            fn tile(a: Matrix<'_, $t>, b: Matrix<'_, $t>, c: &mut [$t], c_row: usize, accumulate: bool) {
                <$t>::table().tile(a, b, c, c_row, accumulate);
            }
            fn tile_ahead(
                a: Matrix<'_, $t>,
                b: Matrix<'_, $t>,
                c: &mut [$t],
                c_row: usize,
                accumulate: bool,
                ahead: &mut Ahead,
            ) {
                <$t>::table().tile_ahead(a, b, c, c_row, accumulate, ahead);
            }
            fn rows(x: Matrix<'_, $t>, w: Matrix<'_, $t>, out: &mut [$t], out_row: usize) {
                <$t>::table().rows(x, w, out, out_row);
            }
            fn rows_listed(x: Matrix<'_, $t>, w: &Listed<'_, $t>, rows: Range<usize>, out: &mut [$t], out_row: usize) {
                <$t>::table().rows_listed(x, w, rows, out, out_row);
            }
            fn seal(block: &[$t], rows: usize, width: usize, units: &mut [$t]) {
                units[..rows * width].copy_from_slice(&block[..rows * width]);
            }
            fn seal_over(_: &[$t], _: usize, _: usize, _: &mut [$t]) {}
            fn stack(rows: Matrix<'_, $t>, units: &mut [$t]) {
                <Self as Arithmetic>::copy(rows, units);
            }
            fn turn(block: &[$t], count: usize, width: usize, lines: &mut [&mut [$t]]) {
                <$t>::table().unpack(block, count, width, lines);
            }
            fn stack_blocks(rows: Matrix<'_, $t>, width: usize, step: usize, units: &mut [$t]) {
                match rows.row(0) {
                    Some(row) => <$t>::table().stack(row, width, step, units),
                    None => by_block::<$t>(rows.cols(), width, step, units, |c| rows.at(0, c)),
                }
            }
            fn online(
                scores: &mut [$t],
                rows: usize,
                width: usize,
                factor: $t,
                state: &mut Online<$t>,
                _: &mut [$t],
            ) -> bool {
                <$t>::table().softmax(scores, rows, width, factor, state)
            }
            fn weights<'w>(scores: &'w [$t], _: &'w [$t], count: usize) -> &'w [$t] {
                &scores[..count]
            }
            fn mixed_listed(a: Matrix<'_, $t>, b: Piece<'_, '_, $t>, c: &mut [$t], c_row: usize) -> bool {
                <$t>::table().stream_listed(a, b, c, c_row);
                true
            }
            fn mixed(a: Matrix<'_, $t>, b: Matrix<'_, $t>, c: &mut [$t], c_row: usize) -> bool {
                if b.col_stride() == 1 {
                    <$t>::table().stream(a, b, c, c_row);
                }
                b.col_stride() == 1
            }
            fn slopes(block: &mut Slopes<'_, $t>, _: &mut Sealed<$t>) {
                <$t>::table().slopes(block);
            }
            fn seal_slopes(_: &[$t], _: &[$t], _: usize, _: usize, _: &mut Sealed<$t>) {}
            fn views<'v>(
                weights: &'v [$t],
                slopes: &'v [$t],
                rows: usize,
                width: usize,
                _: &'v Sealed<$t>,
            ) -> Views<'v, $t> {
                Views::of(weights, slopes, rows, width)
            }
        }
    };
}
plain!(f32);
plain!(f64);

impl Arithmetic for f16 {
    type Unit = f32;
    const PER_UNIT: usize = 1;

    fn copy(line: Matrix<'_, f16>, units: &mut [f32]) {
        if let Some(row) = line.row(0) {
            use half::slice::HalfFloatSliceExt;
            row.convert_to_f32_slice(&mut units[..row.len()]);
            units[row.len()..].fill(0.0);
        } else {
            copy_line(line, units, f16::to_f32);
        }
    }
    fn copy_i8(line: Matrix<'_, i8>, units: &mut [f32]) {
        f32::copy_i8(line, units);
    }
    fn borrow(_: Matrix<'_, f16>) -> Option<Matrix<'_, f32>> {
        None
    }
    fn borrow_listed(_: Listed<'_, f16>) -> Option<Listed<'_, f32>> {
        None
    }
    fn pack(lines: &[&[f32]], depth: usize, width: usize, panel: &mut [f32]) {
        f32::pack(lines, depth, width, panel);
    }
    fn tile(a: Matrix<'_, f32>, b: Matrix<'_, f32>, c: &mut [f32], c_row: usize, accumulate: bool) {
        f32::tile(a, b, c, c_row, accumulate);
    }
    fn tile_ahead(
        a: Matrix<'_, f32>,
        b: Matrix<'_, f32>,
        c: &mut [f32],
        c_row: usize,
        accumulate: bool,
        ahead: &mut Ahead,
    ) {
        f32::table().tile_ahead(a, b, c, c_row, accumulate, ahead);
    }
    fn rows(x: Matrix<'_, f32>, w: Matrix<'_, f32>, out: &mut [f32], out_row: usize) {
        f32::table().rows(x, w, out, out_row);
    }
    fn rows_listed(x: Matrix<'_, f32>, w: &Listed<'_, f32>, rows: Range<usize>, out: &mut [f32], out_row: usize) {
        f32::table().rows_listed(x, w, rows, out, out_row);
    }
    fn seal(block: &[f32], rows: usize, width: usize, units: &mut [f32]) {
        for (unit, value) in units.iter_mut().zip(&block[..rows * width]) {
            *unit = f16::from_f32(*value).to_f32();
        }
    }
    fn seal_over(_: &[f32], _: usize, _: usize, _: &mut [f32]) {}
    fn stack(rows: Matrix<'_, f16>, units: &mut [f32]) {
        Self::copy(rows, units);
    }
    fn turn(block: &[f32], count: usize, width: usize, lines: &mut [&mut [f32]]) {
        f32::table().unpack(block, count, width, lines);
    }
    fn stack_blocks(rows: Matrix<'_, f16>, width: usize, step: usize, units: &mut [f32]) {
        by_block::<f16>(rows.cols(), width, step, units, |c| rows.at(0, c).to_f32());
    }
    fn online(
        scores: &mut [f32],
        rows: usize,
        width: usize,
        factor: f32,
        state: &mut Online<f32>,
        _: &mut [f32],
    ) -> bool {
        f32::table().softmax(scores, rows, width, factor, state)
    }
    fn weights<'w>(scores: &'w [f32], _: &'w [f32], count: usize) -> &'w [f32] {
        &scores[..count]
    }
    fn mixed_listed(_: Matrix<'_, f32>, _: Piece<'_, '_, f16>, _: &mut [f32], _: usize) -> bool {
        false
    }
    fn mixed(_: Matrix<'_, f32>, _: Matrix<'_, f16>, _: &mut [f32], _: usize) -> bool {
        false
    }

    fn slopes(block: &mut Slopes<'_, f32>, _: &mut Sealed<f32>) {
        f32::table().slopes(block);
    }
    fn seal_slopes(_: &[f32], _: &[f32], _: usize, _: usize, _: &mut Sealed<f32>) {}
    fn views<'v>(
        weights: &'v [f32],
        slopes: &'v [f32],
        rows: usize,
        width: usize,
        _: &'v Sealed<f32>,
    ) -> Views<'v, f32> {
        Views::of(weights, slopes, rows, width)
    }
}

impl Arithmetic for bf16 {
    type Unit = u32;
    const PER_UNIT: usize = 2;

    fn copy(line: Matrix<'_, bf16>, units: &mut [u32]) {
        if let Some(row) = line.pairs().and_then(|pairs| pairs.row(0)) {
            units[..row.len()].copy_from_slice(row);
            units[row.len()..].fill(0);
            return;
        }
        let pair = |low: bf16, high: bf16| u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16);
        let whole = line.cols() / 2;
        if let Some(row) = line.row(0) {
            for (unit, both) in units.iter_mut().zip(row.as_chunks::<2>().0) {
                *unit = pair(both[0], both[1]);
            }
        } else {
            for (k, unit) in units.iter_mut().enumerate().take(whole) {
                *unit = pair(line.at(0, 2 * k), line.at(0, 2 * k + 1));
            }
        }
        if line.cols() % 2 == 1 {
            units[whole] = pair(line.at(0, line.cols() - 1), bf16::ZERO);
        }
        units[line.cols().div_ceil(2)..].fill(0);
    }
    fn copy_i8(line: Matrix<'_, i8>, units: &mut [u32]) {
        let depth = line.cols();
        let bits = |k: usize| if k < depth { f32::from(line.at(0, k)).to_bits() >> 16 } else { 0 };
        match line.row(0) {
            Some(row) => half_table().pairs_i8(row, &mut units[..depth.div_ceil(2)]),
            None => (0..depth.div_ceil(2)).for_each(|k| units[k] = bits(2 * k) | (bits(2 * k + 1) << 16)),
        }
        units[depth.div_ceil(2)..].fill(0);
    }
    fn borrow(matrix: Matrix<'_, bf16>) -> Option<Matrix<'_, u32>> {
        matrix.pairs()
    }
    fn borrow_listed(rows: Listed<'_, bf16>) -> Option<Listed<'_, u32>> {
        rows.pairs()
    }
    fn pack(lines: &[&[u32]], depth: usize, width: usize, panel: &mut [u32]) {
        half_table().pack(lines, depth, width, panel);
    }
    fn tile(a: Matrix<'_, u32>, b: Matrix<'_, u32>, c: &mut [f32], c_row: usize, accumulate: bool) {
        half_table().tile(a, b, c, c_row, accumulate);
    }
    fn tile_ahead(
        a: Matrix<'_, u32>,
        b: Matrix<'_, u32>,
        c: &mut [f32],
        c_row: usize,
        accumulate: bool,
        ahead: &mut Ahead,
    ) {
        half_table().tile_ahead(a, b, c, c_row, accumulate, ahead);
    }
    fn rows(x: Matrix<'_, u32>, w: Matrix<'_, u32>, out: &mut [f32], out_row: usize) {
        half_table().rows(x, w, out, out_row);
    }
    fn rows_listed(x: Matrix<'_, u32>, w: &Listed<'_, u32>, rows: Range<usize>, out: &mut [f32], out_row: usize) {
        half_table().rows_listed(x, w, rows, out, out_row);
    }
    fn seal(block: &[f32], rows: usize, width: usize, units: &mut [u32]) {
        half_table().interleave(block, rows, width, units);
    }
    fn seal_over(block: &[f32], rows: usize, width: usize, units: &mut [u32]) {
        Self::seal(block, rows, width, units);
    }
    fn stack(rows: Matrix<'_, bf16>, units: &mut [u32]) {
        if rows.rows() == 2
            && let (Some(low), Some(high)) = (rows.row(0), rows.row(1))
        {
            for ((unit, low), high) in units.iter_mut().zip(low).zip(high) {
                *unit = u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16);
            }
            return;
        }
        for (c, unit) in units.iter_mut().enumerate().take(rows.cols()) {
            let high = if rows.rows() == 2 { rows.at(1, c) } else { bf16::ZERO };
            *unit = u32::from(rows.at(0, c).to_bits()) | (u32::from(high.to_bits()) << 16);
        }
    }
    fn turn(block: &[u32], count: usize, width: usize, lines: &mut [&mut [u32]]) {
        half_table().turn(block, count, width, lines);
    }
    fn stack_blocks(rows: Matrix<'_, bf16>, width: usize, step: usize, units: &mut [u32]) {
        let high = if rows.rows() == 2 { rows.row(1) } else { None };
        if let Some(low) = rows.row(0)
            && (rows.rows() == 1 || high.is_some())
        {
            return half_table().stack(low, high, width, step, units);
        }
        by_block::<bf16>(rows.cols(), width, step, units, |c| {
            let high = if rows.rows() == 2 { rows.at(1, c) } else { bf16::ZERO };
            u32::from(rows.at(0, c).to_bits()) | (u32::from(high.to_bits()) << 16)
        });
    }
    fn online(
        scores: &mut [f32],
        rows: usize,
        width: usize,
        factor: f32,
        state: &mut Online<f32>,
        units: &mut [u32],
    ) -> bool {
        half_table().softmax(scores, rows, width, factor, state, units)
    }
    fn weights<'w>(_: &'w [f32], units: &'w [u32], count: usize) -> &'w [u32] {
        &units[..count]
    }
    fn mixed_listed(a: Matrix<'_, f32>, b: Piece<'_, '_, bf16>, c: &mut [f32], c_row: usize) -> bool {
        half_table().widen_listed(a, b, c, c_row);
        true
    }
    fn mixed(a: Matrix<'_, f32>, b: Matrix<'_, bf16>, c: &mut [f32], c_row: usize) -> bool {
        if b.col_stride() == 1 {
            half_table().widen(a, b, c, c_row);
        }
        b.col_stride() == 1
    }
    fn slopes(block: &mut Slopes<'_, f32>, sealed: &mut Sealed<u32>) {
        let Sealed { weights, slopes, turned } = sealed;
        half_table().slopes(block, weights, slopes, turned);
    }
    fn seal_slopes(weights: &[f32], slopes: &[f32], rows: usize, width: usize, sealed: &mut Sealed<u32>) {
        half_table().round_pairs(&weights[..rows * width], &mut sealed.weights);
        half_table().round_pairs(&slopes[..rows * width], &mut sealed.slopes);
        half_table().interleave(slopes, rows, width, &mut sealed.turned);
    }
    fn views<'v>(_: &'v [f32], _: &'v [f32], rows: usize, width: usize, sealed: &'v Sealed<u32>) -> Views<'v, u32> {
        let half = width / 2;
        Views {
            weights: Matrix::new(&sealed.weights, rows, half, half),
            slopes: Matrix::new(&sealed.slopes, rows, half, half),
            turned: Matrix::new(&sealed.turned, rows.div_ceil(2), width, width).transposed(),
        }
    }
}

/// [`Arithmetic::stack_blocks`] unit by unit.
fn by_block<S: Arithmetic>(
    columns: usize,
    width: usize,
    step: usize,
    units: &mut [S::Unit],
    unit: impl Fn(usize) -> S::Unit,
) {
    for (block, first) in (0..columns).step_by(width).enumerate() {
        let count = width.min(columns - first);
        let padded = count.next_multiple_of(S::lanes());
        let target = &mut units[block * step..block * step + padded];
        for (c, slot) in target.iter_mut().enumerate() {
            *slot = if c < count { unit(first + c) } else { S::Unit::default() };
        }
    }
}

fn copy_line<S: Float, U: Real>(line: Matrix<'_, S>, units: &mut [U], convert: impl Fn(S) -> U) {
    if let Some(row) = line.row(0) {
        for (unit, value) in units.iter_mut().zip(row) {
            *unit = convert(*value);
        }
    } else {
        for (k, unit) in units.iter_mut().enumerate().take(line.cols()) {
            *unit = convert(line.at(0, k));
        }
    }
    units[line.cols()..].fill(U::ZERO);
}
