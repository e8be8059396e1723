"""Every mask of tilewise.masks and every mod of tilewise.mods through flex_attention: gradcheck, and the dense formula.

Captured tables are learnable here wherever they are floats.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise import expr, masks, mods
from tilewise.attention import attention, attention_backward, create_block_mask
from tilewise.attention.programs import Program
from tilewise.expr import Mod

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread


def tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def learnable(mod: Mod, dtype: torch.dtype) -> tuple[Mod, list[Tensor]]:
    """The mod with its float captures as leaves of a type."""
    captures = [tensor(x) for x in mod.captures]
    captures = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in captures]
    return Mod(mod.kind, mod.program, tuple(captures), mod.names), [x for x in captures if x.is_floating_point()]


def plain(mod: Mod) -> Program:
    return Program(mod.program, tuple(tensor(x) for x in mod.captures))


def small(name: str) -> tuple[Any, int, int]:
    """A mask with lengths as small as it allows: ``(function, queries, keys)``."""
    entry = masks.EXAMPLES[name]
    queries, keys = (
        (entry.queries, entry.keys) if entry.fixed else (max(entry.queries // 8, 1), max(entry.keys // 8, 1))
    )
    try:
        return entry.make(queries, keys), queries, keys
    except ValueError:  # some masks name their lengths
        return entry.make(entry.queries, entry.keys), entry.queries, entry.keys


@pytest.mark.parametrize("name", masks.EXAMPLES)
def test_gradients_of_every_mask(name: str) -> None:
    """gradcheck in float64 through a block mask, and every gradient against autograd on the dense mask."""
    function, queries, keys = small(name)
    mask = twt.create_block_mask(function, None, None, queries, keys, "cpu", BLOCK_SIZE=4)
    operands = cases.draw(1, 1, 1, queries, keys, 3, 2)  # some masks have a table for one head

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = twt.flex_attention(query, key, value, block_mask=mask, enable_gqa=True, return_lse=True)
        return out, torch.where(torch.isinf(lse), 0.0, lse)

    assert torch.autograd.gradcheck(run, operands, fast_mode=queries * keys > 400, check_undefined_grad=False)
    blocks = {
        field: getattr(mask, field)
        for field in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    }
    cases.check(operands, keep=plain(mask.mod), query_block=4, key_block=4, **blocks)


@pytest.mark.parametrize("name", masks.EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_every_mask(name: str, dtype: torch.dtype) -> None:
    entry = masks.EXAMPLES[name]
    function = entry.make(entry.queries, entry.keys)
    mask = twt.create_block_mask(function, None, None, entry.queries, entry.keys, "cpu", BLOCK_SIZE=entry.block)
    dense = twt.create_mask(function, None, None, entry.queries, entry.keys, "cpu")
    operands = cases.draw(1, 4, 2, entry.queries, entry.keys, 16, dtype=dtype, grad=False)
    got = twt.flex_attention(*operands, block_mask=mask, enable_gqa=True, return_lse=True)
    rules = cases.rules_of(operands[0], mask=dense.expand(1, 4, entry.queries, entry.keys))
    truth, low = cases.dense(*operands, rules), cases.dense(*operands, rules, wide=dtype)
    cases.flash_rule(got[0], truth[0], low[0])
    cases.flash_rule(got[1], truth[1], low[1])


@pytest.mark.parametrize("name", mods.EXAMPLES)
def test_gradients_of_every_mod(name: str) -> None:
    """gradcheck in float64 by query, key, value and every learnable capture."""
    mod, captures = learnable(expr.trace(mods.EXAMPLES[name](6, 7), "score"), torch.float64)
    operands = cases.draw(1, 4, 2, 6, 7, 3, 2)

    def run(query: Tensor, key: Tensor, value: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(tables)
        bound = tuple(next(given) if x.is_floating_point() else x for x in mod.captures)
        function = Mod(mod.kind, mod.program, bound, mod.names)
        return twt.flex_attention(query, key, value, function, enable_gqa=True, return_lse=True)

    assert torch.autograd.gradcheck(run, (*operands, *captures), check_undefined_grad=False)


@pytest.mark.parametrize("name", mods.EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [2, 45])
def test_values_and_gradients_of_every_mod(isa: str, name: str, dtype: torch.dtype, queries: int) -> None:
    mod, _ = learnable(expr.trace(mods.EXAMPLES[name](queries, 70), "score"), torch.float32)
    operands = cases.draw(1, 4, 2, queries, 70, 16, dtype=dtype)
    cases.check(operands, score=Program(mod.program, mod.captures), factor=3.0, extra=3e-4)


@pytest.mark.parametrize("name", [*mods.EXAMPLES, "causal", "document", "sliding_window", "packed_causal_document"])
def test_numpy_and_torch_agree(name: str) -> None:
    """The NumPy front, forward and backward, on NumPy functions: the bits of the torch front."""
    queries = keys = 24
    query, key, value = cases.draw(1, 4, 2, queries, keys, 8)
    arrays = [x.detach().numpy() for x in (query, key, value)]
    options: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    leaves = [query, key, value]
    if name in mods.EXAMPLES:
        traced = expr.trace(mods.EXAMPLES[name](queries, keys), "score")
        mod, captures = learnable(traced, torch.float64)
        options["score_mod"] = Mod(mod.kind, mod.program, tuple(x.detach().numpy() for x in mod.captures), mod.names)
        theirs["score_mod"] = mod
        leaves += captures
    else:
        function = masks.EXAMPLES[name].make(queries, keys)
        options["block_mask"] = create_block_mask(function, None, None, queries, keys, BLOCK_SIZE=8)
        theirs["block_mask"] = twt.create_block_mask(function, None, None, queries, keys, "cpu", BLOCK_SIZE=8)
    out, lse = attention(*arrays, return_lse=True, **options)
    want = twt.attention(query, key, value, return_lse=True, **theirs)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, want[0].detach()) and np.array_equal(lse, want[1].detach())
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for x in want]
    got = attention_backward(*arrays, out, lse, grads[0].numpy(), grad_lse=grads[1].numpy(), **options)
    found = [got.query, got.key, got.value, *(x for x in got.captures if x is not None)]
    for one, other in zip(found, torch.autograd.grad(want, leaves, grads), strict=True):
        assert np.array_equal(one, other)


def test_numpy_options() -> None:
    """Soft cap, dropout with a seed, sequences, pages and splits on the NumPy floor."""
    from tilewise.attention import packed_sequences
    from tilewise.errors import ArgumentError, UnsupportedError

    query, key, value = (x.detach().numpy() for x in cases.draw(1, 4, 2, 30, 30, 8, dtype=torch.float32))
    tensors = [torch.from_numpy(x) for x in (query, key, value)]
    for options in ({"softcap": 2.0}, {"dropout": 0.3, "seed": 2**63 + 5}, {"window": (3, 0), "splits": 3}):
        want = twt.attention(*tensors, causal=True, **options)
        assert np.array_equal(attention(query, key, value, causal=True, **options), want)
    rows = packed_sequences(np.array([0, 10, 30]))
    out = attention(query, key, value, sequences=rows, causal=True)
    alone = attention(query[:, :, 10:], key[:, :, 10:], value[:, :, 10:], causal=True)
    assert np.allclose(out[:, :, 10:], alone, rtol=1e-6)
    assert not attention(query, key, value, sequences=rows[1:])[:, :, :10].any()
    pages = [np.ascontiguousarray(x[0].reshape(2, 3, 10, 8).transpose(1, 0, 2, 3)) for x in (key, value)]
    table = np.array([[0, 9], [1, 2]])
    paged = attention(query, *pages, sequences=rows, block_table=table, causal=True)
    assert np.allclose(paged, out, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="pages have no gradient"):
        attention_backward(query, *pages, out, out[..., 0], out, sequences=rows, block_table=table)
    with pytest.raises(ArgumentError, match="seed: expected an integer from 0"):
        attention(query, key, value, dropout=0.1, seed=-1)
