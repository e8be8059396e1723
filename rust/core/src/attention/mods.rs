//! The programs of a problem (score_mod, mask_mod) bound to its arrays, and the worker that evaluates them for a thread.
//!
//! Programs count queries and keys from the start of their sequence; `batch` is the sequence's number.

use super::problem::Problem;
use super::schedule::Visit;
use super::tile::Tile;
use crate::arch::lanes::FloatLane;
use crate::dtype::Real;
use crate::error::Result;
use crate::expr::{Bound, CaptureGradient, Classifier, Evaluator, Extents, Program, Region, Side, Verdict};
use crate::view::Array;
use std::ops::Range;

/// A program and what it captured.
#[derive(Debug, Clone)]
pub struct Mod<'a> {
    /// The program.
    pub program: Program,
    /// Its captures.
    pub captures: Vec<Array<'a>>,
}

impl<'a> Mod<'a> {
    fn bind<T: FloatLane>(&self, name: &str, program: &Program, problem: &Problem<'a>) -> Result<Bound<'a, T>> {
        let longest = |length: fn(&super::sequence::Sequence) -> usize| problem.sequences.iter().map(length).max();
        let extents = Extents {
            batch: problem.sequences.len(),
            heads: problem.size.query_heads,
            queries: longest(|sequence| sequence.queries).unwrap_or(0),
            keys: longest(|sequence| sequence.keys).unwrap_or(0),
        };
        Bound::new(name, program, self.captures.clone(), extents)
    }
}

/// Bound programs.
pub struct Mods<'a, T> {
    score: Option<Bound<'a, T>>,
    mask: Option<Bound<'a, T>>,
    gradient: Option<Bound<'a, T>>,
}

impl<'a, T: FloatLane> Mods<'a, T> {
    /// Binds them; with `wanted`, the gradient too, by the score and by the captures that are wanted.
    ///
    /// # Errors
    /// Captures that do not fit their program.
    pub fn bind(problem: &Problem<'a>, wanted: Option<&[bool]>) -> Result<Self> {
        let (score, mask) = (problem.rules.score_mod.as_ref(), problem.rules.mask_mod.as_ref());
        let gradient = score.zip(wanted).map(|(score, wanted)| {
            let program = score.program.gradient()?.wanting(wanted);
            score.bind("score_mod", &program, problem)
        });
        Ok(Self {
            score: score.map(|score| score.bind("score_mod", &score.program, problem)).transpose()?,
            mask: mask.map(|mask| mask.bind("mask_mod", &mask.program, problem)).transpose()?,
            gradient: gradient.transpose()?,
        })
    }

    /// Whether scores are modified.
    pub fn has_score(&self) -> bool {
        self.score.is_some()
    }

    /// Whether a program decides who attends what.
    pub fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// What one thread evaluates with.
    pub fn worker(&self) -> Worker<'_, 'a, T> {
        Worker {
            score: self.score.as_ref().map(Evaluator::new),
            mask: self.mask.as_ref().map(Evaluator::new),
            gradient: self.gradient.as_ref().map(Evaluator::new),
            classifier: self.mask.as_ref().map(Classifier::new),
            heads: Vec::new(),
            queries: Vec::new(),
        }
    }

    /// What went wrong while programs were evaluated: an index outside its capture.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<()> {
        [&self.score, &self.mask, &self.gradient]
            .into_iter()
            .flatten()
            .find_map(Bound::out_of_range)
            .map_or(Ok(()), Err)
    }
}

/// Parts of a visit that are asked about, and the fewest keys in one: asking must cost less than computing them.
const PARTS: usize = 4;
const TRIMMED: usize = 16;

/// Evaluates the programs for the tiles of one thread.
pub struct Worker<'m, 'a, T> {
    score: Option<Evaluator<'m, 'a, T>>,
    mask: Option<Evaluator<'m, 'a, T>>,
    gradient: Option<Evaluator<'m, 'a, T>>,
    classifier: Option<Classifier<'m, 'a, T>>,
    heads: Vec<usize>,
    queries: Vec<usize>,
}

impl<T: FloatLane> Worker<'_, '_, T> {
    fn is_idle(&self) -> bool {
        self.score.is_none() && self.mask.is_none()
    }

    fn list(&mut self, tile: &Tile) {
        self.heads.clear();
        self.queries.clear();
        for lane in 0..tile.count {
            let (query, head) = tile.at(lane);
            self.heads.push(head);
            self.queries.push(query);
        }
    }

    /// Makes a tile's queries the lanes of the blocks that follow.
    pub fn tile(&mut self, tile: &Tile) {
        if self.is_idle() {
            return;
        }
        self.list(tile);
        let Self { score, mask, gradient, heads, queries, .. } = self;
        for evaluator in [score, mask, gradient].into_iter().flatten() {
            evaluator.lanes(tile.sequence, Side::Queries { heads, queries });
        }
    }

    /// Leaves out visits that the mask program empties, frees those that it leaves whole, and of the others cuts empty
    /// ends off and finds the keys that it must be evaluated for, by bounds alone. What is left starts on a multiple of
    /// `unit`.
    pub fn prune(&mut self, tile: &Tile, visits: &mut Vec<Visit>, unit: usize) {
        let Some(classifier) = &mut self.classifier else { return };
        let (first, last) = (tile.at(0).0, tile.at(tile.count - 1).0);
        let heads = tile.head..tile.head + tile.pack;
        let mut region =
            Region { batch: tile.sequence..tile.sequence + 1, heads, queries: first..last + 1, keys: 0..0 };
        visits.retain_mut(|visit| {
            if visit.program.1 == 0 {
                return true;
            }
            let mut look = |keys: Range<usize>| {
                region.keys = keys;
                classifier.classify(&region, false)
            };
            let end = visit.start + visit.len;
            match look(visit.start..end) {
                Verdict::Empty => return false,
                Verdict::Full => visit.program = (0, 0),
                Verdict::Partial => {
                    let part = visit.len.div_ceil(PARTS).next_multiple_of(unit).max(TRIMMED);
                    let bounds = |i: usize| visit.start + i * part..end.min(visit.start + (i + 1) * part);
                    let count = visit.len.div_ceil(part);
                    let verdicts: [Verdict; PARTS] =
                        std::array::from_fn(|i| if i < count { look(bounds(i)) } else { Verdict::Empty });
                    let range = |keep: fn(&Verdict) -> bool| {
                        let first = verdicts.iter().position(keep)?;
                        Some(bounds(first).start..bounds(verdicts.iter().rposition(keep)?).end)
                    };
                    // Empty parts between others are asked about, as partial ones are.
                    let Some(kept) = range(|verdict| *verdict != Verdict::Empty) else { return false };
                    let inside = |i: usize| bounds(i).start >= kept.start && bounds(i).end <= kept.end;
                    let mut asked = (0..count).filter(|&i| inside(i) && verdicts[i] != Verdict::Full);
                    let first = asked.next();
                    let last = asked.next_back().or(first);
                    let asked = first.zip(last).map_or(0..0, |(first, last)| bounds(first).start..bounds(last).end);
                    visit.program = (asked.start.saturating_sub(kept.start), asked.len());
                    (visit.start, visit.len) = (kept.start, kept.len());
                }
            }
            true
        });
    }

    /// Modifies scaled scores [keys, width].
    pub fn score(&mut self, keys: Range<usize>, block: &mut [T], width: usize) {
        if let Some(score) = &mut self.score {
            score.score(Side::Keys(keys), block, width);
        }
    }

    /// Blanks what the mask program hides in [keys, width].
    pub fn mask(&mut self, keys: Range<usize>, block: &mut [T], width: usize, blank: T) {
        if let Some(mask) = &mut self.mask {
            mask.mask(Side::Keys(keys), block, width, blank);
        }
    }

    /// As [`score`](Self::score), for rows of keys [queries of the tile, width].
    pub fn score_rows(&mut self, tile: &Tile, keys: Range<usize>, block: &mut [T], width: usize) {
        self.list(tile);
        let Self { score: Some(score), heads, queries, .. } = self else { return };
        score.lanes(tile.sequence, Side::Keys(keys));
        score.score(Side::Queries { heads, queries }, block, width);
    }

    /// As [`mask`](Self::mask), for rows of keys [queries of the tile, width].
    pub fn mask_rows(&mut self, tile: &Tile, keys: Range<usize>, block: &mut [T], width: usize, blank: T) {
        self.list(tile);
        let Self { mask: Some(mask), heads, queries, .. } = self else { return };
        mask.lanes(tile.sequence, Side::Keys(keys));
        mask.mask(Side::Queries { heads, queries }, block, width, blank);
    }

    /// Slopes by the modified scores to slopes by the scores [keys, width]; adds to the gradients of captures.
    pub fn gradient(
        &mut self,
        keys: Range<usize>,
        scores: &[T],
        slopes: &mut [T],
        width: usize,
        captures: &mut [Option<&mut CaptureGradient<T>>],
    ) {
        if let Some(gradient) = &mut self.gradient {
            gradient.gradient(Side::Keys(keys), scores, slopes, width, captures);
        }
    }
}

/// A score that stands for those of weight 0, whose slopes are 0 whatever the derivative is, as long as it is finite.
pub fn harmless<T: Real>() -> T {
    T::of(0.8125)
}
