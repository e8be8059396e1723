"""One sequence in the draft: its trunk, what it would guess behind every token of it, and the branches in the making.

```text
trunk = committed tokens (the last of them the outcome's t*) + the chain x_1 .. x_d that the target verifies now
orders[k], k = 0..d: the draft's guesses of the token after k accepted ones
build:  branches (k, t) for the first fan_out[k] tokens t of orders[k] other than x_{k+1}, each drafted `depth` deep
outcome (k, t*): the branch (k, t*) becomes the trunk if there is one; otherwise the trunk is cut after x_k and gets t*
```
Departures from building branch by branch:

1. All branches advance by one token in one step of the model (:mod:`.rows`).
2. Guesses after x_1 .. x_{d-1} were already computed when those were drafted; only x_d has to be fed. It is the first
   row of the first step, so branches with k = d begin one step after the others.
3. A branch that becomes the trunk brings its keys along: nothing is fed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tilewise.hf.engine.rows import Rows, rows_of
from tilewise.hf.engine.rules import Law, Proposal, Rule
from tilewise.hf.runners import Runner

__all__ = ["Branch", "Build", "Guesser"]


@dataclass
class Branch:
    """A guessed outcome and what was drafted behind it."""

    accepted: int
    token: int
    row: int
    tokens: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    orders: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass
class Build:
    """The branches of a round."""

    round: int
    rows: Rows
    fan_out: Sequence[int]
    depth: int
    branches: list[Branch]
    steps: int = 0
    fed_trunk: bool = False
    trunk_row: int | None = None

    @property
    def done(self) -> bool:
        """Whether every branch is as deep as wanted."""
        return self.fed_trunk and all(len(branch.tokens) >= self.depth for branch in self.branches)


class Guesser:
    """One sequence in the draft.

    Args:
        runner: a fresh sequence of the draft model.
        rule: how tokens are drafted.
        request: name of the sequence's random numbers.
        most: how many guesses to keep for each place.
        context: positions that the draft knows.
    """

    def __init__(self, runner: Runner, rule: Rule, request: int, most: int, context: int):
        self._runner, self._rule, self._request, self._context = runner, rule, request, context
        self._most = min(most + 1, runner.vocab_size)
        self.tokens: list[int] = []
        self.committed = 0
        self.orders: list[NDArray[np.int64]] = []
        self.build: Build | None = None

    @property
    def chain(self) -> list[int]:
        """What the target verifies now."""
        return self.tokens[self.committed :]

    def open(self, tokens: Sequence[int]) -> None:
        """Read the committed tokens."""
        self.tokens = list(tokens)
        self.committed = len(tokens)
        self.orders, self.build = [], None
        if len(tokens) > 1:
            self._runner.feed(self.tokens[:-1], last=1)

    def _propose(self, logits: Tensor, positions: Sequence[int]) -> Proposal:
        rows = logits if logits.is_floating_point() and logits.element_size() >= 4 else logits.float()
        return self._rule.propose(rows.numpy(), self._request, positions, self._most)

    def room(self, length: int) -> int:
        """How many tokens can be drafted behind a sequence of `length`."""
        return max(0, self._context - length)

    def draft(self, count: int, laws: list[Law]) -> list[int]:
        """Make the chain `count` tokens long, with the draft's own; returns the new ones, their laws are appended."""
        made: list[int] = []
        while len(self.tokens) - self.committed < count and self.room(len(self.tokens)) > 0:
            logits = self._runner.feed(self.tokens[self._runner.length :], last=1)
            proposal = self._propose(logits, [len(self.tokens)])
            self.orders.append(proposal.orders[0])
            made.append(proposal.tokens[0])
            if proposal.laws is not None:
                laws.append((proposal.laws[0][0], proposal.laws[1][0]))
            self.tokens.append(proposal.tokens[0])
        return made

    def give(self, chain: Sequence[int]) -> None:
        """The target verifies these tokens, which the draft has not made."""
        self.tokens += chain
        fed = self._runner.length
        logits = self._runner.feed(self.tokens[fed:])
        positions = range(fed + 1, len(self.tokens) + 1)
        keep = self.committed - 1 - fed
        self.orders = list(self._propose(logits, list(positions)).orders[keep:])

    def rank(self, accepted: int, token: int) -> int | None:
        """Where a token stands among the guesses after `accepted` ones: 0 is the first, -1 not among them.

        None where there are no guesses: after the last token of a chain there are none before the build's first step.
        """
        if accepted >= len(self.orders):
            return None
        guesses = self._guesses(accepted)
        return guesses.index(token) if token in guesses else -1

    def _guesses(self, accepted: int) -> list[int]:
        place = self.committed + accepted
        refused = self.tokens[place] if place < len(self.tokens) else -1
        return [token for token in self.orders[accepted].tolist() if token >= 0 and token != refused]

    def begin(self, number: int, fan_out: Sequence[int], depth: int) -> None:
        """Begin to guess the outcomes of round `number`."""
        trunk = self.tokens
        depth = min(depth, self.room(len(trunk) + 1))
        build = Build(number, rows_of(self._runner, trunk), fan_out, depth, [])
        length = len(trunk) - self.committed
        if self._runner.length < len(trunk):
            build.trunk_row = build.rows.branch(len(trunk) - 1)
        else:
            build.fed_trunk = True
        if depth > 0:
            for accepted in range(length + build.fed_trunk):
                self._sprout(build, accepted)
        self.build = build

    def _sprout(self, build: Build, accepted: int) -> None:
        count = build.fan_out[accepted] if accepted < len(build.fan_out) else 0
        for token in self._guesses(accepted)[:count]:
            row = build.rows.branch(self.committed + accepted)
            build.branches.append(Branch(accepted, token, row))

    def step(self) -> None:
        """One more token for every branch that wants one."""
        build = self.build
        assert build is not None
        growing = [branch for branch in build.branches if len(branch.tokens) < build.depth]
        rows = [branch.row for branch in growing]
        tokens = [branch.tokens[-1] if branch.tokens else branch.token for branch in growing]
        positions = [self.committed + branch.accepted + 1 + len(branch.tokens) for branch in growing]
        first = not build.fed_trunk
        if first:
            assert build.trunk_row is not None
            rows.insert(0, build.trunk_row)
            tokens.insert(0, self.tokens[-1])
            positions.insert(0, len(self.tokens))
        proposal = self._propose(build.rows.feed(rows, tokens), positions)
        build.steps += 1
        for index, branch in enumerate(growing, start=int(first)):
            branch.tokens.append(proposal.tokens[index])
            branch.orders.append(proposal.orders[index])
            if proposal.laws is not None:
                branch.laws.append((proposal.laws[0][index], proposal.laws[1][index]))
        if first:
            build.fed_trunk = True
            self.orders.append(proposal.orders[0])
            if build.depth > 0:
                self._sprout(build, len(self.tokens) - self.committed)

    def settle(self, start: int, tokens: Sequence[int], length: int | None) -> Branch | None:
        """The outcome of the round: the trunk follows it. Returns the branch that it was, if it was built.

        Args:
            start: how many tokens were committed before.
            tokens: those that the round committed: the accepted ones, and the one that follows them.
            length: how many of the branch's tokens are the next chain; None for all.
        """
        build, self.build = self.build, None
        wanted = [*self.tokens[:start], *tokens]
        accepted = len(tokens) - 1
        branch = None
        if build is not None:
            if self.committed == start and self.tokens[: len(wanted) - 1] == wanted[:-1]:
                named = (one for one in build.branches if (one.accepted, one.token) == (accepted, tokens[-1]))
                branch = next(named, None)
            if branch is not None and branch.tokens:
                build.rows.adopt(branch.row)
            elif build.trunk_row is not None and build.fed_trunk:
                build.rows.adopt(build.trunk_row)
            else:
                build.rows.drop()
        self.tokens, self.committed, self.orders = wanted, len(wanted), []
        if branch is not None:
            kept = branch.tokens[:length]
            self.tokens += kept
            self.orders = branch.orders[: len(kept)]
        # What was fed beyond the new trunk is of another future, and its last token is not fed yet.
        fed = self._runner.tokens
        most = min(len(fed), len(self.tokens) - 1)
        place = min(start, most)
        while place < most and fed[place] == self.tokens[place]:
            place += 1
        self._runner.truncate(min(place, most))
        return branch
