//! Counters, always on.

use super::event::Source;

/// Why the target had nothing to verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// No stream wanted anything.
    Idle,
    /// A stream started: its worker was reading the prompt, or drafting the first chain.
    Start,
    /// A miss: the draft model drafted.
    Miss,
    /// A hit whose branch was not long enough: it was finished.
    Late,
}

impl Cause {
    /// All of them.
    pub const ALL: [Cause; 4] = [Cause::Idle, Cause::Start, Cause::Miss, Cause::Late];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Idle => "idle",
            Cause::Start => "start",
            Cause::Miss => "miss",
            Cause::Late => "late",
        }
    }
}

/// What happened so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Verified rows (rounds that were verifications).
    pub rounds: u64,
    /// Verifications (batches).
    pub batches: u64,
    /// Prefills.
    pub prefills: u64,
    /// Tokens emitted, the first ones of prefills included.
    pub tokens: u64,
    /// Streams that finished.
    pub finished: u64,
    /// Drafted tokens that were verified, and how many of them were accepted.
    pub drafted: u64,
    /// Of `drafted`.
    pub accepted: u64,
    /// Rounds and emitted tokens by source of the chain.
    pub by_source: [(u64, u64); 4],
    /// `histogram[k]`: rounds with k accepted tokens.
    pub histogram: Vec<u64>,
    /// Lookups in the cache and hits, by what the lookup before it was: a hit, a miss, or none.
    pub lookups: [u64; 3],
    /// Of `lookups`.
    pub hits: [u64; 3],
    /// Hits that were shorter than wanted: used as they were, finished first.
    pub short_used: u64,
    /// See `short_used`.
    pub short_finished: u64,
    /// Entries that arrived after their outcome was known and were used all the same.
    pub late_hits: u64,
    /// Misses that the draft model answered, and that the fast draft did.
    pub neural: u64,
    /// See `neural`.
    pub fast: u64,
    /// Drafts that did not come in time.
    pub timeouts: u64,
    /// Workers that were lost.
    pub lost_workers: u64,
    /// Builds asked for, and branches of them.
    pub builds: u64,
    /// See `builds`.
    pub branches: u64,
    /// Drafted tokens that were never verified.
    pub discarded: u64,
    /// Stale, second or unknown events.
    pub ignored: u64,
    /// Seconds the target was busy verifying.
    pub busy: f64,
    /// Seconds the target could have verified and did not, by cause.
    pub waits: [f64; 4],
}

impl Stats {
    /// One row came out.
    pub fn round(&mut self, source: Source, length: u32, accepted: u32, emitted: u32) {
        self.rounds += 1;
        self.tokens += u64::from(emitted);
        self.drafted += u64::from(length);
        self.accepted += u64::from(accepted);
        let (rounds, tokens) = &mut self.by_source[source.index()];
        *rounds += 1;
        *tokens += u64::from(emitted);
        let k = accepted as usize;
        if self.histogram.len() <= k {
            self.histogram.resize(k + 1, 0);
        }
        self.histogram[k] += 1;
    }

    /// One lookup.
    pub fn lookup(&mut self, before: Option<bool>, hit: bool) {
        let place = match before {
            Some(true) => 0,
            Some(false) => 1,
            None => 2,
        };
        self.lookups[place] += 1;
        self.hits[place] += u64::from(hit);
    }
}
