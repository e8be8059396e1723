//! The block schedule of one tile: which key ranges its rows visit, in ascending order, and which of them need a mask.
//!
//! A tile holds `rows` packed rows of one key/value head: row r is query `r / group` of head `r % group`, so that a
//! key is read once for its whole group.

use super::problem::Problem;
use crate::dtype::{Flag, Real};
use crate::view::Matrix;
use std::ops::Range;

/// A range of keys to visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// First key; a multiple of the operands' unit.
    pub start: usize,
    /// Number of keys.
    pub len: usize,
    /// Some row does not attend some key of it.
    pub partial: bool,
}

/// One packed row of a tile.
struct Row<'a> {
    keys: Range<usize>,
    mask: Option<&'a [Flag]>,
    strided: Option<Matrix<'a, Flag>>,
    /// One bit per key block that was selected.
    blocks: Vec<u64>,
}

impl Row<'_> {
    fn keeps(&self, key: usize, block_size: usize) -> bool {
        self.keys.contains(&key)
            && (self.blocks.is_empty() || self.selected(key / block_size))
            && self.mask.is_none_or(|mask| mask[key].get())
            && self.strided.is_none_or(|mask| mask.at(0, key).get())
    }

    fn selected(&self, block: usize) -> bool {
        self.blocks[block / 64] >> (block % 64) & 1 == 1
    }
}

/// The schedule of a tile.
pub struct Schedule<'a> {
    rows: Vec<Row<'a>>,
    block_size: usize,
    keys: usize,
    /// Ranges in ascending order.
    pub visits: Vec<Visit>,
}

impl<'a> Schedule<'a> {
    /// Plans packed rows `first..first + count` of key head `key_head`; ranges hold at most `step` keys and start on
    /// multiples of `unit`.
    pub fn new(
        problem: &Problem<'a>,
        batch: usize,
        key_head: usize,
        first: usize,
        count: usize,
        step: usize,
        unit: usize,
    ) -> Self {
        let group = problem.size.group();
        let block_size = problem.rules.block_size;
        let row = |r: usize| {
            let (query, head) = (r / group, key_head * group + r % group);
            let line = problem.mask(batch, head).map(|mask| mask.part(query..query + 1, 0..mask.cols()));
            let adjacent = line.and_then(|line| line.row(0));
            let blocks = selected_blocks(problem, batch, head, query);
            Row {
                keys: problem.range(query),
                mask: adjacent,
                strided: if adjacent.is_none() { line } else { None },
                blocks,
            }
        };
        let rows: Vec<_> = (first..first + count).map(row).collect();
        let mut schedule = Self { rows, block_size, keys: problem.size.keys, visits: Vec::new() };
        let low = schedule.rows.iter().filter(|row| !row.keys.is_empty()).map(|row| row.keys.start).min().unwrap_or(0);
        let high = schedule.rows.iter().map(|row| row.keys.end).max().unwrap_or(0);
        if problem.rules.block_indices.is_none() {
            schedule.cut(low..high, step, unit);
        } else {
            let words = schedule.rows.first().map_or(0, |row| row.blocks.len());
            for block in 0..words * 64 {
                if schedule.rows.iter().any(|row| row.selected(block)) {
                    let (start, end) = (block * block_size, (block + 1) * block_size);
                    schedule.cut(start.max(low)..end.min(high), step, unit);
                }
            }
        }
        schedule
    }

    /// Cuts a range into visits, leaving out those that no row attends.
    fn cut(&mut self, range: Range<usize>, step: usize, unit: usize) {
        // Whole units: the neighbours that come along are under the mask. What the last visit took is not taken again.
        let taken = self.visits.last().map_or(0, |last| last.start + last.len);
        let mut start = (range.start / unit * unit).max(taken);
        let end = range.end.next_multiple_of(unit).min(self.keys);
        while start < end {
            let mut visit = Visit { start, len: step.min(end - start), partial: false };
            start += visit.len;
            let (any, all) = self.survey(visit);
            visit.partial = !all;
            if any {
                self.visits.push(visit);
            }
        }
    }

    /// Whether any row attends any key of a visit, and whether all rows attend all.
    fn survey(&self, visit: Visit) -> (bool, bool) {
        let (mut any, mut all) = (false, true);
        let keys = visit.start..visit.start + visit.len;
        for row in &self.rows {
            let inside = row.keys.start.max(keys.start)..row.keys.end.min(keys.end);
            if inside.is_empty() {
                all = false;
                continue;
            }
            all &= inside == keys;
            if row.blocks.is_empty() && row.mask.is_none() && row.strided.is_none() {
                any = true;
            } else if row.blocks.is_empty()
                && let Some(mask) = row.mask
            {
                let kept = mask[inside.clone()].iter().filter(|flag| flag.get()).count();
                any |= kept > 0;
                all &= kept == inside.len();
            } else {
                for key in inside {
                    let keep = row.keeps(key, self.block_size);
                    any |= keep;
                    all &= keep;
                }
            }
        }
        (any, all)
    }

    /// Number of packed rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Whether row `row` attends key `key`.
    pub fn keeps(&self, row: usize, key: usize) -> bool {
        self.rows[row].keeps(key, self.block_size)
    }

    /// Writes `blank` over the scores that a partial visit must not see: `scores[k * key_step + row * row_step]`.
    pub fn mask<T: Real>(&self, visit: Visit, scores: &mut [T], key_step: usize, row_step: usize, blank: T) {
        for (r, row) in self.rows.iter().enumerate() {
            let simple = row.blocks.is_empty() && row.mask.is_none() && row.strided.is_none();
            for k in 0..visit.len {
                let key = visit.start + k;
                let keep = if simple { row.keys.contains(&key) } else { row.keeps(key, self.block_size) };
                if !keep {
                    scores[k * key_step + r * row_step] = blank;
                }
            }
        }
    }
}

fn selected_blocks(problem: &Problem<'_>, batch: usize, head: usize, query: usize) -> Vec<u64> {
    let Some(indices) = &problem.rules.block_indices else { return Vec::new() };
    let count = problem.size.keys.div_ceil(problem.rules.block_size);
    let mut bits = vec![0u64; count.div_ceil(64).max(1)];
    let index_head = head / (problem.size.query_heads / indices.shape()[1]);
    for slot in 0..indices.shape()[3] {
        // Numbers beyond the keys were refused by `Problem::new`; negative slots are unused.
        if let Ok(block) = usize::try_from(indices.integer(&[batch, index_head, query, slot])) {
            bits[block / 64] |= 1 << (block % 64);
        }
    }
    bits
}
