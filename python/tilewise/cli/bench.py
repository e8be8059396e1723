"""``tilewise bench moe``: the expert layer beside torch's ways, on this machine, with pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tilewise.cli.pictures import check_picture
from tilewise.errors import MissingExtraError

if TYPE_CHECKING:
    from tilewise.bench.moe import Problem

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    dtype: str
    skew: float
    train: bool
    rounds: int
    tile: int
    rule: str
    threads: int | None
    plot: Path | None
    as_json: bool


def run(options: Options) -> int:
    """Measure, print, draw; returns the exit code.

    Raises:
        MissingExtraError: no torch, or no matplotlib where a picture is asked for.
        ArgumentError: sizes that make no layer, or a picture in a format that matplotlib cannot write.
    """
    console = Console(stderr=True)
    try:
        import torch

        from tilewise import _core
        from tilewise.bench.moe import Problem, Shape
    except ImportError as error:
        raise MissingExtraError(f"tilewise bench needs torch ({error}): pip install 'tilewise[torch]'") from error
    if options.plot is not None:
        check_picture(options.plot)  # before minutes of measuring
    if options.threads is not None:
        _core.set_num_threads(options.threads)
    before = torch.get_num_threads()
    torch.set_num_threads(_core.num_threads())
    try:
        shape = Shape(options.tokens, options.width, options.hidden, options.experts, options.top_k)
        with console.status("comparing results"):
            problem = Problem.make(shape, options.dtype, skew=options.skew, train=options.train)
            problem.check()
        found = _measure(problem, options, console)
    finally:
        torch.set_num_threads(before)
    if options.plot is not None:
        _draw(found, options)
    if options.as_json:
        print(json.dumps(found))
    else:
        _report(found, options, Console())
    return 0


def _measure(problem: Problem, options: Options, console: Console) -> dict[str, Any]:
    import torch

    from tilewise.bench.harness import interleave, machine, speedup
    from tilewise.bench.moe import OURS, matmul
    from tilewise.plot import padded_share

    functions: dict[str, Any] = problem.functions()
    size = min(2048, max(64, options.tokens))  # no longer than what it is compared with
    functions["matmul"] = matmul(options.dtype, size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=options.as_json) as bar:
        task = bar.add_task("measuring", total=options.rounds * len(functions))
        timings = interleave(functions, options.rounds, watch=lambda name: bar.advance(task))
    peak = 2.0 * size**3 / timings.pop("matmul").median
    rate = {name: problem.shape.flops(options.train) / timing.median for name, timing in timings.items()}
    rows = [
        {
            "name": name,
            "milliseconds": timing.median * 1e3,
            "spread": timing.spread,
            "gflops": rate[name] / 1e9,
            "matmul_share": rate[name] / peak,
            "speedup": None if name == OURS else speedup(timings[OURS], timing),
        }
        for name, timing in timings.items()
    ]
    counts, rounded = problem.counts, _round(problem, options)
    load = {
        "tile": options.tile, "rule": options.rule, "before": counts.tolist(), "after": rounded.tolist(),
        "padded_before": padded_share(counts, options.tile), "padded_after": padded_share(rounded, options.tile),
    }  # fmt: skip
    settings = {name: value for name, value in asdict(options).items() if name not in ("plot", "as_json")}
    about = machine() | {"torch": torch.__version__, "matmul_gflops": peak / 1e9}
    return {"settings": settings, "machine": about, "rows": rows, "load": load}


def _round(problem: Problem, options: Options) -> Any:
    """Rows of each expert after token rounding."""
    import tilewise.torch as twt

    ids, weights = problem.expert_ids, problem.weights.detach()
    table = problem.logits.softmax(-1)
    routing = twt.moe.round_tokens(table, ids, weights, tile=options.tile, rule=options.rule, seed=0)  # type: ignore[arg-type]
    return routing.counts(problem.shape.experts)


def _draw(found: dict[str, Any], options: Options) -> None:
    from matplotlib.figure import Figure

    from tilewise import plot

    figure = Figure(figsize=(9, 10), layout="constrained")
    times, loads, pads = figure.subplots(3, 1, height_ratios=(1.0, 1.6, 1.4))
    what = "forward + backward" if options.train else "forward"
    case = f"{options.tokens} tokens, {options.width} x {options.hidden}, {options.top_k} of {options.experts} experts"
    figure.suptitle(f"{case}, {options.dtype}, {what}")
    plot.benchmark({what: {row["name"]: row["milliseconds"] for row in found["rows"]}}, ax=times)
    load = found["load"]
    plot.expert_load(load["before"], load["after"], tile=options.tile, ax=loads)
    plot.padding(load["before"], load["after"], ax=pads)
    assert options.plot is not None
    figure.savefig(options.plot)


def _report(found: dict[str, Any], options: Options, console: Console) -> None:
    about, load = found["machine"], found["load"]
    what = "forward and backward" if options.train else "forward"
    console.print(
        f"{about['processor']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}", highlight=False
    )
    console.print(
        f"{what} of {options.tokens} tokens of {options.width} through {options.top_k} of {options.experts} experts of "
        f"{options.hidden}, {options.dtype}, skew {options.skew:g}",
        highlight=False,
    )
    table = Table()
    table.add_column("")
    for name in ("median", "spread", "GF/s", "of torch's matmul", "tilewise is"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        times = "" if row["speedup"] is None else f"{row['speedup']:.2f}x as fast"
        table.add_row(
            row["name"], f"{row['milliseconds']:.3f} ms", f"{row['spread']:.0%}", f"{row['gflops']:.0f}",
            f"{row['matmul_share']:.0%}", times,
        )  # fmt: skip
    console.print(table)
    mean = sum(load["before"]) / len(load["before"])
    console.print(
        f"load: the busiest expert has {max(load['before']) / mean:.2f}x the mean; tiles of {load['tile']} rows pad "
        f"{load['padded_before']:.1%}, after rounding ({load['rule']}) {load['padded_after']:.1%}",
        highlight=False,
    )
    if about["load"] is not None and about["load"] > 0.5:
        console.print("other work was running: these times are not to be trusted", style="yellow", highlight=False)
    if options.plot is not None:
        console.print(f"picture: {options.plot}", highlight=False)
