"""What the engine did: counters that are always on, and what follows from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = ["BuildRecord", "DraftRecord", "EngineStats", "RoundRecord"]


@dataclass(frozen=True)
class RoundRecord:
    """One row of one verification, for the timeline.

    Attributes:
        time: seconds since the engine's first round, at its end.
        stream, round: whose, and which.
        source: ``"cached"``, ``"drafted"``, ``"fast"`` or ``"none"``.
        length: tokens of the chain.
        accepted: of them, accepted.
        seconds: of the verification.
        ended: whether the draft ended the chain by itself, before it was as long as asked.
    """

    time: float
    stream: int
    round: int
    source: str
    length: int
    accepted: int
    seconds: float
    ended: bool = False


@dataclass(frozen=True)
class BuildRecord:
    """A build of a draft.

    Attributes:
        branches: guessed outcomes.
        steps: tokens drafted behind each.
        seconds: of the draft's process, for this build alone.
    """

    branches: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class DraftRecord:
    """A chain that the target waited for.

    Attributes:
        made: tokens drafted for it; others were there.
        seconds: of the draft's process.
        waited: from the command to the answer.
    """

    made: int
    seconds: float
    waited: float


@dataclass
class EngineStats:
    """Counters of an engine since it was made or they were reset. Times are seconds of wall clock.

    Attributes:
        tokens: emitted.
        rounds: rows verified (a batch of three streams counts three).
        verifications: steps of the target, prompts not included.
        seconds: in which there was work.
        prompt_seconds, target_seconds, decide_seconds: prompts; verifications; deciding what stays.
        wait_seconds: the target idle, waiting for a draft or the first message of a worker.
        lost_workers: drafts that died or never came.
        accepted: by source of the chain, ``[k]``: rounds with k accepted tokens.
        records, builds, drafts: the last rounds, builds, and chains that were waited for.
        machine: the scheduler's own counters: see :meth:`tilewise.scheduler.Rounds.stats`.
    """

    tokens: int = 0
    rounds: int = 0
    verifications: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    target_seconds: float = 0.0
    decide_seconds: float = 0.0
    wait_seconds: float = 0.0
    lost_workers: int = 0
    accepted: dict[str, list[int]] = field(default_factory=dict)
    records: deque[RoundRecord] = field(default_factory=lambda: deque(maxlen=EngineStats.KEPT))
    builds: deque[BuildRecord] = field(default_factory=lambda: deque(maxlen=EngineStats.KEPT))
    drafts: deque[DraftRecord] = field(default_factory=lambda: deque(maxlen=EngineStats.KEPT))
    machine: Mapping[str, Any] = field(default_factory=dict)

    KEPT: ClassVar[int] = 4096

    def count(self, record: RoundRecord) -> None:
        """Book a row."""
        self.rounds += 1
        histogram = self.accepted.setdefault(record.source, [])
        histogram.extend([0] * (record.accepted + 1 - len(histogram)))
        histogram[record.accepted] += 1
        self.records.append(record)

    @property
    def tokens_per_second(self) -> float:
        """Of all streams, prompts included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Accepted tokens and the one that follows, per row and verification."""
        kept = sum(k * count for histogram in self.accepted.values() for k, count in enumerate(histogram))
        return (kept + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the rounds whose chain had been drafted for their outcome before it was known."""
        return sum(self.accepted.get("cached", [])) / self.rounds if self.rounds else 0.0

    def stats(self) -> dict[str, Any]:
        """Everything as numbers, lists and dicts, for ``--json`` and for collectors."""
        plain = ("tokens", "rounds", "verifications", "seconds", "prompt_seconds", "target_seconds", "decide_seconds",
                 "wait_seconds", "lost_workers", "tokens_per_second", "tokens_per_round", "hit_rate")  # fmt: skip
        return {name: getattr(self, name) for name in plain} | {
            "accepted_lengths": dict(self.accepted), "scheduler": dict(self.machine)
        }  # fmt: skip
