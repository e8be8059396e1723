//! Inner products along the reduction: few rows against many. Bound by the memory that holds the many.
//!
//! ```text
//! for each 16 rows of W, each group of up to 4 rows x of X:
//!     for each row w: out[x, w] = sum over k of X[x, k] * W[w, k]        (lanes along k)
//! ```
//! Departures: (1) one row of W at a time, so that memory sees one stream in order (four streams side by side reached
//! 60 % of the bandwidth that one reaches); (2) sixteen horizontal sums are done together. W is read from memory once as
//! long as 16 of its rows fit the second-level cache. Both operands have `depth` units per
//! row; a ragged end is copied to a zeroed buffer, since nothing may be read past a row's end.

use crate::arch::vector::{Dot, Vector};
use crate::dtype::Real;

/// How far ahead of the products W is asked for, along its own memory: rows usually follow each other.
const AHEAD_BYTES: usize = 8192;

/// What one call multiplies; strides count units.
pub(crate) struct Args<U, C> {
    pub x: *const U,
    pub x_row: isize,
    pub x_rows: usize,
    pub w: *const U,
    pub w_row: isize,
    pub w_rows: usize,
    pub depth: usize,
    /// `out[x * out_row + w]`
    pub out: *mut C,
    pub out_row: usize,
}

#[inline(always)]
unsafe fn block<D, U: Copy + Default, const XN: usize, const WN: usize>(
    args: &Args<U, <D::V as Vector>::Elem>,
    x0: usize,
    w0: usize,
) where
    D: Dot<A = U, B = U, BReg = <D as Dot>::AReg>,
{
    let lanes = D::V::LANES;
    // SAFETY: rows x0.. and w0.. with XN and WN of them exist (callers), each with `depth` units.
    unsafe {
        let zero = D::V::splat(Real::of(0.0));
        let mut registers = [zero; 16];
        let x = args.x.offset(x0 as isize * args.x_row);
        let whole = args.depth / lanes * lanes;
        for j in 0..WN {
            let w = args.w.offset((w0 + j) as isize * args.w_row);
            // Two sums per product, so that neighbouring steps do not wait for each other.
            let mut acc = [[zero; 2]; XN];
            let mut k = 0;
            while k + 2 * lanes <= whole {
                for half in 0..2 {
                    let at = k + half * lanes;
                    D::V::prefetch(w.wrapping_byte_add(AHEAD_BYTES).wrapping_add(at));
                    let wk = D::load_b(w.add(at));
                    for i in 0..XN {
                        let xk = D::load_b(x.offset(i as isize * args.x_row).add(at));
                        acc[i][half] = D::fma(xk, wk, acc[i][half]);
                    }
                }
                k += 2 * lanes;
            }
            if k < whole {
                let wk = D::load_b(w.add(k));
                for i in 0..XN {
                    acc[i][0] = D::fma(D::load_b(x.offset(i as isize * args.x_row).add(k)), wk, acc[i][0]);
                }
            }
            let rest = args.depth - whole;
            if rest > 0 {
                let tail = |row: *const U| {
                    let mut units = [U::default(); 16];
                    std::ptr::copy_nonoverlapping(row.add(whole), units.as_mut_ptr(), rest);
                    D::load_b(units.as_ptr())
                };
                let wk = tail(w);
                for i in 0..XN {
                    acc[i][0] = D::fma(tail(x.offset(i as isize * args.x_row)), wk, acc[i][0]);
                }
            }
            for i in 0..XN {
                registers[i * WN + j] = acc[i][0].add(acc[i][1]);
            }
        }
        // Sixteen horizontal sums at once cost a transposition; one by one they would cost as much as the products.
        let sums = if XN * WN > 2 { D::V::sum_each(&mut registers) } else { registers.map(|register| register.sum()) };
        for i in 0..XN {
            for j in 0..WN {
                args.out.add((x0 + i) * args.out_row + w0 + j).write(sums[i * WN + j]);
            }
        }
    }
}

/// All rows `first..end` of W against XN rows of X: blocks of WN, so that XN * WN sums are 16, then what is left.
#[inline(always)]
unsafe fn span<D, U: Copy + Default, const XN: usize, const WN: usize>(
    args: &Args<U, <D::V as Vector>::Elem>,
    x: usize,
    first: usize,
    end: usize,
) where
    D: Dot<A = U, B = U, BReg = <D as Dot>::AReg>,
{
    let mut w = first;
    // SAFETY: each block stays inside first..end.
    unsafe {
        while end - w >= WN {
            block::<D, U, XN, WN>(args, x, w);
            w += WN;
        }
        if WN > 4 && end - w >= 4 {
            block::<D, U, XN, 4>(args, x, w);
            w += 4;
        }
        while w < end {
            block::<D, U, XN, 1>(args, x, w);
            w += 1;
        }
    }
}

/// The products.
///
/// # Safety
/// As in [`Args`]; the machine must have the instructions of `D`.
#[inline(always)]
pub(crate) unsafe fn rows<D, U: Copy + Default>(args: &Args<U, <D::V as Vector>::Elem>)
where
    D: Dot<A = U, B = U, BReg = <D as Dot>::AReg>,
{
    // SAFETY: the loops stay inside x_rows and w_rows.
    unsafe {
        for first in (0..args.w_rows).step_by(16) {
            let end = args.w_rows.min(first + 16);
            for x in (0..args.x_rows).step_by(4) {
                match args.x_rows - x {
                    1 => span::<D, U, 1, 16>(args, x, first, end),
                    2 => span::<D, U, 2, 8>(args, x, first, end),
                    3 => span::<D, U, 3, 4>(args, x, first, end),
                    _ => span::<D, U, 4, 4>(args, x, first, end),
                }
            }
        }
    }
}
