"""Where attention's operands lie: strides, odd widths, packed sequences, pages, huge offsets.

Numbers in test names are the groups of the attention fact sheet's section on testable properties.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise.attention import attention, attention_backward, packed_sequences
from tilewise.attention.programs import added_bias
from tilewise.testing import normal
from tilewise.torch.attention.operators import attend

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread


def cut(total: int, *lengths: int) -> Tensor:
    """Cumulative lengths; the last sequence takes what is left."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return torch.tensor([*offsets, total], dtype=torch.int32)


@pytest.mark.parametrize(
    "lengths",
    [((0, 5, 9), (3, 4, 0)), ((4, 0, 5), (4, 6, 0)), ((4, 5, 0), (0, 0, 9)), ((0, 0, 0), (0, 0, 0))],
    ids=["start", "middle", "end", "only empty"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_group_04_sequences_of_length_zero(isa: str, lengths: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Empty sequences at the start, in the middle, at the end, and nothing else; on either side."""
    (a, b, c), (d, e, f) = lengths
    queries, keys = a + b + c, d + e + f
    operands = cases.draw(1, 4, 2, queries, keys, 8, 6, dtype=dtype)
    rows = packed_sequences(cut(queries, a, b), cut(keys, d, e))
    for causal in (False, True):
        out, lse = cases.check(operands, sequences=rows, causal=causal)
        assert not torch.isnan(out).any() and not torch.isnan(lse).any()


def views(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor in other layouts; what lies between is NaN."""
    yield "[batch, length, heads, dim] in memory", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "last axis strided", x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((x.shape[0], 3 * x.shape[1], x.shape[2], x.shape[3] + 3), torch.nan, dtype=x.dtype)
    wide[:, 1::3, :, 1:-2] = x
    yield "sliced heads, odd offset", wide[:, 1::3, :, 1:-2]
    if all(torch.equal(x[:1], x[i : i + 1]) for i in range(x.shape[0])):
        yield "batch of stride 0", x[:1].expand_as(x)
    if all(torch.equal(x[:, :1], x[:, i : i + 1]) for i in range(x.shape[1])):
        yield "heads of stride 0", x[:, :1].expand_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [3, 40])
def test_group_14_strides(isa: str, dtype: torch.dtype, queries: int) -> None:
    """Every layout of every operand and of dO: the same bits, and gradients where the elements lie."""
    base = [x.detach() for x in cases.draw(1, 1, 1, queries, 45, 12, 10, dtype=dtype)]
    operands = [x.repeat(2, 4 if at == 0 else 2, 1, 1) for at, x in enumerate(base)]
    leaves = [x.clone().requires_grad_() for x in operands]
    want = attend(*leaves, causal=True)
    grad = torch.randn(1, 1, queries, 10, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(2, 4, 1, 1)
    want_grad = cases.gradients(want, leaves, grad, None)
    for position in range(3):
        for name, view in views(operands[position]):
            given = [x.detach() for x in operands]
            given[position] = view.detach().requires_grad_()
            out, lse = attend(*given, causal=True)
            assert torch.equal(out, want[0]) and torch.equal(lse, want[1]), (position, name)
            (found,) = torch.autograd.grad(out, given[position], grad)
            assert torch.equal(found, want_grad[position]), (position, name)
    for name, view in views(grad):
        found = torch.autograd.grad(want[0], leaves, view, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, want_grad, strict=True)), name
    # Through an expand, torch sums what the kernel gives each copy.
    small = [x.requires_grad_() for x in base]
    out, _ = attend(*(x.expand_as(y) for x, y in zip(small, operands, strict=True)), causal=True)
    for one, many in zip(torch.autograd.grad(out, small, grad), want_grad, strict=True):
        assert torch.allclose(one.double(), many.double().sum((0, 1), keepdim=True), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_15_head_dims(isa: str, dtype: torch.dtype) -> None:
    """1 to 512, odd ones, value dims of their own; NaN lies right after each tensor."""
    pairs = [(1, 1), (3, 7), (17, 33), (31, 1), (40, 80), (65, 64), (127, 129), (192, 128), (256, 255), (511, 512)]
    for queries in (2, 21):
        for head_dim, value_dim in pairs:
            made = []
            for x in cases.draw(1, 2, 1, queries, 35, head_dim, value_dim, dtype=dtype, grad=False):
                memory = torch.full((x.numel() + 64,), torch.nan, dtype=dtype)
                memory[: x.numel()] = x.flatten()
                made.append(memory[: x.numel()].view(x.shape).requires_grad_())
            cases.check((made[0], made[1], made[2]), causal=True)


@pytest.mark.parametrize("page_size", [1, 7, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 20])
def test_group_20_pages(isa: str, page_size: int, dtype: torch.dtype, queries: int) -> None:
    """Shuffled, shared and partly filled pages give what the same keys in a row give; unused entries are not read."""
    lengths = [0, 1, 130, 77]
    heads, count = 2, sum(-(-length // page_size) for length in lengths)
    query, key, value = cases.draw(4, 4, heads, queries, 130, 16, dtype=dtype, grad=False)
    key[3, :, :70], value[3, :, :70] = key[2, :, :70], value[2, :, :70]  # a shared prefix
    order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(page_size)).tolist()
    pages = [torch.full((count + 3, heads, page_size, 16), torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((4, -(-130 // page_size) + 1), -(10**6), dtype=torch.int32)
    for number, length in enumerate(lengths):
        for slot in range(-(-length // page_size)):
            first = slot * page_size
            if number == 3 and first + page_size <= 70:
                table[3, slot] = table[2, slot]
                continue
            table[number, slot] = page = order.pop()
            last = min(first + page_size, length)
            for memory, x in zip(pages, (key, value), strict=True):
                memory[page, :, : last - first] = x[number, :, first:last]
    batch = torch.arange(4)
    rows = torch.stack([batch, 0 * batch, 0 * batch + queries, batch, 0 * batch, torch.tensor(lengths)], -1)
    for fields in ({}, {"causal": True}, {"left": 20}):
        want = attend(query, key, value, sequences=rows, **fields)
        got = attend(query, *pages, sequences=rows, block_table=table, **fields)
        truth = cases.dense(query, key, value, cases.rules_of(query, sequences=rows, **fields))
        plain = cases.dense(query, key, value, cases.rules_of(query, sequences=rows, **fields), wide=dtype)
        cases.flash_rule(got[0], truth[0], plain[0])
        cases.flash_rule(got[1], truth[1], plain[1])
        near = 4 * torch.finfo(dtype).eps
        assert ((got[0] - want[0]).abs() <= near).all() and torch.equal(torch.isinf(got[1]), torch.isinf(want[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_group_21_packed_sequences(isa: str, dtype: torch.dtype, causal: bool) -> None:
    """Packed = each sequence alone = one block-diagonal mask, forward and backward."""
    total = 150
    operands = cases.draw(1, 4, 2, total, total, 16, dtype=dtype)
    offsets = cut(total, 1, 64, 30)
    rows = packed_sequences(offsets)
    out, lse = cases.check(operands, sequences=rows, causal=causal)
    document = torch.bucketize(torch.arange(total), offsets[1:-1].long(), right=True)
    mask = document[:, None] == document
    if causal:
        mask &= torch.ones_like(mask).tril()
    masked = attend(*operands, mask=mask.expand(1, 4, total, total))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (cases.gradients(x, operands, grad, None) for x in ((out, lse), masked))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    for one, other in zip([out, lse, *ours], [*masked, *theirs], strict=True):
        assert torch.allclose(one, other, **near)
    for at in range(4):
        part = slice(int(offsets[at]), int(offsets[at + 1]))
        alone = attend(*(x[:, :, part] for x in operands), causal=causal)
        assert torch.equal(alone[0], out[:, :, part]) and torch.equal(alone[1], lse[:, :, part])
        found = torch.autograd.grad(alone[0], operands, grad[:, :, part])
        assert all(torch.equal(x[:, :, part], y[:, :, part]) for x, y in zip(found, ours, strict=True))


def test_group_28_offsets_beyond_31_bits() -> None:
    """Rows that lie more than 2^31 elements apart, and sequences that begin beyond row 2^31."""
    step = 2**30 + 5
    memory = np.zeros(4 * step + 64, np.float16)  # only the pages that are touched exist
    small = normal((5, 8), np.float16)
    huge = np.lib.stride_tricks.as_strided(memory, (1, 1, 5, 8), (0, 0, 2 * step, 2))
    huge[0, 0] = small
    query = normal((1, 1, 3, 8), np.float16, seed=1)
    want, want_lse = attention(query, small[None, None], small[None, None], return_lse=True)
    assert np.array_equal(attention(query, huge, huge), want)
    grad = np.ones_like(want)
    got = attention_backward(query, huge[..., :8], small[None, None], want, want_lse, grad)
    same = attention_backward(query, small[None, None], small[None, None], want, want_lse, grad)
    assert np.array_equal(got.query, same.query) and np.array_equal(got.key, same.key)
    far = 2**31 + 7
    key = torch.from_numpy(small[:1].copy()).expand(far + 9, 8)[None, None]
    rows = torch.tensor([[0, 0, 3, 0, far, 9]])
    out = twt.attention(torch.from_numpy(query), key, key, sequences=rows)
    assert torch.allclose(out.float(), torch.from_numpy(small[:1]).float().expand(1, 1, 3, 8), atol=1e-3)


def test_group_30_memory_is_linear() -> None:
    """What autograd keeps is query, key, value, the result and its LSE: nothing grows with the product of lengths."""
    operands = cases.draw(1, 1, 1, 4096, 4096, 8, dtype=torch.float32)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse = attend(*operands, causal=True)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    want = {x.untyped_storage().data_ptr() for x in (*operands, out, lse)}
    assert set(held) == want
    bias = torch.zeros(1, 1, 1, 4096, requires_grad=True)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(*operands, score=added_bias(bias))
    assert max(x.untyped_storage().nbytes() for x in kept) == out.untyped_storage().nbytes()
