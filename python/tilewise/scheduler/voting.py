r"""The answer of many reasoning traces: majority, weighted by confidence, or of the most confident ones alone.

A vote is over *answers*, one per trace, in the order of the traces. None is no answer, and such a trace does not count.
Two answers are the same if they are equal, or if a key that the user gives says so. Ties go to the answer seen first.
A trace whose confidence is infinite or undefined never counts where confidence does.

* :func:`extract_answer`: the last ``\boxed{...}`` of a text;
* :func:`majority`, :func:`weighted`, :func:`filtered`: the votes;
* :func:`vote`: all of them by name.

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewise._arrays import is_torch
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["Vote", "extract_answer", "filtered", "keep_most_confident", "majority", "threshold", "vote", "weighted"]

Key = Callable[[Any], Hashable]

_BOXED = "\\boxed"


@dataclass(frozen=True)
class Vote:
    """What traces decided.

    Attributes:
        answer: the winner as the first of its traces gave it; None if no trace counts.
        weights: the weight of every answer, in the order they were first seen.
        counts: the traces behind each of them.
        share: the winner's part of all weight, 0 without any.
        voters: indices of the traces that counted.
    """

    answer: Any
    weights: dict[Any, float] = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)
    share: float = 0.0
    voters: tuple[int, ...] = ()


def extract_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` of a text, braces matched.

    Without a brace (``\boxed 7$``) it is what stands before the next ``$``; a brace that is never closed, or nothing at
    all, is no answer.

    Args:
        text: a reasoning trace.

    Returns:
        The answer without blanks around it, or None.

    Example:
        >>> extract_answer(r"so $\boxed{3}$, no: $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> extract_answer(r"it is $\boxed 7$")
        '7'
        >>> extract_answer("I do not know") is None
        True
    """
    at = text.rfind(_BOXED)
    if at < 0:
        return None
    rest = text[at + len(_BOXED) :].lstrip()
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip() or None
    depth = 0
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:end].strip() or None
    return None


def majority(answers: Sequence[Any], *, key: Key | None = None) -> Vote:
    """The answer that most traces give.

    Args:
        answers: one per trace; None is no answer.
        key: what makes two answers the same; equality if None.

    Returns:
        :class:`Vote`.

    Example:
        >>> majority(["4", None, "5", "5"]).answer
        '5'
    """
    return _count(answers, np.ones(len(answers)), np.ones(len(answers), bool), key)


def weighted(answers: Sequence[Any], confidence: Any, *, key: Key | None = None) -> Vote:
    """The answer with the most confidence behind it: ``V(a) = sum of C_t over the traces t that answer a``.

    Args:
        answers: one per trace; None is no answer.
        confidence: ``[traces]``, any trace confidence, at least 0; infinite and NaN ones do not count.
        key: what makes two answers the same; equality if None.

    Returns:
        :class:`Vote`.

    Raises:
        ShapeError: not one confidence per answer.
        ArgumentError: a negative confidence.

    Example:
        >>> weighted(["4", "5", "5"], [9.0, 3.0, 4.0]).weights
        {'4': 9.0, '5': 7.0}
    """
    weights = _confidence(answers, confidence)
    return _count(answers, weights, np.isfinite(weights), key)


def keep_most_confident(confidence: Any, keep: float) -> np.ndarray:
    """Which of some traces are in the most confident share: bool ``[traces]``.

    A trace stays if its confidence is at least the ``(1 - keep)`` quantile of all (linear interpolation, as
    ``numpy.percentile``), so ties at the edge stay: 16 different traces at ``keep=0.1`` keep 2. Infinite and NaN
    confidences do not count and are not kept.

    Args:
        confidence: ``[traces]``.
        keep: the share eta, in (0, 1]; the paper's 10 % is 0.1.

    Raises:
        ArgumentError: a share outside (0, 1].

    Example:
        >>> keep_most_confident([1.0, 4.0, 3.0, 2.0], 0.5)
        array([False,  True,  True, False])
    """
    values = _numbers(confidence)
    kept = np.isfinite(values)
    if kept.any():
        kept[kept] = values[kept] >= threshold(values, keep)
    else:
        _share(keep)
    return kept


def threshold(confidence: Any, keep: float) -> float:
    """The confidence that the most confident share reaches: the ``(1 - keep)`` quantile of the finite ones.

    Args:
        confidence: ``[traces]``.
        keep: the share eta, in (0, 1].

    Returns:
        The quantile by linear interpolation, as ``numpy.percentile``; NaN without a finite confidence.

    Raises:
        ArgumentError: a share outside (0, 1].

    Example:
        >>> threshold([1.0, 2.0, 3.0, 4.0], 0.5)
        2.5
    """
    values = _numbers(confidence)
    values = values[np.isfinite(values)]
    quantile = (1.0 - _share(keep)) * 100.0
    return float(np.percentile(values, quantile)) if values.size else math.nan


def filtered(
    answers: Sequence[Any], confidence: Any, *, keep: float = 0.1, weigh: bool = True, key: Key | None = None
) -> Vote:
    """The vote of the most confident traces. Traces without an answer are dropped before they are ranked.

    Args:
        answers: one per trace; None is no answer.
        confidence: ``[traces]``, at least 0; infinite and NaN ones do not count.
        keep: the share eta that votes, in (0, 1] (see :func:`keep_most_confident`); the paper uses 0.1 and 0.9.
        weigh: weigh the votes by confidence; otherwise each counts one.
        key: what makes two answers the same; equality if None.

    Returns:
        :class:`Vote`.

    Raises:
        ShapeError: not one confidence per answer.
        ArgumentError: a negative confidence, a share outside (0, 1].

    Example:
        >>> filtered(["4", "5", "5", None], [9.0, 3.0, 4.0, 99.0], keep=0.3).answer
        '4'
    """
    weights = _confidence(answers, confidence)
    valid = np.array([answer is not None for answer in answers], bool)
    kept = keep_most_confident(np.where(valid, weights, np.nan), keep)
    return _count(answers, weights if weigh else np.ones(len(weights)), kept, key)


def vote(
    method: str, answers: Sequence[Any], confidence: Any = None, *, keep: float = 0.1, key: Key | None = None
) -> Vote:
    """A vote by the name of its method: ``"majority"``, ``"weighted"`` or ``"filtered"``.

    Args:
        method: the name.
        answers: one per trace; None is no answer.
        confidence: ``[traces]``, for the last two.
        keep: for the last one.
        key: what makes two answers the same; equality if None.

    Raises:
        ArgumentError: an unknown name, or no confidence where it is needed.

    Example:
        >>> vote("weighted", ["4", "5"], [1.0, 2.0]).answer
        '5'
    """
    if method == "majority":
        return majority(answers, key=key)
    if method not in ("weighted", "filtered"):
        raise ArgumentError(f"method: expected 'majority', 'weighted' or 'filtered', got {method!r}")
    if confidence is None:
        raise ArgumentError(f"confidence: the {method} vote needs one number per trace; 'majority' needs none")
    if method == "weighted":
        return weighted(answers, confidence, key=key)
    return filtered(answers, confidence, keep=keep, key=key)


def _count(answers: Sequence[Any], weights: np.ndarray, counts: np.ndarray, key: Key | None) -> Vote:
    seen: dict[Hashable, Any] = {}
    totals: dict[Hashable, float] = {}
    traces: dict[Hashable, int] = {}
    voters = []
    for index, answer in enumerate(answers):
        if answer is None or not counts[index]:
            continue
        name = answer if key is None else key(answer)
        seen.setdefault(name, answer)
        totals[name] = totals.get(name, 0.0) + float(weights[index])
        traces[name] = traces.get(name, 0) + 1
        voters.append(index)
    if not voters:
        return Vote(None)
    best = max(totals, key=lambda name: totals[name])  # max keeps the first of equals, and dicts their order
    whole = math.fsum(totals.values())
    share = totals[best] / whole if whole > 0 else 0.0
    return Vote(
        seen[best],
        {seen[name]: total for name, total in totals.items()},
        {seen[name]: count for name, count in traces.items()},
        share,
        tuple(voters),
    )


def _share(keep: float) -> float:
    if not 0 < keep <= 1:
        raise ArgumentError(f"keep: expected a share in (0, 1], got {keep!r} (10 % is 0.1)")
    return float(keep)


def _numbers(confidence: Any) -> np.ndarray:
    if is_torch(confidence):
        confidence = confidence.detach().cpu().double().numpy()
    values = np.asarray(confidence, np.float64)
    if values.ndim != 1:
        raise ShapeError(f"confidence: expected [traces], got shape {values.shape}")
    return values


def _confidence(answers: Sequence[Any], confidence: Any) -> np.ndarray:
    values = _numbers(confidence)
    if values.size != len(answers):
        raise ShapeError(f"confidence: expected one number for each of {len(answers)} answers, got {values.size}")
    if (values < 0).any():
        raise ArgumentError(f"confidence: expected numbers of at least 0, got {values[values < 0][0]}")
    return values
