//! The rounds' state machine: `handle` takes an event with its time and returns what to do.
//!
//! ```text
//! handle(now, event):
//!     check the numbers                    (an error changes nothing)
//!     the transition of this event         streams: here;  target: `target`, `miss`;  workers: `draft`
//!     drafts that are out of patience      -> what was drafted ahead of them, or fast
//!     if the target is free:               prefill what waits, or verify what is ready, and build ahead for it
//!     give back contents of no more use
//! ```
//! Liveness: while a stream is unfinished and not preempted, the target is busy, or a worker was asked, in which case
//! [`Rounds::next_deadline`] says when to give up on it.

mod check;
mod draft;
mod miss;
mod target;
#[cfg(test)]
mod tests;

use super::choose::{Known, Plan, Worth};
use super::event::{BatchId, Command, Event, Handle, Reason, Row, StreamId, WorkerId};
use super::handles::Ledger;
use super::latency::Latency;
use super::learn::Learner;
use super::pace::Pace;
use super::settings::Settings;
use super::stats::{Cause, Stats};
use super::stream::{Chain, State, Stream};
use super::workers::Workers;
use crate::error::Result;
use crate::speculation::cache::{Outcome, OutcomeCache};
use std::collections::BTreeMap;

/// A cached continuation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cached {
    length: u32,
    handle: Handle,
    /// See [`Entry::ended`].
    ended: bool,
}

/// What the target is doing.
#[derive(Debug, Clone, Default)]
struct Target {
    /// Prefills that are out: stream and its life.
    prefills: Vec<(StreamId, u64)>,
    /// The verification that is out.
    batch: Option<Batch>,
    /// Whether the last thing it did was to prefill: then it is verification's turn.
    prefilled: bool,
    /// Since when it is free.
    free_since: f64,
}

#[derive(Debug, Clone)]
struct Batch {
    id: BatchId,
    /// The rows, each with its stream's life.
    rows: Vec<(Row, u64)>,
}

impl Target {
    fn is_busy(&self) -> bool {
        self.batch.is_some() || !self.prefills.is_empty()
    }
}

/// The state machine. A clone goes its own way from the same state: enumerations use that.
#[derive(Debug, Clone)]
pub struct Rounds {
    settings: Settings,
    now: f64,
    streams: BTreeMap<StreamId, Stream>,
    workers: Workers,
    target: Target,
    cache: OutcomeCache<Cached>,
    ledger: Ledger,
    latency: Latency,
    learner: Learner,
    plan: Plan,
    /// For how many rows and workers the plan was made, and in which batch.
    planned: (usize, usize, u64),
    stats: Stats,
    /// Where the rounds of the next stream start: beyond those of all that finished.
    floor: u64,
    lives: u64,
    turns: u64,
    batches: BatchId,
    plans: u64,
    pace: Pace,
    /// Until when ready rows wait for others.
    hold: Option<f64>,
    out: Vec<Command>,
}

impl Rounds {
    /// A machine without streams. Workers count from the event that says they run.
    ///
    /// # Errors
    /// Settings out of their ranges.
    pub fn new(settings: Settings) -> Result<Self> {
        settings.check()?;
        let (workers, length, budget) = (settings.workers, settings.draft_length, settings.budget);
        Ok(Self {
            settings,
            now: 0.0,
            streams: BTreeMap::new(),
            workers: Workers::new(workers),
            target: Target::default(),
            cache: OutcomeCache::new(),
            ledger: Ledger::default(),
            latency: Latency::default(),
            learner: Learner::default(),
            plan: Plan { length, budget, fast: length, rate: 0.0, critical: 0.0 },
            planned: (0, 0, 0),
            stats: Stats::default(),
            floor: 0,
            lives: 0,
            turns: 0,
            batches: 0,
            plans: 0,
            pace: Pace::default(),
            hold: None,
            out: Vec::new(),
        })
    }

    /// Takes an event at time `now` (seconds from any origin; a clock that goes back counts as standing still) and
    /// returns the commands, in the order in which they are to be carried out.
    ///
    /// # Errors
    /// Numbers that cannot be: the state is as before. Events that come late, twice or out of nowhere are no errors:
    /// they are counted and ignored.
    pub fn handle(&mut self, now: f64, event: Event) -> Result<Vec<Command>> {
        self.check(now, &event)?;
        self.now = self.now.max(now);
        match event {
            Event::Join { stream, limit } => self.join(stream, limit),
            Event::Abort { stream } => self.abort(stream),
            Event::Preempt { stream } => self.preempt(stream),
            Event::Resume { stream } => self.resume(stream),
            Event::Prefilled { stream, finished, token, fast } => self.prefilled(stream, finished, token, fast),
            Event::Fast { stream, round, length } => self.fast(stream, round, length),
            Event::Verified { batch, seconds, rows } => self.verified(batch, seconds, &rows),
            Event::Opened { worker, stream } => self.opened(worker, stream),
            Event::Entries { worker, stream, round, entries } => self.entries(worker, stream, round, &entries),
            Event::Built { worker, stream, round, seconds, steps, branches } => {
                self.built(worker, stream, round, seconds, steps, branches);
            }
            Event::Drafted { worker, stream, round, length, handle, seconds, held } => {
                self.drafted(worker, stream, round, length, handle, seconds, held);
            }
            Event::Rank { worker, stream, round, rank } => self.rank(worker, stream, round, rank),
            Event::WorkerReady { worker } => self.worker_ready(worker),
            Event::WorkerLost { worker } => self.worker_lost(worker),
            Event::Tick => {}
        }
        self.expire();
        self.pump();
        let handles = self.ledger.take_trash();
        if !handles.is_empty() {
            self.out.push(Command::Discard { handles });
        }
        Ok(std::mem::take(&mut self.out))
    }

    /// When to send a tick if nothing else happens before.
    pub fn next_deadline(&self) -> Option<f64> {
        let waits = self.streams.values().filter_map(|stream| match stream.state {
            State::Opening { deadline, .. } | State::Awaiting { deadline, .. } => Some(deadline),
            _ => None,
        });
        waits.chain(self.hold).min_by(f64::total_cmp)
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// What is chosen now.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What drafting a token is worth now.
    pub fn worth(&self) -> Worth {
        self.known(self.rows()).worth(&self.plan)
    }

    /// What was learnt about times.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// What was learnt about acceptance and guesses.
    pub fn learner(&self) -> &Learner {
        &self.learner
    }

    /// Streams that are not finished.
    pub fn active(&self) -> usize {
        self.streams.len()
    }

    /// The round that a stream is in, or waits for.
    pub fn round_of(&self, stream: StreamId) -> Option<u64> {
        self.streams.get(&stream).map(|stream| stream.round)
    }

    /// The worker that drafts for a stream.
    pub fn worker_of(&self, stream: StreamId) -> Option<WorkerId> {
        self.streams.get(&stream).and_then(|stream| stream.worker)
    }

    /// Workers that are there.
    pub fn workers(&self) -> usize {
        self.workers.count()
    }

    /// What the machine was told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Contents that the driver keeps for the machine.
    pub fn held(&self) -> usize {
        self.ledger.held()
    }

    fn ignore(&mut self) {
        self.stats.ignored += 1;
    }

    fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    /// Gives a content back that was drafted for nothing.
    fn waste(&mut self, handle: Option<Handle>) {
        if let Some(handle) = handle {
            self.stats.discarded += u64::from(self.ledger.free(handle));
        }
    }

    fn waste_all(&mut self, entries: Vec<Cached>) {
        for entry in entries {
            self.waste(Some(entry.handle));
        }
    }

    /// What the choices know, for `rows` rows.
    fn known(&self, rows: usize) -> Known<'_> {
        let workers = self.workers.count();
        let rows = (rows.max(1) as f64).min(f64::from(self.settings.max_batch));
        Known {
            latency: &self.latency,
            learner: &self.learner,
            settings: &self.settings,
            rows,
            per_worker: if workers == 0 { 0.0 } else { rows / workers as f64 },
            pace: self.pace.of(rows as usize),
        }
    }

    /// How long a draft of `want` tokens is expected to take, and how long it is waited for.
    fn waits(&self, want: u32) -> (f64, f64) {
        if !self.latency.drafts_known() {
            let patience = self.settings.patience.unwrap_or(5.0);
            return (patience, patience);
        }
        let expected = self.latency.fallback(f64::from(want));
        let measured = 8.0 * expected + 2.0 * self.latency.verify(1.0, 1.0) + 0.02;
        (expected, self.settings.patience.unwrap_or(measured))
    }

    fn join(&mut self, id: StreamId, limit: u64) {
        if self.streams.contains_key(&id) {
            return self.ignore();
        }
        self.lives += 1;
        let mut stream = Stream::new(id, self.lives, limit, self.floor);
        self.assign(&mut stream);
        self.streams.insert(id, stream);
    }

    fn abort(&mut self, id: StreamId) {
        if self.streams.contains_key(&id) {
            self.finish(id, Reason::Aborted);
        } else {
            self.ignore();
        }
    }

    /// Preempted: the chain, the guesses and the worker's context are dropped; a verification that is out still counts.
    fn preempt(&mut self, id: StreamId) {
        if self.streams.get(&id).is_none_or(|stream| stream.state == State::Paused) {
            return self.ignore();
        }
        self.drop_work(id);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.state = State::Paused;
        }
    }

    fn resume(&mut self, id: StreamId) {
        let Some(mut stream) = self.streams.remove(&id) else { return self.ignore() };
        if stream.state == State::Paused {
            stream.state = State::Waiting;
            stream.cause = Cause::Start;
            self.assign(&mut stream);
        } else {
            self.ignore();
        }
        self.streams.insert(id, stream);
    }

    /// Gives the stream a worker, if there is one and drafts are wanted.
    fn assign(&mut self, stream: &mut Stream) {
        if self.settings.draft_length == 0 || stream.worker.is_some() {
            return;
        }
        stream.worker = self.workers.assign();
        stream.opened = false;
        if let Some(worker) = stream.worker {
            self.out.push(Command::Open { worker, stream: stream.id });
        }
    }

    /// Everything that was made ahead for the stream goes, its place at the worker too.
    fn drop_work(&mut self, id: StreamId) {
        let Some(mut stream) = self.streams.remove(&id) else { return };
        match &stream.state {
            State::Ready { chain, .. } => self.waste(chain.handle),
            State::Awaiting { partial, .. } => self.waste(partial.map(|(_, handle)| handle)),
            // The target is reading the chain: it is given back when the verification is over.
            State::Verifying { .. } | State::Waiting | State::Prefilling | State::Opening { .. } | State::Paused => {}
        }
        let entries = self.cache.forget(id);
        self.waste_all(entries);
        if let Some(worker) = stream.worker.take() {
            self.leave(&mut stream, worker);
        }
        self.streams.insert(id, stream);
    }

    /// The stream leaves a worker that is there.
    fn leave(&mut self, stream: &mut Stream, worker: WorkerId) {
        if let Some(build) = stream.build.take() {
            self.out.push(Command::Stop { worker, stream: stream.id, round: build.round });
        }
        self.out.push(Command::Forget { worker, stream: stream.id });
        self.workers.release(worker);
        stream.opened = false;
    }

    fn finish(&mut self, id: StreamId, reason: Reason) {
        self.drop_work(id);
        if let Some(stream) = self.streams.remove(&id) {
            // A verification or a prefill that is out belongs to a round that must not come again either.
            self.floor = self.floor.max(stream.round + 1);
            self.stats.finished += 1;
            self.out.push(Command::Finish { stream: id, reason });
        }
    }

    /// Puts a chain in front of the target.
    fn make_ready(&mut self, id: StreamId, chain: Chain) {
        let turn = self.turn();
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.state = State::Ready { chain, turn };
        }
    }

    /// The key of a stream's outcome.
    fn key(stream: StreamId, round: u64, accepted: u32, token: u32) -> Outcome {
        Outcome { stream, round, accepted, token }
    }
}
