use super::rounding::{FILL, Rounded, round_tokens};
use super::rounding_backward::{Pairs, round_tokens_backward};
use super::rounding_rules::{Choice, Rounding, Rule};
use crate::gemm::tests::{at_every_level, noise};
use crate::view::{Array, ArrayMut};
use proptest::prelude::*;

const RULES: [Rule; 6] = [Rule::Nearest, Rule::Stochastic, Rule::NearestScore, Rule::Balance, Rule::Up, Rule::Down];

/// Sorts everything.
fn plainly(rounding: &Rounding, scores: &[f64], experts: usize, ids: &[i32], slots: usize) -> Vec<(usize, usize)> {
    let tokens = scores.len() / experts;
    let chose = |token: usize, expert: usize| ids[token * slots..][..slots].contains(&(expert as i32));
    let counts: Vec<usize> = (0..experts).map(|e| (0..tokens).filter(|&t| chose(t, e)).count()).collect();
    let targets = rounding.targets(&counts, tokens);
    let mut pairs = Vec::new();
    for expert in 0..experts {
        let score = |token: usize| scores[token * experts + expert];
        let mut order: Vec<usize> = (0..tokens).collect();
        order.sort_by(|&a, &b| {
            let first = chose(b, expert).cmp(&chose(a, expert));
            first.then(score(b).partial_cmp(&score(a)).unwrap()).then(a.cmp(&b))
        });
        let count = counts[expert];
        let target = targets[expert].unwrap_or_else(|| {
            let Choice { down, up } = rounding.choice(count, tokens);
            let own: f64 = order[down..count].iter().map(|&token| score(token)).sum();
            let other: f64 = order[count..up].iter().map(|&token| score(token)).sum();
            if rounding.coin(expert) < own / (own + other) { up } else { down }
        });
        pairs.extend(order[..target].iter().map(|&token| (token, expert)));
    }
    pairs.sort_unstable();
    pairs
}

fn round(rounding: &Rounding, scores: &[f64], experts: usize, ids: &[i32], slots: usize, renormalise: bool) -> Rounded {
    let tokens = scores.len() / experts;
    let scores = Array::from_slice(scores, &[tokens, experts]).unwrap();
    let ids = Array::from_slice(ids, &[tokens, slots]).unwrap();
    round_tokens(rounding, &scores, &ids, None, renormalise).unwrap()
}

proptest! {
    // Few distinct scores, so that ties are everywhere; enough tokens that candidates are cut back several times.
    #[test]
    fn equals_sorting_everything(
        steps in prop::collection::vec(0i32..5, 1..900), experts in 1usize..5, tile in 1usize..40, rule in 0usize..6, seed: u64,
    ) {
        let scores: Vec<f64> = steps[..steps.len() / experts * experts].iter().map(|&s| f64::from(s) / 4.0).collect();
        let ids: Vec<i32> = (0..scores.len() / experts).map(|t| (t * t % (experts + 1)) as i32).collect();
        let rounding = Rounding { tile, rule: RULES[rule], seed, step: 1 };
        let got = round(&rounding, &scores, experts, &ids, 1, false);
        let pairs: Vec<(usize, usize)> =
            got.token_ids.iter().zip(&got.expert_ids).map(|(&t, &e)| (t as usize, e as usize)).collect();
        prop_assert_eq!(&pairs, &plainly(&rounding, &scores, experts, &ids, 1));
        for ((token, expert), (slot, weight)) in pairs.into_iter().zip(got.slots.iter().zip(&got.weights)) {
            prop_assert_eq!(*slot == FILL, ids[token] != expert as i32);
            prop_assert_eq!(*weight, scores[token * experts + expert]);
        }
    }

    #[test]
    fn rules_keep_their_promises(counts in prop::collection::vec(0usize..500, 1..60), tile in 1usize..130, seed: u64) {
        let tokens = 1 << 20; // nothing is clipped
        for rule in RULES.into_iter().filter(|&rule| rule != Rule::NearestScore) {
            let targets = Rounding { tile, rule, seed, step: 0 }.targets(&counts, tokens);
            let mut drift = 0i64;
            for (&count, target) in counts.iter().zip(targets) {
                let target = target.unwrap();
                prop_assert!(target.is_multiple_of(tile) && target.abs_diff(count) < tile);
                drift += target as i64 - count as i64;
                match rule {
                    Rule::Nearest => prop_assert!(2 * target.abs_diff(count) <= tile && (2 * (count % tile) != tile || target < count)),
                    Rule::Up => prop_assert!(target >= count),
                    Rule::Down => prop_assert!(target <= count),
                    Rule::Balance => prop_assert!(2 * drift.unsigned_abs() <= tile as u64),
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn gradients_reach_what_a_weight_came_from() {
    at_every_level(|_| {
        let (tokens, experts, slots) = (30, 5, 2);
        let scores: Vec<f64> = noise(tokens * experts, 3).into_iter().map(|x| 1.5 + x).collect();
        let ids: Vec<i32> =
            (0..tokens).flat_map(|t| [(t % experts) as i32, ((t / 2 + 1 + t) % experts) as i32]).collect();
        let ids: Vec<i32> =
            ids.chunks(2).flat_map(|two| if two[0] == two[1] { [two[0], -1] } else { [two[0], two[1]] }).collect();
        let rounding = Rounding { tile: 7, rule: Rule::Nearest, seed: 0, step: 0 };
        for renormalise in [false, true] {
            let rounded = round(&rounding, &scores, experts, &ids, slots, renormalise);
            assert!(rounded.slots.contains(&FILL));
            let g = noise(rounded.len(), 4);
            let one = [rounded.len()];
            let pairs = Pairs {
                expert_ids: Array::from_slice(&rounded.expert_ids, &one).unwrap(),
                token_ids: Array::from_slice(&rounded.token_ids, &one).unwrap(),
                slots: Array::from_slice(&rounded.slots, &one).unwrap(),
            };
            let shape = [tokens, experts];
            let mut out = vec![f64::NAN; scores.len()];
            round_tokens_backward(
                &pairs,
                &Array::from_slice(&g, &one).unwrap(),
                &Array::from_slice(&scores, &shape).unwrap(),
                None,
                renormalise,
                ArrayMut::from_slice(&mut out, &shape).unwrap(),
                None,
            )
            .unwrap();
            let loss = |scores: &[f64]| -> f64 {
                let again = round(&rounding, scores, experts, &ids, slots, renormalise);
                assert_eq!(again.token_ids, rounded.token_ids);
                again.weights.iter().zip(&g).map(|(w, g)| w * g).sum()
            };
            for at in 0..scores.len() {
                let (mut up, mut down) = (scores.clone(), scores.clone());
                up[at] += 1e-7;
                down[at] -= 1e-7;
                let slope = (loss(&up) - loss(&down)) / 2e-7;
                assert!((out[at] - slope).abs() < 1e-6, "{at}: {} {slope}", out[at]);
            }
        }
    });
}
