"""Drafts that are no model: guesses of the next tokens from the text so far (the prompt included), in microseconds.

All have one protocol, :class:`Draft`: ``extend(tokens)`` with what was committed, ``truncate(length)`` to go back,
``propose(count)`` for a guess. A draft belongs to one stream. What it proposes is a function of the text, not a random
draw: verify it with ``draft_laws=None`` (point masses), which is exact at any temperature.

Costs do not grow with the text: a token costs one look-up per matched length, to add and to take back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tilewise import _core
from tilewise.errors import ArgumentError, DtypeError
from tilewise.speculation.fanout import _integer

__all__ = ["Draft", "MixtureDraft", "NGramDraft", "Proposal", "SuffixDraft"]

_MOST = 4096  # tokens of a proposal


class Proposal(NamedTuple):
    """A guess.

    Attributes:
        tokens: the next tokens; empty: nothing was found.
        matched: how many of the last tokens were matched to find the first of them.
        expected: how many of the tokens will be right, as far as the draft can tell; None if it cannot.
    """

    tokens: list[int]
    matched: int
    expected: float | None = None


class Draft(Protocol):
    """What guesses the next tokens of one stream."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends committed tokens."""
        ...

    def truncate(self, length: int) -> None:
        """Takes back all tokens but the first `length`."""
        ...

    def propose(self, count: int) -> list[int]:
        """At most `count` next tokens."""
        ...

    def guess(self, count: int, after: Sequence[int] = ()) -> Proposal:
        """The same, with how much of the text was matched; as if `after` had been committed."""
        ...

    def __len__(self) -> int: ...


class _Indexed:
    """The protocol over an index of the core."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends committed tokens.

        Raises:
            DtypeError, ArgumentError: anything but integers in [0, 2^32).
        """
        self._index.extend(_tokens(tokens))

    def truncate(self, length: int) -> None:
        """Takes back all tokens but the first `length`; nothing if there are no more.

        Raises:
            DtypeError, ArgumentError: anything but an integer >= 0.
        """
        self._index.truncate(_integer("length", length))

    def propose(self, count: int) -> list[int]:
        """At most `count` next tokens; none where the text does not suggest any.

        Raises:
            DtypeError, ArgumentError: anything but an integer in [0, 4096].
        """
        return self.guess(count).tokens

    def guess(self, count: int, after: Sequence[int] = ()) -> Proposal:
        """As :meth:`propose`, with how many of the last tokens were matched; as if `after` had been committed.

        Raises:
            DtypeError, ArgumentError: as in :meth:`propose` and :meth:`extend`.
        """
        count = _integer("count", count)
        if count > _MOST:
            raise ArgumentError(f"count: expected an integer in [0, {_MOST}], got {count}")
        tokens, matched = self._index.propose(count, _tokens(after) if after else [])
        return Proposal(tokens, matched)

    def __len__(self) -> int:
        return len(self._index)


class NGramDraft(_Indexed):
    """Prompt lookup: what followed the most recent earlier occurrence of the last n tokens, for the largest n that has
    one.

    A copy that reaches the end of the text goes on with itself: a text that repeats is taken to go on repeating.

    Args:
        longest, shortest: the range of n, 1 <= shortest <= longest <= 64.

    Raises:
        ArgumentError: another range.

    Source: Saxena, "Prompt Lookup Decoding" (2023).

    Example:
        >>> from tilewise.speculation import NGramDraft
        >>> draft = NGramDraft(longest=3)
        >>> draft.extend([7, 8, 9, 7, 8])
        >>> draft.propose(4)
        [9, 7, 8, 9]
        >>> draft.truncate(4)
        >>> draft.propose(2)
        [8, 9]
    """

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        super().__init__(_core.NGramIndex(_integer("longest", longest), _integer("shortest", shortest)))


class SuffixDraft(_Indexed):
    """Counted contexts: what most often followed the longest context of the last tokens that was seen before.

    Each proposed token becomes part of the context of the next. Ties go to the lower id.

    Args:
        longest, shortest: the range of context lengths, 1 <= shortest <= longest <= 64. A token costs `longest` + 1
            look-ups, and as many nodes of 20 bytes and their edges where the text is new.

    Raises:
        ArgumentError: another range.

    Source: Oliaro et al., "SuffixDecoding" (2024), for counts over suffixes.

    Example:
        >>> from tilewise.speculation import SuffixDraft
        >>> draft = SuffixDraft()
        >>> draft.extend([1, 2, 3, 1, 2, 4, 1, 2, 4, 1, 2])
        >>> draft.guess(3)
        Proposal(tokens=[4, 1, 2], matched=5, expected=None)
    """

    def __init__(self, longest: int = 16, shortest: int = 1) -> None:
        super().__init__(_core.SuffixIndex(_integer("longest", longest), _integer("shortest", shortest)))


class MixtureDraft:
    """Several drafts over one text; each time one of them speaks.

    ``"priority"``: the first that has anything to say. ``"score"``: the one from which most accepted tokens are
    expected, learnt by holding what every source proposed against what came. For a source and a matched length (those
    from 16 on count as one) the share of right tokens among those that were tested is kept; the i-th of a proposal's
    tokens stands behind i - 1 more that matched, so n tokens are worth ``a[m] + a[m] a[m+1] + ... + a[m] .. a[m+n-1]``.
    Ties go to the earlier source. The choice depends on the committed text alone, so proposals stay point masses.

    Args:
        sources: drafts with one text, in order of priority; the mixture extends and truncates them.
        by: ``"score"`` or ``"priority"``.
        memory: a test's weight falls to 1/e after this many more of its kind.
        learnt: a mixture of as many sources of the same kinds, of another text: both learn together from now on.

    Raises:
        ArgumentError: no sources, or sources of different lengths; another `by`; another number of sources than
            `learnt` has.

    Example:
        >>> from tilewise.speculation import MixtureDraft, NGramDraft, SuffixDraft
        >>> draft = MixtureDraft([SuffixDraft(shortest=2), NGramDraft()])
        >>> draft.extend([7, 8, 9, 7, 8])
        >>> draft.propose(3)
        [9, 7, 8]
        >>> draft.extend([9, 7, 1])
        >>> round(draft.acceptance(0, 2), 2)
        0.67
    """

    _LONGEST = 16
    _SHORT = 8
    """Tokens to look up first: often the chance that more are right is not worth looking."""

    def __init__(
        self,
        sources: Sequence[Draft],
        *,
        by: str = "score",
        memory: float = 256.0,
        learnt: MixtureDraft | None = None,
    ) -> None:
        self._sources = list(sources)
        if not self._sources:
            raise ArgumentError("sources: expected at least one draft, got none")
        if by not in ("score", "priority"):
            raise ArgumentError(f"by: expected 'score' or 'priority', got {by!r}")
        if not memory > 0:
            raise ArgumentError(f"memory: expected a number > 0, got {memory}")
        lengths = {len(source) for source in self._sources}
        if len(lengths) != 1:
            raise ArgumentError(f"sources: expected drafts of one text, got lengths {sorted(lengths)}")
        self._by = by
        self._decay = float(np.exp(-1.0 / memory))
        # Right tokens and tested ones, by source and matched length; one of two is where nothing was seen.
        self._counts = [[[1.0, 2.0] for _ in range(self._LONGEST + 1)] for _ in self._sources]
        if learnt is not None:
            if len(learnt._sources) != len(self._sources):
                raise ArgumentError(
                    f"learnt: expected a mixture of {len(self._sources)} sources, got one of {len(learnt._sources)}"
                )
            self._counts = learnt._counts
        self._open: list[Proposal] | None = None

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends committed tokens, after holding the last proposals against them."""
        tokens = _tokens(tokens)
        for source, proposal in enumerate(self._open or ()):
            self._learn(source, proposal, tokens)
        if tokens:
            self._open = None
        for draft in self._sources:
            draft.extend(tokens)

    def _learn(self, source: int, proposal: Proposal, tokens: list[int]) -> None:
        counts = self._counts[source]
        for place, (guess, token) in enumerate(zip(proposal.tokens, tokens)):
            count = counts[min(proposal.matched + place, self._LONGEST)]
            count[0] = count[0] * self._decay + (guess == token)
            count[1] = count[1] * self._decay + 1.0
            if guess != token:
                break

    def truncate(self, length: int) -> None:
        """Takes back all tokens but the first `length`. What was learnt stays."""
        self._open = None
        for draft in self._sources:
            draft.truncate(length)

    def acceptance(self, source: int, matched: int) -> float:
        """The share of right tokens that is assumed of a source's tokens behind `matched` matched ones."""
        right, tested = self._counts[source][min(matched, self._LONGEST)]
        return right / tested

    def propose(self, count: int) -> list[int]:
        """At most `count` next tokens, of the source that is chosen."""
        return self.guess(count).tokens

    def guess(self, count: int, after: Sequence[int] = (), least: float = 0.0) -> Proposal:
        """As :meth:`propose`, with how much of the text that source matched, and what is expected of it.

        Args:
            count: most tokens.
            after: as if these had been committed. Nothing is learnt from what is proposed then.
            least: the proposal ends where the chance that all of it is right falls below this.

        Raises:
            DtypeError, ArgumentError: as in :meth:`propose` and :meth:`extend`.
        """
        short = min(count, self._SHORT) if least > 0.0 else count
        guesses, weighed = self._guess(short, after, least)
        if short < count and any(len(guess.tokens) == short for guess in weighed):
            guesses, weighed = self._guess(count, after, least)
        if not after:
            self._open = guesses
        if self._by == "priority":
            return next((guess for guess in weighed if guess.tokens), weighed[0])
        return max(weighed, key=lambda guess: guess.expected or 0.0)  # of equal ones the first

    def _guess(self, count: int, after: Sequence[int], least: float) -> tuple[list[Proposal], list[Proposal]]:
        """What every source proposes, and what remains of it."""
        guesses = [draft.guess(count, after) if after else draft.guess(count) for draft in self._sources]
        return guesses, [self._weigh(source, guess, least) for source, guess in enumerate(guesses)]

    def _weigh(self, source: int, guess: Proposal, least: float) -> Proposal:
        """How many tokens will be right; those that will hardly be are left out."""
        counts, reached, expected = self._counts[source], 1.0, 0.0
        for place in range(len(guess.tokens)):
            right, tested = counts[min(guess.matched + place, self._LONGEST)]
            reached *= right / tested
            if reached < least:
                return Proposal(guess.tokens[:place], guess.matched, expected)
            expected += reached
        return guess._replace(expected=expected)

    def __len__(self) -> int:
        return len(self._sources[0])


def _tokens(tokens: Iterable[int]) -> list[int]:
    if type(tokens) is list and set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < 2**32:
        return tokens  # the usual case, without a detour over an array
    array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if array.ndim != 1:
        raise ArgumentError(f"tokens: expected a list of token ids, got shape {array.shape}")
    if not array.size:
        return []
    if array.dtype.kind not in "iu":
        raise DtypeError(f"tokens: expected integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= 2**32:
        raise ArgumentError(f"tokens: expected ids in [0, 2^32), got {array.min() if array.min() < 0 else array.max()}")
    return array.tolist()
