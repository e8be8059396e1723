//! What goes into the rounds' state machine, and what comes out.
//!
//! A *stream* is one sequence that is being generated. A *round* is one answer of the target to it: round after round is
//! either a prefill (the prompt was read and the first token emitted; outcome: nothing accepted, that token) or the
//! verification of a chain. Rounds of a stream never repeat, also not where its number is used again. Contents (tokens,
//! laws) are the driver's; here they are *handles*: numbers that the driver chose, one for one content, never reused.

/// A sequence that is being generated.
pub type StreamId = u32;
/// A draft worker, below the number that the settings name.
pub type WorkerId = u32;
/// A content that the driver keeps.
pub type Handle = u64;
/// A verification that was asked for.
pub type BatchId = u64;

/// Where the chain of a round comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Drafted ahead for exactly this outcome: a hit.
    Cached,
    /// Drafted by a worker after the outcome was known.
    Drafted,
    /// The driver's own draft without delay (n-grams); only the driver knows its length.
    Fast,
    /// No chain: one plain step.
    Empty,
}

impl Source {
    /// All of them, in the order of [`Source::index`].
    pub const ALL: [Source; 4] = [Source::Cached, Source::Drafted, Source::Fast, Source::Empty];

    /// The name that commands carry.
    pub fn name(self) -> &'static str {
        match self {
            Source::Cached => "cached",
            Source::Drafted => "drafted",
            Source::Fast => "fast",
            Source::Empty => "none",
        }
    }

    /// A number below 4, for tables.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Whether the draft model drafted it: what it accepts and how well its bonus is guessed differ from the others'.
    pub fn is_model(self) -> bool {
        matches!(self, Source::Cached | Source::Drafted)
    }
}

/// What a verification found out about one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The row's stream.
    pub stream: StreamId,
    /// Drafted tokens that were accepted.
    pub accepted: u32,
    /// The token that follows them.
    pub token: u32,
    /// Tokens that reached the output: accepted + 1, fewer only where the stream finished.
    pub emitted: u32,
    /// End of sequence, a stop string: nothing more is wanted.
    pub finished: bool,
    /// Tokens of the driver's own draft that would be kept now, as far as it can tell from the text so far.
    pub fast: Option<f64>,
}

/// A guessed outcome with the continuation that was drafted for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Of the outcome.
    pub accepted: u32,
    /// Of the outcome.
    pub token: u32,
    /// Drafted tokens. Where the output's law depends on the drafts' (rejection), the number must not depend on other
    /// drafts of the same positions; where equal tokens are kept (coupled) it may depend on anything.
    pub length: u32,
    /// The content.
    pub handle: Handle,
    /// Drafting ended by itself: more tokens than these are not worth waiting for.
    pub ended: bool,
}

/// Something that happened. Fields are the words of the module's first lines.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A stream of at most `limit` tokens starts.
    Join { stream: StreamId, limit: u64 },
    /// Nobody wants it any more.
    Abort { stream: StreamId },
    /// It has to give its place up for a while.
    Preempt { stream: StreamId },
    /// It may go on.
    Resume { stream: StreamId },
    /// The target has read the prompt (and what was generated before a preemption) and emitted one token; `token` is
    /// needed where it was guessed, `fast` is as in [`Verdict`].
    Prefilled { stream: StreamId, finished: bool, token: Option<u32>, fast: Option<f64> },
    /// The worker has the stream's context.
    Opened { worker: WorkerId, stream: StreamId },
    /// How long the chain of this round came out: the driver's own (at most as long as was asked for), or one of the
    /// model's with the driver's own tokens behind it (where equal tokens are kept, so that this biases nothing).
    Fast { stream: StreamId, round: u64, length: u32 },
    /// A verification is over; `seconds` is how long the target was busy.
    Verified { batch: BatchId, seconds: f64, rows: Vec<Verdict> },
    /// Guessed outcomes of a round that is being verified, with continuations.
    Entries { worker: WorkerId, stream: StreamId, round: u64, entries: Vec<Entry> },
    /// A build is over, complete or stopped, after `steps` forwards over `branches` branches.
    Built { worker: WorkerId, stream: StreamId, round: u64, seconds: f64, steps: u32, branches: u32 },
    /// The answer to [`Command::Draft`]; `held` tokens of it were drafted before the command came.
    Drafted { worker: WorkerId, stream: StreamId, round: u64, length: u32, handle: Handle, seconds: f64, held: u32 },
    /// Where the true token stood among the draft's guesses at the accepted length (0: first).
    Rank { worker: WorkerId, stream: StreamId, round: u64, rank: Option<u32> },
    /// The worker runs.
    WorkerReady { worker: WorkerId },
    /// The worker is gone, and all it knew.
    WorkerLost { worker: WorkerId },
    /// Time has passed.
    Tick,
}

/// One row of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Whose chain it is.
    pub stream: StreamId,
    /// The round that is verified.
    pub round: u64,
    /// Where the chain comes from.
    pub source: Source,
    /// The chain; none for the sources that have no content here.
    pub handle: Option<Handle>,
    /// Tokens of the chain to verify (of a longer one, the first); for fast chains the most that is allowed.
    pub length: u32,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// As many tokens as were asked for.
    Limit,
    /// The driver said so.
    Stopped,
    /// Aborted.
    Aborted,
}

impl Reason {
    /// The name that commands carry.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Limit => "limit",
            Reason::Stopped => "stopped",
            Reason::Aborted => "aborted",
        }
    }
}

/// Something to do. Fields are the words of the module's first lines.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The target reads the prompt.
    Prefill { stream: StreamId },
    /// The worker reads the stream's committed tokens.
    Open { worker: WorkerId, stream: StreamId },
    /// The target verifies these rows together.
    Verify { batch: BatchId, rows: Vec<Row> },
    /// Guess the outcomes of this round, `fan_out[k]` tokens after k accepted ones, and draft `depth` tokens for each.
    Build {
        worker: WorkerId,
        stream: StreamId,
        round: u64,
        source: Source,
        handle: Option<Handle>,
        fan_out: Vec<u32>,
        depth: u32,
    },
    /// The round came out like this: send a chain for the next (go on with the branch if there is one). `token` is
    /// absent after a prefill: the driver knows it.
    Draft { worker: WorkerId, stream: StreamId, round: u64, accepted: u32, token: Option<u32>, length: u32 },
    /// The round came out like this; `handle` is the entry that is used now, if one is.
    Outcome { worker: WorkerId, stream: StreamId, round: u64, accepted: u32, token: u32, handle: Option<Handle> },
    /// The build of this round is of no use any more.
    Stop { worker: WorkerId, stream: StreamId, round: u64 },
    /// Drop the stream's context.
    Forget { worker: WorkerId, stream: StreamId },
    /// Contents that will never be used (again).
    Discard { handles: Vec<Handle> },
    /// The stream is over.
    Finish { stream: StreamId, reason: Reason },
}
