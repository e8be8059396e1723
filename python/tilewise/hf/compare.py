"""Ways to generate side by side: how much faster than plain decoding, and whether the tokens are the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from tilewise.errors import ArgumentError, InternalError
from tilewise.hf.engine import EngineStats, SpeculativeGenerator
from tilewise.hf.generate import SpeculativeDecoder, Stats
from tilewise.hf.models import Pair

__all__ = ["Comparison", "Run", "compare"]


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens: what it made.
        stats: its statistics: ``EngineStats`` of the engine, whose counters of the scheduler (``machine``) are those of
            all runs of the engine so far, warm-up included; ``Stats`` of the others.
    """

    tokens: list[int]
    stats: Stats | EngineStats


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        runs: of every way, by its name: ``"plain"``, ``"speculative"`` and, if it was asked for, ``"ssd"``.
        greedy: whether all were greedy. Only then must the tokens agree: sampled ones follow the same law, drawn
            with other random numbers.
    """

    runs: Mapping[str, Sequence[Run]]
    greedy: bool

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways, in the order in which they ran."""
        return tuple(self.runs)

    def median(self, mode: str) -> Run:
        """The run of this way that had the median speed.

        Raises:
            ArgumentError: a way that was not compared.
        """
        if mode not in self.runs:
            raise ArgumentError(f"mode: expected one of {', '.join(map(repr, self.modes))}, got {mode!r}")
        runs = self.runs[mode]
        middle = statistics.median_low([run.stats.tokens_per_second for run in runs])
        return next(run for run in runs if run.stats.tokens_per_second == middle)

    def speedup(self, mode: str) -> float:
        """Tokens per second, over plain decoding's."""
        return self.median(mode).stats.tokens_per_second / self.median("plain").stats.tokens_per_second

    def identical(self, mode: str) -> bool | None:
        """Whether every run made the tokens of plain decoding; ``None`` when sampling, where they need not."""
        want = self.median("plain").tokens
        self.median(mode)
        return all(run.tokens == want for run in self.runs[mode]) if self.greedy else None

    def first_difference(self, mode: str) -> int | None:
        """Index of the first new token that differs in any run; ``None`` if there is none or sampling was on."""
        if self.identical(mode) is not False:
            return None
        want = self.median("plain").tokens
        return min(_first_difference(want, run.tokens) for run in self.runs[mode] if run.tokens != want)

    @property
    def different(self) -> tuple[str, ...]:
        """The ways that had to make the tokens of plain decoding and did not."""
        return tuple(mode for mode in self.modes if self.identical(mode) is False)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def compare(
    pair: Pair,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    draft_length: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    confidence: float = 0.0,
    threads: int | None = None,
    ssd: Mapping[str, Any] | None = None,
    repeat: int = 1,
    watch: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Generate plainly, with the draft, and with drafts made ahead, in turns, after a short warm-up of each.

    Args:
        pair: models, with a draft.
        prompt: token ids.
        max_new_tokens: at least 1.
        draft_length, confidence: of speculative decoding, see :class:`SpeculativeDecoder`.
        temperature, top_p, top_k, seed, threads: of all ways, see :class:`SpeculativeDecoder`.
        ssd: further arguments of :class:`tilewise.hf.engine.SpeculativeGenerator`, which then runs too; None leaves it
            out. There is one engine for all runs, and its draft serves before anything is timed.
        repeat: how often to run each; speeds are of the median run.
        watch: called with the way's name and each token of its first run, as it comes. No way's time counts what
            `watch` takes, but the engine's draft works on meanwhile.

    Raises:
        ArgumentError: the pair has no draft, no tokens are wanted, or a setting is outside its range.
        InternalError: the draft's process did not start.

    Example:
        >>> from tilewise.hf.models import load_pair
        >>> pair = load_pair()
        >>> compare(pair, pair.tokenizer.encode("import "), 64).identical("speculative")
        True
    """
    if pair.draft is None:
        raise ArgumentError("nothing to compare: the target has no draft; name one that speaks its tokens")
    if repeat < 1:
        raise ArgumentError(f"repeat must be at least 1, got {repeat}")
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens must be at least 1, got {max_new_tokens}: no tokens have no speed")
    rules: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "threads": threads
    }  # fmt: skip
    plain = SpeculativeDecoder(pair.target, **rules)
    drafted = SpeculativeDecoder(pair.target, pair.draft, draft_length=draft_length, confidence=confidence, **rules)
    ways: dict[str, Callable[..., Run]] = {"plain": partial(_decode, plain), "speculative": partial(_decode, drafted)}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    with ExitStack() as stack:
        if ssd is not None:
            generator = SpeculativeGenerator(pair.target, pair.draft, tokenizer=pair.tokenizer, **rules, **ssd)
            stack.enter_context(generator)
            if not generator.wait_until_ready():
                raise InternalError(
                    "the draft's process did not start, so there is nothing to time; what it said is on standard "
                    "error. Speculative decoding without ssd needs no second process"
                )
            ways["ssd"], runs["ssd"] = partial(_ahead, generator), []
        for run in ways.values():  # buffers, plans and thread pools are made at first use
            run(prompt, min(8, max_new_tokens), (), None)
        for turn in range(repeat):
            for name, run in ways.items():
                seen = None if watch is None or turn else partial(watch, name)
                runs[name].append(run(prompt, max_new_tokens, pair.stop_tokens, seen))
    return Comparison(runs, temperature == 0.0)


Watch = Callable[[int], None] | None


def _decode(
    decoder: SpeculativeDecoder, prompt: Sequence[int], count: int, stops: Collection[int], watch: Watch
) -> Run:
    made = []
    for token in decoder.generate(prompt, count, stop_tokens=stops):
        made.append(token)
        if watch is not None:
            watch(token)
    return Run(made, decoder.stats)


def _ahead(
    generator: SpeculativeGenerator, prompt: Sequence[int], count: int, stops: Collection[int], watch: Watch
) -> Run:
    made = []
    stats = generator.stats = EngineStats()  # of this run alone
    for _, tokens in generator.stream([prompt], count, stop_tokens=stops):
        made += tokens
        if watch is not None:
            for token in tokens:
                watch(token)
    return Run(made, stats)
