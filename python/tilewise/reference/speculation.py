"""Speculative sampling, one row at a time: what :mod:`tilewise.speculation` computes, said plainly.

Sources: Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding" (2023); Chen et al.,
"Accelerating large language model decoding with speculative sampling" (2023); Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (2011) for Philox.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "PURPOSES",
    "acceptance",
    "capped_geometric",
    "cut",
    "draw",
    "geometric_fan_out",
    "ngram_proposal",
    "philox4x32",
    "predict_outcomes",
    "process",
    "residual",
    "saguaro",
    "suffix_proposal",
    "token_rank",
    "uniform",
    "verify",
]

PURPOSES = {"draft": 0, "accept": 1, "residual": 2, "target": 3, "other": 4}


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Ten rounds of Philox4x32 over four 32-bit words."""
    word = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & word, (first >> 32) ^ c[3] ^ k[1], first & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c


def uniform(seed: int, request: int, position: int, purpose: str) -> float:
    """The number in [0, 1), with 53 random bits, that belongs to this use."""
    word = 0xFFFFFFFF
    counter = [position & word, position >> 32, request, PURPOSES[purpose]]
    a, b, _, _ = philox4x32(counter, [seed & word, seed >> 32])
    return ((a << 21) ^ (b >> 11)) / 2**53


def process(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """The law (float64 ``[V]``) that is sampled from a row of logits ``[V]``: temperature, then top-k, then top-p."""
    z = np.asarray(logits, np.float64)
    if np.isnan(z).any() or not (z > -np.inf).any():
        raise ValueError("a row of logits has NaN, or no token above -inf")
    top = z.max()
    if temperature == 0:
        return (np.arange(z.size) == np.argmax(z)).astype(np.float64)
    if top == np.inf:  # the limit: tokens at +inf share everything
        z, top = np.where(z == np.inf, 0.0, -np.inf), 0.0
    keep = np.ones(z.size, bool)
    if 0 < top_k < z.size:
        keep = z >= np.sort(z)[-top_k]  # ties with the k-th stay
    weights = np.where(keep, np.exp((z - top) / temperature), 0.0)
    if top_p < 1:
        order = np.lexsort((np.arange(z.size), -z))  # falling logit, then rising id
        before = np.cumsum(weights[order]) - weights[order]
        nucleus = order[before < top_p * weights.sum()]
        weights = np.where(np.isin(np.arange(z.size), nucleus), weights, 0.0)
    return weights / weights.sum()


def draw(law: np.ndarray, number: float) -> int:
    """The first token whose cumulative probability exceeds `number` (in [0, 1)), never one of probability zero."""
    possible = np.flatnonzero(law > 0)
    cumulative = np.cumsum(law[possible])
    return int(possible[min(np.searchsorted(cumulative, number * law.sum(), side="right"), possible.size - 1)])


def acceptance(p: float, q: float) -> float:
    """The probability of keeping a drafted token: ``min(1, p / q)``."""
    if p == 0:
        return 0.0
    return 1.0 if p >= q else p / q


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The law that replaces a refused token: ``max(p - q, 0)``, renormalised; p itself if nothing is left."""
    excess = np.maximum(p - q, 0.0)
    mass = excess.sum()
    return excess / mass if mass > 0 else p


def verify(
    draft_tokens: np.ndarray,
    draft_laws: np.ndarray | None,
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    request: int,
    position: int,
) -> tuple[int, int]:
    """One round of one row: tokens ``[K]``, laws ``[K, V]`` or None (point masses), logits ``[K + 1, V]``.

    Returns:
        The number of accepted tokens and the token that follows them.
    """
    vocabulary = logits.shape[-1]
    for i, token in enumerate(draft_tokens):
        p = process(logits[i], temperature, top_k, top_p)
        if draft_laws is None:
            q = (np.arange(vocabulary) == token).astype(np.float64)
        else:
            q = np.asarray(draft_laws[i], np.float64) / np.asarray(draft_laws[i], np.float64).sum()
        if not uniform(seed, request, position + i, "accept") < acceptance(float(p[token]), float(q[token])):
            return i, draw(residual(p, q), uniform(seed, request, position + i, "residual"))
    length = len(draft_tokens)
    p = process(logits[length], temperature, top_k, top_p)
    return length, draw(p, uniform(seed, request, position + length, "target"))


def _order(values: np.ndarray) -> np.ndarray:
    """Token ids by falling value, ties by rising id."""
    return np.lexsort((np.arange(values.size), -values))


def saguaro(law: np.ndarray, constant: float, fan_out: int) -> np.ndarray:
    """The law with its `fan_out` most probable tokens multiplied by `constant`, renormalised; itself if nothing is."""
    favourites = [token for token in _order(law)[:fan_out] if law[token] > 0]
    changed = law.copy()
    changed[favourites] *= constant
    mass = changed.sum()
    return changed / mass if mass > 0 else law


def cut(law: np.ndarray, support: int) -> np.ndarray:
    """The law of its `support` most probable tokens, renormalised."""
    kept = np.zeros_like(law)
    best = _order(law)[:support]
    kept[best] = law[best]
    return kept / kept.sum()


def predict_outcomes(logits: np.ndarray, count: int, exclude: int = -1) -> list[int]:
    """The `count` most probable tokens of a row, `exclude` and masked tokens left out."""
    order = [int(token) for token in _order(logits) if token != exclude and logits[token] > -np.inf]
    return order[:count]


def token_rank(logits: np.ndarray, token: int, exclude: int = -1) -> int:
    """How many tokens come before `token`, `exclude` left out; -1 for that one."""
    order = [int(other) for other in _order(logits) if other != exclude]
    return order.index(token) if token in order else -1


def capped_geometric(acceptance: float, length: int) -> np.ndarray:
    """The probabilities of 0..`length` accepted tokens."""
    return np.array([acceptance**k * (1 - acceptance) for k in range(length)] + [acceptance**length])


def geometric_fan_out(acceptance: float, exponent: float, length: int, budget: float) -> np.ndarray:
    """The closed form as published (Theorem 12 of "Speculative Speculative Decoding"), for 0 < acceptance < 1."""
    s = 1 / (1 + exponent)
    shape = [acceptance ** (k * s) for k in range(length)] + [acceptance ** (length * s) * (1 - acceptance) ** -s]
    return np.array(shape) * budget / sum(shape)


def ngram_proposal(text: Sequence[int], longest: int, shortest: int, count: int) -> tuple[list[int], int]:
    """What followed the last earlier occurrence of the last n tokens, the largest n first; and that n."""
    text = list(text)
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                grown = list(text)
                for i in range(count):  # beyond the end of the text comes what was copied
                    grown.append(grown[start + n + i])
                return grown[len(text) :], n
    return [], 0


def suffix_proposal(text: Sequence[int], longest: int, shortest: int, count: int) -> tuple[list[int], int]:
    """What most often followed the longest context that was followed by anything, token by token; and its length."""
    text, grown, matched = list(text), list(text), 0
    for step in range(count):
        for n in range(min(longest, len(grown)), shortest - 1, -1):
            context = grown[-n:]
            after = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == context]
            if after:
                grown.append(min(set(after), key=lambda token: (-after.count(token), token)))
                matched = n if step == 0 else matched
                break
        else:
            break
    return grown[len(text) :], matched
