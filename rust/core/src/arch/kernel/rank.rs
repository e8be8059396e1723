//! Which elements of a row are large: the inner loops of choosing experts and of filling tiles with tokens.

use crate::arch::vector::Vector;
use crate::dtype::Real;
use crate::exponential::exponential;

/// Whether any element is NaN.
///
/// # Safety
/// `row` holds `count` elements.
#[inline(always)]
pub(crate) unsafe fn has_nan<V: Vector>(row: *const V::Elem, count: usize) -> bool {
    let all = u32::MAX >> (32 - V::LANES);
    let whole = count / V::LANES * V::LANES;
    let (mut same, mut i) = (all, 0);
    // SAFETY: inside the row.
    unsafe {
        while i < whole {
            let x = V::load(row.add(i));
            same &= x.at_least(x);
            i += V::LANES;
        }
        same != all || (whole..count).any(|i| (*row.add(i)).f64().is_nan())
    }
}

/// Largest elements of `B * LANES` bins: element i belongs to bin `i % (B * LANES)`, except at the ragged end. A bin that
/// no element belongs to holds -inf. The k-th largest bin is then at most the k-th largest element.
///
/// # Safety
/// `row` holds `count` elements, none of them NaN, and `tops` `B * LANES`.
#[inline(always)]
pub(crate) unsafe fn bins<V: Vector, const B: usize>(row: *const V::Elem, count: usize, tops: *mut V::Elem) {
    // SAFETY: inside the row; the ragged end goes through a buffer of one register.
    unsafe {
        let mut best = [V::splat(V::Elem::NEG_INFINITY); B];
        let mut i = 0;
        while i + B * V::LANES <= count {
            for (register, best) in best.iter_mut().enumerate() {
                *best = V::load(row.add(i + register * V::LANES)).max(*best);
            }
            i += B * V::LANES;
        }
        let mut register = 0;
        while i + V::LANES <= count {
            best[register] = V::load(row.add(i)).max(best[register]);
            i += V::LANES;
            register += 1;
        }
        if i < count {
            let mut lanes = [V::Elem::NEG_INFINITY; 16];
            std::ptr::copy_nonoverlapping(row.add(i), lanes.as_mut_ptr(), count - i);
            best[register] = V::load(lanes.as_ptr()).max(best[register]);
        }
        for (register, best) in best.into_iter().enumerate() {
            best.store(tops.add(register * V::LANES));
        }
    }
}

/// The k-th largest of `R` registers, by counting for each element how many are at least as large: no branch depends on
/// the values.
///
/// # Safety
/// `values` holds `R * LANES` elements, none of them NaN; 1 <= k <= R * LANES.
#[inline(always)]
pub(crate) unsafe fn kth<V: Vector, const R: usize>(values: *const V::Elem, k: u32) -> V::Elem {
    // SAFETY: inside the registers.
    unsafe {
        let mut registers = [V::splat(V::Elem::NEG_INFINITY); R];
        for (register, lanes) in registers.iter_mut().enumerate() {
            *lanes = V::load(values.add(register * V::LANES));
        }
        let mut answer = V::Elem::NEG_INFINITY;
        for i in 0..R * V::LANES {
            let value = *values.add(i);
            let own = V::splat(value);
            let reach: u32 = registers.iter().map(|lanes| lanes.at_least(own).count_ones()).sum();
            answer = if reach >= k && value > answer { value } else { answer };
        }
        answer
    }
}

/// `ranks[i]` = the place of element i by falling value, ties by rising index, of `count` elements in `R` registers,
/// filled up with -inf. Counts, as [`kth`] does.
///
/// # Safety
/// `values` holds `R * LANES` elements, none of them NaN, and `ranks` `count`; `R * LANES` is at most 64.
#[inline(always)]
pub(crate) unsafe fn ranks<V: Vector, const R: usize>(values: *const V::Elem, count: usize, ranks: *mut u32) {
    // SAFETY: inside the registers and the ranks.
    unsafe {
        let mut registers = [V::splat(V::Elem::NEG_INFINITY); R];
        for (register, lanes) in registers.iter_mut().enumerate() {
            *lanes = V::load(values.add(register * V::LANES));
        }
        for i in 0..count {
            let own = V::splat(*values.add(i));
            let (mut not_smaller, mut not_larger) = (0u64, 0u64);
            for (register, lanes) in registers.iter().enumerate() {
                not_smaller |= u64::from(lanes.at_least(own)) << (register * V::LANES);
                not_larger |= u64::from(own.at_least(*lanes)) << (register * V::LANES);
            }
            let before = (1u64 << i) - 1;
            let ahead = not_smaller & (!not_larger | before);
            ranks.add(i).write(ahead.count_ones());
        }
    }
}

/// The indices, ascending, of the elements that reach their bar; returns how many. `bar` says the bar of a register's
/// lanes from an index on, and of one index. A NaN, in either, reaches nothing.
///
/// # Safety
/// `row` holds `count` elements and `out` as many indices.
#[inline(always)]
pub(crate) unsafe fn at_least<V: Vector>(
    row: *const V::Elem,
    count: usize,
    bars: impl Fn(usize) -> V,
    bar: impl Fn(usize) -> V::Elem,
    out: *mut u32,
) -> usize {
    let (mut found, mut i) = (0, 0);
    // SAFETY: inside the row; no index is written twice, so at most `count` are.
    unsafe {
        // 64 lanes share one word of bits: where few elements pass, a loop that ends is a mispredicted branch.
        while i + V::LANES <= count {
            let first = i;
            let mut bits = 0u64;
            while i + V::LANES <= count && i < first + 64 {
                bits |= u64::from(V::load(row.add(i)).at_least(bars(i))) << (i - first);
                i += V::LANES;
            }
            while bits != 0 {
                out.add(found).write(first as u32 + bits.trailing_zeros());
                found += 1;
                bits &= bits - 1;
            }
        }
        while i < count {
            if *row.add(i) >= bar(i) {
                out.add(found).write(i as u32);
                found += 1;
            }
            i += 1;
        }
    }
    found
}

/// `out[i] = e^(row[i] - top)`, 1 where an element equals `top` (which may be infinite); returns the sum, added up in
/// eight columns on every level. No element may be NaN or above `top`.
#[inline(always)]
pub(crate) fn exponentials<T: Real>(row: &[T], top: f64, out: &mut [f64]) -> f64 {
    for (out, x) in out.iter_mut().zip(row) {
        let x = x.f64();
        // The difference of two infinities is no number: leave it out of the arithmetic.
        let below = if x == top { 0.0 } else { x - top };
        *out = exponential(below);
    }
    let mut columns = [0.0; 8];
    let (whole, rest) = out.as_chunks::<8>();
    for chunk in whole {
        for (column, x) in columns.iter_mut().zip(chunk) {
            *column += x;
        }
    }
    for (column, x) in columns.iter_mut().zip(rest) {
        *column += x;
    }
    let [a, b, c, d, e, f, g, h] = columns;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `out[i] = 1 / (1 + e^(-row[i]))`, relatively exact on both sides; no element may be NaN.
#[inline(always)]
pub(crate) fn sigmoids<T: Real>(row: &[T], out: &mut [f64]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out = sigmoid(x.f64());
    }
}

/// The sigmoid of one number.
#[inline(always)]
pub(crate) fn sigmoid(x: f64) -> f64 {
    let small = exponential(-x.abs());
    (if x < 0.0 { small } else { 1.0 }) / (1.0 + small)
}
