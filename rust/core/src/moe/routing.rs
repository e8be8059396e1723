//! A routing as data: who goes where, grouped by expert.
//!
//! A routing is a list of pairs (token, expert) in ascending order of tokens: either a fixed number of slots for each
//! token, or as many pairs as its list of tokens says. Grouping is a stable counting sort, so within an expert the
//! rows stand in ascending pair order, whatever the number of threads. Ids outside 0..experts are *sentinels* (expert
//! parallelism): their pairs have no row.

use std::ops::Range;

/// No row.
pub const NONE: usize = usize::MAX;

/// The grouped form of a routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// First row of each expert, and the number of rows: `experts + 1` entries.
    pub offsets: Vec<usize>,
    /// Token of each row.
    pub tokens: Vec<usize>,
    /// Pair of each row.
    pub pairs: Vec<usize>,
    /// Row of each pair, or [`NONE`].
    pub rows: Vec<usize>,
    starts: Starts,
}

/// Where the pairs of a token are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Starts {
    Every(usize),
    At(Vec<usize>),
}

impl Routing {
    /// Groups expert ids in pair order, `slots` of them for each token.
    pub fn new(ids: &[i64], slots: usize, experts: usize) -> Self {
        Self::grouped(ids, |pair| pair / slots, experts, Starts::Every(slots))
    }

    /// Groups expert ids in pair order; `tokens` [pairs] is ascending and below `count`, which the caller has checked.
    pub fn general(ids: &[i64], tokens: &[usize], count: usize, experts: usize) -> Self {
        let mut starts = vec![0; count + 1];
        for &token in tokens {
            starts[token + 1] += 1;
        }
        for token in 0..count {
            starts[token + 1] += starts[token];
        }
        Self::grouped(ids, |pair| tokens[pair], experts, Starts::At(starts))
    }

    fn grouped(ids: &[i64], token: impl Fn(usize) -> usize, experts: usize, starts: Starts) -> Self {
        let expert = |id: i64| usize::try_from(id).ok().filter(|&expert| expert < experts);
        let mut offsets = vec![0; experts + 1];
        for expert in ids.iter().filter_map(|&id| expert(id)) {
            offsets[expert + 1] += 1;
        }
        for i in 0..experts {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut tokens = vec![0; offsets[experts]];
        let mut pairs = vec![0; offsets[experts]];
        let mut rows = vec![NONE; ids.len()];
        for (pair, &id) in ids.iter().enumerate() {
            if let Some(expert) = expert(id) {
                let row = next[expert];
                (tokens[row], pairs[row], rows[pair]) = (token(pair), pair, row);
                next[expert] += 1;
            }
        }
        Self { offsets, tokens, pairs, rows, starts }
    }

    /// Rows of an expert.
    pub fn of(&self, expert: usize) -> Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.tokens.len()
    }

    /// Pairs of a token.
    pub fn of_token(&self, token: usize) -> Range<usize> {
        match &self.starts {
            Starts::Every(slots) => token * slots..(token + 1) * slots,
            Starts::At(starts) => starts[token]..starts[token + 1],
        }
    }

    /// Blocks of at most `most` rows of one expert, as even as whole lanes allow: (expert, rows), longest first.
    pub fn blocks(&self, most: usize, least: usize) -> Vec<(usize, Range<usize>)> {
        let mut blocks = Vec::new();
        for expert in 0..self.offsets.len() - 1 {
            let rows = self.of(expert);
            if rows.len() < least.max(1) {
                continue;
            }
            let each = rows.len().div_ceil(rows.len().div_ceil(most)).next_multiple_of(16);
            blocks.extend(rows.clone().step_by(each).map(|start| (expert, start..rows.end.min(start + each))));
        }
        blocks.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.len()));
        blocks
    }
}
