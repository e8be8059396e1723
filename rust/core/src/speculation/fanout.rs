//! Fan-out: how many follow-up tokens to guess after each accepted length.
//!
//! A chain of K drafted tokens can end in K + 1 places; place k has probability P_k, and with F_k guesses there the true
//! token is among them with probability hit_k(F_k). A budget of B guesses is to be spread so that the cache hits most
//! often: maximise sum P_k hit_k(F_k) with sum F_k = B.
//!
//! * [`geometric`]: the paper's closed form, for real numbers, P_k capped-geometric and a miss of F^(-r);
//! * [`water_fill`]: integers, for any P and any concave curves, such as those that were measured ([`RankCurve`]).
//!
//! Source: Kumar, Dao, May, "Speculative Speculative Decoding" (2026), Definition 11 and Theorem 12.

use super::ranks::RankCurve;
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// The probabilities of 0..=length accepted tokens where each is accepted with probability `acceptance`:
/// a^k (1 - a) for k < K, a^K for K.
///
/// # Panics
/// If `acceptance` is outside [0, 1].
pub fn capped_geometric(acceptance: f64, length: usize) -> Vec<f64> {
    assert!((0.0..=1.0).contains(&acceptance), "acceptance: expected a number in [0, 1], got {acceptance}");
    let mut reached = 1.0;
    let mut weights = Vec::with_capacity(length + 1);
    for _ in 0..length {
        weights.push(reached * (1.0 - acceptance));
        reached *= acceptance;
    }
    weights.push(reached);
    weights
}

/// The allocation that misses least where P_k is capped-geometric and F guesses miss with probability F^(-exponent):
/// K + 1 real numbers whose sum is `budget`, F_k proportional to P_k^(1 / (1 + exponent)).
///
/// The published form, F_0 a^(k / (1 + r)) and (1 - a)^(-1 / (1 + r)) in the last place, divides by zero at a = 1; this
/// one does not, and gives the limits: everything to the last place at a = 1, everything to the first at a = 0.
///
/// # Panics
/// If `acceptance` is outside [0, 1], or `exponent` or `budget` negative or not finite.
pub fn geometric(acceptance: f64, exponent: f64, length: usize, budget: f64) -> Vec<f64> {
    assert!(exponent >= 0.0 && exponent.is_finite(), "exponent: expected a number >= 0, got {exponent}");
    assert!(budget >= 0.0 && budget.is_finite(), "budget: expected a number >= 0, got {budget}");
    let power = 1.0 / (1.0 + exponent);
    let mut shares = capped_geometric(acceptance, length);
    for share in &mut shares {
        *share = share.powf(power);
    }
    let all: f64 = shares.iter().sum();
    for share in &mut shares {
        *share *= budget / all;
    }
    shares
}

/// The model's probability of a miss: sum of P_k F_k^(-exponent) over the places that can happen. Fractions below one
/// guess are taken as the formula has them, so it is not a probability where an F_k is below 1.
///
/// # Panics
/// As [`geometric`].
pub fn geometric_miss(acceptance: f64, exponent: f64, fan_out: &[f64]) -> f64 {
    assert!(exponent >= 0.0 && exponent.is_finite(), "exponent: expected a number >= 0, got {exponent}");
    let Some(length) = fan_out.len().checked_sub(1) else { return 0.0 };
    (capped_geometric(acceptance, length).iter().zip(fan_out))
        .filter(|(weight, _)| **weight > 0.0)
        .map(|(weight, guesses)| weight * guesses.powf(-exponent))
        .sum()
}

/// How many different tokens there are to guess at each place: any but the drafted one where that was refused, any at
/// all after a whole chain.
pub fn most(vocabulary: usize, length: usize) -> Vec<usize> {
    let mut most = vec![vocabulary.saturating_sub(1); length];
    most.push(vocabulary);
    most
}

/// A place that could have one more guess. The largest gain comes first; of equal ones the lowest place.
#[derive(Debug, PartialEq)]
struct Place {
    gain: f64,
    place: usize,
}

impl Eq for Place {}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.place.cmp(&self.place))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Spreads `budget` guesses over places: place k is weighted by `outcome_weights[k]` and takes at most `most[k]`.
///
/// Each guess goes where it adds most. Since the curves are concave that is the best allocation of every budget, and the
/// allocation of a smaller budget is contained in that of a larger. The sum is exactly min(budget, sum of `most`): a
/// guess that adds nothing (a weight of 0) is spent all the same. Weights that are negative or NaN count as 0.
///
/// # Panics
/// If the three slices are not equally long.
pub fn water_fill(
    outcome_weights: &[f64],
    curves: &[impl Borrow<RankCurve>],
    budget: usize,
    most: &[usize],
) -> Vec<usize> {
    assert_eq!(outcome_weights.len(), curves.len(), "as many weights as curves");
    assert_eq!(outcome_weights.len(), most.len(), "as many weights as bounds");
    let gain = |place: usize, guesses: usize| outcome_weights[place].max(0.0) * curves[place].borrow().gain(guesses);
    let mut fan_out = vec![0; most.len()];
    let mut open: BinaryHeap<Place> =
        (0..most.len()).filter(|&place| most[place] > 0).map(|place| Place { gain: gain(place, 0), place }).collect();
    for _ in 0..budget {
        let Some(Place { place, .. }) = open.pop() else { break };
        fan_out[place] += 1;
        if fan_out[place] < most[place] {
            open.push(Place { gain: gain(place, fan_out[place]), place });
        }
    }
    fan_out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Section 2.4 as it is printed: F_0 a^(k/(1+r)), the last one over (1 - a)^(1/(1+r)).
    fn printed(a: f64, r: f64, length: usize, budget: f64) -> Vec<f64> {
        let s = 1.0 / (1.0 + r);
        let mut shape: Vec<f64> = (0..length).map(|k| a.powf(k as f64 * s)).collect();
        shape.push(a.powf(length as f64 * s) * (1.0 - a).powf(-s));
        let first = budget / shape.iter().sum::<f64>();
        shape.iter().map(|share| share * first).collect()
    }

    #[test]
    fn worked_values() {
        for (a, wanted, miss) in [
            (0.8, [3.90, 3.49, 3.12, 2.79, 2.49, 2.23, 2.00, 3.99], 0.316),
            (0.6, [6.06, 4.70, 3.64, 2.82, 2.18, 1.69, 1.31, 1.60], 0.261),
        ] {
            let found = geometric(a, 1.0, 7, 24.0);
            assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 0.006), "{found:?}");
            assert!((geometric_miss(a, 1.0, &found) - miss).abs() < 6e-4);
            assert!((geometric_miss(a, 1.0, &[3.0; 8]) - 0.333).abs() < 6e-4);
        }
    }

    #[test]
    fn the_limits_of_certainty() {
        assert_eq!(geometric(1.0, 0.7, 3, 10.0), [0.0, 0.0, 0.0, 10.0]);
        assert_eq!(geometric(0.0, 0.7, 3, 10.0), [10.0, 0.0, 0.0, 0.0]);
        assert_eq!((geometric(0.5, 1.0, 0, 4.0), geometric(1.0, 1.0, 0, 4.0)), (vec![4.0], vec![4.0]));
        // They are limits, not exceptions.
        let near = geometric(1.0 - 1e-13, 0.7, 3, 10.0);
        assert!(near[3] > 9.99, "{near:?}");
        assert!(geometric(1e-13, 0.7, 3, 10.0)[0] > 9.99);
        assert_eq!(geometric_miss(1.0, 1.0, &[0.0, 0.0, 4.0]), 0.25);
        assert_eq!(geometric_miss(0.3, 1.0, &[]), 0.0);
    }

    proptest! {
        /// P9.
        #[test]
        fn geometric_is_the_printed_form_and_beats_uniform(a in 0.001f64..0.999, r in 0.01f64..6.0, length in 0usize..12, budget in 0.5f64..200.0) {
            let (found, wanted) = (geometric(a, r, length, budget), printed(a, r, length, budget));
            for (f, w) in found.iter().zip(&wanted) {
                prop_assert!((f - w).abs() <= 1e-9 * budget, "{:?} {:?}", found, wanted);
            }
            prop_assert!((found.iter().sum::<f64>() - budget).abs() < 1e-9 * budget);
            let uniform = vec![budget / (length + 1) as f64; length + 1];
            prop_assert!(geometric_miss(a, r, &found) <= geometric_miss(a, r, &uniform) * (1.0 + 1e-12));
        }
    }

    /// Curves after some observations, and what goes with them.
    fn places() -> impl Strategy<Value = (Vec<f64>, Vec<RankCurve>, Vec<usize>)> {
        let curve = (0.0f64..3.0, prop::collection::vec(prop::option::of(0usize..6), 0..20)).prop_map(|(r, ranks)| {
            let mut curve = RankCurve::new(r);
            ranks.into_iter().for_each(|rank| curve.observe(rank));
            curve
        });
        let weight = prop_oneof![1 => Just(0.0), 5 => 0.0f64..1.0];
        prop::collection::vec((weight, curve, 0usize..5), 1..5).prop_map(|places| {
            let (weights, rest): (Vec<_>, Vec<_>) = places.into_iter().map(|(w, c, m)| (w, (c, m))).unzip();
            let (curves, most) = rest.into_iter().unzip();
            (weights, curves, most)
        })
    }

    fn value(weights: &[f64], curves: &[RankCurve], fan_out: &[usize]) -> f64 {
        weights.iter().zip(curves).zip(fan_out).map(|((w, c), &f)| w * c.hit(f)).sum()
    }

    /// The best value of spreading exactly `budget`, by trying everything.
    fn best(weights: &[f64], curves: &[RankCurve], most: &[usize], budget: usize) -> Option<f64> {
        let Some((&limit, rest)) = most.split_first() else { return (budget == 0).then_some(0.0) };
        (0..=limit.min(budget))
            .filter_map(|f| Some(weights[0] * curves[0].hit(f) + best(&weights[1..], &curves[1..], rest, budget - f)?))
            .max_by(f64::total_cmp)
    }

    proptest! {
        /// P8: integers, the whole budget, nested, and as good as anything.
        #[test]
        fn water_filling_is_optimal((weights, curves, most) in places()) {
            let room: usize = most.iter().sum();
            let mut before = vec![0; most.len()];
            for budget in 0..=room + 2 {
                let found = water_fill(&weights, &curves, budget, &most);
                prop_assert_eq!(found.iter().sum::<usize>(), budget.min(room));
                prop_assert!(found.iter().zip(&most).all(|(f, m)| f <= m));
                prop_assert!(found.iter().zip(&before).all(|(f, b)| f >= b));
                let reached = value(&weights, &curves, &found);
                let possible = best(&weights, &curves, &most, budget.min(room)).unwrap();
                prop_assert!((reached - possible).abs() < 1e-12, "{:?}: {} of {}", found, reached, possible);
                before = found;
            }
        }

        /// P10: on a fixed trace of outcomes, a larger budget hits wherever a smaller did.
        #[test]
        fn hits_never_fall_with_the_budget((weights, curves, most) in places(), trace in prop::collection::vec((0usize..5, 0usize..8), 1..60)) {
            let hits = |budget| {
                let fan_out = water_fill(&weights, &curves, budget, &most);
                trace.iter().filter(|(place, rank)| fan_out.get(*place).is_some_and(|f| rank < f)).count()
            };
            let hits: Vec<usize> = (0..20).map(hits).collect();
            prop_assert!(hits.is_sorted(), "{:?}", hits);
        }
    }

    /// E10.
    #[test]
    fn odd_sizes() {
        let curves = vec![RankCurve::new(1.0); 8];
        let weights = capped_geometric(0.8, 7);
        // Fewer guesses than places: the most probable ones get them, others none.
        assert_eq!(water_fill(&weights, &curves, 3, &most(100, 7)), [1, 1, 0, 0, 0, 0, 0, 1]);
        // More than there are tokens: two tokens leave one to guess after a refusal.
        assert_eq!(water_fill(&weights, &curves, 100, &most(2, 7)), [1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(water_fill(&weights[..1], &curves[..1], 5, &most(3, 0)), [3]);
        assert_eq!(water_fill(&capped_geometric(0.5, 1), &curves[..2], 5, &most(9, 1)), [3, 2]);
        assert_eq!(water_fill(&[], &curves[..0], 5, &[]), [0usize; 0]);
        assert_eq!(most(1, 2), [0, 0, 1]);
        // Ties go to the lower place, weights that are none count as zero and are served last.
        assert_eq!(water_fill(&[f64::NAN, 0.1, 0.1, -3.0], &curves[..4], 5, &[2; 4]), [1, 2, 2, 0]);
        let borrowed: Vec<&RankCurve> = curves.iter().collect();
        assert_eq!(
            water_fill(&weights, &borrowed, 24, &most(100, 7)),
            water_fill(&weights, &curves, 24, &most(100, 7))
        );
    }
}
