"""Drafts from the text: against their definitions, under appending and going back, and what mixtures learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.errors import ArgumentError, DtypeError
from tilewise.reference import speculation as reference
from tilewise.speculation import Draft, MixtureDraft, NGramDraft, SuffixDraft

STEPS = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 6)), max_size=10)
RANGES = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda pair: (max(pair), min(pair)))


@pytest.mark.parametrize(
    ("kind", "meaning"), [(NGramDraft, reference.ngram_proposal), (SuffixDraft, reference.suffix_proposal)]
)
@settings(deadline=None, max_examples=100)
@given(steps=STEPS, lengths=RANGES, count=st.integers(0, 6))
def test_proposals_are_what_the_definition_says(
    kind: Any, meaning: Any, steps: list[tuple[list[int], int]], lengths: tuple[int, int], count: int
) -> None:
    draft, text = kind(*lengths), []
    for tokens, back in steps:
        behind = draft.guess(count, after=tokens)
        draft.extend(tokens)
        assert behind == draft.guess(count)
        text += tokens
        length = max(len(text) - back, 0)
        draft.truncate(length)
        text = text[:length]
        assert len(draft) == len(text)
        tokens, matched, _ = draft.guess(count)
        expected = meaning(text, *lengths, count)
        assert (tokens, matched) == expected if tokens else expected[0] == []


def test_long_texts() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 20_000)
    text[15_000:15_400] = text[3_000:3_400]
    for draft in (NGramDraft(), SuffixDraft(8)):
        draft.extend(text[:15_300])
        assert draft.propose(100) == text[3_300:3_400].tolist()
        draft.extend(text[15_300:])
        draft.truncate(15_200)
        assert draft.propose(100) == text[3_200:3_300].tolist()
    repeated = SuffixDraft(4)
    repeated.extend([5] * 30_000)  # as hard as texts are for an index whose work depends on its length
    assert repeated.propose(3) == [5, 5, 5]
    repeated.truncate(1)
    assert repeated.propose(3) == []


def test_a_mixture_speaks_for_the_source_that_is_right() -> None:
    class Always:
        def __init__(self, token: int) -> None:
            self.token, self.length = token, 0

        def extend(self, tokens: Any) -> None:
            self.length += len(tokens)

        def truncate(self, length: int) -> None:
            self.length = min(self.length, length)

        def guess(self, count: int, after: Any = ()) -> Any:
            from tilewise.speculation import Proposal

            return Proposal([self.token] * count, 1)

        def propose(self, count: int) -> list[int]:
            return self.guess(count).tokens

        def __len__(self) -> int:
            return self.length

    wrong, right = Always(1), Always(2)
    mixture = MixtureDraft([wrong, right])
    assert mixture.propose(3) == [1, 1, 1]  # nothing known: the first
    mixture.extend([2, 2, 2])
    assert mixture.propose(3) == [2, 2, 2]
    assert mixture.acceptance(0, 1) == pytest.approx(1 / 3, abs=0.01)
    for matched in (1, 2, 3):  # each token of a proposal stands behind one more that matched
        assert mixture.acceptance(1, matched) == pytest.approx(2 / 3, abs=0.01)
    assert mixture.acceptance(0, 2) == mixture.acceptance(1, 4) == 0.5  # never tested
    assert mixture.guess(2).expected == pytest.approx(2 / 3 + 4 / 9, abs=0.01)
    assert MixtureDraft([Always(1), Always(2)], learnt=mixture).guess(3).tokens == [2, 2, 2]
    assert mixture.guess(3, least=0.4).tokens == [2, 2]
    assert mixture.guess(3, least=0.7).tokens == []
    for _ in range(100):
        mixture.extend([1, 1, 1])
        mixture.propose(3)
    assert mixture.propose(3) == [1, 1, 1]  # it changes its mind with the text
    mixture.truncate(10)
    assert len(mixture) == len(wrong) == len(right) == 10
    mixture.extend([2] * 3)  # nothing was proposed since: nothing is learnt
    share = mixture.acceptance(1, 1)
    mixture.extend([2] * 3)
    assert mixture.acceptance(1, 1) == share

    first = MixtureDraft([Always(1), Always(2)], by="priority")
    first.propose(2)
    first.extend([2, 2])
    assert first.propose(2) == [1, 1]
    silent = MixtureDraft([NGramDraft(), SuffixDraft()], by="priority")
    assert silent.propose(4) == []
    draft: Draft = silent  # the protocol is the drafts' own
    assert len(draft) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="learnt: expected a mixture of 1 sources"):
        MixtureDraft([SuffixDraft()], learnt=MixtureDraft([SuffixDraft(), NGramDraft()]))
    draft = NGramDraft()
    for call, error, message in [
        (lambda: NGramDraft(0), ArgumentError, r"longest: expected an integer in \[1, 64\], got 0"),
        (lambda: SuffixDraft(3, 4), ArgumentError, r"shortest: expected an integer in \[1, longest = 3\], got 4"),
        (lambda: SuffixDraft(65), ArgumentError, "longest"),
        (lambda: draft.extend([-1]), ArgumentError, r"tokens: expected ids in \[0, 2\^32\), got -1"),
        (lambda: draft.extend([0.5]), DtypeError, "tokens: expected integers"),
        (lambda: draft.extend(np.zeros((1, 1), int)), ArgumentError, "tokens: expected a list of token ids"),
        (lambda: draft.propose(-1), ArgumentError, "count"),
        (lambda: draft.propose(5000), ArgumentError, r"count: expected an integer in \[0, 4096\], got 5000"),
        (lambda: draft.truncate(-1), ArgumentError, "length"),
        (lambda: MixtureDraft([]), ArgumentError, "sources: expected at least one"),
        (lambda: MixtureDraft([draft], by="luck"), ArgumentError, "by: expected 'score' or 'priority', got 'luck'"),
        (lambda: MixtureDraft([draft], memory=0), ArgumentError, "memory"),
    ]:
        with pytest.raises(error, match=message):
            call()
    longer = SuffixDraft()
    longer.extend([1])
    with pytest.raises(ArgumentError, match=r"sources: expected drafts of one text, got lengths \[0, 1\]"):
        MixtureDraft([draft, longer])
