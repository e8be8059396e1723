//! Prompt lookup: the last n tokens of the text, where they stood before, and what followed.
//!
//! ```text
//! latest[n-gram]   = where its last occurrence ends
//! before[n][i]     = where the n-gram that ends at i ended before that; none the first time
//! append at i:       before[n][i] = latest.replace(n-gram ending at i, i)        for every n
//! take i back:       latest[n-gram ending at i] = before[n][i]                   for every n
//! propose:           j = before[n][last] for the largest n that has one: copy from j + 1
//! ```
//! A copy that reaches the end of the text goes on with what it has copied: the text is taken to repeat.
//!
//! Source: Saxena, "Prompt Lookup Decoding" (2023).

use super::{Proposal, TextIndex};
use std::collections::HashMap;

const NONE: u32 = u32::MAX;

/// The n-grams of a text, for a range of n.
#[derive(Debug, Clone)]
pub struct NGramIndex {
    shortest: usize,
    text: Vec<u32>,
    /// By n, from the shortest.
    orders: Vec<Order>,
}

#[derive(Debug, Clone, Default)]
struct Order {
    latest: HashMap<Box<[u32]>, u32>,
    before: Vec<u32>,
}

impl NGramIndex {
    /// The longest n-gram that can be asked for.
    pub const LONGEST: usize = 64;

    /// An empty text. n-grams from `longest` down to `shortest` tokens are matched.
    ///
    /// # Panics
    /// Unless 1 <= shortest <= longest <= [`NGramIndex::LONGEST`].
    pub fn new(longest: usize, shortest: usize) -> Self {
        assert!(1 <= shortest && shortest <= longest && longest <= Self::LONGEST);
        Self { shortest, text: Vec::new(), orders: vec![Order::default(); longest - shortest + 1] }
    }
}

impl TextIndex for NGramIndex {
    fn len(&self) -> usize {
        self.text.len()
    }

    fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.text.push(token);
            let end = self.text.len();
            for (step, order) in self.orders.iter_mut().enumerate() {
                let n = self.shortest + step;
                let before = match end.checked_sub(n) {
                    Some(start) => order.latest.insert(self.text[start..end].into(), end as u32 - 1),
                    None => None,
                };
                order.before.push(before.unwrap_or(NONE));
            }
        }
    }

    fn truncate(&mut self, length: usize) {
        while self.text.len() > length {
            let end = self.text.len();
            for (step, order) in self.orders.iter_mut().enumerate() {
                let before = order.before.pop().unwrap_or(NONE);
                let Some(start) = end.checked_sub(self.shortest + step) else { continue };
                if before == NONE {
                    order.latest.remove(&self.text[start..end]);
                } else if let Some(latest) = order.latest.get_mut(&self.text[start..end]) {
                    *latest = before;
                }
            }
            self.text.pop();
        }
    }

    fn propose(&self, count: usize) -> Proposal {
        let found = self.orders.iter().enumerate().rev().find_map(|(step, order)| {
            order.before.last().filter(|end| **end != NONE).map(|end| (self.shortest + step, *end as usize + 1))
        });
        let Some((matched, from)) = found else { return Proposal::default() };
        let mut tokens: Vec<u32> = Vec::with_capacity(count);
        for i in 0..count {
            // Beyond the text's end comes what was copied so far.
            let token = self.text.get(from + i).copied().unwrap_or_else(|| tokens[from + i - self.text.len()]);
            tokens.push(token);
        }
        Proposal { tokens, matched }
    }
}
