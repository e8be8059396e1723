"""Pictures of speculative planning: what policies cost and take, and the calls of one episode.

Both draw into the ``ax`` they are given, or into a new figure, and return the axes. Need matplotlib::

    pip install 'tilewise[viz]'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilewise._figure import axes as _axes
from tilewise.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tilewise.scheduler.planning import CallRecord

__all__ = ["pareto", "timeline"]

_FIXED, _DYNAMIC, _PUBLISHED = "#9aa5b1", "#1f77b4", "#b03a2e"
_FATES = {"kept": "#1f77b4", "completed": "#d9822b", "cancelled": "#c8d0d8", "running": "#ffffff"}
_LABELS = {"kept": "in the plan", "completed": "answered, not used", "cancelled": "cancelled", "running": "running"}
_ROLES = ("target", "approximate", "tool", "predictor")


def pareto(study: Mapping[str, Any], *, published: bool = False, ax: Axes | None = None) -> Axes:
    """Cost over time of each policy, relative to the study's base: fixed k as a line, predicted k as points.

    Whiskers are the 95 % intervals over seeds.

    Args:
        study: :meth:`tilewise.scheduler.planning.study.Study.as_dict`.
        published: draw the published figures as well.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: a study without policies.

    Example:
        >>> from tilewise.scheduler.planning.scenario import Scenario
        >>> from tilewise.scheduler.planning.study import fixed, run_study
        >>> study = run_study(Scenario(), [fixed(2), fixed(4)], seeds=range(2), tasks=3)
        >>> pareto(study.as_dict()).get_xlabel()
        'time, fixed 2 = 1'
    """
    rows = list(study.get("rows", ()))
    if not rows:
        raise ArgumentError("pareto: the study has no policies")
    ax = _axes(ax, 7.0, 4.6)
    for learns, color, label in ((False, _FIXED, "fixed k"), (True, _DYNAMIC, "predicted k")):
        some = [row for row in rows if row["learns"] == learns]
        if not some:
            continue
        x, y = ([row[f"{what}_to_base"] for row in some] for what in ("seconds", "cost"))
        whiskers = [[[p[0] - p[1] for p in v], [p[2] - p[0] for p in v]] for v in (x, y)]
        ax.errorbar(
            [p[0] for p in x], [p[0] for p in y], xerr=whiskers[0], yerr=whiskers[1], color=color, label=label,
            fmt="o" if learns else "o-", markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2,
        )  # fmt: skip
        for row, px, py in zip(some, x, y, strict=True):
            name = row["name"].removeprefix("fixed ").removeprefix("dynamic ")
            text = f"k={name}" if not learns else name.replace("tau ", "τ ").replace("offset ", "+")
            # Names above the line for fixed k and below for the others, so that neighbours do not meet.
            place = (5, 4) if not learns else (-6, -11)
            ax.annotate(
                text, (px[0], py[0]), xytext=place, textcoords="offset points", fontsize=7, color="#444444",
                ha="left" if not learns else "right",
            )  # fmt: skip
    if published:
        some = [row for row in rows if "published" in row]
        x, y = ([row["published"][what] for row in some] for what in ("seconds", "cost"))
        ax.plot(x, y, "x", color=_PUBLISHED, label="published", markersize=6)
    about = f"{study['seeds']} seeds of {study['tasks']} tasks: {study['scenario']} (simulated)"
    ax.set(xlabel=f"time, {study['base']} = 1", ylabel=f"cost, {study['base']} = 1", title=about)
    ax.grid(linewidth=0.4)
    ax.set_axisbelow(True)
    ax.legend(frameon=False)
    return ax


def timeline(records: Sequence[CallRecord], *, ax: Axes | None = None) -> Axes:
    """The calls of one episode as bars over time, a lane for each call that runs beside others, coloured by fate.

    Args:
        records: of a :class:`~tilewise.agents.PlanResult` or an
            :class:`~tilewise.scheduler.planning.Episode`.
        ax: where to draw.

    Returns:
        The axes; the number in a bar is its step.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: no calls.

    Example:
        >>> from tilewise.scheduler.planning import FixedPredictor
        >>> from tilewise.scheduler.planning.scenario import Scenario
        >>> from tilewise.scheduler.planning.simulation import Simulator
        >>> done = Simulator(FixedPredictor(3)).run(Scenario().task(0, 0))
        >>> timeline(done.episode.records).get_xlabel()
        'seconds'
    """
    if not records:
        raise ArgumentError("timeline: there are no calls to draw")
    lanes: list[tuple[str, float]] = []  # role, and when its last bar ends
    bars: list[tuple[int, float, float, CallRecord]] = []
    horizon = max(record.start if record.end is None else record.end for record in records)
    begin = min(record.start for record in records)
    for role in _ROLES:
        for record in sorted((record for record in records if record.role == role), key=lambda one: one.start):
            end = horizon if record.end is None else record.end
            free = [i for i, (name, until) in enumerate(lanes) if name == role and until <= record.start]
            if free:
                lane = free[0]
                lanes[lane] = (role, end)
            else:
                lane = len(lanes)
                lanes.append((role, end))
            bars.append((lane, record.start - begin, end - record.start, record))
    ax = _axes(ax, 8.0, 1.2 + 0.32 * len(lanes))
    for fate, color in _FATES.items():
        some = [bar for bar in bars if bar[3].fate == fate]
        if some:
            ax.barh(
                [bar[0] for bar in some], [bar[2] for bar in some], left=[bar[1] for bar in some], height=0.78,
                color=color, edgecolor="#555555", linewidth=0.4, label=_LABELS[fate],
            )  # fmt: skip
    width = max(horizon - begin, 1e-12)
    for lane, left, length, record in bars:
        if length > 0.02 * width and record.role != "predictor":
            shade = "#ffffff" if record.fate == "kept" else "#222222"
            ax.text(left + length / 2, lane, str(record.step), ha="center", va="center", fontsize=7, color=shade)
    names = [role if i == 0 or lanes[i - 1][0] != role else "" for i, (role, _) in enumerate(lanes)]
    ax.set_yticks(range(len(lanes)), names)
    ax.invert_yaxis()
    ax.set(xlabel="seconds", title="calls of an episode; the number is the step")
    ax.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25 if len(lanes) < 6 else -0.16))
    return ax
