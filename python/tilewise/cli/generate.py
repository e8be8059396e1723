"""``tilewise generate``: stream text plainly, with a draft, or with drafts made ahead; or compare these ways.

:func:`run` checks that the options agree, loads the models, and streams (:func:`_generate`) or compares
(:func:`_compare`, whose report is :func:`_report`).
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tilewise.cli.pictures import check_picture
from tilewise.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from tilewise.hf.compare import Comparison
    from tilewise.hf.engine import EngineStats, RoundRecord, SpeculativeGenerator
    from tilewise.hf.generate import Stats
    from tilewise.hf.models import Pair

__all__ = ["DEFAULT_PROMPT", "MODES", "Options", "run"]

DEFAULT_PROMPT = 'class File:\n\n    def close(self):\n        """Close the file."""\n'
"""What to continue when nothing is given: the default pair has read the Python standard library."""

MODES = ("plain", "speculative", "ssd")
"""Ways to generate, each with what it adds to the one before: nothing, a draft, drafts made ahead."""

_DTYPES = ("float32", "float64", "bfloat16", "auto")
_FALLBACKS = ("adaptive", "neural", "fast")
_DRAFT_LENGTH = 8  # of speculative decoding; the engine has its own


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names."""

    prompt: str | None
    model: str | None
    draft: str | None
    mode: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    draft_length: int | None
    confidence: float
    budget: int | None
    fallback: str | None
    compare: bool
    repeat: int
    threads: int | None
    dtype: str
    plot: Path | None
    as_json: bool

    def sampling(self) -> dict[str, Any]:
        """What every mode takes."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "threads")}

    def speculative(self) -> dict[str, Any]:
        """What speculative decoding takes besides."""
        length = _DRAFT_LENGTH if self.draft_length is None else self.draft_length
        return {"draft_length": length, "confidence": self.confidence}

    def ssd(self) -> dict[str, Any]:
        """What the engine takes besides, where it was given; the rest is the engine's choice."""
        given = {name: getattr(self, name) for name in ("draft_length", "budget", "fallback")}
        return {name: value for name, value in given.items() if value is not None}


def run(options: Options) -> int:
    """Do what the options say; returns the exit code: 1 if a greedy comparison finds a difference.

    Raises:
        ArgumentError: options outside their range, or that contradict each other.
        MissingExtraError: no torch or transformers, or a picture without matplotlib.
    """
    if options.dtype not in _DTYPES:
        raise ArgumentError(f"--dtype must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    if options.fallback not in (None, *_FALLBACKS):
        raise ArgumentError(f"--fallback must be one of {', '.join(_FALLBACKS)}, got {options.fallback!r}")
    options = replace(options, mode=_mode(options))
    if options.plot is not None:
        check_picture(options.plot)
    prompt = sys.stdin.read() if options.prompt == "-" else DEFAULT_PROMPT if options.prompt is None else options.prompt
    console = Console(stderr=True)
    pair = _load(options, console)
    tokens = pair.tokenizer.encode(prompt)
    if options.compare:
        return _compare(options, pair, prompt, tokens, console)
    return _generate(options, pair, prompt, tokens, console)


def _mode(options: Options) -> str:
    """The mode that is asked for, or that there are models for."""
    mode = options.mode
    if mode not in (None, *MODES):
        raise ArgumentError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    without = None  # why there is no draft
    if options.draft == "none":
        without = "--draft none asks for none; leave out one of them"
    elif options.draft is None and options.model is not None:
        without = f"--model {options.model} comes without one; name one with --draft"
    if mode is None:
        mode = "speculative" if without is None else "plain"
        if options.compare and without is not None:
            raise ArgumentError(f"--compare needs a draft, and {without}")
    elif mode != "plain" and without is not None:
        raise ArgumentError(f"--mode {mode} needs a draft, and {without}")
    elif mode == "plain" and options.compare:
        raise ArgumentError(
            "--compare shows a mode beside plain generation, and --mode plain is that; choose --mode speculative or ssd"
        )
    if mode != "ssd":
        for name in ("budget", "fallback", "plot"):
            if getattr(options, name) is not None:
                raise ArgumentError(
                    f"--{name} is of drafts made ahead, and the mode is {mode}; add --mode ssd, or leave it out"
                )
    return mode


def _load(options: Options, console: Console) -> Pair:
    with nullcontext() if options.as_json else console.status("loading torch and the models"):
        try:
            import torch
            import transformers

            from tilewise import _core
            from tilewise.hf.models import load_pair
        except ImportError as error:
            raise MissingExtraError(
                f"tilewise generate needs torch and transformers ({error}): pip install 'tilewise[hf]'"
            ) from error
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        alone = options.mode == "plain"
        draft = None if alone else options.draft
        target: Any = options.model
        if target is None and alone:  # without a name, the default target brings its draft
            from tilewise.hf.models import DEFAULT_TARGET as target
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        if options.threads is not None:
            _core.set_num_threads(options.threads)
        return load_pair(target, draft, dtype)


def _write(text: str) -> None:
    # Text of a model may hold anything; what the terminal cannot show must not end the generation.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _generate(options: Options, pair: Pair, prompt: str, tokens: list[int], console: Console) -> int:
    stats: Stats | EngineStats
    hits, records = "", None
    if options.mode == "ssd":
        with _engine(options, pair, console) as generator:
            parts = generator.stream([tokens], options.max_new_tokens, stop_tokens=pair.stop_tokens)
            made, text = _stream(options, pair, prompt, (token for _, new in parts for token in new))
        stats, records = generator.stats, generator.stats.records
        hits = f", {stats.hit_rate:.0%} of the rounds drafted ahead"
    else:
        from tilewise.hf.generate import SpeculativeDecoder

        rules = options.sampling() | (options.speculative() if options.mode == "speculative" else {})
        decoder = SpeculativeDecoder(pair.target, pair.draft, **rules)
        new = decoder.generate(tokens, options.max_new_tokens, stop_tokens=pair.stop_tokens)
        made, text = _stream(options, pair, prompt, new)
        stats = decoder.stats
    if options.as_json:
        _print_json(options, pair, prompt, {"text": text, "tokens": made, "stats": _numbers(stats)})
    else:
        summary = f"{stats.tokens} tokens, {stats.tokens_per_second:.0f} a second"
        if pair.draft is not None and stats.rounds:
            summary += f", {stats.tokens_per_round:.2f} a step of the target{hits}"
        console.print(summary, style="dim", highlight=False)
    if options.plot is not None and records is not None:
        _draw(options.plot, records)
    return 0


@contextmanager
def _engine(options: Options, pair: Pair, console: Console) -> Iterator[SpeculativeGenerator]:
    from tilewise.hf.engine import SpeculativeGenerator

    rules = options.sampling() | options.ssd()
    with SpeculativeGenerator(pair.target, pair.draft, tokenizer=pair.tokenizer, **rules) as generator:
        with nullcontext() if options.as_json else console.status("starting the draft's process"):
            ready = generator.wait_until_ready()
        if not ready:  # the output is the same, only slower
            console.print("the draft's process did not start: look-ups in the text draft instead", style="yellow")
        yield generator


def _stream(options: Options, pair: Pair, prompt: str, tokens: Iterable[int]) -> tuple[list[int], str]:
    """Shows prompt and tokens as they come; returns the tokens and their text."""
    stream, made, parts = pair.tokenizer.stream(), [], []
    if not options.as_json:
        _write(prompt)
    for token in tokens:
        made.append(token)
        parts.append(stream.feed(token))
        if not options.as_json:
            _write(parts[-1])
    parts.append(stream.finish())
    if not options.as_json:
        _write(parts[-1] + "\n")
    return made, "".join(parts)


def _draw(place: Path, records: Sequence[RoundRecord]) -> None:
    from tilewise.plots import speculation

    if not records:
        raise ArgumentError(
            "--plot: nothing to draw, the text ended before its first round; ask for more with --max-new-tokens"
        )
    began = records[0].time - records[0].seconds
    axes = speculation.timeline((each.time - began, each.source, each.accepted) for each in records)
    axes.set_xlabel("seconds")
    axes.figure.savefig(place)  # type: ignore[union-attr]


def _compare(options: Options, pair: Pair, prompt: str, tokens: list[int], console: Console) -> int:
    from tilewise.hf.compare import compare
    from tilewise.hf.engine import EngineStats

    mode = str(options.mode)
    stream = pair.tokenizer.stream()
    parts: list[str] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True,
        disable=options.as_json,
    )  # fmt: skip
    tasks = {
        name: bar.add_task(f"{name}, for comparison", total=options.max_new_tokens) for name in MODES if name != mode
    }

    def watch(name: str, token: int) -> None:
        if name != mode:
            bar.advance(tasks[name])
            return
        if not parts:
            bar.stop()
            if not options.as_json:
                _write(prompt)
        parts.append(stream.feed(token))
        if not options.as_json:
            _write(parts[-1])

    with bar:
        result = compare(
            pair, tokens, options.max_new_tokens, ssd=options.ssd() if mode == "ssd" else None, repeat=options.repeat,
            watch=watch, **options.sampling(), **options.speculative(),
        )  # fmt: skip
    parts.append(stream.finish())
    if options.as_json:
        figures = ("identical", "first_difference", "speedup")
        chosen = {name: getattr(result, name)(mode) for name in figures}
        each = {way: {name: getattr(result, name)(way) for name in figures} for way in result.modes}
        numbers = {way: _numbers(result.median(way).stats) for way in result.modes}
        found = {"text": "".join(parts), "tokens": result.median(mode).tokens} | chosen | numbers | {"modes": each}
        _print_json(options, pair, prompt, found)
    else:
        _write(parts[-1] + "\n\n")
        _report(result, mode, Console())
    stats = result.median(mode).stats
    if options.plot is not None and isinstance(stats, EngineStats):
        _draw(options.plot, stats.records)
    return 1 if result.different else 0


def _numbers(stats: Stats | EngineStats) -> dict[str, Any]:
    from tilewise.hf.engine import EngineStats

    if isinstance(stats, EngineStats):
        return stats.stats()
    derived = ("drafted", "accepted", "tokens_per_second", "tokens_per_round", "acceptance_by_position")
    return asdict(stats) | {name: getattr(stats, name) for name in derived}


def _print_json(options: Options, pair: Pair, prompt: str, found: dict[str, Any]) -> None:
    settings = options.sampling() | {"max_new_tokens": options.max_new_tokens, "dtype": str(pair.target.dtype)}
    if options.mode == "speculative" or options.compare:
        settings |= options.speculative()
    if options.mode == "ssd":
        from tilewise.hf.engine import SpeculativeGenerator

        taken = inspect.signature(SpeculativeGenerator).parameters
        own = {name: taken[name].default for name in ("draft_length", "budget", "fallback")}
        settings["ssd"] = own | options.ssd()
    models = {"target": pair.target_name, "draft": pair.draft_name}
    print(json.dumps({"prompt": prompt, "models": models, "mode": options.mode, "settings": settings} | found))


_SOURCES = {
    "drafted ahead (hits)": "cached", "drafted on a miss": "drafted", "looked up": "fast", "without a draft": "none",
}  # fmt: skip
_ROWS = (
    "tokens", "tokens a second", "over plain", "steps of the target", "tokens a step", "drafts accepted", *_SOURCES,
    "waited for drafts", "drafts lost",
)  # fmt: skip


def _figures(stats: Stats | EngineStats, speedup: float) -> dict[str, str]:
    """The figures of one way for the table, by their row; what a way has not is not there."""
    from tilewise.hf.engine import EngineStats

    found = {
        "tokens": f"{stats.tokens}",
        "tokens a second": f"{stats.tokens_per_second:.1f}",
        "over plain": f"{speedup:.2f}x",
        "steps of the target": f"{stats.rounds}",
        "tokens a step": f"{stats.tokens_per_round:.2f}",
    }
    if isinstance(stats, EngineStats):
        for row, source in _SOURCES.items():
            rounds = sum(stats.accepted.get(source, ()))
            found[row] = f"{rounds / stats.rounds:.0%} of steps" if stats.rounds else "-"
        found["waited for drafts"] = f"{stats.wait_seconds / stats.seconds:.0%} of the time"
        if stats.lost_workers:  # then the figures are not those of drafts made ahead
            found["drafts lost"] = f"{stats.lost_workers}"
    elif stats.drafted:
        found["drafts accepted"] = f"{stats.accepted} of {stats.drafted}"
    return found


def _report(result: Comparison, mode: str, console: Console) -> None:
    from tilewise.hf.engine import EngineStats

    columns = [_figures(result.median(way).stats, result.speedup(way)) for way in result.modes]
    table = Table()
    table.add_column("")
    for way in result.modes:
        table.add_column(way, justify="right")
    for row in _ROWS:
        if any(row in column for column in columns):
            table.add_row(row, *(column.get(row, "-") for column in columns))
    console.print(table)
    stats = result.median(mode).stats
    if isinstance(stats, EngineStats):
        accepted = [sum(counts) for counts in zip_longest(*stats.accepted.values(), fillvalue=0)]
        for length, count in enumerate(accepted):
            share = count / stats.rounds
            console.print(f"accepted {length:<2} {_bar(share)} {share:4.0%} of {stats.rounds} steps", highlight=False)
    else:
        for place, (share, made) in enumerate(
            zip(stats.acceptance_by_position, stats.drafted_at, strict=True), start=1
        ):
            console.print(f"draft {place:<2} {_bar(share)} {share:4.0%} of {made} accepted", highlight=False)
    console.print(f"speed-up: {result.speedup(mode):.2f}x", highlight=False)
    for way in result.different:
        console.print(
            f"identical: no (token {result.first_difference(way)} of {way} differs: a near-tie of the target's logits "
            "fell the other way, or a bug; try --dtype float64)",
            highlight=False,
        )
    if result.identical(mode) is None:
        console.print("identical: not expected (same law, other random numbers: compare with --temperature 0)")
    elif not result.different:
        console.print("identical: yes", highlight=False)


def _bar(share: float) -> str:
    return ("\u2588" * round(20 * share)).ljust(20)
