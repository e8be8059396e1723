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

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tilewise.hf.engine.builds import Branch, Build, EvenBuild, OrderedBuild, Worth
from tilewise.hf.engine.odds import Odds
from tilewise.hf.engine.rows import rows_of
from tilewise.hf.engine.rules import Law, Proposal, Rule
from tilewise.hf.runners import Runner

__all__ = ["Guesser"]


class Guesser:
    """One sequence in the draft.

    Args:
        runner: a fresh sequence of the draft model.
        rule: how tokens are drafted.
        request: name of the sequence's random numbers.
        most: how many guesses to keep for each place.
        context: positions that the draft knows.
        odds: how probable guesses are; all sequences of a draft teach it.
        worth: what a token must bring; changes as the scheduler measures.
    """

    def __init__(self, runner: Runner, rule: Rule, request: int, most: int, context: int, odds: Odds, worth: Worth):
        self._runner, self._rule, self._request, self._context = runner, rule, request, context
        self._most = min(most + 1, runner.vocab_size)
        self._odds = odds
        self.worth = worth
        self.tokens: list[int] = []
        self.committed = 0
        self.orders: list[NDArray[np.int64]] = []
        self.scores: list[NDArray[np.float64] | None] = []
        self.build: Build | None = None
        self.settled = False  # whether a round has come out
        self._seen: list[tuple[NDArray[np.float64], int]] = []

    @property
    def chain(self) -> list[int]:
        """What the target verifies now."""
        return self.tokens[self.committed :]

    def open(self, tokens: Sequence[int]) -> None:
        """Read the committed tokens."""
        self.tokens = list(tokens)
        self.committed = len(tokens)
        self.orders, self.scores, self.build = [], [], None
        if len(tokens) > 1:
            self._runner.feed(self.tokens[:-1], last=1)

    def _propose(self, logits: Tensor, positions: Sequence[int]) -> Proposal:
        rows = logits if logits.is_floating_point() and logits.element_size() >= 4 else logits.float()
        return self._rule.propose(rows.numpy(), self._request, positions, self._most)

    def room(self, length: int) -> int:
        """How many tokens can be drafted behind a sequence of `length`."""
        return max(0, self._context - length)

    def draft(self, count: int, laws: list[Law]) -> float:
        """Make the chain `count` tokens long, with the draft's own; the laws of new ones are appended.

        Returns the chance that all of it is kept, 1 where that cannot be told.

        Where drafts may be chosen by what is drafted, it ends once a token more is not worth its time.
        """
        self._unfeed()
        share = 1.0
        for order, scores, token in zip(self.orders, self.scores, self.chain, strict=False):
            share *= self._probability(order, scores, token)
        while (
            share >= self.worth.drafted
            and len(self.tokens) - self.committed < count
            and self.room(len(self.tokens)) > 0
        ):
            logits = self._runner.feed(self.tokens[self._runner.length :], last=1)
            proposal = self._propose(logits, [len(self.tokens)])
            self._remember(proposal, 0)
            share *= self._probability(self.orders[-1], self.scores[-1], proposal.tokens[0])
            if proposal.laws is not None:
                laws.append((proposal.laws[0][0], proposal.laws[1][0]))
            self.tokens.append(proposal.tokens[0])
        return share

    def give(self, chain: Sequence[int]) -> None:
        """The target verifies these tokens, which the draft has not made."""
        self._unfeed()
        self.extend(chain)

    def extend(self, tokens: Sequence[int]) -> None:
        """The target verifies these tokens too, behind the chain."""
        self.tokens += tokens
        fed = self._runner.length
        logits = self._runner.feed(self.tokens[fed:])
        proposal = self._propose(logits, range(fed + 1, len(self.tokens) + 1))
        for row in range(max(0, self.committed - 1 - fed), len(self.tokens) - fed):
            self._remember(proposal, row)

    def _unfeed(self) -> None:
        """The last token is to be fed again: what follows it is asked for once more."""
        self._runner.truncate(min(self._runner.length, len(self.tokens) - 1))
        del self.orders[len(self.chain) :], self.scores[len(self.chain) :]

    def _remember(self, proposal: Proposal, row: int) -> None:
        self.orders.append(proposal.orders[row])
        self.scores.append(None if proposal.scores is None else proposal.scores[row])

    def _probability(self, order: NDArray[np.int64], scores: NDArray[np.float64] | None, token: int) -> float:
        """That the target draws this token; 1 where that is not to be looked at."""
        if scores is None:
            return 1.0
        odds = self._odds.of(scores[None])[0]
        if order[0] == token:
            return float(odds[0])
        place = np.flatnonzero(order == token)
        return float(odds[place[0]]) if place.size else float(odds[-1])

    @property
    def guessed(self) -> int:
        """For how many accepted lengths, from 0 on, there are guesses."""
        return len(self.orders)

    def all_odds(self) -> list[list[float]]:
        """Probabilities of the guesses after every accepted length, in the order of the guesses."""
        return self._odds.of(np.array(self.scores)).tolist() if self.scores else []

    def odds_at(self, accepted: int, odds: list[float]) -> tuple[list[int], list[float], float]:
        """Guesses after `accepted` tokens of the chain other than the next one, with their probabilities; and the
        probability of the next one."""
        place = self.committed + accepted
        following = self.tokens[place] if place < len(self.tokens) else -1
        tokens, others, kept = [], [], odds[-1] if following >= 0 else 0.0
        for token, odd in zip(self.orders[accepted].tolist(), odds, strict=True):
            if token == following:
                kept = odd
            elif token >= 0:
                tokens.append(token)
                others.append(odd)
        return tokens, others, kept

    def rank(self, accepted: int, token: int) -> int | None:
        """Where a token stands among the guesses after `accepted` ones: 0 is the first, -1 not among them.

        None where there are no guesses: after the last token of a chain there are none before the build's first step.
        """
        if accepted >= len(self.orders):
            return None
        guesses = self.guesses(accepted)
        return guesses.index(token) if token in guesses else -1

    def guesses(self, accepted: int) -> list[int]:
        """Tokens that may follow `accepted` ones of the chain, if not the next of the chain."""
        place = self.committed + accepted
        refused = self.tokens[place] if place < len(self.tokens) else -1
        return [token for token in self.orders[accepted].tolist() if token >= 0 and token != refused]

    def _learn(self) -> None:
        """What the last rounds taught, late: while they came out somebody waited."""
        if self._seen:
            scores = np.stack([scores for scores, _ in self._seen])
            self._odds.observe(scores, np.array([rank for _, rank in self._seen]))
            self._seen.clear()

    def begin(self, number: int, fan_out: Sequence[int], depth: int) -> None:
        """Begin to guess the outcomes of round `number`."""
        self._learn()
        trunk = self.tokens
        depth = min(depth, self.room(len(trunk) + 1))
        kind = OrderedBuild if self._rule.free else EvenBuild
        build = kind(self, number, rows_of(self._runner, trunk), fan_out, depth)
        if self._runner.length < len(trunk):
            build.trunk_row = build.rows.branch(len(trunk) - 1)
        self.build = build

    def step(self) -> None:
        """One more token for the branches whose turn it is."""
        build = self.build
        assert build is not None
        growing = build.next()
        rows = [branch.row for branch in growing]
        tokens = [branch.tokens[-1] if branch.tokens else branch.token for branch in growing]
        positions = [self.committed + branch.accepted + 1 + len(branch.tokens) for branch in growing]
        first = build.trunk_row is not None and not build.trunk_fed
        if first:
            assert build.trunk_row is not None
            rows.insert(0, build.trunk_row)
            tokens.insert(0, self.tokens[-1])
            positions.insert(0, len(self.tokens))
        proposal = self._propose(build.rows.feed(rows, tokens), positions)
        odds = None if proposal.scores is None else self._odds.of(proposal.scores)[:, 0].tolist()
        build.steps += 1
        build.fed += len(rows)
        for index, branch in enumerate(growing, start=int(first)):
            branch.tokens.append(proposal.tokens[index])
            branch.orders.append(proposal.orders[index])
            branch.scores.append(None if proposal.scores is None else proposal.scores[index])
            if proposal.laws is not None:
                branch.laws.append((proposal.laws[0][index], proposal.laws[1][index]))
            build.grown(branch, 1.0 if odds is None else odds[index])
        if first:
            build.trunk_fed = True
            self._remember(proposal, 0)
            build.trunk_is_known()

    def settle(self, start: int, tokens: Sequence[int], length: int | None) -> Branch | None:
        """The outcome of the round: the trunk follows it. Returns the branch that it was, if it was built.

        Args:
            start: how many tokens were committed before.
            tokens: those that the round committed: the accepted ones, and the one that follows them.
            length: how many of the branch's tokens are the next chain; None for all.
        """
        self.settled = True
        build, self.build = self.build, None
        wanted = [*self.tokens[:start], *tokens]
        accepted = len(tokens) - 1
        branch = None
        same = self.committed == start and self.tokens[: len(wanted) - 1] == wanted[:-1]
        if same:
            for order, scores, token in zip(self.orders, self.scores, tokens, strict=False):
                if scores is not None:
                    place = np.flatnonzero(order == token)
                    self._seen.append((scores, int(place[0]) if place.size else -1))
        if build is not None:
            if same:
                named = (one for one in build.branches if (one.accepted, one.token) == (accepted, tokens[-1]))
                branch = next(named, None)
            if branch is not None and branch.tokens:
                build.rows.adopt(branch.row)
            elif build.trunk_row is not None and build.trunk_fed:
                build.rows.adopt(build.trunk_row)
            else:
                build.rows.drop()
        self.tokens, self.committed, self.orders, self.scores = wanted, len(wanted), [], []
        known = len(wanted) - 1
        if branch is not None:
            kept = branch.tokens[:length]
            # Where the branch is longer than the chain, its last token was fed and what follows it guessed.
            self.orders, self.scores = branch.orders[: len(kept) + 1], branch.scores[: len(kept) + 1]
            known += len(self.orders)
            self.tokens += kept
        # What was fed beyond the new trunk is of another future.
        fed = self._runner.tokens
        most = min(len(fed), known)
        place = min(start, most)
        while place < most and fed[place] == self.tokens[place]:
            place += 1
        self._runner.truncate(min(place, most))
        return branch
