//! A routing as data: who goes where, grouped by expert.
//!
//! Pairs (token, slot) are numbered `token * slots + slot`. Grouping is a stable counting sort, so within an expert the
//! rows stand in ascending pair order, whatever the number of threads. Ids outside 0..experts are *sentinels* (expert
//! parallelism): their pairs have no row.

/// No row.
pub const NONE: usize = usize::MAX;

/// The grouped form of a routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// First row of each expert, and the number of rows: `experts + 1` entries.
    pub offsets: Vec<usize>,
    /// Token of each row.
    pub tokens: Vec<usize>,
    /// Row of each pair, or [`NONE`].
    pub rows: Vec<usize>,
}

impl Routing {
    /// Groups expert ids, given in pair order.
    pub fn new(ids: impl Iterator<Item = i64> + Clone, slots: usize, experts: usize) -> Self {
        let expert = |id: i64| usize::try_from(id).ok().filter(|&expert| expert < experts);
        let mut offsets = vec![0; experts + 1];
        let mut pairs = 0;
        for id in ids.clone() {
            pairs += 1;
            if let Some(expert) = expert(id) {
                offsets[expert + 1] += 1;
            }
        }
        for i in 0..experts {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut tokens = vec![0; offsets[experts]];
        let mut rows = vec![NONE; pairs];
        for (pair, id) in ids.enumerate() {
            if let Some(expert) = expert(id) {
                tokens[next[expert]] = pair / slots;
                rows[pair] = next[expert];
                next[expert] += 1;
            }
        }
        Self { offsets, tokens, rows }
    }

    /// Rows of an expert.
    pub fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }
}
