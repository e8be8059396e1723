"""The two exact rules by which drafts are made, outcomes guessed and drafts kept; both sides hold the same object.

* :class:`Coupled`: target and draft race over the same clocks (:mod:`tilewise.speculation.coupled`). The output is
  plain sampling's token for token, whatever is drafted, and nothing but tokens crosses between processes. At
  temperature 0 it is greedy decoding.
* :class:`Rejection`: drafts are drawn from a law, kept with probability min(1, p / q), replaced from the residual. The
  law crosses with each token, cut to its largest `support` (the cut law is the one drawn from). The output has plain
  sampling's law, but not its tokens. Saguaro weights (`saguaro` < 1) raise the share of outcomes that were guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilewise import speculation
from tilewise.errors import ArgumentError
from tilewise.speculation import Races, SparseLaws

__all__ = ["Coupled", "Proposal", "Rejection", "Rule", "Settings", "rule_of"]


@dataclass(frozen=True)
class Settings:
    """How tokens are sampled.

    Attributes:
        rule: ``"coupled"`` or ``"rejection"``.
        temperature, top_k, top_p, seed: as in :func:`tilewise.speculation.sample_target`.
        support: of the draft's laws, under the rejection rule.
        saguaro: weight of the draft's `fan_out` likeliest tokens, under the rejection rule; 1 is none.
        fan_out: how many tokens that is.
    """

    rule: str = "coupled"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    support: int = 64
    saguaro: float = 1.0
    fan_out: int = 3

    def as_dict(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)


@dataclass
class Proposal:
    """What a draft says of the next token of some rows.

    Attributes:
        orders: int64 ``[m, count]``: guesses, the likeliest first; -1 where there are no more.
        tokens: ``[m]``, the token drafted in each row.
        scores: float64 ``[m, count]``, how far ahead the guesses are (:mod:`.odds`); None where drafts must not be
            chosen by what is drafted.
        laws: ids ``[m, support]`` and probabilities ``[m, support]`` it was drawn from; None where none is needed.
    """

    orders: NDArray[np.int64]
    tokens: list[int]
    laws: tuple[NDArray[Any], NDArray[Any]] | None
    scores: NDArray[np.float64] | None = None


Law = tuple[NDArray[Any], NDArray[Any]]


class Rule(Protocol):
    """How drafts are made and judged.

    Attributes:
        free: whether what is emitted does not depend on the drafts at all, so that they may be chosen by anything.
    """

    free: bool

    def propose(self, logits: NDArray[Any], request: int, positions: Sequence[int], count: int) -> Proposal:
        """Draft one token for each row of the draft's logits ``[m, V]``, whose next tokens have these positions."""
        ...

    def decide(
        self, drafted: Sequence[int], laws: Sequence[Law] | None, logits: NDArray[Any], request: int, position: int
    ) -> tuple[int, int]:
        """How many drafted tokens stay, and the token after them, by the target's logits ``[len(drafted) + 1, V]``.

        `laws` is None where drafts were no random draws.
        """
        ...


def rule_of(settings: Settings, vocabulary: int) -> Rule:
    """The rule that settings name.

    Raises:
        ArgumentError: an unknown rule, or a setting outside its range.
    """
    if settings.rule == "coupled":
        return Coupled(settings, vocabulary)
    if settings.rule == "rejection":
        return Rejection(settings, vocabulary)
    raise ArgumentError(f"rule: expected 'coupled' or 'rejection', got {settings.rule!r}")


class Coupled:
    """Equal tokens are kept: both sides race over the same clocks."""

    free = True

    def __init__(self, settings: Settings, vocabulary: int):
        self._races = Races(settings.seed, vocabulary)
        self._rules = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        self._rank(np.zeros((1, vocabulary)), 0, [0], 1)  # checks the settings

    def _rank(
        self, logits: NDArray[Any], request: int, positions: Sequence[int], count: int, return_scores: bool = False
    ) -> Any:
        requests = np.full(len(positions), request, np.int64)
        return self._races.rank(
            logits, count=count, requests=requests, positions=positions, return_scores=return_scores, **self._rules
        )

    def propose(self, logits: NDArray[Any], request: int, positions: Sequence[int], count: int) -> Proposal:
        """Draft the winner of each row's race; the next in the race are the guesses."""
        orders, scores = self._rank(logits, request, positions, count, return_scores=True)
        return Proposal(orders, orders[:, 0].tolist(), None, scores)

    def decide(
        self, drafted: Sequence[int], laws: Sequence[Law] | None, logits: NDArray[Any], request: int, position: int
    ) -> tuple[int, int]:
        """Keep drafts while they are what the target draws."""
        rows = len(drafted) + 1
        drawn = self._rank(logits, request, range(position, position + rows), 1)[:, 0].tolist()
        for accepted, (made, token) in enumerate(zip(drafted, drawn, strict=False)):
            if made != token:
                return accepted, token
        return len(drafted), drawn[-1]


class Rejection:
    """Leviathan's and Chen's rule, with laws of few tokens."""

    free = False

    def __init__(self, settings: Settings, vocabulary: int):
        self._settings = settings
        self._support = min(settings.support, vocabulary)
        self._vocabulary = vocabulary
        self._rules = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        self.propose(np.zeros((1, vocabulary)), 0, [0], 1)  # checks the settings

    def propose(self, logits: NDArray[Any], request: int, positions: Sequence[int], count: int) -> Proposal:
        """Draft a token of each row's law; the likeliest tokens are the guesses."""
        settings = self._settings
        orders = speculation.predict_outcomes(logits, min(count, self._vocabulary))
        drawn = speculation.draft_token(
            logits,
            **self._rules,
            seed=settings.seed,
            requests=np.full(len(positions), request, np.int64),
            positions=np.asarray(positions, np.int64),
            support=self._support,
            saguaro=settings.saguaro,
            fan_out=settings.fan_out,
        )
        return Proposal(orders, drawn.tokens.tolist(), (drawn.laws.ids, drawn.laws.probabilities))

    def decide(
        self, drafted: Sequence[int], laws: Sequence[Law] | None, logits: NDArray[Any], request: int, position: int
    ) -> tuple[int, int]:
        """Keep drafts by their coins; a refused one is replaced from the residual."""
        given = None
        if laws is not None and len(drafted):
            ids, probabilities = (np.stack([law[part] for law in laws])[None] for part in (0, 1))
            given = SparseLaws(ids, probabilities)
        done = speculation.verify(
            np.asarray([drafted], np.int64).reshape(1, -1),
            given,
            logits[None],
            **self._rules,
            seed=self._settings.seed,
            requests=request,
            positions=position,
        )
        return int(done.accepted[0]), int(done.tokens[0])
