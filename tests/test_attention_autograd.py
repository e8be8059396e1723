"""The attention operators inside torch: gradients asked for and not, compiled, under autocast, refused.

Numbers in test names are the groups of the attention fact sheet's section on testable properties.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise.attention.programs import added_bias
from tilewise.errors import ArgumentError, DeviceError, UnsupportedError
from tilewise.torch.attention.operators import attend
from tilewise.torch.expr import trace

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread


def bundle() -> tuple[list[Tensor], Any]:
    """Leaves (query, key, value, sinks, a captured table) and a call with all of them."""
    query, key, value = cases.draw(2, 4, 2, 9, 12, 8)
    random = torch.Generator().manual_seed(1)
    sinks = torch.randn(4, generator=random, dtype=torch.float64).requires_grad_()
    bias = torch.randn(2, 1, 9, 12, generator=random, dtype=torch.float64).requires_grad_()

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return attend(query, key, value, sinks=sinks, score=added_bias(bias), causal=True)

    return [query, key, value, sinks, bias], run


def test_group_30_any_subset_of_gradients() -> None:
    leaves, run = bundle()
    full = cases.gradients(run(*leaves), leaves, torch.ones(2, 4, 9, 8), None)
    for wanted in itertools.product((False, True), repeat=5):
        given = [x.detach().requires_grad_(want) for x, want in zip(leaves, wanted, strict=True)]
        out, lse = run(*given)
        assert out.requires_grad == lse.requires_grad == any(wanted)
        if not any(wanted):
            continue
        out.backward(torch.ones_like(out))
        for x, want, gradient in zip(given, wanted, full, strict=True):
            assert torch.equal(x.grad, gradient) if want else x.grad is None


def test_group_30_gradients_that_do_not_come() -> None:
    """Only the LSE used; neither used; a zero-dimensional or expanded gradient; the LSE of a result under no_grad."""
    leaves, run = bundle()
    _, lse = run(*leaves)
    lse.sum().backward()
    assert leaves[2].grad is not None and not leaves[2].grad.any() and leaves[0].grad.any()
    out, _ = run(*leaves)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    contiguous = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(expanded, contiguous, strict=True))
    strided = torch.ones(2, 4, 9, 16, dtype=torch.float64)[..., ::2]
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out, leaves, strided), contiguous, strict=True))
    with torch.no_grad():
        assert not run(*leaves)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(run(*leaves)[0], out)


def test_group_30_double_backward_is_refused() -> None:
    leaves, run = bundle()
    out, lse = run(*leaves)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), leaves[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated again"):
        grad.sum().backward()


def test_group_30_nothing_is_kept_alive() -> None:
    leaves, run = bundle()
    out = run(*leaves)[0]
    held = [weakref.ref(x) for x in leaves]
    out.sum().backward()
    del leaves, out
    gc.collect()
    assert all(reference() is None for reference in held)


def test_masks_have_no_gradient() -> None:
    query, key, value = cases.draw(1, 1, 1, 3, 4, 8)
    table = torch.ones(4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="mask_mod: captured tensor 0 requires a gradient"):
        twt.attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0)
    with torch.no_grad():
        twt.attention(query, key, value, mask_mod=lambda b, h, q, k: table[k] > 0)


def test_pages_have_no_gradient() -> None:
    query, key, value = cases.draw(1, 1, 1, 3, 4, 8)
    rows, table = torch.tensor([[0, 0, 3, 0, 0, 4]]), torch.zeros(1, 1, dtype=torch.int32)
    out, _ = attend(query, key, value, sequences=rows, block_table=table)
    with pytest.raises(UnsupportedError, match="pages have no gradient"):
        out.sum().backward()


def arguments(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Operator arguments for opcheck: every kind of optional tensor once."""
    query, key, value = cases.draw(2, 4, 2, 9, 12, 8, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4, 9, 12, generator=random) < 0.7
    sinks = torch.randn(4, generator=random).to(dtype).requires_grad_()
    chosen = torch.tensor([0, -1, 2], dtype=torch.int32).expand(2, 2, 9, 3).contiguous()
    bias = torch.randn(2, 1, 9, 12, generator=random).to(dtype).requires_grad_()
    score, keep = added_bias(bias), trace(lambda b, h, q, k: q + 3 >= k, "mask")
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    rows = torch.tensor([[0, 0, 4, 1, 2, 5], [1, 0, 9, 0, 0, 12]])
    table = torch.zeros(2, 3, dtype=torch.int32)
    seed = torch.tensor(3)
    none: tuple[Any, ...] = (None,) * 4
    rules = (0.25, True, 5, None)
    rest = (0, 0, 0, 0.0, 0, 8.0)
    bare = (None, None, [], [], None, None, *rules)
    pages = (x.detach() for x in (query, key, value))
    return [
        (query, key, value, mask, sinks, chosen, *none, None, *bare, 4, *rest[1:]),
        (query, key, value, None, None, None, counts, lists, None, None, None, None, seed, [bias], [], score.text,
         keep.program, *rules, 0, 16, 16, 0.3, 0, 8.0),
        (query, key, value, None, sinks, None, *none, rows, *bare, 0, 0, 0, 0.0, 2, 8.0),
        (*pages, None, None, None, *none, rows[:, [0, 1, 2, 3, 4, 2]], table, *bare[1:], *rest),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    for given in arguments(dtype):
        torch.library.opcheck(torch.ops.tilewise.attention.default, given)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic: bool) -> None:
    """Every front under torch.compile(fullgraph=True), forward and backward, bit for bit; Mods made outside."""
    table = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mod = trace(lambda s, b, h, q, k: s + table[h] * (k - q), "score")
    mask = twt.create_block_mask(lambda b, h, q, k: q >= k, None, None, 9, 12, "cpu", BLOCK_SIZE=4)
    bias = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    fronts: dict[str, Any] = {
        "attention": lambda q, k, v: twt.attention(q, k, v, causal=True, score_mod=mod, softcap=20.0),
        "flex": lambda q, k, v: twt.flex_attention(q, k, v, mod, mask, enable_gqa=True),
        "sdpa": lambda q, k, v: twt.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True),
        "sdpa causal": lambda q, k, v: twt.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "flash": lambda q, k, v: twt.flash_attn_func(flat(q), flat(k), flat(v), causal=True, alibi_slopes=slopes),
        "varlen": lambda q, k, v: twt.flash_attn_varlen_func(
            flat(q)[0], flat(k)[0, :9], flat(v)[0, :9], offsets, offsets, 5, 5, causal=True, softcap=3.0
        ),
    }
    for name, front in fronts.items():
        operands = cases.draw(2, 4, 2, 9, 12, 8)
        leaves = [*operands, table, bias]
        torch._dynamo.reset()
        compiled = torch.compile(front, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        want, got = front(*operands), compiled(*operands)
        assert torch.equal(want, got), name
        grad = torch.ones_like(want)
        found = [torch.autograd.grad(x, leaves, grad, allow_unused=True) for x in (want, got)]
        for x, y in zip(*found, strict=True):
            assert (x is None and y is None) or torch.equal(x, y), name


def test_compiled_functions_break_the_graph_and_agree() -> None:
    table = torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    operands = cases.draw(1, 4, 4, 9, 12, 8, dtype=torch.float32)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return twt.flex_attention(query, key, value, lambda s, b, h, q, k: s + table[h] * (k - q))

    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="aot_eager")(*operands), run(*operands))


def test_compiled_dropout_draws_a_new_seed_each_time() -> None:
    operands = cases.draw(1, 2, 2, 30, 30, 8, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: twt.scaled_dot_product_attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    one, other = compiled(*operands), compiled(*operands)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    first = compiled(*operands)
    torch.manual_seed(3)
    assert torch.equal(first, compiled(*operands))


def test_autocast() -> None:
    """Queries, keys and values are cast as torch's own attention casts them; float64 is left alone."""
    operands = cases.draw(1, 2, 2, 9, 12, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = twt.attention(*operands, causal=True)
        wide = twt.attention(*(x.double() for x in operands))
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
    assert torch.equal(out, twt.attention(*(x.bfloat16() for x in operands), causal=True))
    found = torch.autograd.grad(out.float().sum(), operands)
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in found)


def test_checkpointing_drops_the_same_weights() -> None:
    from torch.utils.checkpoint import checkpoint

    operands = cases.draw(1, 2, 2, 30, 30, 8)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return twt.scaled_dot_product_attention(query, key, value, dropout_p=0.4)

    torch.manual_seed(5)
    want = torch.autograd.grad(run(*operands).square().sum(), operands)
    torch.manual_seed(5)
    got = torch.autograd.grad(checkpoint(run, *operands, use_reentrant=False).square().sum(), operands)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


def test_what_is_refused_says_why() -> None:
    query, key, value = cases.draw(1, 2, 2, 3, 4, 8, grad=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        twt.attention(query, key, value, windows=(1, 1))  # pyright: ignore
    with pytest.raises(ArgumentError, match=r"dropout: expected a probability from 0 to 1, got 1\.5"):
        twt.attention(query, key, value, dropout=1.5)
    with pytest.raises(ArgumentError, match="softcap"):
        twt.attention(query, key, value, softcap=-1.0)
    rows = torch.tensor([[0, 0, 3, 0, 0, 4]])
    with pytest.raises(ArgumentError, match="mask: it indexes one dense problem"):
        twt.attention(query, key, value, mask=torch.ones(3, 4, dtype=torch.bool), sequences=rows)
    with pytest.raises(ArgumentError, match="block_table: expected `sequences`"):
        twt.attention(query, key, value, block_table=torch.zeros(1, 1, dtype=torch.int32))
    meta = torch.zeros(4, device="meta")
    with pytest.raises(DeviceError, match="sinks: expected a tensor on cpu as query, got meta"):
        twt.attention(query, key, value, sinks=meta)
    with pytest.raises(DeviceError, match="score_mod capture 0: expected a tensor on cpu"):
        twt.attention(query, key, value, score_mod=lambda s, b, h, q, k: s + meta[h])


@pytest.mark.gpu
def test_group_32_streams_and_graphs(torch_cuda: Any) -> None:
    """On a GPU the kernels run on torch's current stream, and a CUDA graph can capture them."""
    operands = [x.detach().half().cuda() for x in cases.draw(1, 4, 2, 200, 200, 64)]
    want = twt.attention(*operands, causal=True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what the kernel must wait for
        scaled = [x * 1.0 for x in operands]
        got = twt.attention(*scaled, causal=True)
    side.synchronize()
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twt.attention(*operands, causal=True)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want)
