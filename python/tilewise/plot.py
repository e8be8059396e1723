"""Pictures: what a mask keeps, how even a routing is, what padding costs, how fast things ran.

Every function draws into the ``ax`` it is given, or into a new figure, and returns the axes;
``ax.figure.savefig(path)`` writes a file. Nothing is shown, and neither pyplot nor the user's settings are touched.
Needs matplotlib::

    pip install 'tilewise[viz]'

* :func:`mask`: the elements that a mask keeps, and its empty, partial and full blocks;
* :func:`mod`: what a score_mod adds where;
* :func:`expert_load`: tokens of each expert, before and after rounding;
* :func:`padding`: padded rows by tile size;
* :func:`benchmark`: bars of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise._figure import axes as _axes
from tilewise.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["benchmark", "expert_load", "mask", "mod", "padded_share", "padding"]

#: Elements of masks: in an empty block, dropped in a partial one, kept there, in a full one.
_SHADES = ("#ffffff", "#f3e3c3", "#4a90c4", "#1d4e79")
#: Above this many elements only blocks are drawn.
_ELEMENTS = 2**22
_BEFORE, _AFTER, _LINE = "#9aa5b1", "#1f77b4", "#b03a2e"
#: Tile heights that kernels have: a CPU's block of rows, up to a GPU's.
_TILES = (4, 8, 16, 32, 64, 128, 256)


def _counts(load: Any, name: str, num_experts: int | None) -> np.ndarray:
    """Rows of each expert, of counts ``[E]`` or of a routing."""
    ids = getattr(load, "expert_ids", None)
    if ids is None:
        counts = np.asarray(load)
        if counts.ndim != 1:
            raise ShapeError(f"{name}: expected counts [experts] or a Routing, got an array {list(counts.shape)}")
        if counts.size and (counts.min() < 0 or not np.array_equal(counts, np.floor(counts))):
            raise ArgumentError(f"{name}: expected numbers of rows, got {counts.min()} to {counts.max()}")
        return counts.astype(np.int64)
    if num_experts is None:
        raise ArgumentError(f"{name} is a Routing, which does not know how many experts there are: give num_experts")
    ids = np.asarray(ids).ravel()
    return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)


def padded_share(load: Any, tile: int, *, num_experts: int | None = None) -> float:
    """Padded rows for each real one, if every expert's rows are filled up to whole tiles: about ``tile / (2 * mean)``.

    Args:
        load: rows of each expert ``[E]``, or a :class:`tilewise.moe.Routing`.
        tile: rows of a tile.
        num_experts: of a routing.

    Raises:
        ArgumentError: a tile below 1, counts that are none, or a routing without ``num_experts``.

    Example:
        >>> padded_share([3, 5, 0], 4)
        0.5
    """
    if tile < 1:
        raise ArgumentError(f"tile: expected at least 1 row, got {tile}")
    counts = _counts(load, "load", num_experts)
    computed, real = int((-(-counts // tile) * tile).sum()), int(counts.sum())
    return (computed - real) / real if real else 0.0


def expert_load(
    before: Any, after: Any = None, *, tile: int | None = None, num_experts: int | None = None, ax: Axes | None = None
) -> Axes:
    """Tokens of each expert as bars, the busiest first, and the mean as a line.

    Args:
        before: rows of each expert ``[E]`` (NumPy, torch, a list), or a routing.
        after: the same after rounding; drawn over ``before`` in the same order.
        tile: draw lines at multiples of it.
        num_experts: of routings.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ShapeError: ``before`` and ``after`` with different numbers of experts, or not counts.

    Example:
        >>> expert_load([130, 250, 131], [128, 256, 128], tile=128).get_ylabel()
        'tokens'
    """
    first = _counts(before, "before", num_experts)
    second = None if after is None else _counts(after, "after", num_experts)
    if second is not None and first.shape != second.shape:
        raise ShapeError(f"before has {first.size} experts and after {second.size}: expected as many")
    ax = _axes(ax)
    order = np.argsort(-first, kind="stable")
    places = np.arange(first.size)
    if second is None:
        ax.bar(places, first[order], width=0.85, color=_AFTER, label="load")
    else:
        ax.bar(places - 0.21, first[order], width=0.42, color=_BEFORE, label="before rounding")
        ax.bar(places + 0.21, second[order], width=0.42, color=_AFTER, label="after rounding")
    mean = float(first.mean()) if first.size else 0.0
    ax.axhline(mean, color=_LINE, linewidth=1.0, label=f"mean {mean:.4g}")
    if tile is not None:
        top = int(max(first.max(initial=0), 0 if second is None else second.max(initial=0)))
        # More than a dozen lines are a grey sheet, not a scale.
        step = tile * max(1, -(-top // (12 * tile)))
        ax.set_yticks(range(0, top + step, step))
        ax.grid(axis="y", linewidth=0.4)
        ax.set_axisbelow(True)
    title = f"load of {first.size} experts"
    if mean:
        title += f": the busiest has {first.max() / mean:.2f}x the mean"
    ax.set(xlabel="expert, busiest first", ylabel="tokens", title=title)
    ax.margins(x=0.01)
    ax.legend(frameon=False)
    return ax


def padding(
    before: Any,
    after: Any = None,
    *,
    tiles: Sequence[int] = _TILES,
    num_experts: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Padded rows over the height of a tile, in per cent of the real ones (see :func:`padded_share`).

    Args:
        before: rows of each expert ``[E]``, or a routing.
        after: the same after rounding to one tile height: its line is at 0 there and at every divisor.
        tiles: heights to draw.
        num_experts: of routings.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: no tiles, or one below 1.

    Example:
        >>> ax = padding([100, 200], tiles=(4, 64))
        >>> [round(float(y), 3) for y in ax.lines[0].get_ydata()]
        [0.0, 28.0]
    """
    if not tiles:
        raise ArgumentError("tiles: expected at least one height, got none")
    lines = [("before rounding" if after is not None else "padding", before, _BEFORE if after is not None else _AFTER)]
    if after is not None:
        lines.append(("after rounding", after, _AFTER))
    shares = [[100.0 * padded_share(load, tile, num_experts=num_experts) for tile in tiles] for _, load, _ in lines]
    ax = _axes(ax)
    for (name, _, color), share in zip(lines, shares, strict=True):
        ax.plot(tiles, share, marker="o", markersize=4, color=color, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(tiles), [str(tile) for tile in tiles])
    ax.minorticks_off()
    ax.set_ylim(bottom=0.0)
    ax.set(xlabel="rows of a tile", ylabel="padded rows, % of real ones", title="rows computed for nothing")
    ax.grid(linewidth=0.4)
    ax.legend(frameon=False)
    return ax


def benchmark(milliseconds: Mapping[str, Mapping[str, float]], *, unit: str = "ms", ax: Axes | None = None) -> Axes:
    """Groups of horizontal bars: for each case what each implementation took.

    Args:
        milliseconds: by case and name; every case with the same names.
        unit: what the numbers are.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: nothing to draw, or cases with different names.

    Example:
        >>> ax = benchmark({"forward": {"tilewise": 2.0, "loop": 5.0}})
        >>> [float(bar.get_width()) for bar in ax.patches]
        [2.0, 5.0]
    """
    if not milliseconds or not next(iter(milliseconds.values())):
        raise ArgumentError("benchmark: expected at least one case with one number, got none")
    names = list(next(iter(milliseconds.values())))
    for case, numbers in milliseconds.items():
        if list(numbers) != names:
            raise ArgumentError(f"benchmark: case {case!r} has {list(numbers)}, expected {names} like the first")
    cases = list(milliseconds)
    ax = _axes(ax, height=1.2 + 0.32 * len(names) * len(cases))
    height = 0.8 / len(names)
    shades = [_AFTER, _BEFORE, "#c8d0d8", _LINE]
    for index, name in enumerate(names):
        places = np.arange(len(cases)) + (index - (len(names) - 1) / 2) * height
        numbers = [milliseconds[case][name] for case in cases]
        bars = ax.barh(places, numbers, height=0.92 * height, color=shades[index % len(shades)], label=name)
        ax.bar_label(
            bars,
            labels=[f"{number:.0f}" if number >= 100 else f"{number:.3g}" for number in numbers],
            padding=3,
            fontsize=8,
        )
    ax.set_yticks(range(len(cases)), cases)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel=unit)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars, which may fill the axes
    return ax


def mask(
    what: Any,
    queries: int | None = None,
    keys: int | None = None,
    block: int | tuple[int, int] | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """The elements that a mask keeps, over its schedule: full blocks dark, partial ones light, empty ones white.

    Args:
        what: the name of a mask of :mod:`tilewise.masks`, a mask_mod (a function or a traced
            :class:`~tilewise.expr.Mod`), or a BlockMask (of tilewise or of torch).
        queries, keys: lengths; of a name its example's, of a BlockMask its own.
        block: ``(queries, keys)`` of a block; of a name its example's, 128 for functions.
        batch, head: which one to draw.
        ax: where to draw.

    Returns:
        The axes; the title says how many blocks are visited, how many of them are full, and the sparsity.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: an unknown name, a function without lengths, or a batch or head outside.

    Example:
        >>> mask("causal", 32, 32, 8).get_title()
        'causal: 10 of 16 blocks, 6 full, 37.5 % empty'
    """
    from tilewise.attention.picture import look

    found = look(what, queries, keys, block, batch=batch, head=head, elements=_ELEMENTS)
    ax = _axes(ax, width=5.4, height=5.4)
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors, norm = ListedColormap(list(_SHADES)), BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5], 4)
    extent = (-0.5, found.keys - 0.5, found.queries - 0.5, -0.5)
    ax.imshow(found.shades(), cmap=colors, norm=norm, extent=extent, interpolation="nearest", aspect="equal")
    rows, columns = found.kinds.shape
    if max(rows, columns) <= 64:
        for edges, line in ((range(1, rows), ax.axhline), (range(1, columns), ax.axvline)):
            for edge in edges:
                line(edge * found.block[0 if line == ax.axhline else 1] - 0.5, color="#b8c0c8", linewidth=0.5)
    ax.set(
        xlabel="key", ylabel="query", xlim=(-0.5, found.keys - 0.5), ylim=(found.queries - 0.5, -0.5),
        title=f"{found.name}: {found.visited} of {found.kinds.size} blocks, {found.full} full, "
        f"{found.sparsity:.3g} % empty",
    )  # fmt: skip
    return ax


def mod(
    what: Any, queries: int = 64, keys: int = 64, *, score: float = 0.0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """What a score_mod makes of one score everywhere, as colours over queries and keys.

    Args:
        what: the name of a mod of :mod:`tilewise.mods` (drawn with 4 heads), or a score_mod.
        queries, keys: lengths.
        score: that every element has before.
        head: which one to draw.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: an unknown name, or lengths below 1.

    Example:
        >>> mod("alibi", 16, 16).get_title()
        'alibi: scores of 0 become -3.75 to 3.75'
    """
    from tilewise.attention.picture import look_at_mod

    found = look_at_mod(what, queries, keys, score=score, head=head)
    ax = _axes(ax, width=5.8, height=5.0)
    reach = max(float(np.abs(found.values - score).max(initial=0.0)), 1e-12)
    image = ax.imshow(
        found.values, cmap="RdBu_r", vmin=score - reach, vmax=score + reach, interpolation="nearest", aspect="equal"
    )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    low, high = found.range
    ax.set(xlabel="key", ylabel="query", title=f"{found.name}: scores of {score:g} become {low:.3g} to {high:.3g}")
    return ax
