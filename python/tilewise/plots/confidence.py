"""Pictures of reasoning traces: their confidence with the threshold that ends them, and the vote.

Needs matplotlib: ``pip install 'tilewise[viz]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise._figure import axes as _axes
from tilewise.errors import ArgumentError, ShapeError
from tilewise.scheduler.confidence import trace_confidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tilewise.scheduler.confidence_study import Outcome
    from tilewise.scheduler.voting import Vote

__all__ = ["traces", "trade_off", "vote"]

_KEPT, _STOPPED, _LINE = "#1f77b4", "#9aa5b1", "#b03a2e"


def traces(
    tokens: Any,
    *,
    window: int,
    lengths: Any = None,
    threshold: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Group confidence along traces, the threshold, and where it would stop each of them.

    Args:
        tokens: token confidences ``[N, T]``.
        window: tokens of a group.
        lengths: int ``[N]``; all T if None.
        threshold: below it a trace is stopped; drawn as a line if given.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ShapeError: not ``[N, T]``.

    Example:
        >>> axes = traces([[5.0, 4.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]], window=2, threshold=3.0)
        >>> axes.get_title()
        '1 of 2 traces stopped'
    """
    values = np.asarray(tokens, np.float64)
    if values.ndim != 2:
        raise ShapeError(f"tokens: expected token confidences [traces, tokens], got shape {values.shape}")
    own = np.full(len(values), values.shape[1]) if lengths is None else np.asarray(lengths)
    groups: np.ndarray = trace_confidence(values, lengths=own, window=window, groups=True).groups
    axes = _axes(ax)
    stopped = 0
    for row, length in zip(groups, own, strict=True):
        row = row[: max(int(length) - window + 1, 0)]
        places = np.arange(row.size) + window
        weak = np.flatnonzero(~(row >= threshold)) if threshold is not None else np.empty(0, int)
        end = int(weak[0]) + 1 if weak.size else row.size
        axes.plot(places[:end], row[:end], color=_STOPPED if weak.size else _KEPT, linewidth=0.9, alpha=0.8)
        if weak.size:
            stopped += 1
            axes.plot(places[end - 1], row[end - 1], marker="x", color=_LINE, markersize=5)
    if threshold is not None:
        axes.axhline(threshold, color=_LINE, linewidth=1.0, label=f"threshold {threshold:.4g}")
        axes.legend(frameon=False)
    axes.set(
        xlabel="tokens",
        ylabel=f"mean confidence of {window} tokens",
        title=f"{stopped} of {len(values)} traces stopped" if threshold is not None else f"{len(values)} traces",
    )
    return axes


def vote(result: Vote, *, most: int = 12, ax: Axes | None = None) -> Axes:
    """The weight of each answer as bars, the heaviest first.

    Args:
        result: of :mod:`tilewise.scheduler.voting`.
        most: answers at most.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.

    Example:
        >>> from tilewise.scheduler.voting import majority
        >>> vote(majority(["4", "5", "5"])).get_title()
        "answer '5' with 67 % of the weight"
    """
    if most < 1:
        raise ArgumentError(f"most: expected at least 1 answer, got {most}")
    axes = _axes(ax)
    ranked = sorted(result.weights.items(), key=lambda pair: -pair[1])[:most]
    places = np.arange(len(ranked))
    colors = [_KEPT if answer == result.answer else _STOPPED for answer, _ in ranked]
    axes.bar(places, [weight for _, weight in ranked], color=colors, width=0.8)
    axes.set_xticks(places, [f"{answer}\n{result.counts[answer]} traces" for answer, _ in ranked])
    share = f"answer {result.answer!r} with {result.share:.0%} of the weight".replace("%", " %")
    axes.set(ylabel="weight", title=share if ranked else "no answer")
    return axes


def trade_off(outcomes: Sequence[Outcome], *, ax: Axes | None = None) -> Axes:
    """Accuracy over tokens of each policy of a study.

    Args:
        outcomes: of :func:`tilewise.scheduler.confidence_study.simulate`.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
    """
    axes = _axes(ax, height=4.2)
    for outcome in outcomes:
        seeds = np.array(outcome.by_seed)
        axes.plot(seeds[:, 1], seeds[:, 0], ".", color=_STOPPED, markersize=3)
        (mark,) = axes.plot(outcome.tokens, outcome.accuracy, "o", markersize=7)
        axes.annotate(
            outcome.policy, (outcome.tokens, outcome.accuracy), xytext=(6, 4), textcoords="offset points", fontsize=8,
            color=mark.get_color(),
        )  # fmt: skip
    axes.set(xlabel="tokens of a question", ylabel="accuracy", title="policies, each dot a seed")
    axes.set_xlim(0, 1.3 * max((outcome.tokens for outcome in outcomes), default=1.0))
    return axes
