"""The expert layer's backward pass: the invariants and adversarial groups of docs/moe.md, by their number there."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise import reference
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tilewise.moe import ACTIVATIONS, ExpertGradients, experts, experts_backward, experts_forward
from tilewise.testing import assert_within_budget, force_threads, layouts, normal

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NAMES = ExpertGradients._fields


def problem(
    tokens: int, d: int, n: int, count: int, slots: int, *, gated: bool = True, bias: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Numbers of order one, in float64; every third expert gets no token where there are enough."""
    random = np.random.default_rng(seed + tokens + d + n)
    used = np.array([e for e in range(count) if e % 3 != 2 or count < 3])
    ids = np.stack([random.permutation(used)[:slots] for _ in range(tokens)]) if tokens else np.zeros((0, slots), int)
    ids = np.resize(ids, (tokens, slots))
    features = 2 * n if gated else n

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape) * scale)

    result = {
        "x": draw(tokens, d),
        "weights": draw(tokens, slots),
        "gate_up": draw(count, features, d, scale=max(d, 1) ** -0.5),
        "down": draw(count, d, n, scale=max(n, 1) ** -0.5),
        "expert_ids": torch.from_numpy(ids),
    }
    if bias:
        result["gate_up_bias"], result["down_bias"] = draw(count, features), draw(count, d)
    return result


def cast(arrays: dict[str, Tensor], kind: torch.dtype) -> dict[str, Tensor]:
    """Fresh leaves of a type; routing weights stay in single precision below float64."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    return {
        name: value if name == "expert_ids" else value.to(wide if name == "weights" else kind).requires_grad_()
        for name, value in arrays.items()
    }


def act(hidden: Tensor, activation: str, layout: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    functional = torch.nn.functional
    plain: dict[str, Any] = {
        "silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "relu2": lambda x: functional.relu(x).square(),
    }  # fmt: skip
    if activation in plain:
        return plain[activation](hidden)
    gate, up = hidden.chunk(2, -1) if layout == "concatenated" else (hidden[..., ::2], hidden[..., 1::2])
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    name = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[activation]
    return plain[name](gate) * up


def loop(t: dict[str, Tensor], activation: str = "swiglu", layout: str = "concatenated") -> Tensor:
    """The layer by torch's own operations, an expert at a time, every intermediate in the inputs' type."""
    x, ids = t["x"], t["expert_ids"]
    out = torch.zeros(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    for expert in range(len(t["down"])):
        token, slot = torch.where(ids == expert)
        hidden = x[token] @ t["gate_up"][expert].T
        if "gate_up_bias" in t:
            hidden = hidden + t["gate_up_bias"][expert]
        rows = act(hidden, activation, layout) @ t["down"][expert].T
        if "down_bias" in t:
            rows = rows + t["down_bias"][expert]
        out = out.index_add(0, token, (rows.to(out.dtype) * t["weights"][token, slot, None]))
    return out.to(x.dtype)


def fast(t: dict[str, Tensor], activation: str = "swiglu", layout: str = "concatenated") -> Tensor:
    return twt.moe.experts(**t, activation=activation, layout=layout)  # type: ignore[arg-type]


def gradients(function: Any, t: dict[str, Tensor], grad: Tensor, **options: Any) -> dict[str, Tensor]:
    names = [name for name in t if name != "expert_ids"]
    out = function(t, **options)
    found = torch.autograd.grad(out, [t[name] for name in names], grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, found, strict=True))}


SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 5, 17, 5, 2),
    (70, 40, 51, 4, 3),
    (230, 100, 24, 3, 2),
    (40, 33, 1, 7, 3),
    (300, 8, 400, 2, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_invariant_1_values_and_gradients_against_the_float64_loop(isa: str, kind: str, shape: Any) -> None:
    """Frobenius error at most twice a plain loop's own in the same type, and at most 1e-6 in single precision."""
    for layout, bias in (("concatenated", False), ("interleaved", True)):
        exact = cast(problem(*shape, bias=bias), KINDS[kind])
        wide = {
            name: value if name == "expert_ids" else value.detach().double().requires_grad_()
            for name, value in exact.items()
        }
        grad = torch.from_numpy(normal((shape[0], shape[1]), np.float64, seed=5)).to(KINDS[kind])
        want = gradients(loop, wide, grad, layout=layout)
        plain = gradients(loop, exact, grad, layout=layout)
        got = gradients(fast, exact, grad, layout=layout)
        for name, value in got.items():
            norm = float(want[name].norm()) or 1.0
            error = float((value.double() - want[name]).norm()) / norm
            if kind == "float32":
                assert error <= 1e-6, (name, error)
            else:
                # Of a few numbers the plain run may round all the lucky way.
                floor = 2.0 ** (-7 if kind == "bfloat16" else -10) if value.numel() < 64 else None
                assert_within_budget(value, want[name], plain[name].to(value.dtype), norm="frobenius", floor=floor)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("scoring", ["softmax_topk", "softmax", "softmax_renormalised", "sigmoid"])
def test_invariant_2_gradcheck_of_every_activation_layout_and_router(
    activation: str, layout: str, scoring: Any
) -> None:
    t = cast(problem(6, 4, 3, 4, 2, gated=ACTIVATIONS[activation]), torch.float64)
    logits = torch.from_numpy(normal((6, 4), np.float64, seed=3, scale=2.0)).requires_grad_()
    bias = torch.linspace(-0.2, 0.2, 4, dtype=torch.float64) if scoring == "sigmoid" else None

    def layer(x: Tensor, logits: Tensor, up: Tensor, down: Tensor, in_bias: Tensor, out_bias: Tensor) -> Tensor:
        ids, weights = twt.moe.route(logits, 2, scoring=scoring, bias=bias, renormalise=scoring == "sigmoid")
        options: Any = {"activation": activation, "layout": layout, "alpha": 1.3, "limit": 1.0}
        return twt.moe.experts(x, ids, weights, up, down, gate_up_bias=in_bias, down_bias=out_bias, **options)

    inputs = (t["x"], logits, t["gate_up"], t["down"], t["gate_up_bias"], t["down_bias"])
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_their_slopes_in_every_type(isa: str, activation: str) -> None:
    gated = ACTIVATIONS[activation]
    for kind in ("float32", "float64"):
        t = cast(problem(40, 12, 50, 2, 1, gated=gated), KINDS[kind])
        with torch.no_grad():
            t["x"] *= 6  # saturates sigmoids and reaches the clamp
        grad = torch.from_numpy(normal((40, 12), np.float64, seed=5)).to(KINDS[kind])
        for layout in ("concatenated", "interleaved"):
            got = gradients(fast, t, grad, activation=activation, layout=layout)
            wide = {k: v if k == "expert_ids" else v.detach().double().requires_grad_() for k, v in t.items()}
            want = gradients(loop, wide, grad.double(), activation=activation, layout=layout)
            for name, value in got.items():
                norm = float(want[name].norm()) or 1.0
                error = float((value.double() - want[name]).norm()) / norm
                # The reference sums in float64, in another order; a clamp's edge may fall on either side of a rounding.
                assert error < (2e-6 if kind == "float32" else 1e-13), (name, layout, error)


def test_invariant_3_score_gradients_are_the_rows_inner_products(isa: str) -> None:
    """<dA', A> + <dO, b2> = <dO, Y>, where the score is zero too."""
    t = cast(problem(30, 16, 24, 4, 3), torch.float64)
    with torch.no_grad():
        t["weights"][::2] = 0.0
    grad = torch.from_numpy(normal((30, 16), np.float64, seed=7))
    got = gradients(fast, t, grad)["weights"]
    want = torch.zeros_like(got)
    for token in range(30):
        for slot in range(3):
            alone = {name: value.detach() for name, value in t.items()}
            alone["weights"] = torch.zeros(30, 3, dtype=torch.float64)
            alone["weights"][token, slot] = 1.0
            want[token, slot] = (loop(alone)[token] * grad[token]).sum()
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 32, 16, 8, 4), (33, 20, 12, 4, 2), (128, 24, 40, 16, 2), (17, 64, 8, 8, 8)])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_invariants_4_and_5_saved_bytes(shape: Any, kind: str) -> None:
    """2 T d + 4 T K n bytes in bfloat16 and O(T K) of ids and scores, no T K d; the same for (n/2, 2K)."""

    def saved(tokens: int, d: int, n: int, count: int, slots: int) -> tuple[int, int]:
        t = cast(problem(tokens, d, n, count, slots, bias=False), KINDS[kind])
        parameters = {t["gate_up"].data_ptr(), t["down"].data_ptr()}
        kept: dict[int, int] = {}
        small = 0

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = fast(t)
        for name in ("expert_ids", "weights"):
            small += kept.pop(t[name].data_ptr(), 0)
        out.sum().backward()
        return sum(kept.values()), small

    tokens, d, n, count, slots = shape
    size = torch.empty(0, dtype=KINDS[kind]).element_size()
    large, small = saved(*shape)
    assert large == size * (tokens * d + 2 * tokens * slots * n)
    assert small == tokens * slots * (8 + 4)  # int64 ids, float32 scores
    if slots * 2 <= count and n % 2 == 0:
        assert saved(tokens, d, n // 2, count, slots * 2)[0] == large


def test_invariant_7_two_runs_and_any_number_of_threads_agree_bitwise(isa: str) -> None:
    for kind in ("float32", "bfloat16"):
        t = cast(problem(400, 48, 500, 5, 2), KINDS[kind])
        grad = torch.from_numpy(normal((400, 48), seed=5)).to(KINDS[kind])
        first = gradients(fast, t, grad)
        for threads in (1, 2, 5):
            with force_threads(threads):
                again = gradients(fast, t, grad)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_invariant_8_relabelled_experts_shuffled_tokens_and_slots(isa: str) -> None:
    t = cast(problem(50, 24, 16, 6, 3), torch.float32)
    grad = torch.from_numpy(normal((50, 24), seed=5))
    base = gradients(fast, t, grad)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    renamed = {
        name: (
            order.argsort()[value] if name == "expert_ids" else value[order] if value.shape[0] == 6 else value
        ).detach()
        for name, value in t.items()
    }
    renamed = {name: value if name == "expert_ids" else value.requires_grad_() for name, value in renamed.items()}
    got = gradients(fast, renamed, grad)
    assert torch.equal(got["out"], base["out"]) and torch.equal(got["x"], base["x"])
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert torch.equal(got[name], base[name][order])
    tokens = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    shuffled = {name: value.detach()[tokens] if value.shape[0] == 50 else value.detach() for name, value in t.items()}
    shuffled = {name: value if name == "expert_ids" else value.requires_grad_() for name, value in shuffled.items()}
    got = gradients(fast, shuffled, grad[tokens])
    assert torch.equal(got["out"], base["out"][tokens]) and torch.equal(got["x"], base["x"][tokens])
    slots = torch.tensor([2, 0, 1])
    turned = {**t, "expert_ids": t["expert_ids"][:, slots], "weights": t["weights"].detach()[:, slots].requires_grad_()}
    got = gradients(fast, turned, grad)
    assert torch.allclose(got["out"], base["out"], atol=1e-5) and torch.allclose(got["x"], base["x"], atol=1e-5)
    assert torch.equal(got["weights"], base["weights"][:, slots])


def test_invariant_9_one_expert_is_a_dense_mlp_and_all_experts_are_a_mean() -> None:
    t = problem(30, 16, 24, 1, 1, bias=False)
    t["weights"] = torch.ones(30, 1, dtype=torch.float64)
    gate, up = (t["x"] @ t["gate_up"][0].T).chunk(2, -1)
    dense = (torch.nn.functional.silu(gate) * up) @ t["down"][0].T
    assert torch.allclose(fast(t), dense, rtol=1e-12, atol=1e-12)
    many = problem(20, 16, 24, 5, 5, bias=False)
    many["expert_ids"] = torch.arange(5).repeat(20, 1)
    many["weights"] = torch.full((20, 5), 0.2, dtype=torch.float64)
    single = [fast({**many, "expert_ids": torch.full((20, 1), e), "weights": torch.ones(20, 1)}) for e in range(5)]
    assert torch.allclose(fast(many), torch.stack(single).mean(0), rtol=1e-12, atol=1e-12)


def general(t: dict[str, Tensor]) -> dict[str, Any]:
    """The same pairs as a list."""
    tokens, slots = t["expert_ids"].shape
    return {
        **t,
        "expert_ids": t["expert_ids"].flatten(),
        "weights": t["weights"].detach().flatten().requires_grad_(),
        "token_ids": torch.arange(tokens).repeat_interleave(slots),
    }


def test_invariant_10_fixed_slots_equal_the_general_entry_bitwise(isa: str) -> None:
    for kind in ("float32", "bfloat16"):
        t = cast(problem(60, 24, 16, 6, 3), KINDS[kind])
        grad = torch.from_numpy(normal((60, 24), seed=5)).to(KINDS[kind])
        base = gradients(fast, t, grad)
        pairs = general(t)
        names = [name for name in t if name != "expert_ids"]
        out = twt.moe.experts(**pairs)
        found = torch.autograd.grad(out, [pairs[name] for name in names], grad)
        assert torch.equal(out, base["out"])
        for name, value in zip(names, found, strict=True):
            assert torch.equal(value.reshape(base[name].shape), base[name]), name


def test_invariant_12_layouts_agree_after_a_permutation_of_rows(isa: str) -> None:
    t = cast(problem(40, 24, 18, 4, 2), torch.float32)
    grad = torch.from_numpy(normal((40, 24), seed=5))
    base = gradients(fast, t, grad)
    order = torch.arange(36).reshape(2, 18).T.flatten()  # gate 0, up 0, gate 1, ...
    woven = {
        **t,
        "gate_up": t["gate_up"].detach()[:, order].requires_grad_(),
        "gate_up_bias": t["gate_up_bias"].detach()[:, order].requires_grad_(),
    }
    got = gradients(fast, woven, grad, layout="interleaved")
    for name, value in got.items():
        want = base[name][:, order] if name.startswith("gate_up") else base[name]
        assert torch.equal(value, want), name


def test_invariant_17_linear_in_the_scores_and_in_the_output_gradient(isa: str) -> None:
    t = cast(problem(40, 24, 18, 4, 2, bias=False), torch.bfloat16)
    grad = torch.from_numpy(normal((40, 24), seed=5)).bfloat16()
    base, twice = gradients(fast, t, grad), gradients(fast, t, 2 * grad)
    assert all(torch.equal(twice[name], 2 * base[name]) for name in base if name != "out")
    doubled = {**t, "weights": (2 * t["weights"]).detach().requires_grad_()}
    assert torch.equal(fast(doubled), 2 * base["out"])


def test_invariant_18_untouched_experts_get_exact_zeros(isa: str) -> None:
    """Every output is written over NaN."""
    for kind in (np.float32, ml_dtypes.bfloat16):
        arrays = {
            "x": normal((9, 10), kind, seed=1), "weights": normal((9, 2), seed=2),
            "gate_up": normal((7, 12, 10), kind, seed=3), "down": normal((7, 10, 6), kind, seed=4),
            "expert_ids": np.array([[1, 5]] * 9), "gate_up_bias": normal((7, 12), kind, seed=5),
            "down_bias": normal((7, 10), kind, seed=6),
        }  # fmt: skip
        poison = [np.full(500_000, np.nan, np.float32) for _ in range(4)]
        del poison  # what the allocator hands out next is NaN
        out, pre = experts_forward(**arrays)
        found = experts_backward(np.ones_like(out), pre, **arrays)
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            value = getattr(found, name).astype(np.float32)
            assert not np.isnan(value).any()
            untouched = [e for e in range(7) if e not in (1, 5)]
            assert (value[untouched] == 0).all() and (value[[1, 5]] != 0).any()


def test_invariant_19_inference_gives_the_same_bits(isa: str) -> None:
    for tokens in (3, 80):
        arrays: dict[str, Any] = {name: value.numpy() for name, value in problem(tokens, 20, 14, 5, 2).items()}
        for kind in (np.float32, ml_dtypes.bfloat16, np.float64):
            typed = {k: v if k == "expert_ids" else v.astype(kind) for k, v in arrays.items()}
            out, pre = experts_forward(**typed)
            assert np.array_equal(out, experts(**typed)) and pre.shape == (tokens * 2, 28)


def test_invariant_20_strides_do_not_change_the_result(isa: str) -> None:
    for kind in (np.float32, ml_dtypes.bfloat16):
        arrays = {name: value.numpy() for name, value in problem(26, 18, 14, 4, 2).items()}
        arrays = {
            k: v if k == "expert_ids" else v.astype(np.float32 if k == "weights" else kind) for k, v in arrays.items()
        }
        out, pre = experts_forward(**arrays)
        grad = normal(out.shape, kind, seed=9)
        base = experts_backward(grad, pre, **arrays)
        for name, array in {**arrays, "grad": grad, "pre_activation": pre}.items():
            if name == "expert_ids":
                continue
            for layout, view in layouts(array):
                moved = {**arrays, "grad": grad, "pre_activation": pre, name: view}
                got = experts_backward(moved.pop("grad"), moved.pop("pre_activation"), **moved)
                for field, one, other in zip(NAMES, got, base, strict=True):
                    assert np.array_equal(one, other), (name, layout, field)
        turned = {**arrays, "gate_up": arrays["gate_up"].swapaxes(1, 2).copy().swapaxes(1, 2)}
        turned["down"] = arrays["down"].swapaxes(1, 2).copy().swapaxes(1, 2)
        for layout in ("concatenated", "interleaved"):
            straight = experts_backward(grad, experts_forward(**arrays, layout=layout)[1], **arrays, layout=layout)
            got = experts_backward(grad, experts_forward(**turned, layout=layout)[1], **turned, layout=layout)
            assert all(np.array_equal(a, b) for a, b in zip(straight, got, strict=True))


def test_invariant_22_layers_of_different_shapes_alternate() -> None:
    first, second = cast(problem(40, 24, 18, 4, 2), torch.float32), cast(problem(31, 50, 7, 9, 3), torch.float32)
    grads = [torch.from_numpy(normal(t["x"].shape, seed=5)) for t in (first, second)]
    base = [gradients(fast, t, g) for t, g in zip((first, second), grads, strict=True)]
    for _ in range(3):
        for t, g, want in zip((first, second), grads, base, strict=True):
            got = gradients(fast, t, g)
            assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 1), (4, 0, 3, 2, 1), (4, 4, 0, 2, 1), (4, 4, 3, 0, 1), (4, 4, 3, 2, 0)])
def test_adversarial_1_empty_extents(isa: str, shape: Any) -> None:
    tokens, d, n, count, slots = shape
    t = {
        "x": torch.ones(tokens, d), "weights": torch.ones(tokens, slots), "gate_up": torch.ones(count, 2 * n, d),
        "down": torch.ones(count, d, n), "expert_ids": torch.zeros(tokens, slots, dtype=torch.int64),
        "gate_up_bias": torch.ones(count, 2 * n), "down_bias": torch.ones(count, d),
    }  # fmt: skip
    t = {name: value if name == "expert_ids" else value.requires_grad_() for name, value in t.items()}
    got = gradients(fast, t, torch.ones(tokens, d))
    want = (
        gradients(loop, t, torch.ones(tokens, d)) if count else {name: torch.zeros_like(v) for name, v in got.items()}
    )
    for name, value in got.items():
        assert torch.allclose(value, want[name], atol=1e-6), name


def test_adversarial_1_every_pair_is_a_sentinel(isa: str) -> None:
    t = cast(problem(12, 8, 6, 3, 2), torch.float32)
    t["expert_ids"] = torch.full((12, 2), -1)
    got = gradients(fast, t, torch.ones(12, 8))
    assert all((value == 0).all() for value in got.values())


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 95, 96, 97, 287, 288, 289, 700])
def test_adversarial_2_one_expert_gets_everything(isa: str, rows: int) -> None:
    t = cast(problem(rows, 20, 30, 5, 1), torch.float32)
    t["expert_ids"] = torch.full((rows, 1), 3)
    grad = torch.from_numpy(normal((rows, 20), seed=5))
    wide = {k: v if k == "expert_ids" else v.detach().double().requires_grad_() for k, v in t.items()}
    want, got = gradients(loop, wide, grad), gradients(fast, t, grad)
    for name, value in got.items():
        assert float((value - want[name]).norm()) <= 1e-6 * (float(want[name].norm()) or 1.0), name


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (3, 3), (5, 1), (40, 40), (384, 7), (1000, 20), (5000, 2)])
def test_adversarial_3_any_number_of_experts_and_slots(count: int, slots: int) -> None:
    t = cast(problem(9, 6, 4, count, slots, bias=False), torch.float64)
    t["expert_ids"] = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(i))[:slots] for i in range(9)]
    )
    grad = torch.from_numpy(normal((9, 6), np.float64, seed=5))
    want, got = gradients(loop, t, grad), gradients(fast, t, grad)
    assert all(torch.allclose(value, want[name], rtol=1e-11, atol=1e-11) for name, value in got.items())


@pytest.mark.parametrize(("d", "n"), [(5, 1), (100, 17), (600, 33), (7, 1537), (769, 3)])
def test_adversarial_4_odd_widths(isa: str, d: int, n: int) -> None:
    for kind in ("float32", "bfloat16"):
        t = cast(problem(30, d, n, 3, 2), KINDS[kind])
        grad = torch.from_numpy(normal((30, d), seed=5)).to(KINDS[kind])
        wide = {k: v if k == "expert_ids" else v.detach().double().requires_grad_() for k, v in t.items()}
        want, plain, got = gradients(loop, wide, grad), gradients(loop, t, grad), gradients(fast, t, grad)
        for name, value in got.items():
            if kind == "float32":  # the scalar level adds 3074 products one after the other
                assert float((value - want[name]).norm()) <= (2e-6 if n > 1000 else 1e-6) * (
                    float(want[name].norm()) or 1.0
                ), name
            else:
                assert_within_budget(value, want[name], plain[name], norm="frobenius")


def test_adversarial_6_scores_of_any_sign_and_size() -> None:
    t = cast(problem(20, 8, 6, 3, 2), torch.float64)
    with torch.no_grad():
        t["weights"][:] = torch.tensor([0.0, -3.5]).double()
        t["weights"][5:] = torch.tensor([1e6, 1e-30]).double()
    grad = torch.from_numpy(normal((20, 8), np.float64, seed=5))
    want, got = gradients(loop, t, grad), gradients(fast, t, grad)
    assert all(torch.allclose(value, want[name], rtol=1e-10) for name, value in got.items())


def test_adversarial_7_duplicates_sentinels_and_unsorted_pairs() -> None:
    t = problem(4, 6, 5, 3, 1, bias=False)
    ids, tokens = torch.tensor([1, 1, 3, -1, 0, 2]), torch.tensor([0, 0, 1, 1, 3, 3])
    weights = torch.tensor([0.5, 0.25, 9.0, 9.0, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    layer = {"gate_up": t["gate_up"], "down": t["down"]}
    x = t["x"].requires_grad_()
    out = twt.moe.experts(x, ids, weights, **layer, token_ids=tokens)
    merged = torch.zeros(4, 3, dtype=torch.float64)
    merged[0, 1], merged[3, 0], merged[3, 2] = 0.75, 1.0, 2.0
    dense = fast({**layer, "x": x.detach(), "expert_ids": torch.arange(3).repeat(4, 1), "weights": merged})
    assert torch.allclose(out, dense, rtol=1e-12, atol=1e-12) and (out[1:3] == 0).all()
    out.sum().backward()
    assert weights.grad is not None and (weights.grad[2:4] == 0).all() and weights.grad[0] == weights.grad[1]
    assert x.grad is not None and (x.grad[1:3] == 0).all()
    with pytest.raises(ArgumentError, match="ascending tokens, got 0 after 1 at position 2"):
        twt.moe.experts(x, ids, weights, **layer, token_ids=torch.tensor([0, 1, 0, 1, 3, 3]))
    with pytest.raises(ArgumentError, match=r"tokens in 0\.\.4 .*got 4 at position 5"):
        twt.moe.experts(x, ids, weights, **layer, token_ids=torch.tensor([0, 0, 1, 1, 3, 4]))


def test_adversarial_8_tokens_with_no_expert_and_with_all() -> None:
    t = problem(5, 6, 5, 4, 1, bias=False)
    tokens = torch.tensor([1, 1, 1, 1, 4])
    ids, weights = torch.tensor([0, 1, 2, 3, 2]), torch.ones(5, dtype=torch.float64)
    x = t["x"].requires_grad_()
    out = twt.moe.experts(x, ids, weights, t["gate_up"], t["down"], token_ids=tokens)
    slots = [[-1] * 4, [0, 1, 2, 3], [-1] * 4, [-1] * 4, [2, -1, -1, -1]]
    want = reference.moe.experts(t["x"].detach(), slots, np.ones((5, 4)), t["gate_up"], t["down"])
    assert np.allclose(out.detach().numpy(), want, rtol=1e-12)
    out.sum().backward()
    assert x.grad is not None and (x.grad[[0, 2, 3]] == 0).all() and (x.grad[[1, 4]] != 0).all()


def test_adversarial_9_offsets_beyond_two_to_the_31() -> None:
    """An expert's weights lie 2^31 elements after the first: memory that is never touched is not there."""
    # 4 GiB of addresses; pages appear where something is written.
    rows = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    n, d = 4, 4
    with torch.no_grad():
        for e in range(2):
            at = e * 2**31
            rows[at : at + 2 * n * d] = torch.from_numpy(normal((2 * n * d,), seed=e)).bfloat16()
    far = rows.as_strided((2, 2 * n, d), (2**31, d, 1))
    near = far.clone()
    x, down = (
        torch.from_numpy(normal((20, d), seed=3)).bfloat16(),
        torch.from_numpy(normal((2, d, n), seed=4)).bfloat16(),
    )
    ids, weights = torch.tensor([[0, 1]] * 20), torch.ones(20, 2)
    assert torch.equal(twt.moe.experts(x, ids, weights, far, down), twt.moe.experts(x, ids, weights, near, down))


def test_adversarial_10_sums_over_a_token_cancel_in_single_precision(isa: str) -> None:
    """64 experts of alternating sign and one small rest: a sum in bfloat16 would lose it."""
    x = np.ones((1, 1), ml_dtypes.bfloat16)
    up, down = np.ones((65, 1, 1), ml_dtypes.bfloat16), np.ones((65, 1, 1), ml_dtypes.bfloat16)
    weights = np.array([[(-1.0) ** k * 1000.0 for k in range(64)] + [0.125]], np.float32)
    out = experts(x, np.arange(65)[None], weights, up, down, activation="relu")
    assert float(out[0, 0]) == 0.125


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_adversarial_11_saturated_zero_and_huge_gates(isa: str, activation: str, kind: Any) -> None:
    gated = ACTIVATIONS[activation]
    gates = np.array([-1e30, -100.0, -0.0, 0.0, 100.0, 1e15], np.float64)
    x = np.ones((1, 1), kind)
    for gate in gates:
        up = np.array([[[gate], [0.5]]] if gated else [[[gate]]], np.float64).astype(kind)
        down = np.ones((1, 1, 1), kind)
        call = (x, np.zeros((1, 1), int), np.ones((1, 1), np.float32), up, down)
        out, pre = experts_forward(*call, activation=activation)
        found = experts_backward(np.ones_like(out), pre, *call, activation=activation)
        wide = [torch.tensor(np.asarray(a, np.float64)).requires_grad_() for a in (x, up)]
        hidden = wide[0] @ wide[1][0].T
        want = act(hidden, activation, "concatenated")
        want.sum().backward()
        assert wide[1].grad is not None
        got, expected = found.gate_up.astype(np.float64), wide[1].grad.numpy()
        assert np.isfinite(out.astype(np.float64)).all() and np.isfinite(got).all(), gate
        assert np.allclose(got, expected, rtol=1e-2, atol=1e-6), (gate, got, expected)


def test_adversarial_12_expanded_gradients_and_partial_requests(isa: str) -> None:
    t = cast(problem(25, 10, 8, 4, 2), torch.float32)
    everything = gradients(fast, t, torch.ones(25, 10))
    fast(t).sum().backward()  # an expanded gradient, all strides 0
    for name, value in everything.items():
        if name != "out":
            assert torch.equal(t[name].grad, value)  # type: ignore[arg-type]
    for name in [name for name in t if name != "expert_ids"]:
        alone = {key: value.detach() for key, value in t.items()}
        alone[name].requires_grad_()
        assert torch.equal(torch.autograd.grad(fast(alone).sum(), alone[name])[0], everything[name]), name
    x = t["x"]
    (first,) = torch.autograd.grad(fast(t).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        first.sum().backward()


def test_adversarial_16_messages_name_the_argument() -> None:
    arrays: dict[str, Any] = {name: value.numpy() for name, value in problem(4, 6, 5, 3, 2).items()}
    out, pre = experts_forward(**arrays)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gate_up": arrays["gate_up"].swapaxes(1, 2)}, ShapeError, "gate_up"),
        ({"down": arrays["down"][:2]}, ShapeError, "down"),
        ({"expert_ids": arrays["expert_ids"].astype(np.float32)}, DtypeError, "expert_ids"),
        ({"weights": arrays["expert_ids"]}, DtypeError, "weights"),
        ({"down_bias": arrays["down_bias"][:, :2]}, ShapeError, "down_bias"),
        ({"token_ids": np.arange(8)}, ShapeError, "expert_ids.*token_ids"),
        ({"x": arrays["x"].astype(np.float32)}, DtypeError, "gate_up"),
    ]
    for change, error, match in bad:
        with pytest.raises(error, match=match):
            experts(**{**arrays, **change})
        with pytest.raises(error, match=match):
            experts_backward(out, pre, **{**arrays, **change})
    with pytest.raises(ShapeError, match=r"pre_activation.*\[8, 10\]"):
        experts_backward(out, pre[:3], **arrays)
    with pytest.raises(ShapeError, match="grad"):
        experts_backward(out[:3], pre, **arrays)
    with pytest.raises(ArgumentError, match=r"wanted.*'biases'"):
        experts_backward(out, pre, **arrays, wanted=["biases"])
    only = {key: value for key, value in arrays.items() if key != "down_bias"}
    assert experts_backward(out, experts_forward(**only)[1], **only).down_bias is None  # one bias without the other


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check does that
def test_the_operators_pass_torchs_own_checks() -> None:
    for kind in KINDS.values():
        t = cast(problem(12, 8, 6, 3, 2), kind)
        ids = t["expert_ids"]
        args = (t["x"], ids, t["weights"], None, t["gate_up"], t["down"], t["gate_up_bias"], t["down_bias"])
        torch.library.opcheck(torch.ops.tilewise.moe_experts.default, (*args, "geglu", "interleaved", 1.0, 1.0, True))


def test_meta_tensors_give_shapes_and_gradients() -> None:
    t = {name: value.to("meta") for name, value in problem(6, 8, 5, 3, 2).items()}
    t = {name: value if name == "expert_ids" else value.requires_grad_() for name, value in t.items()}
    out = fast(t)
    assert out.device.type == "meta" and out.shape == (6, 8)
    found = torch.autograd.grad(out.sum(), [t["x"], t["gate_up"]])
    assert [tuple(value.shape) for value in found] == [(6, 8), (3, 10, 8)]


def test_a_compiled_layer_trains_alike() -> None:
    t = cast(problem(40, 24, 18, 4, 2), torch.float32)
    grad = torch.from_numpy(normal((40, 24), seed=5))
    want = gradients(fast, t, grad)
    got = gradients(torch.compile(fast, fullgraph=True, backend="aot_eager"), t, grad)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["moe_experts", "moe_experts_backward", "moe_route", "moe_route_backward"])
def test_tensors_on_a_gpu_have_a_kernel(name: str) -> None:
    import tilewise.cuda.moe.operators

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tilewise::{name}", "CUDA")
    assert callable(getattr(tilewise.cuda.moe.operators, name.removeprefix("moe_")))
