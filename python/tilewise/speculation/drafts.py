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
    """

    tokens: list[int]
    matched: int


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

    def guess(self, count: int) -> Proposal:
        """The same, with how much of the text was matched."""
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

    def guess(self, count: int) -> Proposal:
        """As :meth:`propose`, with how many of the last tokens were matched."""
        count = _integer("count", count)
        if count > _MOST:
            raise ArgumentError(f"count: expected an integer in [0, {_MOST}], got {count}")
        tokens, matched = self._index.propose(count)
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
        Proposal(tokens=[4, 1, 2], matched=5)
    """

    def __init__(self, longest: int = 16, shortest: int = 1) -> None:
        super().__init__(_core.SuffixIndex(_integer("longest", longest), _integer("shortest", shortest)))


class MixtureDraft:
    """Several drafts over one text; each time one of them speaks.

    ``"priority"``: the first that has anything to say. ``"score"``: the one from which most accepted tokens are
    expected, learnt by holding what every source proposed against what came. For a source and a matched length (those
    from 8 on count as one) the share a of right tokens among those that were tested is kept, and n proposed tokens are
    worth ``a + a^2 + ... + a^n``. Ties go to the earlier source. The choice depends on the committed text alone, so
    proposals stay point masses.

    Args:
        sources: drafts with one text, in order of priority; the mixture extends and truncates them.
        by: ``"score"`` or ``"priority"``.
        memory: a test's weight falls to 1/e after this many more of its kind.

    Raises:
        ArgumentError: no sources, or sources of different lengths; another `by`.

    Example:
        >>> from tilewise.speculation import MixtureDraft, NGramDraft, SuffixDraft
        >>> draft = MixtureDraft([SuffixDraft(shortest=2), NGramDraft()])
        >>> draft.extend([7, 8, 9, 7, 8])
        >>> draft.propose(3)
        [9, 7, 8]
        >>> draft.extend([9, 7, 1])
        >>> round(draft.acceptance(0, 2), 2)
        0.6
    """

    _LONGEST = 8

    def __init__(self, sources: Sequence[Draft], *, by: str = "score", memory: float = 256.0) -> None:
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
        self._right = np.ones((len(self._sources), self._LONGEST + 1))
        self._tested = np.full((len(self._sources), self._LONGEST + 1), 2.0)
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
        pairs = list(zip(proposal.tokens, tokens))
        if not pairs:
            return
        right = next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(pairs))
        place = source, min(proposal.matched, self._LONGEST)
        self._right[place] = self._right[place] * self._decay + right
        self._tested[place] = self._tested[place] * self._decay + min(right + 1, len(pairs))

    def truncate(self, length: int) -> None:
        """Takes back all tokens but the first `length`. What was learnt stays."""
        self._open = None
        for draft in self._sources:
            draft.truncate(length)

    def acceptance(self, source: int, matched: int) -> float:
        """The share of right tokens that is assumed of a source's proposals after `matched` matched tokens."""
        place = source, min(matched, self._LONGEST)
        return float(self._right[place] / self._tested[place])

    def propose(self, count: int) -> list[int]:
        """At most `count` next tokens, of the source that is chosen."""
        return self.guess(count).tokens

    def guess(self, count: int) -> Proposal:
        """As :meth:`propose`, with how much of the text that source matched."""
        self._open = [draft.guess(count) for draft in self._sources]
        if self._by == "priority":
            return next((proposal for proposal in self._open if proposal.tokens), self._open[0])
        return max(enumerate(self._open), key=lambda item: (self._worth(*item), -item[0]))[1]

    def _worth(self, source: int, proposal: Proposal) -> float:
        share = self.acceptance(source, proposal.matched)
        return float(sum(share**i for i in range(1, len(proposal.tokens) + 1)))

    def __len__(self) -> int:
        return len(self._sources[0])


def _tokens(tokens: Iterable[int]) -> list[int]:
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
