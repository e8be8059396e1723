//! The k largest elements of a row, exactly, in linear time.

use crate::arch::ranking::{Ranked, Ranking};
use std::cmp::Ordering;

/// Scratch of [`Largest::of`], for rows of one length.
pub(crate) struct Largest<T> {
    tops: Vec<T>,
    found: Vec<u32>,
    values: Vec<T>,
    ranks: Vec<u32>,
    ordered: Vec<u32>,
}

impl<T: Ranked> Largest<T> {
    pub(crate) fn new() -> Self {
        Self { tops: Vec::new(), found: Vec::new(), values: Vec::new(), ranks: Vec::new(), ordered: Vec::new() }
    }

    /// Indices of the `k` largest elements (1 <= k <= length; no NaN), by falling value, ties by rising index.
    ///
    /// ```text
    /// bar        = a number that is at most the k-th largest element
    /// candidates = indices of elements >= bar, ascending
    /// answer     = the k best candidates
    /// ```
    /// The bar is the k-th largest of the maxima of about 2k disjoint parts of the row, which registers find in one pass:
    /// of 256 random elements 11 reach it for k = 8. Where k is too large for that, it is the k-th largest element.
    /// The few candidates are put in order by counting, for each, how many rank ahead of it: random comparisons would
    /// mispredict half of their branches. Many (ties, large k) are selected and sorted.
    pub(crate) fn of(&mut self, row: &[T], k: usize) -> &[u32] {
        let kernels = T::ranking();
        if self.found.len() < row.len() {
            self.found.resize(row.len(), 0);
        }
        let bar = self.bar(row, k, kernels);
        let count = kernels.at_least(row, bar, &mut self.found);
        let candidates = &mut self.found[..count];
        if count > kernels.ranked() {
            let by_rank = |a: &u32, b: &u32| descending(&row[*a as usize], &row[*b as usize]).then(a.cmp(b));
            candidates.select_nth_unstable_by(k - 1, by_rank);
            candidates[..k].sort_unstable_by(by_rank);
            return &candidates[..k];
        }
        let room = count.div_ceil(kernels.lanes()).next_power_of_two() * kernels.lanes();
        self.values.clear();
        self.values.extend(candidates.iter().map(|&index| row[index as usize]));
        self.values.resize(room, T::NEG_INFINITY);
        self.ranks.resize(kernels.ranked(), 0);
        self.ordered.resize(kernels.ranked(), 0);
        let ranks = &mut self.ranks[..count];
        kernels.ranks(&self.values, ranks);
        for (&rank, &index) in ranks.iter().zip(candidates.iter()) {
            self.ordered[rank as usize] = index;
        }
        &self.ordered[..k]
    }

    fn bar(&mut self, row: &[T], k: usize, kernels: &Ranking<T>) -> T {
        if k == row.len() {
            return T::NEG_INFINITY;
        }
        let registers = (2 * k).div_ceil(kernels.lanes()).next_power_of_two();
        if registers > Ranking::<T>::REGISTERS {
            self.tops.clear();
            self.tops.extend_from_slice(row);
        } else {
            self.tops.resize(registers * kernels.lanes(), T::NEG_INFINITY);
            kernels.bins(row, &mut self.tops);
            if registers <= 2 {
                return kernels.kth(&self.tops, k);
            }
        }
        *self.tops.select_nth_unstable_by(k - 1, descending).1
    }
}

fn descending<T: PartialOrd>(a: &T, b: &T) -> Ordering {
    b.partial_cmp(a).unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::tests::at_every_level;
    use proptest::prelude::*;

    fn by_sorting(row: &[f64], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|a, b| row[*b as usize].partial_cmp(&row[*a as usize]).unwrap().then(a.cmp(b)));
        order.truncate(k);
        order
    }

    fn check(row: &[f64], k: usize) {
        let single: Vec<f32> = row.iter().map(|&x| x as f32).collect();
        let want = by_sorting(row, k);
        at_every_level(|level| {
            assert_eq!(Largest::new().of(row, k), want, "{} f64 k{k} {row:?}", level.name());
            assert_eq!(Largest::new().of(&single, k), want, "{} f32 k{k} {row:?}", level.name());
        });
    }

    proptest! {
        // Few distinct values, so that ties are everywhere.
        #[test]
        fn are_the_sorted_ones(row in prop::collection::vec((-20i32..20).prop_map(f64::from), 1..300), k in 1usize..300) {
            check(&row, k.min(row.len()));
        }
    }

    #[test]
    fn orders_that_defeat_a_threshold() {
        for n in [1usize, 2, 15, 16, 17, 33, 255, 256, 257, 1000] {
            for k in [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 999, 1000] {
                let k = k.min(n);
                check(&(0..n).map(|i| i as f64).collect::<Vec<_>>(), k);
                check(&(0..n).map(|i| -(i as f64)).collect::<Vec<_>>(), k);
                check(&vec![0.0; n], k);
                check(&(0..n).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }).collect::<Vec<_>>(), k);
                check(&vec![f64::NEG_INFINITY; n], k);
                check(&(0..n).map(|i| [f64::NEG_INFINITY, 1.0, f64::INFINITY][i % 3]).collect::<Vec<_>>(), k);
            }
        }
    }
}
