"""tilewise beside its peers, in one process, with the same threads, interleaved: `make bench`.

    python -m benches.side_by_side [--only flex moe ...] [--rounds 7] [--dtypes float32 bfloat16] [--no-record]

Every pair is compared before it is timed: a fast wrong answer is not a result. Prints a table and writes it, with all
timings, to benches/record/.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import cases
from .attention import attention, attention_training, decode, flex
from .comparison import OURS, Comparison
from .harness import Timing, interleave, machine, memory_reader, speedup

RECORD = Path(__file__).resolve().parent / "record"
INT8 = "tilewise int8"
# Measured in the same rounds, to say what a result is worth on this machine at that moment.
READ, MATMUL = "memory read", "torch 2048^3"
# Closeness of two implementations of one thing, in parts of the largest value: generous, the tests are the proof.
CLOSE = {"float32": 1e-4, "bfloat16": 4e-2}
CLOSE_INT8 = 5e-2


def _expert_loop(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """An expert at a time, as models are written; parameters unbound once, so that a gradient is made of slices."""
    import torch

    functional = torch.nn.functional
    out = torch.zeros_like(x)
    used = torch.unique(ids).tolist()
    ups, downs = gate_up.unbind(0), down.unbind(0)
    for expert in used:
        token, slot = torch.where(ids == expert)
        gate, up = functional.linear(x[token], ups[expert]).chunk(2, -1)
        rows = functional.linear(functional.silu(gate) * up, downs[expert]) * weights[token, slot, None].to(x.dtype)
        out = out.index_add(0, token, rows)
    return out


def _grouped(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """torch's grouped_mm over sorted rows."""
    import torch

    functional = torch.nn.functional
    flat = ids.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).to(torch.int32)
    token = order // ids.shape[1]
    hidden = functional.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, -1)
    rows = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, rows)


def _routing(case: cases.Moe) -> tuple[Any, Any]:
    """Expert ids and weights; a Zipf law puts ``1 / rank^s`` of the draws on an expert, without repeats in a token."""
    import torch

    import tilewise.torch as twt

    law = -case.zipf * torch.arange(1, case.experts + 1).log()
    # The K largest of log-probabilities with Gumbel noise are K draws without replacement.
    noise = -torch.empty(case.tokens, case.experts).exponential_().log()
    return twt.moe.route(law + noise, case.top_k)


def _problem(case: cases.Moe, dtype: str) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x = torch.randn(case.tokens, case.width).to(kind)
    gate_up = (torch.randn(case.experts, 2 * case.hidden, case.width) / case.width**0.5).to(kind)
    down = (torch.randn(case.experts, case.width, case.hidden) / case.hidden**0.5).to(kind)
    return x, gate_up, down


def moe(dtype: str) -> Iterator[Comparison]:
    """Ours, a loop over experts, and torch's grouped_mm, all from the same routing."""
    import torch

    import tilewise.torch as twt

    for case in cases.MOE:
        x, gate_up, down = _problem(case, dtype)
        # Every step of a decoder goes to other experts: with one routing the weights would stay in the cache.
        routings = [_routing(case) for _ in range(8 if case.tokens <= 16 else 1)]
        layers = {OURS: twt.moe.experts, "expert loop": _expert_loop, "grouped_mm": _grouped}
        functions = {name: _turns(layer, x, routings, gate_up, down) for name, layer in layers.items()}
        size = None
        if case.tokens <= 16:
            q = twt.moe.quantise_experts(gate_up, down)
            layer = functools.partial(twt.moe.experts, gate_up_scale=q.gate_up_scale, down_scale=q.down_scale)
            functions[INT8] = _turns(layer, x, routings, q.gate_up, q.down)
            used = sum(len(torch.unique(ids)) for ids, _ in routings) / len(routings)
            size = round(used * 3 * case.width * case.hidden * x.element_size())
        yield Comparison("moe", case, dtype, functions, size)
        del x, gate_up, down, functions


def _turns(layer: Callable[..., Any], x: Any, routings: list[Any], *weights: Any) -> Callable[[], Any]:
    """The layer on one routing after the other."""
    turn = itertools.cycle(routings)
    return lambda: layer(x, *next(turn), *weights)


def moe_training(dtype: str) -> Iterator[Comparison]:
    """As :func:`moe`, forward and backward: gradients of the tokens, the routing weights and both expert weights."""
    import torch

    import tilewise.torch as twt

    for case in cases.MOE_TRAINING:
        x, gate_up, down = _problem(case, dtype)
        ids, weights = _routing(case)
        leaves = [tensor.requires_grad_() for tensor in (x, weights, gate_up, down)]
        grad = torch.randn(x.shape).to(x.dtype)

        def step(layer: Any, i: Any = ids, leaves: Any = leaves, grad: Any = grad) -> Any:
            x, w, u, d = leaves
            with torch.enable_grad():
                out = layer(x, i, w, u, d)
                return torch.cat([g.flatten()[:4096].float() for g in torch.autograd.grad(out, leaves, grad)])

        layers = {OURS: twt.moe.experts, "expert loop": _expert_loop, "grouped_mm": _grouped}
        functions = {name: functools.partial(step, layer) for name, layer in layers.items()}
        yield Comparison("moe_training", case, dtype, functions)
        del x, gate_up, down, leaves, functions


def gemm(dtype: str) -> Iterator[Comparison]:
    """Ours and torch.matmul, against a weight stored as torch.nn.Linear stores it."""
    import torch

    import tilewise.torch as twt

    for case in cases.GEMM:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        a, weight = torch.randn(case.m, case.k).to(kind), torch.randn(case.n, case.k).to(kind)

        def ours(a: Any = a, b: Any = weight) -> Any:
            return twt.matmul(a, b.T)

        def theirs(a: Any = a, b: Any = weight) -> Any:
            return torch.matmul(a, b.T)

        size = weight.numel() * weight.element_size() if case.m <= 16 else None
        yield Comparison("gemm", case, dtype, {OURS: ours, "torch.matmul": theirs}, size)


ROOMS: dict[str, Callable[[str], Iterator[Comparison]]] = {
    "attention": attention,
    "attention_training": attention_training,
    "flex": flex,
    "decode": decode,
    "moe": moe,
    "moe_training": moe_training,
    "gemm": gemm,
}


def check(comparison: Comparison) -> None:
    """Stops where two functions of one comparison do not agree."""
    results = {name: function().double() for name, function in comparison.functions.items()}
    ours = results.pop(OURS)
    for name, theirs in results.items():
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= (CLOSE_INT8 if name == INT8 else CLOSE[comparison.dtype]):
            sys.exit(
                f"{comparison.case.name} in {comparison.dtype}: {OURS} and {name} differ by {error:.1e} (relative)"
            )


def _yardsticks(comparison: Comparison, threads: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is timed beside a comparison, with the bytes or flops of one call."""
    import torch

    found: dict[str, tuple[Callable[[], Any], float]] = {}
    if comparison.bytes_read is not None:
        found[READ] = memory_reader(threads)
    elif comparison.room.startswith("moe"):
        kind = getattr(torch, comparison.dtype)
        a, b = torch.randn(2048, 2048).to(kind), torch.randn(2048, 2048).to(kind)
        found[MATMUL] = (lambda: torch.matmul(a, b), 2.0 * 2048**3)
    return found


def _share(amount: float, timing: Timing, unit: float, yardstick: Timing) -> float:
    """Rate against the yardstick's: the median over rounds of the ratio within a round."""
    rates = zip(timing.seconds, yardstick.seconds, strict=True)
    return statistics.median((amount / mine) / (unit / other) for mine, other in rates)


def measure(comparison: Comparison, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table, one a function; `speedup` is ours against that peer."""
    check(comparison)
    yardsticks = _yardsticks(comparison, threads)
    timings: dict[str, Timing] = interleave(
        comparison.functions | {name: function for name, (function, _) in yardsticks.items()}, rounds
    )
    ours = timings[OURS]
    rows = []
    for name, timing in timings.items():
        row = {
            "room": comparison.room,
            "case": comparison.case.name,
            "dtype": comparison.dtype,
            "name": name,
            "milliseconds": timing.median * 1e3,
            "spread": timing.spread,
            "gflops": comparison.case.flops / timing.median / 1e9,
            "gigabytes": None,
            "bandwidth_share": None,
            "matmul_share": None,
            "speedup": None if name == OURS else speedup(ours, timing),
            "seconds": timing.seconds,
        }
        if name in yardsticks:
            amount = yardsticks[name][1]
            row |= {"speedup": None, "gflops": None}
            row["gflops" if name == MATMUL else "gigabytes"] = amount / timing.median / 1e9
        elif READ in yardsticks and comparison.bytes_read is not None:
            size = comparison.bytes_read
            if name == INT8:  # a byte an element; the scales are few
                size = size // (4 if comparison.dtype == "float32" else 2)
            row["bandwidth_share"] = _share(size, timing, yardsticks[READ][1], timings[READ])
        elif MATMUL in yardsticks:
            row["matmul_share"] = _share(comparison.case.flops, timing, yardsticks[MATMUL][1], timings[MATMUL])
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results in Markdown, with what they were measured on."""
    busy = ""
    if about["load"] is not None and about["load"] > 0.5:
        busy = (
            " **Other work was running: threads that wait for each other suffer most, so these ratios do not count.**"
        )
    lines = [
        f"{about['processor']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}, "
        f"{about['rounds']} rounds, "
        f"load {about['load'] or 0:.1f}; commit {about['commit']}.{busy}",
        "",
        "| case | dtype | | median | spread | rate | share of memory read / torch matmul | tilewise is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        known = [share for share in (row["bandwidth_share"], row["matmul_share"]) if share is not None]
        share = f"{known[0]:.0%}" if known else ""
        times = "" if row["speedup"] is None else f"{row['speedup']:.2f}x as fast"
        rate = f"{row['gigabytes']:.1f} GB/s" if row["gigabytes"] is not None else f"{row['gflops']:.0f} GF/s"
        lines.append(
            f"| {row['case']} | {row['dtype']} | {row['name']} | {row['milliseconds']:.3f} ms | {row['spread']:.0%} "
            f"| {rate} | {share} | {times} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROOMS, default=list(ROOMS), help="rooms to measure")
    parser.add_argument("--dtypes", nargs="+", choices=cases.DTYPES, default=list(cases.DTYPES))
    parser.add_argument("--case", default="", help="measure the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each function")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()

    import torch

    from tilewise import _core

    torch.set_grad_enabled(False)
    torch.set_num_threads(_core.num_threads())
    about = machine() | {"torch": torch.__version__, "rounds": arguments.rounds}
    rows: list[dict[str, Any]] = []
    for room in arguments.only:
        for dtype in arguments.dtypes:
            for comparison in ROOMS[room](dtype):
                if arguments.case not in comparison.case.name:
                    continue
                print(f"{comparison.case.name} {dtype} ...", file=sys.stderr, flush=True)
                rows += measure(comparison, arguments.rounds, _core.num_threads())
    text = table(rows, about)
    print(text)
    if not arguments.no_record:
        RECORD.mkdir(exist_ok=True)
        day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        stem = RECORD / f"{day}-{about['isa']}-{about['threads']}threads"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        print(f"written to {stem}.md and .json", file=sys.stderr)


if __name__ == "__main__":
    main()
