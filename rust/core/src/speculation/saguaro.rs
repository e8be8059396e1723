//! Saguaro weights: a draft that draws its own favourites less often, so that the target's corrections are among them.
//!
//! The cache holds the draft's favourite tokens as guesses of what the target puts in place of a refused token. That one
//! comes from max(p - q, 0), where little is left on what the draft likes. Multiplying q on its `fan_out` most probable
//! tokens by a constant C in [0, 1] (before the token is drawn, then renormalised) moves the residual onto exactly these:
//! more hits, bought with a change in acceptance. Verification against the modified q stays exact for every C.
//!
//! Source: Kumar, Dao, May, "Speculative Speculative Decoding" (2026), Definition 14.

use super::law::{Law, heaviest, total};
use crate::error::{Error, Result};

/// How a row's law is reweighed before a token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saguaro {
    constant: f64,
    fan_out: usize,
}

impl Saguaro {
    /// No change.
    pub const OFF: Self = Self { constant: 1.0, fan_out: 0 };

    /// A checked rule; `row` names it in errors.
    ///
    /// # Errors
    /// A constant outside [0, 1], a negative fan-out.
    pub fn new(row: usize, constant: f64, fan_out: i64) -> Result<Self> {
        if !(0.0..=1.0).contains(&constant) {
            return Err(Error::value(&format!("saguaro[{row}]"), "a number in [0, 1]", constant)
                .hint("1 leaves the law as it is, 0 never draws the fan_out most probable tokens"));
        }
        let Ok(fan_out) = usize::try_from(fan_out) else {
            return Err(Error::value(&format!("fan_out[{row}]"), "an integer >= 0", fan_out));
        };
        Ok(Self { constant, fan_out })
    }

    /// How many tokens it looks at.
    pub(super) fn reach(self) -> usize {
        if self.constant < 1.0 { self.fan_out } else { 0 }
    }
}

impl Law {
    /// Multiplies the most probable tokens (ties: lower ids) by the constant. Where nothing would be left (C = 0 and no
    /// other token has a probability), the law stays: that is its limit for C -> 0.
    pub(super) fn reweigh(&mut self, saguaro: Saguaro, buffer: &mut Vec<f64>) {
        if saguaro.reach() == 0 {
            return;
        }
        let favourites = heaviest(&self.weights, saguaro.fan_out, buffer);
        let others = self.weights.iter().filter(|weight| **weight > 0.0).count() - favourites.len();
        if others == 0 {
            return; // all are multiplied by the same number
        }
        for index in favourites {
            self.weights[index] *= saguaro.constant;
        }
        self.total = total(&self.weights);
    }
}
