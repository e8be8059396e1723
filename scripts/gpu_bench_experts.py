"""The expert layer's part of gpu_bench.py: forward, backward, peak memory, beside torch and ScatterMoE (if installed).

Peers: `grouped_mm` is torch's grouped product with an eager SwiGLU between, gathers and sums as torch does them, and
autograd's backward; `scattermoe` its GLU MLP. Candidates take turns, one timing each a round, so that what disturbs the
machine disturbs all of them; a figure is the median over rounds. TFLOPS count 6 (backward 12) x pairs x n x d, the
products alone. Every answer is checked against `grouped_mm` before it is timed.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from tilewise.cuda import moe

# (name, tokens, d, n, experts, slots, published TFLOPS of SonicMoE on an H100: forward, backward)
ROWS = [
    ("1.4B", 40960, 768, 256, 128, 8, 339, 366),
    ("1.4B", 40960, 768, 512, 64, 4, 401, 403),
    ("1.4B", 40960, 768, 1024, 32, 2, 405, 435),
    ("7B", 24576, 1536, 256, 128, 8, 364, 405),
    ("7B", 24576, 1536, 512, 64, 4, 435, 439),
    ("7B", 24576, 1536, 1024, 32, 2, 467, 467),
]
ROUNDS = 20

Pass = Callable[[], Any]


class Peer:
    """One way to run the layer: ``forward()`` gives its output and keeps what ``backward()`` needs."""

    def __init__(self, name: str, forward: Pass, backward: Pass) -> None:
        self.name, self.forward, self.backward = name, forward, backward


def tilewise_peer(
    x: Any, ids: Any, scores: Any, gate_up: Any, down: Any, grad: Any, *, warpgroups: bool = False
) -> Peer:
    kept: list[Any] = []
    engine = "1" if warpgroups else "0"

    def forward() -> Any:
        os.environ["TILEWISE_CUDA_WARPGROUPS"] = engine
        out, pre = moe.experts_forward(x, ids, scores, gate_up, down)
        kept[:] = [pre]
        return out

    def backward() -> Any:
        os.environ["TILEWISE_CUDA_WARPGROUPS"] = engine
        found = moe.experts_backward(grad, kept[0], x, ids, scores, gate_up, down)
        return found.x, found.weights, found.gate_up, found.down

    return Peer("tilewise_warpgroups" if warpgroups else "tilewise", forward, backward)


def _grouped_mm() -> Callable[..., Any] | None:
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_mm_peer(x: Any, ids: Any, scores: Any, gate_up: Any, down: Any, grad: Any) -> Peer | None:
    product = _grouped_mm()
    if product is None:
        return None
    leaves = [tensor.detach().requires_grad_() for tensor in (x, scores, gate_up, down)]
    kept: list[Any] = []

    def forward() -> Any:
        x, scores, gate_up, down = leaves
        tokens, slots = ids.shape
        order = torch.argsort(ids.flatten(), stable=True)
        ends = torch.bincount(ids.flatten(), minlength=len(gate_up)).cumsum(0).int()
        gate, up = product(x[order // slots], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        y = product(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
        weighted = y * scores.flatten()[order, None].to(y.dtype)
        out = torch.empty_like(weighted).index_copy(0, order, weighted).view(tokens, slots, -1).sum(1)
        kept[:] = [out]
        return out.detach()

    def backward() -> Any:
        return torch.autograd.grad(kept[0], leaves, grad, retain_graph=True)

    return Peer("grouped_mm", forward, backward)


def scattermoe_peer(x: Any, ids: Any, scores: Any, gate_up: Any, down: Any, grad: Any) -> Peer | None:
    try:
        from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    experts, wide, d = gate_up.shape
    layer = GLUMLP(d, wide // 2, experts, ids.shape[1], activation=torch.nn.SiLU()).to(x.device, x.dtype)
    first, second = layer.experts.weight, layer.output_experts.weight
    with torch.no_grad():  # it takes the first half as up, the second as gate
        gate, up = gate_up.chunk(2, 1)
        first.copy_(torch.cat([up, gate], 1).reshape(first.shape))
        second.copy_(down.reshape(second.shape))
    leaves = [x.detach().requires_grad_(), scores.to(x.dtype).requires_grad_(), first, second]
    kept: list[Any] = []

    def forward() -> Any:
        kept[:] = [layer(leaves[0], leaves[1], ids)]
        return kept[0].detach()

    def backward() -> Any:
        return torch.autograd.grad(kept[0], leaves, grad, retain_graph=True)

    return Peer("scattermoe", forward, backward)


def _once(run: Pass) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak(peer: Peer) -> dict[str, int]:
    """Bytes beyond the inputs: at most at once, and held between the passes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer.forward()
    between = torch.cuda.memory_allocated() - before
    peer.backward()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "bytes_between_passes": between}


def _differences(peer: Peer, reference: Peer) -> dict[str, float]:
    def relative(got: Any, want: Any) -> float:
        return float((got.double() - want.double()).norm() / want.double().norm())

    found = {"out": relative(peer.forward(), reference.forward())}
    pairs = zip(("x", "weights"), peer.backward(), reference.backward(), strict=False)
    return found | {name: relative(got, want) for name, got, want in pairs}


def layer_case(
    name: str, tokens: int, d: int, n: int, experts: int, slots: int, sonic: tuple[int, int], routing: str
) -> dict[str, Any]:
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x, grad = torch.randn(tokens, d, **kind), torch.randn(tokens, d, **kind)
    gate_up = torch.randn(experts, 2 * n, d, **kind) * d**-0.5
    down = torch.randn(experts, d, n, **kind) * n**-0.5
    likely = torch.ones(experts, device="cuda")
    if routing == "zipf":
        likely = torch.arange(1, experts + 1, device="cuda").float() ** -1.2
    ids = torch.multinomial(likely.expand(tokens, -1), slots).int()
    scores = torch.rand(tokens, slots, device="cuda")
    arguments = (x, ids, scores, gate_up, down, grad)
    made = [tilewise_peer(*arguments), grouped_mm_peer(*arguments), scattermoe_peer(*arguments)]
    if torch.cuda.get_device_capability()[0] == 9:
        made.insert(1, tilewise_peer(*arguments, warpgroups=True))
    peers, failed = [], {}
    for peer in made:
        if peer is None:
            continue
        try:
            peer.forward()
            peer.backward()
            peers.append(peer)
        except Exception as error:  # a peer that cannot do the shape is recorded, not hidden and not fatal
            if peer.name.startswith("tilewise"):
                raise
            failed[peer.name] = f"{type(error).__name__}: {error}"[:300]
    entry: dict[str, Any] = {
        "operation": "experts",
        "size": name,
        "routing": routing,
        "tokens": tokens,
        "d": d,
        "n": n,
        "experts": experts,
        "top_k": slots,
        "sonicmoe_published_h100": {"forward_tflops": sonic[0], "backward_tflops": sonic[1]},
        "peers": {},
        "failed": failed,
    }
    reference = next((peer for peer in peers if peer.name == "grouped_mm"), None)
    if reference is not None:
        entry["relative_differences"] = {
            peer.name: _differences(peer, reference) for peer in peers if peer is not reference
        }
        for name, differences in entry["relative_differences"].items():
            assert not name.startswith("tilewise") or max(differences.values()) < 2e-2, entry
    memory = {peer.name: _peak(peer) for peer in peers}
    times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    for turn in range(ROUNDS + 3):
        for peer in peers:
            measured = _once(peer.forward), _once(peer.backward)
            if turn >= 3:
                times[peer.name].append(measured)
    work = tokens * slots * n * d / 1e9
    for peer in peers:
        forward, backward = (statistics.median(column) for column in zip(*times[peer.name], strict=True))
        entry["peers"][peer.name] = {
            "forward_ms": forward,
            "backward_ms": backward,
            "forward_tflops": 6 * work / forward,
            "backward_tflops": 12 * work / backward,
            **memory[peer.name],
        }
    print(json.dumps(entry), flush=True)
    return entry


def layer_cases() -> list[dict[str, Any]]:
    """All rows with a uniform routing, and the most fine-grained ones with a skewed one."""
    results = []
    for routing in ("uniform", "zipf"):
        for *shape, forward, backward in ROWS:
            if routing == "uniform" or shape[-1] == 8:
                results.append(layer_case(*shape, (forward, backward), routing))
                torch.cuda.empty_cache()
    return results
