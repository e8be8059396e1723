//! Inner products along the reduction: few rows against many. Bound by the memory that holds the many.
//!
//! ```text
//! for each group of 4 rows w of W, each group of 4 rows x of X:
//!     out[x, w] = sum over k of X[x, k] * W[w, k]     (16 accumulators, lanes along k)
//! ```
//! W is read once per call as long as 4 of its rows fit the first-level cache. Both operands have `depth` units per
//! row; a ragged end is copied to a zeroed buffer, since nothing may be read past a row's end.

use crate::arch::vector::{Dot, Vector};
use crate::dtype::Real;

/// How far ahead of the products W is asked for.
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
        let mut acc = [[D::V::splat(Real::of(0.0)); WN]; XN];
        let x = args.x.offset(x0 as isize * args.x_row);
        let w = args.w.offset(w0 as isize * args.w_row);
        let whole = args.depth / lanes * lanes;
        // Far enough to hide the memory's latency, near enough to still be in the first-level cache when its turn comes.
        let ahead = WN * (AHEAD_BYTES / (WN * args.depth.max(1) * size_of::<U>())).max(1);
        let mut k = 0;
        while k < whole {
            for j in 0..WN {
                // The next group of W: what bounds this loop is the memory W comes from.
                D::V::prefetch(w.wrapping_offset((ahead + j) as isize * args.w_row).wrapping_add(k));
            }
            let mut wk = [D::load_b(w.add(k)); WN];
            for j in 1..WN {
                wk[j] = D::load_b(w.offset(j as isize * args.w_row).add(k));
            }
            for i in 0..XN {
                let xk = D::load_b(x.offset(i as isize * args.x_row).add(k));
                for j in 0..WN {
                    acc[i][j] = D::fma(xk, wk[j], acc[i][j]);
                }
            }
            k += lanes;
        }
        let rest = args.depth - whole;
        if rest > 0 {
            let tail = |row: *const U| {
                let mut units = [U::default(); 16];
                std::ptr::copy_nonoverlapping(row.add(whole), units.as_mut_ptr(), rest);
                D::load_b(units.as_ptr())
            };
            for i in 0..XN {
                let xk = tail(x.offset(i as isize * args.x_row));
                for j in 0..WN {
                    acc[i][j] = D::fma(xk, tail(w.offset(j as isize * args.w_row)), acc[i][j]);
                }
            }
        }
        // Sixteen horizontal sums at once cost a transposition; one by one they would cost as much as the products.
        let mut registers = [D::V::splat(Real::of(0.0)); 16];
        for i in 0..XN {
            for j in 0..WN {
                registers[i * WN + j] = acc[i][j];
            }
        }
        let sums = if XN * WN > 2 { D::V::sum_each(&mut registers) } else { registers.map(|register| register.sum()) };
        for i in 0..XN {
            for j in 0..WN {
                args.out.add((x0 + i) * args.out_row + w0 + j).write(sums[i * WN + j]);
            }
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
        let mut w = 0;
        while w < args.w_rows {
            let four = args.w_rows - w >= 4;
            let mut x = 0;
            while x < args.x_rows {
                match (args.x_rows - x, four) {
                    (4.., true) => block::<D, U, 4, 4>(args, x, w),
                    (3, true) => block::<D, U, 3, 4>(args, x, w),
                    (2, true) => block::<D, U, 2, 4>(args, x, w),
                    (_, true) => block::<D, U, 1, 4>(args, x, w),
                    (4.., false) => block::<D, U, 4, 1>(args, x, w),
                    (3, false) => block::<D, U, 3, 1>(args, x, w),
                    (2, false) => block::<D, U, 2, 1>(args, x, w),
                    (_, false) => block::<D, U, 1, 1>(args, x, w),
                }
                x += 4;
            }
            w += if four { 4 } else { 1 };
        }
    }
}
