"""Which branches of a build grow next: two orders, for two kinds of rules.

:class:`EvenBuild` grows all guessed outcomes alike, as many as the scheduler says for each accepted length. Nothing it
does depends on what was drafted, which the rejection rule needs: random numbers belong to positions, so two branches
share them, and a branch that ended because of what another drafted would no longer hold draws of its law.

:class:`OrderedBuild` grows what will most probably be used. Under the coupled rule (and greedily) drafts are kept where
they equal what the target draws anyway, so they may be chosen by anything. With the probabilities of :mod:`.odds`::

    reach[k] = product over j <= k of P(chain token j is kept)
    P(outcome (k, t)) = reach[k] P(guess t after k kept ones)
    P(token i of a branch is emitted next round) = P(its outcome) times the product over its tokens up to i
    every step: of the branches, and of the outcomes that have none yet, the `width` most valuable ones grow by a token

A branch's first token is worth more than one: it makes a hit of a miss. Branches end by themselves where the next token
is not worth its verification.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from tilewise.hf.engine.rows import Rows
from tilewise.hf.engine.rules import Law

if TYPE_CHECKING:
    from tilewise.hf.engine.guesser import Guesser

__all__ = ["Branch", "Build", "EvenBuild", "OrderedBuild", "Worth"]


@dataclass
class Worth:
    """What a token must bring to be drafted, in tokens; the target's scheduler measures it.

    Attributes:
        verified: least probability (of all up to it being kept) of a token drafted ahead.
        drafted: of a token that the target waits for.
        branch: least probability of a token in a step of many.
        hit: what the first token of a branch is worth: it makes a hit of a miss.
    """

    verified: float = 0.1
    drafted: float = 0.3
    branch: float = 0.02
    hit: float = 3.0


@dataclass
class Branch:
    """A guessed outcome and what was drafted behind it.

    Attributes:
        accepted, token: the outcome.
        row: of the build's rows.
        tokens, laws: drafted, and what they were drawn from.
        orders, scores: of each token, the guesses it was the first of.
        reach: probability that all of it is emitted; `share` of that under the condition that the outcome is right.
        ended: no more tokens are worth drafting.
        sent, sent_end: how many tokens the target has been sent, and whether it was told that there are no more.
    """

    accepted: int
    token: int
    row: int
    tokens: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    orders: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float64] | None] = field(default_factory=list)
    reach: float = 1.0
    share: float = 1.0
    ended: bool = False
    sent: int = 0
    sent_end: bool = False


class Build(Protocol):
    """The branches of a round."""

    round: int
    rows: Rows
    depth: int
    branches: list[Branch]
    steps: int
    fed: int
    trunk_row: int | None
    trunk_fed: bool

    @property
    def done(self) -> bool:
        """Whether nothing is left to grow."""
        ...

    def next(self) -> list[Branch]:
        """The branches that grow in the next step, new ones included."""
        ...

    def grown(self, branch: Branch, probability: float) -> None:
        """A branch got a token, which the target draws with this probability."""
        ...

    def trunk_is_known(self) -> None:
        """The trunk's last token was fed: outcomes of the whole chain can be guessed."""
        ...


class _Build:
    def __init__(self, guesser: Guesser, number: int, rows: Rows, fan_out: Sequence[int], depth: int):
        self.round, self.rows, self.depth = number, rows, depth
        self.branches: list[Branch] = []
        self.steps = self.fed = 0
        self.trunk_row: int | None = None
        self.trunk_fed = False
        self._guesser, self._fan_out = guesser, fan_out

    @property
    def _trunk_is_fed(self) -> bool:
        return self.trunk_row is None or self.trunk_fed

    def _new(self, accepted: int, token: int, reach: float = 1.0) -> Branch:
        row = self.rows.branch(self._guesser.committed + accepted)
        self.branches.append(Branch(accepted, token, row, reach=reach))
        return self.branches[-1]


class EvenBuild(_Build):
    """`fan_out[k]` guesses after k accepted tokens, all drafted `depth` deep."""

    def __init__(self, guesser: Guesser, number: int, rows: Rows, fan_out: Sequence[int], depth: int):
        super().__init__(guesser, number, rows, fan_out, depth)
        for accepted in range(guesser.guessed):
            self._sprout(accepted)

    def _sprout(self, accepted: int) -> None:
        count = self._fan_out[accepted] if accepted < len(self._fan_out) and self.depth > 0 else 0
        for token in self._guesser.guesses(accepted)[:count]:
            self._new(accepted, token)

    def trunk_is_known(self) -> None:
        """See :class:`Build`."""
        self._sprout(self._guesser.guessed - 1)

    @property
    def done(self) -> bool:
        """See :class:`Build`."""
        return self._trunk_is_fed and all(len(branch.tokens) >= self.depth for branch in self.branches)

    def next(self) -> list[Branch]:
        """See :class:`Build`."""
        return [branch for branch in self.branches if len(branch.tokens) < self.depth]

    def grown(self, branch: Branch, probability: float) -> None:
        """See :class:`Build`."""
        branch.ended = len(branch.tokens) >= self.depth


class OrderedBuild(_Build):
    """The sum of `fan_out` branches a step, the most valuable ones; at most `depth` deep."""

    def __init__(self, guesser: Guesser, number: int, rows: Rows, fan_out: Sequence[int], depth: int):
        super().__init__(guesser, number, rows, fan_out, depth)
        self._width = max(1, sum(fan_out))
        self._seeds: list[tuple[float, int, int, float]] = []  # a heap: -value, outcome, probability
        self._reach = 1.0
        for accepted, odds in enumerate(guesser.all_odds()):
            self._seed(accepted, odds)

    def _seed(self, accepted: int, odds: list[float]) -> None:
        tokens, odds, kept = self._guesser.odds_at(accepted, odds)
        reach = self._reach
        self._reach *= kept
        if self.depth == 0:
            return
        for token, odd in zip(tokens, odds, strict=True):
            probability = reach * odd
            if probability * self._guesser.worth.hit < self._guesser.worth.branch:
                break
            heapq.heappush(self._seeds, (-self._guesser.worth.hit * probability, accepted, token, probability))

    def trunk_is_known(self) -> None:
        """See :class:`Build`."""
        self._seed(self._guesser.guessed - 1, self._guesser.all_odds()[-1])

    def _growing(self) -> list[Branch]:
        return [branch for branch in self.branches if not branch.ended and branch.reach >= self._guesser.worth.branch]

    @property
    def done(self) -> bool:
        """See :class:`Build`."""
        return self._trunk_is_fed and not self._seeds and not self._growing()

    def next(self) -> list[Branch]:
        """See :class:`Build`."""
        growing = sorted(self._growing(), key=lambda branch: -branch.reach)
        chosen: list[Branch] = []
        taken = 0
        while len(chosen) < self._width:
            value = growing[taken].reach if taken < len(growing) else -1.0
            if self._seeds and -self._seeds[0][0] > value:
                _, accepted, token, probability = heapq.heappop(self._seeds)
                chosen.append(self._new(accepted, token, probability))
            elif value > 0.0:
                chosen.append(growing[taken])
                taken += 1
            else:
                break
        return chosen

    def grown(self, branch: Branch, probability: float) -> None:
        """See :class:`Build`."""
        branch.reach *= probability
        branch.share *= probability
        branch.ended = len(branch.tokens) >= self.depth or branch.share < self._guesser.worth.verified
