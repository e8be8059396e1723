//! What the simulated models say: three levels of fidelity, one interface.
//!
//! * [`Coins`]: each token is accepted with a probability by place, a guess hits with a probability;
//! * [`Ranks`]: the true token's rank among the guesses follows a curve, another after fast chains (Markov);
//! * [`super::toy`]: tables of p and q, drafted and verified for real.

use super::toy::{Content, Toy};

/// A rank curve to draw from.
#[derive(Debug, Clone, PartialEq)]
pub enum Curve {
    /// F guesses miss with probability F^(-r), for F >= 1.
    Power(f64),
    /// hit(1), hit(2), ...: measured; beyond the last nothing is gained.
    Measured(Vec<f64>),
}

impl Curve {
    /// The rank at which the cumulative probability passes `number`; none if it never does.
    fn rank(&self, number: f64) -> Option<u32> {
        match self {
            // number < 1 - F^(-r)  iff  F > (1 - number)^(-1/r)
            Curve::Power(exponent) => {
                let guesses = (1.0 - number).powf(-1.0 / exponent).floor() + 1.0;
                (guesses < 1e6).then(|| guesses as u32 - 1)
            }
            Curve::Measured(hits) => hits.iter().position(|hit| number < *hit).map(|rank| rank as u32),
        }
    }
}

/// Acceptance by place; the last counts for all that follow.
#[derive(Debug, Clone, PartialEq)]
pub struct Places(pub Vec<f64>);

impl Places {
    fn at(&self, place: u32) -> f64 {
        self.0.get(place as usize).or(self.0.last()).copied().unwrap_or(0.0)
    }
}

/// Acceptance, and whether the true token is among the guesses.
#[derive(Debug, Clone, PartialEq)]
pub struct Coins {
    /// Of the model's chains, and of fast ones.
    pub acceptance: [Places; 2],
    /// P(hit) after a chain of the model, and after a fast one.
    pub hit: [f64; 2],
}

/// Acceptance, and the rank of the true token.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranks {
    /// Of the model's chains, and of fast ones.
    pub acceptance: [Places; 2],
    /// After a chain of the model, and after a fast one.
    pub curves: [Curve; 2],
}

/// A token process.
#[derive(Debug, Clone, PartialEq)]
pub enum Process {
    /// Coins for acceptance and for hits.
    Coins(Coins),
    /// Coins for acceptance, ranks for guesses.
    Ranks(Ranks),
    /// Models of few tokens.
    Toy(Toy),
}

/// How a verification comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Truth {
    /// Tokens accepted.
    pub accepted: u32,
    /// The token after them.
    pub token: u32,
    /// Its rank among the guesses there, for processes that draw ranks; for coins 0 (hit) or none.
    pub rank: Option<u32>,
}

/// The token that stands for the true one where there are no real tokens; guesses that miss are others.
pub const TRUE_TOKEN: u32 = 0;

impl Process {
    /// Verifies a chain; `fast`: of the fast draft. `number(i)` are independent uniform numbers.
    pub fn verify(
        &self,
        context: &[u32],
        chain: &Content,
        length: u32,
        fast: bool,
        number: &mut impl FnMut() -> f64,
    ) -> Truth {
        let class = usize::from(fast);
        match self {
            Process::Coins(Coins { acceptance, hit }) => {
                let accepted = run(&acceptance[class], length, number);
                let rank = (number() < hit[class]).then_some(0);
                Truth { accepted, token: TRUE_TOKEN, rank }
            }
            Process::Ranks(Ranks { acceptance, curves }) => {
                let accepted = run(&acceptance[class], length, number);
                Truth { accepted, token: TRUE_TOKEN, rank: curves[class].rank(number()) }
            }
            Process::Toy(toy) => toy.verify(context, chain, length, number),
        }
    }
}

fn run(places: &Places, length: u32, number: &mut impl FnMut() -> f64) -> u32 {
    (0..length).find(|&place| number() >= places.at(place)).unwrap_or(length)
}
