"""``tilewise generate``: stream text, or compare plain with speculative generation."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tilewise.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from tilewise.hf.compare import Comparison
    from tilewise.hf.generate import Stats
    from tilewise.hf.models import Pair

__all__ = ["DEFAULT_PROMPT", "Options", "run"]

DEFAULT_PROMPT = 'class File:\n\n    def close(self):\n        """Close the file."""\n'
"""What to continue when nothing is given: the default pair has read the Python standard library."""

_DTYPES = ("float32", "float64", "bfloat16", "auto")


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names."""

    prompt: str | None
    model: str | None
    draft: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    draft_length: int
    confidence: float
    compare: bool
    repeat: int
    threads: int | None
    dtype: str
    as_json: bool

    def rules(self) -> dict[str, Any]:
        """What the decoder takes."""
        names = ("draft_length", "temperature", "top_p", "top_k", "seed", "confidence", "threads")
        return {name: getattr(self, name) for name in names}


def run(options: Options) -> int:
    """Do what the options say; returns the exit code: 1 if a greedy comparison finds a difference."""
    if options.dtype not in _DTYPES:
        raise ArgumentError(f"--dtype must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    if options.compare and options.draft == "none":
        raise ArgumentError("--compare needs a draft, and --draft none asks for none; leave out one of them")
    prompt = sys.stdin.read() if options.prompt == "-" else DEFAULT_PROMPT if options.prompt is None else options.prompt
    console = Console(stderr=True)
    pair = _load(options, console)
    tokens = pair.tokenizer.encode(prompt)
    if options.compare:
        return _compare(options, pair, prompt, tokens, console)
    return _generate(options, pair, prompt, tokens, console)


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
        draft = None if options.draft == "none" else options.draft
        target: Any = options.model
        if target is None and options.draft == "none":
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
    from tilewise.hf.generate import SpeculativeDecoder

    decoder = SpeculativeDecoder(pair.target, pair.draft, **options.rules())
    stream, made, parts = pair.tokenizer.stream(), [], []
    if not options.as_json:
        _write(prompt)
    for token in decoder.generate(tokens, options.max_new_tokens, stop_tokens=pair.stop_tokens):
        made.append(token)
        parts.append(stream.feed(token))
        if not options.as_json:
            _write(parts[-1])
    parts.append(stream.finish())
    if options.as_json:
        _print_json(options, pair, prompt, {"text": "".join(parts), "tokens": made, "stats": _numbers(decoder.stats)})
        return 0
    _write(parts[-1] + "\n")
    stats = decoder.stats
    summary = f"{stats.tokens} tokens, {stats.tokens_per_second:.0f} a second"
    if pair.draft is not None and stats.rounds:
        summary += f", {stats.tokens_per_round:.2f} a step of the target"
    console.print(summary, style="dim", highlight=False)
    return 0


def _compare(options: Options, pair: Pair, prompt: str, tokens: list[int], console: Console) -> int:
    from tilewise.hf.compare import compare

    stream = pair.tokenizer.stream()
    parts: list[str] = []
    bar = Progress(
        TextColumn("plain, for comparison"), BarColumn(), MofNCompleteColumn(), console=console, transient=True,
        disable=options.as_json,
    )  # fmt: skip
    task = bar.add_task("", total=options.max_new_tokens)

    def watch(kind: str, token: int) -> None:
        if kind == "plain":
            bar.advance(task)
            return
        if not parts:
            bar.stop()
            if not options.as_json:
                _write(prompt)
        parts.append(stream.feed(token))
        if not options.as_json:
            _write(parts[-1])

    with bar:
        result = compare(pair, tokens, options.max_new_tokens, repeat=options.repeat, watch=watch, **options.rules())
    parts.append(stream.finish())
    if options.as_json:
        found = {
            "text": "".join(parts), "tokens": result.speculative_tokens, "identical": result.identical,
            "first_difference": result.first_difference, "speedup": result.speedup,
            "plain": _numbers(result.plain), "speculative": _numbers(result.speculative),
        }  # fmt: skip
        _print_json(options, pair, prompt, found)
    else:
        _write(parts[-1] + "\n\n")
        _report(result, Console())
    return 1 if result.identical is False else 0


def _numbers(stats: Stats) -> dict[str, Any]:
    derived = ("drafted", "accepted", "tokens_per_second", "tokens_per_round", "acceptance_by_position")
    return asdict(stats) | {name: getattr(stats, name) for name in derived}


def _print_json(options: Options, pair: Pair, prompt: str, found: dict[str, Any]) -> None:
    settings = options.rules() | {"max_new_tokens": options.max_new_tokens, "dtype": str(pair.target.dtype)}
    models = {"target": pair.target_name, "draft": pair.draft_name}
    print(json.dumps({"prompt": prompt, "models": models, "settings": settings} | found))


def _report(result: Comparison, console: Console) -> None:
    plain, fast = result.plain, result.speculative
    table = Table()
    table.add_column("")
    for name in ("plain", "speculative"):
        table.add_column(name, justify="right")
    table.add_row("tokens", f"{plain.tokens}", f"{fast.tokens}")
    table.add_row("tokens a second", f"{plain.tokens_per_second:.1f}", f"{fast.tokens_per_second:.1f}")
    table.add_row("steps of the target", f"{plain.rounds}", f"{fast.rounds}")
    table.add_row("tokens a step", f"{plain.tokens_per_round:.2f}", f"{fast.tokens_per_round:.2f}")
    table.add_row("drafts accepted", "-", f"{fast.accepted} of {fast.drafted}")
    console.print(table)
    for place, (share, made) in enumerate(zip(fast.acceptance_by_position, fast.drafted_at, strict=True), start=1):
        bar = "\u2588" * round(20 * share)
        console.print(f"draft {place:<2} {bar:<20} {100 * share:3.0f} % of {made} accepted", highlight=False)
    console.print(f"speed-up: {result.speedup:.2f}x", highlight=False)
    if result.identical is None:
        console.print("identical: not expected (same law, other random numbers: compare with --temperature 0)")
    elif result.identical:
        console.print("identical: yes", highlight=False)
    else:
        console.print(
            f"identical: no (token {result.first_difference} differs: a near-tie of the target's logits fell the other "
            "way, or a bug; try --dtype float64)",
            highlight=False,
        )
