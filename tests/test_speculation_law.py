"""Speculation is lossless: by enumeration of every outcome, and by counting what real rounds emit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tilewise import speculation


def random_logits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows with and without ties, some tokens masked, none wholly."""
    logits = np.where(rng.random(shape) < 0.5, rng.normal(size=shape) * 2, rng.integers(-2, 3, shape))
    masked = rng.random(shape) < 0.15
    masked[..., 0] = False
    return np.where(masked, -np.inf, logits)


def random_rules(rng: np.random.Generator, rows: int, vocabulary: int) -> dict[str, np.ndarray]:
    return {
        "temperature": rng.choice([0.0, 0.3, 0.8, 1.0, 2.0], rows),
        "top_k": rng.integers(0, vocabulary + 2, rows),
        "top_p": rng.choice([1.0, 0.95, 0.6, 0.2], rows),
    }


def rule(rules: dict[str, np.ndarray], row: int) -> dict[str, Any]:
    return {name: values[row].item() for name, values in rules.items()}


# Exactness by enumeration


def tokens_of(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(vocabulary), repeat=length))


def enumerated_distance(
    vocabulary: int, depth: int, p: Callable[[tuple[int, ...]], np.ndarray], laws: dict, logits: dict, rules: dict
) -> float:
    """Total variation between speculative and plain sampling of depth + 1 tokens; `laws` None: point masses `laws`."""
    points = laws["points"]
    drafts = []
    for chain in tokens_of(vocabulary, depth):
        mass = 1.0
        for i in range(depth):
            law = laws[chain[:i]]
            mass *= law[chain[i]] / law.sum()
        if mass > 0:
            drafts.append((chain, mass))
    chains = [chain for chain, _ in drafts]
    law = speculation.verification_law(
        np.array(chains),
        None if points else np.array([[laws[chain[:i]] for i in range(depth)] for chain in chains]),
        np.array([[logits[chain[:i]] for i in range(depth + 1)] for chain in chains]),
        **rules,
    )
    plain = {
        text: math.prod(p(text[:i])[text[i]] for i in range(depth + 1)) for text in tokens_of(vocabulary, depth + 1)
    }
    found = dict.fromkeys(plain, 0.0)
    for row, (chain, mass) in enumerate(drafts):
        for i in range(depth + 1):
            accept = law.acceptance[row, i] if i < depth else 0.0
            for token in range(vocabulary):
                prefix = (*chain[:i], token)
                for rest in tokens_of(vocabulary, depth - i):
                    text = prefix + rest
                    later = math.prod(p(text[:j])[text[j]] for j in range(i + 1, depth + 1))
                    found[text] += mass * (1 - accept) * law.corrections[row, i, token] * later
            mass *= accept
    return sum(abs(found[text] - plain[text]) for text in plain) / 2


@pytest.mark.parametrize("kind", ["sampled", "single", "same", "points"])
def test_the_emitted_law_is_plain_samplings(kind: str) -> None:
    rng = np.random.default_rng(16)
    worst = 0.0
    for case in range(40):
        vocabulary, depth = [(2, 1), (2, 3), (3, 2), (4, 1), (4, 2)][case % 5]
        prefixes = [prefix for length in range(depth + 1) for prefix in tokens_of(vocabulary, length)]
        logits = dict(zip(prefixes, random_logits(rng, (len(prefixes), vocabulary))))
        drafts = dict(zip(prefixes, random_logits(rng, (len(prefixes), vocabulary))))
        rules = rule(random_rules(rng, 1, vocabulary), 0)
        target = {prefix: speculation.process(row, **rules) for prefix, row in logits.items()}
        if kind == "same":
            laws: dict[Any, Any] = dict(target)
        elif kind == "points":
            laws = {prefix: speculation.process(row, 0.0) for prefix, row in drafts.items()}
        else:
            own = rule(random_rules(rng, 1, vocabulary), 0)
            laws = {prefix: speculation.process(row, **own) for prefix, row in drafts.items()}
        if kind == "single":
            laws = {prefix: law.astype(np.float32).astype(np.float64) for prefix, law in laws.items()}
        laws["points"] = kind == "points"
        worst = max(worst, enumerated_distance(vocabulary, depth, target.__getitem__, laws, logits, rules))
    print(f"total variation at most {worst:.1e}")
    assert worst < 1e-12


# Exactness by counting


class Markov:
    """A small model-like law: the next token depends on the last one; and a draft that is a noisy copy of it."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.vocabulary = vocabulary
        self.target = (rng.normal(size=(vocabulary, vocabulary)) * 1.5).astype(np.float32)
        self.draft = (self.target + rng.normal(size=self.target.shape)).astype(np.float32)

    def law(self, length: int, settings: dict[str, float]) -> np.ndarray:
        """Of `length` tokens after token 0."""
        step = speculation.process(self.target, **settings)
        texts = np.array(tokens_of(self.vocabulary, length))
        before = np.concatenate([np.zeros((len(texts), 1), int), texts[:, :-1]], 1)
        return step[before, texts].prod(1)

    def generate(
        self,
        rows: int,
        length: int,
        depth: int,
        settings: dict[str, float],
        *,
        seed: int,
        draft_rules: dict[str, Any],
        points: bool = False,
        spoil: Callable[[np.ndarray], np.ndarray] = lambda laws: laws,
    ) -> np.ndarray:
        """`rows` sequences of `length` tokens, by rounds of at most `depth` drafts."""
        text = np.zeros((rows, 1 + length + depth + 1), np.int64)
        count = np.ones(rows, np.int64)
        requests = np.arange(rows)
        every = np.arange(rows)
        while (live := every[count <= length]).size:
            # Rows draft different numbers of tokens: fewer near the end, and by request.
            lengths = np.minimum(np.minimum(1 + live % depth, depth), length + 1 - count[live])
            last, chain, laws = text[live, count[live] - 1], [], []
            for i in range(depth):
                drafted = speculation.draft_token(
                    self.draft[last],
                    **draft_rules,
                    seed=seed,
                    requests=requests[live],
                    positions=count[live] + i,
                )
                last = drafted.tokens
                chain.append(drafted.tokens)
                laws.append(drafted.laws)
            tokens = np.stack(chain, 1)
            before = np.concatenate([text[live, count[live] - 1][:, None], tokens], 1)
            result = speculation.verify(
                tokens,
                None if points else spoil(np.stack(laws, 1)),
                self.target[before],
                **settings,
                draft_lengths=lengths,
                seed=seed,
                requests=requests[live],
                positions=count[live],
            )
            for i in range(depth):
                kept = result.accepted > i
                text[live[kept], count[live[kept]] + i] = tokens[kept, i]
            text[live, count[live] + result.accepted] = result.tokens
            count[live] += result.accepted + 1
        return text[:, 1 : 1 + length]

    def p_value(self, texts: np.ndarray, settings: dict[str, float]) -> float:
        """Chi-square of the texts' counts (cells with fewer than five expected are put together)."""
        expected = self.law(texts.shape[1], settings) * len(texts)
        index = texts @ self.vocabulary ** np.arange(texts.shape[1])[::-1]
        counts = np.bincount(index, minlength=expected.size)
        assert (counts[expected == 0] == 0).all()
        small = expected < 5
        expected = np.append(expected[~small], expected[small].sum())
        counts = np.append(counts[~small], counts[small].sum())
        expected, counts = expected[expected > 0], counts[expected > 0]
        statistic, freedom = ((counts - expected) ** 2 / expected).sum(), expected.size - 1
        # Wilson and Hilferty's cube root: good to three digits at these degrees of freedom.
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        return math.erfc(z / math.sqrt(2)) / 2


SETTINGS = {"temperature": 0.8, "top_p": 0.95}


@pytest.mark.parametrize(
    ("draft", "points"),
    [
        ({"temperature": 0.8, "top_p": 0.95}, False),
        ({"temperature": 1.3, "laws_dtype": "float32"}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0}, True),
    ],
    ids=["sampled", "single", "greedy-laws", "points"],
)
def test_the_counts_are_plain_samplings(draft: dict[str, Any], points: bool) -> None:
    model = Markov(6, 17)
    texts = model.generate(20_000, 4, 3, SETTINGS, seed=18, draft_rules=draft, points=points)
    p_value = model.p_value(texts, SETTINGS)
    print(f"chi-square p = {p_value:.3f}")
    assert p_value > 1e-3


def test_the_count_would_see_a_wrong_record() -> None:
    """The same run with laws that are not quite what was drawn from is refused: the test above can fail."""
    model = Markov(6, 17)
    own = {"temperature": 1.0}
    spoil = lambda laws: (flat := laws**0.7) / flat.sum(-1, keepdims=True)  # noqa: E731
    texts = model.generate(20_000, 4, 3, SETTINGS, seed=18, draft_rules=own, spoil=spoil)
    assert model.p_value(texts, SETTINGS) < 1e-6


def test_greedy_speculation_is_greedy_decoding() -> None:
    model = Markov(9, 19)
    settings = {"temperature": 0.0}
    texts = model.generate(30, 12, 4, settings, seed=0, draft_rules={"temperature": 1.0})
    token, plain = 0, []
    for _ in range(12):
        token = int(model.target[token].argmax())
        plain.append(token)
    np.testing.assert_array_equal(texts, np.tile(plain, (30, 1)))
