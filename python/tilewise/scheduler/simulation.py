"""Speculation in virtual time: the engine's state machine among simulated targets, draft devices and links.

:func:`simulate` runs one mode; nothing sleeps, and the same arguments give the same run. Three kinds of models:

* coins: each drafted token is accepted with a probability by place, a guess hits with a probability (`hit`);
* ranks: the true token's rank among the guesses follows a curve (`rank_curve`), another after fast chains;
* :class:`Toy`: random tables of p and q over few tokens, drafted and verified for real.

Times are in any one unit, say one verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tilewise import _core
from tilewise.errors import ArgumentError

__all__ = ["MODES", "Logged", "Simulation", "Times", "Toy", "simulate"]

Mode = Literal["plain", "speculative", "neural", "fast", "adaptive", "pearl"]
#: What can be simulated: plain decoding; drafts that the target waits for; drafts made ahead with each fallback; and
#: with guesses for whole chains only.
MODES: tuple[Mode, ...] = ("plain", "speculative", "neural", "fast", "adaptive", "pearl")


@dataclass(frozen=True)
class Times:
    """How long things take.

    Attributes:
        target: ``(t0, t1, t2)``: a verification of n tokens of b rows takes t0 + t1 n + t2 b. n counts a chain's tokens
            and the one before it.
        draft: ``(d0, d1)``: a step of the draft over m branches takes d0 + d1 m.
        glue: the forward over a chain before its outcomes are guessed.
        link: ``(latency, seconds a drafted token)`` of a message.
    """

    target: tuple[float, float, float] = (1.0, 0.0, 0.0)
    draft: tuple[float, float] = (0.1, 0.0)
    glue: float = 0.0
    link: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Toy:
    """Random models of few tokens whose logits depend on the last token.

    Attributes:
        seed: of the tables.
        vocabulary: number of tokens, at least 2.
        sharpness: of the target: its logits are normal numbers times this.
        error: the draft's logits are the target's plus normal numbers times this.
        temperature: of both; 0 is greedy.
        saguaro: weight C in [0, 1] of the `guesses` tokens that the draft likes best (1: as they are). A lower
            one makes guesses hit more often, as it moves what is left after a refusal onto them.
        guesses: see `saguaro`.
    """

    seed: int = 0
    vocabulary: int = 32
    sharpness: float = 2.0
    error: float = 1.0
    temperature: float = 1.0
    saguaro: float = 1.0
    guesses: int = 3


@dataclass(frozen=True)
class Logged:
    """One verification: of which target, when that was free, when it began and ended, and its rows
    ``(stream, round, source, drafted, accepted, emitted, ready)``; `ready`: when the chain was there."""

    target: int
    free: float
    began: float
    ended: float
    rows: list[tuple[int, int, str, int, int, int, float]]


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        mode: as asked.
        speed: tokens of all targets per unit of time, from the first verification on.
        tokens, elapsed: of which it is the ratio.
        tokens_per_round: E, of all verified rows.
        hit_rate: hits among lookups; None without lookups.
        hit_rate_after_hit, hit_rate_after_miss: by what the lookup before was.
        all_hit: of the batches that looked all their rows up, the share in which all hit; None without.
        histogram: ``[k]``: rounds with k accepted tokens.
        wait: the target's idle time by cause.
        draft_busy: busy time of all draft devices.
        discarded: drafted tokens that were never verified.
        plans: chain length and budget at the end, by target.
        acceptance: of a toy model's tokens: the sum of min(p, q), averaged over last tokens.
        log: every verification, if asked for.
        counts: all other counters.
    """

    mode: Mode
    speed: float
    tokens: int
    elapsed: float
    tokens_per_round: float
    hit_rate: float | None
    hit_rate_after_hit: float | None
    hit_rate_after_miss: float | None
    all_hit: float | None
    histogram: list[int]
    wait: dict[str, float]
    draft_busy: float
    discarded: int
    plans: list[tuple[int, int]]
    acceptance: float | None
    log: list[Logged] = field(repr=False)
    counts: dict[str, Any] = field(repr=False)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _per_place(name: str, value: float | Sequence[float]) -> list[float]:
    places = [float(value)] if isinstance(value, (int, float)) else [float(rate) for rate in value]
    if not places or not all(0 <= rate <= 1 for rate in places):
        raise ArgumentError(f"{name}: expected probabilities in [0, 1], one or one a place, got {value!r}")
    return places


def simulate(
    mode: Mode,
    *,
    times: Times | None = None,
    draft_length: int = 7,
    budget: int = 24,
    depth: int | None = None,
    acceptance: float | Sequence[float] = 0.8,
    fast_acceptance: float | Sequence[float] = 0.0,
    hit: float | None = None,
    hit_after_fast: float | None = None,
    rank_curve: float | Sequence[float] | None = None,
    rank_curve_after_fast: float | Sequence[float] | None = None,
    toy: Toy | None = None,
    batch: int = 1,
    targets: int = 1,
    drafts: int = 1,
    tokens: int = 20_000,
    adaptive: bool = False,
    together: bool = False,
    seed: int = 0,
    log: bool = False,
) -> Simulation:
    """Runs one mode in virtual time.

    Args:
        mode: one of :data:`MODES`.
        times: how long things take.
        draft_length: most tokens of a chain (K).
        budget: most branches of one stream's build.
        depth: most tokens that are drafted ahead; None: `draft_length`.
        acceptance: of the model's drafts, one number or one a place.
        fast_acceptance: of fast chains.
        hit: coins: P(hit). Guesses then hit wherever at least one is made.
        hit_after_fast: the same after a fast chain; None: `hit`.
        rank_curve: ranks: an exponent r (F guesses miss with F^(-r)), or hit rates of 1, 2, ... guesses. Without this,
            `hit` and `toy`: r = 1.5.
        rank_curve_after_fast: the same after a fast chain; None: `rank_curve`.
        toy: toy models instead of coins or ranks.
        batch: streams of a target.
        targets, drafts: devices. Every target has its own streams; targets take turns over the draft devices.
        tokens: how many to emit before the end.
        adaptive: let the machine choose chain length and budget from what it measures.
        together: always verify all rows of a batch together; otherwise hits may go ahead of misses.
        seed: of all random numbers.
        log: keep a record of every verification.

    Raises:
        ArgumentError: numbers out of their ranges, or two kinds of models at once.

    Example:
        >>> from tilewise.scheduler import Times, simulate
        >>> ahead = simulate("neural", times=Times(draft=(0.1, 0.0)), acceptance=0.8, hit=1.0, tokens=2000)
        >>> ahead.hit_rate > 0.99, 4.0 < ahead.speed < 4.4
        (True, True)
    """
    if mode not in MODES:
        raise ArgumentError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if sum(kind is not None for kind in (hit, rank_curve, toy)) > 1:
        raise ArgumentError("hit, rank_curve, toy: expected one of them, got several; each is a kind of models")
    numbers = {"draft_length": (draft_length, 0), "budget": (budget, 0), "batch": (batch, 1), "targets": (targets, 1)}
    numbers |= {"drafts": (drafts, 0), "tokens": (tokens, 1), "seed": (seed, 0)}
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ArgumentError(f"{name}: expected an integer in [{least}, 2^31), got {value!r}")
    chains = [_per_place("acceptance", acceptance), _per_place("fast_acceptance", fast_acceptance)]
    process: tuple[Any, ...]
    vocabulary = 1 << 20
    if toy is not None:
        if toy.vocabulary < 2 or toy.temperature < 0 or not 0 <= toy.saguaro <= 1:
            raise ArgumentError(f"toy: expected vocabulary >= 2, temperature >= 0 and saguaro in [0, 1], got {toy}")
        numbers = (toy.seed, toy.vocabulary, toy.sharpness, toy.error, toy.temperature, toy.saguaro, toy.guesses)
        process, vocabulary = ("toy", *numbers), toy.vocabulary
    elif hit is not None:
        after = hit if hit_after_fast is None else hit_after_fast
        process = ("coins", chains, _per_place("hit", hit) + _per_place("hit_after_fast", after))
    else:
        curve = 1.5 if rank_curve is None else rank_curve
        curves = [curve, curve if rank_curve_after_fast is None else rank_curve_after_fast]
        for name, value in zip(("rank_curve", "rank_curve_after_fast"), curves, strict=True):
            if isinstance(value, (int, float)):
                if not value > 0:
                    raise ArgumentError(f"{name}: expected an exponent > 0, got {value!r}")
            else:
                _per_place(name, value)
        process = ("ranks", chains, [c if isinstance(c, (int, float)) else list(c) for c in curves])
    times = times or Times()
    plain, serial = mode == "plain", mode == "speculative"
    found = _core.scheduler_simulate(
        draft_length=0 if plain else draft_length,
        budget=0 if plain or serial else budget,
        depth=draft_length if depth is None else depth,
        fallback="neural" if mode in ("plain", "speculative", "pearl") else mode,
        max_batch=batch,
        adaptive=adaptive,
        vocabulary=vocabulary,
        seed=seed,
        targets=targets,
        drafts=0 if plain else drafts,
        streams=batch,
        tokens=tokens,
        target=times.target,
        draft=times.draft,
        glue=times.glue,
        link=times.link,
        process=process,
        whole_only=mode == "pearl",
        together=together,
        log=log,
    )
    lookups, hits = found.pop("lookups"), found.pop("hits")
    batches, all_hit = found["all_hit"][1], found["all_hit"][0]
    emitted = sum((k + 1) * count for k, count in enumerate(found["histogram"]))
    return Simulation(
        mode=mode,
        speed=found["tokens"] / found["elapsed"],
        tokens=found.pop("tokens"),
        elapsed=found.pop("elapsed"),
        tokens_per_round=emitted / max(found["rounds"], 1),
        hit_rate=_ratio(sum(hits), sum(lookups)),
        hit_rate_after_hit=_ratio(hits[0], lookups[0]),
        hit_rate_after_miss=_ratio(hits[1], lookups[1]),
        all_hit=_ratio(all_hit, batches),
        histogram=found.pop("histogram"),
        wait=found.pop("wait"),
        draft_busy=found.pop("draft_busy"),
        discarded=found.pop("discarded"),
        plans=found.pop("plans"),
        acceptance=found.pop("toy_acceptance"),
        log=[Logged(*record) for record in found.pop("log")],
        counts=found,
    )
