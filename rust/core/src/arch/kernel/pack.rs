//! Panels: transposition of rows into lanes, and of lanes back into rows; rows stacked along the reduction.
//!
//! A *panel* of `width` rows holds unit k of every row side by side: `panel[k * width + row]`. It is what
//! [`tile`](super::tile) reads by lanes. Where the reduction runs *across* rows (step k of it is a row, or two rows of
//! bfloat16), a row is already a line of the panel and only has to be cut into blocks of columns: [`stack`].

use crate::arch::vector::{Half, Vector};
use crate::dtype::Real;

/// Packs up to `width` rows of `depth` 32-bit or 64-bit units; rows past `sources.len()` are zero.
///
/// # Safety
/// Every source points to `depth` readable units; `panel` holds `depth * width` units; `width` is a multiple of
/// the lanes and at least the number of sources.
#[inline(always)]
pub(crate) unsafe fn pack<V: Vector>(sources: &[*const V::Elem], depth: usize, width: usize, panel: *mut V::Elem) {
    let lanes = V::LANES;
    // SAFETY: see above; reads stay inside each row's `depth`, writes inside the panel.
    unsafe {
        let zero = V::splat(V::Elem::ZERO);
        let mut lane = 0;
        while lane < width {
            let group = &sources[lane.min(sources.len())..(lane + lanes).min(sources.len())];
            let mut k = 0;
            while k + lanes <= depth && !group.is_empty() {
                let mut block = [zero; 16];
                for (slot, source) in block.iter_mut().zip(group) {
                    *slot = V::load(source.add(k));
                }
                V::transpose(&mut block);
                for j in 0..lanes {
                    block[j].store(panel.add((k + j) * width + lane));
                }
                k += lanes;
            }
            while k < depth {
                for j in 0..lanes {
                    let value = group.get(j).map_or(V::Elem::ZERO, |source| source.add(k).read_unaligned());
                    panel.add(k * width + lane + j).write(value);
                }
                k += 1;
            }
            lane += lanes;
        }
    }
}

/// Writes columns of a lane-major block back as rows: `rows[r][first + j] = block[j * width + r]` for `j` in
/// `0..count`.
///
/// # Safety
/// `block` holds `count * width` lanes, every row `count` writable elements, and there are at most `width` rows.
#[inline(always)]
pub(crate) unsafe fn unpack<V: Vector>(block: *const V::Elem, count: usize, width: usize, rows: &[*mut V::Elem]) {
    let lanes = V::LANES;
    // SAFETY: see above.
    unsafe {
        let zero = V::splat(V::Elem::ZERO);
        let mut lane = 0;
        while lane < rows.len() {
            let group = &rows[lane..(lane + lanes).min(rows.len())];
            let mut j = 0;
            while j + lanes <= count {
                let mut square = [zero; 16];
                for i in 0..lanes {
                    square[i] = V::load(block.add((j + i) * width + lane));
                }
                V::transpose(&mut square);
                for (row, values) in group.iter().zip(&square) {
                    values.store(row.add(j));
                }
                j += lanes;
            }
            while j < count {
                for (i, row) in group.iter().enumerate() {
                    row.add(j).write(block.add(j * width + lane + i).read());
                }
                j += 1;
            }
            lane += lanes;
        }
    }
}

/// As [`unpack`], rounding to bfloat16.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
pub(crate) unsafe fn unpack_bf16<V: Half>(block: *const f32, count: usize, width: usize, rows: &[*mut u16]) {
    let lanes = V::LANES;
    // SAFETY: as in `unpack`; the ragged end goes through a buffer of one register.
    unsafe {
        let mut lane = 0;
        while lane < rows.len() {
            let group = &rows[lane..(lane + lanes).min(rows.len())];
            let mut j = 0;
            while j < count {
                let left = lanes.min(count - j);
                let mut square = [V::splat(0.0); 16];
                for i in 0..left {
                    square[i] = V::load(block.add((j + i) * width + lane));
                }
                V::transpose(&mut square);
                for (row, values) in group.iter().zip(&square) {
                    if left == lanes {
                        values.store_bf16(row.add(j));
                    } else {
                        let mut rounded = [0u16; 16];
                        values.store_bf16(rounded.as_mut_ptr());
                        std::ptr::copy_nonoverlapping(rounded.as_ptr(), row.add(j), left);
                    }
                }
                j += left;
            }
            lane += lanes;
        }
    }
}

/// Cuts a row into blocks of `width` columns, `step` units apart: `out[b * step + c] = row[b * width + c]`. The last
/// block is filled with zeros up to whole registers.
///
/// # Safety
/// `row` holds `columns` elements; `out` has room for every block; `width` is a multiple of the lanes.
#[inline(always)]
pub(crate) unsafe fn stack<V: Vector>(
    row: *const V::Elem,
    columns: usize,
    width: usize,
    step: usize,
    out: *mut V::Elem,
) {
    let lanes = V::LANES;
    let (mut column, mut block) = (0, out);
    // SAFETY: see above.
    unsafe {
        while column < columns {
            let end = columns.min(column + width);
            let mut at = block;
            while column + lanes <= end {
                V::load(row.add(column)).store(at);
                column += lanes;
                at = at.add(lanes);
            }
            if column < end {
                let mut rest = [V::Elem::ZERO; 16];
                std::ptr::copy_nonoverlapping(row.add(column), rest.as_mut_ptr(), end - column);
                V::load(rest.as_ptr()).store(at);
                column = end;
            }
            block = block.add(step);
        }
    }
}

/// As [`stack`], two rows of bfloat16 at once: unit c is the pair (`low[c]`, `high[c]`). A null `high` counts as zeros.
///
/// # Safety
/// As [`stack`], for both rows.
#[inline(always)]
pub(crate) unsafe fn stack_pairs<V: Half>(
    low: *const u16,
    high: *const u16,
    columns: usize,
    width: usize,
    step: usize,
    out: *mut u32,
) {
    let lanes = V::LANES;
    let (mut column, mut block) = (0, out);
    // SAFETY: see above.
    unsafe {
        let zeros = [0u16; 16];
        while column < columns {
            let end = columns.min(column + width);
            let mut at = block;
            while column + lanes <= end {
                V::pair_up(low.add(column), if high.is_null() { zeros.as_ptr() } else { high.add(column) }, at);
                column += lanes;
                at = at.add(lanes);
            }
            if column < end {
                let (mut first, mut second) = ([0u16; 16], [0u16; 16]);
                std::ptr::copy_nonoverlapping(low.add(column), first.as_mut_ptr(), end - column);
                if !high.is_null() {
                    std::ptr::copy_nonoverlapping(high.add(column), second.as_mut_ptr(), end - column);
                }
                V::pair_up(first.as_ptr(), second.as_ptr(), at);
                column = end;
            }
            block = block.add(step);
        }
    }
}
