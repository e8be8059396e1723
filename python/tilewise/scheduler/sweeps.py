"""Simulated speed-ups over one quantity, and the published table with parameters fitted to it.

* :func:`sweep`: over batch size, temperature, fan-out or Saguaro's C;
* :func:`published`: the table of Kumar, Dao, May, "Speculative speculative decoding" (2026), beside a simulation whose
  hit rate, draft time and tokens per round are *fitted* to it: the paper does not give them. That the simulator then
  agrees says that it and the formulas are consistent with the table, not that it predicts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler import formulas
from tilewise.scheduler.simulation import Simulation, Times, Toy, simulate

__all__ = ["SWEEPS", "Row", "Sweep", "Table", "acceptance_for", "published", "sweep"]

SWEEPS = ("batch", "temperature", "fan-out", "saguaro")


@dataclass(frozen=True)
class Row:
    """One point: the swept value, the mode, the speed-up over plain decoding with its 95 % interval over seeds, and the
    means of hit rate, tokens per round and acceptance (toy models)."""

    value: float
    mode: str
    over_plain: float
    interval: tuple[float, float]
    hit_rate: float | None
    tokens_per_round: float
    acceptance: float | None


@dataclass(frozen=True)
class Sweep:
    """A sweep: of what, its points, and what was held fixed."""

    kind: str
    rows: list[Row]
    fixed: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As plain objects, for JSON."""
        return asdict(self)


def _row(value: float, mode: str, runs: Sequence[Simulation], plain: float) -> Row:
    speeds = np.array([run.speed for run in runs]) / plain
    half = 1.96 * float(np.std(speeds, ddof=1)) / math.sqrt(len(speeds)) if len(speeds) > 1 else 0.0
    mean = float(np.mean(speeds))
    hits = [run.hit_rate for run in runs if run.hit_rate is not None]
    acceptance = [run.acceptance for run in runs if run.acceptance is not None]
    return Row(
        value=value,
        mode=mode,
        over_plain=mean,
        interval=(mean - half, mean + half),
        hit_rate=float(np.mean(hits)) if hits else None,
        tokens_per_round=float(np.mean([run.tokens_per_round for run in runs])),
        acceptance=float(np.mean(acceptance)) if acceptance else None,
    )


def sweep(
    kind: Literal["batch", "temperature", "fan-out", "saguaro"],
    *,
    times: Times | None = None,
    acceptance: float | Sequence[float] = 0.8,
    rank_curve: float | Sequence[float] = 1.5,
    draft_length: int = 7,
    budget: int = 24,
    batch: int = 1,
    targets: int = 1,
    drafts: int = 1,
    toy: Toy | None = None,
    modes: Sequence[str] = ("speculative", "neural", "fast", "adaptive"),
    values: Sequence[float] | None = None,
    seeds: int = 3,
    tokens: int = 8000,
    watch: Callable[[], None] = lambda: None,
) -> Sweep:
    """Simulates modes over a range of one quantity.

    Args:
        kind: what is swept: ``"batch"``: rows of a verification; ``"temperature"``: of toy models; ``"fan-out"``:
            branches of a build; ``"saguaro"``: the weight C of the draft's best guesses (toy models).
        times, acceptance, rank_curve, draft_length, budget, batch, targets, drafts: as in
            :func:`tilewise.scheduler.simulate`.
        toy: the models of ``"temperature"`` and ``"saguaro"``.
        modes: which to run; plain decoding is what they are compared with.
        values: where to look; None: a default range.
        seeds: runs of each point.
        tokens: of each run.
        watch: called after each run, for progress.

    Raises:
        ArgumentError: an unknown kind, or arguments that :func:`~tilewise.scheduler.simulate` refuses.

    Example:
        >>> from tilewise.scheduler.sweeps import sweep
        >>> found = sweep("batch", values=[1, 4], modes=["neural"], seeds=1, tokens=500)
        >>> [(row.value, row.mode) for row in found.rows]
        [(1, 'neural'), (4, 'neural')]
    """
    if kind not in SWEEPS:
        raise ArgumentError(f"kind: expected one of {', '.join(SWEEPS)}, got {kind!r}")
    if seeds < 1:
        raise ArgumentError(f"seeds: expected at least 1, got {seeds}")
    defaults: dict[str, Sequence[float]] = {
        "batch": [1, 2, 4, 8, 16],
        "temperature": [0.0, 0.3, 0.6, 0.8, 1.0, 1.2],
        "fan-out": [4, 8, 12, 16, 24, 32, 48, 64],
        "saguaro": [1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0],
    }
    times = times or Times(draft=(0.07, 0.001), glue=0.07)
    models = toy or Toy(vocabulary=64, sharpness=2.0, error=0.7)
    rows = []
    for value in defaults[kind] if values is None else values:
        options: dict[str, Any] = {
            "times": times, "draft_length": draft_length, "budget": budget, "batch": batch, "targets": targets,
            "drafts": drafts, "tokens": tokens,
        }  # fmt: skip
        if kind in ("temperature", "saguaro"):
            changed = {"temperature": float(value)} if kind == "temperature" else {"saguaro": float(value)}
            options["toy"] = replace(models, **changed)
        else:
            options |= {"acceptance": acceptance, "rank_curve": rank_curve}
            options["batch" if kind == "batch" else "budget"] = int(value)
        short: dict[str, Any] = options | {"tokens": min(tokens, 2000)}
        plain = simulate("plain", seed=0, **short).speed
        for mode in modes:
            runs = []
            for seed in range(seeds):
                runs.append(simulate(mode, seed=seed, **options))  # type: ignore[arg-type]
                watch()
            rows.append(_row(value, mode, runs, plain))
    fixed = {
        "times": asdict(times),
        "draft_length": draft_length,
        "budget": budget,
        "batch": batch,
        "seeds": seeds,
        "tokens": tokens,
    }
    fixed |= (
        {"toy": asdict(models)}
        if kind in ("temperature", "saguaro")
        else {"acceptance": acceptance, "rank_curve": rank_curve}
    )
    return Sweep(kind, rows, fixed)


def acceptance_for(tokens: float, length: int) -> float:
    """The acceptance rate, one for all places, at which a round of K drafted tokens emits so many on average.

    Raises:
        ArgumentError: more than K + 1 or fewer than 1.

    Example:
        >>> round(acceptance_for(1.75, 2), 6)
        0.5
    """
    if not 1 <= tokens <= length + 1:
        raise ArgumentError(f"tokens: expected a number in [1, K + 1 = {length + 1}], got {tokens}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if formulas.expected_tokens(middle, length) < tokens else (low, middle)
    return low


@dataclass(frozen=True)
class Table:
    """One row of the published table: tokens per second as published, as simulated, and the fitted parameters."""

    name: str
    paper: dict[str, float]
    ours: dict[str, float]
    fitted: dict[str, float]

    @property
    def difference(self) -> float:
        """The largest relative difference of the row."""
        return max(abs(self.ours[key] / self.paper[key] - 1) for key in self.paper)


#: Plain, speculative and SSD in tokens per second; batch 1, greedy, 512 new tokens.
PAPER = {
    "Llama 70B/1B, HumanEval": (54.7, 176.0, 283.0),
    "Llama 70B/1B, UltraFeedback": (54.7, 138.0, 215.0),
    "Llama 70B/1B, Alpaca": (54.7, 145.0, 224.0),
    "Llama 70B/1B, GSM8K": (54.7, 188.0, 301.0),
    "Llama 70B/1B, average": (54.7, 161.8, 255.8),
    "Qwen 32B/0.6B, average": (88.8, 136.8, 203.8),
}


def published(
    *, hit: float = 0.9, length: int = 7, tokens: int = 40_000, watch: Callable[[], None] = lambda: None
) -> list[Table]:
    """The published table, and a simulation with draft time and tokens per round fitted to it at an assumed hit rate.

    From the speeds of SD and SSD over plain decoding, E / (1 + T) and E / (1 + (1 - p) T) with T_p <= 1 and
    E_hit = E_SD, T and E follow for any p.

    Args:
        hit: p, assumed.
        length: K of the simulation.
        tokens: of each run.
        watch: called after each run.

    Example:
        >>> from tilewise.scheduler.sweeps import published
        >>> row = published(tokens=2000)[0]
        >>> row.name, sorted(row.fitted)
        ('Llama 70B/1B, HumanEval', ['acceptance', 'draft_time', 'hit_rate', 'tokens_per_round'])
    """
    if not 0 < hit <= 1:
        raise ArgumentError(f"hit: expected a probability in (0, 1], got {hit}")
    rows = []
    for name, (plain, serial, ahead) in PAPER.items():
        ratio = ahead / serial
        draft = (ratio - 1) / (1 - (1 - hit) * ratio)
        mean = serial / plain * (1 + draft)
        rate = acceptance_for(mean, length)
        options: dict[str, Any] = {
            "times": Times(draft=(draft / length, 0.0)), "draft_length": length, "acceptance": rate,
            "budget": 2 * length, "hit": hit, "tokens": tokens,
        }  # fmt: skip
        ours = {"plain": plain}
        for mode, label in (("speculative", "speculative"), ("neural", "ssd")):
            ours[label] = plain * simulate(mode, seed=1, **options).speed  # type: ignore[arg-type]
            watch()
        paper = {"plain": plain, "speculative": serial, "ssd": ahead}
        fitted = {"hit_rate": hit, "draft_time": draft, "tokens_per_round": mean, "acceptance": rate}
        rows.append(Table(name, paper, ours, fitted))
    return rows
