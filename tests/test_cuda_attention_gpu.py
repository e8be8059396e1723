"""Attention on a real GPU: what the emulator cannot show. Everything here is skipped without one."""

from __future__ import annotations

from typing import Any

import pytest

from tilewise.attention.rules import Rules
from tilewise.cuda import attention
from tilewise.cuda.attention import operators

pytestmark = pytest.mark.gpu


def both_ways(torch: Any, query: Any, key: Any, value: Any, grad: Any, rules: Rules) -> list[Any]:
    """Result, lse and the gradients of query, key and value."""
    out = torch.empty(*query.shape[:3], value.shape[3], device="cuda", dtype=query.dtype)
    lse = torch.empty(query.shape[:3], device="cuda")
    attention.forward(query, key, value, out, lse, rules)
    made = [torch.empty_like(x) for x in (query, key, value)]
    attention.backward(query, key, value, out, lse, grad, None, *made, None, [None] * len(rules.score_captures), rules)
    return [out, lse, *made]


def inputs(
    torch: Any, dtype: Any, batch: int, heads: tuple[int, int], lengths: tuple[int, int], width: int
) -> list[Any]:
    shapes = [(heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]), (heads[0], lengths[0])]
    return [torch.randn(batch, *shape, width, device="cuda", dtype=dtype) for shape in shapes]


def dense(torch: Any, query: Any, key: Any, value: Any, grad: Any, causal: bool) -> list[Any]:
    """The same in one precision by plain operations."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT) * q.shape[3] ** -0.5
    if causal:
        queries, keys = scores.shape[-2:]
        keep = torch.ones(queries, keys, device="cuda", dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~keep, -torch.inf)
    out = torch.softmax(scores.double(), -1).to(q.dtype) @ v.repeat_interleave(group, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_larger_problems_equal_float64(torch_cuda: Any, dtype: str, width: int, causal: bool) -> None:
    torch = torch_cuda
    arrays = inputs(torch, getattr(torch, dtype), 2, (8, 2), (513, 1025), width)
    found = both_ways(torch, *arrays, Rules(scale=width**-0.5, causal=causal))
    truth = dense(torch, *(x.double() for x in arrays), causal)
    plain = dense(torch, *arrays, causal)
    for got, want, lossy in zip([found[0], *found[2:]], truth, plain, strict=True):
        allowed = 2 * (lossy.double() - want).norm() + 1e-6 * want.norm()
        assert (got.double() - want).norm() <= allowed


def test_two_runs_have_the_same_bits(torch_cuda: Any) -> None:
    torch = torch_cuda
    arrays = inputs(torch, torch.bfloat16, 2, (8, 2), (700, 700), 128)
    rules = Rules(scale=0.1, causal=True, dropout=0.1, seed=7)
    first, second = (both_ways(torch, *arrays, rules) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_captured_graph_replays_with_other_values(torch_cuda: Any) -> None:
    torch = torch_cuda
    arrays = inputs(torch, torch.bfloat16, 2, (4, 2), (300, 300), 64)
    sequences = torch.tensor([[0, 0, 300, 0, 0, 300], [1, 0, 300, 1, 0, 300]], device="cuda")
    rules = Rules(scale=0.125, causal=True, sequences=sequences)
    both_ways(torch, *arrays, rules)  # loads the modules before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(torch, *arrays, rules)
    for lengths in ((300, 300), (17, 300), (200, 0)):
        sequences[0, 2], sequences[0, 5] = lengths[0], lengths[0]
        sequences[1, 2], sequences[1, 5] = lengths[1], lengths[1]
        for array in arrays:
            array.normal_()
        for array in captured:
            array.zero_()
        graph.replay()
        torch.cuda.synchronize()
        expected = both_ways(torch, *arrays, rules)
        for number, (length, _) in enumerate(zip(lengths, range(2), strict=True)):
            for got, want in zip(captured, expected, strict=True):
                assert torch.equal(got[number, :, :length], want[number, :, :length])


def test_the_current_stream_is_used_and_nothing_waits(torch_cuda: Any) -> None:
    torch = torch_cuda
    arrays = inputs(torch, torch.bfloat16, 1, (4, 4), (256, 256), 128)
    rules = Rules(scale=0.1)
    expected = both_ways(torch, *arrays, rules)
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            late = [array.clone() for array in arrays]
            found = both_ways(torch, *late, rules)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


def test_rows_past_two_to_the_31_elements(torch_cuda: Any) -> None:
    torch = torch_cuda
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    keys = 2**24 + 192  # times 128 elements is past 2^31
    key, value = (torch.zeros(1, 1, keys, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key[:, :, -64:].normal_()
    value[:, :, -64:].normal_()
    query = torch.randn(1, 4, 3, 128, device="cuda", dtype=torch.bfloat16)
    rules = Rules(scale=1.0, left=63, causal=True)
    out, lse = torch.empty_like(query), torch.empty(1, 4, 3, device="cuda")
    near, near_lse = torch.empty_like(query), torch.empty(1, 4, 3, device="cuda")
    attention.forward(query, key, value, out, lse, rules)
    attention.forward(query, key[:, :, -192:].contiguous(), value[:, :, -192:].contiguous(), near, near_lse, rules)
    torch.testing.assert_close(out, near)
    torch.testing.assert_close(lse, near_lse)


def test_memory_is_linear_in_the_lengths(torch_cuda: Any) -> None:
    torch = torch_cuda
    arrays = inputs(torch, torch.bfloat16, 1, (4, 4), (8192, 8192), 64)
    rules = Rules(scale=0.1)
    both_ways(torch, *arrays, rules)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ways(torch, *arrays, rules)
    assert torch.cuda.max_memory_allocated() - before <= 5 * arrays[0].nbytes + 3 * 4 * 4 * 8192 + 2**20


def test_the_operators_take_what_torchs_operators_pass(torch_cuda: Any) -> None:
    torch = torch_cuda
    query, key, value, grad = inputs(torch, torch.bfloat16, 2, (4, 2), (65, 130), 64)
    fields = dict.fromkeys(operators.FIELDS)
    fields |= {"score_captures": [], "mask_captures": [], "scale": 0.125, "causal": True, "block_size": 0}
    fields |= {"query_block": 0, "key_block": 0, "dropout": 0.0, "splits": 0, "threshold": 8.0}
    rest = list(fields.values())
    out, lse = operators.forward_operator(query, key, value, *rest)
    expected = both_ways(torch, query, key, value, grad, Rules(scale=0.125, causal=True))
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    wanted = [True, False, True, False]
    made = operators.backward_operator(query, key, value, out, lse, grad, None, *rest, wanted)
    assert torch.equal(made[0], expected[2]) and torch.equal(made[2], expected[4])
    assert [array.numel() for array in made[1::2]] == [0, 0]
