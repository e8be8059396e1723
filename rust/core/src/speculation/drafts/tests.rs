use super::*;
use proptest::prelude::*;

/// By looking at everything: where the last n tokens stood before, n falling, and what followed.
fn lookup(text: &[u32], longest: usize, shortest: usize, count: usize) -> Proposal {
    for n in (shortest..=longest).rev().filter(|n| *n < text.len()) {
        let (last, end) = (&text[text.len() - n..], text.len());
        if let Some(start) = (0..end - n).rev().find(|start| &text[*start..start + n] == last) {
            let mut tokens: Vec<u32> = Vec::new();
            for i in start + n..start + n + count {
                tokens.push(if i < end { text[i] } else { tokens[i - end] });
            }
            return Proposal { tokens, matched: n };
        }
    }
    Proposal::default()
}

/// By counting everything: what followed the longest context most often.
fn counted(text: &[u32], longest: usize, shortest: usize, count: usize) -> Proposal {
    let mut proposal = Proposal::default();
    let mut grown = text.to_vec();
    for _ in 0..count {
        let found = (shortest..=longest.min(grown.len())).rev().find_map(|n| {
            let context = &grown[grown.len() - n..];
            let mut counts = std::collections::BTreeMap::new();
            for start in 0..text.len().saturating_sub(n) {
                if &text[start..start + n] == context {
                    *counts.entry(text[start + n]).or_insert(0) += 1;
                }
            }
            let most = *counts.values().max()?;
            counts.into_iter().find(|(_, count)| *count == most).map(|(token, _)| (n, token))
        });
        let Some((n, token)) = found else { break };
        if proposal.tokens.is_empty() {
            proposal.matched = n;
        }
        proposal.tokens.push(token);
        grown.push(token);
    }
    proposal
}

proptest! {
    /// Appending and taking back, in any order, leaves what appending the text alone would.
    #[test]
    fn indices_are_what_their_definitions_say(
        steps in prop::collection::vec((prop::collection::vec(0u32..4, 0..8), 0usize..6), 1..12),
        longest in 1usize..6,
        shortest in 1usize..4,
        count in 0usize..7,
    ) {
        let shortest = shortest.min(longest);
        let (mut ngrams, mut suffixes) = (NGramIndex::new(longest, shortest), SuffixIndex::new(longest, shortest));
        let mut text: Vec<u32> = Vec::new();
        for (tokens, back) in steps {
            text.extend(&tokens);
            prop_assert_eq!(ngrams.propose_after(&tokens, count), lookup(&text, longest, shortest, count));
            prop_assert_eq!(suffixes.propose_after(&tokens, count), counted(&text, longest, shortest, count));
            ngrams.extend(&tokens);
            suffixes.extend(&tokens);
            let length = text.len().saturating_sub(back);
            text.truncate(length);
            ngrams.truncate(length);
            suffixes.truncate(length);
            prop_assert_eq!((ngrams.len(), suffixes.len()), (text.len(), text.len()));
            prop_assert_eq!(ngrams.propose(count), lookup(&text, longest, shortest, count), "{:?}", text);
            prop_assert_eq!(suffixes.propose(count), counted(&text, longest, shortest, count), "{:?}", text);
        }
        let mut fresh = SuffixIndex::new(longest, shortest);
        fresh.extend(&text);
        prop_assert_eq!(fresh.nodes(), suffixes.nodes());
        suffixes.truncate(0);
        ngrams.truncate(0);
        prop_assert_eq!(suffixes.nodes(), 1);
        prop_assert_eq!(ngrams.propose(3), Proposal::default());
    }
}

#[test]
fn a_repeating_text_goes_on() {
    let mut ngrams = NGramIndex::new(3, 1);
    ngrams.extend(&[7, 8, 9, 7, 8]);
    assert_eq!(ngrams.propose(5), Proposal { tokens: vec![9, 7, 8, 9, 7], matched: 2 });
    let mut suffixes = SuffixIndex::new(4, 2);
    suffixes.extend(&[1, 2, 3, 1, 2, 4, 1, 2, 4, 1, 2]);
    // After 4 1 2 came 4; after 1 2 alone 4 twice and 3 once.
    assert_eq!(suffixes.propose(3), Proposal { tokens: vec![4, 1, 2], matched: 4 });
    assert_eq!(SuffixIndex::new(4, 2).propose(3), Proposal::default());
}
