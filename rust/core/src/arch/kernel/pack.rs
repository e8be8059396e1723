//! Panels: transposition of rows into lanes, and of lanes back into rows.
//!
//! A *panel* of `width` rows holds unit k of every row side by side: `panel[k * width + row]`. It is what
//! [`tile`](super::tile) reads by lanes.

use crate::arch::vector::Vector;
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
