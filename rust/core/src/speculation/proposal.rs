//! The two formulas of verification, and the draft's side of them: the probability of keeping a drafted token, the law of
//! what replaces a refused one, and the laws that tokens were drafted from.

use super::law::{Law, total};
use super::sample::Row;
use super::sparse::{List, SparseLaws};
use crate::error::{Error, Result};
use crate::view::Array;

/// The probability of keeping a token that the draft's law gives q and the target's p.
///
/// q = 0 says that the record is not the law the token came from; where that is let through, it is the limit of a
/// vanishing q.
pub fn acceptance(p: f64, q: f64) -> f64 {
    if p >= q && p > 0.0 {
        1.0
    } else if p > 0.0 {
        p / q
    } else {
        0.0
    }
}

/// The law a drafted token came from.
#[derive(Debug, Clone, Copy)]
pub struct Proposal<'a> {
    /// The token that was drawn.
    pub(super) token: usize,
    pub(super) kind: Kind<'a>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Kind<'a> {
    /// All mass on the token: the draft is a function of the prefix (n-grams, greedy drafts).
    Point,
    /// Probabilities, and their sum.
    Row(Row<'a>, f64),
    /// Probabilities of a few tokens.
    List(List<'a>),
}

impl Proposal<'_> {
    /// q(token).
    pub fn probability(&self, token: usize) -> f64 {
        match &self.kind {
            Kind::Point => f64::from(u8::from(token == self.token)),
            Kind::Row(row, total) => row.get(token) / total,
            Kind::List(list) => list.get(token) / list.total(),
        }
    }
}

/// The laws of a batch of drafted tokens.
#[derive(Debug, Clone)]
pub enum Proposals<'a> {
    /// Each token is a function of what came before it.
    Points,
    /// A probability for every token of the vocabulary (float32 or float64).
    Dense(Array<'a>),
    /// Probabilities of a few tokens; those of all others are 0.
    Sparse(SparseLaws<'a>),
}

impl<'a> From<Option<Array<'a>>> for Proposals<'a> {
    fn from(laws: Option<Array<'a>>) -> Self {
        laws.map_or(Proposals::Points, Proposals::Dense)
    }
}

impl<'a> Proposals<'a> {
    /// The law that `token` was drawn from, at `at`.
    ///
    /// # Errors
    /// Rows that are not laws; where `strict`, a law that gives the token nothing.
    pub(super) fn at(&self, at: &[usize], token: usize, vocabulary: usize, strict: bool) -> Result<Proposal<'a>> {
        let kind = match self {
            Proposals::Points => Kind::Point,
            Proposals::Dense(laws) => {
                let row = Row::new(laws, at);
                Kind::Row(row, row.total("draft_laws", at)?)
            }
            Proposals::Sparse(laws) => Kind::List(laws.list(at, vocabulary)?),
        };
        let proposal = Proposal { token, kind };
        if strict && proposal.probability(token) == 0.0 {
            let at: Vec<_> = at.iter().map(usize::to_string).collect();
            return Err(Error::value(
                &format!("draft_laws[{}]", at.join(", ")),
                format!("a positive probability for the drafted token {token}"),
                0,
            )
            .hint("pass the law the token was drawn from, or strict=False if it underflowed"));
        }
        Ok(proposal)
    }
}

/// `out` becomes the law of the token that replaces a refused one: max(p - q, 0), renormalised. Without any mass (p equals
/// q to rounding, so a refusal was itself a rounding accident) it becomes p.
pub fn residual(p: &Law, q: &Proposal<'_>, out: &mut Law) {
    p.copy_to(out);
    if !lessen(out, q) {
        p.copy_to(out);
    }
}

/// Makes the residual of p in place; false: nothing is left.
///
/// Both laws are weights and totals; the subtraction happens on p's scale, p.total * (p - q), so nothing is divided.
pub(super) fn lessen(law: &mut Law, q: &Proposal<'_>) -> bool {
    let (all, own) = (law.total, law.probability(q.token));
    match &q.kind {
        Kind::Point => law.take_off(q.token, all),
        Kind::List(list) => {
            let scale = all / list.total();
            list.iter().for_each(|(token, weight)| law.take_off(token, weight * scale));
        }
        Kind::Row(row, total) => row.take_from(law, all / total),
    }
    // By definition; rounding of the scale must not leave a crumb to a token that can be refused.
    if own < q.probability(q.token) {
        law.take_off(q.token, all);
    }
    law.total = total(&law.weights);
    law.total > 0.0
}
