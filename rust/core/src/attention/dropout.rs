//! Dropped weights: a function of (seed, sequence, head, query, key) alone, so that the backward pass, other tile
//! shapes and other devices drop the same ones.

use super::problem::Problem;
use super::tile::Tile;
use crate::dtype::Real;
use crate::rng::{Purpose, philox4x32};
use std::ops::Range;

/// Which weights are kept.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    key: [u32; 2],
    /// Words of the generator below this drop.
    limit: u64,
    /// 1 / probability of being kept; 0 where nothing is.
    pub factor: f64,
}

impl Dropout {
    /// What a problem asks for; nothing where it drops nothing.
    pub fn of(problem: &Problem<'_>) -> Option<Self> {
        let (p, seed) = (problem.rules.dropout, problem.rules.seed);
        (p > 0.0).then(|| Self {
            key: [seed as u32, (seed >> 32) as u32],
            limit: (p * 4_294_967_296.0).round() as u64,
            factor: if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 },
        })
    }

    /// Multiplies by 0 or by [`factor`](Self::factor): `block[k * key_step + lane * lane_step]` for the tile's lanes.
    pub fn apply<T: Real>(
        &self,
        problem: &Problem<'_>,
        tile: &Tile,
        keys: Range<usize>,
        block: &mut [T],
        (key_step, lane_step): (usize, usize),
    ) {
        let factor = T::of(self.factor);
        for lane in 0..tile.count {
            let (query, head) = tile.at(lane);
            let request = (tile.sequence * problem.size.query_heads + head) as u32;
            let mut words = [0; 4];
            for key in keys.clone() {
                if key % 4 == 0 || key == keys.start {
                    words = philox4x32([request, query as u32, (key / 4) as u32, Purpose::Drop as u32], self.key);
                }
                let value = &mut block[(key - keys.start) * key_step + lane * lane_step];
                *value = if u64::from(words[key % 4]) < self.limit { T::ZERO } else { *value * factor };
            }
        }
    }
}
