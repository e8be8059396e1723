"""Routers: choice, weights, gradients and the load-balance loss, against their float64 meaning, on every level.

The numbers of invariants and adversarial groups are those of the project's list for mixtures of experts.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewise.torch as twt
from tilewise import reference
from tilewise.errors import ArgumentError, UnsupportedError
from tilewise.moe import load_balance_loss, route
from tilewise.testing import force_isa, force_threads, layouts, levels, normal

SCORINGS = ["softmax_topk", "softmax", "softmax_renormalised", "sigmoid"]
SHAPES = [
    (0, 3, 1),
    (1, 1, 1),
    (5, 3, 2),
    (5, 7, 7),
    (40, 64, 8),
    (6, 64, 20),
    (3, 1000, 17),
    (2, 5000, 40),
    (9, 65, 64),
]


def variants(experts: int, top_k: int) -> list[dict[str, Any]]:
    """Every router of that many experts: scoring, renormalisation, bias, groups."""
    found: list[dict[str, Any]] = [{"scoring": s, "renormalise": r} for s in SCORINGS for r in (False, True)]
    bias = normal((experts,), np.float64, seed=9, scale=0.3)
    found += [{"scoring": "sigmoid", "renormalise": r, "bias": bias} for r in (False, True)]
    for groups in (2, 5, 8, experts):
        if experts % groups == 0 and groups > 1:
            kept = -(-top_k * groups // experts)
            found += [{"scoring": "sigmoid", "groups": groups, "top_groups": kept, "bias": b} for b in (None, bias)]
    return [{**options, "scale": 2.5} for options in found]


@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_route_equals_the_reference(isa: str, tokens: int, experts: int, k: int) -> None:
    """Adversarial group 3: K = 1, K = E, K > 16, E of any divisibility."""
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        logits = normal((tokens, experts), dtype, seed=experts, scale=3.0)
        for options in variants(experts, k):
            ids, weights = route(logits, k, **options)
            want_ids, want = reference.moe.route(logits.astype(np.float64), k, **options)
            exact = dtype == np.float64
            assert ids.dtype == np.int32 and weights.dtype == (np.float64 if exact else np.float32)
            assert np.array_equal(ids, want_ids), options
            # One rounding of a value computed in double precision; a few units of that for a softmax in double.
            assert np.allclose(weights, want, rtol=4e-15 * 10 if exact else 6.1e-8, atol=0), options


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from(SCORINGS))
def test_ties_go_to_the_lower_expert(logits: list[int], k: int, scoring: Any) -> None:
    """Adversarial group 5: equal logits."""
    k = min(k, len(logits))
    for level in levels():
        with force_isa(level):
            ids, _ = route(np.array([logits], np.float32), k, scoring=scoring)
        assert ids[0].tolist() == sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]


def test_all_logits_equal(isa: str) -> None:
    """Adversarial group 5: a constant row chooses the first experts and shares evenly."""
    for experts in (1, 3, 16, 17, 256, 1000):
        for value in (0.0, -0.0, 1e4, -1e4, 1e-40, np.inf, -np.inf):
            k = min(experts, 8)
            ids, weights = route(np.full((2, experts), value, np.float32), k)
            assert np.array_equal(ids, np.tile(np.arange(k), (2, 1)))
            assert np.array_equal(weights, np.full((2, k), np.float32(1 / k)))


def test_signed_zeros_tie_and_denormals_do_not(isa: str) -> None:
    ids, _ = route(np.array([[-0.0, 0.0, 1e-45, -1e-45]], np.float32), 4)
    assert ids.tolist() == [[2, 0, 1, 3]]


def test_extreme_logits(isa: str) -> None:
    """Adversarial group 5: infinities, and logits whose exponential overflows."""
    ids, weights = route(np.array([[1e4, -1e4, 9999.0], [-np.inf, 0.0, -np.inf], [-np.inf] * 3], np.float32), 2)
    assert ids.tolist() == [[0, 2], [1, 0], [0, 1]]
    assert np.allclose(weights, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)], [1, 0], [0.5, 0.5]])
    ids, weights = route(np.array([[np.inf, 0.0, np.inf, 1.0]], np.float32), 3, scoring="softmax")
    assert ids.tolist() == [[0, 2, 3]] and weights.tolist() == [[0.5, 0.5, 0.0]]
    _, weights = route(np.array([[-800.0, -801.0, -np.inf]]), 3, scoring="sigmoid", renormalise=True)
    assert np.allclose(weights, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0]], rtol=1e-14)
    _, weights = route(np.full((1, 3), -np.inf, np.float32), 2, scoring="sigmoid", renormalise=True)
    assert weights.tolist() == [[0.0, 0.0]]


def test_saturated_sigmoids_still_rank(isa: str) -> None:
    """Adversarial group 6: scores that round to 1 do not tie without a bias; with one, the bias decides."""
    logits = np.array([[50.0, 60.0, 120.0]], np.float32)
    assert route(logits, 3, scoring="sigmoid")[0].tolist() == [[2, 1, 0]]
    assert route(logits, 3, scoring="sigmoid", bias=np.zeros(3))[0].tolist() == [[0, 1, 2]]
    assert route(logits, 1, scoring="sigmoid", bias=np.array([-np.inf, 0.0, 0.1]))[0].tolist() == [[2]]


def test_nan_is_refused_by_its_place(isa: str) -> None:
    for experts in (3, 16, 100):
        for place in (0, experts - 1):
            logits = np.zeros((300, experts), np.float32)
            logits[[299, 170], place] = np.nan
            for scoring in SCORINGS:
                with pytest.raises(ArgumentError, match=f"NaN at token 170, expert {place}"):
                    route(logits, 1, scoring=scoring)  # type: ignore[arg-type]


def test_groups_of_deepseek_v3(isa: str) -> None:
    """Group scores are sums of two; ties go to the lower group; closed groups stay closed."""
    scores = np.array([[0.6, 0.5, 0.9, 0.15, 0.7, 0.45, 0.5, 0.5]])
    logits = np.log(scores / (1 - scores))
    options: dict[str, Any] = {"scoring": "sigmoid", "groups": 4}
    # Sums of two: 1.1, 1.05, 1.15, 1.0: the best single expert (2) is in a closed group.
    assert route(logits, 2, top_groups=2, **options)[0].tolist() == [[4, 0]]
    assert route(logits, 3, top_groups=3, **options)[0].tolist() == [[2, 4, 0]]
    assert route(logits, 2, groups=8, top_groups=2, scoring="sigmoid")[0].tolist() == [[2, 4]]  # groups of one
    assert route(np.zeros((1, 8)), 3, top_groups=2, **options)[0].tolist() == [[0, 1, 2]]
    # An open expert of -inf comes before a closed one of any score.
    bias = np.array([9.0, -np.inf, 1.0, 1.0])
    assert route(np.zeros((1, 4)), 2, scoring="sigmoid", groups=2, top_groups=1, bias=bias)[0].tolist() == [[2, 3]]
    bias = np.array([9.0, -1e9, 1.0, 1.0]) + np.array([0, -np.inf, -np.inf, -np.inf])
    assert route(np.zeros((1, 4)), 2, scoring="sigmoid", groups=2, top_groups=1, bias=bias)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_memory_layout_threads_and_batch_do_not_change_a_bit(isa: str, scoring: Any) -> None:
    """Invariant 7 (routers): the same rows give the same bits in any layout, on any number of threads, in any batch."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        logits = normal((300, 70), dtype, seed=3)
        ids, weights = route(logits, 9, scoring=scoring)
        for name, view in layouts(logits):
            got = route(view, 9, scoring=scoring)
            assert np.array_equal(got[0], ids) and np.array_equal(got[1], weights), name
        for threads in (1, 3):
            with force_threads(threads):
                got = route(logits, 9, scoring=scoring)
            assert np.array_equal(got[0], ids) and np.array_equal(got[1], weights)
        one = route(logits[17:18], 9, scoring=scoring)
        assert np.array_equal(one[0], ids[17:18]) and np.array_equal(one[1], weights[17:18])


@pytest.mark.parametrize("scoring", SCORINGS)
def test_levels_agree_in_every_bit(scoring: Any) -> None:
    logits, bias = normal((50, 100), seed=4), normal((100,), np.float64, seed=5)
    results = []
    for level in levels():
        with force_isa(level):
            results.append(route(logits, 6, scoring=scoring, bias=bias if scoring == "sigmoid" else None))
    for ids, weights in results[1:]:
        assert np.array_equal(ids, results[0][0]) and np.array_equal(weights, results[0][1])


def test_invariant_11_router_a_equals_router_c(isa: str) -> None:
    """Top-k then softmax is softmax, top-k, renormalise: in value, bit for bit, and in gradient."""
    logits = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for options in (
        {"scoring": "softmax_topk"},
        {"scoring": "softmax_renormalised"},
        {"scoring": "softmax", "renormalise": True},
    ):
        x = logits.clone().requires_grad_()
        ids, weights = twt.moe.route(x, 4, **options)  # type: ignore[arg-type]
        (weights * torch.arange(4)).sum().backward()
        results.append((ids, weights.detach(), x.grad))
    for ids, weights, grad in results[1:]:
        assert (
            torch.equal(ids, results[0][0]) and torch.equal(weights, results[0][1]) and torch.equal(grad, results[0][2])
        )
    ids, _, grad = results[0]
    assert grad is not None
    # Rows of the gradient add up to 0, and experts that were not chosen get exactly 0.
    assert grad.sum(dim=1).abs().max() < 1e-15
    assert torch.equal(grad.scatter(1, ids.long(), 0.0), torch.zeros_like(grad))


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 2), (8, 8), (40, 20)])
def test_gradcheck_of_every_router(isa: str, experts: int, k: int) -> None:
    x = torch.randn(
        3, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(experts), requires_grad=True
    )
    for options in variants(experts, k):
        if options.get("bias") is not None:
            options["bias"] = torch.from_numpy(options["bias"])
        assert torch.autograd.gradcheck(lambda x, o=options: twt.moe.route(x, k, **o)[1], x), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_in_low_precision_are_rounded_once(isa: str, dtype: torch.dtype) -> None:
    logits = torch.randn(20, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    g = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    for options in variants(24, 5):
        if options.get("bias") is not None:
            options["bias"] = torch.from_numpy(options["bias"])
        low, high = logits.clone().requires_grad_(), logits.double().requires_grad_()
        assert low.grad is None
        twt.moe.route(low, 5, **options)[1].backward(g)
        twt.moe.route(high, 5, **options)[1].backward(g.double())
        assert low.grad is not None and high.grad is not None and low.grad.dtype == dtype
        assert torch.equal(low.grad, high.grad.to(dtype)), options


def test_gradients_of_extreme_logits_are_numbers(isa: str) -> None:
    rows = [[1e4, -1e4, 0.0], [np.inf, 0.0, 1.0], [-np.inf] * 3, [800.0, 801.0, -np.inf], [-800.0, -801.0, -900.0]]
    for scoring in SCORINGS:
        for renormalise in (False, True):
            x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
            _, weights = twt.moe.route(x, 2, scoring=scoring, renormalise=renormalise)  # type: ignore[arg-type]
            (weights[:, 0] - 2 * weights[:, 1]).sum().backward()
            assert x.grad is not None and torch.isfinite(x.grad).all(), (scoring, renormalise, x.grad)
    x = torch.tensor([rows[-1]], dtype=torch.float64, requires_grad=True)
    twt.moe.route(x, 2, scoring="sigmoid", renormalise=True)[1][0, 0].backward()
    p = 1 / (1 + np.exp(-1))  # where every sigmoid underflows the weights are a softmax
    assert x.grad is not None and np.allclose(x.grad, [[p * (1 - p), -p * (1 - p), 0]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_operators(dtype: torch.dtype) -> None:
    logits = torch.randn(20, 6).to(dtype)
    for options in variants(6, 2):
        bias = options.get("bias")
        args = (options["scoring"], None if bias is None else torch.from_numpy(bias), options.get("renormalise", False))
        groups = options.get("groups", 1), options.get("top_groups", 1)
        torch.library.opcheck(torch.ops.tilewise.moe_route.default, (logits, 2, *args, 2.5, *groups))
        # With gradients too, but for the check that adds float outputs to integer ones (see the compiled run below).
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        x = logits.clone().requires_grad_()
        torch.library.opcheck(torch.ops.tilewise.moe_route.default, (x, 2, *args, 2.5, *groups), test_utils=kinds)
    ids, weights = twt.moe.route(logits, 2)
    args = (torch.ones_like(weights), logits, ids, "softmax", False, 1.0)
    torch.library.opcheck(torch.ops.tilewise.moe_route_backward.default, args)

    def loss(x: torch.Tensor) -> torch.Tensor:
        ids, weights = twt.moe.route(x, 2, scoring="sigmoid", renormalise=True)
        return (weights * ids).sum() + twt.moe.load_balance_loss(x, ids)

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        run(x).backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_strided_and_expanded_gradients() -> None:
    """Adversarial group 12: the gradient of a sum has strides of 0, others are transposed."""
    x = torch.randn(10, 6, dtype=torch.float64)
    found = []
    for grad in (torch.ones(10, 3), torch.ones(1).expand(10, 3), torch.ones(3, 10).t()):
        leaf = x.clone().requires_grad_()
        twt.moe.route(leaf.t().contiguous().t(), 3, scoring="softmax")[1].backward(grad.double())
        found.append(leaf.grad)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_a_second_derivative_is_refused_by_name() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    _, weights = twt.moe.route(x, 2)
    (grad,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="moe_route: its gradient cannot be differentiated again"):
        grad.sum().backward()


def test_selection_is_a_constant_and_bias_gets_no_gradient() -> None:
    x, bias = torch.randn(4, 6, requires_grad=True), torch.zeros(6, requires_grad=True)
    _, weights = twt.moe.route(x, 2, scoring="sigmoid", bias=bias)
    weights.sum().backward()
    assert bias.grad is None and x.grad is not None


def test_invariant_19_uniform_routing_has_a_loss_of_one() -> None:
    """The load-balance loss: 1 when counts or probabilities are uniform, `experts` at the worst."""
    for experts, k in ((1, 1), (6, 2), (64, 8)):
        ids = (np.arange(96 * k) % experts).reshape(96, k)
        skewed = normal((96, experts), np.float64, seed=1, scale=3.0)
        assert np.isclose(load_balance_loss(skewed, ids), 1.0, rtol=1e-12)
        assert np.isclose(load_balance_loss(np.zeros((96, experts)), np.zeros((96, k), int)), 1.0, rtol=1e-12)
        worst = np.full((96, experts), -1e4)
        worst[:, 0] = 0
        assert np.isclose(load_balance_loss(worst, np.zeros((96, 1), int)), experts, rtol=1e-12)


def test_load_balance_loss_equals_the_reference_and_hugging_face() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = normal((5000, 9), seed=2)
    ids, _ = route(logits, 3)
    p = np.exp(logits.astype(np.float64))
    want = reference.moe.load_balance_loss(p / p.sum(axis=1, keepdims=True), ids)
    assert np.isclose(load_balance_loss(logits, ids), want, rtol=1e-12)
    assert np.isclose(load_balance_loss(p / p.sum(axis=1, keepdims=True), ids, probabilities=True), want, rtol=1e-12)
    theirs = load_balancing_loss_func((torch.from_numpy(logits),), num_experts=9, top_k=3)
    assert np.isclose(float(theirs), 3 * want, rtol=1e-5)
    sentinels = np.concatenate([ids, np.full((5000, 2), [-1, 9], np.int32)], axis=1)
    assert np.isclose(load_balance_loss(logits, sentinels), want, rtol=1e-12)


def test_load_balance_loss_in_torch() -> None:
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    ids, _ = twt.moe.route(logits, 2)
    loss = twt.moe.load_balance_loss(logits, ids)
    assert np.isclose(loss.item(), load_balance_loss(logits, ids), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: twt.moe.load_balance_loss(x, ids), logits)
    assert torch.autograd.gradcheck(lambda x: twt.moe.load_balance_loss(x.sigmoid(), ids, probabilities=True), logits)
    with_sentinels = torch.cat([ids, torch.full((12, 1), 5, dtype=torch.int32)], dim=1)
    assert torch.equal(twt.moe.load_balance_loss(logits, with_sentinels), loss)


def test_load_balance_loss_of_nothing_is_zero() -> None:
    for tokens, k in ((0, 2), (4, 0)):
        logits, ids = torch.zeros(tokens, 3, requires_grad=True), torch.zeros(tokens, k, dtype=torch.int64)
        loss = twt.moe.load_balance_loss(logits, ids)
        loss.backward()
        assert loss.item() == 0 == load_balance_loss(logits, ids)
        assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(tokens, 3))
