//! Inner products along the reduction: few rows against many. Bound by the memory that holds the many.
//!
//! ```text
//! for each 16 rows of W, each group of up to 4 rows x of X:
//!     for each row w: out[x, w] = sum over k of X[x, k] * W[w, k]        (lanes along k)
//! ```
//! Departures: (1) one row of W at a time, so that memory sees one stream in order (four streams side by side reached
//! 60 % of the bandwidth that one reaches), or two where W is bytes: one load of X then serves both; (2) sixteen
//! horizontal sums are done together; (3) W is asked for in advance, by rows (theirs may lie far apart, and the next ones elsewhere), and passes the larger caches by where there is one
//! pass over it. W is read from memory once as long as 16 of its rows fit the second-level cache. Both operands have
//! `depth` units per row; a ragged end is copied to a zeroed buffer, since nothing may be read past a row's end. The units
//! of W may be narrower than those of X (bytes, widened on load): then memory gives more of them.

use crate::arch::vector::{Along, Vector};
use crate::dtype::Real;

/// How far ahead of the products W is asked for, in bytes of its rows.
pub(crate) const AHEAD_BYTES: usize = 8192;

/// What one call multiplies; strides count units.
pub(crate) struct Args<X, W, C> {
    pub x: *const X,
    pub x_row: isize,
    pub x_rows: usize,
    pub w: *const W,
    pub w_row: isize,
    pub w_rows: usize,
    pub depth: usize,
    /// `out[x * out_row + w]`
    pub out: *mut C,
    pub out_row: usize,
    /// Bytes from a unit of W to the one that is asked for meanwhile.
    pub toward: isize,
    /// Null, or where each row of W is: `listed` of them, of which the first `w_rows` count and the others are asked for.
    pub list: *const *const W,
    pub listed: usize,
}

/// Listed rows that are asked for in advance.
const AHEAD_ROWS: usize = 16;

type ArgsOf<D> = Args<<D as Along>::X, <D as Along>::W, <<D as Along>::V as Vector>::Elem>;

#[inline(always)]
unsafe fn block<D: Along, const XN: usize, const WN: usize>(args: &ArgsOf<D>, x0: usize, w0: usize) {
    let lanes = D::V::LANES;
    // A line of the cache a turn (two registers if they hold more), so that each is asked for once.
    let (line, register) = (64, lanes * size_of::<D::W>());
    let steps = (line / register).max(2);
    // Rows of W side by side: where memory gives many units for the loads of X that each takes, those are shared.
    let side = if lanes == 16 && (steps > 2 || XN > 2) && XN > 1 && WN.is_multiple_of(2) { 2 } else { 1 };
    // Sums per product, so that neighbouring steps do not wait for each other: a narrow unit takes more steps, and a
    // single row of X has too few sums for all of them. (More for more rows would not fit the registers.)
    let chains = if XN * side <= 2 { steps.min(4) } else { 2 };
    // SAFETY: rows x0.. and w0.. with XN and WN of them exist (callers), each with `depth` units.
    unsafe {
        let zero = D::V::splat(Real::of(0.0));
        let mut registers = [zero; 16];
        let x = args.x.offset(x0 as isize * args.x_row);
        let whole = args.depth / lanes * lanes;
        // More rows of X are more passes over 16 rows of W, which the second-level cache then keeps, as it does what is asked
        // for long before it is read: rows that lie apart are read a few at a time, with those beside them in between.
        let once = args.x_rows <= 4 && args.list.is_null() && args.w_row == args.depth as isize;
        let mut j = 0;
        while j < WN {
            let row = |s: usize| {
                let number = w0 + j + s;
                if args.list.is_null() { args.w.offset(number as isize * args.w_row) } else { *args.list.add(number) }
            };
            let coming = |s: usize| {
                if args.list.is_null() {
                    return row(s).wrapping_byte_offset(args.toward);
                }
                *args.list.add((w0 + j + s + AHEAD_ROWS).min(args.listed - 1))
            };
            let (own, later) = ([row(0), row(side - 1)], [coming(0), coming(side - 1)]);
            let mut acc = [[[zero; 4]; XN]; 2];
            let mut k = 0;
            while k + steps * lanes <= whole {
                for step in 0..steps {
                    let at = k + step * lanes;
                    let mut wk = [D::load_w(own[0].add(at)); 2];
                    for s in 0..side {
                        if step * register % line == 0 {
                            let ahead = later[s].wrapping_add(at);
                            if once { D::V::prefetch_once(ahead) } else { D::V::prefetch(ahead) }
                        }
                        wk[s] = D::load_w(own[s].add(at));
                    }
                    for i in 0..XN {
                        let xk = D::load_x(x.offset(i as isize * args.x_row).add(at));
                        for s in 0..side {
                            acc[s][i][step % chains] = D::fma(xk, wk[s], acc[s][i][step % chains]);
                        }
                    }
                }
                k += steps * lanes;
            }
            for s in 0..side {
                let w = own[s];
                let mut k = k;
                while k < whole {
                    let wk = D::load_w(w.add(k));
                    for i in 0..XN {
                        let xk = D::load_x(x.offset(i as isize * args.x_row).add(k));
                        acc[s][i][0] = D::fma(xk, wk, acc[s][i][0]);
                    }
                    k += lanes;
                }
                let rest = args.depth - whole;
                if rest > 0 {
                    let wk = D::load_w(ragged(w.add(whole), rest).as_ptr());
                    for i in 0..XN {
                        let xk = ragged(x.offset(i as isize * args.x_row).add(whole), rest);
                        acc[s][i][0] = D::fma(D::load_x(xk.as_ptr()), wk, acc[s][i][0]);
                    }
                }
                for i in 0..XN {
                    let mut sum = acc[s][i][0].add(acc[s][i][1]);
                    if chains == 4 {
                        sum = sum.add(acc[s][i][2].add(acc[s][i][3]));
                    }
                    registers[i * WN + j + s] = sum;
                }
            }
            j += side;
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

/// The last units of a row, with zeros after them.
#[inline(always)]
unsafe fn ragged<U: Copy + Default>(from: *const U, count: usize) -> [U; 16] {
    let mut units = [U::default(); 16];
    // SAFETY: the caller grants `count` units, fewer than a register's lanes.
    unsafe { std::ptr::copy_nonoverlapping(from, units.as_mut_ptr(), count) };
    units
}

/// All rows `first..end` of W against XN rows of X: blocks of WN, so that XN * WN sums are 16, then what is left.
#[inline(always)]
unsafe fn span<D: Along, const XN: usize, const WN: usize>(args: &ArgsOf<D>, x: usize, first: usize, end: usize) {
    let mut w = first;
    // SAFETY: each block stays inside first..end.
    unsafe {
        while end - w >= WN {
            block::<D, XN, WN>(args, x, w);
            w += WN;
        }
        if WN > 4 && end - w >= 4 {
            block::<D, XN, 4>(args, x, w);
            w += 4;
        }
        while w < end {
            block::<D, XN, 1>(args, x, w);
            w += 1;
        }
    }
}

/// The products.
///
/// # Safety
/// As in [`Args`]; the machine must have the instructions of `D`.
#[inline(always)]
pub(crate) unsafe fn rows<D: Along>(args: &ArgsOf<D>) {
    // SAFETY: the loops stay inside x_rows and w_rows.
    unsafe {
        for first in (0..args.w_rows).step_by(16) {
            let end = args.w_rows.min(first + 16);
            for x in (0..args.x_rows).step_by(4) {
                match args.x_rows - x {
                    1 => span::<D, 1, 16>(args, x, first, end),
                    2 => span::<D, 2, 8>(args, x, first, end),
                    3 => span::<D, 3, 4>(args, x, first, end),
                    _ => span::<D, 4, 4>(args, x, first, end),
                }
            }
        }
    }
}
