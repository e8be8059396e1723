//! The workers' side: contexts, entries, drafts on demand, and what to do without them.

use super::{Cached, Rounds};
use crate::scheduler::event::{Command, Entry, Handle, Row, Source, StreamId, WorkerId};
use crate::scheduler::handles::Arrival;
use crate::scheduler::learn::Class;
use crate::scheduler::stats::Cause;
use crate::scheduler::stream::{Chain, State};

impl Rounds {
    /// Asks the stream's worker for a chain after the last outcome.
    pub(super) fn ask(&mut self, id: StreamId, want: u32, partial: Option<(u32, Handle)>, cause: Cause) {
        let (expected, patience) = self.waits(want - partial.map_or(0, |(length, _)| length.min(want)));
        let now = self.now;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (Some(worker), Some(past)) = (stream.worker, stream.last().copied()) else { return self.spare(id) };
        stream.build = None; // the worker leaves its build for this
        stream.cause = cause;
        stream.state = State::Awaiting { since: now, deadline: now + patience, want, partial, expected };
        let (round, accepted, token) = (past.round, past.accepted, past.token);
        self.out.push(Command::Draft { worker, stream: id, round, accepted, token, length: want });
    }

    /// A build that is thought to run is of no use any more.
    pub(super) fn stop_build(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let (Some(worker), Some(build)) = (stream.worker, stream.build.take()) {
            self.out.push(Command::Stop { worker, stream: id, round: build.round });
        }
    }

    /// The worker has read the stream's tokens.
    pub(super) fn opened(&mut self, worker: WorkerId, id: StreamId) {
        self.workers.heard(worker);
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.worker == Some(worker)) else {
            return self.ignore();
        };
        stream.opened = true;
        match stream.state {
            State::Opening { .. } => self.answer_misses(&[(id, None)]),
            State::Prefilling if self.settings.guess_first => {
                let round = stream.round;
                self.build(&Row { stream: id, round, source: Source::Empty, handle: None, length: 0 });
            }
            _ => {}
        }
    }

    /// More guesses. Of a round that is out they are kept; one for the outcome that a draft is awaited for is used.
    pub(super) fn entries(&mut self, worker: WorkerId, id: StreamId, round: u64, entries: &[Entry]) {
        self.workers.heard(worker);
        for entry in entries {
            let key = Self::key(id, round, entry.accepted, entry.token);
            let arrival = self.ledger.adopt(entry.handle, key, entry.length);
            let cached = Cached { length: entry.length, handle: entry.handle, ended: entry.ended };
            let stream = self.streams.get(&id).filter(|stream| stream.worker == Some(worker));
            match stream.map(|stream| (&stream.state, stream)) {
                _ if arrival == Arrival::Known => self.ignore(),
                Some((State::Verifying { .. } | State::Prefilling, stream)) if stream.round == round => {
                    self.keep(key, cached);
                }
                Some((State::Awaiting { want, partial, .. }, stream))
                    if stream.last().is_some_and(|past| {
                        (past.round, past.accepted, past.token) == (round, key.accepted, Some(key.token))
                    }) =>
                {
                    let (want, partial) = (*want, *partial);
                    self.came_late(id, cached, want, partial);
                }
                // Of another outcome, or late. What has grown is in use, and stays so.
                _ if arrival == Arrival::New => self.waste(Some(entry.handle)),
                _ => self.ignore(),
            }
        }
    }

    /// Keeps an entry unless a longer one is there.
    fn keep(&mut self, key: crate::speculation::cache::Outcome, entry: Cached) {
        match self.cache.get(&key).copied() {
            Some(known) if known.handle == entry.handle => {
                self.cache.insert(key, entry);
            }
            Some(known) if known.length >= entry.length => {
                self.ignore();
                self.waste(Some(entry.handle));
            }
            _ => {
                if let Some(shorter) = self.cache.insert(key, entry) {
                    self.waste(Some(shorter.handle));
                }
            }
        }
    }

    /// The entry of an outcome that is known already: long enough, it ends the wait.
    fn came_late(&mut self, id: StreamId, entry: Cached, want: u32, partial: Option<(u32, Handle)>) {
        if partial.is_some_and(|(length, handle)| length >= entry.length && handle != entry.handle) {
            return self.waste(Some(entry.handle));
        }
        if let Some((_, handle)) = partial.filter(|(_, handle)| *handle != entry.handle) {
            self.waste(Some(handle));
        }
        if entry.length >= want || entry.ended {
            self.stats.late_hits += 1;
            return self.serve(id, entry);
        }
        if let Some(State::Awaiting { partial, .. }) = self.streams.get_mut(&id).map(|stream| &mut stream.state) {
            *partial = Some((entry.length, entry.handle));
        }
    }

    /// A build is over: what it took is learnt.
    pub(super) fn built(
        &mut self,
        worker: WorkerId,
        id: StreamId,
        round: u64,
        seconds: f64,
        steps: u32,
        branches: u32,
    ) {
        self.workers.heard(worker);
        let steps_f = f64::from(steps);
        if steps > 0 && branches > 0 && self.workers.is_ready(worker) {
            self.latency.builds.observe([1.0 + steps_f, steps_f * f64::from(branches)], seconds);
        }
        let now = self.now;
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.worker == Some(worker)) else {
            return self.ignore();
        };
        let Some(build) = stream.build.take_if(|build| build.round == round) else {
            return; // stopped before it could say so
        };
        if steps > 0 {
            // A stopped build says how long a whole one would have taken.
            let whole = (now - build.since) * f64::from(build.depth + 1) / (steps_f + 1.0);
            let depth = f64::from(build.depth);
            let model = self.latency.own(depth, f64::from(build.branches));
            let own = whole - self.latency.link.get(0.0);
            if model > 0.0 && own > 0.0 {
                self.latency.stretch.observe((own / model).clamp(0.25, 16.0));
            }
        }
    }

    /// The chain that was asked for.
    pub(super) fn drafted(
        &mut self,
        worker: WorkerId,
        id: StreamId,
        round: u64,
        length: u32,
        handle: Handle,
        seconds: f64,
        held: u32,
    ) {
        self.workers.heard(worker);
        let awaited = self.streams.get(&id).filter(|stream| stream.worker == Some(worker)).and_then(|stream| {
            match (&stream.state, stream.last()) {
                (State::Awaiting { since, partial, want, .. }, Some(past)) if past.round == round => {
                    Some((*since, *partial, *want))
                }
                _ => None,
            }
        });
        // No entry has this key: a drafted chain is no guess. But it may be the branch there was, longer now.
        let key = Self::key(id, round, u32::MAX, u32::MAX);
        let same = awaited.is_some_and(|(_, partial, _)| partial.is_some_and(|(_, kept)| kept == handle));
        if !same && self.ledger.adopt(handle, key, length) != Arrival::New {
            return self.ignore();
        }
        let Some((since, partial, want)) = awaited else {
            self.ignore();
            return self.waste(Some(handle));
        };
        let partial = partial.filter(|_| !same);
        let made = f64::from(length - held);
        if made > 0.0 {
            self.latency.chains.observe([1.0, made], seconds);
        }
        self.latency.link.observe((self.now - since - seconds).max(0.0));
        let better = partial.filter(|(have, _)| *have > length);
        if let Some((length, kept)) = better {
            self.waste(Some(handle));
            return self.serve(id, Cached { length, handle: kept, ended: true });
        }
        self.waste(partial.map(|(_, handle)| handle));
        if length == 0 {
            self.waste(Some(handle));
            return self.spare(id);
        }
        let ended = length < want;
        self.make_ready(id, Chain { source: Source::Drafted, handle: Some(handle), length, ended });
    }

    /// How well the bonus was guessed.
    pub(super) fn rank(&mut self, worker: WorkerId, id: StreamId, round: u64, rank: Option<u32>) {
        self.workers.heard(worker);
        let past = self.streams.get_mut(&id).filter(|stream| stream.worker == Some(worker));
        let past = past.and_then(|stream| stream.past.iter_mut().find(|past| past.round == round && !past.ranked));
        let Some(past) = past else { return self.ignore() };
        past.ranked = true;
        let (class, whole): (Class, bool) = (past.class, past.accepted == past.length);
        self.learner.rank(class, whole, rank);
    }

    /// A worker runs: streams without one get it.
    pub(super) fn worker_ready(&mut self, worker: WorkerId) {
        if !self.workers.ready(worker) {
            return self.ignore();
        }
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            let Some(mut stream) = self.streams.remove(&id) else { continue };
            if stream.state != State::Paused {
                self.assign(&mut stream);
            }
            self.streams.insert(id, stream);
        }
        self.replan(true);
    }

    /// A worker is gone: nobody waits for it any more. What it had sent is still good: contents are with the driver.
    pub(super) fn worker_lost(&mut self, worker: WorkerId) {
        if !self.workers.lost(worker) {
            return self.ignore();
        }
        self.stats.lost_workers += 1;
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            let Some(mut stream) = self.streams.remove(&id) else { continue };
            let its = stream.worker == Some(worker);
            if its {
                stream.worker = None;
                stream.build = None;
                if stream.state != State::Paused {
                    self.assign(&mut stream);
                }
            }
            let state = stream.state.clone();
            self.streams.insert(id, stream);
            if its {
                self.go_without(id, &state);
            }
        }
        self.replan(true);
    }

    /// Whoever waits for a worker in vain goes on with what there is.
    fn go_without(&mut self, id: StreamId, state: &State) {
        match state {
            State::Awaiting { partial: Some((length, handle)), .. } => {
                self.serve(id, Cached { length: *length, handle: *handle, ended: false });
            }
            State::Awaiting { .. } | State::Opening { .. } => self.spare(id),
            _ => {}
        }
    }

    /// Drafts that are out of patience.
    pub(super) fn expire(&mut self) {
        let now = self.now;
        let late: Vec<(StreamId, State)> = (self.streams.values())
            .filter(|stream| match stream.state {
                State::Opening { deadline, .. } | State::Awaiting { deadline, .. } => deadline <= now,
                _ => false,
            })
            .map(|stream| (stream.id, stream.state.clone()))
            .collect();
        for (id, state) in late {
            self.stats.timeouts += 1;
            let patience = self.waits(self.plan.length).1;
            if let Some(stream) = self.streams.get_mut(&id) {
                // It may have the context and have said so in vain; commands reach it in order, so it will have it.
                stream.opened = true;
                if let Some(worker) = stream.worker {
                    self.workers.missed(worker, now, patience);
                }
            }
            self.go_without(id, &state);
        }
    }
}
