//! What was drafted ahead: from the outcome of a verification to the work that was done in case of it.
//!
//! While the target verifies round t of a stream, the draft guesses outcomes (k tokens accepted, t* follows) and drafts
//! on from each. The cache keeps that work until the outcome is known:
//!
//! ```text
//! build:    insert((stream, round, accepted, token), entry)     any number, in any order; the later entry of a key stays
//! verified: take(the true outcome)                              a hit: the entry leaves the cache; a miss: nothing
//!           retire(stream, round)                               all other guesses of that round (and of older ones)
//! finished: forget(stream)
//! ```
//!
//! Exactness rests on two things that hold by construction. A lookup compares the whole outcome: the same token after
//! another number of accepted ones (E7) or in another round (E8, a stream's number used again) is another key. And an
//! entry is handed out by removing it, so no continuation is ever used twice: two uses of one draw are not two draws.

use std::collections::BTreeMap;

/// How a verification came out, or may come out. Rounds of a stream never repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Outcome {
    /// The sequence.
    pub stream: u32,
    /// The verification, counted from 0 in its stream.
    pub round: u64,
    /// How many drafted tokens were accepted.
    pub accepted: u32,
    /// The token that follows them.
    pub token: u32,
}

impl Outcome {
    /// Before all outcomes of a stream from `round` on.
    fn first(stream: u32, round: u64) -> Self {
        Self { stream, round, accepted: 0, token: 0 }
    }

    /// After all outcomes of a stream up to `round`.
    fn last(stream: u32, round: u64) -> Self {
        Self { stream, round, accepted: u32::MAX, token: u32::MAX }
    }
}

/// Entries by outcome. Ordered by it, so that a round's entries lie together and what leaves does so in a fixed order.
#[derive(Debug, Clone)]
pub struct OutcomeCache<T> {
    entries: BTreeMap<Outcome, T>,
    /// The first round of each stream that is not retired.
    live: BTreeMap<u32, u64>,
}

impl<T> Default for OutcomeCache<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), live: BTreeMap::new() }
    }
}

impl<T> OutcomeCache<T> {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps `entry` for `outcome`; returns what is not kept: the entry it replaces, or, where the outcome's round is
    /// retired already (the entry is late), `entry` itself.
    pub fn insert(&mut self, outcome: Outcome, entry: T) -> Option<T> {
        if outcome.round < self.live.get(&outcome.stream).copied().unwrap_or(0) {
            return Some(entry);
        }
        self.entries.insert(outcome, entry)
    }

    /// The entry of exactly this outcome, which leaves the cache: it is used once.
    pub fn take(&mut self, outcome: &Outcome) -> Option<T> {
        self.entries.remove(outcome)
    }

    /// The entry of exactly this outcome, which stays.
    pub fn get(&self, outcome: &Outcome) -> Option<&T> {
        self.entries.get(outcome)
    }

    /// Removes what is left of a stream's rounds up to `round` and returns it in the order of the outcomes. Entries of
    /// those rounds that arrive later are refused.
    pub fn retire(&mut self, stream: u32, round: u64) -> Vec<T> {
        let live = self.live.entry(stream).or_insert(0);
        *live = (*live).max(round.saturating_add(1));
        self.remove(Outcome::first(stream, 0), Outcome::last(stream, round))
    }

    /// Removes all that is known of a stream, the rounds it has retired included: the number may name another stream
    /// now. (A late entry of the previous owner cannot be told from one of the next if both count rounds from 0: who
    /// uses numbers again must turn away what a finished stream still sends, or let the rounds go on.)
    pub fn forget(&mut self, stream: u32) -> Vec<T> {
        self.live.remove(&stream);
        self.remove(Outcome::first(stream, 0), Outcome::last(stream, u64::MAX))
    }

    fn remove(&mut self, first: Outcome, last: Outcome) -> Vec<T> {
        let keys: Vec<Outcome> = self.entries.range(first..=last).map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.entries.remove(key)).collect()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn key(stream: u32, round: u64, accepted: u32, token: u32) -> Outcome {
        Outcome { stream, round, accepted, token }
    }

    #[test]
    fn only_the_whole_outcome_matches() {
        let mut cache = OutcomeCache::new();
        cache.insert(key(1, 5, 2, 9), "drafted");
        for other in [key(2, 5, 2, 9), key(1, 4, 2, 9), key(1, 6, 2, 9), key(1, 5, 1, 9), key(1, 5, 2, 8)] {
            assert_eq!((cache.get(&other).copied(), cache.take(&other)), (None, None));
        }
        assert_eq!(cache.get(&key(1, 5, 2, 9)), Some(&"drafted"));
        assert_eq!(cache.take(&key(1, 5, 2, 9)), Some("drafted"));
        assert_eq!(cache.take(&key(1, 5, 2, 9)), None); // used once
    }

    /// E7: the same text by another number of accepted tokens is another entry.
    #[test]
    fn one_token_after_different_lengths() {
        let mut cache = OutcomeCache::new();
        for accepted in 0..4 {
            assert_eq!(cache.insert(key(0, 0, accepted, 7), accepted), None);
        }
        assert_eq!(cache.take(&key(0, 0, 2, 7)), Some(2));
        assert_eq!(cache.retire(0, 0), [0, 1, 3]);
    }

    /// E8: neither a late entry of an old round nor one of a stream's previous owner is found.
    #[test]
    fn stale_entries() {
        let mut cache = OutcomeCache::new();
        cache.insert(key(3, 7, 0, 1), 'a');
        cache.insert(key(3, 8, 0, 1), 'b');
        assert_eq!(cache.retire(3, 7), ['a']);
        assert_eq!(cache.insert(key(3, 7, 0, 1), 'c'), Some('c'));
        assert_eq!(cache.insert(key(3, 8, 0, 1), 'd'), Some('b')); // a longer continuation replaces the shorter
        assert_eq!(cache.forget(3), ['d']);
        assert!(cache.is_empty());
        // The next owner counts from 0.
        assert_eq!((cache.get(&key(3, 8, 0, 1)).copied(), cache.insert(key(3, 0, 0, 1), 'e')), (None, None));
        assert_eq!(cache.retire(3, u64::MAX), ['e']);
        assert_eq!(cache.insert(key(3, u64::MAX - 1, 0, 1), 'f'), Some('f'));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(Outcome),
        Take(Outcome),
        Retire(u32, u64),
        Forget(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let outcome = || (0u32..3, 0u64..4, 0u32..3, 0u32..3).prop_map(|(s, r, k, t)| key(s, r, k, t));
        prop_oneof![
            4 => outcome().prop_map(Step::Insert),
            3 => outcome().prop_map(Step::Take),
            1 => (0u32..3, 0u64..4).prop_map(|(stream, round)| Step::Retire(stream, round)),
            1 => (0u32..3).prop_map(Step::Forget),
        ]
    }

    proptest! {
        /// Against a plain map: what goes in comes out once, at its own outcome, or is handed back.
        #[test]
        fn nothing_is_lost_or_doubled(steps in prop::collection::vec(step(), 0..200)) {
            let (mut cache, mut model) = (OutcomeCache::new(), HashMap::new());
            let mut live: HashMap<u32, u64> = HashMap::new();
            let mut seen = Vec::new();
            let mut count = 0;
            for (id, step) in steps.into_iter().enumerate() {
                let removed = |model: &mut HashMap<Outcome, usize>, gone: &dyn Fn(&Outcome) -> bool| {
                    let mut ids: Vec<usize> = model.iter().filter(|(key, _)| gone(key)).map(|(_, id)| *id).collect();
                    model.retain(|key, _| !gone(key));
                    ids.sort_unstable();
                    ids
                };
                let mut out = match step {
                    Step::Insert(outcome) => {
                        count += 1;
                        let back = cache.insert(outcome, id);
                        let late = outcome.round < live.get(&outcome.stream).copied().unwrap_or(0);
                        prop_assert_eq!(back, if late { Some(id) } else { model.insert(outcome, id) });
                        back.into_iter().collect()
                    }
                    Step::Take(outcome) => {
                        let found = cache.take(&outcome);
                        prop_assert_eq!(found, model.remove(&outcome));
                        found.into_iter().collect()
                    }
                    Step::Retire(stream, round) => {
                        let next = live.entry(stream).or_insert(0);
                        *next = (*next).max(round + 1);
                        let mut out = cache.retire(stream, round);
                        out.sort_unstable();
                        prop_assert_eq!(&out, &removed(&mut model, &|key| key.stream == stream && key.round <= round));
                        out
                    }
                    Step::Forget(stream) => {
                        live.remove(&stream);
                        let mut out = cache.forget(stream);
                        out.sort_unstable();
                        prop_assert_eq!(&out, &removed(&mut model, &|key| key.stream == stream));
                        out
                    }
                };
                seen.append(&mut out);
                prop_assert_eq!(cache.len(), model.len());
            }
            seen.extend((0..3).flat_map(|stream| cache.forget(stream)));
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count);
        }
    }
}
