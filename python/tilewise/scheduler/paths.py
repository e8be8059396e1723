"""Parallel reasoning paths and their summary: a state machine without I/O.

One prompt, P paths that do not see each other, decoded in lockstep, then a summary that sees the prompt and all of
them::

    begin          fork the prompt P times; path i begins with its own open token (forced)
    each step      one sampled token for each path that goes on
                   an open token of another path, or the summary's: replaced by the path's own open token
                   a stop token, or any path's close token:         replaced by the path's own close token; it ends
                   the last token that the limit allows:            replaced by the path's own close token; it ends
    enough ended   ("first": one, "half": half of them, "last": all, or a number): the others are cut where they are
    merge          one sequence: prompt, path 1, ..., path P; keys and values stay as they are
    summary        its open token and a template are forced; then sampled up to a stop or close token, or its limit

Positions: token t of every path stands at ``prompt + t``, so paths share positions; the summary begins after the
longest path.

Events are method calls, commands come back as tuples:

* ``("fork", P)``;
* ``("feed", ((path, token, sample), ...))``: append these tokens, one per path, in one step; answer with a sampled
  token for each path marked so (:meth:`ParallelPaths.sampled`). A path that is no longer named is over;
* ``("merge", lengths)``: concatenate the paths, in order, after the prompt;
* ``("summary", tokens)``: append these to the merged sequence, answer with a token sampled after the last
  (:meth:`ParallelPaths.summarised`);
* ``("finish", reason)``: ``"stopped"`` or ``"limit"``.

Source: ParaThinker (Wen et al. 2025), arXiv 2509.04475, section 4; protocol as its public engine has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError

__all__ = ["FINISH", "PROMPT", "SUMMARY", "Packed", "ParallelPaths", "PathTokens"]

Command = tuple[Any, ...]

FINISH = ("first", "half", "last")
"""How many paths must end before the summary begins, by name."""
PROMPT = 1
"""The segment of the prompt (see :func:`tilewise.masks.parallel_paths`); path i, from 0, has 2 + i."""
SUMMARY = -1
"""The segment of the summary."""


@dataclass(frozen=True)
class PathTokens:
    """The tokens that mean something.

    Attributes:
        opens: one token for each path, which it begins with.
        closes: one token for each path, which it ends with.
        summary: begins the summary.
        summary_end: ends it.
        stops: end a path or the summary where they are sampled (the model's end-of-sequence tokens).
        template: forced after `summary`.

    Raises:
        ArgumentError: not one open and close token for each path, or one token with two meanings.
    """

    opens: Sequence[int]
    closes: Sequence[int]
    summary: int
    summary_end: int
    stops: frozenset[int] = frozenset()
    template: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.opens) != len(self.closes) or not self.opens:
            raise ArgumentError(
                f"expected one open and one close token for each path, got {len(self.opens)} and {len(self.closes)}"
            )
        special = [*self.opens, *self.closes, self.summary, self.summary_end]
        twice = sorted({token for token in special if special.count(token) > 1})
        if twice:
            raise ArgumentError(f"token {twice[0]} has two meanings; open, close and summary tokens must differ")
        if self.stops & {*self.opens, self.summary}:
            raise ArgumentError("a stop token cannot also begin a path or the summary")


@dataclass(frozen=True)
class Packed:
    """Prompt, paths and summary as one sequence, for :func:`tilewise.masks.parallel_paths`.

    Attributes:
        tokens, positions, segments: int64 ``[length]``.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class ParallelPaths:
    """The state machine of one prompt.

    Args:
        paths: P, at most as many as `tokens` has.
        tokens: the special tokens.
        path_limit: tokens of a path at most, open and close token included; at least 2.
        summary_limit: sampled tokens of the summary at most; at least 1.
        finish: ``"first"``, ``"half"``, ``"last"``, or how many paths must end before the summary begins. The paper
            finds "first" best and cheapest.

    Raises:
        ArgumentError: a setting outside its range.

    Example:
        >>> tokens = PathTokens(opens=[10, 12], closes=[11, 13], summary=20, summary_end=21, stops=frozenset({0}))
        >>> machine = ParallelPaths(2, tokens, path_limit=8, summary_limit=4)
        >>> machine.begin()
        [('fork', 2), ('feed', ((0, 10, True), (1, 12, True)))]
        >>> machine.sampled({0: 5, 1: 6})
        [('feed', ((0, 5, True), (1, 6, True)))]
        >>> machine.sampled({0: 7, 1: 0})
        [('feed', ((0, 7, False), (1, 13, False))), ('merge', (3, 3)), ('summary', (20,))]
        >>> machine.summarised(9), machine.summarised(0)
        ([('summary', (9,))], [('finish', 'stopped')])
        >>> machine.paths, machine.summary
        ([[10, 5, 7], [12, 6, 13]], [20, 9, 21])
    """

    def __init__(
        self,
        paths: int,
        tokens: PathTokens,
        *,
        path_limit: int = 16384,
        summary_limit: int = 1024,
        finish: str | int = "first",
    ) -> None:
        if isinstance(paths, bool) or not isinstance(paths, int) or not 1 <= paths <= len(tokens.opens):
            raise ArgumentError(f"paths: expected 1 to {len(tokens.opens)}, the open tokens there are, got {paths!r}")
        if path_limit < 2:
            raise ArgumentError(f"path_limit: expected at least 2, the open and the close token, got {path_limit}")
        if summary_limit < 1:
            raise ArgumentError(f"summary_limit: expected at least 1 token, got {summary_limit}")
        counts: dict[str | int, int] = {"first": 1, "half": -(-paths // 2), "last": paths}
        needed = counts.get(finish) if isinstance(finish, str) else finish
        if isinstance(needed, bool) or not isinstance(needed, int) or not 1 <= needed <= paths:
            raise ArgumentError(
                f"finish: expected 'first', 'half', 'last' or a number from 1 to {paths}, got {finish!r}"
            )
        self.count = paths
        self.tokens = tokens
        self.path_limit = path_limit
        self.summary_limit = summary_limit
        self.needed = needed
        self.paths: list[list[int]] = [[] for _ in range(paths)]
        """The tokens of each path, forced ones included."""
        self.ends: list[str] = ["running"] * paths
        """How each path ended: ``"closed"``, ``"limit"`` or ``"cut"``; ``"running"`` before that."""
        self.summary: list[int] = []
        """The tokens of the summary, forced ones included."""
        self.phase = "new"
        """``"new"``, ``"paths"``, ``"summary"`` or ``"done"``."""
        self.end = ""
        """How the summary ended: ``"stopped"`` or ``"limit"``."""

    def begin(self) -> list[Command]:
        """Fork the prompt and feed every path its open token."""
        self._expect("new", "begin")
        self.phase = "paths"
        for path, token in enumerate(self.tokens.opens[: self.count]):
            self.paths[path].append(int(token))
        return [("fork", self.count), self._feed(range(self.count), True)]

    def sampled(self, tokens: Mapping[int, int]) -> list[Command]:
        """One sampled token for each path that was fed with `sample`.

        Raises:
            ArgumentError: other paths than those, or no paths are running.
        """
        self._expect("paths", "sampled")
        running = [path for path in range(self.count) if self.ends[path] == "running"]
        if sorted(tokens) != running:
            raise ArgumentError(f"expected a token for each of the paths {running}, got {sorted(tokens)}")
        for path in running:
            self._append(path, int(tokens[path]))
        going = [path for path in running if self.ends[path] == "running"]
        if self.count - len(going) < self.needed:
            # A path that ended now is fed its close token, so that the summary sees it.
            return [("feed", self._entries(running, set(going)))]
        for path in going:
            self.ends[path] = "cut"
        self.phase = "summary"
        self.summary = [int(self.tokens.summary), *(int(token) for token in self.tokens.template)]
        lengths = tuple(len(path) for path in self.paths)
        return [self._feed(running, False), ("merge", lengths), ("summary", tuple(self.summary))]

    def summarised(self, token: int) -> list[Command]:
        """The next token of the summary.

        Raises:
            ArgumentError: there is no summary to continue.
        """
        self._expect("summary", "summarised")
        token = int(token)
        if token in self.tokens.stops or token == self.tokens.summary_end or token in self.tokens.closes:
            self.summary.append(int(self.tokens.summary_end))
            self.phase, self.end = "done", "stopped"
        else:
            self.summary.append(token)
            if len(self.summary) == 1 + len(self.tokens.template) + self.summary_limit:
                self.phase, self.end = "done", "limit"
        return [("finish", self.end)] if self.phase == "done" else [("summary", (token,))]

    def summary_start(self, prompt: int) -> int:
        """The position of the summary's first token, after a prompt of so many tokens."""
        return prompt + max(len(path) for path in self.paths)

    def answer(self) -> list[int]:
        """What the summary says: its sampled tokens, without the one that ends it."""
        said = self.summary[1 + len(self.tokens.template) :]
        return said[:-1] if self.end == "stopped" else said

    def packed(self, prompt: Iterable[int]) -> Packed:
        """Everything so far as one sequence: the tokens, where they stand, and the segment of each.

        Example:
            >>> tokens = PathTokens(opens=[10, 12], closes=[11, 13], summary=20, summary_end=21)
            >>> machine = ParallelPaths(2, tokens)
            >>> _ = machine.begin(), machine.sampled({0: 5, 1: 13})
            >>> packed = machine.packed([1, 2, 3])
            >>> packed.positions, packed.segments
            (array([0, 1, 2, 3, 4, 3, 4, 5]), array([ 1,  1,  1,  2,  2,  3,  3, -1]))
        """
        before = list(prompt)
        parts = [(before, 0, PROMPT)]
        parts += [(path, len(before), 2 + index) for index, path in enumerate(self.paths)]
        parts.append((self.summary, self.summary_start(len(before)), SUMMARY))
        tokens = [token for part, _, _ in parts for token in part]
        positions = [start + place for part, start, _ in parts for place in range(len(part))]
        segments = [label for part, _, label in parts for _ in part]
        return Packed(*(np.array(values, np.int64) for values in (tokens, positions, segments)))

    def _append(self, path: int, token: int) -> None:
        own, special = self.paths[path], self.tokens
        if token in special.stops or token in special.closes or token == special.summary_end:
            own.append(int(special.closes[path]))
            self.ends[path] = "closed"
        elif len(own) == self.path_limit - 1:
            own.append(int(special.closes[path]))
            self.ends[path] = "limit"
        elif token in special.opens or token == special.summary:
            own.append(int(special.opens[path]))
        else:
            own.append(token)

    def _entries(self, paths: Iterable[int], sample: set[int]) -> tuple[tuple[int, int, bool], ...]:
        return tuple((path, self.paths[path][-1], path in sample) for path in paths)

    def _feed(self, paths: Iterable[int], sample: bool) -> Command:
        chosen = list(paths)
        return ("feed", self._entries(chosen, set(chosen) if sample else set()))

    def _expect(self, phase: str, event: str) -> None:
        if self.phase != phase:
            raise ArgumentError(f"{event}: expected in the phase {phase!r}, got it in {self.phase!r}")
