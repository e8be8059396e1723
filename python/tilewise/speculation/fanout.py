"""Fan-out: how many follow-up tokens to guess after each accepted length.

A chain of K drafted tokens ends in one of K + 1 places. Place k happens with probability P_k, and with F_k guesses
there the true token is among them with probability hit(F_k). A budget is to be spread so that the cache hits most
often:

* :func:`geometric_fan_out`: the paper's closed form, real numbers; P_k = a^k (1 - a), a miss of F^(-r);
* :func:`water_filling`: integers, for any P_k and for the hit curves that were measured (:class:`RankCurve`).

Source: Kumar, Dao, May, "Speculative Speculative Decoding" (2026), Definition 11 and Theorem 12.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from tilewise import _core
from tilewise.errors import ArgumentError, DtypeError

__all__ = ["RankCurve", "fan_out_limits", "geometric_fan_out", "geometric_miss", "water_filling"]


class RankCurve:
    """P(the true follow-up token is among the draft's first F guesses), learnt online from the ranks of true tokens.

    The curve is 0 at F = 0, never falls and is concave (the least concave majorant of what was counted, Grenander
    1956), so that giving each guess to the place where it adds most is optimal. It starts as a power law, a miss of
    ``(1 + F)^(-exponent)``, and forgets slowly.

    Args:
        exponent: of the prior, at least 0.
        prior_weight: how many observations the prior is worth, above 0.
        memory: an observation's weight falls to 1/e after this many more, above 0; infinite: never.

    Raises:
        ArgumentError: a number outside its range.

    Example:
        >>> from tilewise.speculation import RankCurve
        >>> curve = RankCurve(exponent=1.0)
        >>> curve.hit(0), curve.hit(1), curve.hit(3)
        (0.0, 0.5, 0.75)
        >>> for _ in range(1000): curve.observe(0)
        >>> round(curve.hit(1), 2)
        0.99
    """

    def __init__(self, exponent: float = 1.0, *, prior_weight: float = 8.0, memory: float = 512.0) -> None:
        self._curve = _core.RankCurve(
            _number("exponent", exponent), _number("prior_weight", prior_weight), _number("memory", memory)
        )

    def observe(self, rank: int | None) -> None:
        """The true token stood at `rank` among the guesses, 0 the first; None (or -1): it was not ranked."""
        if rank is not None:
            rank = _integer("rank", rank, -1)
        self._curve.observe(None if rank == -1 else rank)

    def hit(self, guesses: int) -> float:
        """The probability that the true token is among the first `guesses`."""
        return self._curve.hit(_integer("guesses", guesses))

    def gain(self, guesses: int) -> float:
        """What one more guess than `guesses` adds: ``hit(guesses + 1) - hit(guesses)``, never rising."""
        return self._curve.gain(_integer("guesses", guesses))

    @property
    def observations(self) -> float:
        """How many observations of full weight the curve rests on, the prior not counted."""
        return self._curve.observations()


def geometric_fan_out(acceptance: float, exponent: float, length: int, budget: float) -> np.ndarray:
    """The closed form: guesses after 0..`length` accepted tokens, real numbers that add up to `budget`.

    ``F_k`` is proportional to ``P_k^(1 / (1 + r))``: the published ``F_0 a^(k/(1+r))``, in a form that has a value at
    a = 1 too (all guesses at the last place; at a = 0 all at the first).

    Args:
        acceptance: a, the probability that a drafted token is accepted, in [0, 1].
        exponent: r, at least 0: F guesses miss with probability F^(-r).
        length: K, the number of drafted tokens.
        budget: at least 0.

    Returns:
        float64 ``[K + 1]``.

    Raises:
        ArgumentError, DtypeError: a number outside its range.

    Example:
        >>> from tilewise.speculation import geometric_fan_out
        >>> geometric_fan_out(0.8, 1.0, 7, 24).round(2)
        array([3.9 , 3.49, 3.12, 2.79, 2.49, 2.23, 2.  , 3.99])
    """
    return np.array(
        _core.speculation_geometric(
            _number("acceptance", acceptance),
            _number("exponent", exponent),
            _integer("length", length),
            _number("budget", budget),
        )
    )


def geometric_miss(acceptance: float, exponent: float, fan_out: Sequence[float] | np.ndarray) -> float:
    """The model's probability of a miss with `fan_out` guesses after 0, 1, ... accepted tokens.

    Args:
        acceptance, exponent: as in :func:`geometric_fan_out`.
        fan_out: numbers >= 0. Below 1 guess the power law exceeds 1, and is taken as it stands.

    Raises:
        ArgumentError: a number outside its range.

    Example:
        >>> from tilewise.speculation import geometric_fan_out, geometric_miss
        >>> round(geometric_miss(0.8, 1.0, geometric_fan_out(0.8, 1.0, 7, 24)), 3), geometric_miss(0.8, 1.0, [4])
        (0.316, 0.25)
    """
    values = np.asarray(fan_out, np.float64)
    if values.ndim != 1 or not (values >= 0).all():
        raise ArgumentError(f"fan_out: expected a list of numbers >= 0, got {fan_out!r}")
    return _core.speculation_geometric_miss(
        _number("acceptance", acceptance), _number("exponent", exponent), values.tolist()
    )


def fan_out_limits(vocabulary: int, length: int) -> list[int]:
    """How many different tokens there are to guess after 0..`length` accepted: all but the refused one, at the end all.

    Example:
        >>> from tilewise.speculation import fan_out_limits
        >>> fan_out_limits(vocabulary=100, length=2)
        [99, 99, 100]
    """
    vocabulary, length = _integer("vocabulary", vocabulary, 1), _integer("length", length)
    return [vocabulary - 1] * length + [vocabulary]


def water_filling(
    outcome_weights: Sequence[float] | np.ndarray, curves: Sequence[RankCurve], budget: int, most: Sequence[int]
) -> list[int]:
    """Whole guesses: each goes to the place where it adds most, which is the best way to spend any budget.

    The guesses of a smaller budget are among those of a larger. Ties go to the shorter accepted length.

    Args:
        outcome_weights: P_k of each place, or anything proportional to it; negative or NaN: 0.
        curves: the hit curve of each place.
        budget: how many guesses, at least 0.
        most: how many fit in each place (:func:`fan_out_limits`).

    Returns:
        Integers that add up to ``min(budget, sum(most))``.

    Raises:
        ArgumentError: lists of different lengths, numbers below 0. DtypeError: no integers.

    Example:
        >>> from tilewise.speculation import RankCurve, fan_out_limits, water_filling
        >>> curve = RankCurve(1.0)
        >>> water_filling([0.5, 0.25, 0.25], [curve] * 3, 8, fan_out_limits(100, 2))
        [4, 2, 2]
    """
    places = [_integer("most", count) for count in most]
    weights = np.asarray(outcome_weights, np.float64).tolist()
    for curve in curves:
        if not isinstance(curve, RankCurve):
            raise DtypeError(f"curves: expected RankCurve, got {type(curve).__name__}")
    return _core.speculation_water_fill(weights, [curve._curve for curve in curves], _integer("budget", budget), places)


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DtypeError(f"{name}: expected a number, got {type(value).__name__}") from None


def _integer(name: str, value: int, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise DtypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if not least <= number < 2**63:
        raise ArgumentError(f"{name}: expected an integer in [{least}, 2^63), got {number}")
    return number
