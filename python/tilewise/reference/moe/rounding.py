"""The meaning of :mod:`tilewise.moe.rounding`: rank all tokens for each expert, keep the first of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["RULES", "round_tokens"]

RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")


def round_tokens(
    scores: ArrayLike,
    expert_ids: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    tile: int,
    rule: str = "nearest",
    renormalise: bool = False,
    coins: Sequence[float] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Round every expert's number of tokens to a multiple of ``tile``.

    Args:
        scores: ``[T, E]``.
        expert_ids: ``[T, K]``, the chosen experts; ids outside ``[0, E)`` are left out.
        weights: ``[T, K]``; by default the scores of the chosen experts.
        tile: rows of a tile.
        rule: one of :data:`RULES`.
        renormalise: divide a token's weights by their sum over its kept pairs.
        coins: ``[E]`` numbers in ``[0, 1)``, for ``stochastic`` and ``nearest_score``.

    Returns:
        ``(expert_ids, weights, token_ids)``, each ``[pairs]``, by token, then expert.

    Raises:
        ShapeError: extents do not fit.
        ArgumentError: an unknown rule, or a rule that draws without coins.

    Example:
        >>> ids, weights, tokens = round_tokens([[0.9, 0.1], [0.6, 0.4]], [[0], [0]], tile=2, rule="up")
        >>> ids.tolist(), tokens.tolist()
        ([0, 0], [0, 1])
    """
    s, ids = np.asarray(scores, dtype=np.float64), np.asarray(expert_ids)
    if s.ndim != 2 or ids.ndim != 2 or len(s) != len(ids):
        raise ShapeError(f"expected scores [T, E] and expert_ids [T, K], got {s.shape} and {ids.shape}")
    if rule not in RULES:
        raise ArgumentError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if coins is None and rule in ("stochastic", "nearest_score"):
        raise ArgumentError(f"rule {rule!r} needs coins")
    tokens, experts = s.shape
    w = None if weights is None else np.asarray(weights, dtype=np.float64)

    worth: list[dict[int, float]] = [{} for _ in range(experts)]  # of each expert, the tokens that chose it
    for token in range(tokens):
        for slot, expert in enumerate(ids[token]):
            if 0 <= expert < experts:
                worth[expert][token] = float(s[token, expert] if w is None else w[token, slot])

    kept: list[tuple[int, int, float]] = []
    drift = 0
    for expert in range(experts):
        chosen = worth[expert]

        def value(token: int, chosen: dict[int, float] = chosen, expert: int = expert) -> float:
            return chosen[token] if token in chosen else float(s[token, expert])

        order = sorted(range(tokens), key=lambda t, chosen=chosen, value=value: (t not in chosen, -value(t), t))
        count = len(chosen)
        down = count // tile * tile
        up = min(count if down == count else down + tile, tokens)
        rest = count - down
        if rest == 0:
            rise = False
        elif rule == "nearest":
            rise = tile - rest < rest
        elif rule == "stochastic":
            assert coins is not None
            rise = coins[expert] * tile < rest
        elif rule == "nearest_score":
            assert coins is not None
            own = sum(value(token) for token in order[down:count])
            other = sum(value(token) for token in order[count:up])
            rise = own + other != 0 and coins[expert] < own / (own + other)
        elif rule == "balance":
            rise = abs(drift + up - count) < abs(drift + down - count)
            drift += (up if rise else down) - count
        else:
            rise = rule == "up"
        kept += [(token, expert, value(token)) for token in order[: up if rise else down]]

    kept.sort()
    picks = np.array([pair[2] for pair in kept], dtype=np.float64)
    token_ids = np.array([pair[0] for pair in kept], dtype=np.int64)
    if renormalise:
        total = np.zeros(tokens)
        np.add.at(total, token_ids, picks)
        total[total == 0] = np.inf  # nothing to share out: weights of 0
        picks = picks / total[token_ids]
    return np.array([pair[1] for pair in kept], dtype=np.int64), picks, token_ids
