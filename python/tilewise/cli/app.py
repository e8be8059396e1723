"""The commands and their options; what they do is in the modules of their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import tilewise
from tilewise.errors import TilewiseError

__all__ = ["app"]

app = typer.Typer(
    name="tilewise",
    help="The primitives that make sparse language models fast, on any CPU and NVIDIA GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tilewise {tilewise.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _reported(command: Callable[..., int]) -> Callable[..., None]:
    """Errors that tilewise raises on purpose carry their whole message: show that, and no traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except TilewiseError as error:
            typer.echo(f"error: {error}", err=True)
            code = 1
        if code:
            raise typer.Exit(code)

    return wrapped


@app.command()
@_reported
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; '-' reads it from standard input.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or cached repository of the model; the default pair if not given."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Directory or cached repository of its draft; 'none' generates plainly.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="plain (no draft), speculative (draft, then verify), or ssd (drafts made ahead, in a process of "
            "their own). Speculative where there is a draft, if not given."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="How many tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy, 1 the model's own law.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep this many tokens; 0 keeps all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    draft_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to draft in a round; 8, or the engine's own for ssd.")
    ] = None,
    confidence: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="speculative: end a draft that is less probable than this; 0 never does."),
    ] = 0.3,
    budget: Annotated[
        int | None, typer.Option(min=0, help="ssd: most outcomes to guess in a round; the engine's own if not given.")
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="ssd: after an outcome that was not guessed: adaptive (the default), neural or fast."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also generate plainly (and, for ssd, speculatively); report speed and identity."
        ),
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="With --compare: runs of each; the median counts.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads for torch and tilewise. By default torch gets one for small models."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, float64, bfloat16, or auto (what the checkpoint has).")
    ] = "float32",
    plot: Annotated[
        Path | None, typer.Option(help="ssd: write a picture of what each round accepted, and which were hits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Continue a text, with a draft model where there is one. Text goes to standard output as it comes."""
    from tilewise.cli.generate import Options, run

    return run(
        Options(
            prompt=prompt,
            model=model,
            draft=draft,
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            draft_length=draft_length,
            confidence=confidence,
            budget=budget,
            fallback=fallback,
            compare=compare,
            repeat=repeat,
            threads=threads,
            dtype=dtype,
            plot=plot,
            as_json=as_json,
        )
    )


@app.command()
@_reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything installed does not work.")] = False,
) -> int:
    """Describe this installation in one block to paste: versions, instruction sets, threads, optional parts."""
    from tilewise.cli.doctor import run

    return run(as_json=as_json, strict=strict)


bench = typer.Typer(help="Measure on this machine, beside torch.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("moe")
@_reported
def bench_moe(
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 2048,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 1024,
    hidden: Annotated[int, typer.Option(help="Hidden size of an expert.")] = 512,
    experts: Annotated[int, typer.Option(help="Experts.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    skew: Annotated[
        float, typer.Option(min=0.0, help="Exponent of Zipf's law over the experts; 0 is uniform, 1.2 is steep.")
    ] = 0.0,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward, all gradients.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each; the median counts.")] = 7,
    tile: Annotated[int, typer.Option(min=1, help="Rows of a tile, for token rounding.")] = 128,
    rule: Annotated[str, typer.Option(help="Rule of token rounding.")] = "nearest",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and tilewise.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture: times, load before and after rounding, padding.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """The expert layer: tilewise, a loop over experts, and torch's grouped_mm, interleaved and compared."""
    from tilewise.cli.bench import Options, run

    return run(
        Options(
            tokens=tokens,
            width=width,
            hidden=hidden,
            experts=experts,
            top_k=top_k,
            dtype=dtype,
            skew=skew,
            train=train,
            rounds=rounds,
            tile=tile,
            rule=rule,
            threads=threads,
            plot=plot,
            as_json=as_json,
        )
    )


mask = typer.Typer(
    help="Masks and score mods by name: what they keep, and what blocks they visit.", no_args_is_help=True
)
app.add_typer(mask, name="mask")


@mask.command("list")
@_reported
def mask_list(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False) -> int:
    """Every mask and mod of the catalogue, with its rule."""
    from tilewise.cli.masks import run_list

    return run_list(as_json=as_json)


@mask.command("show")
@_reported
def mask_show(
    name: Annotated[str, typer.Argument(help="Of a mask or a mod; `tilewise mask list` shows all.")],
    queries: Annotated[int | None, typer.Option(min=1, help="How many; the example's own if not given.")] = None,
    keys: Annotated[int | None, typer.Option(min=1, help="How many; the example's own if not given.")] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Queries and keys of a block.")] = None,
    head: Annotated[int, typer.Option(min=0, help="Which head to draw.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Draw a mask: elements, block schedule (empty, partial, full) and sparsity; or what a mod adds where."""
    from tilewise.cli.masks import Options, run_show

    return run_show(Options(name, queries, keys, block, head, plot, as_json))


simulate = typer.Typer(help="Schedulers in virtual time, and what they save.", no_args_is_help=True)
app.add_typer(simulate, name="simulate")


@simulate.command("confidence")
@_reported
def simulate_confidence(
    seeds: Annotated[int, typer.Option(min=1, help="Independent worlds; intervals are over them.")] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Questions of a seed.")] = 60,
    traces: Annotated[int, typer.Option(min=1, help="Traces of a question at most: the budget.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens of a confidence group.")] = 256,
    warmup: Annotated[int, typer.Option(min=1, help="Traces that run to their end first.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Traces that run at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a typical trace.")] = 1200,
    gap: Annotated[
        float, typer.Option(min=0.0, help="How much confidence tells of a trace's reliability; 0 is nothing.")
    ] = 6.0,
    difficulty: Annotated[float, typer.Option(help="Mean reliability of a trace, in (0, 1).")] = 0.55,
    against: Annotated[str, typer.Option(help="The policy that all are compared with.")] = "majority",
    plot: Annotated[Path | None, typer.Option(help="Write a picture: policies, traces, a vote.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Reasoning traces of known reliability: votes, early stopping, accuracy and tokens with intervals."""
    from tilewise.cli.confidence import Options, run

    return run(
        Options(seeds, questions, traces, window, warmup, slots, tokens, gap, difficulty, against, plot, as_json)
    )


@simulate.command("planning")
@_reported
def simulate_planning(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds; intervals are over them.")] = 20,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of a seed, one after another.")] = 312,
    most: Annotated[int, typer.Option(min=2, help="Largest fixed k.")] = 10,
    calls: Annotated[
        int | None, typer.Option(min=1, help="Most calls in flight; without a limit if not given.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: cost over time, and one episode.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Speculative planning of agents: fixed and predicted k, time and cost, beside the published figures."""
    from tilewise.cli.planning import Options, run

    return run(Options(seeds, tasks, most, calls, plot, as_json))


@simulate.command("ssd")
@_reported
def simulate_ssd(
    target: Annotated[
        str, typer.Option(help="Time of a verification: t0,t1,t2 for t0 + t1 tokens + t2 rows.")
    ] = "1,0,0",
    draft: Annotated[str, typer.Option(help="Time of a draft step: d0,d1 for d0 + d1 branches.")] = "0.07,0.001",
    glue: Annotated[float, typer.Option(min=0.0, help="Time of the draft's forward over a chain.")] = 0.07,
    link: Annotated[str, typer.Option(help="Time of a message, and of a drafted token in it.")] = "0",
    acceptance: Annotated[str, typer.Option(help="Acceptance of drafted tokens: one number, or one a place.")] = "0.8",
    fast_acceptance: Annotated[str, typer.Option(help="The same of fast drafts.")] = "0",
    hit: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Hits with this probability, instead of ranks.")
    ] = None,
    rank_curve: Annotated[
        str, typer.Option(help="Exponent r (F guesses miss with F^-r), or hit rates of 1, 2, ... guesses.")
    ] = "1.5",
    draft_length: Annotated[int, typer.Option(min=0, help="Tokens of a chain (K).")] = 7,
    budget: Annotated[int, typer.Option(min=0, help="Branches of a build.")] = 24,
    fallback: Annotated[
        str, typer.Option(help="all, or one of plain, speculative, neural, fast, adaptive, pearl.")
    ] = "all",
    batch: Annotated[int, typer.Option(min=1, help="Streams of a target.")] = 1,
    targets: Annotated[int, typer.Option(min=1, help="Target devices, each with its own streams.")] = 1,
    drafts: Annotated[int, typer.Option(min=0, help="Draft devices of all targets.")] = 1,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Chain length and budget are chosen from measured times.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Toy models at this temperature, drafted and verified for real.")
    ] = None,
    saguaro: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Weight C of the draft's best guesses (toy models).")
    ] = 1.0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a run.")] = 8000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    sweep: Annotated[str | None, typer.Option(help="Over batch, temperature, fan-out or saguaro.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The published table beside simulations with fitted parameters.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: of a sweep, or of the rounds of a run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> int:
    """Speculative decoding with drafts made ahead, in virtual time: speed-ups, hit rates, waits."""
    from tilewise.cli.speculation import Options, run

    return run(
        Options(
            target=target,
            draft=draft,
            glue=glue,
            link=link,
            acceptance=acceptance,
            fast_acceptance=fast_acceptance,
            hit=hit,
            rank_curve=rank_curve,
            draft_length=draft_length,
            budget=budget,
            fallback=fallback,
            batch=batch,
            targets=targets,
            drafts=drafts,
            adaptive=adaptive,
            temperature=temperature,
            saguaro=saguaro,
            tokens=tokens,
            seeds=seeds,
            sweep=sweep,
            paper=paper,
            plot=plot,
            as_json=as_json,
        )
    )


@app.command()
@_reported
def plan(
    measurements: Annotated[
        Path | None, typer.Argument(help="JSON file of what was measured (tilewise.scheduler.plans has the format).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Seconds of a verification by tokens a row: 1:0.05,8:0.06.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Seconds of a draft step by branches: 1:0.004,24:0.006.")] = None,
    acceptance: Annotated[str | None, typer.Option(help="Acceptance of drafted tokens by place: 0.8,0.78.")] = None,
    rank_curve: Annotated[
        str | None, typer.Option(help="P(the follow-up is among the 1, 2, ... best guesses): 0.5,0.65,0.72.")
    ] = None,
    glue: Annotated[float | None, typer.Option(min=0.0, help="Seconds of the draft's forward over a chain.")] = None,
    link: Annotated[float | None, typer.Option(min=0.0, help="Seconds of a request and its answer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows verified together.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a pair here and measure it; options above overrule what is found.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --measure: the target; the default pair if not given.")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="With --measure: the target's draft.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="With --measure: a file of prompts, two empty lines between them.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="With --measure: of the sampling; 0 is greedy.")] = 0.0,
    save: Annotated[Path | None, typer.Option(help="Write the measurements to this file, as JSON.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Longest chain to consider.")] = 16,
    budget: Annotated[int, typer.Option(min=1, help="Most branches to consider.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """What to run for measured times and acceptance: plain, speculative or ssd, how, and what to expect of it."""
    from tilewise.cli.speculation import PlanOptions, run_plan

    return run_plan(
        PlanOptions(
            measurements=measurements,
            target=target,
            draft=draft,
            acceptance=acceptance,
            rank_curve=rank_curve,
            glue=glue,
            link=link,
            batch=batch,
            measure=measure,
            model=model,
            draft_model=draft_model,
            prompts=prompts,
            temperature=temperature,
            save=save,
            most=most,
            budget=budget,
            as_json=as_json,
        )
    )
