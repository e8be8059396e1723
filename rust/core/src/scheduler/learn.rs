//! What verification teaches: how much of a chain is accepted, and how well follow-ups are guessed.
//!
//! Chains of the draft model and fast chains are kept apart, in both: a fast chain is accepted less, and the draft
//! guesses differently after one. Everything fades, so that drift is followed, and no estimate is ever 0 or 1:
//!
//! ```text
//! rate[j] = (w * prior[j] + accepted at j) / (w + tried at j)     j: place in the chain, tried: all before were accepted
//! prior of a stream: all streams' rate; of all streams: the rate one place before; of the first place: a constant
//! ```

use crate::speculation::ranks::RankCurve;
use std::array::from_fn;

/// Which chains an estimate is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Drafted by the model ahead: it was there when its outcome came.
    Model,
    /// Drafted, or finished, by the model while the target waited. Misses and rare outcomes come where the text is hard to
    /// guess, so these are accepted less, and waiting for one is worth less than a hit.
    Drafted,
    /// The driver's fast draft, or none.
    Fast,
}

/// How many there are.
pub const CLASSES: usize = 3;

impl Class {
    fn index(self) -> usize {
        self as usize
    }
}

/// Counts of accepted and tried tokens by place in the chain.
#[derive(Debug, Clone)]
pub struct Acceptance {
    counts: Vec<(f64, f64)>,
    memory: f64,
}

impl Acceptance {
    /// No observations yet; one loses 1/e of its weight after `memory` more at its place.
    pub fn new(memory: f64) -> Self {
        Self { counts: Vec::new(), memory: (-1.0 / memory).exp() }
    }

    /// A chain of `length` tokens of which `accepted` were kept. A chain that the draft ended counts as refused in its
    /// next place: it did not get further, and that is what a longer chain asked for next time will give.
    pub fn observe(&mut self, length: u32, accepted: u32, ended: bool) {
        let visited = (length + u32::from(ended)).min(accepted + 1) as usize;
        if self.counts.len() < visited {
            self.counts.resize(visited, (0.0, 0.0));
        }
        for (place, (kept, tried)) in self.counts.iter_mut().enumerate().take(visited) {
            *kept = *kept * self.memory + f64::from(u8::from((place as u32) < accepted));
            *tried = *tried * self.memory + 1.0;
        }
    }

    /// The weight of what was tried in the first place of chains.
    pub fn tried(&self) -> f64 {
        self.counts.first().map_or(0.0, |count| count.1)
    }

    fn rate(&self, place: usize, prior: f64, weight: f64) -> f64 {
        let (kept, tried) = self.counts.get(place).copied().unwrap_or((0.0, 0.0));
        ((weight * prior + kept) / (weight + tried)).clamp(1e-3, 1.0 - 1e-3)
    }
}

/// The probabilities of 0..=rates.len() accepted tokens.
pub fn law(rates: &[f64]) -> Vec<f64> {
    let mut reached = 1.0;
    let mut law = Vec::with_capacity(rates.len() + 1);
    for rate in rates {
        law.push(reached * (1.0 - rate));
        reached *= rate;
    }
    law.push(reached);
    law
}

/// Tokens that a round emits on average: the accepted ones and the one that follows.
pub fn expected(rates: &[f64]) -> f64 {
    let mut reached = 1.0;
    1.0 + rates
        .iter()
        .map(|rate| {
            reached *= rate;
            reached
        })
        .sum::<f64>()
}

/// All that is known about acceptance and guesses, over all streams.
#[derive(Debug, Clone)]
pub struct Learner {
    acceptance: [Acceptance; CLASSES],
    /// Of each place of a chain: how often drafting went on to it, where that was asked for.
    extents: [Acceptance; CLASSES],
    /// By class, then: after a refusal, after a whole chain.
    curves: [[RankCurve; 2]; CLASSES],
    /// Hits and lookups by class of the chain whose outcome was looked up.
    lookups: [(f64, f64); CLASSES],
    /// After misses where the driver said what its own draft is worth.
    misses: Misses,
}

/// Sums over misses, fading.
#[derive(Debug, Clone, Copy, Default)]
struct Misses {
    /// How many.
    count: f64,
    /// Of them answered fast.
    fast: f64,
    /// Tokens that a chain of the draft model would have brought beyond the fast one.
    lost: f64,
}

/// How much the prior weighs, in observations.
const GLOBAL_WEIGHT: f64 = 2.0;
const STREAM_WEIGHT: f64 = 16.0;
const LOOKUP_WEIGHT: f64 = 8.0;

impl Default for Learner {
    fn default() -> Self {
        Self {
            acceptance: from_fn(|_| Acceptance::new(256.0)),
            extents: from_fn(|_| Acceptance::new(256.0)),
            curves: from_fn(|_| from_fn(|_| RankCurve::new(1.0))),
            lookups: [(0.0, 0.0); CLASSES],
            misses: Misses::default(),
        }
    }
}

impl Learner {
    /// A stream's own counts, to pass to [`Learner::observe`] and [`Learner::rates`].
    pub fn stream() -> [Acceptance; CLASSES] {
        from_fn(|_| Acceptance::new(64.0))
    }

    /// A chain of `length` tokens of which `accepted` were kept; `ended`: by the draft, before it was as long as asked.
    pub fn observe(&mut self, own: &mut [Acceptance; CLASSES], class: Class, length: u32, accepted: u32, ended: bool) {
        self.acceptance[class.index()].observe(length, accepted, ended);
        self.extents[class.index()].observe(length, length, ended);
        own[class.index()].observe(length, accepted, ended);
    }

    /// Where the true token stood among the guesses.
    pub fn rank(&mut self, class: Class, whole: bool, rank: Option<u32>) {
        self.curves[class.index()][usize::from(whole)].observe(rank.map(|rank| rank as usize));
    }

    /// Whether the outcome of a chain was in the cache.
    pub fn lookup(&mut self, class: Class, hit: bool) {
        let (hits, all) = &mut self.lookups[class.index()];
        *hits = *hits * 0.99 + f64::from(u8::from(hit));
        *all = *all * 0.99 + 1.0;
    }

    /// The recent share of hits among lookups after chains of this class, if there were any.
    pub fn hit_rate(&self, class: Class) -> Option<f64> {
        let (hits, all) = self.lookups[class.index()];
        (all > 0.0).then(|| hits / all)
    }

    /// The same, from a guess on that weighs as much as a few lookups.
    pub fn hit_rate_or(&self, class: Class, guess: f64) -> f64 {
        let (hits, all) = self.lookups[class.index()];
        (hits + LOOKUP_WEIGHT * guess) / (all + LOOKUP_WEIGHT)
    }

    /// A miss, where the driver's own draft was worth `fast` tokens (the one that follows included) and the model's is
    /// `drafted` on average; and whether the fast one was taken.
    pub fn miss(&mut self, fast: f64, drafted: f64, taken: bool) {
        let Misses { count, fast: answered, lost } = &mut self.misses;
        *count = *count * 0.99 + 1.0;
        *answered = *answered * 0.99 + f64::from(u8::from(taken));
        *lost = *lost * 0.99 + (drafted - fast).max(0.0);
    }

    /// The tokens by which chains of the draft model are better than fast ones after misses, none where they are not, on
    /// average over those misses. Chains that were taken say less: each is taken where it is good.
    pub fn lost(&self) -> Option<f64> {
        (self.misses.count > 0.0).then(|| self.misses.lost / self.misses.count)
    }

    /// The share of misses that was answered fast, where the driver says what its drafts are worth.
    pub fn answered_fast(&self) -> Option<f64> {
        (self.misses.count > 0.0).then(|| self.misses.fast / self.misses.count)
    }

    /// How much chains of a class were tried, in recent observations.
    pub fn tried(&self, class: Class) -> f64 {
        self.acceptance[class.index()].tried()
    }

    /// The acceptance rates of the places of a chain, over all streams or for one.
    pub fn rates(&self, own: Option<&[Acceptance; CLASSES]>, class: Class, length: u32) -> Vec<f64> {
        let mut before = if class == Class::Fast { 0.2 } else { 0.7 };
        (0..length as usize)
            .map(|place| {
                before = self.acceptance[class.index()].rate(place, before, GLOBAL_WEIGHT);
                own.map_or(before, |own| own[class.index()].rate(place, before, STREAM_WEIGHT))
            })
            .collect()
    }

    /// How many tokens a chain gets beyond its first `have` if `want` are asked for: drafts end some by themselves.
    pub fn extent(&self, class: Class, have: u32, want: u32) -> f64 {
        let mut goes_on = 1.0;
        (have..want)
            .map(|place| {
                goes_on *= self.extents[class.index()].rate(place as usize, 1.0, GLOBAL_WEIGHT);
                goes_on
            })
            .sum()
    }

    /// The rank curve of each place of a chain of this length.
    pub fn curves(&self, class: Class, length: u32) -> Vec<&RankCurve> {
        let [refused, whole] = &self.curves[class.index()];
        (0..length).map(|_| refused).chain([whole]).collect()
    }

    /// One curve: after a refusal, or after a whole chain.
    pub fn curve(&self, class: Class, whole: bool) -> &RankCurve {
        &self.curves[class.index()][usize::from(whole)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_go_from_the_prior_to_the_data_and_never_to_the_ends() {
        let mut learner = Learner::default();
        let mut own = Learner::stream();
        assert_eq!(learner.rates(None, Class::Model, 3), vec![0.7; 3]);
        for _ in 0..500 {
            learner.observe(&mut own, Class::Model, 3, 3, false);
        }
        let rates = learner.rates(Some(&own), Class::Model, 4);
        assert!(rates.iter().all(|rate| *rate > 0.98 && *rate < 1.0), "{rates:?}");
        let mut other = Learner::stream();
        for _ in 0..20 {
            learner.observe(&mut other, Class::Model, 3, 0, false);
        }
        // A stream that differs is somewhere between all and itself.
        let (all, its) = (learner.rates(None, Class::Model, 1)[0], learner.rates(Some(&other), Class::Model, 1)[0]);
        assert!(its < all && its > 0.1, "{its} {all}");
        assert_eq!(learner.rates(None, Class::Fast, 1), vec![0.2]);
    }

    #[test]
    fn a_chain_that_ended_counts_where_it_ended() {
        let (mut learner, mut own) = (Learner::default(), Learner::stream());
        for _ in 0..400 {
            learner.observe(&mut own, Class::Fast, 0, 0, true); // nothing was found to look up
            learner.observe(&mut own, Class::Fast, 2, 2, true);
        }
        let rates = learner.rates(None, Class::Fast, 3);
        assert!((rates[0] - 0.5).abs() < 0.01 && rates[1] > 0.98 && rates[2] < 0.02, "{rates:?}");
        assert!((expected(&rates) - 2.0).abs() < 0.05);
        assert!((learner.extent(Class::Fast, 0, 3) - 1.0).abs() < 0.05);
        assert!((learner.extent(Class::Fast, 1, 3) - 1.0).abs() < 0.05);
        assert!((learner.extent(Class::Model, 1, 3) - 2.0).abs() < 0.01);
    }

    #[test]
    fn law_and_expectation_agree() {
        let rates = [0.9, 0.5, 0.3];
        let law = law(&rates);
        assert!((law.iter().sum::<f64>() - 1.0).abs() < 1e-15);
        let mean: f64 = law.iter().enumerate().map(|(k, p)| (k + 1) as f64 * p).sum();
        assert!((mean - expected(&rates)).abs() < 1e-15);
        assert_eq!((expected(&[]), super::law(&[])), (1.0, vec![1.0]));
    }
}
