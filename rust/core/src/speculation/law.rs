//! A law over token ids, how to add its weights up, and how to draw from it.
//!
//! Weights are added up in blocks of 512: eight columns inside a block, then the blocks in order. A draw walks over the
//! sums of the blocks and then through one of them, so 130 thousand tokens cost some 250 dependent additions and 512 more.

use super::select::kth_largest;
use crate::arch::laws::Lawful;
use crate::dtype::{Float, Real};

pub(super) use crate::arch::laws::BLOCK;

/// The sum of weights, in an order that depends on their number alone.
pub fn total<T: Lawful>(weights: &[T]) -> f64 {
    T::laws().total(weights)
}

/// The index at `uniform` in [0, 1): the first whose cumulative weight exceeds `uniform * total`.
///
/// Never an index of weight zero: those do not move the cumulative weight, and where rounding leaves it short of the
/// product at the end, the last index with a positive weight is taken. There must be one.
pub fn draw<T: Lawful>(weights: &[T], all: f64, uniform: f64) -> usize {
    let target = uniform * all;
    let blocks = weights.chunks(BLOCK).map(total);
    let (block, before) = draw_block(blocks, target);
    let first = block * BLOCK;
    let part = &weights[first..weights.len().min(first + BLOCK)];
    first + draw_within(part.iter().map(|weight| weight.widen().f64()), before, target)
}

/// The block that `target` falls into, and the weight before it; the last with a positive sum if it lies beyond all.
pub(super) fn draw_block(sums: impl Iterator<Item = f64>, target: f64) -> (usize, f64) {
    let (mut cumulative, mut found) = (0.0, (0, 0.0));
    for (block, sum) in sums.enumerate() {
        if sum > 0.0 {
            found = (block, cumulative);
            cumulative += sum;
            if cumulative > target {
                break;
            }
        }
    }
    found
}

/// The place inside a block.
pub(super) fn draw_within(weights: impl Iterator<Item = f64>, before: f64, target: f64) -> usize {
    let (mut cumulative, mut last) = (before, 0);
    for (index, weight) in weights.enumerate() {
        if weight > 0.0 {
            cumulative += weight;
            last = index;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

/// Weights that are not negative, and their (positive) total.
#[derive(Debug, Clone, Default)]
pub struct Law {
    /// `weights[i]` belongs to token `ids[i]` (ascending); unused if `dense`, where it belongs to token i.
    pub(super) ids: Vec<usize>,
    pub(super) dense: bool,
    pub(super) weights: Vec<f64>,
    pub(super) total: f64,
}

impl Law {
    fn index(&self, token: usize) -> Option<usize> {
        if self.dense {
            Some(token).filter(|token| *token < self.weights.len())
        } else {
            self.ids.binary_search(&token).ok()
        }
    }

    /// The probability of a token.
    pub fn probability(&self, token: usize) -> f64 {
        self.index(token).map_or(0.0, |index| self.weights[index]) / self.total
    }

    /// Calls `visit` with every token that has a weight of its own, in order, and that weight.
    pub(super) fn each(&self, mut visit: impl FnMut(usize, f64)) {
        if self.dense {
            self.weights.iter().enumerate().for_each(|(token, &weight)| visit(token, weight));
        } else {
            self.ids.iter().zip(&self.weights).for_each(|(&token, &weight)| visit(token, weight));
        }
    }

    /// The token at a uniform number in [0, 1): see [`draw`].
    pub fn draw(&self, uniform: f64) -> usize {
        let index = draw(&self.weights, self.total, uniform);
        if self.dense { index } else { self.ids[index] }
    }

    /// Writes the probabilities of all tokens.
    pub fn write<T: Float>(&self, out: &mut [T]) {
        let share = |weight: f64| T::narrow(Real::of(weight / self.total));
        if self.dense {
            for (slot, &weight) in out.iter_mut().zip(&self.weights) {
                *slot = share(weight);
            }
        } else {
            out.fill(T::narrow(Real::of(0.0)));
            for (&id, &weight) in self.ids.iter().zip(&self.weights) {
                out[id] = share(weight);
            }
        }
    }

    /// Writes the tokens that have a probability, ascending, and those; -1 and 0 in what is left of the rows. Returns how
    /// many there are. The law must have been cut to the length of the rows.
    pub(super) fn write_sparse<T: Float>(&self, ids: &mut [i32], out: &mut [T]) -> usize {
        ids.fill(-1);
        out.fill(T::narrow(Real::of(0.0)));
        let mut count = 0;
        for (index, &weight) in self.weights.iter().enumerate() {
            let probability = T::narrow(Real::of(weight / self.total));
            // What the record's own type cannot hold is not in the record, and so not in the law.
            if probability.widen().f64() > 0.0 {
                ids[count] = if self.dense { index } else { self.ids[index] } as i32;
                out[count] = probability;
                count += 1;
            }
        }
        count
    }

    /// `out` becomes a copy, to be lessened by [`Law::take_off`] and then given its total.
    pub(super) fn copy_to(&self, out: &mut Law) {
        out.dense = self.dense;
        out.total = self.total;
        out.ids.clone_from(&self.ids);
        out.weights.clone_from(&self.weights);
    }

    /// One token's weight loses `weight`, down to 0.
    pub(super) fn take_off(&mut self, token: usize, weight: f64) {
        if let Some(index) = self.index(token) {
            let excess = self.weights[index] - weight;
            self.weights[index] = if excess > 0.0 { excess } else { 0.0 };
        }
    }

    /// Becomes the same law without its least probable tokens: the `support` most probable stay (ties: lower ids).
    pub(super) fn cut(&mut self, support: usize, buffer: &mut Vec<f64>) {
        if self.weights.len() <= support {
            return;
        }
        if self.dense {
            self.ids.clear();
            self.ids.extend(0..self.weights.len());
            self.dense = false;
        }
        let mut slot = 0;
        for index in heaviest(&self.weights, support, buffer) {
            self.ids[slot] = self.ids[index]; // the indices ascend
            self.weights[slot] = self.weights[index];
            slot += 1;
        }
        self.ids.truncate(slot);
        self.weights.truncate(slot);
        self.total = total(&self.weights);
    }
}

/// The indices, ascending, of the `count` largest weights (ties: lower indices), those of zero weight left out.
pub(super) fn heaviest(weights: &[f64], count: usize, buffer: &mut Vec<f64>) -> Vec<usize> {
    let count = count.min(weights.len());
    if count == 0 {
        return Vec::new();
    }
    let bar = kth_largest(weights, count, buffer);
    let above = weights.iter().filter(|weight| **weight > bar).count();
    let mut ties = count - above;
    let mut chosen = Vec::with_capacity(count);
    for (index, &weight) in weights.iter().enumerate() {
        let take = weight > bar || (weight == bar && ties > 0);
        if take {
            ties -= usize::from(weight == bar);
            if weight > 0.0 {
                chosen.push(index);
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The largest number `uniform` returns.
    const LAST: f64 = 1.0 - 1.0 / (1u64 << 53) as f64;

    fn at(weights: &[f64], uniform: f64) -> usize {
        draw(weights, total(weights), uniform)
    }

    #[test]
    fn edges_of_the_cumulative_distribution() {
        let law = [0.0, 0.25, 0.0, 0.5, 0.25, 0.0];
        assert_eq!([0.0, 0.249, 0.25, 0.749, 0.75, LAST].map(|u| at(&law, u)), [1, 1, 3, 3, 4, 4]);
        // A total that rounding left too large must not lead to a token of probability zero.
        assert_eq!(draw(&[0.3, 0.7, 0.0], 1.0 + 1e-9, LAST), 1);
    }

    proptest! {
        #[test]
        fn no_token_of_probability_zero(weights in prop::collection::vec(prop_oneof![Just(0.0), 1e-300f64..1e-290, 0.0f64..1.0], 1..50), u in 0.0f64..1.0) {
            prop_assume!(weights.iter().any(|&w| w > 0.0));
            for u in [u, 0.0, LAST] {
                prop_assert!(weights[at(&weights, u)] > 0.0);
            }
        }

        /// Across blocks: powers of two add up exactly, so that there is one right answer.
        #[test]
        fn blocks_do_not_show(weights in prop::collection::vec(prop_oneof![4 => Just(0.0), 1 => (0u32..12).prop_map(|s| f64::from(1 << s))], 1..3000), u in 0.0f64..1.0) {
            let all: f64 = weights.iter().sum();
            prop_assume!(all > 0.0);
            prop_assert_eq!(total(&weights), all);
            for u in [u, 0.0, LAST] {
                let mut cumulative = 0.0;
                let wanted = weights.iter().position(|w| { cumulative += w; cumulative > u * all });
                prop_assert_eq!(Some(draw(&weights, all, u)), wanted);
            }
        }

        #[test]
        fn the_heaviest_are_the_sorted_ones(weights in prop::collection::vec((0u32..9).prop_map(f64::from), 0..300), count in 0usize..300) {
            let mut order: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
            order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
            order.truncate(count);
            order.sort_unstable();
            prop_assert_eq!(heaviest(&weights, count, &mut Vec::new()), order);
        }
    }
}
