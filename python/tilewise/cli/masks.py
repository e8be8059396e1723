"""``tilewise mask list`` and ``tilewise mask show``: the catalogue of masks and mods, drawn in the terminal."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilewise import masks, mods
from tilewise.attention.picture import MaskPicture, ModPicture, look, look_at_mod
from tilewise.cli.pictures import check_picture
from tilewise.errors import ArgumentError

__all__ = ["Options", "catalogue", "run_list", "run_show"]

#: Most characters of a drawing across; a cell is two characters where there is room.
_ACROSS = 128


@dataclass(frozen=True)
class Options:
    """The options of ``tilewise mask show``, under their names."""

    name: str
    queries: int | None
    keys: int | None
    block: int | None
    head: int
    plot: Path | None
    as_json: bool


def catalogue() -> list[dict[str, str]]:
    """Every mask and mod: its kind, its call and the first line of its documentation."""
    rows = []
    for kind, module, names in (("mask", masks, masks.EXAMPLES), ("mod", mods, mods.EXAMPLES)):
        for name in names:
            function = getattr(module, name)
            about = (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "")
            call = f"{name}({', '.join(inspect.signature(function).parameters)})"
            rows.append({"name": name, "kind": kind, "call": call, "about": about})
    return rows


def run_list(*, as_json: bool) -> int:
    """Print the catalogue; returns the exit code."""
    rows = catalogue()
    if as_json:
        print(json.dumps(rows))
        return 0
    table = Table("name", "kind", "rule", box=None, pad_edge=False)
    for row in rows:
        table.add_row(Text(row["name"]), row["kind"], Text(row["about"]))
    Console().print(table)
    return 0


def run_show(options: Options) -> int:
    """Draw one mask or mod; returns the exit code.

    Raises:
        ArgumentError: an unknown name, lengths that the example does not take, or a file that cannot be written.
        MissingExtraError: a picture without matplotlib.
    """
    if options.plot is not None:
        check_picture(options.plot)
    if options.name in masks.EXAMPLES:
        found: Any = look(options.name, options.queries, options.keys, options.block, head=options.head)
        about = _about_mask(found)
    elif options.name in mods.EXAMPLES:
        queries, keys = options.queries or 64, options.keys or 64
        found = look_at_mod(options.name, queries, keys, head=options.head)
        about = {"name": found.name, "kind": "mod", "queries": queries, "keys": keys, "range": list(found.range)}
        about |= {"expression": found.expression, "program": found.program}
    else:
        raise ArgumentError(f"there is no mask or mod {options.name!r}; `tilewise mask list` shows all of them")
    if options.plot is not None:
        _draw(options, options.plot)
    if options.as_json:
        print(json.dumps(about))
    else:
        _print(found, about, options)
    return 0


def _about_mask(found: MaskPicture) -> dict[str, Any]:
    blocks = {"empty": found.kinds.size - found.visited, "partial": found.visited - found.full, "full": found.full}
    kept = None if found.kept is None else int(found.kept.sum())
    return {
        "name": found.name, "kind": "mask", "queries": found.queries, "keys": found.keys, "block": list(found.block),
        "expression": found.expression, "program": found.program, "kept": kept, "blocks": blocks,
        "sparsity": found.sparsity, "schedule": found.kinds.tolist(),
    }  # fmt: skip


def _draw(options: Options, place: Path) -> None:
    from tilewise import plot

    if options.name in masks.EXAMPLES:
        axes = plot.mask(options.name, options.queries, options.keys, options.block, head=options.head)
    else:
        axes = plot.mod(options.name, options.queries or 64, options.keys or 64, head=options.head)
    axes.figure.savefig(place)  # type: ignore[union-attr]


def _print(found: MaskPicture | ModPicture, about: dict[str, Any], options: Options) -> None:
    console = Console(highlight=False, width=None)
    row = next(row for row in catalogue() if row["name"] == options.name)
    console.print(Text(f"{row['call']}: {row['about']}"))
    console.print(Text(found.expression, style="dim"))
    print()
    cells = _shade_mask(found) if isinstance(found, MaskPicture) else _shade_values(found.values)
    for line in cells:
        print(line)
    print()
    if isinstance(found, MaskPicture):
        blocks = about["blocks"]
        kept = "" if about["kept"] is None else f"{about['kept']} of {found.queries * found.keys} elements kept; "
        console.print(
            f"{found.queries} queries, {found.keys} keys: {kept}blocks of {found.block[0]} x {found.block[1]}: "
            f"{blocks['full']} full, {blocks['partial']} partial, {blocks['empty']} empty ({found.sparsity:.1f} %)"
        )
        console.print("█ kept in a full block  ▓ kept  ░ partly kept  · dropped in a partial block")
    else:
        low, high = about["range"]
        console.print(f"{about['queries']} queries, {about['keys']} keys: scores of 0 become {low:.4g} to {high:.4g}")
        console.print("from low to high: " + _LEVELS)
    if options.plot is not None:
        console.print(f"picture: {options.plot}")


def _steps(rows: int, columns: int) -> tuple[int, int]:
    """How many elements a cell of the drawing has on a side, and how often its character is repeated."""
    step = max(1, -(-columns // _ACROSS), -(-rows // _ACROSS))
    return step, 2 if -(-columns // step) * 2 <= _ACROSS else 1


def _shade_mask(found: MaskPicture) -> list[str]:
    shades = found.shades()
    rows, columns = shades.shape
    step, twice = _steps(rows, columns)
    lines = []
    for top in range(0, rows, step):
        line = ""
        for left in range(0, columns, step):
            cell = shades[top : top + step, left : left + step]
            if (cell == 3).all():
                sign = "█"
            elif (cell >= 2).all():
                sign = "▓"
            elif (cell >= 2).any():
                sign = "░"
            else:
                sign = "·" if (cell == 1).any() else " "
            line += sign * twice
        lines.append(line.rstrip())
    return lines


_LEVELS = " .:-=+*#%@"


def _shade_values(values: np.ndarray) -> list[str]:
    rows, columns = values.shape
    step, twice = _steps(rows, columns)
    finite = np.where(np.isfinite(values), values, np.nan)
    low, high = (np.nanmin(finite), np.nanmax(finite)) if np.isfinite(values).any() else (0.0, 0.0)
    lines = []
    for top in range(0, rows, step):
        cells = values[top, ::step]
        levels = np.clip((cells - low) / (high - low) * len(_LEVELS), 0, len(_LEVELS) - 1) if high > low else cells * 0
        lines.append("".join(_LEVELS[int(level)] * twice for level in np.nan_to_num(levels)).rstrip())
    return lines
