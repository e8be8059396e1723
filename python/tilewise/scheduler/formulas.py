"""What speculation gives on average, in closed form. Times are in units of one verification.

Symbols: a, acceptance of a drafted token; K, tokens of a chain; E, tokens of a round; p, probability of a hit; T, time
of drafting; b, rows of a batch. Sources: Leviathan et al., "Fast inference from transformers via speculative decoding"
(2023) for SD; Kumar, Dao, May, "Speculative speculative decoding" (2026) for Theorem 7 and Corollaries 8, 9 and 16.
All functions take numbers or arrays and broadcast.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "batch_speed",
    "break_even",
    "critical_batch",
    "expected_tokens",
    "outcome_law",
    "speculative_bounds",
    "speculative_speed",
    "speed",
    "stationary_hit_rate",
]


def outcome_law(acceptance: Any, length: int) -> np.ndarray:
    """The probabilities of 0..K accepted tokens ``[K + 1]``.

    Args:
        acceptance: one number for all places, or ``[>= K]``, that of each place given that all before were accepted.
        length: K.

    Example:
        >>> outcome_law(0.5, 2)
        array([0.5 , 0.25, 0.25])
    """
    rates = np.broadcast_to(
        np.asarray(acceptance, np.float64)[..., :length] if np.ndim(acceptance) else acceptance, (length,)
    )
    reached = np.concatenate([[1.0], np.cumprod(rates)])
    return reached * np.concatenate([1.0 - rates, [1.0]])


def expected_tokens(acceptance: Any, length: int) -> float:
    """Tokens of a round: the accepted ones and the one that follows; (1 - a^(K+1)) / (1 - a) for one a.

    Example:
        >>> expected_tokens(0.5, 2)
        1.75
    """
    law = outcome_law(acceptance, length)
    return float(np.dot(law, np.arange(1, length + 2)))


def speculative_speed(tokens: Any, draft: Any) -> Any:
    """SD over plain decoding: E / (1 + T), the draft first, then the verification.

    Example:
        >>> round(speculative_speed(5.0, 0.69), 2)
        2.96
    """
    return tokens / (1.0 + draft)


def speed(hit: Any, on_hit: Any, on_miss: Any, build: Any, backup: Any) -> Any:
    """Theorem 7: SSD over plain decoding.

    Args:
        hit: p.
        on_hit, on_miss: E after a hit and after a miss.
        build: T_p, the time of the whole cache; up to 1 it costs nothing.
        backup: T_b, the time of the fallback.

    Example:
        >>> float(round(speed(0.9, 5.0, 5.0, 1.0, 0.69), 2))
        4.68
    """
    tokens = hit * on_hit + (1 - hit) * on_miss
    return tokens / (hit * np.maximum(1.0, build) + (1 - hit) * (1.0 + backup))


def batch_speed(rows: Any, hit: Any, on_hit: Any, on_miss: Any, build: Any, backup: Any) -> Any:
    """Corollary 16: tokens of a row per verification, where all rows wait for the slowest: only all hits save time.

    Example:
        >>> float(round(batch_speed(8, 0.9, 5.0, 5.0, 1.0, 0.69), 2))
        3.59
    """
    tokens = hit * on_hit + (1 - hit) * on_miss
    all_hit = np.power(hit, rows)
    return tokens / (all_hit * np.maximum(1.0, build) + (1 - all_hit) * (1.0 + backup))


def critical_batch(hit: float, on_hit: float, neural: float, fast: float, backup: float) -> float:
    """Theorem 17's b*: up to so many rows the draft model is the better fallback (T_p <= 1, a fast one takes no time).

    With R the ratio of tokens a round with the one and the other: ln(1 - (R - 1) / T) / ln p, infinite if R - 1 >= T.

    Example:
        >>> round(critical_batch(0.85, 5.0, 5.0, 1.0, 0.69), 2)
        1.35
    """
    from tilewise import _core

    return _core.scheduler_critical_batch(hit, on_hit, neural, fast, backup)


def speculative_bounds(hit: Any, draft: Any, ratio: Any = 1.0) -> tuple[Any, Any]:
    """Corollary 9: between what SSD's speed over SD's lies, with T_SD and `ratio` = E_hit / E_SD; Corollary 8: it is
    never below 1 at ratio 1.

    Example:
        >>> low, high = speculative_bounds(0.9, 0.69)
        >>> round(low, 2), round(high, 2)
        (1.58, 1.69)
    """
    return (1 + draft) / (1 + draft * (1 - hit)) * ratio, (1 + draft) * ratio


def stationary_hit_rate(after_hit: Any, after_miss: Any) -> Any:
    """Hits in the long run if the chance depends on how the round before came by its chain: p_b / (1 - p_p + p_b).

    Example:
        >>> stationary_hit_rate(0.8, 0.4)
        0.6666666666666667
    """
    return after_miss / (1 - after_hit + after_miss)


def break_even(verify: Any, build: Any, draft: Any, communication: Any = 0.0) -> Any:
    """The least E_hit / E_SD at which SSD with p = 1 is not slower than SD; four times in one unit.

    Example:
        >>> float(round(break_even(1.0, 0.8, 0.69), 3))
        0.592
    """
    return (np.maximum(verify, build) + communication) / (verify + draft)
