"""Many branches of one sequence in one step: what a draft needs to guess ahead.

A *trunk* is the sequence as committed, with the chain that is being verified. A branch leaves it after some token and
has tokens of its own. :class:`Rows` feeds one token of each of many branches at once:

```text
begin at slot S = tokens of the trunk
for each step:  row j of branch b goes to slot S + n, at position extent[b] + (tokens b has),
                and sees the trunk's first extent[b] tokens and b's own slots
adopt b:        its slots are copied behind the trunk's first extent[b] tokens: the branch is the trunk now
```

The trunk's last token is usually not fed yet: then branch 0 is made of it. Its slot is its true position, so branches
that leave the trunk's very end see it like the rest.

Slots and positions differ, so the mask is data: one lower triangle becomes any tree. :class:`LeanRows` writes into the
buffers of a :class:`~tilewise.hf.runners.LeanLlamaRunner`, :class:`CacheRows` appends to a transformers cache with a
mask, and :class:`ReplayRows` feeds one branch after the other, for models that can do neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tilewise.hf.runners import LeanLlamaRunner, ModuleRunner, Runner

__all__ = ["CacheRows", "LeanRows", "ReplayRows", "Rows", "rows_of"]


class Rows(Protocol):
    """The branches of one build. The runner must not be fed until one of them is adopted."""

    def branch(self, extent: int) -> int:
        """A new branch behind the trunk's first `extent` tokens; returns its number, from 0."""
        ...

    def feed(self, branches: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of some branches (each named once): logits ``[len(branches), V]``."""
        ...

    def adopt(self, branch: int) -> None:
        """The runner's sequence becomes this branch's: the trunk's first tokens and its own."""
        ...

    def drop(self) -> None:
        """The runner's sequence becomes what it was before, or a part of it."""
        ...


def rows_of(runner: Runner, trunk: list[int]) -> Rows:
    """Rows over a runner: the fastest kind that computes its model.

    Args:
        runner: has been fed all tokens of the trunk, or all but the last.
        trunk: the tokens that branches leave.
    """
    if isinstance(runner, LeanLlamaRunner):
        return LeanRows(runner, trunk)
    if isinstance(runner, ModuleRunner) and CacheRows.computes(runner):
        return CacheRows(runner, trunk)
    return ReplayRows(runner, trunk)


class _Slots:
    """Which slot belongs to which branch, and the mask that follows."""

    def __init__(self, begin: int, trunk: list[int]):
        self.end = begin
        self.extents: list[int] = []
        self.owned: list[list[int]] = []
        self._trunk = trunk
        self._tokens: list[list[int]] = []
        self._mask = np.zeros((0, 0), bool)

    def branch(self, extent: int) -> int:
        self.extents.append(extent)
        self.owned.append([])
        self._tokens.append([])
        return len(self.extents) - 1

    def sequence(self, branch: int) -> list[int]:
        """All tokens of a branch, the trunk's first."""
        return [*self._trunk[: self.extents[branch]], *self._tokens[branch]]

    def place(self, branches: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], NDArray[np.bool_]]:
        """Takes a slot for a token of each branch: their positions ``[m]`` and their mask ``[m, slots]``."""
        count = len(branches)
        first, self.end = self.end, self.end + count
        positions = []
        for offset, (branch, token) in enumerate(zip(branches, tokens, strict=True)):
            self._tokens[branch].append(token)
            positions.append(self.extents[branch] + len(self.owned[branch]))
            self.owned[branch].append(first + offset)
        known = self._mask.shape[0]
        if known < len(self.extents) or self._mask.shape[1] < self.end:
            room = max(2 * self.end, self.end + 256)
            mask = np.zeros((max(len(self.extents), 2 * known), room), bool)
            mask[:known, : self._mask.shape[1]] = self._mask
            self._mask = mask
        for branch in branches:
            if len(self.owned[branch]) == 1:
                self._mask[branch, : self.extents[branch]] = True
        self._mask[branches, range(first, self.end)] = True
        return positions, self._mask[branches, : self.end]


class LeanRows:
    """Branches in the buffers of a lean Llama."""

    def __init__(self, runner: LeanLlamaRunner, trunk: list[int]):
        self._runner = runner
        self._slots = _Slots(runner.length, trunk)

    def branch(self, extent: int) -> int:
        """A new branch behind the trunk's first `extent` tokens; returns its number, from 0."""
        return self._slots.branch(extent)

    def feed(self, branches: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of some branches (each named once): logits ``[len(branches), V]``."""
        begin = self._slots.end
        positions, mask = self._slots.place(branches, tokens)
        return self._runner.feed_rows(tokens, positions, begin, mask)

    def adopt(self, branch: int) -> None:
        """The runner's sequence becomes this branch's: the trunk's first tokens and its own."""
        slots = self._slots
        self._runner.move(slots.owned[branch], slots.extents[branch], slots.sequence(branch))

    def drop(self) -> None:
        """The runner's sequence becomes what it was before: its length was never changed."""


class CacheRows:
    """Branches at the end of a transformers cache, told apart by a mask."""

    def __init__(self, runner: ModuleRunner, trunk: list[int]):
        self._runner = runner
        self._slots = _Slots(runner.length, trunk)

    @staticmethod
    def computes(runner: ModuleRunner) -> bool:
        """Whether every layer keeps every key in one tensor and takes masks as they come."""
        return runner.plain and all(type(layer) is DynamicLayer for layer in runner.layers)

    def branch(self, extent: int) -> int:
        """A new branch behind the trunk's first `extent` tokens; returns its number, from 0."""
        return self._slots.branch(extent)

    def feed(self, branches: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of some branches (each named once): logits ``[len(branches), V]``."""
        positions, mask = self._slots.place(branches, tokens)
        return self._runner.feed_rows(tokens, positions, mask)

    def adopt(self, branch: int) -> None:
        """The runner's sequence becomes this branch's: the trunk's first tokens and its own."""
        slots = self._slots
        self._runner.keep([*range(slots.extents[branch]), *slots.owned[branch]], slots.sequence(branch))

    def drop(self) -> None:
        """The runner's sequence becomes what it was before."""
        self._runner.keep(list(range(self._runner.length)), self._runner.tokens)


class ReplayRows:
    """One branch after the other through a model that must be taken back to where they part."""

    def __init__(self, runner: Runner, trunk: list[int]):
        self._runner = runner
        self._trunk = trunk
        self._extents: list[int] = []
        self._own: list[list[int]] = []

    def branch(self, extent: int) -> int:
        """A new branch behind the trunk's first `extent` tokens; returns its number, from 0."""
        self._extents.append(extent)
        self._own.append([])
        return len(self._extents) - 1

    def feed(self, branches: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of some branches (each named once): logits ``[len(branches), V]``."""
        answers = []
        for branch, token in zip(branches, tokens, strict=True):
            self._own[branch].append(token)
            answers.append(self._become(self._of(branch))[-1])
        return torch.stack(answers)

    def _of(self, branch: int) -> list[int]:
        return [*self._trunk[: self._extents[branch]], *self._own[branch]]

    def _become(self, wanted: list[int]) -> Tensor:
        """Feeds what is missing of `wanted`, at least its last token."""
        same = _common(self._runner.tokens, wanted[:-1])
        self._runner.truncate(same)
        return self._runner.feed(wanted[same:], last=1)

    def adopt(self, branch: int) -> None:
        """The runner's sequence becomes this branch's: the trunk's first tokens and its own."""
        if self._runner.tokens != self._of(branch):
            self._become(self._of(branch))

    def drop(self) -> None:
        """The runner's sequence becomes a part of what it was before."""
        self._runner.truncate(_common(self._runner.tokens, self._trunk))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
