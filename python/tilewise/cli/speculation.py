"""``tilewise simulate ssd``: speculation in virtual time. ``tilewise plan``: what to run for what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tilewise.cli.pictures import check_picture
from tilewise.errors import ArgumentError
from tilewise.scheduler import Measurements, Simulation, Times, Toy, plan, simulate
from tilewise.scheduler.simulation import MODES
from tilewise.scheduler.sweeps import PAPER, SWEEPS, published, sweep

__all__ = ["Options", "PlanOptions", "run", "run_plan"]


@dataclass(frozen=True)
class Options:
    """The options of ``simulate ssd``, under their names."""

    target: str
    draft: str
    glue: float
    link: str
    acceptance: str
    fast_acceptance: str
    hit: float | None
    rank_curve: str
    draft_length: int
    budget: int
    fallback: str
    batch: int
    targets: int
    drafts: int
    adaptive: bool
    temperature: float | None
    saguaro: float
    tokens: int
    seeds: int
    sweep: str | None
    paper: bool
    plot: Path | None
    as_json: bool


def _numbers(name: str, text: str, least: int, most: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--{name}: expected numbers with commas between them, got {text!r}") from None
    if not least <= len(values) <= most:
        raise ArgumentError(f"--{name}: expected {least} to {most} numbers, got {len(values)}")
    return values


def _times(options: Options) -> Times:
    target = [*_numbers("target", options.target, 1, 3), 0.0, 0.0][:3]
    draft = [*_numbers("draft", options.draft, 1, 2), 0.0][:2]
    link = [*_numbers("link", options.link, 1, 2), 0.0][:2]
    return Times((target[0], target[1], target[2]), (draft[0], draft[1]), options.glue, (link[0], link[1]))


def _progress(options: Options) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=options.as_json)


def run(options: Options) -> int:
    """Simulate, print, draw; returns the exit code.

    Raises:
        MissingExtraError: a picture without matplotlib.
        ArgumentError: numbers that cannot be, or a picture in a format that matplotlib cannot write.
    """
    if options.sweep is not None and options.sweep not in SWEEPS:
        raise ArgumentError(f"--sweep: expected one of {', '.join(SWEEPS)}, got {options.sweep!r}")
    if options.fallback not in ("all", *MODES):
        raise ArgumentError(f"--fallback: expected all or one of {', '.join(MODES)}, got {options.fallback!r}")
    if options.plot is not None:
        check_picture(options.plot)
    if options.paper:
        return _paper(options)
    return _one(options) if options.sweep is None else _sweep(options)


def _toy(options: Options) -> Toy:
    temperature = 1.0 if options.temperature is None else options.temperature
    return Toy(vocabulary=64, error=0.7, temperature=temperature, saguaro=options.saguaro)


def _one(options: Options) -> int:
    modes = MODES if options.fallback == "all" else ("plain", "speculative", options.fallback)
    common: dict[str, Any] = {
        "times": _times(options), "draft_length": options.draft_length, "budget": options.budget,
        "batch": options.batch, "targets": options.targets, "drafts": options.drafts, "tokens": options.tokens,
        "acceptance": _numbers("acceptance", options.acceptance, 1, 1024),
        "fast_acceptance": _numbers("fast-acceptance", options.fast_acceptance, 1, 1024),
    }  # fmt: skip
    if options.temperature is not None:
        common["toy"] = _toy(options)
    elif options.hit is not None:
        common["hit"] = options.hit
    else:
        curve = _numbers("rank-curve", options.rank_curve, 1, 1024)
        common["rank_curve"] = curve[0] if len(curve) == 1 else curve
    found: dict[str, list[Simulation]] = {}
    with _progress(options) as bar:
        task = bar.add_task("simulating", total=len(set(modes)) * options.seeds)
        for mode in dict.fromkeys(modes):
            for seed in range(options.seeds):
                adaptive = options.adaptive and mode != "plain"
                run = simulate(mode, seed=seed, adaptive=adaptive, log=not seed, **common)  # type: ignore[arg-type]
                found.setdefault(mode, []).append(run)
                bar.advance(task)
    plain = sum(run.speed for run in found["plain"]) / options.seeds
    rows = []
    for mode, runs in found.items():
        speeds = sorted(run.speed / plain for run in runs)
        first = runs[0]
        rows.append(
            {
                "mode": mode,
                "over_plain": sum(speeds) / len(speeds),
                "range": [speeds[0], speeds[-1]],
                "hit_rate": first.hit_rate,
                "hit_rate_after_hit": first.hit_rate_after_hit,
                "hit_rate_after_miss": first.hit_rate_after_miss,
                "tokens_per_round": first.tokens_per_round,
                "histogram": first.histogram,
                "wait": first.wait,
                "discarded_per_token": first.discarded / first.tokens,
                "plans": first.plans,
            }
        )
    if options.plot is not None:
        from tilewise.plots import speculation

        mode = next((mode for mode in ("adaptive", "neural", "fast", "pearl", "speculative") if mode in found), "plain")
        rounds = [(logged.ended, row[2], row[4]) for logged in found[mode][0].log[:120] for row in logged.rows]
        speculation.timeline(rounds).figure.savefig(options.plot)  # type: ignore[union-attr]
    if options.as_json:
        print(json.dumps({"settings": _settings(options), "rows": rows}))
        return 0
    console = Console(highlight=False)
    console.print(f"simulated: {options.seeds} runs of {options.tokens} tokens of each; times in one unit")
    table = Table()
    table.add_column("")
    for name in ("over plain", "hit rate", "after hit", "after miss", "a round", "waits", "wasted"):
        table.add_column(name, justify="right")
    for row in rows:
        share = [
            f"{row[name]:.1%}" if row[name] is not None else ""
            for name in ("hit_rate", "hit_rate_after_hit", "hit_rate_after_miss")
        ]
        waits = sum(value for cause, value in row["wait"].items() if cause != "idle")
        table.add_row(
            row["mode"], f"{row['over_plain']:.3f}x", *share,
            f"{row['tokens_per_round']:.2f}", f"{waits / found[row['mode']][0].elapsed:.1%}",
            f"{row['discarded_per_token']:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "a round: tokens emitted in one; waits: of the target; wasted: tokens drafted in vain for each emitted"
    )
    return 0


def _settings(options: Options) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in ("plot", "as_json")}


def _sweep(options: Options) -> int:
    modes = (
        ("speculative", "neural", "fast", "adaptive")
        if options.fallback == "all"
        else ("speculative", options.fallback)
    )
    curve = _numbers("rank-curve", options.rank_curve, 1, 1024)
    toy = _toy(options)
    if options.temperature is None and options.sweep == "saguaro":
        toy = replace(toy, temperature=1.0)
    points = {"batch": 5, "temperature": 6, "fan-out": 8, "saguaro": 8}[str(options.sweep)]
    with _progress(options) as bar:
        task = bar.add_task("simulating", total=points * len(modes) * options.seeds)
        found = sweep(
            options.sweep,  # type: ignore[arg-type]
            times=_times(options),
            acceptance=_numbers("acceptance", options.acceptance, 1, 1024),
            rank_curve=curve[0] if len(curve) == 1 else curve,
            draft_length=options.draft_length,
            budget=options.budget,
            batch=options.batch,
            targets=options.targets,
            drafts=options.drafts,
            toy=toy,
            modes=modes,
            seeds=options.seeds,
            tokens=options.tokens,
            watch=lambda: bar.advance(task),
        ).as_dict()
    if options.plot is not None:
        from tilewise.plots import speculation

        speculation.sweep(found).figure.savefig(options.plot)  # type: ignore[union-attr]
    if options.as_json:
        print(json.dumps(found))
        return 0
    table = Table()
    for name in (str(options.sweep), "mode", "over plain", "95 % interval", "hit rate", "a round", "accepted"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in found["rows"]:
        table.add_row(
            f"{row['value']:g}", row["mode"], f"{row['over_plain']:.3f}x",
            f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
            "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}", f"{row['tokens_per_round']:.2f}",
            "" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
        )  # fmt: skip
    Console(highlight=False).print(table)
    return 0


def _paper(options: Options) -> int:
    with _progress(options) as bar:
        task = bar.add_task("simulating", total=2 * len(PAPER))
        rows = published(tokens=max(options.tokens, 40_000), watch=lambda: bar.advance(task))
    if options.as_json:
        print(json.dumps([asdict(row) | {"difference": row.difference} for row in rows]))
        return 0
    console = Console(highlight=False)
    console.print(
        "Tokens per second: published (Kumar, Dao, May 2026; batch 1, greedy) and simulated. "
        f"p = {rows[0].fitted['hit_rate']} is assumed, T and E are fitted to the published speeds, not measured: "
        "agreement says that formulas, simulator and table are consistent."
    )
    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("plain", "SD", "ours", "SSD", "ours", "T", "E", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        paper, ours, fitted = row.paper, row.ours, row.fitted
        table.add_row(
            row.name.replace("Llama 70B/1B", "Llama").replace("Qwen 32B/0.6B", "Qwen"), f"{paper['plain']:.1f}",
            f"{paper['speculative']:.1f}", f"{ours['speculative']:.1f}", f"{paper['ssd']:.1f}", f"{ours['ssd']:.1f}",
            f"{fitted['draft_time']:.2f}", f"{fitted['tokens_per_round']:.2f}",
            f"{row.difference:.1%}",
        )  # fmt: skip
    console.print(table)
    return 0


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``plan``, under their names."""

    measurements: Path | None
    target: str | None
    draft: str | None
    acceptance: str | None
    rank_curve: str | None
    glue: float | None
    link: float | None
    batch: int | None
    measure: bool
    model: str | None
    draft_model: str | None
    prompts: Path | None
    temperature: float
    save: Path | None
    most: int
    budget: int
    as_json: bool


def run_plan(options: PlanOptions) -> int:
    """Read, decide, print; returns the exit code.

    Raises:
        ArgumentError: a file that is no JSON object, or numbers that are missing or cannot be.
    """
    data: dict[str, Any] = {}
    if options.measure:
        from tilewise.cli.measure import measured

        if options.measurements is not None:
            raise ArgumentError("a file of measurements or --measure, not both")
        data = measured(options.model, options.draft_model, options.prompts, options.temperature, options.as_json)
    elif options.model is not None or options.draft_model is not None or options.prompts is not None:
        raise ArgumentError("--model, --draft-model and --prompts say what is measured: add --measure")
    if options.measurements is not None:
        try:
            data = json.loads(options.measurements.read_text())
        except (OSError, ValueError) as error:
            raise ArgumentError(f"measurements: cannot read {str(options.measurements)!r} as JSON: {error}") from error
        if not isinstance(data, dict):
            raise ArgumentError(f"measurements: expected a JSON object, got {type(data).__name__}")
    for name, text in (("target_seconds", options.target), ("draft_step_seconds", options.draft)):
        if text is not None:
            data[name] = _pairs(name.split("_")[0], text)
    if options.acceptance is not None:
        rates = _numbers("acceptance", options.acceptance, 1, 1024)
        if not all(0 <= rate <= 1 for rate in rates):
            raise ArgumentError(f"--acceptance: expected probabilities in [0, 1], got {options.acceptance!r}")
        reached, accepted, tried = 1e6, [], []
        for rate in rates:  # as exact as counts of a million rounds
            tried.append(reached)
            reached *= rate
            accepted.append(reached)
        data |= {"accepted": accepted, "tried": tried}
    if options.rank_curve is not None:
        data["rank_curve"] = _numbers("rank-curve", options.rank_curve, 1, 4096)
    for name, value in (("glue_seconds", options.glue), ("link_seconds", options.link), ("batch", options.batch)):
        if value is not None:
            data[name] = value
    if options.save is not None:
        try:
            options.save.write_text(json.dumps(data))
        except OSError as error:
            raise ArgumentError(f"--save: cannot write {str(options.save)!r}: {error}") from error
    found = plan(Measurements.of(data), most=options.most, budget=options.budget)
    if options.as_json:
        print(json.dumps(asdict(found)))
        return 0
    console = Console(highlight=False)
    what = {"plain": "plain decoding", "speculative": "speculative decoding", "ssd": "drafts made ahead (ssd)"}[
        found.mode
    ]
    console.print(f"[bold]{what}[/bold]: {found.reason}")
    table = Table(show_header=False)
    low, high = found.over_plain_interval
    rows = [("over plain decoding", f"{found.over_plain:.2f}x ({low:.2f} to {high:.2f})")]
    low, high = found.over_speculative_interval
    rows.append(("over the best speculative", f"{found.over_speculative:.2f}x ({low:.2f} to {high:.2f})"))
    rows.append(("tokens per second", f"{found.tokens_per_second:.1f}"))
    if found.mode != "plain":
        rows += [("draft length K", str(found.draft_length)), ("tokens per round", f"{found.tokens_per_round:.2f}")]
    if found.mode == "ssd":
        rows += [
            ("budget", f"{found.budget} branches"), ("fan-out", " ".join(map(str, found.fan_out))),
            ("fallback", str(found.fallback)), ("hit rate", f"{found.hit_rate:.1%}"),
            ("build over verification", f"{found.build_over_verify:.2f}"),
            ("critical batch size", f"{found.critical_batch:.1f}"),
        ]  # fmt: skip
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    return 0


def _pairs(name: str, text: str) -> dict[str, float]:
    try:
        return {size.strip(): float(seconds) for size, seconds in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise ArgumentError(
            f"--{name}: expected size:seconds with commas between them, as 1:0.05,8:0.06, got {text!r}"
        ) from None
