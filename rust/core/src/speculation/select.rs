//! Which tokens top-k and top-p keep, in linear time.

use crate::arch::ranking::{Ranked, Ranking};
use std::cmp::Ordering;

/// Below this many candidates the nucleus is found by sorting.
const SORTED: usize = 32;

fn descending(a: &f64, b: &f64) -> Ordering {
    b.total_cmp(a)
}

/// The k-th largest value of `z` (1 <= k <= z.len(); no NaN).
///
/// A buffer of at most max(2k, 64) values above a rising bar is kept, and cut back to k when it is full: for small k
/// nearly every value costs one comparison.
pub(super) fn kth_largest(z: &[f64], k: usize, buffer: &mut Vec<f64>) -> f64 {
    let capacity = (2 * k).max(64);
    let mut bar = f64::NEG_INFINITY;
    buffer.clear();
    for &value in z {
        if value > bar || buffer.len() < k {
            buffer.push(value);
            if buffer.len() == capacity {
                bar = *buffer.select_nth_unstable_by(k - 1, descending).1;
                buffer.truncate(k);
            }
        }
    }
    *buffer.select_nth_unstable_by(k - 1, descending).1
}

/// The most tokens that [`candidates`] looks for: half of its bins.
pub(super) fn reach<T: Ranked>() -> usize {
    T::ranking().lanes() * Ranking::<T>::REGISTERS / 2
}

/// How many elements of `row` reach a bar that is at most the k-th largest (1 <= k <= [`reach`]; no NaN). Their indices,
/// ascending, are the first of `found`. The bar is the k-th largest of the tops of many bins, so few others pass.
pub(super) fn candidates<T: Ranked>(row: &[T], k: usize, found: &mut Vec<u32>, tops: &mut Vec<T>) -> usize {
    let ranking = T::ranking();
    tops.resize(ranking.lanes() * Ranking::<T>::REGISTERS, T::NEG_INFINITY);
    ranking.bins(row, tops);
    let down = |a: &T, b: &T| b.partial_cmp(a).unwrap_or(Ordering::Equal);
    let bar = *tops.select_nth_unstable_by(k - 1, down).1;
    if found.len() < row.len() {
        found.resize(row.len(), 0);
    }
    ranking.at_least(row, bar, &mut found[..row.len()])
}

/// The last member of the nucleus: the smallest set of entries, taken by falling `z` (ties: rising index), whose
/// weights reach `top_p * total`. An entry belongs to it iff its z is larger, or equal at an index that is not larger.
///
/// `w[i]` must not decrease with `z[i]`, and `total` be the sum of w. Entries below (1 - top_p) total / n together
/// weigh less than what may be left out, so they are never candidates; of the rest, each step halves the range that
/// holds the crossing. `order` is scratch.
pub(super) fn nucleus(z: &[f64], w: &[f64], total: f64, top_p: f64, order: &mut Vec<usize>) -> (f64, usize) {
    let goal = top_p * total;
    // A millionth of slack: rounding may not decide what is a candidate.
    let least = (total - goal) / w.len() as f64 * (1.0 - 1e-6);
    order.clear();
    order.extend(w.iter().enumerate().filter(|&(_, &weight)| weight >= least).map(|(index, _)| index));
    let by_rank = |a: &usize, b: &usize| z[*b].total_cmp(&z[*a]).then(a.cmp(b));

    let (mut low, mut high, mut before) = (0, order.len(), 0.0);
    while high - low > SORTED {
        let middle = low + (high - low) / 2;
        order[low..high].select_nth_unstable_by(middle - low, by_rank);
        let mass: f64 = order[low..middle].iter().map(|&index| w[index]).sum();
        if before + mass >= goal {
            high = middle;
        } else {
            before += mass;
            low = middle;
        }
    }
    order[low..high].sort_unstable_by(by_rank);
    let mut last = order[low];
    for &index in &order[low..high] {
        if before >= goal {
            break;
        }
        last = index;
        before += w[index];
    }
    (z[last], last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By sorting everything.
    fn nucleus_by_sorting(z: &[f64], w: &[f64], total: f64, top_p: f64) -> (f64, usize) {
        let mut order: Vec<usize> = (0..z.len()).collect();
        order.sort_by(|a, b| z[*b].total_cmp(&z[*a]).then(a.cmp(b)));
        let (mut before, mut last) = (0.0, order[0]);
        for index in order {
            if before >= top_p * total {
                break;
            }
            last = index;
            before += w[index];
        }
        (z[last], last)
    }

    proptest! {
        #[test]
        fn kth_largest_is_the_sorted_one(z in prop::collection::vec((-40i32..40).prop_map(f64::from), 1..300), k in 1usize..300) {
            let k = k.min(z.len());
            let mut sorted = z.clone();
            sorted.sort_by(descending);
            prop_assert_eq!(kth_largest(&z, k, &mut Vec::new()), sorted[k - 1]);
        }

        #[test]
        fn candidates_hold_the_largest(z in prop::collection::vec((-40i32..40).prop_map(|x| x as f32), 1..900), k in 1usize..20) {
            let k = k.min(z.len());
            let bar = kth_largest(&z.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), k, &mut Vec::new());
            let mut found = Vec::new();
            let count = candidates(&z, k, &mut found, &mut Vec::new());
            prop_assert!(found[..count].is_sorted());
            for (index, &value) in z.iter().enumerate() {
                prop_assert!(f64::from(value) < bar || found[..count].contains(&(index as u32)));
            }
        }

        // Weights are powers of two, so that sums are exact in any order and ties are real.
        #[test]
        fn nucleus_is_the_sorted_one(steps in prop::collection::vec(0u32..8, 1..400), percent in 1u32..=100) {
            let z: Vec<f64> = steps.iter().map(|&step| -f64::from(step)).collect();
            let w: Vec<f64> = steps.iter().map(|&step| 0.5f64.powi(step as i32)).collect();
            let total: f64 = w.iter().sum();
            let top_p = f64::from(percent) / 100.0;
            prop_assert_eq!(nucleus(&z, &w, total, top_p, &mut Vec::new()), nucleus_by_sorting(&z, &w, total, top_p));
        }
    }

    #[test]
    fn masked_values_are_ranked_last() {
        let z = [f64::NEG_INFINITY, 1.0, f64::NEG_INFINITY];
        assert_eq!(kth_largest(&z, 1, &mut Vec::new()), 1.0);
        assert_eq!(kth_largest(&z, 2, &mut Vec::new()), f64::NEG_INFINITY);
        let many: Vec<f64> = (0..5000).map(|i| f64::from((i * 7919) % 5000)).collect();
        assert_eq!(kth_largest(&many, 50, &mut Vec::new()), 4950.0);
    }
}
