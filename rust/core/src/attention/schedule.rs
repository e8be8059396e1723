//! The block schedule of one tile: which key ranges its rows visit, in ascending order, and which of them need a mask.

use super::blocks::Blocks;
use super::problem::Problem;
use super::tile::Tile;
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
    /// By the fixed rules, some row does not attend some key of it.
    pub partial: bool,
    /// Keys of it that the mask program decides on: the first one's place, and how many.
    pub program: (usize, usize),
}

impl Visit {
    /// Its keys.
    pub fn keys(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// The keys that the mask program decides on.
    pub fn asked(&self) -> Range<usize> {
        self.start + self.program.0..self.start + self.program.0 + self.program.1
    }

    /// Some row may not attend some key of it.
    pub fn is_masked(&self) -> bool {
        self.partial || self.program.1 > 0
    }
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
            && (self.blocks.is_empty() || selected(&self.blocks, key / block_size))
            && self.mask.is_none_or(|mask| mask[key].get())
            && self.strided.is_none_or(|mask| mask.at(0, key).get())
    }

    /// Causality and window alone.
    fn is_simple(&self) -> bool {
        self.blocks.is_empty() && self.mask.is_none() && self.strided.is_none()
    }
}

fn selected(bits: &[u64], block: usize) -> bool {
    bits[block / 64] >> (block % 64) & 1 == 1
}

/// The schedule of a tile.
pub struct Schedule<'a> {
    rows: Vec<Row<'a>>,
    block_size: usize,
    /// Blocks of a block mask whose edges are inside a unit: a visit then takes keys of a neighbour along.
    listed: Vec<u64>,
    listed_size: usize,
    keys: usize,
    step: usize,
    unit: usize,
    /// Ranges in ascending order.
    pub visits: Vec<Visit>,
}

impl<'a> Schedule<'a> {
    /// Plans a tile; ranges hold at most `step` keys and start on multiples of `unit`. `program`: there is a mask program.
    pub fn new(problem: &Problem<'a>, tile: &Tile, step: usize, unit: usize, program: bool) -> Self {
        let (rules, sequence) = (&problem.rules, tile.of(problem));
        let row = |lane: usize| {
            let (query, head) = tile.at(lane);
            let line = problem.mask(sequence.query_batch, head).map(|mask| mask.part(query..query + 1, 0..mask.cols()));
            let adjacent = line.and_then(|line| line.row(0));
            Row {
                keys: sequence.range(query, rules.causal, rules.left, rules.right),
                mask: adjacent,
                strided: if adjacent.is_none() { line } else { None },
                blocks: selected_blocks(problem, sequence.query_batch, head, query),
            }
        };
        let rows: Vec<_> = (0..tile.count).map(row).collect();
        let mut schedule = Self {
            rows,
            block_size: rules.block_size,
            listed: Vec::new(),
            listed_size: 0,
            keys: sequence.keys,
            step,
            unit,
            visits: Vec::new(),
        };
        let low = schedule.rows.iter().filter(|row| !row.keys.is_empty()).map(|row| row.keys.start).min().unwrap_or(0);
        let high = schedule.rows.iter().map(|row| row.keys.end).max().unwrap_or(0);
        if let Some(blocks) = &problem.blocks {
            schedule.follow(blocks, tile, low..high, program);
        } else if rules.block_indices.is_some() {
            let words = schedule.rows.first().map_or(0, |row| row.blocks.len());
            for block in 0..words * 64 {
                if schedule.rows.iter().any(|row| selected(&row.blocks, block)) {
                    let (start, end) = (block * rules.block_size, (block + 1) * rules.block_size);
                    schedule.cut(start.max(low)..end.min(high), program);
                }
            }
        } else {
            schedule.cut(low..high, program);
        }
        schedule
    }

    /// Visits what a block mask lists; neighbours of one kind are visited together.
    fn follow(&mut self, blocks: &Blocks, tile: &Tile, bounds: Range<usize>, program: bool) {
        let (query, head) = tile.at(0);
        let entries = blocks.of(tile.sequence, head, query / blocks.query_block);
        let size = blocks.key_block;
        if !size.is_multiple_of(self.unit) {
            self.listed_size = size;
            self.listed = vec![0; (self.keys / size + 64) / 64 + 1];
            for entry in entries.iter().filter(|entry| entry.block * size < self.keys) {
                self.listed[entry.block / 64] |= 1 << (entry.block % 64);
            }
        }
        let mut at = 0;
        while at < entries.len() {
            let first = entries[at];
            let mut count = 1;
            while entries.get(at + count).is_some_and(|e| e.block == first.block + count && e.full == first.full) {
                count += 1;
            }
            let start = (first.block * size).max(bounds.start);
            let end = ((first.block + count) * size).min(bounds.end);
            // A unit that two blocks share is visited once, so the program then decides on all of them.
            self.cut(start..end.max(start), program && (!first.full || !self.listed.is_empty()));
            at += count;
        }
    }

    /// Cuts a range into visits, leaving out those that no row attends.
    fn cut(&mut self, range: Range<usize>, program: bool) {
        if range.is_empty() {
            return;
        }
        // Whole units: the neighbours that come along are under the mask. What the last visit took is not taken again.
        let taken = self.visits.last().map_or(0, |last| last.start + last.len);
        let mut start = (range.start / self.unit * self.unit).max(taken);
        let end = range.end.next_multiple_of(self.unit).min(self.keys);
        while start < end {
            let len = self.step.min(end - start);
            let mut visit = Visit { start, len, partial: false, program: (0, if program { len } else { 0 }) };
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
            if row.is_simple() && self.listed.is_empty() {
                any = true;
            } else if row.blocks.is_empty()
                && self.listed.is_empty()
                && let Some(mask) = row.mask
            {
                let kept = mask[inside.clone()].iter().filter(|flag| flag.get()).count();
                any |= kept > 0;
                all &= kept == inside.len();
            } else {
                for key in inside {
                    let keep = self.row_keeps(row, key);
                    any |= keep;
                    all &= keep;
                }
            }
        }
        (any, all)
    }

    fn row_keeps(&self, row: &Row<'_>, key: usize) -> bool {
        row.keeps(key, self.block_size) && (self.listed.is_empty() || selected(&self.listed, key / self.listed_size))
    }

    /// Writes `blank` over the scores that a partial visit must not see: `scores[k * key_step + row * row_step]`.
    pub fn mask<T: Real>(&self, visit: Visit, scores: &mut [T], key_step: usize, row_step: usize, blank: T) {
        if self.listed.is_empty() && row_step == 1 && self.rows.iter().all(Row::is_simple) {
            return self.mask_ranges(visit, scores, key_step, blank);
        }
        for (r, row) in self.rows.iter().enumerate() {
            for k in 0..visit.len {
                if !self.row_keeps(row, visit.start + k) {
                    scores[k * key_step + r * row_step] = blank;
                }
            }
        }
    }

    /// [`mask`](Self::mask) where each row attends a range: by key, skipping keys that all rows attend.
    fn mask_ranges<T: Real>(&self, visit: Visit, scores: &mut [T], key_step: usize, blank: T) {
        let starts = self.rows.iter().map(|row| row.keys.start).max().unwrap_or(0);
        let ends = self.rows.iter().map(|row| row.keys.end).min().unwrap_or(0);
        for k in 0..visit.len {
            let key = visit.start + k;
            if key >= starts && key < ends {
                continue;
            }
            for (score, row) in scores[k * key_step..].iter_mut().zip(&self.rows) {
                if key < row.keys.start || key >= row.keys.end {
                    *score = blank;
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
