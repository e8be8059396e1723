//! What rows do whose outcome nobody guessed, or whose chain is short: by the draft model, as it is, or fast.

use super::{Cached, Rounds};
use crate::rng::{Purpose, uniform};
use crate::scheduler::choose::Group;
use crate::scheduler::event::{Source, StreamId};
use crate::scheduler::learn::{Class, expected};
use crate::scheduler::settings::Fallback;
use crate::scheduler::stats::Cause;
use crate::scheduler::stream::{Chain, State};

/// Tokens by which waiting for a draft must be better than a fast chain, a row: what a draft gives is the less certain of
/// the two, and who drafts for the target does not guess ahead.
const SURELY: f64 = 0.5;

impl Rounds {
    /// Rows without a chain, or with a short one, get one: from the model, from what there is of the branch, or fast.
    pub(super) fn answer_misses(&mut self, missing: &[(StreamId, Option<Cached>)]) {
        let neural = self.is_neural(missing);
        self.learn_misses(missing, neural);
        for (id, short) in missing {
            let Some(stream) = self.streams.get(id) else { continue };
            let want = stream.most().min(self.plan.length).min(self.settings.depth);
            let prompt = stream.worker.is_some_and(|worker| self.workers.is_prompt(worker));
            let (opened, first) = (stream.opened, stream.last().is_some_and(|past| past.prompt));
            match short {
                _ if want == 0 => {
                    self.waste(short.map(|entry| entry.handle));
                    self.stop_build(*id);
                    self.spare(*id);
                }
                Some(entry) if !(prompt && opened && self.finishes(entry, want)) => {
                    self.stats.short_used += 1;
                    self.stop_build(*id);
                    self.serve(*id, *entry);
                }
                Some(entry) => {
                    self.stats.short_finished += 1;
                    self.ask(*id, want, Some((entry.length, entry.handle)), Cause::Late);
                }
                None if neural && prompt && opened => {
                    self.stats.neural += u64::from(!first);
                    self.ask(*id, want, None, if first { Cause::Start } else { Cause::Miss });
                }
                None if neural && prompt && first => self.await_opening(*id, want),
                None => {
                    self.stats.fast += u64::from(!first);
                    self.stop_build(*id);
                    self.spare(*id);
                }
            }
        }
    }

    /// What the driver's own drafts were worth where there was no entry.
    fn learn_misses(&mut self, missing: &[(StreamId, Option<Cached>)], neural: bool) {
        let depth = self.plan.length.min(self.settings.depth);
        let drafted = expected(&self.learner.rates(None, Class::Drafted, depth));
        for (id, _) in missing.iter().filter(|(_, short)| short.is_none()) {
            if let Some(fast) = self.streams.get(id).and_then(|stream| stream.expects) {
                self.learner.miss(1.0 + fast, drafted, !neural);
            }
        }
    }

    fn await_opening(&mut self, id: StreamId, want: u32) {
        // Reading a prompt takes longer than drafting; how much longer is not known.
        let deadline = self.now + 4.0 * self.waits(want).1;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.state = State::Opening { since: self.now, deadline };
        }
    }

    /// Whether the rest of a branch is worth its time.
    fn finishes(&self, entry: &Cached, want: u32) -> bool {
        self.settings.fallback != Fallback::Fast
            && self.latency.is_known()
            && self.known(self.rows()).worth_finishing(&self.plan, entry.length, want)
    }

    /// Whether misses are answered by the draft model: as set, or as measured for as many rows as there are.
    fn is_neural(&self, missing: &[(StreamId, Option<Cached>)]) -> bool {
        match self.settings.fallback {
            Fallback::Neural => return true,
            Fallback::Fast => return false,
            Fallback::Adaptive => {}
        }
        let misses = missing.iter().filter(|(_, short)| short.is_none()).count();
        let Some((first, _)) = missing.first() else { return false };
        if self.plan.rate == 0.0 || misses == 0 || !self.latency.drafts_known() {
            return true;
        }
        let told = missing.iter().filter(|(_, short)| short.is_none());
        let told = told.filter_map(|(id, _)| self.streams.get(id)?.expects).map(|fast| 1.0 + fast);
        let (told, sum) = told.fold((0, 0.0), |(count, sum), fast| (count + 1, sum + fast));
        // What the draft model's chains give, and fast ones of which the driver says nothing, is only known from trying:
        // often at first, seldom later.
        let all_told = told == misses;
        let tried = self.learner.tried(if all_told { Class::Drafted } else { Class::Fast });
        let share = if tried < 8.0 { 1.0 / 4.0 } else { 1.0 / 128.0 };
        if uniform(self.settings.seed, first.wrapping_add(1), self.stats.batches, Purpose::Schedule) < share {
            return all_told;
        }
        let rows = self.rows();
        let ready = self.streams.values().filter(|stream| matches!(stream.state, State::Ready { .. })).count();
        let shorts = missing.len() - misses;
        let extent = self.learner.extent(Class::Drafted, 0, self.plan.length.min(self.settings.depth));
        let wait = self.latency.fallback(extent);
        let group = Group {
            ready: (ready + shorts) as f64,
            missing: misses as f64,
            wait,
            draft: wait,
            fast: all_told.then(|| sum / told as f64),
        };
        let [waiting, ahead, quickly] = self.known(rows).values(&self.plan, &group);
        waiting.max(ahead) >= quickly + SURELY * misses as f64
    }

    /// A chain without the draft model: fast, or none where nothing is to be drafted.
    pub(super) fn spare(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        // Where only the draft model is wanted and there is none, or it does not pay, steps are plain.
        let without = self.settings.workers == 0 || self.plan.length == 0;
        let plain = without && self.settings.fallback == Fallback::Neural;
        let length = if plain { 0 } else { stream.most().min(self.plan.fast) };
        let chain = if length == 0 { Chain::EMPTY } else { Chain { source: Source::Fast, length, ..Chain::EMPTY } };
        self.make_ready(id, chain);
    }
}
