"""Attention forward and backward against the dense meaning: rules, edges, heads, the LSE, sinks, dropout.

Numbers in test names are the groups of the attention fact sheet's section on testable properties.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise.attention.programs import Program, added_bias, chained, softcapped
from tilewise.torch.attention.operators import attend

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread
SEED = torch.tensor(7)


def rule_sets(batch: int, heads: int, queries: int, keys: int) -> dict[str, dict[str, Any]]:
    """One entry for every kind of rule, and some together."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
    chosen = torch.randint(-1, -(-keys // 3), (batch, 1, queries, 2), generator=generator)
    blocks = torch.rand(1, heads, -(-queries // 2), -(-keys // 3), generator=generator) < 0.6
    order = torch.argsort(~blocks, dim=-1, stable=True).int()
    window = Program("tilewise-expr 1 mask\nquery\nkey\nsub 0 1\nabs 2\nint 2\nle 3 4\nreturn 5\n")
    listed = {"kv_num_blocks": blocks.sum(-1).int(), "kv_indices": order, "query_block": 2, "key_block": 3}
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"left": 2, "right": 1},
        "left": {"left": 0, "causal": True},
        "mask": {"mask": mask.expand(batch, heads, queries, keys)},
        "selected": {"block_indices": chosen, "block_size": 3},
        "blocks": listed | {"keep": window},
        "mask_mod": {"keep": window},
        "softcap": {"score": softcapped(0.7), "causal": True},
        "scale": {"scale": -0.3},
        "dropout": {"dropout": 0.3, "seed": SEED},
        "all": {"causal": True, "left": 4, "mask": mask.expand(batch, heads, queries, keys), "score": softcapped(2.0)},
    }


@pytest.mark.parametrize("name", rule_sets(1, 2, 5, 7))
@pytest.mark.parametrize("shape", [(1, 2, 1, 5, 7, 3, 2), (2, 2, 2, 3, 2, 5, 4), (1, 3, 1, 1, 9, 2, 2)], ids=str)
def test_group_01_gradcheck(name: str, shape: tuple[int, ...]) -> None:
    """Every kind of rule, with sinks, an added bias and the LSE in the loss; float64, tiny odd shapes."""
    batch, heads, _, queries, keys, *_ = shape
    operands = cases.draw(*shape)
    generator = torch.Generator().manual_seed(3)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(batch, 1, queries, keys, generator=generator, dtype=torch.float64).requires_grad_()
    fields = rule_sets(batch, heads, queries, keys)[name]

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score = chained(fields.get("score"), added_bias(bias))
        return attend(query, key, value, **(fields | {"sinks": sinks, "score": score}))

    assert torch.autograd.gradcheck(run, (*operands, sinks, bias), check_undefined_grad=False)


@pytest.mark.parametrize("name", rule_sets(1, 2, 5, 7))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rules_equal_the_dense_meaning(isa: str, name: str, dtype: torch.dtype) -> None:
    for shape in ((2, 4, 2, 70, 131, 24, 20), (1, 2, 1, 3, 200, 16, 16)):
        batch, heads, _, queries, keys, *_ = shape
        fields = rule_sets(batch, heads, queries, keys)[name]
        drop = None
        if "dropout" in fields:
            drop = torch.cat([cases.dropped(7, 0.3, heads, queries, keys, number) for number in range(batch)])
        cases.check(cases.draw(*shape, dtype=dtype), drop=drop, extra=3e-4 if "score" in fields else 0.0, **fields)


@pytest.mark.parametrize("queries", [4, 70])
def test_group_02_empty_rows(isa: str, queries: int) -> None:
    """Rows that attend nothing among rows that do, in one tile: 0, -inf, and gradients of exactly 0."""
    operands = cases.draw(2, 4, 2, queries, 33, 16)
    mask = torch.ones(2, 4, queries, 33, dtype=torch.bool)
    mask[:, :, 1::3] = False
    out, lse = cases.check(operands, mask=mask)
    assert torch.equal(out[:, :, 1::3], torch.zeros_like(out[:, :, 1::3]))
    assert (lse[:, :, 1::3] == -torch.inf).all() and torch.isfinite(lse[:, :, ::3]).all()
    found = cases.gradients((out, lse), operands, torch.ones_like(out), None)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert not found[0][:, :, 1::3].any() and found[0][:, :, ::3].any()
    # A row's own gradients through the LSE of an empty row are nobody's.
    out, lse = attend(*operands, mask=torch.zeros_like(mask))
    found = torch.autograd.grad([out, lse], operands, [torch.ones_like(out), torch.ones_like(lse)])
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4, 5), (2, 0, 0, 3, 4, 5), (2, 2, 1, 0, 4, 5), (2, 2, 1, 3, 0, 5)], ids=str
)
@pytest.mark.parametrize("sunk", [False, True])
def test_group_03_empty_extents(isa: str, shape: tuple[int, ...], sunk: bool) -> None:
    """B = 0, H = 0, Sq = 0, Sk = 0: right shapes, zeros, LSE -inf or the sink; the backward runs."""
    operands = cases.draw(*shape)
    sinks = torch.ones(shape[1], dtype=torch.float64, requires_grad=True) if sunk else None
    out, lse = attend(*operands, sinks=sinks, causal=True)
    assert out.shape == (*shape[:2], shape[3], 5) and not out.any()
    assert (lse == (1.0 if sunk else -torch.inf)).all()
    leaves = [*operands] + ([sinks] if sunk else [])
    found = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
    assert all(g.shape == leaf.shape and torch.isfinite(g).all() for g, leaf in zip(found, leaves, strict=True))
    if sunk:
        assert torch.equal(found[3], torch.full_like(found[3], lse[:, :1].numel()))  # d LSE / d sink = 1


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("queries", [3, 40])
def test_group_16_grouped_queries_equal_repeated_keys(isa: str, group: int, key_heads: int, queries: int) -> None:
    operands = cases.draw(2, group * key_heads, key_heads, queries, 45, 12)
    cases.check(operands, causal=True)
    query, key, value = operands
    many = attend(query, *(x.repeat_interleave(group, 1) for x in (key, value)), causal=True)
    few = attend(*operands, causal=True)
    assert torch.allclose(few[0], many[0], rtol=1e-12, atol=1e-13)
    grad = torch.randn(few[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        cases.gradients(few, operands, grad, None), cases.gradients(many, operands, grad, None), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


def test_group_17_what_a_row_does_not_see(isa: str) -> None:
    """Permuted keys leave O; a constant on a row's scores, or a vector on all keys, shifts its LSE alone."""
    query, key, value = cases.draw(1, 2, 2, 9, 70, 8, grad=False)
    mask = torch.rand(1, 2, 9, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    out, lse = attend(query, key, value, mask=mask)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    other = attend(query, key[:, :, order], value[:, :, order], mask=mask[..., order])
    assert torch.allclose(other[0], out, rtol=1e-12) and torch.allclose(other[1], lse, rtol=1e-12)
    row = torch.arange(9.0, dtype=torch.float64).view(1, 1, 9, 1)
    other = attend(query, key, value, mask=mask, score=added_bias(row))
    assert torch.allclose(other[0], out, rtol=1e-11) and torch.allclose(other[1], lse + row[..., 0], rtol=1e-12)
    shift = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    other = attend(query, key + shift, value, mask=mask)
    assert torch.allclose(other[0], out, rtol=1e-11)
    assert torch.allclose(other[1], lse + 8**-0.5 * (query @ shift), rtol=1e-11)


@pytest.mark.parametrize("queries", [2, 40])
def test_group_18_probabilities(isa: str, queries: int) -> None:
    """V of ones gives ones; one-hot V gives probabilities; results stay between the values' extremes."""
    query, key, value = cases.draw(1, 2, 1, queries, 50, 8, grad=False)
    ones, _ = attend(query, key, torch.ones_like(value), causal=True)
    seen = torch.arange(queries) + 50 - queries >= 0
    assert torch.allclose(ones[:, :, seen], torch.ones_like(ones[:, :, seen]), rtol=1e-14)
    hot = torch.eye(50, dtype=torch.float64).expand(1, 1, 50, 50)
    weights, lse = attend(query, key, hot, causal=True)
    place = torch.arange(queries)[:, None] + 50 - queries
    scores = (query @ key.mT * 8**-0.5).masked_fill(torch.arange(50) > place, -torch.inf)
    assert torch.allclose(weights, scores.softmax(-1), rtol=1e-12, atol=1e-15)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=1e-13)
    out, _ = attend(query, key, value, causal=True)
    low, high = value.amin(2, keepdim=True), value.amax(2, keepdim=True)
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


@pytest.mark.parametrize("queries", [2, 40])
def test_group_24_gradient_through_the_lse(isa: str, queries: int) -> None:
    """loss = sum(LSE): dV = 0, dQ = scale P K, dK = scale P^T Q; halves merged differentiate like the whole."""
    operands = cases.draw(1, 2, 2, queries, 50, 8)
    query, key, value = operands
    _, lse = attend(*operands)
    grad_query, grad_key, grad_value = cases.gradients((lse, lse), operands, None, torch.ones_like(lse))
    weights = (query @ key.mT * 8**-0.5).softmax(-1).detach()
    assert not grad_value.any()
    assert torch.allclose(grad_query, 8**-0.5 * weights @ key, rtol=1e-11, atol=1e-13)
    assert torch.allclose(grad_key, 8**-0.5 * weights.mT @ query, rtol=1e-11, atol=1e-13)
    halves = [attend(query, key[:, :, part], value[:, :, part]) for part in (slice(0, 31), slice(31, 50))]
    merged = twt.merge_attention(*zip(*halves, strict=True))
    whole = attend(*operands)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in whole]
    for one, other in zip(
        cases.gradients(merged, operands, *grads), cases.gradients(whole, operands, *grads), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("queries", [2, 40])
def test_group_25_sinks(isa: str, queries: int) -> None:
    """-inf is none; huge takes everything; on an empty row O = 0 and LSE = sink; gradients by the sinks."""
    operands = cases.draw(2, 4, 2, queries, 40, 16)
    for sinks in ([0.0, 1.0, -1.0, 3.0], [200.0, -200.0, 1e4, 0.0]):
        # A logit of size s is rounded by s * eps.
        given = torch.tensor(sinks, dtype=torch.float64, requires_grad=True)
        cases.check(operands, sinks=given, causal=True, extra=4 * 2.0**-52 * float(given.detach().abs().max()))
    none = attend(*operands, sinks=torch.full((4,), -torch.inf, dtype=torch.float64), causal=True)
    plain = attend(*operands, causal=True)
    assert torch.equal(none[0], plain[0]) and torch.equal(none[1], plain[1])
    huge = torch.full((4,), 1e4, dtype=torch.float64, requires_grad=True)
    outputs = attend(*operands, sinks=huge)
    assert not outputs[0].any() and (outputs[1] == 1e4).all()
    found = cases.gradients(outputs, [*operands, huge], torch.ones_like(outputs[0]), torch.ones_like(outputs[1]))
    assert not any(gradient.any() for gradient in found[:3])
    assert torch.allclose(found[3], torch.full_like(huge, 2.0 * queries))
    empty = torch.zeros(2, 4, queries, 40, dtype=torch.bool)
    out, lse = attend(*operands, sinks=torch.arange(4.0, dtype=torch.float64), mask=empty)
    assert not out.any()
    assert torch.allclose(lse, torch.arange(4.0, dtype=torch.float64).view(1, 4, 1), rtol=1e-15)


@pytest.mark.parametrize(("queries", "keys"), [(3, 50), (33, 50)])
def test_group_27_dropout(isa: str, queries: int, keys: int) -> None:
    """None at 0, all at 1, the documented Philox in between, the same in the backward pass; the mean converges."""
    operands = cases.draw(2, 4, 2, queries, keys, 8)
    plain = attend(*operands, causal=True)
    zero = attend(*operands, causal=True, dropout=0.0, seed=SEED)
    assert torch.equal(plain[0], zero[0])
    keep = torch.cat([cases.dropped(7, 0.4, 4, queries, keys, number) for number in range(2)])
    assert 0.5 < keep.double().mean() < 0.7
    out, lse = cases.check(operands, dropout=0.4, seed=SEED, causal=True, drop=keep)
    assert torch.equal(lse, plain[1]), "the LSE is that of all weights"
    again = attend(*operands, dropout=0.4, seed=SEED, causal=True)
    assert torch.equal(again[0], out)
    other = attend(*operands, dropout=0.4, seed=torch.tensor(8), causal=True)
    assert not torch.equal(other[0], out)
    large = 2**63 - 2**40 + 5
    keep = torch.cat([cases.dropped(large, 0.4, 4, queries, keys, number) for number in range(2)])
    cases.check(operands, dropout=0.4, seed=torch.tensor(large), drop=keep)
    nothing = attend(*operands, dropout=1.0, seed=SEED)
    assert not nothing[0].any()
    found = cases.gradients(nothing, operands, torch.ones_like(nothing[0]), None)
    assert not any(gradient.any() for gradient in found)


def test_group_27_the_mean_over_seeds_is_the_undropped_result() -> None:
    query, key, value = cases.draw(1, 2, 2, 8, 20, 8, grad=False, dtype=torch.float32)
    truth = attend(query, key, value)[0]
    total = sum(attend(query, key, value, dropout=0.25, seed=torch.tensor(seed))[0] for seed in range(600))
    # A weight's variance is p^2 / 3, so the mean of 600 is within five deviations of 0.03.
    assert float((total / 600 - truth).abs().max()) < 0.15
    assert float((total / 600 - truth).abs().mean()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 192, 256])
def test_group_29_flash_tolerance(dtype: torch.dtype, head_dim: int) -> None:
    """flash_attn's rule for 16 bits, on its grid of lengths."""
    lengths = [1, 63, 64, 65, 127, 128, 129]
    pairs = list(itertools.product(lengths, lengths))[head_dim % 3 :: 3]
    for at, (queries, keys) in enumerate(pairs):
        cases.check(cases.draw(1, 2, 1, queries, keys, head_dim, dtype=dtype, seed=at), causal=at % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [513, 1])
def test_group_29_long_rows(isa: str, dtype: torch.dtype, queries: int) -> None:
    cases.check(cases.draw(1, 2, 1, queries, 1024, 64, dtype=dtype), causal=True)
