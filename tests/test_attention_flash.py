"""flash_attn's functions, torch's scaled_dot_product_attention and flex_attention: their conventions, one by one."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tilewise.torch.attention.operators import attend

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread
DROPOUT = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
           "deterministic", "return_attn_probs")  # fmt: skip


def flat(x: Tensor) -> Tensor:
    """[batch, heads, length, dim] as [batch, length, heads, dim], and back: a view."""
    return x.transpose(1, 2)


def test_signatures_are_those_of_flash_attn_2() -> None:
    """Positional order is the interface: the fourth argument is dropout_p."""

    def names(function: Any) -> tuple[str, ...]:
        return tuple(inspect.signature(function).parameters)

    tail = DROPOUT[3:]
    assert names(twt.flash_attn_func) == DROPOUT
    assert names(twt.flash_attn_qkvpacked_func) == ("qkv", *tail)
    assert names(twt.flash_attn_kvpacked_func) == ("q", "kv", *tail)
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    assert names(twt.flash_attn_varlen_func) == (*DROPOUT[:3], *lengths, *tail, "block_table")
    assert names(twt.flash_attn_varlen_qkvpacked_func) == ("qkv", "cu_seqlens", "max_seqlen", *tail)
    assert names(twt.flash_attn_varlen_kvpacked_func) == ("q", "kv", *lengths, *tail)
    assert names(twt.flash_attn_with_kvcache) == (
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
        "cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved",
        "alibi_slopes", "num_splits", "return_softmax_lse",
    )  # fmt: skip
    their = torch.nn.attention.flex_attention.flex_attention
    assert names(twt.flex_attention)[: len(names(their))] == names(their)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (4, 2), (-1, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 11), (11, 5)])
def test_flash_equals_the_dense_formula(causal: bool, window: tuple[int, int], queries: int, keys: int) -> None:
    """Soft cap, then ALiBi at the bottom right, window and causality; values, LSE, gradients."""
    operands = cases.draw(2, 4, 2, queries, keys, 8)
    query, key, value = operands
    slopes = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    place, at = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        keep &= at <= place
    left, right = window
    keep &= (at >= place - left) if left >= 0 else keep
    keep &= (at <= place + right) if right >= 0 else keep
    scores = 2.0 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.4 / 2.0)
    scores = scores - slopes[:, :, None, None] * (place - at).abs()
    scores = scores.masked_fill(~keep, -torch.inf)
    truth = scores.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(2, 1), scores.logsumexp(-1)
    out, lse, probabilities = twt.flash_attn_func(
        flat(query), flat(key), flat(value), 0.0, 0.4, causal, window, 2.0, slopes, True, True
    )
    assert probabilities is None and lse.shape == (2, 4, queries)
    got = flat(out), lse
    leaves = [*operands, slopes]
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for x in truth]
    found, want = (cases.gradients(x, leaves, *grads) for x in (got, truth))
    seen = keep.any(-1)  # autograd's softmax has no gradient on an empty row
    for x, y in zip((*got, *found[1:]), (*truth, *want[1:]), strict=True):
        assert torch.allclose(x, torch.nan_to_num(y, 0.0, neginf=-torch.inf), rtol=1e-10, atol=1e-12) or not seen.all()
    assert torch.allclose(found[0][:, :, seen], want[0][:, :, seen], rtol=1e-10, atol=1e-12)
    assert not found[0][:, :, ~seen].any() and all(torch.isfinite(x).all() for x in found)
    assert torch.allclose(out[:, seen], flat(truth[0])[:, seen], rtol=1e-12, atol=1e-13) and not out[:, ~seen].any()


def test_packed_tensors_are_views_of_one_and_get_one_gradient() -> None:
    query, key, value = cases.draw(2, 4, 4, 9, 9, 8)
    qkv = torch.stack([flat(x) for x in (query, key, value)], 2).detach().requires_grad_()
    want = twt.flash_attn_func(flat(query), flat(key), flat(value), causal=True)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want_grad = torch.autograd.grad(want, [query, key, value], grad)
    got = twt.flash_attn_qkvpacked_func(qkv, causal=True)
    (found,) = torch.autograd.grad(got, qkv, grad)
    assert torch.equal(got, want)
    assert all(torch.equal(flat(found[:, :, at]), want_grad[at]) for at in range(3))
    kv = qkv.detach()[:, :, 1:].requires_grad_()
    got = twt.flash_attn_kvpacked_func(flat(query), kv, causal=True)
    (found,) = torch.autograd.grad(got, kv, grad)
    assert torch.equal(got, want) and torch.equal(flat(found[:, :, 1]), want_grad[2])


@pytest.mark.parametrize("extra", ["plain", "alibi", "window", "dropout"])
def test_varlen_equals_a_loop(extra: str) -> None:
    """Each sequence alone; packed qkv and kv; an empty sequence; the LSE as [heads, total]."""
    lengths_q, lengths_k = [4, 0, 7, 1], [6, 3, 7, 0]
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    operands = cases.draw(1, 4, 2, total_q, total_k, 8)
    q, k, v = (flat(x)[0] for x in operands)
    offsets = [
        torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lengths_q, lengths_k)
    ]
    slopes = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, Any] = {"causal": True}
    if extra == "window":
        options = {"window_size": (2, 1), "softcap": 3.0}
    dropout = 0.3 if extra == "dropout" else 0.0
    torch.manual_seed(0)
    out, lse, _ = twt.flash_attn_varlen_func(
        q, k, v, *offsets, 7, 7, dropout, alibi_slopes=slopes if extra == "alibi" else None, return_attn_probs=True,
        **options,
    )  # fmt: skip
    assert out.shape == (total_q, 4, 8) and lse.shape == (4, total_q)
    for at in range(4):
        rows = slice(*(int(x) for x in offsets[0][at : at + 2]))
        cols = slice(*(int(x) for x in offsets[1][at : at + 2]))
        one, one_lse, _ = twt.flash_attn_func(
            q[None, rows], k[None, cols], v[None, cols], return_attn_probs=True,
            alibi_slopes=slopes[at : at + 1] if extra == "alibi" else None, **options,
        )  # fmt: skip
        assert torch.allclose(lse[:, rows], one_lse[0], rtol=1e-13)
        if not dropout:
            assert torch.allclose(out[rows], one[0], rtol=1e-12, atol=1e-14)
    if dropout:
        torch.manual_seed(0)
        again = twt.flash_attn_varlen_func(q, k, v, *offsets, 7, 7, dropout, **options)
        assert torch.equal(out, again) and not torch.equal(
            out, twt.flash_attn_varlen_func(q, k, v, *offsets, 7, 7, **options)
        )
    same = torch.stack([q[:8, :2], q[:8, 2:], q[:8, :2]], 1).detach()
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = twt.flash_attn_varlen_qkvpacked_func(same, cu, 5, **options)
    assert torch.equal(packed, twt.flash_attn_varlen_func(*same.unbind(1), cu, cu, 5, 5, **options))
    assert torch.equal(packed, twt.flash_attn_varlen_kvpacked_func(same[:, 0], same[:, 1:], cu, cu, 5, 5, **options))


def test_varlen_pages() -> None:
    operands = cases.draw(1, 4, 2, 6, 21, 8, grad=False)
    q, k, v = (flat(x)[0] for x in operands)
    cu_q, cu_k = torch.tensor([0, 2, 6]), torch.tensor([0, 9, 21])
    pages = [torch.full((7, 4, 2, 8), torch.nan, dtype=torch.float64) for _ in range(2)]
    table = torch.tensor([[5, 0, 2], [6, 1, 3]], dtype=torch.int32)
    for memory, x in zip(pages, (k, v), strict=True):
        for number, (first, last) in enumerate(((0, 9), (9, 21))):
            for row in range(first, last):
                memory[table[number, (row - first) // 4], (row - first) % 4] = x[row]
    want = twt.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 12, causal=True)
    got = twt.flash_attn_varlen_func(q, *pages, cu_q, cu_k, 4, 12, causal=True, block_table=table)
    assert torch.allclose(got, want, rtol=1e-13, atol=1e-15)


def test_dropout_comes_from_torchs_generator() -> None:
    query, key, value = (flat(x) for x in cases.draw(1, 2, 2, 20, 20, 8, grad=False))
    torch.manual_seed(1)
    one, other = (twt.flash_attn_func(query, key, value, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(twt.flash_attn_func(query, key, value, 0.5), one) and not torch.equal(one, other)


def test_flash_errors_name_the_argument() -> None:
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
    with pytest.raises(ShapeError, match=r"q: expected rank 4 \[batch, length, heads, head_dim\]"):
        twt.flash_attn_func(q[0], k, k)
    with pytest.raises(ShapeError, match=r"alibi_slopes: expected \[4\] or \[2, 4\], got \[3\]"):
        twt.flash_attn_func(q, k, k, alibi_slopes=torch.zeros(3))
    with pytest.raises(ShapeError, match=r"qkv: expected \[batch, length, 3, heads, head_dim\]"):
        twt.flash_attn_qkvpacked_func(q[:, :, None])
    with pytest.raises(ArgumentError, match="window_size: expected two integers"):
        twt.flash_attn_func(q, k, k, window_size=3)  # pyright: ignore
    with pytest.raises(ArgumentError, match="dropout"):
        twt.flash_attn_func(q, k, k, -0.1)
    with pytest.raises(ShapeError, match="cu_seqlens_k: expected 3 offsets"):
        twt.flash_attn_varlen_func(q[0], k[0], k[0], torch.tensor([0, 1, 3]), torch.tensor([0, 5]), 3, 5)
    with pytest.raises(DtypeError, match="cu_seqlens_q: expected int32 or int64"):
        twt.flash_attn_varlen_func(q[0], k[0], k[0], torch.tensor([0.0, 3.0]), torch.tensor([0, 5]), 3, 5)
    assert twt.flash_attn_func(q, k, k, window_size=(None, None)).shape == (2, 3, 4, 8)  # pyright: ignore


SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("mask", [None, "bool", "float", "row", "causal"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 4), (1, 2, 4), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 7), (7, 4)])
def test_sdpa_equals_torch(mask: str | None, lead: tuple[int, ...], queries: int, keys: int) -> None:
    """Any number of leading axes; bool and float masks, broadcast; top-left causality; gradients, the mask's too."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    query, key, value = draw(*lead, queries, 8), draw(*lead, keys, 8), draw(*lead, keys, 6)
    bias = draw(*lead[1:], queries, keys) if mask == "float" else draw(keys)
    keep = torch.rand(queries, keys, generator=random) < 0.7
    keep[:, 0] = True
    given: dict[str, Any] = {
        "bool": {"attn_mask": keep}, "float": {"attn_mask": bias}, "row": {"attn_mask": bias},
        "causal": {"is_causal": True}, None: {},
    }[mask]  # fmt: skip
    want, got = (
        SDPA(query, key, value, scale=0.3, **given),
        twt.scaled_dot_product_attention(query, key, value, scale=0.3, **given),
    )
    leaves = [query, key, value] + ([bias] if mask in ("float", "row") else [])
    grad = torch.randn(want.shape, generator=random, dtype=torch.float64)
    found = [torch.autograd.grad(x, leaves, grad) for x in (got, want)]
    for x, y in zip([got, *found[0]], [want, *found[1]], strict=True):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def test_sdpa_grouped_queries_masks_of_minus_infinity_and_errors() -> None:
    query, key, value = cases.draw(2, 6, 2, 5, 7, 8)
    want = SDPA(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
    assert torch.allclose(twt.scaled_dot_product_attention(query, key, value, enable_gqa=True), want, rtol=1e-12)
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        twt.scaled_dot_product_attention(query, key, value)
    mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.arange(7) > 3, -torch.inf).requires_grad_()
    got = twt.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    few = twt.scaled_dot_product_attention(query, key[:, :, :4], value[:, :, :4], enable_gqa=True)
    assert torch.allclose(got, few, rtol=1e-12)
    (found,) = torch.autograd.grad(got.square().sum(), mask)
    assert torch.isfinite(found).all() and not found[:, 4:].any() and found[:, :4].any()
    with pytest.raises(ArgumentError, match="attn_mask and is_causal"):
        twt.scaled_dot_product_attention(query, key, value, mask, is_causal=True, enable_gqa=True)
    with pytest.raises(DtypeError, match="attn_mask: expected bool or a floating type"):
        twt.scaled_dot_product_attention(query, key, value, mask.long(), enable_gqa=True)
    with pytest.raises(ShapeError, match=r"attn_mask: expected something broadcastable to \[2, 6, 5, 7\]"):
        twt.scaled_dot_product_attention(query, key, value, mask[:4], enable_gqa=True)
    empty = twt.scaled_dot_product_attention(query, key, value, torch.zeros(5, 7, dtype=torch.bool), enable_gqa=True)
    assert not empty.any()


def test_flex_conventions_and_errors() -> None:
    query, key, value = cases.draw(2, 4, 2, 20, 20, 8, grad=False)
    flex, ask = twt.flex_attention, twt.AuxRequest
    _, aux = flex(query, key, value, enable_gqa=True, return_aux=ask(lse=True))
    assert aux.max_scores is None and torch.equal(aux.lse, attend(query, key, value)[1])
    assert flex(query, key, value, enable_gqa=True, return_aux=ask())[1].lse is None
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        flex(query, key, value)
    with pytest.raises(ArgumentError, match="return_lse and return_aux"):
        flex(query, key, value, enable_gqa=True, return_lse=True, return_aux=ask(lse=True))
    with pytest.raises(UnsupportedError, match="max_scores"):
        flex(query, key, value, enable_gqa=True, return_aux=ask(max_scores=True))
    with pytest.warns(UserWarning, match="'BLOCK_Z' is not an option"):
        flex(query, key, value, enable_gqa=True, kernel_options={"BLOCK_Z": 1, "fwd_BLOCK_M": 64})
    with pytest.raises(ShapeError, match="a batch of 2"):
        flex(query, key[:1], value[:1], enable_gqa=True)
    with pytest.raises(ArgumentError, match="create_block_mask"):
        flex(query, key, value, enable_gqa=True, block_mask=lambda b, h, q, k: q >= k)
    with pytest.raises(TypeError, match="block_mask: expected a BlockMask"):
        flex(query, key, value, enable_gqa=True, block_mask=3)
    mask = twt.create_block_mask(lambda b, h, q, k: q >= k, 2, None, 20, 20, "cpu", BLOCK_SIZE=8)
    with pytest.raises(ShapeError, match="20 queries and 20 keys, got 20 and 19"):
        flex(query, key[:, :, :19], value[:, :, :19], enable_gqa=True, block_mask=mask)
    shared = flex(query, key[:1], value[:1], enable_gqa=True, block_mask=mask)
    many = flex(query, key[:1].expand_as(key), value[:1].expand_as(value), enable_gqa=True, block_mask=mask)
    assert torch.equal(shared, many)
    for at in (query[:, :, :0], query[:0]):
        assert flex(at, key[: len(at)], value[: len(at)], enable_gqa=True).shape == at.shape
    assert not flex(query, key[:, :, :0], value[:, :, :0], enable_gqa=True).any()
