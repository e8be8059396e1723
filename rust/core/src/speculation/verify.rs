//! Chains of drafted tokens: how probable each acceptance is, what follows a refusal, and the run that uses both.
//!
//! ```text
//! for i in 0..K:  accept x_i  iff  u_i < min(1, p_i(x_i) / q_i(x_i))      u_i at (request, position + i, Accept)
//!     refused: one token of max(p_i - q_i, 0), renormalised                  at (request, position + i, Residual)
//! none refused: one token of p_K                                             at (request, position + K, Target)
//! ```
//! [`Chain`] holds the probabilities and the laws; [`Chain::run`] adds the uniform numbers. Enumerations call the
//! same methods that the run calls, so what they prove is proved of what runs. Greedy rows need no rule of their own:
//! at temperature 0 the law is one token, so a draft is accepted iff it is that token.
//!
//! Where the run is not the text above:
//! 1. A coin needs p_i(x_i) alone, that is, one exponential and the sum of all. The sum is first taken roughly, in single
//!    precision with a proven bound; where the coin lies between the bounds the exact sum decides. So what is decided is
//!    what the exact law decides, always, and 99.99 % of the rows cost a quarter of an exact one.
//! 2. A law is written out at one place of a row, where the round ends, and lessened there by the draft's in place.
//! 3. A draft's law may be a list of a few tokens; then only these are looked at.
//!
//! The floor of a round from float32 logits is to read them once: 8 rows, 8 places and 131072 tokens are 33.6 MB. Largest
//! element and rough sum read a row twice, the second time from the second-level cache; the rough sum is some 20
//! operations of 32 bits a logit, the exact one 36 of 64 bits.

use super::input::{Results, fill, floating, lengths_of, logit, shaped};
use super::law::Law;
use super::process::{Processor, SERIAL, Sampling};
use super::proposal::{Proposal, Proposals, acceptance, lessen, residual};
use super::sample::{Streams, laws_dtype, tokens_out};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rng::Purpose;
use crate::threads;
use crate::view::{Array, ArrayMut};

/// A checked batch of drafted chains.
#[derive(Debug)]
pub struct Chains<'a> {
    tokens: Array<'a>,
    lengths: Vec<usize>,
    laws: Proposals<'a>,
    logits: Array<'a>,
    rules: Vec<Sampling>,
    strict: bool,
}

impl<'a> Chains<'a> {
    /// Checks ranks, extents and types, `lengths` and the rules; values are checked row by row when they are used.
    ///
    /// * `tokens [B, K]`: drafted ids (int32 or int64); `lengths [B]`: how many of a row's K are drafted (absent: K);
    /// * `laws`: the law each was drawn from, `[B, K, V]` or lists `[B, K, m]`;
    /// * `logits [B, K + 1, V]`: the target's, row i for the token at the place of `tokens[:, i]`; `rules`: one a row;
    /// * `strict`: check every drafted position, also those after the first refusal, and refuse tokens whose q is 0.
    ///
    /// # Errors
    /// Wrong ranks, extents or types; lengths outside [0, K].
    pub fn new(
        tokens: Array<'a>,
        lengths: Option<&Array<'_>>,
        laws: impl Into<Proposals<'a>>,
        logits: Array<'a>,
        rules: Vec<Sampling>,
        strict: bool,
    ) -> Result<Self> {
        let laws = laws.into();
        shaped("draft_tokens", &tokens, "[B, K]", &[Some(rules.len()), None])?;
        if !matches!(tokens.dtype(), Dtype::I32 | Dtype::I64) {
            return Err(Error::dtype("draft_tokens", "int32 or int64", tokens.dtype()));
        }
        let [rows, depth] = [tokens.shape()[0], tokens.shape()[1]];
        floating("logits", &logits)?;
        let axes = format!("[B = {rows}, K + 1 = {}, V >= 1], for draft_tokens [{rows}, {depth}]", depth + 1);
        shaped("logits", &logits, &axes, &[Some(rows), Some(depth + 1), None])?;
        let vocabulary = logits.shape()[2];
        if vocabulary == 0 {
            return Err(Error::shape("logits", axes, logits.shape()));
        }
        match &laws {
            Proposals::Points => {}
            Proposals::Dense(laws) => {
                laws_dtype("draft_laws", laws)?;
                let axes = format!("[B = {rows}, K = {depth}, V = {vocabulary}], the vocabulary of logits");
                shaped("draft_laws", laws, &axes, &[Some(rows), Some(depth), Some(vocabulary)]).map_err(|error| {
                    error.hint("a draft with another vocabulary must be mapped to the target's (missing tokens: 0)")
                })?;
            }
            Proposals::Sparse(laws) => laws.shaped(&[rows, depth])?,
        }
        let lengths = lengths_of(lengths, rows, depth)?;
        Ok(Self { tokens, lengths, laws, logits, rules, strict })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rules.len()
    }

    /// The chain of one row.
    pub fn chain(&self, row: usize) -> Chain<'_, 'a> {
        Chain { batch: self, row }
    }

    fn serial(&self) -> bool {
        self.logits.len() < SERIAL
    }
}

/// Buffers of one thread, and what was computed last.
#[derive(Debug, Default)]
pub struct Scratch {
    processor: Processor,
    /// Row and position that `target` belongs to.
    at: Option<(usize, usize)>,
    target: Law,
    residual: Law,
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'b, 'a> {
    batch: &'b Chains<'a>,
    row: usize,
}

impl<'a> Chain<'_, 'a> {
    /// Number of drafted tokens.
    pub fn length(&self) -> usize {
        self.batch.lengths[self.row]
    }

    /// A drafted token.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub fn token(&self, i: usize) -> Result<usize> {
        let at = [self.row, i];
        let id = match self.batch.tokens.dtype() {
            Dtype::I32 => i64::from(self.batch.tokens.get::<i32>(&at)),
            _ => self.batch.tokens.get::<i64>(&at),
        };
        let vocabulary = self.batch.logits.shape()[2];
        match usize::try_from(id) {
            Ok(token) if token < vocabulary => Ok(token),
            _ => Err(Error::value(
                &format!("draft_tokens[{}, {i}]", self.row),
                format!("a token id in [0, V = {vocabulary})"),
                id,
            )
            .hint("say with draft_lengths how many tokens of a row are drafted")),
        }
    }

    /// The law a drafted token came from.
    ///
    /// # Errors
    /// Rows that are not laws; where `strict`, a law that gives the drafted token nothing.
    pub fn proposal(&self, i: usize) -> Result<Proposal<'a>> {
        let vocabulary = self.batch.logits.shape()[2];
        self.batch.laws.at(&[self.row, i], self.token(i)?, vocabulary, self.batch.strict)
    }

    /// The target's probability of drafted token i, given that all before it were accepted.
    ///
    /// # Errors
    /// Bad values at position i.
    pub fn probability(&self, i: usize, scratch: &mut Scratch) -> Result<f64> {
        Ok(self.bounds(i, scratch, false)?.0)
    }

    /// Bounds of that probability, equal unless `rough`.
    fn bounds(&self, i: usize, scratch: &mut Scratch, rough: bool) -> Result<(f64, f64)> {
        let (token, at) = (self.token(i)?, [self.row, i]);
        // A law cut by top-k or top-p is made; of a plain one the sum is enough.
        if scratch.at != Some((self.row, i))
            && let Some(law) = scratch.processor.softmax(&self.batch.logits, &at, self.batch.rules[self.row], rough)?
        {
            return Ok(law.probability(logit(&self.batch.logits, &[self.row, i, token])));
        }
        self.target(i, scratch)?;
        let exact = scratch.target.probability(token);
        Ok((exact, exact))
    }

    /// Whether drafted token i is accepted at a uniform number: `uniform < acceptance(i)`. A rough sum decides nearly
    /// always; where it could be wrong, the exact one does, so the answer has nothing rough about it.
    fn accepts(&self, i: usize, scratch: &mut Scratch, uniform: f64) -> Result<bool> {
        let proposal = self.proposal(i)?;
        let q = proposal.probability(proposal.token);
        let (least, most) = self.bounds(i, scratch, true)?;
        let (surely, perhaps) = (uniform < acceptance(least, q), uniform < acceptance(most, q));
        if surely == perhaps {
            return Ok(surely);
        }
        Ok(uniform < acceptance(self.probability(i, scratch)?, q))
    }

    fn target(&self, i: usize, scratch: &mut Scratch) -> Result<()> {
        if scratch.at != Some((self.row, i)) {
            scratch.at = None;
            let sampling = self.batch.rules[self.row];
            scratch.processor.law(&self.batch.logits, &[self.row, i], sampling, &mut scratch.target)?;
            scratch.at = Some((self.row, i));
        }
        Ok(())
    }

    /// The probability that drafted token i is accepted, given that all before it were.
    ///
    /// # Errors
    /// Bad values at position i.
    pub fn acceptance(&self, i: usize, scratch: &mut Scratch) -> Result<f64> {
        let proposal = self.proposal(i)?;
        Ok(acceptance(self.probability(i, scratch)?, proposal.probability(proposal.token)))
    }

    /// The law of the token that ends the round after i acceptances: the residual after a refusal of token i, or the
    /// target's law after a whole chain. `scratch` must not serve another batch.
    ///
    /// # Errors
    /// Bad values at position i.
    pub fn correction<'s>(&self, i: usize, scratch: &'s mut Scratch) -> Result<&'s Law> {
        self.target(i, scratch)?;
        if i == self.length() {
            return Ok(&scratch.target);
        }
        residual(&scratch.target, &self.proposal(i)?, &mut scratch.residual);
        Ok(&scratch.residual)
    }

    /// One round: the number of accepted tokens and the token that follows them. `uniform(i, purpose)` is the random
    /// number of the token at place i.
    ///
    /// # Errors
    /// Bad values at the positions that are visited; where `strict`, at any.
    pub fn run(&self, scratch: &mut Scratch, uniform: impl Fn(usize, Purpose) -> f64) -> Result<(usize, usize)> {
        let length = self.length();
        let mut accepted = 0;
        while accepted < length && self.accepts(accepted, scratch, uniform(accepted, Purpose::Accept))? {
            accepted += 1;
        }
        self.target(accepted, scratch)?;
        let token = if accepted < length {
            let proposal = self.proposal(accepted)?;
            // In place: a law is a megabyte. What is left is no longer the target's.
            scratch.at = None;
            if !lessen(&mut scratch.target, &proposal) {
                self.target(accepted, scratch)?;
            }
            scratch.at = None;
            scratch.target.draw(uniform(accepted, Purpose::Residual))
        } else {
            scratch.target.draw(uniform(accepted, Purpose::Target))
        };
        if self.batch.strict {
            for i in accepted + 1..=length {
                scratch.processor.check(&self.batch.logits, &[self.row, i])?;
                if i < length {
                    self.proposal(i)?;
                }
            }
        }
        Ok((accepted, token))
    }
}

/// One round for every row: `accepted [B]` (int32) and the token that follows, `next [B]` (int64).
///
/// # Errors
/// Bad values (the lowest row's error), or outputs of a wrong shape or type.
pub fn verify(chains: &Chains<'_>, streams: &Streams, accepted: ArrayMut<'_>, next: ArrayMut<'_>) -> Result<()> {
    let rows = chains.rows();
    tokens_out(&next, rows)?;
    if accepted.shape() != [rows] || accepted.dtype() != Dtype::I32 {
        return Err(Error::shape("accepted", format!("[{rows}] of int32"), accepted.shape()));
    }
    let results = Results::new(rows);
    threads::for_each(rows, chains.serial(), Scratch::default, |row, scratch| {
        results.put(row, chains.chain(row).run(scratch, |i, purpose| streams.uniform(row, i, purpose)));
    })?;
    let results = results.collect()?;
    fill(accepted, results.iter().map(|&(count, _)| count as i32));
    fill(next, results.iter().map(|&(_, token)| token as i64));
    Ok(())
}

/// The target's probability of every drafted token, `out [B, K]` (float64; 0 beyond a row's length): what
/// [`accept`](super::scalars::accept) takes.
///
/// # Errors
/// Bad values, at any position; an output of a wrong shape or type.
pub fn token_probabilities(chains: &Chains<'_>, out: ArrayMut<'_>) -> Result<()> {
    let [rows, depth] = [chains.tokens.shape()[0], chains.tokens.shape()[1]];
    if out.shape() != [rows, depth] || out.dtype() != Dtype::F64 {
        return Err(Error::shape("out", format!("[{rows}, {depth}] of float64"), out.shape()));
    }
    if rows * depth == 0 {
        return Ok(());
    }
    let places = Results::new(rows * depth);
    threads::for_each(rows * depth, chains.serial(), Scratch::default, |task, scratch| {
        let (chain, i) = (chains.chain(task / depth), task % depth);
        places.put(task, if i < chain.length() { chain.probability(i, scratch) } else { Ok(0.0) });
    })?;
    let (values, out) = (places.collect()?, out.rows::<f64>());
    for (row, values) in values.chunks(depth).enumerate() {
        out.take(row).copy_from_slice(values);
    }
    Ok(())
}

/// What [`verify`] draws from, for every row: `probabilities [B, K]`, that of accepting token i after all before it,
/// and `corrections [B, K + 1, V]`, the law of the token that follows i acceptances (both float64; 0 beyond a row's
/// length).
///
/// # Errors
/// As [`verify`].
pub fn verification_law(chains: &Chains<'_>, probabilities: ArrayMut<'_>, corrections: ArrayMut<'_>) -> Result<()> {
    let [rows, depth] = [chains.tokens.shape()[0], chains.tokens.shape()[1]];
    for (name, out, shape) in
        [("probabilities", &probabilities, &[rows, depth][..]), ("corrections", &corrections, chains.logits.shape())]
    {
        if out.shape() != shape || out.dtype() != Dtype::F64 {
            return Err(Error::shape(name, format!("{shape:?} of float64"), out.shape()));
        }
    }
    let (probabilities, corrections) = (probabilities.rows::<f64>(), corrections.rows::<f64>());
    let results = Results::new(rows);
    threads::for_each(rows, chains.serial(), Scratch::default, |row, scratch| {
        let chain = chains.chain(row);
        let accept = if depth > 0 { probabilities.take(row) } else { &mut [] };
        let mut work = || -> Result<()> {
            for i in 0..=depth {
                let correction = corrections.take(row * (depth + 1) + i);
                if i < chain.length() {
                    accept[i] = chain.acceptance(i, scratch)?;
                } else if i < depth {
                    accept[i] = 0.0;
                }
                if i <= chain.length() {
                    chain.correction(i, scratch)?.write(correction);
                } else {
                    correction.fill(0.0);
                }
            }
            Ok(())
        };
        results.put(row, work());
    })?;
    results.collect().map(|_: Vec<()>| ())
}
