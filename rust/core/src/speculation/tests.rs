//! The law of what leaves a round, by enumeration: every drafted chain, every refusal, every correction, each with its
//! exact probability, through the methods that the run itself calls.

use super::*;
use crate::rng::Purpose;
use crate::view::{Array, ArrayMut};
use proptest::prelude::*;

/// How chains are drafted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Draft {
    /// Sampled from processed logits of its own.
    Sampled,
    /// The same, recorded (and therefore sampled) in single precision.
    Single,
    /// The target's own law.
    Same,
    /// The most probable token, passed without laws.
    Point,
}

/// Context-dependent laws over `vocabulary` tokens: one row of logits for every prefix of at most `depth` tokens.
struct Model {
    vocabulary: usize,
    depth: usize,
    target: Vec<Vec<f64>>,
    draft: Vec<Vec<f64>>,
    rule: Sampling,
    draft_rule: Sampling,
}

impl Model {
    /// Index of a prefix: shorter ones first.
    fn index(&self, prefix: &[usize]) -> usize {
        let shorter: usize = (0..prefix.len()).map(|length| self.vocabulary.pow(length as u32)).sum();
        shorter + prefix.iter().fold(0, |index, token| index * self.vocabulary + token)
    }

    fn law(&self, logits: &[f64], rule: Sampling) -> Vec<f64> {
        let (mut law, mut out) = (Law::default(), vec![0.0; self.vocabulary]);
        let logits = Array::from_slice(logits, &[self.vocabulary]).unwrap();
        process::Processor::default().law(&logits, &[], rule, &mut law).unwrap();
        law.write(&mut out);
        out
    }

    fn p(&self, prefix: &[usize]) -> Vec<f64> {
        self.law(&self.target[self.index(prefix)], self.rule)
    }

    fn q(&self, prefix: &[usize], draft: Draft) -> Vec<f64> {
        match draft {
            Draft::Sampled => self.law(&self.draft[self.index(prefix)], self.draft_rule),
            Draft::Single => self
                .law(&self.draft[self.index(prefix)], self.draft_rule)
                .iter()
                .map(|&q| f64::from(q as f32))
                .collect(),
            Draft::Same => self.p(prefix),
            Draft::Point => self.law(&self.draft[self.index(prefix)], Sampling::GREEDY),
        }
    }

    /// Adds `mass`, spread over the continuations of `prefix` to depth + 1 tokens by plain sampling.
    fn plain(&self, prefix: &mut Vec<usize>, mass: f64, law: &mut [f64]) {
        if mass == 0.0 {
            return;
        }
        if prefix.len() == self.depth + 1 {
            law[prefix.iter().fold(0, |index, token| index * self.vocabulary + token)] += mass;
            return;
        }
        for (token, p) in self.p(prefix).into_iter().enumerate() {
            prefix.push(token);
            self.plain(prefix, mass * p, law);
            prefix.pop();
        }
    }

    /// Every chain that can be drafted, with its probability.
    fn chains(&self, draft: Draft) -> Vec<(Vec<usize>, f64)> {
        let mut chains = vec![(Vec::new(), 1.0)];
        for _ in 0..self.depth {
            chains = (chains.into_iter())
                .flat_map(|(prefix, mass)| {
                    let q = self.q(&prefix, draft);
                    let total = law::total(&q);
                    let grow = move |(token, q): (usize, f64)| {
                        let mut longer = prefix.clone();
                        longer.push(token);
                        (longer, mass * q / total)
                    };
                    q.into_iter().enumerate().map(grow).filter(|(_, mass)| *mass > 0.0)
                })
                .collect();
        }
        chains
    }

    /// Total variation between the enumerated law of speculative decoding and that of plain sampling.
    fn distance(&self, draft: Draft) -> f64 {
        let (v, depth, size) = (self.vocabulary, self.depth, self.vocabulary.pow(self.depth as u32 + 1));
        let drafted = self.chains(draft);
        let rows = drafted.len();
        let tokens: Vec<i64> = drafted.iter().flat_map(|(chain, _)| chain.iter().map(|&token| token as i64)).collect();
        let prefixes =
            |chain: &'_ Vec<usize>, count: usize| (0..count).map(|i| chain[..i].to_vec()).collect::<Vec<_>>();
        let rows_of = |(chain, _): &(Vec<usize>, f64)| {
            prefixes(chain, depth + 1)
                .iter()
                .flat_map(|prefix| self.target[self.index(prefix)].clone())
                .collect::<Vec<_>>()
        };
        let logits: Vec<f64> = drafted.iter().flat_map(rows_of).collect();
        let laws: Vec<f64> = (drafted.iter())
            .flat_map(|(chain, _)| {
                prefixes(chain, depth).iter().flat_map(|prefix| self.q(prefix, draft)).collect::<Vec<_>>()
            })
            .collect();
        let single: Vec<f32> = laws.iter().map(|&q| q as f32).collect();
        let laws = match draft {
            Draft::Point => None,
            Draft::Single => Some(Array::from_slice(&single, &[rows, depth, v]).unwrap()),
            _ => Some(Array::from_slice(&laws, &[rows, depth, v]).unwrap()),
        };
        let tokens = Array::from_slice(&tokens, &[rows, depth]).unwrap();
        let logits = Array::from_slice(&logits, &[rows, depth + 1, v]).unwrap();
        let chains = Chains::new(tokens, None, laws, logits, vec![self.rule; rows], true).unwrap();

        let mut found = vec![0.0; size];
        let mut scratch = verify::Scratch::default();
        for (row, (tokens, mass)) in drafted.iter().enumerate() {
            let chain = chains.chain(row);
            let mut reach = *mass;
            for i in 0..=depth {
                let accept = if i < depth { chain.acceptance(i, &mut scratch).unwrap() } else { 0.0 };
                assert!((0.0..=1.0).contains(&accept));
                let mut law = vec![0.0; v];
                chain.correction(i, &mut scratch).unwrap().write(&mut law);
                assert!((law::total(&law) - 1.0).abs() < 1e-14 && law.iter().all(|&r| r >= 0.0));
                for (token, r) in law.into_iter().enumerate() {
                    let mut prefix = tokens[..i].to_vec();
                    prefix.push(token);
                    self.plain(&mut prefix, reach * (1.0 - accept) * r, &mut found);
                }
                reach *= accept;
            }
            self.compare_run(&chain, &mut scratch);
        }
        let mut wanted = vec![0.0; size];
        self.plain(&mut Vec::new(), 1.0, &mut wanted);
        wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0
    }

    /// The run does what the probabilities and laws say, for uniform numbers at and around every threshold.
    fn compare_run(&self, chain: &Chain<'_, '_>, scratch: &mut verify::Scratch) {
        let accept: Vec<f64> = (0..self.depth).map(|i| chain.acceptance(i, scratch).unwrap()).collect();
        for refused in 0..=self.depth {
            // A uniform number is below 1, so a certain acceptance cannot be refused; nor a certain refusal passed.
            if accept[..refused].contains(&0.0) || (refused < self.depth && accept[refused] == 1.0) {
                continue;
            }
            for u in [0.0, 0.3, 0.999_999] {
                let uniform = |i: usize, purpose: Purpose| match purpose {
                    Purpose::Accept if i < refused => accept[i].next_down(),
                    Purpose::Accept => accept[i],
                    Purpose::Residual if i == refused && refused < self.depth => u,
                    Purpose::Target if i == refused && refused == self.depth => u,
                    other => panic!("{other:?} at {i} has nothing to do here"),
                };
                let expected = (refused, chain.correction(refused, scratch).unwrap().draw(u));
                assert_eq!(chain.run(scratch, uniform).unwrap(), expected);
            }
        }
    }
}

fn rule() -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![Just(0.0), Just(0.3), Just(0.8), Just(1.0), Just(2.5)];
    let top_p = prop_oneof![Just(1.0), Just(0.95), Just(0.5), Just(0.1)];
    (temperature, 0i64..4, top_p)
        .prop_map(|(temperature, top_k, top_p)| Sampling::new(0, temperature, top_k, top_p).unwrap())
}

/// Rows of logits with ties and masked tokens, never wholly masked.
fn rows(count: usize, vocabulary: usize) -> impl Strategy<Value = Vec<Vec<f64>>> {
    let logit = prop_oneof![1 => Just(f64::NEG_INFINITY), 3 => (-4i32..5).prop_map(f64::from), 4 => -3.0f64..3.0];
    let row =
        (prop::collection::vec(logit, vocabulary), 0..vocabulary, -2.0f64..2.0).prop_map(|(mut row, token, value)| {
            row[token] = value;
            row
        });
    prop::collection::vec(row, count)
}

fn model() -> impl Strategy<Value = Model> {
    let size = prop_oneof![(2usize..=4, 1usize..=2), (2usize..=3, Just(3usize))];
    size.prop_flat_map(|(vocabulary, depth)| {
        let prefixes = (0..=depth).map(|length| vocabulary.pow(length as u32)).sum();
        (rows(prefixes, vocabulary), rows(prefixes, vocabulary), rule(), rule()).prop_map(
            move |(target, draft, rule, draft_rule)| Model { vocabulary, depth, target, draft, rule, draft_rule },
        )
    })
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "V {} K {} target {:?} draft {:?}", self.vocabulary, self.depth, self.target, self.draft)?;
        write!(f, " rule {:?} draft rule {:?}", self.rule, self.draft_rule)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_emitted_law_is_the_targets(model in model()) {
        for draft in [Draft::Sampled, Draft::Single, Draft::Same, Draft::Point] {
            let distance = model.distance(draft);
            prop_assert!(distance < 1e-12, "{:?}: total variation {:e}", draft, distance);
        }
    }
}

/// The enumeration would notice: the same chain verified against another law than it was drawn from.
#[test]
fn a_wrong_record_is_seen() {
    let p = [0.5f64, 0.3, 0.2].map(f64::ln);
    let both = [p, p].concat();
    let logits = Array::from_slice(&both, &[1, 2, 3]).unwrap();
    let (drawn, recorded) = ([0.2, 0.3, 0.5], [0.25, 0.3, 0.45]);
    let mut found = [0.0; 3];
    for token in 0..3usize {
        let tokens = [token as i64];
        let chains = Chains::new(
            Array::from_slice(&tokens, &[1, 1]).unwrap(),
            None,
            Some(Array::from_slice(&recorded, &[1, 1, 3]).unwrap()),
            logits.clone(),
            vec![Sampling::new(0, 1.0, 0, 1.0).unwrap()],
            true,
        )
        .unwrap();
        let mut scratch = verify::Scratch::default();
        let accept = chains.chain(0).acceptance(0, &mut scratch).unwrap();
        let law = chains.chain(0).correction(0, &mut scratch).unwrap();
        found[token] += drawn[token] * accept;
        for (other, slot) in found.iter_mut().enumerate() {
            *slot += drawn[token] * (1.0 - accept) * law.probability(other);
        }
    }
    // The figures of the sheet: (.478, .300, .222) instead of (.5, .3, .2).
    for (found, expected) in found.iter().zip([0.4778, 0.3, 0.2222]) {
        assert!((found - expected).abs() < 1e-4, "{found}");
    }
}

struct Batch {
    tokens: Vec<i64>,
    laws: Vec<f32>,
    logits: Vec<f32>,
    rules: Vec<Sampling>,
    requests: Vec<i64>,
    positions: Vec<i64>,
}

const DEPTH: usize = 3;
const WIDTH: usize = 5;

impl Batch {
    fn new(requests: &[i64]) -> Self {
        let noise = |request: i64, slot: usize| {
            (crate::rng::uniform(5, request as u32, slot as u64, Purpose::Other) * 3.0) as f32
        };
        let mut batch = Batch {
            tokens: vec![],
            laws: vec![],
            logits: vec![],
            rules: vec![],
            requests: requests.to_vec(),
            positions: vec![],
        };
        for &request in requests {
            batch.tokens.extend((0..DEPTH).map(|i| (request + i as i64) % WIDTH as i64));
            for i in 0..DEPTH {
                let row: Vec<f32> = (0..WIDTH).map(|j| noise(request, i * WIDTH + j) + 0.01).collect();
                let sum: f32 = row.iter().sum();
                batch.laws.extend(row.iter().map(|q| q / sum));
            }
            batch.logits.extend((0..(DEPTH + 1) * WIDTH).map(|slot| noise(request, 1000 + slot)));
            batch.rules.push(if request % 3 == 0 { Sampling::GREEDY } else { Sampling::new(0, 0.8, 0, 0.95).unwrap() });
            batch.positions.push(request * 17);
        }
        batch
    }

    fn verify(&self) -> Vec<(i32, i64)> {
        let b = self.rules.len();
        let chains = Chains::new(
            Array::from_slice(&self.tokens, &[b, DEPTH]).unwrap(),
            None,
            Some(Array::from_slice(&self.laws, &[b, DEPTH, WIDTH]).unwrap()),
            Array::from_slice(&self.logits, &[b, DEPTH + 1, WIDTH]).unwrap(),
            self.rules.clone(),
            true,
        )
        .unwrap();
        let (requests, positions) =
            (Array::from_slice(&self.requests, &[b]).unwrap(), Array::from_slice(&self.positions, &[b]).unwrap());
        let streams = Streams::new(11, &requests, &positions, b).unwrap();
        let (mut accepted, mut next) = (vec![-1i32; b], vec![-1i64; b]);
        let out = ArrayMut::from_slice(&mut next, &[b]).unwrap();
        verify(&chains, &streams, ArrayMut::from_slice(&mut accepted, &[b]).unwrap(), out).unwrap();
        accepted.into_iter().zip(next).collect()
    }
}

#[test]
fn a_request_does_not_see_its_batch() {
    let requests: Vec<i64> = (0..40).collect();
    let together = Batch::new(&requests).verify();
    assert!((0..=DEPTH as i32).all(|count| together.iter().any(|&(accepted, _)| accepted == count)), "{together:?}");
    let reversed: Vec<i64> = requests.iter().rev().copied().collect();
    let mut backwards = Batch::new(&reversed).verify();
    backwards.reverse();
    assert_eq!(together, backwards);
    for &request in &requests {
        assert_eq!(Batch::new(&[request]).verify(), together[request as usize..][..1]);
    }
}
