//! Models of few tokens: tables of p and q by the last token, drafted, guessed and verified for real.

use super::process::Truth;
use crate::rng::{Purpose, uniform};
use crate::speculation::acceptance;

/// A target and a draft whose next-token logits depend on the last token.
#[derive(Debug, Clone, PartialEq)]
pub struct Toy {
    /// `[vocabulary][vocabulary]`: laws of the target.
    p: Vec<Vec<f64>>,
    /// Laws of the draft, before re-weighting.
    q: Vec<Vec<f64>>,
    /// The laws it draws from: Saguaro weights on its best guesses.
    drawn: Vec<Vec<f64>>,
    /// The draft's tokens, best first.
    order: Vec<Vec<u32>>,
}

/// Drafted tokens with the laws they were drawn from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Content {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// One law each; none: the token is a function of the prefix.
    pub laws: Vec<Option<Vec<f64>>>,
}

/// softmax(z / temperature); at 0 all mass on the first largest.
fn law(logits: &[f64], temperature: f64) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = if temperature == 0.0 {
        let best = logits.iter().position(|z| *z == top).unwrap_or(0);
        (0..logits.len()).map(|i| f64::from(u8::from(i == best))).collect()
    } else {
        logits.iter().map(|z| libm::exp((z - top) / temperature)).collect()
    };
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

fn draw(law: &[f64], number: f64) -> u32 {
    let total: f64 = law.iter().sum();
    let mut left = number * total;
    let mut last = 0;
    for (token, p) in law.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        last = token;
        if left < *p {
            break;
        }
        left -= p;
    }
    last as u32
}

impl Toy {
    /// Random tables: target logits are normal numbers times `sharpness`, the draft's differ by noise times `error`.
    /// Temperatures of both; `saguaro` is the weight C of the `guesses` tokens that the draft likes best (1: none).
    pub fn random(
        seed: u64,
        vocabulary: usize,
        sharpness: f64,
        error: f64,
        temperature: f64,
        saguaro: f64,
        guesses: usize,
    ) -> Self {
        let mut at = 0;
        let mut normal = || {
            // The sum of twelve uniform numbers less six.
            at += 1;
            (0..12).map(|i| uniform(seed, 12 * at + i, 0, Purpose::Other)).sum::<f64>() - 6.0
        };
        let (mut p, mut q, mut drawn, mut order) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..vocabulary {
            let logits: Vec<f64> = (0..vocabulary).map(|_| sharpness * normal()).collect();
            let drafts: Vec<f64> = logits.iter().map(|z| z + error * normal()).collect();
            let mut best: Vec<u32> = (0..vocabulary as u32).collect();
            best.sort_by(|&a, &b| drafts[b as usize].total_cmp(&drafts[a as usize]).then(a.cmp(&b)));
            let plain = law(&drafts, temperature);
            let mut weights = plain.clone();
            if temperature > 0.0 {
                for token in &best[..guesses.min(vocabulary)] {
                    weights[*token as usize] *= saguaro;
                }
            }
            let sum: f64 = weights.iter().sum();
            let weights = if sum > 0.0 { weights.iter().map(|w| w / sum).collect() } else { plain.clone() };
            p.push(law(&logits, temperature));
            q.push(plain);
            drawn.push(weights);
            order.push(best);
        }
        Self { p, q, drawn, order }
    }

    /// Number of tokens.
    pub fn vocabulary(&self) -> usize {
        self.p.len()
    }

    fn row<'a>(table: &'a [Vec<f64>], context: &[u32]) -> &'a [f64] {
        &table[context.last().copied().unwrap_or(0) as usize]
    }

    /// One plain token.
    pub fn plain(&self, context: &[u32], number: f64) -> u32 {
        draw(Self::row(&self.p, context), number)
    }

    /// Drafts one more token.
    pub fn extend(&self, context: &[u32], chain: &mut Content, number: f64) {
        let last = chain.tokens.last().or(context.last()).copied().unwrap_or(0);
        let law = &self.drawn[last as usize];
        chain.tokens.push(draw(law, number));
        chain.laws.push(Some(law.clone()));
    }

    /// The fast draft: the token the target has said most often to follow, by table: a function of the prefix.
    pub fn fast(&self, context: &[u32], length: u32) -> Content {
        let mut last = context.last().copied().unwrap_or(0);
        let mut chain = Content::default();
        for _ in 0..length {
            last = (last + 1) % self.p.len() as u32;
            chain.tokens.push(last);
            chain.laws.push(None);
        }
        chain
    }

    /// The tokens to guess after `prefix`, best first; `drafted` is left out: refused, it cannot follow.
    pub fn guesses(&self, prefix: &[u32], drafted: Option<u32>, count: u32) -> Vec<u32> {
        let order = &self.order[prefix.last().copied().unwrap_or(0) as usize];
        order.iter().copied().filter(|token| Some(*token) != drafted).take(count as usize).collect()
    }

    /// Exact rejection sampling.
    pub fn verify(&self, context: &[u32], chain: &Content, length: u32, number: &mut impl FnMut() -> f64) -> Truth {
        let mut prefix = context.to_vec();
        for place in 0..length as usize {
            let (p, token) = (Self::row(&self.p, &prefix), chain.tokens[place]);
            let point;
            let q = match &chain.laws[place] {
                Some(law) => law.as_slice(),
                None => {
                    point = (0..p.len() as u32).map(|t| f64::from(u8::from(t == token))).collect::<Vec<f64>>();
                    &point
                }
            };
            if number() >= acceptance(p[token as usize], q[token as usize]) {
                let mut rest: Vec<f64> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect();
                if rest.iter().sum::<f64>() <= 0.0 {
                    rest = p.to_vec();
                }
                let after = draw(&rest, number());
                let rank = self.guesses(&prefix, Some(token), u32::MAX).iter().position(|t| *t == after);
                return Truth { accepted: place as u32, token: after, rank: rank.map(|rank| rank as u32) };
            }
            prefix.push(token);
        }
        let after = draw(Self::row(&self.p, &prefix), number());
        let rank = self.guesses(&prefix, None, u32::MAX).iter().position(|t| *t == after);
        Truth { accepted: length, token: after, rank: rank.map(|rank| rank as u32) }
    }

    /// The acceptance rate of a drafted token, averaged over last tokens: the sum of min(p, q).
    pub fn acceptance(&self) -> f64 {
        let rows = self.p.iter().zip(&self.drawn);
        let each = rows.map(|(p, q)| p.iter().zip(q).map(|(p, q)| p.min(*q)).sum::<f64>());
        each.sum::<f64>() / self.p.len() as f64
    }

    /// Both tables, and what is drawn from.
    pub fn tables(&self) -> (&[Vec<f64>], &[Vec<f64>], &[Vec<f64>]) {
        (&self.p, &self.q, &self.drawn)
    }
}
