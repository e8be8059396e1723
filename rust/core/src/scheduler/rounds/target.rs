//! The target's side: prefills, verifications, and what to give it next.

use super::{Batch, Cached, Rounds};
use crate::rng::{Purpose, uniform};
use crate::scheduler::batch::{self, Next};
use crate::scheduler::event::{BatchId, Command, Reason, Row, Source, StreamId, Verdict};
use crate::scheduler::learn::Class;
use crate::scheduler::settings::Settings;
use crate::scheduler::stats::Cause;
use crate::scheduler::stream::{Build, Chain, State};

impl Rounds {
    /// The first token is out: the stream wants a chain.
    pub(super) fn prefilled(&mut self, id: StreamId, finished: bool, token: Option<u32>, fast: Option<f64>) {
        let Some(place) = self.target.prefills.iter().position(|(stream, _)| *stream == id) else {
            return self.ignore();
        };
        let (_, life) = self.target.prefills.remove(place);
        self.target.free_since = self.now;
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.life == life) else { return };
        stream.emitted += 1;
        stream.expects = fast;
        let round = stream.round;
        stream.close_prompt(token);
        let over = stream.remaining() == 0;
        let goes_on = stream.state == State::Prefilling;
        self.stats.prefills += 1;
        self.stats.tokens += 1;
        if finished {
            self.finish(id, Reason::Stopped);
        } else if over {
            self.finish(id, Reason::Limit);
        } else if goes_on {
            stream.cause = Cause::Start;
            stream.hit = None;
            let mut missing = Vec::new();
            match token {
                Some(token) => self.look_up(id, round, 0, token, Class::Fast, &mut missing),
                None => {
                    let left = self.cache.retire(id, round);
                    self.waste_all(left);
                    missing.push((id, None));
                }
            }
            self.answer_misses(&missing);
        }
        // Otherwise it was preempted meanwhile: the token counts, and a resumed stream is prefilled again.
    }

    /// The chain of a round that is out came out this long.
    pub(super) fn fast(&mut self, id: StreamId, round: u64, length: u32) {
        let out = self.is_out(id);
        match self.streams.get_mut(&id) {
            Some(stream) if out && stream.round == round => stream.fast = Some(length),
            _ => self.ignore(),
        }
    }

    /// A verification is over: every row's outcome is looked up; rows without an entry get a chain in another way.
    pub(super) fn verified(&mut self, id: BatchId, seconds: f64, rows: &[Verdict]) {
        let Some(batch) = self.target.batch.take_if(|batch| batch.id == id) else { return self.ignore() };
        self.target.free_since = self.now;
        self.target.prefilled = false;
        self.stats.batches += 1;
        self.stats.busy += seconds;
        let (mut tokens, mut missing) = (0.0, Vec::new());
        for (row, life) in &batch.rows {
            let lives = self.streams.get(&row.stream).filter(|stream| stream.life == *life);
            let length = lives.map_or(row.length, |stream| stream.verified_length(row));
            tokens += f64::from(length + 1);
            let verdict = rows.iter().find(|verdict| verdict.stream == row.stream);
            if let (true, Some(verdict)) = (lives.is_some(), verdict) {
                self.outcome(row, length, verdict, &mut missing);
            }
            if let Some(handle) = row.handle {
                self.ledger.free(handle);
            }
        }
        let emitted = rows.iter().map(|verdict| verdict.emitted).sum();
        self.pace.observe(batch.rows.len(), emitted, seconds);
        self.latency.target.observe([1.0, tokens, batch.rows.len() as f64], seconds);
        self.replan(false);
        self.answer_misses(&missing);
    }

    /// One row came out. Rows that need a chain and have none, or a short one, go to `missing`.
    fn outcome(&mut self, row: &Row, length: u32, verdict: &Verdict, missing: &mut Vec<(StreamId, Option<Cached>)>) {
        let id = row.stream;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        // With the driver's tokens behind it a chain is as long as it gets.
        let told = stream.fast.is_some() && (row.source.is_model() || length < row.length);
        let out = match stream.state {
            State::Verifying { chain, .. } => chain,
            _ => Chain { source: row.source, handle: row.handle, ..Chain::EMPTY }, // preempted meanwhile
        };
        let ended = told || out.ended;
        let chain = Chain { length, ended, ..out };
        stream.emitted += u64::from(verdict.emitted);
        stream.expects = verdict.fast;
        self.stats.round(row.source, length, verdict.accepted, verdict.emitted);
        self.learner.observe(&mut stream.acceptance, chain.class(), length, verdict.accepted, ended);
        stream.close_round(verdict.accepted, Some(verdict.token), &chain, length);
        if verdict.finished {
            return self.finish(id, Reason::Stopped);
        }
        if stream.remaining() == 0 {
            return self.finish(id, Reason::Limit);
        }
        if !matches!(stream.state, State::Verifying { .. }) {
            return; // preempted while it was verified
        }
        self.look_up(id, row.round, verdict.accepted, verdict.token, chain.class(), missing);
    }

    /// The outcome of a round is known: its entry is the next chain, if there is one.
    fn look_up(
        &mut self,
        id: StreamId,
        round: u64,
        accepted: u32,
        token: u32,
        class: Class,
        missing: &mut Vec<(StreamId, Option<Cached>)>,
    ) {
        let Some(stream) = self.streams.get(&id) else { return };
        let (built, worker, opened) = (stream.build, stream.worker, stream.opened);
        let want = stream.most().min(self.plan.length).min(self.settings.depth);
        let found = self.cache.take(&Self::key(id, round, accepted, token));
        let left = self.cache.retire(id, round);
        let asked = found.is_some() || !left.is_empty() || built.is_some_and(|build| build.round == round);
        self.waste_all(left);
        // A build that was to guess this outcome, or none: then there was nothing to look up.
        if asked && want > 0 {
            let Some(stream) = self.streams.get_mut(&id) else { return };
            self.stats.lookup(stream.hit, found.is_some());
            self.learner.lookup(class, found.is_some());
            stream.hit = Some(found.is_some());
        }
        if let Some(worker) = worker.filter(|_| opened) {
            let handle = found.map(|entry| entry.handle);
            self.out.push(Command::Outcome { worker, stream: id, round, accepted, token, handle });
        }
        match found {
            _ if want == 0 => {
                self.waste(found.map(|entry| entry.handle));
                self.stop_build(id);
                self.spare(id);
            }
            Some(entry) if entry.length >= want || entry.ended => {
                self.stop_build(id);
                self.serve(id, entry);
            }
            short => missing.push((id, short)),
        }
    }

    /// An entry becomes the chain of the next round.
    pub(super) fn serve(&mut self, id: StreamId, entry: Cached) {
        let Cached { length, handle, ended } = entry;
        let chain = Chain { source: Source::Cached, handle: Some(handle), length, ended };
        self.make_ready(id, chain);
    }

    /// If the target is free, gives it something to do.
    pub(super) fn pump(&mut self) {
        self.hold = None;
        if self.target.is_busy() {
            return;
        }
        let waiting: Vec<StreamId> =
            self.streams.values().filter(|stream| stream.state == State::Waiting).map(|stream| stream.id).collect();
        let rows = self.rows();
        let Settings { max_batch, together, .. } = self.settings;
        let next = batch::next(&self.streams, max_batch, &self.known(rows), &self.plan, together, self.now);
        match next {
            _ if !waiting.is_empty() && (!self.target.prefilled || next == Next::Nothing) => self.prefill(&waiting),
            Next::Verify(ids) => self.verify(&ids),
            Next::Hold(until) if waiting.is_empty() => self.hold = Some(until),
            Next::Hold(_) => self.prefill(&waiting),
            Next::Nothing => {}
        }
    }

    /// Streams that take part in verifications.
    pub(super) fn rows(&self) -> usize {
        let takes_part = |state: &State| !matches!(state, State::Waiting | State::Prefilling | State::Paused);
        self.streams.values().filter(|stream| takes_part(&stream.state)).count()
    }

    fn prefill(&mut self, ids: &[StreamId]) {
        self.account(if self.rows() > 0 { Cause::Start } else { Cause::Idle });
        self.target.prefilled = true;
        for id in ids {
            if let Some(stream) = self.streams.get_mut(id) {
                stream.state = State::Prefilling;
                self.target.prefills.push((*id, stream.life));
                self.out.push(Command::Prefill { stream: *id });
            }
        }
    }

    /// The target was free until now, for this reason.
    fn account(&mut self, cause: Cause) {
        let started = self.stats.batches + self.stats.prefills > 0;
        self.pace.waited = if started { self.now - self.target.free_since } else { 0.0 };
        self.stats.waits[cause as usize] += self.pace.waited;
    }

    fn verify(&mut self, ids: &[StreamId]) {
        self.batches += 1;
        let id = self.batches;
        // The last row to get its chain says what the others waited for.
        let turn = |id: &StreamId| match self.streams.get(id).map(|stream| (&stream.state, stream.cause)) {
            Some((State::Ready { turn, .. }, cause)) => (*turn, cause),
            _ => (0, Cause::Idle),
        };
        let cause = ids.iter().map(turn).max().map_or(Cause::Idle, |(_, cause)| cause);
        self.account(cause);
        let cut = self.cut(id);
        let mut rows = Vec::with_capacity(ids.len());
        for stream_id in ids {
            let Some(stream) = self.streams.get_mut(stream_id) else { continue };
            let State::Ready { chain, .. } = stream.state else { continue };
            let mut chain = chain;
            let length = chain.length.min(stream.most()).min(cut);
            chain.ended &= length == chain.length;
            chain.length = length;
            let mut unused = None;
            if chain.length == 0 {
                unused = chain.handle;
                chain = Chain::EMPTY;
            }
            stream.state = State::Verifying { chain, batch: id };
            stream.cause = Cause::Idle;
            let row = Row {
                stream: *stream_id,
                round: stream.round,
                source: chain.source,
                handle: chain.handle,
                length: chain.length,
            };
            rows.push((row, stream.life));
            self.waste(unused);
        }
        self.out.push(Command::Verify { batch: id, rows: rows.iter().map(|(row, _)| *row).collect() });
        for (row, _) in &rows {
            self.build(row);
        }
        self.target.batch = Some(Batch { id, rows });
    }

    /// Now and then chains are cut so that the time of a verification is known by its size. Never by content.
    fn cut(&self, batch: BatchId) -> u32 {
        let known = self.latency.target.seen() > 4 && !self.latency.target.varies(1);
        let number = uniform(self.settings.seed, 0, batch, Purpose::Schedule);
        if self.settings.adaptive && known && number < 1.0 / 16.0 {
            (number * 16.0 * f64::from(self.plan.length)) as u32
        } else {
            u32::MAX
        }
    }

    /// Has the outcomes of a round that is being verified guessed, if another chain will be wanted after it.
    pub(super) fn build(&mut self, row: &Row) {
        let patience = self.waits(self.plan.length).1;
        let Some(stream) = self.streams.get(&row.stream) else { return };
        let Some(worker) = stream.worker.filter(|_| stream.opened) else { return };
        let chain = match stream.state {
            State::Verifying { chain, .. } => chain,
            State::Prefilling => Chain::EMPTY,
            _ => return,
        };
        // After the worst outcome one token is gone, and another follows every chain.
        let depth = u64::from(self.plan.length.min(self.settings.depth)).min(stream.remaining().saturating_sub(2));
        if depth == 0 || self.plan.budget == 0 {
            return;
        }
        let rates = self.learner.rates(Some(&stream.acceptance), chain.class(), row.length);
        let known = self.known(1);
        let fan_out = known.fan_out(&rates, chain.class(), self.plan.budget, stream.remaining());
        let branches: u32 = fan_out.iter().sum();
        if branches == 0 || !self.workers.is_worth_trying(worker, self.now, patience) {
            return;
        }
        let build = Build { round: row.round, since: self.now, depth: depth as u32, branches };
        if let Some(stream) = self.streams.get_mut(&row.stream) {
            stream.build = Some(build);
        }
        self.stats.builds += 1;
        self.stats.branches += u64::from(branches);
        self.out.push(Command::Build {
            worker,
            stream: row.stream,
            round: row.round,
            source: row.source,
            handle: row.handle,
            fan_out,
            depth: depth as u32,
        });
    }

    /// Chooses anew every few verifications, and when the number of rows or workers is another.
    pub(super) fn replan(&mut self, now: bool) {
        let (rows, workers) = (self.rows(), self.workers.count());
        let (for_rows, for_workers, at) = self.planned;
        if now || rows != for_rows || workers != for_workers || self.stats.batches >= at + 16 || self.stats.batches < 8
        {
            self.planned = (rows, workers, self.stats.batches);
            self.plans += 1;
            self.plan = self.known(rows).plan(Some(self.plan), self.plans.is_multiple_of(32));
        }
    }
}
