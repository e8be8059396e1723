"""Plain and speculative generation side by side: how much faster, and whether the tokens are the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewise.errors import ArgumentError
from tilewise.hf.generate import SpeculativeDecoder, Stats
from tilewise.hf.models import Pair

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        plain_tokens, speculative_tokens: what the two generated.
        plain, speculative: their statistics, of the run with the median speed.
        greedy: whether both were greedy. Only then must the tokens agree: sampled ones follow the same law, drawn
            with other random numbers.
    """

    plain_tokens: list[int]
    speculative_tokens: list[int]
    plain: Stats
    speculative: Stats
    greedy: bool

    @property
    def speedup(self) -> float:
        """Tokens per second, speculative over plain."""
        return self.speculative.tokens_per_second / self.plain.tokens_per_second

    @property
    def identical(self) -> bool | None:
        """Whether the tokens agree; ``None`` when sampling, where they need not."""
        return self.plain_tokens == self.speculative_tokens if self.greedy else None

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token that differs; ``None`` if there is none or sampling was on."""
        if self.identical is not False:
            return None
        pairs = zip(self.plain_tokens, self.speculative_tokens, strict=False)
        shorter = min(len(self.plain_tokens), len(self.speculative_tokens))
        return next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)


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
    repeat: int = 1,
    watch: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Generate plainly and with the draft, in turns, after a short warm-up of both.

    Args:
        pair: models, with a draft.
        prompt: token ids.
        max_new_tokens, draft_length, temperature, top_p, top_k, seed, confidence, threads: see
            :class:`SpeculativeDecoder`.
        repeat: how often to run both; speeds are of the median run.
        watch: called with ``"plain"`` or ``"speculative"`` and each token of the first run, as it comes.

    Raises:
        ArgumentError: the pair has no draft, or a setting is outside its range.

    Example:
        >>> from tilewise.hf.models import load_pair
        >>> pair = load_pair()
        >>> compare(pair, pair.tokenizer.encode("import "), 64).identical
        True
    """
    if pair.draft is None:
        raise ArgumentError("nothing to compare: the target has no draft; name one that speaks its tokens")
    if repeat < 1:
        raise ArgumentError(f"repeat must be at least 1, got {repeat}")
    rules = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "threads": threads}
    decoders = {
        "plain": SpeculativeDecoder(pair.target, **rules),
        "speculative": SpeculativeDecoder(
            pair.target, pair.draft, draft_length=draft_length, confidence=confidence, **rules
        ),
    }
    for decoder in decoders.values():  # buffers, plans and thread pools are made at first use
        for _ in decoder.generate(prompt, min(8, max_new_tokens)):
            pass
    tokens: dict[str, list[int]] = {}
    runs: dict[str, list[Stats]] = {name: [] for name in decoders}
    for turn in range(repeat):
        for name, decoder in decoders.items():
            made = []
            for token in decoder.generate(prompt, max_new_tokens, stop_tokens=pair.stop_tokens):
                made.append(token)
                if watch is not None and turn == 0:
                    watch(name, token)
            tokens[name] = made
            runs[name].append(decoder.stats)
    return Comparison(
        tokens["plain"], tokens["speculative"], _median(runs["plain"]), _median(runs["speculative"]), temperature == 0.0
    )


def _median(runs: list[Stats]) -> Stats:
    middle = statistics.median_low([run.tokens_per_second for run in runs])
    return next(run for run in runs if run.tokens_per_second == middle)
