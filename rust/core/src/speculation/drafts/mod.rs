//! Drafts that are no model: the next tokens are guessed from the text itself (and from the prompt before it).
//!
//! * [`ngram`]: what followed the most recent occurrence of the last n tokens;
//! * [`suffix`]: what most often followed the longest context that was seen before.
//!
//! Both are functions of the text, so what they propose are point masses: verification needs no law of them. An index
//! belongs to one stream, grows by appending and is cut back by length. Costs do not depend on the length of the text.

pub mod ngram;
pub mod suffix;

pub use ngram::NGramIndex;
pub use suffix::SuffixIndex;

#[cfg(test)]
mod tests;

/// A text that grows and shrinks at its end, and what it suggests.
pub trait TextIndex {
    /// Number of tokens of the text.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends tokens.
    fn extend(&mut self, tokens: &[u32]);

    /// Takes back all tokens but the first `length`.
    fn truncate(&mut self, length: usize);

    /// At most `count` tokens that may follow.
    fn propose(&self, count: usize) -> Proposal;

    /// At most `count` tokens that may follow the text and `after`. The text stays as it is.
    fn propose_after(&mut self, after: &[u32], count: usize) -> Proposal {
        let length = self.len();
        self.extend(after);
        let proposal = self.propose(count);
        self.truncate(length);
        proposal
    }
}

/// Hashes one number by a product whose upper half falls on the lower: a proposal takes hundreds of look-ups, and the
/// standard hasher most of its time.
#[derive(Debug, Clone, Copy, Default)]
struct Spread(u64);

impl std::hash::Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9E37_79B9_7F4A_7C15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What an index proposes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proposal {
    /// The next tokens; none: nothing was found.
    pub tokens: Vec<u32>,
    /// How many of the last tokens of the text were matched to find the first of them.
    pub matched: usize,
}
