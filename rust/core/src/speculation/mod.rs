//! Exact verification of drafted tokens: nothing changes but the speed.
//!
//! Let p be the law that plain decoding samples from (after temperature, top-k and top-p) and q the law a drafted
//! token was really drawn from. A token x ~ q is kept with probability min(1, p(x) / q(x)); after the first refusal a
//! token is drawn from max(p - q, 0), renormalised, and after a chain without refusal one from the next p. The tokens
//! that leave are distributed exactly as p's (Leviathan et al. 2023, Chen et al. 2023).
//!
//! * [`mod@process`]: logits to law: [`process::Sampling`], [`process::Processor`];
//! * `select`: the k largest, and the nucleus, without sorting the vocabulary;
//! * [`sample`]: one token a row, batched, and the record of its law;
//! * [`proposal`]: the laws of drafted tokens, acceptance probabilities, residual laws;
//! * [`mod@verify`]: chains, and the run that uses all of it;
//! * [`scalars`]: the same in two steps, for which few numbers cross from one process to another;
//! * [`mod@law`]: sums and draws; `sparse`: laws as short lists of tokens; [`saguaro`]: reweighed drafts;
//! * [`outcomes`]: what a draft expects to follow, and where a token stands in that order;
//! * [`coupled`]: the other exact rule: target and draft race over the same numbers, and equal tokens are kept;
//! * [`cache`]: what was drafted ahead, by the outcome it was drafted for;
//! * [`drafts`]: drafts that are no model: n-grams and suffixes of the text;
//! * [`fanout`] and [`ranks`]: how many outcomes to guess at each place, and how well guesses hit, learnt online.
//!
//! Laws are non-negative weights with their total. Whoever draws from a law and whoever tests against it divide by
//! the same total, computed by the same function ([`law::total`]): then "the law it was drawn from" is meant to
//! the last bit, also for laws that were rounded to single precision.
//!
//! Random numbers are counted, not consumed: each is a function of (seed, request, position, purpose). A position's
//! accept coin, residual draw and target draw are each looked at in one round at most, namely the round in which that
//! position is decided; drafts beyond the first refusal are forgotten with their coins unseen. So numbers may be the
//! same in every round, whatever the rounds are, and the output does not depend on the row a request has in a batch.

pub mod cache;
pub mod coupled;
pub mod drafts;
pub mod fanout;
mod input;
pub mod law;
pub mod outcomes;
pub mod process;
pub mod proposal;
pub mod ranks;
pub mod saguaro;
pub mod sample;
pub mod scalars;
mod select;
mod sparse;
#[cfg(test)]
mod tests;
pub mod verify;

pub use cache::{Outcome, OutcomeCache};
pub use coupled::Races;
pub use input::{rules, saguaro_rules};
pub use law::Law;
pub use process::{Sampling, process};
pub use proposal::{Proposal, Proposals, acceptance, residual};
pub use ranks::RankCurve;
pub use saguaro::Saguaro;
pub use sample::{Record, Streams, sample_laws, sample_logits};
pub use sparse::SparseLaws;
pub use verify::{Chain, Chains, token_probabilities, verification_law, verify};
