"""``tilewise simulate confidence``: what online stopping saves on traces of known reliability."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tilewise.cli.pictures import check_picture
from tilewise.errors import ArgumentError
from tilewise.scheduler.confidence_study import POLICIES, Outcome, Policy, Study, make_question, run_online, simulate

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names."""

    seeds: int
    questions: int
    traces: int
    window: int
    warmup: int
    slots: int
    tokens: int
    gap: float
    difficulty: float
    against: str
    plot: Path | None
    as_json: bool


def run(options: Options) -> int:
    """Simulate and report; returns the exit code.

    Raises:
        ArgumentError: a size that is not meaningful, or a file that cannot be written.
        MissingExtraError: a picture without matplotlib.
    """
    if options.seeds < 1:
        raise ArgumentError(f"--seeds: expected at least 1, got {options.seeds}")
    if options.plot is not None:
        check_picture(options.plot)
    others = ("seeds", "against", "plot", "as_json")
    study = Study(**{name: value for name, value in asdict(options).items() if name not in others})
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=options.as_json) as bar:
        task = bar.add_task("questions", total=options.seeds * study.questions)
        outcomes = simulate(range(options.seeds), study, against=options.against, progress=lambda: bar.advance(task))
    if options.plot is not None:
        _draw(study, outcomes, options.plot)
    if options.as_json:
        print(json.dumps({"study": asdict(study), "seeds": options.seeds, "policies": [o.json() for o in outcomes]}))
    else:
        _print(study, outcomes, options)
    return 0


def _print(study: Study, outcomes: list[Outcome], options: Options) -> None:
    console = Console(highlight=False)
    console.print(
        f"{options.seeds} seeds of {study.questions} questions, {study.traces} traces of about {study.tokens} tokens "
        f"each, windows of {study.window}, {study.warmup} traces of warm-up, {study.slots} at once"
    )
    table = Table()
    table.add_column("policy")
    for name in ("accuracy", f"less {options.against}", "95 %", "tokens", "saved", "95 % "):
        table.add_column(name, justify="right")
    for one in outcomes:
        low, high = one.difference_interval
        least, most = one.saved_interval
        table.add_row(
            one.policy, f"{one.accuracy:.1%}", f"{100 * one.difference:+.1f} points",
            f"{100 * low:+.1f} to {100 * high:+.1f}", f"{one.tokens / 1e3:.1f}k", f"{one.saved:.1%}",
            f"{least:.1%} to {most:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print("majority, weighted and filtered vote over all traces; the others end traces or the vote early")
    if options.plot is not None:
        console.print(f"picture: {options.plot}")


def _draw(study: Study, outcomes: list[Outcome], place: Path) -> None:
    from matplotlib.figure import Figure

    from tilewise.plots import confidence as plots

    figure = Figure(figsize=(9, 10.5), layout="constrained")
    policies, lines, bars = figure.subplots(3, 1, height_ratios=(1.3, 1.3, 1.0))
    plots.trade_off(outcomes, ax=policies)
    question = make_question(study, 0, 0)
    low: Policy = next(policy for policy in POLICIES if policy.online and policy.keep == 0.1)
    _, _, machine = run_online(question, study, low)
    plots.traces(question.tokens, lengths=question.lengths, window=study.window, threshold=machine.threshold, ax=lines)
    plots.vote(machine.result(), ax=bars)
    figure.savefig(place)
