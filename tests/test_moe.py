"""The moe room: the expert layer against the float64 meaning, on every level, layout and type."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tilewise.torch as twt
from tilewise import reference
from tilewise.moe import ACTIVATIONS, experts
from tilewise.testing import assert_within_budget, force_threads, layouts, normal

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def problem(
    tokens: int, d: int, n: int, count: int, slots: int, dtype: Any, *, gated: bool = True, bias: bool = False
) -> dict[str, Any]:
    random = np.random.default_rng(tokens + d + n)
    features = 2 * n if gated else n
    ids = np.stack([random.permutation(count)[:slots] for _ in range(tokens)]) if tokens else np.zeros((0, slots), int)
    return {
        "x": normal((tokens, d), dtype, seed=1),
        "expert_ids": ids.astype(np.int32),
        "weights": random.random((tokens, slots)).astype(np.float32),
        "gate_up": normal((count, features, d), dtype, seed=2, scale=d**-0.5),
        "down": normal((count, d, n), dtype, seed=3, scale=n**-0.5),
        "gate_up_bias": normal((count, features), dtype, seed=4) if bias else None,
        "down_bias": normal((count, d), dtype, seed=5) if bias else None,
    }


def truth(arrays: dict[str, Any], **options: Any) -> np.ndarray:
    wide = {
        name: value if value is None or name == "expert_ids" else value.astype(np.float64)
        for name, value in arrays.items()
    }
    return reference.moe.experts(**wide, **options)


def plain(arrays: dict[str, Any], activation: str, layout: str, alpha: float = 1.702, limit: float = 7.0) -> np.ndarray:
    """A loop over experts with every intermediate rounded to the inputs' type."""
    kind = getattr(torch, np.dtype(arrays["x"].dtype).name)
    t = {
        name: None if value is None else torch.from_numpy(value.astype(np.float64)).to(kind)
        for name, value in arrays.items()
        if name not in ("expert_ids", "weights")
    }
    out = torch.zeros_like(t["x"], dtype=torch.float32 if kind != torch.float64 else torch.float64)
    for token, chosen in enumerate(arrays["expert_ids"]):
        for slot, e in enumerate(chosen):
            if not 0 <= e < t["down"].shape[0]:
                continue
            h = t["gate_up"][e] @ t["x"][token]
            if t["gate_up_bias"] is not None:
                h = h + t["gate_up_bias"][e]
            a = torch.from_numpy(
                reference.moe.activate(h.double().numpy()[None], activation, layout=layout, alpha=alpha, limit=limit)[0]
            ).to(kind)
            y = t["down"][e] @ a
            if t["down_bias"] is not None:
                y = y + t["down_bias"][e]
            out[token] += float(arrays["weights"][token, slot]) * y.to(out.dtype)
    return out.to(kind).double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (1, 64, 48, 8, 2),
        (7, 33, 17, 3, 2),
        (70, 40, 51, 4, 3),
        (230, 16, 8, 1, 1),
        (40, 5, 100, 30, 7),
    ],
)
def test_layer_equals_the_reference(isa: str, dtype: Any, shape: tuple[int, ...]) -> None:
    for layout in ("concatenated", "interleaved"):
        arrays = problem(*shape, dtype, bias=layout == "interleaved")
        out = experts(**arrays, layout=layout)
        assert_within_budget(out, truth(arrays, layout=layout), plain(arrays, "swiglu", layout), norm="frobenius")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("tokens", [3, 60])
def test_activations(isa: str, activation: str, tokens: int) -> None:
    gated = ACTIVATIONS[activation]
    for dtype in (np.float32, np.float64):
        arrays = problem(tokens, 20, 24, 2, 1, dtype, gated=gated, bias=True)
        arrays["x"] = arrays["x"] * 6  # saturates sigmoids and reaches the clamp
        for layout in ("concatenated", "interleaved"):
            options = {"activation": activation, "layout": layout, "alpha": 1.3, "limit": 4.0}
            out = experts(**arrays, **options)
            error = np.linalg.norm(out - truth(arrays, **options)) / np.linalg.norm(truth(arrays, **options))
            assert error < (1e-6 if dtype == np.float32 else 1e-14)


def test_saturated_gates_stay_finite(isa: str) -> None:
    for sign in (-1, 1):
        x = np.full((20, 4), sign * 100.0, np.float32)
        up, down = np.ones((1, 6, 4), np.float32), np.ones((1, 4, 3), np.float32)
        ids, weights = np.zeros((20, 1), np.int32), np.ones((20, 1), np.float32)
        for activation in ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped"):
            out = experts(x, ids, weights, up, down, activation=activation)
            want = reference.moe.experts(x, ids, weights, up, down, activation=activation)
            assert np.allclose(out, want, rtol=1e-6)


def test_one_hot_expert_and_empty_ones(isa: str) -> None:
    for tokens in (11, 12, 13, 191, 192, 193):
        arrays = problem(tokens, 24, 16, 5, 1, np.float32)
        arrays["expert_ids"] = np.full((tokens, 1), 3, np.int32)
        assert np.linalg.norm(experts(**arrays) - truth(arrays)) < 1e-6 * np.linalg.norm(truth(arrays))


def test_sentinels_contribute_nothing(isa: str) -> None:
    for tokens in (4, 80):
        arrays = problem(tokens, 24, 16, 3, 2, np.float32)
        for sentinel in (-1, 3, 1000):
            arrays["expert_ids"][::2, 1] = sentinel
            arrays["weights"][::2, 1] = np.nan
            clean = {**arrays, "weights": np.nan_to_num(arrays["weights"], nan=0.0)}
            assert np.allclose(experts(**arrays), truth(clean), atol=1e-5)
        arrays["expert_ids"][:] = -1
        assert np.array_equal(experts(**arrays), np.zeros((tokens, 24), np.float32))


@pytest.mark.parametrize("empty", ["tokens", "d", "n", "experts", "slots"])
def test_empty_extents(isa: str, empty: str) -> None:
    size = {"tokens": 5, "d": 4, "n": 3, "experts": 2, "slots": 2} | {empty: 0}
    x = np.ones((size["tokens"], size["d"]), np.float32)
    ids = np.zeros((size["tokens"], size["slots"]), np.int32)
    up = np.ones((size["experts"], 2 * size["n"], size["d"]), np.float32)
    down = np.ones((size["experts"], size["d"], size["n"]), np.float32)
    out = experts(x, ids, np.ones(ids.shape, np.float32), up, down)
    assert out.shape == x.shape and np.array_equal(out, np.zeros_like(x))


@pytest.mark.parametrize("tokens", [5, 50])
def test_layout_in_memory_does_not_change_the_value(isa: str, tokens: int) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        arrays = problem(tokens, 18, 14, 3, 2, dtype, bias=True)
        expected = experts(**arrays)
        for name in ("x", "gate_up", "down", "weights", "gate_up_bias"):
            for layout, view in layouts(arrays[name]):
                assert np.array_equal(experts(**{**arrays, name: view}), expected), (name, layout)
        transposed = {**arrays, "gate_up": arrays["gate_up"].swapaxes(1, 2).copy().swapaxes(1, 2)}
        assert np.array_equal(experts(**transposed), expected)


@pytest.mark.parametrize("shape", [(40, 17, 1, 2, 1), (40, 1, 3, 2, 1), (3, 33, 50, 2, 1), (50, 300, 97, 2, 2)])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_weights_stored_the_other_way_round_give_the_same_bits(isa: str, shape: Any, activation: str) -> None:
    """As gpt-oss stores them: [experts, d, 2n] and [experts, n, d], passed as transposed views."""
    for dtype in DTYPES:
        arrays = problem(*shape, dtype, gated=ACTIVATIONS[activation])
        turned = {name: arrays[name].swapaxes(1, 2).copy().swapaxes(1, 2) for name in ("gate_up", "down")}
        for layout in ("concatenated", "interleaved"):
            options = {"activation": activation, "layout": layout}
            assert np.array_equal(experts(**{**arrays, **turned}, **options), experts(**arrays, **options))


def test_relabelling_and_threads() -> None:
    arrays = problem(90, 32, 24, 6, 3, np.float32)
    expected = experts(**arrays)
    order = np.random.default_rng(1).permutation(6)
    inverse = np.argsort(order)
    renamed = {
        **arrays,
        "gate_up": arrays["gate_up"][order],
        "down": arrays["down"][order],
        "expert_ids": inverse[arrays["expert_ids"]].astype(np.int32),
    }
    assert np.array_equal(experts(**renamed), expected)
    with force_threads(3):
        assert np.array_equal(experts(**arrays), expected)
    tokens = np.random.default_rng(2).permutation(90)
    shuffled = {**arrays, **{name: arrays[name][tokens] for name in ("x", "expert_ids", "weights")}}
    assert np.array_equal(experts(**shuffled), expected[tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_operators(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, up, down = torch.randn(20, 12).to(dtype), torch.randn(4, 10, 12).to(dtype), torch.randn(4, 12, 5).to(dtype)
    logits = torch.randn(20, 4).to(dtype)
    ids, weights = twt.moe.route(logits, 2)
    args = (x, ids, weights, None, up, down, None, None, "swiglu", "interleaved", 1.7, 7.0)
    for keep in (False, True):
        torch.library.opcheck(torch.ops.tilewise.moe_experts.default, (*args, keep))

    def run(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ids, weights = twt.moe.route(logits, 2)
        return twt.moe.experts(x, ids, weights, up, down)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x, logits), run(x, logits))


def test_a_corrupted_stripe_is_noticed() -> None:
    """The measure of these tests sees a fault of one 16-column stripe (a peer's test did not)."""
    arrays = problem(70, 64, 32, 4, 2, ml_dtypes.bfloat16)
    out = experts(**arrays)
    broken = out.copy()
    broken[:, 16:32] = broken[:, 32:48]
    want, loop = truth(arrays), plain(arrays, "swiglu", "concatenated")
    assert_within_budget(out, want, loop, norm="frobenius")
    with pytest.raises(AssertionError):
        assert_within_budget(broken, want, loop, norm="frobenius")
