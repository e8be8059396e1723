"""From measured times and acceptance to what to run: plain, speculative, or drafts made ahead, and how.

:class:`Measurements` holds what was measured; :func:`plan` compares all ways to run by the formulas of
:mod:`tilewise.scheduler.formulas` and says which is fastest, by how much, and how sure that is. As JSON (times in
seconds; a list of numbers is a list of repeated measurements, from which the interval comes)::

    {"batch": 1,
     "target_seconds": {"1": [0.050, 0.051], "8": [0.058, 0.057]},     by tokens a row of one verification
     "draft_step_seconds": {"1": [0.004], "24": [0.006]},              by branches of one step, all rows together
     "glue_seconds": [0.005],                                          the draft's forward over a chain
     "link_seconds": [0.0002],                                         a request and its answer, beside the work
     "accepted": [810, 640, 500], "tried": [1000, 810, 640],           drafted tokens by place in the chain
     "reached": [1.0, 0.9, 0.7],                                       share of chains that get so far, where drafts end
                                                                       them by themselves; may be left out: 1
     "rank_curve": [0.5, 0.62, 0.7],                                   P(the follow-up is among the F best guesses)
     "fast_accepted": [90], "fast_tried": [1000],                      of a fast draft (n-grams); may be left out
     "rank_curve_after_fast": [0.45, 0.6, 0.68],                       may be left out: rank_curve
     "target_seconds_alone": {...}, "draft_step_seconds_alone": {...}} where plain and serial decoding may use what the
                                                                       draft has to itself otherwise; may be left out
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler import formulas

__all__ = ["Measurements", "Plan", "plan"]

Samples = float | Sequence[float]


@dataclass(frozen=True)
class Measurements:
    """What was measured (see the module for each).

    Raises:
        ArgumentError: by :func:`plan`, where numbers are missing or out of their ranges.
    """

    target_seconds: Mapping[Any, Samples]
    draft_step_seconds: Mapping[Any, Samples]
    accepted: Sequence[float]
    tried: Sequence[float]
    rank_curve: Sequence[float]
    glue_seconds: Samples = 0.0
    link_seconds: Samples = 0.0
    batch: int = 1
    reached: Sequence[float] = ()
    fast_accepted: Sequence[float] = ()
    fast_tried: Sequence[float] = ()
    rank_curve_after_fast: Sequence[float] | None = None
    target_seconds_alone: Mapping[Any, Samples] | None = None
    draft_step_seconds_alone: Mapping[Any, Samples] | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Measurements:
        """From a JSON object.

        Raises:
            ArgumentError: names that are unknown or missing.
        """
        known = {entry.name for entry in fields(cls)}
        wrong = sorted(set(data) - known)
        missing = [
            name
            for name in ("target_seconds", "draft_step_seconds", "accepted", "tried", "rank_curve")
            if name not in data
        ]
        if wrong or missing:
            raise ArgumentError(
                f"measurements: expected an object with {', '.join(sorted(known))}; "
                + (f"unknown: {', '.join(wrong)}" if wrong else f"missing: {', '.join(missing)}")
            )
        return cls(**data)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        mode: ``"plain"``, ``"speculative"`` (the target waits for each draft) or ``"ssd"`` (drafts are made ahead).
        draft_length: K; 0 if plain.
        budget: branches of one stream's build; 0 unless ``"ssd"``.
        fan_out: guesses after 0, 1, ... K accepted tokens, as long as acceptance and ranks are as measured.
        fallback: ``"neural"``, ``"fast"``; None unless ``"ssd"``.
        tokens_per_second: of all rows together.
        over_plain, over_speculative: expected speed-up.
        over_plain_interval, over_speculative_interval: what holds 95 % of what the measurements allow.
        hit_rate: P(hit) after a chain of the draft model.
        tokens_per_round: E.
        build_over_verify: T_p: the time to draft ahead in units of one verification; above 1 hits wait.
        critical_batch: rows up to which the draft model is the better fallback, where rows wait for each other.
        reason: why, in a sentence.
    """

    mode: Literal["plain", "speculative", "ssd"]
    draft_length: int
    budget: int
    fan_out: list[int]
    fallback: Literal["neural", "fast"] | None
    tokens_per_second: float
    over_plain: float
    over_plain_interval: tuple[float, float]
    over_speculative: float
    over_speculative_interval: tuple[float, float]
    hit_rate: float | None
    tokens_per_round: float
    build_over_verify: float | None
    critical_batch: float | None
    reason: str
    alternatives: list[dict[str, Any]] = field(default_factory=list, repr=False)


def plan(measurements: Measurements | Mapping[str, Any], *, most: int = 16, budget: int = 64, seed: int = 0) -> Plan:
    """Which way to run is fastest, by the formulas, for what was measured.

    Args:
        measurements: see the module; an object or a dict as read from JSON.
        most: longest chain to consider.
        budget: most branches of one stream to consider.
        seed: of the resampling behind the intervals.

    Raises:
        ArgumentError: numbers that are missing or cannot be.

    Example:
        >>> from tilewise.scheduler import plan
        >>> found = plan({
        ...     "target_seconds": {"1": 0.05, "8": 0.05},
        ...     "draft_step_seconds": {"1": 0.004, "24": 0.005},
        ...     "accepted": [80, 64, 51], "tried": [100, 80, 64],
        ...     "rank_curve": [0.5, 0.7, 0.8],
        ... })
        >>> found.mode, found.over_plain > 3
        ('ssd', True)
    """
    given = measurements if isinstance(measurements, Measurements) else Measurements.of(measurements)
    point = _Sample(given, None)
    rng = np.random.default_rng(seed)
    samples = [_Sample(given, rng) for _ in range(200)]
    best_serial = max(range(most + 1), key=lambda length: point.serial(length))
    choices = [(length, count) for length in range(1, most + 1) for count in _budgets(budget)]
    length, count, fallback = max(
        ((length, count, way) for length, count in choices for way in ("neural", "fast")),
        key=lambda choice: point.ahead(*choice),
    )
    plain, serial = point.serial(0), point.serial(best_serial)
    ahead = point.ahead(length, count, fallback)
    if ahead > 1.01 * max(serial, plain):
        mode: Literal["plain", "speculative", "ssd"] = "ssd"
    elif best_serial > 0 and serial > 1.01 * plain:
        mode, length = "speculative", best_serial
    else:
        mode, length = "plain", 0

    def speed(sample: _Sample) -> float:
        return sample.ahead(length, count, fallback) if mode == "ssd" else sample.serial(length)

    plains = [speed(sample) / sample.serial(0) for sample in samples]
    serials = [speed(sample) / max(sample.serial(best_serial), sample.serial(0)) for sample in samples]
    reason = _reason(point, mode, length, best_serial, count)
    interval = _interval(plains)
    if mode != "plain" and interval[0] <= 1.0:
        mode, length = "plain", 0
        low, high = interval
        reason = f"do not speculate: the gain is within the noise of the measurements ({low:.2f} to {high:.2f})"
        plains, serials = (
            [1.0],
            [sample.serial(0) / max(sample.serial(best_serial), sample.serial(0)) for sample in samples],
        )
    ssd = mode == "ssd"
    rates = point.rates(length)
    return Plan(
        mode=mode,
        draft_length=length,
        budget=count if ssd else 0,
        fan_out=point.fan_out(length, count) if ssd else [],
        fallback=fallback if ssd else None,  # type: ignore[arg-type]
        tokens_per_second=given.batch * (speed(point) if mode != "plain" else plain),
        over_plain=(speed(point) if mode != "plain" else plain) / plain,
        over_plain_interval=_interval(plains),
        over_speculative=(speed(point) if mode != "plain" else plain) / max(serial, plain),
        over_speculative_interval=_interval(serials),
        hit_rate=point.hit(length, count) if ssd else None,
        tokens_per_round=formulas.expected_tokens(rates, length) if length else 1.0,
        build_over_verify=point.build(length, count) / point.verify(point.extent(length) + 1) if ssd else None,
        critical_batch=point.critical(length, count) if ssd else None,
        reason=reason,
        alternatives=[
            {"mode": "plain", "tokens_per_second": given.batch * plain},
            {"mode": "speculative", "draft_length": best_serial, "tokens_per_second": given.batch * serial},
            {"mode": "ssd", "draft_length": length if ssd else None, "tokens_per_second": given.batch * ahead},
        ],
    )


def _budgets(budget: int) -> list[int]:
    return sorted(
        {count for count in (2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128) if count <= budget} | {max(budget, 1)}
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _reason(point: _Sample, mode: str, length: int, serial: int, count: int) -> str:
    if mode == "ssd":
        hidden = point.build(length, count) / point.verify(point.extent(length) + 1)
        hits = point.hit(length, count)
        return f"drafting ahead takes {hidden:.2f} of a verification and hits {hits:.0%} of the outcomes"
    if mode == "speculative":
        return f"drafting ahead gains less than 1 % over waiting for {length} drafted tokens"
    first = point.rates(1)[0]
    step = point.alone_draft(point.batch) / point.alone(1)
    more = point.alone(2) / point.alone(1)
    return (
        f"do not speculate: {first:.0%} of first drafted tokens are accepted, a draft step costs {step:.2f} of a plain "
        f"step and verifying one token more makes it {more:.2f} times as long"
    )


class _Sample:
    """The measurements, or a resampling of them, as functions."""

    def __init__(self, given: Measurements, rng: np.random.Generator | None) -> None:
        self.batch = _whole("batch", given.batch)
        self.verify = _line("target_seconds", given.target_seconds, rng)
        self.draft = _line("draft_step_seconds", given.draft_step_seconds, rng)
        self.alone = (
            self.verify
            if given.target_seconds_alone is None
            else _line("target_seconds_alone", given.target_seconds_alone, rng)
        )
        self.alone_draft = (
            self.draft
            if given.draft_step_seconds_alone is None
            else _line("draft_step_seconds_alone", given.draft_step_seconds_alone, rng)
        )
        self.glue = _center("glue_seconds", given.glue_seconds, rng)
        self.link = _center("link_seconds", given.link_seconds, rng)
        self.acceptance = _shares("accepted", given.accepted, given.tried, rng)
        self.fast = (
            _shares("fast_accepted", given.fast_accepted, given.fast_tried, rng)
            if len(given.fast_tried)
            else np.zeros(1)
        )
        if not len(self.acceptance):
            raise ArgumentError("accepted: expected counts for at least the first place of a chain, got none")
        self.curve = _curve("rank_curve", given.rank_curve)
        self.reached = _falling("reached", given.reached)
        after = given.rank_curve_after_fast
        self.curve_after_fast = self.curve if after is None else _curve("rank_curve_after_fast", after)
        self._memory: dict[tuple[Any, ...], Any] = {}

    def rates(self, length: int) -> np.ndarray:
        """Acceptance by place; beyond the measured ones as at the last."""
        places = np.minimum(np.arange(length), len(self.acceptance) - 1)
        return self.acceptance[places]

    def fan_out(self, length: int, count: int) -> list[int]:
        """Each guess where it adds most."""
        law = formulas.outcome_law(self.rates(length), length)
        gains = np.diff(np.concatenate([[0.0], self.curve]))
        spread = [0] * (length + 1)
        queue = [(-weight * gains[0], k) for k, weight in enumerate(law)]
        heapq.heapify(queue)
        for _ in range(count):
            if not queue:
                break
            _, k = heapq.heappop(queue)
            spread[k] += 1
            if spread[k] < len(gains):
                heapq.heappush(queue, (-law[k] * gains[spread[k]], k))
        return spread

    def hit(self, length: int, count: int) -> float:
        key = ("hit", length, count)
        if key not in self._memory:
            law = formulas.outcome_law(self.rates(length), length)
            curve = np.concatenate([[0.0], self.curve])
            self._memory[key] = float(np.dot(law, curve[self.fan_out(length, count)]))
        return self._memory[key]

    def extent(self, length: int) -> float:
        """Tokens that a chain gets to of which `length` are asked for."""
        return float(self.reached[np.minimum(np.arange(length), len(self.reached) - 1)].sum())

    def build(self, length: int, count: int) -> float:
        return self.glue + self.extent(length) * self.draft(count * self.batch) + self.link

    def serial(self, length: int) -> float:
        """Tokens per second of a row where the target waits for each draft; plain at 0."""
        if length == 0:
            return 1.0 / self.alone(1)
        extent = self.extent(length)
        time = self.alone(extent + 1) + extent * self.alone_draft(self.batch)
        return formulas.expected_tokens(self.rates(length), length) / time

    def ahead(self, length: int, count: int, fallback: str) -> float:
        """Tokens per second of a row with drafts made ahead."""
        verify, tokens = self.verify(self.extent(length) + 1), formulas.expected_tokens(self.rates(length), length)
        hit, build = self.hit(length, count), self.build(length, count) / verify
        # A build that takes longer than the verification is waited for, or used as far as it is.
        speeds = [self._ahead(length, count, fallback, verify, tokens, tokens, hit, build)]
        if build > 1.0:
            steps = (verify - self.glue - self.link) / self.draft(count * self.batch)
            cut = formulas.expected_tokens(self.rates(length), max(0, min(length, int(steps))))
            speeds.append(self._ahead(length, count, fallback, verify, cut, tokens, hit, 0.0))
        return max(speeds)

    def _ahead(
        self,
        length: int,
        count: int,
        fallback: str,
        verify: float,
        on_hit: float,
        drafted: float,
        hit: float,
        build: float,
    ) -> float:
        tokens = on_hit
        if fallback == "neural":
            backup = (self.extent(length) * self.draft(self.batch) + self.link) / verify
            return float(formulas.batch_speed(self.batch, hit, tokens, drafted, build, backup)) / verify
        fast = min(length, len(self.fast)) if self.fast[0] > 0 else 0
        on_miss = formulas.expected_tokens(self.fast, fast) if fast else 1.0
        curve = np.concatenate([[0.0], self.curve_after_fast])
        after = float(
            curve[min(count, len(curve) - 1)] if fast == 0 else curve[min(max(count // 2, 1), len(curve) - 1)]
        )
        share = formulas.stationary_hit_rate(hit, after) if hit < 1 or after > 0 else 1.0
        return float(formulas.speed(share, tokens, on_miss, build, max(build, 1.0) - 1.0)) / verify

    def critical(self, length: int, count: int) -> float:
        tokens = formulas.expected_tokens(self.rates(length), length)
        fast = formulas.expected_tokens(self.fast, len(self.fast)) if self.fast[0] > 0 else 1.0
        time = (self.extent(length) * self.draft(self.batch) + self.link) / self.verify(self.extent(length) + 1)
        return formulas.critical_batch(self.hit(length, count), tokens, tokens, fast, time)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ArgumentError(f"{name}: expected an integer >= 1, got {value!r}")
    return int(value)


def _center(name: str, samples: Samples, rng: np.random.Generator | None) -> float:
    """The median, of a resampling if there is a generator."""
    values = np.atleast_1d(np.asarray(samples, np.float64))
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values) & (values >= 0)):
        raise ArgumentError(f"{name}: expected seconds >= 0, one or a list of repeated measurements, got {samples!r}")
    if rng is not None:
        values = rng.choice(values, values.size)
    return float(np.median(values))


def _line(name: str, points: Mapping[Any, Samples], rng: np.random.Generator | None) -> Any:
    """Seconds by size: straight between measured sizes and on beyond them, and not falling."""
    if not isinstance(points, Mapping) or not points:
        raise ArgumentError(f'{name}: expected seconds by size, such as {{"1": 0.05, "8": 0.06}}, got {points!r}')
    try:
        sizes = sorted((int(size), size) for size in points)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: expected sizes that are integers, got {', '.join(map(str, points))}") from None
    x = np.array([size for size, _ in sizes], np.float64)
    y = np.maximum.accumulate([_center(f"{name}[{key}]", points[key], rng) for _, key in sizes])
    if x[0] < 1 or y[0] <= 0:
        raise ArgumentError(f"{name}: expected sizes >= 1 with positive seconds, got {dict(points)!r}")
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
    first = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else 0.0

    def seconds(size: float) -> float:
        if size > x[-1]:
            return float(y[-1] + slope * (size - x[-1]))
        if size < x[0]:
            return float(max(y[0] - first * (x[0] - size), 0.1 * y[0]))
        return float(np.interp(size, x, y))

    return seconds


def _shares(name: str, kept: Sequence[float], tried: Sequence[float], rng: np.random.Generator | None) -> np.ndarray:
    k, n = np.asarray(kept, np.float64), np.asarray(tried, np.float64)
    ok = k.shape == n.shape and k.ndim == 1 and np.all((k >= 0) & (k <= n))
    if not ok or not np.all(np.isfinite(n)):
        raise ArgumentError(
            f"{name}: expected as many counts as were tried, each 0 <= accepted <= tried, got {k} of {n}"
        )
    k, n = k[n > 0], n[n > 0]
    if rng is not None:
        return rng.beta(k + 0.5, n - k + 0.5)
    return (k + 0.5) / (n + 1.0)


def _curve(name: str, curve: Sequence[float]) -> np.ndarray:
    values = np.asarray(curve, np.float64)
    if values.ndim != 1 or not values.size or not np.all((values >= 0) & (values <= 1)) or np.any(np.diff(values) < 0):
        raise ArgumentError(f"{name}: expected probabilities that do not fall, of 1, 2, ... guesses, got {curve!r}")
    return values


def _falling(name: str, shares: Sequence[float]) -> np.ndarray:
    values = np.asarray(shares if len(shares) else [1.0], np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)) or np.any(np.diff(values) > 0):
        raise ArgumentError(f"{name}: expected shares in [0, 1] that do not rise, of places 1, 2, ..., got {shares!r}")
    return values
