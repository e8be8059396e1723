//! How well the draft guesses: the probability that the true follow-up token is among its F best guesses.
//!
//! A [`RankCurve`] learns it from the ranks at which true tokens stood. It is made so that a greedy allocation over it is
//! optimal: `hit` is 0 at 0, never falls, and is concave.
//!
//! ```text
//! share[j] = (prior weight * prior[j] + count[j]) / (prior weight + all observations)     counts decay with age
//! gain     = the decreasing sequence nearest to share (pool adjacent violators)
//! hit(F)   = gain[0] + ... + gain[F - 1]
//! ```
//! The running sum of such a gain is the least concave majorant of the running sum of the shares (Grenander, "On the
//! theory of mortality measurement", 1956). The prior is the power law that the paper measured, miss = F^(-r), moved by
//! one guess: 1 - (1 + F)^(-r) is 0 without a guess and concave from there, which F^(-r) is not.

/// Ranks from here on count as "not among the guesses": nobody guesses that many tokens a place.
pub const RANKS: usize = 1024;

/// P(the rank of the true token < F), learnt online.
#[derive(Debug, Clone)]
pub struct RankCurve {
    exponent: f64,
    prior_weight: f64,
    /// By how much an observation outweighs the one before it; at least 1.
    growth: f64,
    /// The weight of the next observation.
    unit: f64,
    /// Weight of the observations of each rank, and of all.
    counts: Vec<f64>,
    observed: f64,
    /// The gain of each rank seen so far, and its running sum (one longer).
    gains: Vec<f64>,
    hits: Vec<f64>,
}

impl RankCurve {
    /// A curve that knows the prior alone: a miss of (1 + F)^(-exponent) for F guesses, worth 8 observations; an
    /// observation's weight falls to 1/e after 512 more.
    ///
    /// # Panics
    /// If `exponent` is not a number >= 0.
    pub fn new(exponent: f64) -> Self {
        assert!(exponent >= 0.0 && exponent.is_finite(), "exponent: expected a number >= 0, got {exponent}");
        let curve = Self {
            exponent,
            prior_weight: 8.0,
            growth: 1.0,
            unit: 1.0,
            counts: Vec::new(),
            observed: 0.0,
            gains: Vec::new(),
            hits: vec![0.0],
        };
        curve.with_memory(512.0)
    }

    /// The same with a prior worth `weight` observations.
    ///
    /// # Panics
    /// If `weight` is not positive.
    pub fn with_prior_weight(mut self, weight: f64) -> Self {
        assert!(weight > 0.0 && weight.is_finite(), "weight: expected a number > 0, got {weight}");
        self.prior_weight = weight;
        self.fit();
        self
    }

    /// The same with observations whose weight falls to 1/e after `observations` more (infinite: never).
    ///
    /// # Panics
    /// If `observations` is not positive.
    pub fn with_memory(mut self, observations: f64) -> Self {
        assert!(observations > 0.0, "observations: expected a number > 0, got {observations}");
        self.growth = (1.0 / observations).exp();
        self
    }

    /// The true token stood at `rank` among the guesses (0: the first); `None`: not among those that were ranked.
    pub fn observe(&mut self, rank: Option<usize>) {
        if let Some(rank) = rank.filter(|rank| *rank < RANKS) {
            if rank >= self.counts.len() {
                self.counts.resize(rank + 1, 0.0);
            }
            self.counts[rank] += self.unit;
        }
        self.observed += self.unit;
        // Instead of letting all old observations shrink, the new ones grow; now and then all are scaled back.
        self.unit *= self.growth;
        if self.unit > 1e64 {
            for count in &mut self.counts {
                *count /= self.unit;
            }
            self.observed /= self.unit;
            self.unit = 1.0;
        }
        self.fit();
    }

    /// How many observations the curve rests on, the prior not counted: as many full ones would weigh as much.
    pub fn observations(&self) -> f64 {
        // `unit` is the weight of the observation to come.
        self.observed / (self.unit / self.growth)
    }

    fn prior_hit(&self, guesses: usize) -> f64 {
        1.0 - (1.0 + guesses as f64).powf(-self.exponent)
    }

    /// The prior's weight on the scale of `counts`.
    fn prior_units(&self) -> f64 {
        self.prior_weight * (self.unit / self.growth)
    }

    /// The prior's part of all weight.
    fn prior_share(&self) -> f64 {
        self.prior_units() / (self.prior_units() + self.observed)
    }

    fn prior_gain(&self, guesses: usize) -> f64 {
        (self.prior_hit(guesses + 1) - self.prior_hit(guesses)).max(0.0) * self.prior_share()
    }

    fn fit(&mut self) {
        let all = self.prior_units() + self.observed;
        // Blocks of equal gain: (sum of shares, length). A block that rises above the one before it is merged into it.
        let mut blocks: Vec<(f64, usize)> = Vec::with_capacity(self.counts.len());
        for (rank, count) in self.counts.iter().enumerate() {
            let (mut sum, mut length) = (self.prior_gain(rank) + count / all, 1);
            while let Some(&(before, width)) = blocks.last()
                && sum * width as f64 > before * length as f64
            {
                sum += before;
                length += width;
                blocks.pop();
            }
            blocks.push((sum, length));
        }
        self.gains.clear();
        self.hits.clear();
        self.hits.push(0.0);
        let mut hit = 0.0;
        let mut least = f64::INFINITY;
        for (sum, length) in blocks {
            least = least.min(sum / length as f64); // rounding must not let it rise
            for _ in 0..length {
                hit += least;
                self.gains.push(least);
                self.hits.push(hit);
            }
        }
    }

    /// The probability that one more guess than `guesses` hits where those miss: hit(guesses + 1) - hit(guesses). Never
    /// rises with `guesses`.
    pub fn gain(&self, guesses: usize) -> f64 {
        match self.gains.get(guesses) {
            Some(&gain) => gain,
            // Beyond the ranks seen there is the prior alone. It cannot exceed the last gain, whose shares contain it.
            None => self.gains.last().copied().unwrap_or(f64::INFINITY).min(self.prior_gain(guesses)),
        }
    }

    /// The probability that the true token is among the first `guesses`.
    pub fn hit(&self, guesses: usize) -> f64 {
        match self.hits.get(guesses) {
            Some(&hit) => hit,
            None => {
                let seen = self.gains.len();
                let tail = (self.prior_hit(guesses) - self.prior_hit(seen)) * self.prior_share();
                (self.hits[seen] + tail).min(1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_observations_it_is_the_prior() {
        let curve = RankCurve::new(1.0);
        for guesses in 0..50 {
            assert!((curve.hit(guesses) - (1.0 - 1.0 / (1.0 + guesses as f64))).abs() < 1e-15);
        }
        assert_eq!((0..9).map(|guesses| RankCurve::new(0.0).hit(guesses)).sum::<f64>(), 0.0);
    }

    #[test]
    fn observations_outweigh_the_prior() {
        let mut curve = RankCurve::new(1.0).with_memory(f64::INFINITY);
        for step in 0..10_000 {
            // Half at rank 0, a quarter at rank 1, an eighth at rank 3, the rest nowhere.
            curve.observe(match step % 8 {
                0..4 => Some(0),
                4..6 => Some(1),
                6 => Some(3),
                _ => None,
            });
        }
        assert_eq!(curve.observations(), 10_000.0);
        let found: Vec<f64> = (0..6).map(|guesses| curve.hit(guesses)).collect();
        // Ranks 2 and 3 share their eighth: the least concave majorant.
        for (hit, wanted) in found.iter().zip([0.0, 0.5, 0.75, 0.8125, 0.875, 0.875]) {
            assert!((hit - wanted).abs() < 1e-3, "{found:?}");
        }
    }

    #[test]
    fn drift_is_followed() {
        let mut curve = RankCurve::new(1.0).with_memory(100.0);
        (0..5000).for_each(|_| curve.observe(Some(0)));
        assert!(curve.hit(1) > 0.9 && (curve.observations() - 100.0).abs() < 2.0, "{}", curve.observations());
        (0..300).for_each(|_| curve.observe(None));
        assert!(curve.hit(1) < 0.15, "{}", curve.hit(1));
        // The scaling back of the weights is not seen.
        let mut long = RankCurve::new(1.0).with_memory(2.0);
        (0..2000).for_each(|step| long.observe(Some(step % 2)));
        assert!(long.hit(4).is_finite() && (long.observations() - 2.54).abs() < 0.01, "{}", long.observations());
    }

    #[test]
    fn ranks_beyond_the_last_are_misses() {
        let mut curve = RankCurve::new(0.5);
        curve.observe(Some(usize::MAX));
        assert_eq!(curve.counts.len(), 0);
        curve.observe(Some(RANKS - 1));
        assert_eq!(curve.counts.len(), RANKS);
    }

    proptest! {
        #[test]
        fn concave_from_zero_and_never_above_one(
            exponent in prop_oneof![Just(0.0), 0.01f64..4.0],
            memory in prop_oneof![Just(f64::INFINITY), 1.0f64..300.0],
            ranks in prop::collection::vec(prop_oneof![3 => (0usize..12).prop_map(Some), 1 => (0usize..90).prop_map(Some), 1 => Just(None)], 0..200),
        ) {
            let mut curve = RankCurve::new(exponent).with_memory(memory);
            ranks.iter().for_each(|rank| curve.observe(*rank));
            prop_assert_eq!(curve.hit(0), 0.0);
            for guesses in 0..150 {
                prop_assert!(curve.gain(guesses) >= curve.gain(guesses + 1) && curve.gain(guesses) >= 0.0);
                prop_assert!((curve.hit(guesses + 1) - curve.hit(guesses) - curve.gain(guesses)).abs() < 1e-12);
                prop_assert!(curve.hit(guesses) <= 1.0 + 1e-12);
            }
            // A majorant: nowhere below what the shares themselves add up to.
            let mut share = 0.0;
            let all = curve.prior_units() + curve.observed;
            for (rank, count) in curve.counts.iter().enumerate() {
                share += curve.prior_gain(rank) + count / all;
                prop_assert!(curve.hit(rank + 1) > share - 1e-12);
            }
            prop_assert!((curve.hit(curve.counts.len()) - share).abs() < 1e-12);
        }
    }
}
