"""Times tilewise's CUDA kernels beside torch on the GPU of this machine, and writes one JSON file.

    python3 scripts/gpu_bench.py --out benches/record/gpu.json

Every answer is checked before it is timed. Times are medians of single launches between CUDA events, with the L2 cache
flushed before each, so they are what a kernel costs between two others. ``gigabytes_per_second`` counts the bytes that
the operation must read and write once. The expert layer has its own file and protocol: gpu_bench_experts.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench_experts import layer_cases

import tilewise
from tilewise import _core
from tilewise.cuda import moe, why_not
from tilewise.cuda.compile import ARCHITECTURES, compile_text, resources
from tilewise.cuda.kernel import registered

# (tokens, experts, top_k, d): OLMoE, Qwen3-MoE and DeepSeek-V3 shapes, at prefill and at decode.
SHAPES = [
    (tokens, experts, top_k, width)
    for tokens in (1, 64, 32768)
    for experts, top_k, width in ((64, 8, 2048), (128, 8, 4096), (256, 8, 7168))
]


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def route_case(tokens: int, experts: int, top_k: int) -> dict[str, Any]:
    logits = torch.randn(tokens, experts, device="cuda")

    def ours() -> Any:
        return moe.route(logits, top_k)

    def theirs() -> Any:
        values, ids = torch.topk(logits, top_k, dim=-1)
        return ids, torch.softmax(values, dim=-1)

    for got, want in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-6)
    traffic = tokens * (experts * 4 + top_k * 8)
    return _entry("route", {"tokens": tokens, "experts": experts, "top_k": top_k}, ours, theirs, traffic)


def aggregate_case(tokens: int, top_k: int, width: int) -> dict[str, Any]:
    tokens = min(tokens, 2**31 // (top_k * width * 2))  # at most 2 GiB of rows
    y = torch.randn(tokens * top_k, width, device="cuda", dtype=torch.bfloat16)
    rows = torch.randperm(tokens * top_k, device="cuda").view(tokens, top_k).int()
    weights = torch.rand(tokens, top_k, device="cuda")

    def ours() -> Any:
        return moe.aggregate(y, rows, weights)

    def theirs() -> Any:
        return (y[rows.long()].float() * weights[..., None]).sum(1).bfloat16()

    torch.testing.assert_close(ours(), theirs(), rtol=2e-2, atol=2e-2)
    traffic = tokens * (top_k + 1) * width * 2 + tokens * top_k * 8
    return _entry("aggregate", {"tokens": tokens, "top_k": top_k, "d": width}, ours, theirs, traffic)


def _entry(
    name: str, shape: dict[str, int], ours: Callable[[], Any], theirs: Callable[[], Any], traffic: int
) -> dict[str, Any]:
    mine, other = milliseconds(ours), milliseconds(theirs)
    entry = {
        "operation": name,
        **shape,
        "tilewise_ms": mine,
        "torch_ms": other,
        "speedup": other / mine,
        "gigabytes_per_second": traffic / mine / 1e6,
    }
    print(json.dumps(entry), flush=True)
    return entry


def _source(architecture: str) -> str:
    return _core.cuda_source("all.cu", "".join(kernel.stub for kernel in registered(architecture)))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out: Path = parser.parse_args().out
    if (reason := why_not()) is not None:
        print(f"no benchmark: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    results = [route_case(tokens, experts, top_k) for tokens, experts, top_k, _ in SHAPES]
    results += [aggregate_case(tokens, top_k, width) for tokens, _, top_k, width in SHAPES]
    results += layer_cases()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tilewise": tilewise.__version__,
        "commit": _core.build_info()["commit"],
        "results": results,
        "resources": {
            architecture: {
                name: vars(used)
                for name, used in resources(compile_text(_source(architecture), architecture, verbose=True)[1]).items()
            }
            for architecture in ARCHITECTURES
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
