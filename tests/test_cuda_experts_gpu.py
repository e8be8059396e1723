"""The expert layer on a real GPU: what the emulator cannot show. Everything here is skipped without one."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_emulator import torch_place
from cuda_emulator.cases import check, make
from tilewise.cuda import moe

pytestmark = pytest.mark.gpu


def layer(torch: Any, d: int, n: int, experts: int, dtype: Any) -> dict[str, Any]:
    return {
        "gate_up": torch.randn(experts, 2 * n, d, device="cuda", dtype=dtype) * d**-0.5,
        "down": torch.randn(experts, d, n, device="cuda", dtype=dtype) * n**-0.5,
        "gate_up_bias": torch.randn(experts, 2 * n, device="cuda", dtype=dtype),
        "down_bias": torch.randn(experts, d, device="cuda", dtype=dtype),
    }


def both_ways(weights: dict[str, Any], x: Any, ids: Any, scores: Any, grad: Any) -> list[Any]:
    arguments = {"x": x, "expert_ids": ids, "weights": scores, **weights}
    out, pre = moe.experts_forward(**arguments)
    return [out, pre, *moe.experts_backward(grad, pre, **arguments)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(2048, 768, 256, 32, 8), (1024, 1536, 512, 16, 4), (333, 600, 104, 7, 3), (257, 101, 67, 5, 2)]
)
def test_larger_layers_equal_the_loop(torch_cuda: Any, dtype: str, shape: tuple[int, ...]) -> None:
    check(make(dtype, *shape), torch_place(), "cuda")
    check(make(dtype, *shape, layout="interleaved", activation="geglu", biases=False), torch_place(), "cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_graph_replays_with_other_routings(torch_cuda: Any, dtype: str) -> None:
    torch = torch_cuda
    kind = getattr(torch, dtype)
    weights = layer(torch, 128, 64, 16, kind)
    x, grad = (torch.randn(300, 128, device="cuda", dtype=kind) for _ in range(2))
    ids, scores = torch.randint(0, 16, (300, 4), device="cuda"), torch.rand(300, 4, device="cuda")
    both_ways(weights, x, ids, scores, grad)  # loads the modules before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(weights, x, ids, scores, grad)
    routings = [
        torch.randint(0, 16, (300, 4), device="cuda"),
        torch.full((300, 4), 3, device="cuda"),  # one hot expert, the others empty
        torch.randint(-1, 18, (300, 4), device="cuda"),  # sentinels
        torch.full((300, 4), -1, device="cuda"),
    ]
    for routing in routings:
        ids.copy_(routing)
        x.copy_(torch.randn(300, 128, device="cuda", dtype=kind))
        graph.replay()
        torch.cuda.synchronize()
        expected = both_ways(weights, x, ids, scores, grad)
        assert all(torch.equal(got, want) for got, want in zip(captured, expected, strict=True))


def test_two_layers_take_turns(torch_cuda: Any) -> None:
    """Layers of other sizes, types and activations in one process: no width is remembered from the last one."""
    for _ in range(2):
        check(make("bfloat16", 200, 256, 192, 8, 2), torch_place(), "cuda")
        check(make("bfloat16", 90, 64, 520, 3, 1, activation="relu2"), torch_place(), "cuda")
        check(make("float16", 90, 64, 520, 3, 1, activation="reglu", layout="interleaved"), torch_place(), "cuda")


def test_nothing_waits_for_the_gpu(torch_cuda: Any) -> None:
    torch = torch_cuda
    weights = layer(torch, 128, 64, 8, torch.bfloat16)
    x = torch.randn(100, 128, device="cuda", dtype=torch.bfloat16)
    ids, scores = torch.randint(0, 8, (100, 2), device="cuda"), torch.rand(100, 2, device="cuda")
    both_ways(weights, x, ids, scores, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(weights, x, ids, scores, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_forward_pass(torch_cuda: Any) -> None:
    """Nothing of tokens x slots x d stays but the pre-activation, and the peak holds H, A and Y."""
    torch = torch_cuda
    tokens, d, n, experts, slots = 4096, 512, 256, 32, 4
    weights = layer(torch, d, n, experts, torch.bfloat16)
    x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    ids, scores = torch.randint(0, experts, (tokens, slots), device="cuda"), torch.rand(tokens, slots, device="cuda")
    arguments = {"x": x, "expert_ids": ids, "weights": scores, **weights}
    moe.experts_forward(**arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = moe.experts_forward(**arguments)
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    pairs = tokens * slots
    assert result[1].shape == (pairs, 2 * n)
    integers = 4 * (6 * pairs + 8 * experts) + 2**20
    assert kept <= 2 * tokens * d + 4 * pairs * n + 2**20
    assert peak <= 2 * tokens * d + 4 * pairs * n + 2 * pairs * n + 2 * pairs * d + 8 * experts * n + integers


def test_weights_past_two_to_the_31_elements(torch_cuda: Any) -> None:
    torch = torch_cuda
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    experts, n, d = 260, 2048, 2048
    gate_up = torch.zeros(experts, 2 * n, d, device="cuda", dtype=torch.bfloat16)
    down = torch.zeros(experts, d, n, device="cuda", dtype=torch.bfloat16)
    last = layer(torch, d, n, 1, torch.bfloat16)
    gate_up[-1], down[-1] = last["gate_up"][0], last["down"][0]
    x = torch.randn(64, d, device="cuda", dtype=torch.bfloat16)
    scores, ids = torch.rand(64, 1, device="cuda"), torch.full((64, 1), experts - 1, device="cuda")
    far = both_ways({"gate_up": gate_up, "down": down}, x, ids, scores, x)
    near = both_ways({"gate_up": last["gate_up"], "down": last["down"]}, x, ids * 0, scores, x)
    assert torch.equal(far[0], near[0]) and torch.equal(far[2], near[2])
    assert torch.equal(far[4][-1], near[4][0]) and torch.equal(far[5][-1], near[5][0])
    assert not far[4][:-1].any() and not far[5][:-1].any()


def test_rows_past_two_to_the_31_elements(torch_cuda: Any) -> None:
    torch = torch_cuda
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free device memory")
    tokens, d, n = 2**20 + 64, 64, 1024  # the pre-activation has 2^31 elements and some
    weights = layer(torch, d, n, 2, torch.bfloat16)
    x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    scores, ids = torch.rand(tokens, 1, device="cuda"), torch.ones(tokens, 1, device="cuda", dtype=torch.int32)
    far = both_ways(weights, x, ids, scores, x)
    near = both_ways(weights, x[-64:], ids[-64:], scores[-64:], x[-64:])
    assert torch.equal(far[0][-64:], near[0]) and torch.equal(far[2][-64:], near[2])
    assert torch.equal(far[3][-64:], near[3])
