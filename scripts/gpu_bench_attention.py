"""Times attention on the GPU beside torch's SDPA (flash and cuDNN) and compiled flex_attention, and writes a JSON file.

    python3 scripts/gpu_bench_attention.py --out benches/record/gpu_attention.json

Shapes are those of FlashAttention-2 and -3: 16k tokens, hidden size 2048, heads of 64, 128 and 256. Candidates take
turns, one timing each a round; a figure is the median over rounds, after a pause between shapes. TFLOPS count
4 x sq x sk x d x heads x batch (half of it under a causal mask) forward and 2.5 times that backward. Every answer is
checked against a peer's before it is timed. Each candidate runs the same mask or mod; flex_attention is compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewise import _core
from tilewise.attention.rules import Rules
from tilewise.cuda import attention, why_not

ROUNDS, WARM_UP = 10, 5
SHAPES = [(32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)]  # batch, length
HEADS = {64: 32, 128: 16, 256: 8}

WINDOW = """tilewise-expr 1 mask
query
key
sub 0 1
int 1024
le 2 3
ge 0 1
and 4 5
return 6
"""
SOFTCAP = "tilewise-expr 1 score\nscore\nfloat 20.0\ndiv 0 1\ntanh 2\nmul 3 1\nreturn 4\n"

Pass = Callable[[], Any]


def ours(query: Any, key: Any, value: Any, grad: Any, rules: Rules) -> tuple[Pass, Pass]:
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
    made = [torch.empty_like(x) for x in (query, key, value)]

    def forward() -> Any:
        attention.forward(query, key, value, out, lse, rules)
        return out

    def backward() -> Any:
        attention.backward(query, key, value, out, lse, grad, None, *made, None, [], rules)
        return made

    return forward, backward


def theirs(query: Any, key: Any, value: Any, grad: Any, call: Callable[..., Any]) -> tuple[Pass, Pass]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    kept: list[Any] = []

    def forward() -> Any:
        kept[:] = [call(*leaves)]
        return kept[0].detach()

    def backward() -> Any:
        return torch.autograd.grad(kept[0], leaves, grad, retain_graph=True)

    return forward, backward


def sdpa(backend: Any, causal: bool) -> Callable[..., Any]:
    def call(query: Any, key: Any, value: Any) -> Any:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return call


def flex(kind: str, length: int) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    rule: Any = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q - k <= 1024) & (q >= k),
    }.get(kind)
    mask = None if rule is None else create_block_mask(rule, None, None, length, length, device="cuda")
    mod = (lambda score, b, h, q, k: 20.0 * torch.tanh(score / 20.0)) if kind == "softcap" else None
    return lambda query, key, value: compiled(query, key, value, score_mod=mod, block_mask=mask)


def rules_of(kind: str, width: int, length: int) -> Rules:
    rules = Rules(scale=width**-0.5, causal=kind == "causal")
    if kind == "softcap":
        rules.score_mod = SOFTCAP
    if kind == "window":  # what create_block_mask lists, from the rule itself
        blocks = torch.arange(-(-length // 128), device="cuda")
        first, last = blocks[:, None] * 128, blocks[:, None] * 128 + 127
        low, high = blocks[None] * 128, blocks[None] * 128 + 127
        some = (low <= last) & (first - high <= 1024)
        every = (high <= first) & (last - low <= 1024)
        for name, which in (("kv", some & ~every), ("full_kv", every)):
            setattr(rules, f"{name}_num_blocks", which.sum(-1).int()[None, None])
            order = torch.argsort((~which).int(), dim=-1, stable=True).int()
            setattr(rules, f"{name}_indices", order[None, None].contiguous())
        rules.mask_mod, rules.query_block, rules.key_block = WINDOW, 128, 128
    return rules


def _once(run: Pass) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def attention_case(kind: str, batch: int, length: int, width: int, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    heads = HEADS[width]
    query, key, value, grad = (torch.randn(batch, heads, length, width, device="cuda", dtype=dtype) for _ in range(4))
    arrays = (query, key, value, grad)
    makers: dict[str, Callable[[], tuple[Pass, Pass]]] = {
        "tilewise": lambda: ours(*arrays, rules_of(kind, width, length)),
    }
    if kind in ("full", "causal"):
        makers["sdpa_flash"] = lambda: theirs(*arrays, sdpa(SDPBackend.FLASH_ATTENTION, kind == "causal"))
        makers["sdpa_cudnn"] = lambda: theirs(*arrays, sdpa(SDPBackend.CUDNN_ATTENTION, kind == "causal"))
    makers["flex"] = lambda: theirs(*arrays, flex(kind, length))
    peers: dict[str, tuple[Pass, Pass]] = {}
    failed: dict[str, str] = {}
    answers: dict[str, list[Any]] = {}
    for name, make in makers.items():
        try:
            peers[name] = make()
            answers[name] = [peers[name][0](), *peers[name][1]()]
        except Exception as error:  # a peer that cannot do the shape is recorded, not hidden and not fatal
            if name == "tilewise":
                raise
            peers.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    reference = next((answers[name] for name in answers if name != "tilewise"), None)
    if reference is not None:
        for got, want in zip(answers["tilewise"], reference, strict=True):
            assert float((got.double() - want.double()).norm() / want.double().norm()) < 2e-2, (
                kind,
                batch,
                length,
                width,
            )
    answers.clear()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for turn in range(ROUNDS + WARM_UP):
        for name, (forward, backward) in peers.items():
            measured = _once(forward), _once(backward)
            if turn >= WARM_UP:
                times[name].append(measured)
    pairs = length * length
    if kind == "causal":
        pairs /= 2
    if kind == "window":
        pairs = sum(min(row + 1, 1025) for row in range(length))
    work = 4 * pairs * width * heads * batch / 1e9
    entry: dict[str, Any] = {"operation": "attention", "kind": kind, "batch": batch, "length": length, "width": width}
    entry |= {"heads": heads, "dtype": str(dtype).removeprefix("torch."), "failed": failed, "peers": {}}
    for name in peers:
        forward, backward = (statistics.median(column) for column in zip(*times[name], strict=True))
        entry["peers"][name] = {
            "forward_ms": forward,
            "backward_ms": backward,
            "forward_tflops": work / forward,
            "backward_tflops": 2.5 * work / backward,
        }
    print(json.dumps(entry), flush=True)
    return entry


def decode_case(batch: int, keys: int, heads: tuple[int, int] = (32, 8), width: int = 128) -> dict[str, Any]:
    """One query a sequence: bytes of keys and values a second."""
    query = torch.randn(batch, heads[0], 1, width, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(batch, heads[1], keys, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
    rules = Rules(scale=width**-0.5)

    def mine() -> Any:
        attention.forward(query, key, value, out, lse, rules)
        return out

    def other() -> Any:
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    torch.testing.assert_close(mine(), other(), rtol=2e-2, atol=2e-2)
    times = [(_once(mine), _once(other)) for _ in range(ROUNDS + WARM_UP)][WARM_UP:]
    ms, other_ms = (statistics.median(column) for column in zip(*times, strict=True))
    traffic = 2 * batch * heads[1] * keys * width * 2
    entry = {"operation": "attention_decode", "batch": batch, "keys": keys, "heads": heads, "width": width}
    entry |= {"tilewise_ms": ms, "sdpa_ms": other_ms, "gigabytes_per_second": traffic / ms / 1e6}
    print(json.dumps(entry), flush=True)
    return entry


def attention_cases() -> list[dict[str, Any]]:
    """All shapes plain and causal; mods at 4k and 16k."""
    results = []
    for width in HEADS:
        for batch, length in SHAPES:
            for kind in ("full", "causal"):
                results.append(attention_case(kind, batch, length, width))
                time.sleep(1.0)
    for kind in ("window", "softcap"):
        for batch, length in ((4, 4096), (1, 16384)):
            results.append(attention_case(kind, batch, length, 128))
            time.sleep(1.0)
    results += [decode_case(batch, keys) for batch, keys in ((1, 8192), (1, 131072), (16, 32768))]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out: Path = parser.parse_args().out
    if (reason := why_not()) is not None:
        print(f"no benchmark: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": _core.build_info()["commit"],
        "results": attention_cases(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
