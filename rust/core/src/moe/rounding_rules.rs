//! How many tokens an expert should get: the six rules of token rounding (SonicMoE, arXiv 2512.14080, section 5).

use crate::rng::{Purpose, uniform};

/// A rule for choosing between the two multiples of the tile around an expert's count. An expert whose count is a
/// multiple already keeps it under every rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// NR-f: the nearer multiple; half a tile goes down.
    Nearest,
    /// SR-f: up with probability (count mod tile) / tile, so that the expected count is the count.
    Stochastic,
    /// NR-s: up with the probability that the scores of the last tile's chosen tokens have in all of its scores.
    NearestScore,
    /// Balance-f: expert after expert, whichever keeps the sum of all changes nearer to 0; ties go down.
    Balance,
    /// Always the upper multiple.
    Up,
    /// Always the lower one: dropping tokens.
    Down,
}

/// A rounding: the tile, the rule, and the random numbers of the two rules that draw.
#[derive(Debug, Clone, Copy)]
pub struct Rounding {
    /// Rows of a tile; at least 1.
    pub tile: usize,
    /// How to choose.
    pub rule: Rule,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which of many roundings with one seed this is (a microbatch, say).
    pub step: u64,
}

/// The two counts that an expert may get; `up` stops at the number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    pub down: usize,
    pub up: usize,
}

impl Rounding {
    pub(super) fn choice(&self, count: usize, tokens: usize) -> Choice {
        let down = count / self.tile * self.tile;
        let up = if down == count { count } else { down.saturating_add(self.tile).min(tokens) };
        Choice { down, up }
    }

    /// The uniform number of an expert.
    pub(super) fn coin(&self, expert: usize) -> f64 {
        uniform(self.seed, expert as u32, self.step, Purpose::Round)
    }

    /// The target of every expert; `None` where the scores decide.
    pub(super) fn targets(&self, counts: &[usize], tokens: usize) -> Vec<Option<usize>> {
        let mut drift = 0i128;
        let mut target = |(expert, &count): (usize, &usize)| {
            let Choice { down, up } = self.choice(count, tokens);
            if down == count {
                return Some(count);
            }
            let over = count - down; // the distance to an upper multiple that is not clipped is tile - over
            let rise = match self.rule {
                Rule::Nearest => self.tile - over < over,
                Rule::Stochastic => self.coin(expert) * (self.tile as f64) < over as f64,
                Rule::NearestScore => return None,
                Rule::Balance => {
                    let (more, less) = (up as i128 - count as i128, -(over as i128));
                    let rise = (drift + more).abs() < (drift + less).abs();
                    drift += if rise { more } else { less };
                    rise
                }
                Rule::Up => true,
                Rule::Down => false,
            };
            Some(if rise { up } else { down })
        };
        counts.iter().enumerate().map(&mut target).collect()
    }
}
