"""Pictures of speculation: speed-ups over a sweep, what each round accepted, and where guesses go.

All draw into the ``ax`` they are given, or into a new figure, and return the axes. Need matplotlib::

    pip install 'tilewise[viz]'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise._figure import axes as _axes
from tilewise.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["fan_out", "rank_curve", "sweep", "timeline"]

_MODES = {
    "speculative": "#9aa5b1",
    "neural": "#1f77b4",
    "fast": "#d9822b",
    "adaptive": "#1d4e79",
    "pearl": "#7b9e5a",
}
_SOURCES = {"cached": "#1f77b4", "drafted": "#d9822b", "fast": "#7b9e5a", "none": "#c8d0d8"}
_LABELS = {"cached": "drafted ahead (hit)", "drafted": "drafted on a miss", "fast": "fast draft", "none": "plain step"}
_AXES = {"batch": "streams verified together", "temperature": "temperature", "fan-out": "branches of a build"}


def sweep(found: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Speed-up over plain decoding of each mode, with the interval over seeds; hit rates as thin dashed lines.

    Args:
        found: :meth:`tilewise.scheduler.sweeps.Sweep.as_dict`.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: a sweep without points.

    Example:
        >>> from tilewise.scheduler.sweeps import sweep as simulate_sweep
        >>> found = simulate_sweep("batch", values=[1, 2], modes=["neural"], seeds=2, tokens=500)
        >>> sweep(found.as_dict()).get_xlabel()
        'streams verified together'
    """
    if not found["rows"]:
        raise ArgumentError("found: expected a sweep with points, got none")
    ax = _axes(ax)
    rates = ax.twinx()
    rates.set(ylim=(0, 1.02), ylabel="hit rate (dashed)")
    for mode in dict.fromkeys(row["mode"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["mode"] == mode]
        x = [row["value"] for row in rows]
        colour = _MODES.get(mode, "#444444")
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        ax.plot(x, [row["over_plain"] for row in rows], color=colour, marker="o", markersize=3.5, label=mode)
        ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        hits = [np.nan if row["hit_rate"] is None else row["hit_rate"] for row in rows]
        if np.isfinite(hits).any():
            rates.plot(x, hits, color=colour, linewidth=0.8, linestyle="--")
    ax.axhline(1.0, color="#b8c0c8", linewidth=0.8)
    if found["kind"] in ("batch", "fan-out"):
        ax.set_xscale("log", base=2)
        ticks = sorted({row["value"] for row in found["rows"]})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    if found["kind"] == "saguaro":
        ax.invert_xaxis()
    ax.set(
        xlabel=_AXES.get(found["kind"], "weight C of the draft's best guesses"), ylabel="speed-up over plain decoding"
    )
    ax.legend(frameon=False, fontsize="small")
    return ax


def timeline(rounds: Iterable[tuple[float, str, int]], *, ax: Axes | None = None) -> Axes:
    """The tokens that each round accepted, coloured by where its chain came from: a cached chain is a hit of the round
    before, the others are misses.

    Args:
        rounds: ``(time, source, accepted)`` of each verified row; sources ``"cached"``, ``"drafted"``, ``"fast"``,
            ``"none"``.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: no rounds, or an unknown source.

    Example:
        >>> ax = timeline([(0.0, "drafted", 2), (0.1, "cached", 3), (0.2, "fast", 0)])
        >>> ax.get_title()
        '3 rounds, 1.7 tokens accepted on average, 33 % hits'
    """
    rows = list(rounds)
    if not rows:
        raise ArgumentError("rounds: expected at least one round, got none")
    for _, source, _ in rows:
        if source not in _SOURCES:
            raise ArgumentError(f"rounds: expected sources {', '.join(map(repr, _SOURCES))}, got {source!r}")
    ax = _axes(ax)
    times = np.array([time for time, _, _ in rows])
    accepted = np.array([count for _, _, count in rows])
    steps = np.diff(np.unique(times))
    width = 0.85 * float(steps.min()) if steps.size else 1.0
    for source, colour in _SOURCES.items():
        chosen = np.array([row[1] == source for row in rows])
        if not chosen.any():
            continue
        ax.bar(times[chosen], accepted[chosen], width=width, color=colour, label=_LABELS[source], linewidth=0)
        mark = "|" if source == "cached" else "x"
        ax.plot(times[chosen], np.full(chosen.sum(), -0.35), mark, color=colour, markersize=4, clip_on=False)
    hits = float(np.mean([source == "cached" for _, source, _ in rows]))
    ax.set(
        xlabel="time", ylabel="drafted tokens accepted", ylim=(-0.7, 1.15 * max(accepted.max(), 1) + 0.6),
        title=f"{len(rows)} rounds, {accepted.mean():.1f} tokens accepted on average, {100 * hits:.0f} % hits",
    )  # fmt: skip
    ax.legend(frameon=False, fontsize="small", loc="upper right", ncols=len(_SOURCES))
    return ax


def fan_out(spread: Sequence[int], law: Sequence[float], *, ax: Axes | None = None) -> Axes:
    """Where the guesses of a build go: bars of guesses by accepted length, over the probability of each.

    Args:
        spread: guesses after 0, 1, ... accepted tokens.
        law: probabilities of those lengths.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: lengths that differ.

    Example:
        >>> fan_out([4, 2, 2], [0.5, 0.3, 0.2]).get_title()
        '8 guesses'
    """
    if len(spread) != len(law) or not len(spread):
        raise ArgumentError(f"law: expected a probability for each of {len(spread)} lengths, got {len(law)}")
    ax = _axes(ax, height=3.2)
    places = np.arange(len(spread))
    ax.bar(places, spread, color="#1f77b4", width=0.7)
    chances = ax.twinx()
    chances.plot(places, law, color="#b03a2e", marker="o", markersize=3.5)
    chances.set(ylim=(0, None), ylabel="probability of the length")
    ax.set(xlabel="accepted tokens", ylabel="guesses", title=f"{sum(spread)} guesses", xticks=places)
    return ax


def rank_curve(curves: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
    """P(the true follow-up is among the F best guesses), over F.

    Args:
        curves: by name; values for 0, 1, 2, ... guesses, as in ``stats()["learnt"]["model"]["rank_curve_refused"]``.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: no curves.

    Example:
        >>> rank_curve({"after a refusal": [0.0, 0.5, 0.7]}).get_xlabel()
        'guesses'
    """
    if not curves:
        raise ArgumentError("curves: expected at least one, got none")
    ax = _axes(ax, height=3.2)
    colours = list(_MODES.values())
    for number, (name, values) in enumerate(curves.items()):
        ax.plot(range(len(values)), values, color=colours[number % len(colours)], marker=".", label=name)
    ax.set(xlabel="guesses", ylabel="probability that one hits", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize="small")
    return ax
