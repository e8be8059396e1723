"""Voting and stopping on traces of known reliability: what online stopping saves, and what it costs in accuracy.

A question has one right answer and some popular wrong ones. A trace has a reliability r, the probability that it is
right, drawn from a law of the question; its confidence grows with r, blurred by noise of the trace, and a weak trace
sinks for a stretch and is longer. The schedulers see token confidences and answers, never r.

::

    r ~ Beta, with the question's mean       right with probability r
    level = 8 + gap * r + trace noise        token = max(level - dip * (1 - r) inside its weak stretch + noise, 0)
    tokens ~ lognormal * (1.5 - r / 2)

Traces run in `slots` at once, a token each per step, through the same :class:`~tilewise.scheduler.stopping.OnlineVote`
that drives models; traces cut off by the decision are charged what they had written by then. Random numbers are
Philox's by (seed, question, trace).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler.confidence import TraceConfidence, trace_confidence
from tilewise.scheduler.stopping import OnlineVote
from tilewise.scheduler.voting import filtered, majority, weighted

__all__ = ["Outcome", "Policy", "Question", "Study", "make_question", "run_online", "simulate"]


@dataclass(frozen=True)
class Study:
    """Sizes and the world.

    Attributes:
        questions, traces: of a seed; `traces` is the budget of every policy.
        window: tokens of a group.
        warmup: traces that run to their end before any is stopped.
        slots: traces that run at once.
        tokens: a typical trace's length.
        gap: how much confidence tells: levels of r = 1 and r = 0 are so far apart. 0 tells nothing.
        blur: standard deviation of a trace's level.
        difficulty: mean reliability over the questions.
    """

    questions: int = 60
    traces: int = 64
    window: int = 256
    warmup: int = 16
    slots: int = 16
    tokens: int = 1200
    gap: float = 6.0
    blur: float = 1.0
    difficulty: float = 0.55

    def __post_init__(self) -> None:
        for name in ("questions", "traces", "window", "warmup", "slots", "tokens"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.difficulty < 1:
            raise ArgumentError(f"difficulty: expected a mean reliability in (0, 1), got {self.difficulty}")


@dataclass(frozen=True)
class Question:
    """The traces of a question.

    Attributes:
        answers: int ``[N]``, 0 is right.
        tokens: float64 ``[N, T]``, token confidences.
        lengths: int ``[N]``.
        confidence: what they say, with groups.
    """

    answers: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    confidence: TraceConfidence


@dataclass(frozen=True)
class Policy:
    """A way to answer; ``keep`` and ``consensus`` as in :class:`~tilewise.scheduler.stopping.OnlineVote`."""

    name: str
    online: bool = False
    keep: float = 0.9
    consensus: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A policy over all seeds; intervals are 95 % (Student's t over the seeds).

    Attributes:
        policy: its name.
        accuracy: share of questions answered rightly.
        tokens: of a question.
        saved: share of the tokens that the full budget costs.
        saved_interval: of that.
        difference: accuracy less that of the policy it is compared with, on the same questions.
        difference_interval: of that.
        by_seed: ``(accuracy, tokens, saved)`` of each seed.
    """

    policy: str
    accuracy: float
    tokens: float
    saved: float
    saved_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    by_seed: tuple[tuple[float, float, float], ...]

    def json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


POLICIES = (
    Policy("majority"),
    Policy("weighted"),
    Policy("filtered 10 %", keep=0.1),
    Policy("consensus only", online=True, keep=1.0, consensus=0.95),
    Policy("online, keep 90 %", online=True, keep=0.9, consensus=0.95),
    Policy("online, keep 10 %", online=True, keep=0.1, consensus=0.95),
    Policy("online, keep 10 %, no consensus", online=True, keep=0.1, consensus=None),
)


def make_question(study: Study, seed: int, number: int) -> Question:
    """The traces of a question; the same for the same numbers.

    Example:
        >>> question = make_question(Study(traces=4), seed=0, number=3)
        >>> question.answers.shape, bool((question.lengths > 0).all())
        ((4,), True)
    """
    own = _generator(seed, number, 0)
    # Means spread around the difficulty; a question is easy or hard for all its traces.
    mean = own.beta(4 * study.difficulty, 4 * (1 - study.difficulty))
    rows, answers = [], []
    for trace in range(study.traces):
        rng = _generator(seed, number, trace + 1)
        reliability = rng.beta(2 * mean + 1e-3, 2 * (1 - mean) + 1e-3)
        right = rng.random() < reliability
        answers.append(0 if right else 1 + int(rng.choice(5, p=(0.4, 0.25, 0.15, 0.1, 0.1))))
        length = max(8, int(study.tokens * (1.5 - reliability / 2) * rng.lognormal(0.0, 0.25)))
        level = 8.0 + study.gap * reliability + study.blur * rng.normal()
        tokens = level + 3.0 * rng.normal(size=length)
        start = int(rng.integers(0, length))
        tokens[start : start + 2 * study.window] -= study.gap / 2 * (1 - reliability)
        rows.append(np.maximum(tokens, 0.0))
    lengths = np.array([row.size for row in rows])
    tokens = np.zeros((study.traces, int(lengths.max())))
    for row, values in zip(tokens, rows, strict=True):
        row[: values.size] = values
    confidence = trace_confidence(tokens, lengths=lengths, window=study.window, groups=True)
    return Question(np.array(answers), tokens, lengths, confidence)


def run_online(question: Question, study: Study, policy: Policy) -> tuple[Any, int, OnlineVote]:
    """A question through :class:`OnlineVote`, `slots` traces at once: the answer, the tokens, and the machine."""
    machine = OnlineVote(warmup=study.warmup, budget=study.traces, keep=policy.keep, consensus=policy.consensus)
    groups, window = question.confidence.groups, study.window
    running: list[tuple[int, int, int]] = []  # (when it ends, trace, when it began)
    now = spent = 0
    while not machine.done:
        while len(running) < study.slots and (trace := machine.start()) is not None:
            length = int(question.lengths[trace])
            if trace >= machine.warmup:
                full = groups[trace, : max(length - window + 1, 0)]
                weak = np.flatnonzero(~(full >= machine.threshold))
                length = int(weak[0]) + window if weak.size else length
            heapq.heappush(running, (now + length, trace, now))
        now, trace, began = heapq.heappop(running)
        tokens = now - began
        spent += tokens
        full = groups[trace, : max(tokens - window + 1, 0)]
        lowest = float(full.min()) if full.size else float(question.tokens[trace, :tokens].mean())
        if full.size and machine.judge(trace, float(full[-1])):
            cancelled = machine.stop(trace, lowest=lowest, tokens=tokens)
        else:
            cancelled = machine.finish(trace, int(question.answers[trace]), lowest=lowest, tokens=tokens)
        if cancelled:
            spent += sum(now - began for _, other, began in running if other in cancelled)
    return machine.result().answer, spent, machine


def _offline(question: Question, policy: Policy) -> Any:
    answers = [int(answer) for answer in question.answers]
    if policy.name == "majority":
        return majority(answers).answer
    if policy.name == "weighted":
        return weighted(answers, question.confidence.lowest).answer
    return filtered(answers, question.confidence.lowest, keep=policy.keep).answer


def simulate(
    seeds: Sequence[int],
    study: Study | None = None,
    policies: Sequence[Policy] = POLICIES,
    against: str = "majority",
    progress: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Every policy on the same questions, over some seeds.

    Args:
        seeds: at least two for an interval.
        study: sizes; the defaults if None.
        policies: to compare.
        against: the name of the policy that all are compared with.
        progress: called after each question.

    Returns:
        One :class:`Outcome` for each policy.

    Raises:
        ArgumentError: no seeds, or nothing of the name `against`.

    Example:
        >>> small = Study(questions=3, traces=8, warmup=4, tokens=300, window=32)
        >>> [outcome.policy for outcome in simulate([0, 1], small)][0]
        'majority'
    """
    study = study or Study()
    if not seeds:
        raise ArgumentError("seeds: expected at least one")
    names = [policy.name for policy in policies]
    if against not in names:
        raise ArgumentError(f"against: expected one of {', '.join(map(repr, names))}, got {against!r}")
    right = np.zeros((len(policies), len(seeds), study.questions))
    tokens = np.zeros_like(right)
    full = np.zeros((len(seeds), study.questions))
    for at, seed in enumerate(seeds):
        for number in range(study.questions):
            question = make_question(study, seed, number)
            full[at, number] = question.lengths.sum()
            for which, policy in enumerate(policies):
                if policy.online:
                    answer, spent, _ = run_online(question, study, policy)
                else:
                    answer, spent = _offline(question, policy), int(question.lengths.sum())
                right[which, at, number] = answer == 0
                tokens[which, at, number] = spent
            if progress is not None:
                progress()
    base = right[names.index(against)]
    outcomes = []
    for which, policy in enumerate(policies):
        accuracy, cost = right[which].mean(1), tokens[which].mean(1)
        saved = 1.0 - tokens[which].sum(1) / full.sum(1)
        difference = (right[which] - base).mean(1)
        outcomes.append(
            Outcome(
                policy.name,
                float(accuracy.mean()),
                float(cost.mean()),
                float(saved.mean()),
                _interval(saved),
                float(difference.mean()),
                _interval(difference),
                tuple((float(a), float(c), float(s)) for a, c, s in zip(accuracy, cost, saved, strict=True)),
            )
        )
    return outcomes


#: Two-sided 95 % points of Student's t by degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def _interval(values: np.ndarray) -> tuple[float, float]:
    mean = float(values.mean())
    if values.size < 2:
        return -math.inf, math.inf
    reach = _STUDENT[min(values.size - 1, len(_STUDENT)) - 1] * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean - reach, mean + reach


def _generator(seed: int, question: int, trace: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, question << 32 | trace]))
