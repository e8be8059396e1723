"""Which keys a query attends: causality, windows, block masks, programs; torch's own flex_attention as a witness.

Numbers in test names are the groups of the attention fact sheet's section on testable properties.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

import tilewise.torch as twt
from tilewise.torch.attention.operators import attend

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(5, 2), (2, 5), (1, 1), (70, 3), (130, 65), (3, 300)])
def test_group_05_causal_is_bottom_right(isa: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    out, lse = cases.check(cases.draw(1, 2, 1, queries, keys, 8, dtype=dtype), causal=True)
    empty = max(0, queries - keys)
    assert not out[:, :, :empty].any() and (lse[:, :, :empty] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, empty:]).all()


@pytest.mark.parametrize("edge", [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513])
def test_group_05_around_tiles(edge: int) -> None:
    """Lengths around every multiple that a tile might have, on either side, forward and backward."""
    for queries, keys in ((edge, edge), (1, edge), (edge, 40), (40, edge)):
        cases.check(cases.draw(1, 2, 1, queries, keys, 8, dtype=torch.float32), causal=True)
        cases.check(cases.draw(1, 2, 1, queries, keys, 8, dtype=torch.float32))


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (40, 70), (70, 40), (1, 90), (4, 9)])
def test_group_06_windows(isa: str, queries: int, keys: int) -> None:
    operands = cases.draw(1, 2, 1, queries, keys, 16, 8)
    for left, right in ((0, 0), (3, None), (None, 2), (10, 5), (0, 100), (200, 200)):
        for causal in (False, True):
            cases.check(operands, left=left, right=right, causal=causal)
    one, other = attend(*operands, right=0), attend(*operands, causal=True)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    if queries == keys:  # each query sees its own key alone
        single = [x.detach().float() for x in operands]
        diagonal, _ = attend(*single, left=0, right=0)
        assert torch.equal(diagonal, single[2].repeat_interleave(2, 1))
    # A window that no key is in: every row before the first key.
    query, key, value = cases.draw(1, 1, 1, 9, 2, 4)
    out, lse = cases.check((query, key, value), left=0, right=0)
    assert not out[:, :, :7].any() and (lse[:, :, :7] == -torch.inf).all()


def block_diagonal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q // 24 == k // 24) & (q >= k)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (128, 32), (256, 256), (24, 24)], ids=str)
def test_group_22_block_masks(isa: str, sizes: tuple[int, int]) -> None:
    """Partial and full = all partial = the dense mask; garbage after the counts is not read."""
    operands = cases.draw(2, 4, 2, 150, 130, 16)
    mask = twt.create_block_mask(block_diagonal, None, None, 150, 130, "cpu", BLOCK_SIZE=sizes)
    together = twt.create_block_mask(
        block_diagonal, None, None, 150, 130, "cpu", BLOCK_SIZE=sizes, separate_full_blocks=False
    )
    dense = twt.create_mask(block_diagonal, None, None, 150, 130, "cpu")
    want = twt.attention(*operands, mask=dense, return_lse=True)
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for x in want]
    want_grad = cases.gradients(want, operands, *grads)
    order = torch.argsort(torch.rand(mask.kv_indices.shape, generator=torch.Generator().manual_seed(1)), -1).int()
    used = torch.arange(mask.kv_indices.shape[-1]) < mask.kv_num_blocks[..., None]
    spoiled = twt.BlockMask.from_kv_blocks(
        mask.kv_num_blocks, torch.where(used, mask.kv_indices, order), mask.full_kv_num_blocks, mask.full_kv_indices,
        BLOCK_SIZE=sizes, mask_mod=block_diagonal, seq_lengths=(150, 130),
    )  # fmt: skip
    for one in (mask, together, spoiled):
        got = twt.flex_attention(*operands, block_mask=one, enable_gqa=True, return_lse=True)
        found = cases.gradients(got, operands, *grads)
        for x, y in zip([*got, *found], [*want, *want_grad], strict=True):
            assert torch.allclose(x, y, rtol=1e-11, atol=1e-13)


def mods(batch: int, heads: int, queries: int, keys: int) -> dict[str, Any]:
    """Score functions with what they capture: ``(function, captured tensors)``."""
    random = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    slopes, by_batch, full, relative = draw(heads), draw(batch), draw(heads, queries, keys), draw(2 * keys + 9)
    by_key, scalar, table = draw(keys), draw(), draw(batch, heads)
    lookup = torch.randint(0, 2 * keys + 9, (queries + keys,), generator=random)
    return {
        "identity": (lambda s, b, h, q, k: s, []),
        "alibi": (lambda s, b, h, q, k: s + slopes[h] * (k - q), [slopes]),
        "softcap": (lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0), []),
        "learned cap": (lambda s, b, h, q, k: torch.tanh(s * scalar), [scalar]),
        "relu at 0": (lambda s, b, h, q, k: torch.relu(s * (q % 2)), []),
        "where": (lambda s, b, h, q, k: torch.where(q >= k, s * table[b, h], s - 1.0), [table]),
        "full bias": (lambda s, b, h, q, k: s + full[h, q, k], [full]),
        "bias by batch and key": (lambda s, b, h, q, k: s * by_batch[b] + by_key[k], [by_batch, by_key]),
        "relative table": (lambda s, b, h, q, k: s + relative[q - k + keys], [relative]),
        "repeated indices": (lambda s, b, h, q, k: s + relative[lookup[q + k]] * relative[0], [relative]),
        "minus infinity": (lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), []),
    }


@pytest.mark.parametrize("name", mods(1, 1, 1, 1))
@pytest.mark.parametrize("shape", [(2, 4, 2, 6, 9), (1, 2, 1, 70, 80), (2, 2, 2, 1, 150)], ids=str)
def test_group_23_score_mods_and_captured_gradients(name: str, shape: tuple[int, ...]) -> None:
    """Every kind of capture and kink, against autograd on the dense scores; values against torch's flex_attention."""
    batch, heads, _, queries, keys = shape
    function, captures = mods(batch, heads, queries, keys)[name]
    operands = cases.draw(*shape, 8)
    query, key, value = operands
    group = heads // key.shape[1]
    many_key, many_value = (x.repeat_interleave(group, 1) for x in (key, value))
    b, h, q, k = (
        torch.arange(extent).view([-1 if axis == at else 1 for axis in range(4)])
        for at, extent in enumerate((batch, heads, queries, keys))
    )
    scores = function(query @ many_key.mT * 8**-0.5, b, h, q, k)
    truth = scores.softmax(-1).nan_to_num(0.0) @ many_value, scores.logsumexp(-1)
    got = twt.flex_attention(*operands, function, enable_gqa=True, return_lse=True)
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for x in truth]
    leaves = [*operands, *captures]
    found, want = (cases.gradients(x, leaves, *grads) for x in (got, truth))
    for x, y in zip([*got, *found], [*truth, *want], strict=True):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=1e-9, atol=1e-11)
    for capture in captures:
        capture.requires_grad_(False)  # torch refuses gradients on a CPU, even where none is asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        eager = theirs.flex_attention(*(x.detach() for x in operands), function, enable_gqa=True)
    assert torch.allclose(got[0], eager, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [3, 70])
def test_group_23_score_mods_in_low_precision(isa: str, dtype: torch.dtype, queries: int) -> None:
    """Captures in the model's type: gradients come back in it."""
    random = torch.Generator().manual_seed(0)
    slopes = torch.randn(4, generator=random).to(dtype).requires_grad_()
    table = torch.randn(4, 301, generator=random).to(dtype).requires_grad_()
    from tilewise.torch.attention.dense import traced

    score = traced(lambda s, b, h, q, k: s * slopes[h] + table[h, k - q + 150], "score")
    cases.check(cases.draw(2, 4, 2, queries, 131, 16, dtype=dtype), score=score, factor=3.0, extra=1e-5)


def test_group_23_minus_infinity_is_a_mask(isa: str) -> None:
    """A score of -inf and a mask_mod of False agree, gradients included; rows without anything are empty."""
    operands = cases.draw(1, 2, 2, 40, 30, 8)

    def keep(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q - 7) & (k % 3 != 0)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.where(keep(b, h, q, k), s, -torch.inf)

    one = twt.attention(*operands, mask_mod=keep, return_lse=True)
    other = twt.attention(*operands, score_mod=score, return_lse=True)
    assert (one[1][:, :, :8] == -torch.inf).all() and not one[0][:, :, :8].any()
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for x in one]
    found = [cases.gradients(x, operands, *grads) for x in (one, other)]
    for x, y in zip([*one, *found[0]], [*other, *found[1]], strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_torch_flex_attention(name: str, dtype: torch.dtype) -> None:
    """torch's own BlockMask objects, its eager values, its LSE."""
    document = torch.randint(0, 3, (140,), generator=torch.Generator().manual_seed(0)).sort().values
    functions: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= 30),
        "documents": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
    }
    operands = cases.draw(2, 4, 2, 140, 140, 16, dtype=dtype, grad=False)
    mask = theirs.create_block_mask(functions[name], None, None, 140, 140, device="cpu", BLOCK_SIZE=32)
    ask = theirs.AuxRequest(lse=True)
    got, aux = twt.flex_attention(*operands, block_mask=mask, enable_gqa=True, return_aux=ask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, plain_aux = theirs.flex_attention(*operands, block_mask=mask, enable_gqa=True, return_aux=ask)
        exact = [x.double() for x in operands]
        truth, truth_aux = theirs.flex_attention(*exact, block_mask=mask, enable_gqa=True, return_aux=ask)
    cases.flash_rule(got, truth, plain)
    cases.flash_rule(aux.lse, truth_aux.lse, plain_aux.lse)
