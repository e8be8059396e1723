//! The register-tiled matrix product that every room is built on.
//!
//! ```text
//! for each strip of MR rows of A:
//!     acc[MR][NV] = 0                      (or C)
//!     for k in 0..depth:
//!         b = NV registers of row k of B   (width units, adjacent)
//!         for r in 0..MR: acc[r] += A[r, k] * b
//!     C = acc
//! ```
//!
//! Departures from the textbook loop:
//! 1. A is read by broadcast with free strides, so it need not be packed: rows of keys (unit along the row), rows
//!    of values (unit across), packed weights all go through the same loop.
//! 2. The lanes run over *queries or tokens*. A softmax then needs no cross-lane step, and the output of one product
//!    is already the panel that the next one reads.
//! 3. While it multiplies it can ask for memory that is needed later ([`Ahead`]), a line of the cache a step: the
//!    multiplier leaves the load ports idle a third of the time, and a copy that finds its source in the cache is no
//!    longer bound by the memory.
//! 4. MR depends on the number of registers a row takes, so that a narrow tail still has enough independent
//!    accumulators to hide the latency of the multiplier.

use crate::arch::vector::{Dot, Vector};

/// Memory to ask for while a product runs: rows, one line of the cache a step.
#[derive(Debug, Default)]
pub struct Ahead {
    starts: Vec<usize>,
    lines: usize,
    next: usize,
    at: usize,
    left: usize,
}

impl Ahead {
    const LINE: usize = 64;

    /// Forgets what was left, and asks for these rows, all of one length, from now on.
    pub fn set<'a, T: 'a>(&mut self, rows: impl Iterator<Item = &'a [T]>) {
        self.starts.clear();
        (self.next, self.left, self.lines) = (0, 0, 0);
        for row in rows {
            self.lines = std::mem::size_of_val(row).div_ceil(Self::LINE);
            self.starts.push(row.as_ptr() as usize);
        }
    }

    /// Whether everything was asked for.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.next == self.starts.len()
    }
}

/// What one call multiplies. Strides and extents count units (see [`Dot`]) for A and B, lanes for C.
pub(crate) struct Args<A, B, C> {
    pub a: *const A,
    pub a_row: isize,
    pub a_step: isize,
    pub b: *const B,
    pub b_step: isize,
    pub depth: usize,
    pub c: *mut C,
    pub c_row: usize,
    pub rows: usize,
    /// A multiple of the lanes, at most three registers.
    pub width: usize,
    pub accumulate: bool,
    /// Null, or what to ask for meanwhile.
    pub ahead: *mut Ahead,
    /// Bytes from a unit of B to the one that a B from memory asks for meanwhile.
    pub toward: isize,
    /// Null, or where each row of a B from memory is: `listed` of them, of which the first `depth` count and the others are
    /// asked for. `b_first` is the first unit of each that is read.
    pub list: *const *const B,
    pub listed: usize,
    pub b_first: usize,
}

/// Rows of B that are asked for in advance.
pub(crate) const AHEAD: usize = 24;

#[inline(always)]
unsafe fn strip<
    D: Dot,
    const MR: usize,
    const NV: usize,
    const MEMORY: bool,
    const ADJACENT: bool,
    const WALK: bool,
>(
    args: &Args<D::A, D::B, <D::V as Vector>::Elem>,
    first: usize,
) {
    let lanes = D::V::LANES;
    // SAFETY: the caller grants `rows x depth` units of A, `depth x width` of B and `rows x width` lanes of C;
    // this strip covers rows first..first+MR of them and NV * lanes == width.
    unsafe {
        let c = args.c.add(first * args.c_row);
        let mut acc = [[D::V::splat(crate::dtype::Real::of(0.0)); NV]; MR];
        if args.accumulate {
            for r in 0..MR {
                for v in 0..NV {
                    acc[r][v] = D::V::load(c.add(r * args.c_row + v * lanes));
                }
            }
        }
        let mut a = args.a.offset(first as isize * args.a_row);
        let mut b = args.b;
        let mut walk = if WALK { std::mem::take(&mut *args.ahead) } else { Ahead::default() };
        for k in 0..args.depth {
            if MEMORY && !args.list.is_null() {
                b = (*args.list.add(k)).add(args.b_first);
            }
            if WALK {
                if walk.left > 0 {
                    D::V::prefetch(walk.at as *const u8);
                    walk.at += Ahead::LINE;
                    walk.left -= 1;
                } else if let Some(&start) = walk.starts.get(walk.next) {
                    (walk.at, walk.left) = (start, walk.lines);
                    walk.next += 1;
                }
            }
            if MEMORY {
                let coming = if args.list.is_null() {
                    b.wrapping_byte_offset(args.toward)
                } else {
                    (*args.list.add((k + AHEAD).min(args.listed - 1))).wrapping_add(args.b_first)
                };
                for v in 0..NV {
                    D::V::prefetch(coming.wrapping_add(v * lanes));
                }
            }
            let mut lane_units = [D::load_b(b); NV];
            for v in 1..NV {
                lane_units[v] = D::load_b(b.add(v * lanes));
            }
            for r in 0..MR {
                let unit = D::splat_a(a.offset(r as isize * if ADJACENT { 1 } else { args.a_row }));
                for v in 0..NV {
                    acc[r][v] = D::fma(unit, lane_units[v], acc[r][v]);
                }
            }
            a = a.offset(args.a_step);
            b = b.wrapping_offset(args.b_step);
        }
        if WALK {
            *args.ahead = walk;
        }
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v].store(c.add(r * args.c_row + v * lanes));
            }
        }
    }
}

/// All rows, in strips of at most `MAX`.
#[inline(always)]
unsafe fn strips<
    D: Dot,
    const NV: usize,
    const MAX: usize,
    const MEMORY: bool,
    const ADJACENT: bool,
    const WALK: bool,
>(
    args: &Args<D::A, D::B, <D::V as Vector>::Elem>,
) {
    let mut row = 0;
    // SAFETY: each strip stays inside `rows`.
    unsafe {
        while args.rows - row >= MAX {
            strip::<D, MAX, NV, MEMORY, ADJACENT, WALK>(args, row);
            row += MAX;
        }
        if MAX > 8 && args.rows - row >= 8 {
            strip::<D, 8, NV, MEMORY, ADJACENT, WALK>(args, row);
            row += 8;
        }
        if MAX > 4 && args.rows - row >= 4 {
            strip::<D, 4, NV, MEMORY, ADJACENT, WALK>(args, row);
            row += 4;
        }
        if args.rows - row >= 2 {
            strip::<D, 2, NV, MEMORY, ADJACENT, WALK>(args, row);
            row += 2;
        }
        if args.rows - row >= 1 {
            strip::<D, 1, NV, MEMORY, ADJACENT, WALK>(args, row);
        }
    }
}

/// The product. `M1`, `M2`, `M3` are the strip heights for rows of one, two and three registers (`M3` = 0: rows of
/// at most two). `MEMORY`: B comes from memory, and what lies `toward` is asked for.
/// `WALK`: `args.ahead` is valid and is walked.
///
/// # Safety
/// As in [`Args`]; the machine must have the instructions of `D`.
#[inline(always)]
pub(crate) unsafe fn tile<
    D: Dot,
    const M1: usize,
    const M2: usize,
    const M3: usize,
    const MEMORY: bool,
    const WALK: bool,
>(
    args: &Args<D::A, D::B, <D::V as Vector>::Elem>,
) {
    // SAFETY: forwarded.
    unsafe {
        match (args.width / D::V::LANES, args.a_row == 1) {
            (1, true) => strips::<D, 1, M1, MEMORY, true, WALK>(args),
            (2, true) => strips::<D, 2, M2, MEMORY, true, WALK>(args),
            (3, true) if M3 > 0 => strips::<D, 3, M3, MEMORY, true, WALK>(args),
            (1, false) => strips::<D, 1, M1, MEMORY, false, WALK>(args),
            (2, false) => strips::<D, 2, M2, MEMORY, false, WALK>(args),
            (3, false) if M3 > 0 => strips::<D, 3, M3, MEMORY, false, WALK>(args),
            (registers, _) => unreachable!("a panel of {registers} registers"),
        }
    }
}
