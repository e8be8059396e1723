"""Policies side by side in the simulator: fixed k, and predicted k, over seeds, with intervals.

Every policy meets the same tasks, answers and latencies, so that a ratio of two policies is taken seed by seed. A
dynamic policy starts each seed with nothing learnt, and its first tasks count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning.model import generator
from tilewise.scheduler.planning.predictor import FixedPredictor, Predictor, ValuePredictor
from tilewise.scheduler.planning.scenario import Scenario, steps_to_mismatch
from tilewise.scheduler.planning.simulation import Simulator
from tilewise.scheduler.planning.window import Caps

__all__ = ["PUBLISHED", "Interval", "Policy", "Row", "Study", "dynamic", "fixed", "run_study", "standard_policies"]

#: Published for setting 1 (Guan et al., 2025): time and cost relative to fixed k = 2, and the mean k.
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "fixed 2": (1.00, 1.00, 2.00),
    "fixed 4": (0.92, 1.41, 4.00),
    "fixed 6": (0.90, 1.92, 6.00),
    "dynamic tau 0.5": (1.01, 0.88, 1.78),
    "dynamic tau 0.99": (0.91, 1.25, 3.59),
    "dynamic tau 0.5 offset 2": (0.90, 1.25, 3.47),
}


@dataclass(frozen=True)
class Policy:
    """A name, and a fresh predictor for a seed."""

    name: str
    make: Callable[[int], Predictor]
    learns: bool


def fixed(k: int) -> Policy:
    """Always k.

    Example:
        >>> fixed(3).name
        'fixed 3'
    """
    return Policy(f"fixed {k}", lambda seed: FixedPredictor(k), False)


def dynamic(tau: float = 0.5, offset: int = 0) -> Policy:
    """Predicted, with the bias of tau and offset.

    Example:
        >>> dynamic(0.95, 2).name
        'dynamic tau 0.95 offset 2'
    """
    name = f"dynamic tau {tau:g}" + (f" offset {offset}" if offset else "")
    return Policy(name, lambda seed: ValuePredictor(tau=tau, offset=offset, seed=seed), True)


def standard_policies(most: int = 10) -> list[Policy]:
    """Fixed k from 1 to `most`, the published dynamic settings, and two that favour time."""
    settings = [(0.5, 0), (0.8, 0), (0.99, 0), (0.5, 1), (0.5, 2), (0.9, 2), (0.95, 2)]
    return [*map(fixed, range(1, most + 1)), *(dynamic(*setting) for setting in settings)]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and the bounds of its 95 % interval (bootstrap over seeds, percentiles)."""

    mean: float
    low: float
    high: float


@dataclass
class Row:
    """One policy: numbers by seed ``[seeds]``.

    Attributes:
        name: of the policy.
        learns: whether k is predicted.
        seconds, cost: of all tasks of a seed together (virtual seconds, money).
        k: mean budget of the rounds.
        peak: mean of the most calls in flight.
        wasted: share of the cost spent on calls whose answer is not in a plan.
    """

    name: str
    learns: bool
    seconds: np.ndarray
    cost: np.ndarray
    k: np.ndarray
    peak: np.ndarray
    wasted: np.ndarray


@dataclass
class Study:
    """All policies of one scenario.

    Attributes:
        scenario: its name.
        seeds, tasks: how many seeds, and tasks of each.
        rows: by policy.
        alone: seconds of the target alone ``[seeds]``.
        mismatch: of the steps to a mismatch inside a task, the mean over tasks of their ``max``, ``min``,
            ``variance`` and ``range``.
    """

    scenario: str
    seeds: int
    tasks: int
    rows: list[Row]
    alone: np.ndarray
    mismatch: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Of a policy.

        Raises:
            ArgumentError: no such policy.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError(f"study: no policy {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def ratio(self, name: str, base: str, what: str = "seconds") -> Interval:
        """``seconds`` or ``cost`` of a policy, divided by those of another: totals over seeds, seeds resampled."""
        one, other = getattr(self.row(name), what), getattr(self.row(base), what)
        draws = generator(0, 0, 4).integers(0, one.size, (4000, one.size))
        means = one[draws].sum(1) / other[draws].sum(1)
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(float(one.sum() / other.sum()), float(low), float(high))

    def fastest(self) -> str:
        """The fixed policy with the least time."""
        return min((row for row in self.rows if not row.learns), key=lambda row: row.seconds.sum()).name

    def frugal(self, slack: float = 0.02) -> str:
        """The cheapest fixed policy whose time is within `slack` of the fastest one's: what a careful user of fixed k
        would choose, had they tried them all."""
        best = self.row(self.fastest()).seconds.sum()
        near = [row for row in self.rows if not row.learns and row.seconds.sum() <= (1 + slack) * best]
        return min(near, key=lambda row: row.cost.sum()).name

    def linearity(self) -> float | None:
        """R squared of the straight line through the cost of fixed k, k up to 6; None with fewer than three points, or
        where the cost is the same for all."""
        found = {int(row.name.split()[1]): row.cost.sum() for row in self.rows if not row.learns}
        points = np.array([(k, cost) for k, cost in sorted(found.items()) if k <= 6])
        if len(points) < 3 or np.ptp(points[:, 1]) == 0.0:
            return None
        line = np.polynomial.Polynomial.fit(points[:, 0], points[:, 1], 1)
        left = ((points[:, 1] - line(points[:, 0])) ** 2).sum()
        return float(1.0 - left / ((points[:, 1] - points[:, 1].mean()) ** 2).sum())

    def dominated(self, name: str) -> list[str]:
        """Fixed policies that are neither faster nor cheaper than this one (means over seeds)."""
        one = self.row(name)
        return [
            row.name for row in self.rows
            if not row.learns and row.seconds.sum() >= one.seconds.sum() and row.cost.sum() >= one.cost.sum()
        ]  # fmt: skip

    def saving(self, name: str) -> float:
        """How much less a policy costs than fixed k at the same time: 1 - cost / cost on the line through the fixed
        policies (straight between neighbours; beyond the fastest or the slowest, that one's cost)."""
        one = self.row(name)
        line = sorted((row.seconds.sum(), row.cost.sum()) for row in self.rows if not row.learns)
        seconds, cost = zip(*line, strict=True)
        return float(1.0 - one.cost.sum() / np.interp(one.seconds.sum(), seconds, cost))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        base = "fixed 2" if any(row.name == "fixed 2" for row in self.rows) else self.rows[0].name
        fastest, frugal = self.fastest(), self.frugal()
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"name": row.name, "learns": row.learns, "k": float(row.k.mean())}
            entry |= {"peak": float(row.peak.mean()), "wasted": float(row.wasted.mean())}
            entry |= {"speedup": float(self.alone.sum() / row.seconds.sum())}
            for against, other in (("base", base), ("fastest", fastest), ("frugal", frugal)):
                for what in ("seconds", "cost"):
                    found = self.ratio(row.name, other, what)
                    entry[f"{what}_to_{against}"] = [found.mean, found.low, found.high]
            if row.learns:
                entry["dominates"] = self.dominated(row.name)
                entry["saving_at_equal_time"] = self.saving(row.name)
            if row.name in PUBLISHED:
                entry["published"] = dict(zip(("seconds", "cost", "k"), PUBLISHED[row.name], strict=True))
            rows.append(entry)
        return {
            "scenario": self.scenario, "seeds": self.seeds, "tasks": self.tasks, "base": base, "fastest": fastest,
            "frugal": frugal, "mismatch": self.mismatch, "cost_linearity": self.linearity(), "rows": rows,
        }  # fmt: skip


def run_study(
    scenario: Scenario,
    policies: Sequence[Policy],
    *,
    seeds: Sequence[int] = range(20),
    tasks: int = 312,
    caps: Caps = Caps(),  # noqa: B008 (frozen)
    watch: Callable[[], None] = lambda: None,
) -> Study:
    """Run every policy over every seed.

    Args:
        scenario: the family of tasks.
        policies: see :func:`fixed` and :func:`dynamic`.
        seeds: of the tasks.
        tasks: of a seed, one after another.
        caps: most calls in flight.
        watch: called after each policy of each seed.

    Raises:
        ArgumentError: nothing to run.

    Example:
        >>> study = run_study(Scenario(), [fixed(1), fixed(4)], seeds=range(2), tasks=3)
        >>> study.fastest(), study.ratio("fixed 1", "fixed 4", "cost").high < 1
        ('fixed 4', True)
    """
    if not policies or not len(seeds) or tasks < 1:
        raise ArgumentError(f"run_study: nothing to run: {len(policies)} policies, {len(seeds)} seeds, {tasks} tasks")
    table = np.zeros((len(policies), len(seeds), 5))
    alone = np.zeros(len(seeds))
    spread: list[tuple[float, float, float]] = []
    for column, seed in enumerate(seeds):
        made = [scenario.task(seed, number) for number in range(tasks)]
        alone[column] = sum(task.alone for task in made)
        lengths = [steps_to_mismatch(task) for task in made]
        spread += [(max(steps), min(steps), float(np.var(steps))) for steps in lengths]
        for place, policy in enumerate(policies):
            simulator = Simulator(policy.make(seed), caps=caps)
            seconds = cost = wasted = 0.0
            budgets: list[int] = []
            peaks: list[int] = []
            for task in made:
                done = simulator.run(task)
                ledger = done.episode.ledger
                seconds += done.seconds
                cost += ledger.cost(scenario.prices)
                wasted += ledger.cost(scenario.prices) - ledger.cost(scenario.prices, fate="kept")
                budgets += [k for k in done.episode.rounds if k is not None]
                peaks.append(done.episode.peak)
            table[place, column] = (seconds, cost, np.mean(budgets), np.mean(peaks), wasted / cost)
            watch()
    rows = [Row(policy.name, policy.learns, *table[place].T) for place, policy in enumerate(policies)]
    most, least, variance = np.mean(spread, axis=0).tolist()
    mismatch = {"max": most, "min": least, "variance": variance, "range": most - least}
    return Study(scenario.name, len(seeds), tasks, rows, alone, mismatch)
