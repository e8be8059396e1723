"""What a planner gives back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from tilewise.scheduler.planning import CallRecord, Episode, Ledger, Step

__all__ = ["OrphanedCallWarning", "PlanResult", "Problem", "Timings"]


class OrphanedCallWarning(RuntimeWarning):
    """A cancelled call did not end within the planner's patience and may still run."""


@dataclass(frozen=True)
class Problem:
    """Something that went wrong and did not end the episode.

    Attributes:
        kind: ``"approximate"`` (it raised, timed out or was not readable), ``"target"`` (the same, on a step that was
            not confirmed: it was asked again, or was not needed), ``"tool"`` (an unconfirmed run), ``"predictor"``,
            ``"training"``, ``"agree"`` (the comparison raised; taken as a difference), ``"swallowed"`` (a callee
            caught its cancellation and went on for a while) or ``"orphan"`` (and still runs).
        step: of the plan; -1 if it belongs to none.
        text: what happened.
    """

    kind: str
    step: int
    text: str


@dataclass(frozen=True)
class Timings:
    """Seconds from the start of the episode.

    Attributes:
        total: until everything had ended, cancelled calls among them.
        planned: until the plan was complete.
        commits: when each step was final.
        alone: what the target alone would have taken, *estimated* as the sum of this run's own times of the kept
            target calls and confirmed tools; contention slows both in the same way.
        speedup: alone / planned.
    """

    total: float
    planned: float
    commits: tuple[float, ...]
    alone: float

    @property
    def speedup(self) -> float:
        return self.alone / self.planned if self.planned > 0 else 1.0


@dataclass(frozen=True)
class PlanResult:
    """A plan and how it came about.

    Attributes:
        steps: the plan.
        reason: ``"terminated"`` or ``"limit"``.
        agreed: for each step whether the approximation agent had said it; None where it had not answered in time.
        lossless: whether every action is the target's own. False only after a fuzzy agreement.
        ledger: tokens by role, kind and fate.
        timings: see :class:`Timings`.
        rounds: budgets k of the rounds; None where the predictor had not answered.
        peak: most calls of agents in flight at once.
        records: every call (times from the start of the episode), for :func:`tilewise.plots.planning.timeline`.
        problems: what went wrong on the way.
    """

    steps: list[Step]
    reason: str
    agreed: list[bool | None]
    lossless: bool
    ledger: Ledger
    timings: Timings
    rounds: list[int | None]
    peak: int
    records: list[CallRecord]
    problems: list[Problem]

    @property
    def actions(self) -> list[Any]:
        """Of the steps."""
        return [step.action for step in self.steps]


def alone(episode: Episode) -> float:
    """Seconds of the kept target calls and the tools of confirmed steps."""
    kept = [record for record in episode.records if record.fate == "kept" and record.role in ("target", "tool")]
    # A rehearsal is kept as well as the real run after it: the last run of a step is the confirmed one.
    last = {(record.role, record.step): (record.end or record.start) - record.start for record in kept}
    return sum(last.values())


def warn_orphan(step: int, role: str, patience: float) -> None:
    """Say on the spot that a call may still run."""
    warnings.warn(
        f"the {role} call of step {step} did not end within {patience:g} s of its cancellation and may still run: it "
        "catches CancelledError without raising it again",
        OrphanedCallWarning,
        stacklevel=2,
    )
