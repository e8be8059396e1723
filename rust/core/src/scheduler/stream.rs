//! One stream: where it is, and what it carries from round to round.
//!
//! ```text
//! join -> Waiting -> Prefilling -> Opening ----------------> Ready -> Verifying -+-> (hit, fast, none) Ready
//!            ^                        \-> Awaiting -> Ready                      +-> (miss) Awaiting -> Ready
//!            +------- resume ------- Paused <- preempt from anywhere             +-> finished
//! ```

use super::event::{BatchId, Handle, Row, Source, StreamId, WorkerId};
use super::learn::{Acceptance, CLASSES, Class, Learner};
use super::stats::Cause;

/// A chain that is ready to be verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// Where it comes from.
    pub source: Source,
    /// Its content, where that is not the driver's own.
    pub handle: Option<Handle>,
    /// Its tokens (fast: the most there may be).
    pub length: u32,
    /// The draft ended it: it is shorter than was asked for.
    pub ended: bool,
}

impl Chain {
    /// No chain: a plain step.
    pub const EMPTY: Chain = Chain { source: Source::Empty, handle: None, length: 0, ended: false };

    /// The class of estimates it belongs to.
    pub fn class(&self) -> Class {
        match self.source {
            Source::Cached => Class::Model,
            Source::Drafted => Class::Drafted,
            Source::Fast | Source::Empty => Class::Fast,
        }
    }
}

/// Where a stream is. `since`: when that began; `deadline`: when to go on without; `expected`: seconds.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Wants a prefill.
    Waiting,
    /// The target reads its prompt.
    Prefilling,
    /// Has its first token; the worker is still reading the prompt.
    Opening { since: f64, deadline: f64 },
    /// Has a chain; `turn` orders streams by when they got it.
    Ready { chain: Chain, turn: u64 },
    /// Is being verified.
    Verifying { chain: Chain, batch: BatchId },
    /// A worker was asked for `want` tokens; `partial` is what was drafted ahead of them, in case they do not come.
    Awaiting { since: f64, deadline: f64, want: u32, partial: Option<(u32, Handle)>, expected: f64 },
    /// Preempted.
    Paused,
}

/// A build that a worker is (thought to be) working on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Build {
    /// Of this round's outcomes.
    pub round: u64,
    /// When it was asked for.
    pub since: f64,
    /// Tokens ahead.
    pub depth: u32,
    /// Guesses.
    pub branches: u32,
}

/// How a round came out, kept for what is reported about it later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Past {
    /// The round.
    pub round: u64,
    /// Tokens accepted.
    pub accepted: u32,
    /// The token that followed; absent after a prefill.
    pub token: Option<u32>,
    /// Length of the chain.
    pub length: u32,
    /// Class of the chain.
    pub class: Class,
    /// Whether it was a prefill.
    pub prompt: bool,
    /// Whether its rank was learnt already.
    pub ranked: bool,
}

/// How many rounds back a rank may come late.
const PAST: usize = 4;

/// One stream.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Its number.
    pub id: StreamId,
    /// Tells it from others of its number.
    pub life: u64,
    /// Tokens wanted.
    pub limit: u64,
    /// Tokens emitted.
    pub emitted: u64,
    /// The round that is verified, or will be next.
    pub round: u64,
    /// Where it is.
    pub state: State,
    /// Who drafts for it.
    pub worker: Option<WorkerId>,
    /// Whether that worker has its context.
    pub opened: bool,
    /// What that worker builds.
    pub build: Option<Build>,
    /// The last outcomes, newest last.
    pub past: Vec<Past>,
    /// What is accepted of its chains.
    pub acceptance: [Acceptance; CLASSES],
    /// Whether the last lookup hit; none before there was one.
    pub hit: Option<bool>,
    /// Tokens that the driver expects of its own draft after the last outcome, if it can tell.
    pub expects: Option<f64>,
    /// Length of the chain in verification, if the driver said it.
    pub fast: Option<u32>,
    /// What it waited for last, for the account of the target's idle time.
    pub cause: Cause,
}

impl Stream {
    /// A stream that joins; its rounds start at `round`.
    pub fn new(id: StreamId, life: u64, limit: u64, round: u64) -> Self {
        Self {
            id,
            life,
            limit,
            emitted: 0,
            round,
            state: State::Waiting,
            worker: None,
            opened: false,
            build: None,
            past: Vec::new(),
            acceptance: Learner::stream(),
            hit: None,
            expects: None,
            fast: None,
            cause: Cause::Start,
        }
    }

    /// Tokens that may still be emitted.
    pub fn remaining(&self) -> u64 {
        self.limit - self.emitted
    }

    /// Most drafted tokens of the next chain: one more token follows any chain, and nothing may pass the limit.
    pub fn most(&self) -> u32 {
        u32::try_from(self.remaining().saturating_sub(1)).unwrap_or(u32::MAX)
    }

    /// Tokens of this row's chain that the target verifies, after what the driver said of them.
    pub fn verified_length(&self, row: &Row) -> u32 {
        let Some(told) = self.fast else { return row.length };
        if row.source.is_model() { told.clamp(row.length, self.most().max(row.length)) } else { told.min(row.length) }
    }

    /// Notes how the present round came out and starts the next.
    pub fn close_prompt(&mut self, token: Option<u32>) {
        self.close_round(0, token, &Chain::EMPTY, 0);
        if let Some(past) = self.past.last_mut() {
            past.prompt = true;
        }
    }

    /// The same after a verification.
    pub fn close_round(&mut self, accepted: u32, token: Option<u32>, chain: &Chain, length: u32) {
        if self.past.len() == PAST {
            self.past.remove(0);
        }
        let ranked = token.is_none();
        self.past.push(Past {
            round: self.round,
            accepted,
            token,
            length,
            class: chain.class(),
            prompt: false,
            ranked,
        });
        self.round += 1;
        self.fast = None;
    }

    /// The outcome that the next chain follows.
    pub fn last(&self) -> Option<&Past> {
        self.past.last()
    }
}
