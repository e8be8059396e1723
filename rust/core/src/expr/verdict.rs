//! Is a block of a mask empty, full or partial? By interval bounds first, then exactly where they cannot tell.

use super::bind::Bound;
use super::bounds::{Region, Span, spans};
use super::tile::{Evaluator, Side};
use crate::arch::lanes::{FloatLane, Mask, Operand};
use std::ops::Range;

/// What a mask says about a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No element is attended.
    Empty,
    /// Every element is.
    Full,
    /// Some are, or (where exact evaluation was not asked for) nobody knows.
    Partial,
}

/// A classifier of one thread.
pub struct Classifier<'p, 'a, T> {
    bound: &'p Bound<'a, T>,
    spans: Vec<Span>,
    evaluator: Evaluator<'p, 'a, T>,
    block: Vec<T>,
    heads: Vec<usize>,
    queries: Vec<usize>,
}

/// Elements that exact evaluation looks at before it asks whether both truth values were seen.
const STRIP: usize = 1 << 12;

impl<'p, 'a, T: FloatLane> Classifier<'p, 'a, T> {
    /// A classifier of a mask program.
    pub fn new(bound: &'p Bound<'a, T>) -> Self {
        assert!(bound.program.is_mask(), "verdicts are of masks");
        let evaluator = Evaluator::new(bound);
        Self { bound, spans: Vec::new(), evaluator, block: Vec::new(), heads: Vec::new(), queries: Vec::new() }
    }

    /// The verdict of a block; without `exact`, of its bounds alone. No range may be empty.
    pub fn classify(&mut self, region: &Region, exact: bool) -> Verdict {
        let bound = self.bound;
        let gather = |node: &super::graph::Node, indices: &[Span]| match bound.extremes(node.bits as usize) {
            Some(extremes) => rounded::<T>(extremes.over(indices)),
            None => Span::all(node.class),
        };
        spans(bound.program.nodes(), region, gather, T::rounded, &mut self.spans);
        match self.spans[bound.program.result as usize] {
            Span::Bool { no: true, yes: false } => Verdict::Empty,
            Span::Bool { no: false, yes: true } => Verdict::Full,
            _ if exact => self.evaluate(region),
            _ => Verdict::Partial,
        }
    }

    fn evaluate(&mut self, region: &Region) -> Verdict {
        let (mut no, mut yes) = (false, false);
        for batch in region.batch.clone() {
            for head in region.heads.clone() {
                self.look(batch, head, &region.queries, &region.keys, &mut no, &mut yes);
                if no && yes {
                    return Verdict::Partial;
                }
            }
        }
        if yes { Verdict::Full } else { Verdict::Empty }
    }

    fn look(
        &mut self,
        batch: usize,
        head: usize,
        queries: &Range<usize>,
        keys: &Range<usize>,
        no: &mut bool,
        yes: &mut bool,
    ) {
        // Narrow strips of keys, so that wide blocks do not need long registers.
        let width = keys.len().min(256);
        let rows = (STRIP / width).clamp(1, queries.len());
        self.heads.clear();
        self.heads.resize(rows, head);
        self.block.resize(rows * width, T::ZERO);
        for first in keys.clone().step_by(width) {
            let strip = first..(first + width).min(keys.end);
            self.evaluator.lanes(batch, Side::Keys(strip.clone()));
            for row in queries.clone().step_by(rows) {
                self.queries.clear();
                self.queries.extend(row..(row + rows).min(queries.end));
                let side = Side::Queries { heads: &self.heads[..self.queries.len()], queries: &self.queries };
                self.evaluator.truths(side, strip.len(), &mut self.block, |mask, _| {
                    // Words of ones or zeros: what all share, and what any has.
                    let (all, any) = match mask {
                        Operand::Slice(mask) => {
                            mask.iter().fold((Mask::MAX, 0), |(all, any), &word| (all & word, any | word))
                        }
                        Operand::Splat(word) => (word, word),
                    };
                    *no |= all == 0;
                    *yes |= any != 0;
                    !(*no && *yes)
                });
                if *no && *yes {
                    return;
                }
            }
        }
    }
}

fn rounded<T: FloatLane>(span: Span) -> Span {
    match span {
        Span::Float { low, high, nan } => Span::Float { low: T::rounded(low), high: T::rounded(high), nan },
        other => other,
    }
}
