"""Confidence of reasoning traces, one number at a time: what :mod:`tilewise.scheduler.confidence` computes.

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["bottom", "group_confidences", "lowest", "mean", "tail", "token_confidence"]


def token_confidence(logits: np.ndarray, top_k: int = 20) -> float:
    """``-(1/k) * sum of log P`` over the k most probable tokens, from logits ``[V]``."""
    z = np.asarray(logits, np.float64)
    if np.isnan(z).any() or z.max() == -np.inf:
        return math.nan
    if z.max() == np.inf:  # the limit: tokens at +inf share everything
        z = np.where(z == np.inf, 0.0, -np.inf)
    z = z - z.max()
    logarithms = np.sort(z)[::-1][:top_k] - math.log(math.fsum(np.exp(z)))
    return math.inf if np.isneginf(logarithms).any() else -math.fsum(logarithms) / top_k


def group_confidences(tokens: np.ndarray, window: int) -> np.ndarray:
    """The mean of every ``window`` neighbouring tokens; of all of them, if there are fewer."""
    tokens = np.asarray(tokens, np.float64)
    if tokens.size == 0:
        return np.empty(0)
    if tokens.size < window:
        return np.array([mean(tokens)])
    return np.array([mean(tokens[i : i + window]) for i in range(tokens.size - window + 1)])


def mean(tokens: np.ndarray) -> float:
    """The mean of all tokens; 0 of none."""
    tokens = np.asarray(tokens, np.float64)
    if tokens.size == 0:
        return 0.0
    # fsum is exact, and refuses what is not finite.
    return math.fsum(tokens) / tokens.size if np.isfinite(tokens).all() else float(tokens.sum()) / tokens.size


def tail(tokens: np.ndarray, last: int) -> float:
    """The mean of the last tokens."""
    return mean(np.asarray(tokens)[-last:])


def bottom(tokens: np.ndarray, window: int, fraction: float = 0.1) -> float:
    """The mean of the lowest ``max(1, floor(fraction * windows))`` group confidences."""
    groups = group_confidences(tokens, window)
    if np.isnan(groups).any():
        return math.nan
    return mean(np.sort(groups)[: max(1, math.floor(fraction * groups.size))])


def lowest(tokens: np.ndarray, window: int) -> float:
    """The lowest group confidence."""
    groups = group_confidences(tokens, window)
    return float(groups.min()) if groups.size else 0.0
