"""Ending weak reasoning traces early, and the whole vote once it is decided: a state machine without I/O.

::

    warm-up    the first N traces run to their end;  s = the (1 - keep) quantile of their lowest group confidences
    later      a trace is stopped at the first full window whose mean is < s
    votes      of traces that ran to their end with an answer and a lowest group >= s, weighted by it
    end        after the warm-up and each later trace: the best answer's share of all weight >= consensus, or no budget

The driver runs as many traces at once as it likes, in any order: traces are numbered, and a number's fate depends on
its own tokens and on the warm-up alone. The end is decided along the numbers too: it is the smallest number of traces
(at least the warm-up) whose vote is decided; what ran beyond does not count. So the answer does not depend on the
batch.

A trace with NaN among its groups can never vote, so it is stopped too.

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260, section 3.2 and algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tilewise.errors import ArgumentError
from tilewise.scheduler.voting import Key, Vote, threshold, weighted

__all__ = ["OnlineVote", "TraceEnd"]


@dataclass(frozen=True)
class TraceEnd:
    """How a trace ended.

    Attributes:
        answer: None for a trace that was stopped, or that has none.
        lowest: its lowest group confidence, as far as it ran.
        tokens: how many it wrote.
        stopped: whether it was ended early.
    """

    answer: Any
    lowest: float
    tokens: int
    stopped: bool


class OnlineVote:
    """Which traces to run, which to stop, and when the vote is decided.

    Args:
        warmup: traces that run to their end first, N.
        budget: traces at most, warm-up included.
        keep: the share eta of traces that the threshold lets pass, in (0, 1]: 0.1 is the paper's DeepConf-low, which
            saves most, 0.9 its DeepConf-high.
        consensus: tau; the vote ends once the best answer has this share of all weight. 1 ends on unanimity, 0 after
            the warm-up, None never.
        key: what makes two answers the same; equality if None.

    Raises:
        ArgumentError: a setting outside its range.

    Example:
        >>> votes = OnlineVote(warmup=2, budget=4, keep=0.5, consensus=None)
        >>> [votes.start() for _ in range(3)]
        [0, 1, None]
        >>> votes.finish(0, "7", lowest=5.0, tokens=10), votes.finish(1, "8", lowest=3.0, tokens=10)
        ((), ())
        >>> votes.threshold
        4.0
        >>> votes.start(), votes.judge(2, 4.5), votes.judge(2, 3.5)
        (2, False, True)
        >>> votes.stop(2, lowest=3.5, tokens=4), votes.start(), votes.start()
        ((), 3, None)
        >>> votes.finish(3, "7", lowest=6.0, tokens=10), votes.done
        ((), True)
        >>> votes.result().weights
        {'7': 11.0}
    """

    def __init__(
        self,
        *,
        warmup: int = 16,
        budget: int = 256,
        keep: float = 0.9,
        consensus: float | None = 0.95,
        key: Key | None = None,
    ) -> None:
        for name, value in (("warmup", warmup), ("budget", budget)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: expected a whole number of traces, at least 1, got {value!r}")
        if consensus is not None and not 0 <= consensus <= 1:
            raise ArgumentError(f"consensus: expected a share in [0, 1] or None, got {consensus!r}")
        threshold([], keep)  # checks the share
        self.warmup = min(warmup, budget)
        self.budget = budget
        self.keep = keep
        self.consensus = consensus
        self.threshold = math.nan
        """s; NaN until the warm-up is over, and after a warm-up without a finite confidence (then nothing passes)."""
        self.ends: dict[int, TraceEnd] = {}
        self._key = key
        self._started = 0
        self._judged = 0
        self._decided: int | None = None

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return all(trace in self.ends for trace in range(self.warmup))

    @property
    def done(self) -> bool:
        """Whether the vote is decided or the budget spent."""
        return self._decided is not None

    @property
    def running(self) -> tuple[int, ...]:
        """Traces that were started and have not ended."""
        return tuple(trace for trace in range(self._started) if trace not in self.ends)

    def start(self) -> int | None:
        """The number of a trace to begin now; None if there is none (yet: the warm-up must end first)."""
        if self.done or self._started >= (self.budget if self.warm else self.warmup):
            return None
        self._started += 1
        return self._started - 1

    def judge(self, trace: int, group: float) -> bool:
        """Whether to stop a trace, given the mean of a full window of it. Warm-up traces are never stopped.

        Raises:
            ArgumentError: a trace that was not started.
        """
        self._known(trace)
        if trace < self.warmup:
            return False
        return not group >= self.threshold

    def finish(self, trace: int, answer: Any, *, lowest: float, tokens: int) -> tuple[int, ...]:
        """A trace ran to its end.

        Args:
            trace: its number.
            answer: what it says; None is no answer.
            lowest: its lowest group confidence; of a trace shorter than the window, its mean.
            tokens: how many it wrote.

        Returns:
            Traces that still run and whose votes are no longer needed: cancel them, and report nothing of them.

        Raises:
            ArgumentError: a trace that was not started, or has ended.
        """
        return self._end(trace, TraceEnd(answer, float(lowest), tokens, False))

    def stop(self, trace: int, *, lowest: float, tokens: int) -> tuple[int, ...]:
        """A trace was stopped, after :meth:`judge` said so; otherwise as :meth:`finish`."""
        return self._end(trace, TraceEnd(None, float(lowest), tokens, True))

    def _known(self, trace: int) -> None:
        if not 0 <= trace < self._started:
            raise ArgumentError(f"trace: expected one of the {self._started} that were started, got {trace}")

    def _end(self, trace: int, end: TraceEnd) -> tuple[int, ...]:
        self._known(trace)
        if trace in self.ends:
            raise ArgumentError(f"trace: {trace} has ended already")
        self.ends[trace] = end
        if self.done or not self.warm:
            return ()
        if math.isnan(self.threshold):
            self.threshold = threshold([self.ends[one].lowest for one in range(self.warmup)], self.keep)
        self._judged = max(self._judged, self.warmup - 1)
        while self._judged in self.ends:
            self._judged += 1
            vote = self._vote(self._judged)
            if self._judged == self.budget or (self.consensus is not None and vote.share >= self.consensus):
                self._decided = self._judged
                return self.running
        return ()

    def _vote(self, count: int) -> Vote:
        """The vote of the first traces."""
        ends = [self.ends[trace] for trace in range(count)]
        # Not `lowest < s`: without a threshold nothing passes.
        answers = [end.answer if end.lowest >= self.threshold else None for end in ends]
        return weighted(answers, [max(end.lowest, 0.0) for end in ends], key=self._key)

    def result(self) -> Vote:
        """The vote of the traces up to where it was decided; before that, of the longest run of ended numbers."""
        if self._decided is not None:
            return self._vote(self._decided)
        return self._vote(self._judged if self.warm else 0)

    @property
    def counted(self) -> int:
        """How many traces the decision is about."""
        return self._decided if self._decided is not None else self._judged

    @property
    def tokens(self) -> int:
        """Tokens of all traces that ended, those beyond the decision included."""
        return sum(end.tokens for end in self.ends.values())
