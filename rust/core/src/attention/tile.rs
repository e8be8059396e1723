//! Tiles: how the rows of a problem are cut into tasks.
//!
//! A tile holds packed rows of one key/value head: row r is query `r / pack` of head `head + r % pack`, so that a key is
//! read once for its whole group. Heads are not packed where each has a block mask of its own. A tile never spans two
//! query blocks of a block mask.

use super::problem::Problem;
use super::sequence::{Accessor, Sequence};
use crate::dtype::Element;
use crate::view::Matrix;

/// One tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Number of its sequence.
    pub sequence: usize,
    /// Its key/value head.
    pub key_head: usize,
    /// Query head of row 0 (of every `pack` rows).
    pub head: usize,
    /// Query heads that are packed.
    pub pack: usize,
    /// First packed row.
    pub first: usize,
    /// Number of packed rows.
    pub count: usize,
}

impl Tile {
    /// Query and head of lane `lane`.
    pub fn at(&self, lane: usize) -> (usize, usize) {
        let row = self.first + lane;
        (row / self.pack, self.head + row % self.pack)
    }

    /// What the tile belongs to.
    pub fn of<'p>(&self, problem: &'p Problem<'_>) -> &'p Sequence {
        &problem.sequences[self.sequence]
    }

    /// Number of a lane's row among those of an output [batch, heads, queries, ..].
    pub fn number(&self, problem: &Problem<'_>, lane: usize) -> usize {
        let (sequence, (query, head)) = (self.of(problem), self.at(lane));
        (sequence.query_batch * problem.size.query_heads + head) * problem.size.queries + sequence.query_start + query
    }

    /// A lane's row of an array laid out as the queries are, as a matrix of one row.
    pub fn row<'a, T: Element>(
        &self,
        problem: &Problem<'_>,
        array: &crate::view::Array<'a>,
        lane: usize,
    ) -> Matrix<'a, T> {
        let (sequence, (query, head)) = (self.of(problem), self.at(lane));
        let rows = array.matrix::<T>(&[sequence.query_batch, head]);
        let at = sequence.query_start + query;
        rows.part(at..at + 1, 0..rows.cols())
    }

    /// The tile's keys.
    pub fn keys<'p, 'a>(&self, problem: &'p Problem<'a>) -> Accessor<'p, 'a> {
        problem.accessor(&problem.key, self.sequence, self.key_head)
    }

    /// The tile's values.
    pub fn values<'p, 'a>(&self, problem: &'p Problem<'a>) -> Accessor<'p, 'a> {
        problem.accessor(&problem.value, self.sequence, self.key_head)
    }
}

/// The tiles of one (sequence, group of packed heads), of at most `width` rows each, in ascending order.
pub fn cut(problem: &Problem<'_>, sequence: usize, head: usize, width: usize) -> Vec<Tile> {
    let pack = problem.pack();
    let packed = problem.sequences[sequence].queries * pack;
    let segment = problem.blocks.as_ref().map_or(packed, |blocks| blocks.query_block * pack).max(1);
    let mut tiles = Vec::with_capacity(packed.div_ceil(width));
    let mut first = 0;
    while first < packed {
        let end = packed.min((first / segment + 1) * segment);
        let count = width.min(end - first);
        tiles.push(Tile { sequence, key_head: head / problem.size.group(), head, pack, first, count });
        first += count;
    }
    tiles
}

/// All groups of packed heads: (sequence, first query head).
pub fn groups(problem: &Problem<'_>) -> Vec<(usize, usize)> {
    let heads = (0..problem.size.query_heads).step_by(problem.pack());
    (0..problem.sequences.len()).flat_map(|sequence| heads.clone().map(move |head| (sequence, head))).collect()
}
