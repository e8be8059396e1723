//! Lane-wise functions: scaling, sums, conversions.

use super::softmax::{LARGE, exponent};
use crate::arch::vector::{Half, Vector};
use crate::dtype::Real;

/// Rows 2i and 2i + 1 of a lane-major block become row i of bfloat16 pairs; an odd last row is paired with zeros.
///
/// # Safety
/// `block` holds `rows * width` lanes, `pairs` `ceil(rows / 2) * width` units; `width` is a multiple of the lanes.
#[inline(always)]
pub(crate) unsafe fn interleave<V: Half>(block: *const f32, rows: usize, width: usize, pairs: *mut u32) {
    for pair in 0..rows.div_ceil(2) {
        let mut lane = 0;
        while lane < width {
            // SAFETY: both rows are inside the block.
            unsafe {
                let low = V::load(block.add(2 * pair * width + lane));
                let mut high = V::splat(0.0);
                if 2 * pair + 1 < rows {
                    high = V::load(block.add((2 * pair + 1) * width + lane));
                }
                V::store_pairs(low, high, pairs.add(pair * width + lane));
            }
            lane += V::LANES;
        }
    }
}

/// Rounds `count` elements to bfloat16.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn round<V: Half>(from: *const f32, to: *mut u16, count: usize) {
    // SAFETY: inside both rows; the ragged end goes through a buffer of one register.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i + 2 * V::LANES <= whole {
            V::store_bf16_two(V::load(from.add(i)), V::load(from.add(i + V::LANES)), to.add(i));
            i += 2 * V::LANES;
        }
        while i < whole {
            V::load(from.add(i)).store_bf16(to.add(i));
            i += V::LANES;
        }
        if whole < count {
            let (mut lanes, mut rounded) = ([0f32; 16], [0u16; 16]);
            std::ptr::copy_nonoverlapping(from.add(whole), lanes.as_mut_ptr(), count - whole);
            V::load(lanes.as_ptr()).store_bf16(rounded.as_mut_ptr());
            std::ptr::copy_nonoverlapping(rounded.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// Rounds the rows of a block, `step` apart, to bfloat16: `rows[r][c] = block[r * step + c]` for `c < count`.
///
/// # Safety
/// The block holds every row, and each of `rows` `count` writable elements.
#[inline(always)]
pub(crate) unsafe fn round_rows<V: Half>(block: *const f32, step: usize, count: usize, rows: &[*mut u16]) {
    for (r, &row) in rows.iter().enumerate() {
        // SAFETY: see above.
        unsafe { round::<V>(block.add(r * step), row, count) }
    }
}

/// Widens `count` bfloat16 elements.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn widen<V: Half>(from: *const u16, to: *mut f32, count: usize) {
    // SAFETY: inside both rows; the ragged end goes through buffers of one register.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            V::load_bf16(from.add(i)).store(to.add(i));
            i += V::LANES;
        }
        if whole < count {
            let (mut lanes, mut wide) = ([0u16; 16], [0f32; 16]);
            std::ptr::copy_nonoverlapping(from.add(whole), lanes.as_mut_ptr(), count - whole);
            V::load_bf16(lanes.as_ptr()).store(wide.as_mut_ptr());
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// Widens `count` bytes.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn widen_i8<V: Vector>(from: *const i8, to: *mut V::Elem, count: usize) {
    // SAFETY: inside both rows.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            V::load_i8(from.add(i)).store(to.add(i));
            i += V::LANES;
        }
        while i < count {
            to.add(i).write(V::Elem::of(f64::from(*from.add(i))));
            i += 1;
        }
    }
}

/// `count` bytes as bfloat16 pairs (eight bits of significand hold them exactly); an odd last one is paired with zero.
///
/// # Safety
/// `from` holds `count` elements, `to` half as many, rounded up.
#[inline(always)]
pub(crate) unsafe fn pairs_i8<V: Half>(from: *const i8, to: *mut u32, count: usize) {
    // SAFETY: inside both rows.
    unsafe {
        let mut i = 0;
        // Elements in order are pairs in order where the low half comes first.
        while cfg!(target_endian = "little") && i + 2 * V::LANES <= count {
            let (first, second) = (V::load_i8(from.add(i)), V::load_i8(from.add(i + V::LANES)));
            V::store_bf16_two(first, second, to.cast::<u16>().add(i));
            i += 2 * V::LANES;
        }
        while i < count {
            let bits = |at: usize| if at < count { f32::from(*from.add(at)).to_bits() >> 16 } else { 0 };
            to.add(i / 2).write(bits(i) | (bits(i + 1) << 16));
            i += 2;
        }
    }
}

/// `row[lane] *= factor[lane]` for every row of a lane-major block.
///
/// # Safety
/// `block` holds `rows * width` lanes and `factor` `width`; `width` is a multiple of the lanes.
#[inline(always)]
pub(crate) unsafe fn scale_rows<V: Vector>(block: *mut V::Elem, rows: usize, width: usize, factor: *const V::Elem) {
    for row in 0..rows {
        let mut lane = 0;
        while lane < width {
            // SAFETY: inside the block.
            unsafe {
                let at = block.add(row * width + lane);
                V::load(at).mul(V::load(factor.add(lane))).store(at);
            }
            lane += V::LANES;
        }
    }
}

/// `sum[i] += weight * x[i]` over `count` elements of any number.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn add_scaled<V: Vector>(sum: *mut V::Elem, x: *const V::Elem, weight: V::Elem, count: usize) {
    // SAFETY: inside both rows.
    unsafe {
        let factor = V::splat(weight);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            V::load(x.add(i)).mul_add(factor, V::load(sum.add(i))).store(sum.add(i));
            i += V::LANES;
        }
        while i < count {
            *sum.add(i) = *sum.add(i) + *x.add(i) * weight;
            i += 1;
        }
    }
}

/// The largest `row[i] * factor`.
///
/// # Safety
/// `row` holds `count` elements.
#[inline(always)]
pub(crate) unsafe fn row_max<V: Vector>(row: *const V::Elem, factor: V::Elem, count: usize) -> V::Elem {
    // SAFETY: inside the row.
    unsafe {
        let mut tops = V::splat(V::Elem::NEG_INFINITY);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            tops = V::load(row.add(i)).mul(V::splat(factor)).max(tops);
            i += V::LANES;
        }
        let mut lanes = [V::Elem::NEG_INFINITY; 16];
        tops.store(lanes.as_mut_ptr());
        let mut top = V::Elem::NEG_INFINITY;
        for value in lanes.into_iter().take(V::LANES).chain((whole..count).map(|i| *row.add(i) * factor)) {
            if value > top {
                top = value;
            }
        }
        top
    }
}

/// `row[i] = 2^(row[i] * factor - reference)`; returns the sum.
///
/// # Safety
/// `row` holds `count` elements.
#[inline(always)]
pub(crate) unsafe fn row_exp2<V: Vector>(
    row: *mut V::Elem,
    factor: V::Elem,
    reference: V::Elem,
    count: usize,
) -> V::Elem {
    // SAFETY: inside the row; the ragged end goes through a buffer of one register.
    unsafe {
        let (scale, minus) = (V::splat(factor), V::splat(-reference));
        let large = reference.f64().abs() > LARGE;
        let mut sums = V::splat(V::Elem::ZERO);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            let p = exponent(V::load(row.add(i)), scale, minus, large).exp2();
            sums = sums.add(p);
            p.store(row.add(i));
            i += V::LANES;
        }
        if whole < count {
            let mut lanes = [V::Elem::NEG_INFINITY; 16];
            std::ptr::copy_nonoverlapping(row.add(whole), lanes.as_mut_ptr(), count - whole);
            let mut p = [V::Elem::ZERO; 16];
            exponent(V::load(lanes.as_ptr()), scale, minus, large).exp2().store(p.as_mut_ptr());
            let mut rest = V::Elem::ZERO;
            for (at, &value) in p.iter().enumerate().take(count - whole) {
                row.add(whole + at).write(value);
                rest = rest + value;
            }
            return sums.sum() + rest;
        }
        sums.sum()
    }
}
