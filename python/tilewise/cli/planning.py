"""``tilewise simulate planning``: policies of speculative planning side by side, in virtual time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tilewise.cli.pictures import check_picture
from tilewise.scheduler.planning import Caps, FixedPredictor
from tilewise.scheduler.planning.scenario import Scenario
from tilewise.scheduler.planning.simulation import Simulator
from tilewise.scheduler.planning.study import PUBLISHED, run_study, standard_policies

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names."""

    seeds: int
    tasks: int
    most: int
    calls: int | None
    plot: Path | None
    as_json: bool


def run(options: Options) -> int:
    """Simulate, print, draw; returns the exit code.

    Raises:
        MissingExtraError: a picture without matplotlib.
        ArgumentError: a picture in a format that matplotlib cannot write.
    """
    if options.plot is not None:
        check_picture(options.plot)
    policies = standard_policies(options.most)
    scenario, console = Scenario(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=options.as_json) as bar:
        task = bar.add_task("simulating", total=options.seeds * len(policies))
        study = run_study(
            scenario, policies, seeds=range(options.seeds), tasks=options.tasks, caps=Caps(total=options.calls),
            watch=lambda: bar.advance(task),
        )  # fmt: skip
    found = study.as_dict() | {"calls": options.calls}
    if options.plot is not None:
        _draw(found, scenario, options.plot)
    if options.as_json:
        print(json.dumps(found))
    else:
        _report(found, options, Console(highlight=False))
    return 0


def _draw(found: dict[str, Any], scenario: Scenario, place: Path) -> None:
    from matplotlib.figure import Figure

    from tilewise.plots import planning

    figure = Figure(figsize=(8.5, 9.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.3, 1.0))
    planning.pareto(found, published=found["calls"] is None, ax=above)
    planning.timeline(Simulator(FixedPredictor(4)).run(scenario.task(0, 0)).episode.records, ax=below)
    below.set_title("one task with k = 4; the number is the step")
    figure.savefig(place)


def _report(found: dict[str, Any], options: Options, console: Console) -> None:
    cap = "no cap on calls" if options.calls is None else f"at most {options.calls} calls in flight"
    console.print(
        f"simulated, {found['scenario']}: {found['seeds']} seeds of {found['tasks']} tasks, {cap}. Latencies, tokens "
        "and phases are fitted to published figures, not measured."
    )
    spread = found["mismatch"]
    linear = found["cost_linearity"]
    console.print(
        f"steps to a mismatch inside a task: max {spread['max']:.2f}, min {spread['min']:.2f}, variance "
        f"{spread['variance']:.2f}, range {spread['range']:.2f} (published 3.53, 1.60, 1.46, 1.93)"
        + ("" if linear is None else f"; cost of fixed k is linear with R² {linear:.3f}")
    )
    console.print(f"time and cost: {found['base']} is 1, with the larger half of the 95 % interval over seeds")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("k", "time", "cost", "published", "wasted", "calls", "saving"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        published = PUBLISHED.get(row["name"])
        table.add_row(
            _short(row["name"]), f"{row['k']:.2f}", _half(row["seconds_to_base"]), _half(row["cost_to_base"]),
            "" if published is None or options.calls is not None else f"{published[0]:.2f} {published[1]:.2f}",
            f"{row['wasted']:.0%}", f"{row['peak']:.1f}",
            f"{row['saving_at_equal_time']:.0%}" if row["learns"] else "",
        )  # fmt: skip
    console.print(table)
    console.print(
        "tau 0.5 +2: predicted with that tau and offset. wasted: share of the cost; calls: most in flight, mean. "
        "saving: how much less than fixed k at the same time."
    )
    console.print(
        f"\nThe fastest fixed k is {found['fastest']}; the cheapest within 2 % of its time is {found['frugal']}. "
        "Predicted k against them:"
    )
    against = list(dict.fromkeys((("fastest", found["fastest"]), ("frugal", found["frugal"]))))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for _, name in against:
        table.add_column(f"time, {name}", justify="right")
        table.add_column(f"cost, {name}", justify="right")
    for row in found["rows"]:
        if row["learns"]:
            cells = [_percent(row[f"{what}_to_{key}"]) for key, _ in against for what in ("seconds", "cost")]
            table.add_row(_short(row["name"]), *cells)
    console.print(table)
    if options.plot is not None:
        console.print(f"picture: {options.plot}")


def _short(name: str) -> str:
    return name.removeprefix("dynamic ").replace("offset ", "+")


def _half(found: list[float]) -> str:
    mean, low, high = found
    return f"{mean:.3f} ±{max(mean - low, high - mean):.2f}"


def _percent(found: list[float]) -> str:
    mean, low, high = (100.0 * (value - 1.0) for value in found)
    return f"{mean:+.1f}% ±{max(mean - low, high - mean):.1f}"
