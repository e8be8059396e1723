//! A suffix index: how often every context of up to D tokens was followed by what, over the whole text so far.
//!
//! A tree of all substrings of at most D + 1 tokens, each with its number of occurrences. (A suffix automaton holds
//! substrings of every length in less memory, but counts in it are not kept up by appending: one token can touch as many
//! states as the text has tokens. Here it touches D + 1 nodes, and they can be taken back.)
//!
//! ```text
//! append t:   for d = 0..=D:  node(last d tokens, then t) += 1              (node made if new)
//! take back:  the same nodes -= 1; those that were new are the last ones in memory
//! propose:    the longest context of at most D tokens, at least `shortest`, that was followed by anything:
//!             its most frequent continuation (ties: the lower id); append that to the context and go on
//! ```
//!
//! Source: Oliaro et al., "SuffixDecoding" (2024), for the use of counts over suffixes.

use super::{Proposal, Spread, TextIndex};
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

const ROOT: u32 = 0;
const NONE: u32 = u32::MAX;

fn edge(node: u32, token: u32) -> u64 {
    u64::from(node) << 32 | u64::from(token)
}

#[derive(Debug, Clone)]
struct Node {
    parent: u32,
    token: u32,
    /// Occurrences in the text.
    count: u32,
    /// The child that was made last; the others follow by `sibling`.
    child: u32,
    sibling: u32,
}

/// Counted contexts of a text.
#[derive(Debug, Clone)]
pub struct SuffixIndex {
    longest: usize,
    shortest: usize,
    text: Vec<u32>,
    nodes: Vec<Node>,
    edges: HashMap<u64, u32, BuildHasherDefault<Spread>>,
    /// The nodes of the last 0, 1, ..., D tokens.
    active: Vec<u32>,
}

impl SuffixIndex {
    /// The longest context that can be asked for.
    pub const LONGEST: usize = 64;

    /// An empty text. Contexts of `shortest` to `longest` tokens are matched.
    ///
    /// # Panics
    /// Unless 1 <= shortest <= longest <= [`SuffixIndex::LONGEST`].
    pub fn new(longest: usize, shortest: usize) -> Self {
        assert!(1 <= shortest && shortest <= longest && longest <= Self::LONGEST);
        let root = Node { parent: NONE, token: NONE, count: 0, child: NONE, sibling: NONE };
        Self { longest, shortest, text: Vec::new(), nodes: vec![root], edges: HashMap::default(), active: vec![ROOT] }
    }

    /// Number of nodes of the tree.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    fn step(&self, node: u32, token: u32) -> Option<u32> {
        self.edges.get(&edge(node, token)).copied()
    }

    /// The nodes of the last 0, 1, ..., `most` tokens of a text that is in the tree.
    fn contexts(&self, text: &[u32], most: usize) -> Vec<u32> {
        let walk = |start: usize| text[start..].iter().try_fold(ROOT, |node, token| self.step(node, *token));
        (0..=most.min(text.len())).map_while(|length| walk(text.len() - length)).collect()
    }

    /// The most frequent child of a node.
    fn favourite(&self, node: u32) -> Option<u32> {
        let mut best: Option<&Node> = None;
        let mut child = self.nodes[node as usize].child;
        while child != NONE {
            let other = &self.nodes[child as usize];
            if best.is_none_or(|best| (other.count, best.token) > (best.count, other.token)) {
                best = Some(other);
            }
            child = other.sibling;
        }
        best.map(|node| node.token)
    }
}

impl TextIndex for SuffixIndex {
    fn len(&self) -> usize {
        self.text.len()
    }

    fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.text.push(token);
            let mut next = Vec::with_capacity(self.active.len() + 1);
            next.push(ROOT);
            for &context in &self.active {
                let node = self.step(context, token).unwrap_or_else(|| {
                    let node = self.nodes.len() as u32;
                    let sibling = std::mem::replace(&mut self.nodes[context as usize].child, node);
                    self.nodes.push(Node { parent: context, token, count: 0, child: NONE, sibling });
                    self.edges.insert(edge(context, token), node);
                    node
                });
                self.nodes[node as usize].count += 1;
                next.push(node);
            }
            next.truncate(self.longest + 1);
            self.active = next;
        }
    }

    fn truncate(&mut self, length: usize) {
        if length >= self.text.len() {
            return;
        }
        while self.text.len() > length {
            for &node in &self.contexts(&self.text, self.longest + 1)[1..] {
                self.nodes[node as usize].count -= 1;
            }
            // Nodes are made in the order of the text, so those that nothing holds any more are the last.
            while self.nodes.len() > 1
                && let Some(last) = self.nodes.last()
                && last.count == 0
            {
                let (parent, token, sibling) = (last.parent, last.token, last.sibling);
                self.edges.remove(&edge(parent, token));
                self.nodes[parent as usize].child = sibling;
                self.nodes.pop();
            }
            self.text.pop();
        }
        self.active = self.contexts(&self.text, self.longest);
    }

    fn propose(&self, count: usize) -> Proposal {
        let mut proposal = Proposal::default();
        let mut contexts = self.active.clone();
        while proposal.tokens.len() < count {
            // The longest context comes last; one that stands at the text's end alone has no children.
            let found = (self.shortest..contexts.len()).rev().find_map(|d| Some((d, self.favourite(contexts[d])?)));
            let Some((matched, token)) = found else { break };
            if proposal.tokens.is_empty() {
                proposal.matched = matched;
            }
            proposal.tokens.push(token);
            let longer = contexts.iter().map_while(|context| self.step(*context, token));
            contexts = std::iter::once(ROOT).chain(longer).take(self.longest + 1).collect();
        }
        proposal
    }
}
