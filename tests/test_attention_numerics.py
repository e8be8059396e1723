"""Attention at the edges of arithmetic: huge scores, rescaling, exp2, NaN and infinity, splits, the same bits.

Numbers in test names are the groups of the attention fact sheet's section on testable properties.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise import reference
from tilewise.attention import merge
from tilewise.attention.programs import softcapped
from tilewise.testing import force_threads
from tilewise.torch.attention.operators import attend

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread


@pytest.mark.parametrize("queries", [3, 40])
def test_group_07_first_visited_keys_masked(isa: str, queries: int) -> None:
    """Rows whose first, middle or last tiles of keys are masked away altogether, and others not."""
    operands = cases.draw(1, 2, 2, queries, 600, 16, dtype=torch.float32)
    mask = torch.ones(1, 2, queries, 600, dtype=torch.bool)
    mask[:, :, 0, :300] = False
    mask[:, :, 1, 300:] = False
    mask[:, :, 2, 64:599] = False
    mask[:, :, 2, :64] = False
    mask[:, 1, ::5, 100:500] = False
    out, lse = cases.check(operands, mask=mask)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_08_magnitudes(isa: str, queries: int, dtype: torch.dtype) -> None:
    """Scores of +-1e4 and +-1e30; rising by more than tau at every tile (rescale each), and falling (never)."""
    eps = torch.finfo(dtype).eps
    for size in (1e4, 1e30):
        query, key, value = cases.draw(1, 2, 2, queries, 300, 8, dtype=dtype, grad=False)
        query, key = (x * size**0.5 for x in (query, key))
        out, lse = attend(query, key, value)
        truth, truth_lse, _ = cases.dense(query, key, value, cases.rules_of(query))
        rounding = 32 * eps * size  # of a score
        assert float((lse - truth_lse).abs().max()) < rounding
        # Where one key wins by more than all roundings, its value is the result.
        scores = query.double() @ key.double().mT * 8**-0.5
        first, second = scores.topk(2, -1).values.unbind(-1)
        clear = first - second > 2 * rounding + 100
        assert torch.isfinite(out).all() and (clear.any() or size < 1e5)
        assert torch.equal(out[clear], truth.to(dtype)[clear])
        if size < 1e5:
            assert float((out - truth).abs().max()) < rounding * float(value.abs().max())
    steps = torch.arange(300, dtype=dtype) // 16 * 12.0
    for order in (steps, -steps, steps.flip(0)):
        query = torch.ones(1, 1, queries, 1, dtype=dtype, requires_grad=True)
        key = order.clone().view(1, 1, 300, 1).requires_grad_()
        value = cases.draw(1, 1, 1, queries, 300, 1, 8, dtype=dtype)[2]
        cases.check((query, key, value), scale=1.0, extra=216**2 * eps)  # a rounding of a score, times a key


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("growth", [4.0, 7.999, 8.0, 8.001, 30.0])
def test_group_09_conditional_rescale(isa: str, queries: int, growth: float) -> None:
    """tau = 0, 4, 8 and 20 agree to rounding where scores grow by exactly tau, just less, and just more."""
    steps = (torch.arange(640) // 64 * growth * np.log(2.0)).to(torch.float32)
    query = torch.ones(1, 1, queries, 1)
    key = steps.view(1, 1, 640, 1)
    value = cases.draw(1, 1, 1, 1, 640, 1, 8, dtype=torch.float32, grad=False)[2]
    truth, truth_lse, _ = cases.dense(query, key, value, cases.rules_of(query, scale=1.0))
    for tau in (0.0, 4.0, 8.0, 20.0):
        out, lse = attend(query, key, value, scale=1.0, threshold=tau)
        bound = 2.0**-23 * (16 + float(steps.max()))
        assert float((out - truth).abs().max()) < bound * 4
        assert float((lse - truth_lse).abs().max()) < bound


def test_group_10_exponential(isa: str) -> None:
    """Weights of scores from -87 to 0 are e^s, monotone, exactly 0 at -inf and 1 at 0; in decode and in prefill."""
    scores = torch.cat([torch.linspace(-87, 0, 500), torch.tensor([0.0, -torch.inf])])
    for queries in (1, 24):
        query = torch.ones(1, 1, queries, 1)
        key = torch.where(torch.isinf(scores), 0.0, scores).view(1, 1, 502, 1)
        hot = torch.eye(502).view(1, 1, 502, 502)
        keep = torch.isfinite(scores).expand(1, 1, queries, 502)
        weights, _ = attend(query, key, hot, scale=1.0, mask=keep)
        relative = weights[0, 0].double() / weights[0, 0, :, 500:501].double()
        truth = scores.double().exp()
        rounding = 2.0**-23 * (2 + scores[:501].abs().double())  # of the product with log2 e
        assert ((relative[:, :501] / truth[:501] - 1).abs() < rounding + 4e-7).all()
        assert (relative[:, 501] == 0).all() and (relative[:, 500] == 1).all()
        assert (relative[:, :500].diff(dim=-1) >= 0).all()
        tiny, _ = attend(query, torch.tensor([0.0, -200.0]).view(1, 1, 2, 1), torch.eye(2).view(1, 1, 2, 2), scale=1.0)
        assert torch.equal(tiny[0, 0, 0], torch.tensor([1.0, 0.0])), "below the smallest number"


def close(one: Tensor, other: Tensor, bound: float) -> bool:
    """Equal up to `bound`; bit for bit if that is 0."""
    return torch.equal(one, other) if bound == 0 else bool(((one - other).abs() <= bound * (1 + other.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("queries", [2, 40])
def test_group_11_nan_and_infinity_stay_in_their_rows(isa: str, dtype: torch.dtype, queries: int) -> None:
    """A NaN or infinity in q, k or v reaches the rows that attend it, forward and backward, and no other."""
    clean = cases.draw(1, 2, 2, queries, 40, 8, dtype=dtype)
    want = attend(*clean, causal=True)
    grad = torch.ones_like(want[0])
    want_grad = cases.gradients(want, clean, grad, None)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for which in range(3):
            operands = [x.detach().clone() for x in clean]
            operands[which][0, 0, -1, 3] = bad
            operands = [x.requires_grad_() for x in operands]
            out, lse = attend(*operands, causal=True)
            # The last key is attended by the last query alone, and the last query attends all. An infinite score may
            # move the reference of its neighbours in the tile, which costs them a rounding.
            found = cases.gradients((out, lse), operands, grad, None)
            for one, other in ((out, want[0]), (lse, want[1]), (found[0], want_grad[0])):
                assert close(one[:, :, :-1], other[:, :, :-1], 0.0 if bad != bad else 8 * torch.finfo(dtype).eps)
            assert torch.equal(out[:, 1], want[0][:, 1]), "another head"
            assert all(torch.equal(x[:, 1], y[:, 1]) for x, y in zip(found, want_grad, strict=True))
            touched = out[0, 0, -1] if which < 2 else out[0, 0, -1, 3]
            if bad != bad:
                assert torch.isnan(touched).all()
            elif which == 2:
                assert touched == bad and torch.isfinite(out[0, 0, -1, :3]).all()
    query, key, value = (x.detach().clone() for x in clean)
    key[0, 0, -1] = torch.nan
    assert torch.isnan(attend(query, key, value, causal=True)[0][0, 0, -1]).all()


@pytest.mark.parametrize("queries", [2, 40])
def test_group_11_masked_nan_does_not_leak(isa: str, queries: int) -> None:
    """NaN in masked keys, beyond a sequence's end, and in unlisted blocks: nothing of it, in results or gradients."""
    clean = cases.draw(1, 2, 2, queries, 70, 8, dtype=torch.float32)
    mask = torch.ones(1, 2, queries, 70, dtype=torch.bool)
    mask[..., 37:41] = False
    lists = torch.tensor([0, 2, 3]).expand(1, 1, -(-queries // 16), 3).int().contiguous()
    counts = torch.full((1, 1, lists.shape[2]), 3, dtype=torch.int32)
    listed = {"full_kv_num_blocks": counts, "full_kv_indices": lists, "query_block": 16, "key_block": 16}
    listed |= {"kv_num_blocks": torch.zeros_like(counts), "kv_indices": torch.full_like(lists, -1)}
    rows = torch.tensor([[0, 0, queries, 0, 0, 61]])
    for fields, bad in (({"mask": mask}, slice(37, 41)), (listed, slice(16, 32)), ({"sequences": rows}, slice(61, 70))):
        dirty = [x.detach().clone() for x in clean]
        dirty[1][:, :, bad], dirty[2][:, :, bad] = torch.nan, torch.nan
        dirty = [x.requires_grad_() for x in dirty]
        want, got = attend(*clean, **fields), attend(*dirty, **fields)
        assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
        grads = torch.ones_like(want[0]), torch.ones_like(want[1])
        for one, other in zip(cases.gradients(want, clean, *grads), cases.gradients(got, dirty, *grads), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [2, 40])
def test_group_12_stale_memory(isa: str, queries: int) -> None:
    """Kernels' own buffers, left full of NaN by the call before, do not reach the next result."""
    operands = cases.draw(2, 2, 2, queries, 70, 8, dtype=torch.float32)
    rows = torch.tensor([[0, 0, queries // 2, 1, 3, 50], [1, queries // 2, queries - queries // 2, 0, 0, 1]])
    for fields in ({"causal": True}, {"sequences": rows}):
        want = attend(*operands, **fields)
        grads = torch.ones_like(want[0]), torch.ones_like(want[1])
        want_grad = cases.gradients(want, operands, *grads)
        bad = [torch.full_like(x, torch.nan).requires_grad_() for x in operands]
        spoiled = attend(*bad)
        cases.gradients(spoiled, bad, *grads)
        got = attend(*operands, **fields)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        got_grad = cases.gradients(got, operands, *grads)
        assert all(torch.equal(x, y) for x, y in zip(got_grad, want_grad, strict=True))


@pytest.mark.parametrize("queries", [2, 40])
def test_group_13_scales_and_caps(isa: str, queries: int) -> None:
    """scale 0, negative, huge; a huge soft cap is none, a tiny one flattens; a cap beside masked keys."""
    operands = cases.draw(1, 2, 2, queries, 40, 8)
    for scale in (0.0, -0.4, 1e-30):
        cases.check(operands, scale=scale, causal=True)
    out, _ = attend(*operands, scale=0.0)
    assert torch.allclose(out, operands[2].mean(2, keepdim=True).expand_as(out), rtol=1e-12, atol=1e-14)
    cases.check(operands, scale=50.0, causal=True, extra=1e-10)
    for cap in (0.01, 1.0, 30.0):
        cases.check(operands, score=softcapped(cap), causal=True)
    free, capped = attend(*operands), attend(*operands, score=softcapped(1e9))
    assert torch.allclose(free[0], capped[0], rtol=1e-9)
    flat, _ = attend(*operands, score=softcapped(1e-9))
    assert torch.allclose(flat, operands[2].mean(2, keepdim=True).expand_as(flat), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_19_splits(isa: str, queries: int, dtype: torch.dtype) -> None:
    """Any number of splits gives the unsplit result; more splits than keys too."""
    operands = cases.draw(2, 4, 2, queries, 1100, 64, dtype=dtype, grad=False)
    truth = cases.dense(*operands, cases.rules_of(operands[0], causal=True))
    plain = cases.dense(*operands, cases.rules_of(operands[0], causal=True), wide=dtype)
    for splits in (0, 1, 2, 3, 7, 64, 1099, 5000):
        got = attend(*operands, causal=True, splits=splits)
        cases.flash_rule(got[0], truth[0], plain[0])
        cases.flash_rule(got[1], truth[1], plain[1])


def test_group_19_merge() -> None:
    """Associative, commutative, an empty part is the identity (its values unread), two empty parts are empty."""
    query, key, value = cases.draw(2, 2, 2, 5, 90, 8, grad=False)
    cuts = [slice(0, 20), slice(20, 21), slice(21, 90)]
    a, b, c = (attend(query, key[:, :, part], value[:, :, part]) for part in cuts)
    whole = attend(query, key, value)

    def join(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return twt.merge_attention(*zip(*parts, strict=True))

    for got in (join(a, b, c), join(join(a, b), c), join(a, join(b, c)), join(c, a, b)):
        assert torch.allclose(got[0], whole[0], rtol=1e-12) and torch.allclose(got[1], whole[1], rtol=1e-13)
    nothing = torch.full_like(a[0], torch.nan), torch.full_like(a[1], -torch.inf)
    for got in (join(a, nothing), join(nothing, a)):
        assert torch.allclose(got[0], a[0], rtol=1e-15) and torch.equal(got[1], a[1])
    out, lse = join(nothing, nothing)
    assert not out.any() and (lse == -torch.inf).all()
    arrays = [x.numpy() for x in (a[0], c[0], a[1], c[1])]
    mixed, log = merge(arrays[:2], arrays[2:])
    truth = reference.attention.merge(np.stack(arrays[:2]), np.stack(arrays[2:]))
    assert isinstance(mixed, np.ndarray)
    assert np.allclose(mixed, truth[0], rtol=1e-14) and np.allclose(log, truth[1], rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 150, 300), (6, 130, 130), (4, 1, 3000)])
def test_group_26_the_same_bits(dtype: torch.dtype, heads: int, queries: int, keys: int) -> None:
    """Runs, thread counts, positions in the batch, and a batch of one: bit for bit, forward and backward."""
    operands = cases.draw(3, heads, 1, queries, keys, 32, dtype=dtype)
    grad = torch.randn(3, heads, queries, 32, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(at: slice) -> list[Tensor]:
        part = [x.detach()[at].requires_grad_() for x in operands]
        outputs = attend(*part, causal=True)
        return [*outputs, *cases.gradients(outputs, part, grad[at], None)]

    with force_threads(1):
        want = run(slice(None))
    for threads in (1, 2, 5):
        with force_threads(threads):
            assert all(torch.equal(x, y) for x, y in zip(run(slice(None)), want, strict=True)), threads
            assert all(torch.equal(x, y[1:2]) for x, y in zip(run(slice(1, 2)), want, strict=True)), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_31_concurrent_calls(dtype: torch.dtype) -> None:
    """Calls from several threads at once give what each gives alone; inputs stay as they were; nothing aliases."""
    problems = [cases.draw(1, 2, 1, 20 + at, 60, 16, dtype=dtype, seed=at) for at in range(6)]
    copies = [[x.detach().clone() for x in operands] for operands in problems]

    def run(operands: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        outputs = attend(*operands, causal=True)
        return [*outputs, *cases.gradients(outputs, operands, torch.ones_like(outputs[0]), None)]

    want = [run(operands) for operands in problems]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(run, problems), want, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    for operands, copy, results in zip(problems, copies, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(operands, copy, strict=True))
        memory = {x.untyped_storage().data_ptr() for x in operands}
        assert not memory & {x.untyped_storage().data_ptr() for x in results}
