"""int8 experts: bytes and scales against their float64 meaning, and the layer on them against dequantised weights."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra

import tilewise.torch as twt
from tilewise import reference
from tilewise.errors import ArgumentError
from tilewise.moe import ACTIVATIONS, QuantisedExperts, experts, quantise_experts
from tilewise.testing import assert_within_budget, force_threads, layouts, normal

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
names = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
# Rows an expert: one, a few, around the border to the path for many, and more than one block of those.
ROWS = [1, 2, 3, 4, 5, 11, 12, 13, 40]


def problem(
    tokens: int, d: int, n: int, count: int, slots: int, dtype: Any, *, gated: bool = True, bias: bool = False
) -> dict[str, Any]:
    random = np.random.default_rng(tokens + 3 * d + n)
    features = 2 * n if gated else n
    ids = np.stack([random.permutation(count)[:slots] for _ in range(tokens)]) if tokens else np.zeros((0, slots), int)
    weights = normal((count, features, d), seed=2, scale=d**-0.5), normal((count, d, n), seed=3, scale=n**-0.5)
    return {
        "x": normal((tokens, d), dtype, seed=1),
        "expert_ids": ids.astype(np.int32),
        "weights": random.random((tokens, slots)).astype(np.float32),
        **quantise_experts(*weights)._asdict(),
        "gate_up_bias": normal((count, features), dtype, seed=4) if bias else None,
        "down_bias": normal((count, d), dtype, seed=5) if bias else None,
    }


def dequantised(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the layer on floating weights, float64."""
    wide = {
        name: value if value is None or "ids" in name else value.astype(np.float64)
        for name, value in arrays.items()
        if not name.endswith("_scale")
    }
    for name in ("gate_up", "down"):
        if arrays.get(f"{name}_scale") is not None:
            wide[name] = reference.moe.dequantise(arrays[name], arrays[f"{name}_scale"])
    return wide


def truth(arrays: dict[str, Any], **options: Any) -> np.ndarray:
    return reference.moe.experts(**dequantised(arrays), **options)


def plain(arrays: dict[str, Any], activation: str = "swiglu", layout: str = "concatenated") -> np.ndarray:
    """Token by token on dequantised weights, every intermediate rounded to the type of x."""
    kind = getattr(torch, np.dtype(arrays["x"].dtype).name)
    t: dict[str, Any] = {
        name: None if value is None else torch.from_numpy(value).to(kind)
        for name, value in dequantised(arrays).items()
        if name not in ("expert_ids", "weights")
    }
    out = torch.zeros_like(t["x"], dtype=torch.float64 if kind == torch.float64 else torch.float32)
    for token, chosen in enumerate(arrays["expert_ids"]):
        for slot, e in enumerate(chosen):
            h = t["gate_up"][e] @ t["x"][token]
            if t["gate_up_bias"] is not None:
                h = h + t["gate_up_bias"][e]
            a = reference.moe.activate(h.double().numpy()[None], activation, layout=layout)[0]
            y = t["down"][e] @ torch.from_numpy(a).to(kind)
            if t["down_bias"] is not None:
                y = y + t["down_bias"][e]
            out[token] += float(arrays["weights"][token, slot]) * y.to(out.dtype)
    return out.to(kind).double().numpy()


def assert_close(out: Any, want: np.ndarray, loop: np.ndarray) -> None:
    # A scaled sum has one rounding that its whole row shares; the plain run rounds each dequantised weight instead,
    # which evens out.
    assert_within_budget(out, want, loop, factor=3.0, norm="frobenius")


@names
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (1, 64, 48, 8, 2),
        (7, 33, 17, 3, 2),
        (70, 40, 51, 4, 3),
        (300, 16, 8, 1, 1),
        (40, 5, 100, 30, 7),
    ],
)
def test_layer_equals_the_reference_on_dequantised_weights(isa: str, dtype: Any, shape: Any) -> None:
    for layout in ("concatenated", "interleaved"):
        arrays = problem(*shape, dtype=dtype, bias=layout == "interleaved")
        out = experts(**arrays, layout=layout)
        assert out.dtype == dtype
        assert_close(out, truth(arrays, layout=layout), plain(arrays, "swiglu", layout))


@names
@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows(isa: str, dtype: Any, rows: int) -> None:
    """Depths around the lanes and lines that bytes are read by."""
    for d, n in ((64, 16), (63, 65), (130, 31), (15, 129)):
        arrays = problem(rows, d, n, 1, 1, dtype)
        assert_close(experts(**arrays), truth(arrays), plain(arrays))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(isa: str, activation: Any) -> None:
    for tokens in (3, 60):
        arrays = problem(tokens, 20, 24, 2, 1, np.float64, gated=ACTIVATIONS[activation], bias=True)
        for layout in ("concatenated", "interleaved"):
            want = truth(arrays, activation=activation, layout=layout)
            out = experts(**arrays, activation=activation, layout=layout)
            assert np.linalg.norm(out - want) < 1e-14 * np.linalg.norm(want)


def test_every_byte_counts_as_itself(isa: str) -> None:
    """All 256 bytes, -128 included, which other quantisers use: products with ones of x are exact sums."""
    up = np.arange(-128, 128).astype(np.int8).reshape(1, 16, 16)
    one, down = np.ones((1, 16), np.float32), np.eye(16, dtype=np.int8)[None]
    for dtype in DTYPES:
        for tokens in (1, 20):
            for column in (0, 7, 15):
                x = np.zeros((tokens, 16), dtype)
                x[:, column] = 1
                ids, weights = np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32)
                out = experts(x, ids, weights, up, down, gate_up_scale=one, down_scale=one, activation="relu")
                assert np.array_equal(out.astype(int), np.tile(np.maximum(up[0, :, column], 0), (tokens, 1)))


def test_one_weight_of_two_may_be_int8(isa: str) -> None:
    for tokens in (2, 40):
        arrays = problem(tokens, 20, 12, 2, 1, np.float32)
        for name in ("gate_up", "down"):
            mixed = dict(arrays)
            mixed[name] = reference.moe.dequantise(arrays[name], arrays.pop(f"{name}_scale")).astype(np.float32)
            mixed[f"{name}_scale"] = None
            want = truth(mixed)
            assert np.linalg.norm(experts(**mixed) - want) < 1e-6 * np.linalg.norm(want)
            arrays = problem(tokens, 20, 12, 2, 1, np.float32)


def test_rows_of_zeros(isa: str) -> None:
    up, down = normal((2, 8, 6)), normal((2, 6, 4))
    up[0], up[1, 3], down[1] = 0, 0, 0
    quantised = quantise_experts(up, down)
    assert (
        not quantised.gate_up_scale[0].any() and quantised.gate_up_scale[1, 3] == 0 and not quantised.gate_up[0].any()
    )
    for tokens in (2, 30):
        x, ids = normal((tokens, 6)), np.tile(np.array([[0, 1]], np.int32), (tokens, 1))
        bias = normal((2, 6), seed=3)
        out = experts(x, ids, np.ones(ids.shape, np.float32), **quantised._asdict(), down_bias=bias)
        assert np.allclose(out, np.tile(bias.sum(0), (tokens, 1)), rtol=1e-6)


def test_sentinels_contribute_nothing(isa: str) -> None:
    for tokens in (4, 80):
        arrays = problem(tokens, 24, 16, 3, 2, np.float32)
        arrays["expert_ids"][::2, 1] = -1
        arrays["expert_ids"][1::2, 0] = 3
        clean = {
            **arrays,
            "weights": np.where((arrays["expert_ids"] % 3) == arrays["expert_ids"], arrays["weights"], 0),
        }
        arrays["weights"][::2, 1] = np.nan
        assert np.allclose(experts(**arrays), truth(clean), atol=1e-5)
        arrays["expert_ids"][:] = 9
        assert np.array_equal(experts(**arrays), np.zeros((tokens, 24), np.float32))


@pytest.mark.parametrize("empty", ["tokens", "d", "n", "experts", "slots"])
def test_empty_extents(isa: str, empty: str) -> None:
    size = {"tokens": 5, "d": 4, "n": 3, "experts": 2, "slots": 2} | {empty: 0}
    x = np.ones((size["tokens"], size["d"]), np.float32)
    ids = np.zeros((size["tokens"], size["slots"]), np.int32)
    up = np.ones((size["experts"], 2 * size["n"], size["d"]), np.float32)
    down = np.ones((size["experts"], size["d"], size["n"]), np.float32)
    quantised = quantise_experts(up, down)
    assert quantised.gate_up.shape == up.shape and quantised.gate_up_scale.shape == up.shape[:2]
    out = experts(x, ids, np.ones(ids.shape, np.float32), **quantised._asdict())
    assert out.shape == x.shape and np.array_equal(out, np.zeros_like(x))


@pytest.mark.parametrize("tokens", [5, 50])
def test_layout_in_memory_does_not_change_the_value(isa: str, tokens: int) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        arrays = problem(tokens, 18, 14, 3, 2, dtype, bias=True)
        expected = experts(**arrays)
        for name in ("x", "gate_up", "down", "gate_up_scale", "down_scale"):
            for layout, view in layouts(arrays[name]):
                assert np.array_equal(experts(**{**arrays, name: view}), expected), (name, layout)
        transposed = {**arrays, "gate_up": arrays["gate_up"].swapaxes(1, 2).copy().swapaxes(1, 2)}
        assert np.array_equal(experts(**transposed), expected)


def test_pairs_with_their_tokens_and_threads(isa: str) -> None:
    for tokens in (6, 90):
        arrays = problem(tokens, 32, 24, 6, 3, np.float32)
        expected = experts(**arrays)
        pairs = {
            **arrays,
            "expert_ids": arrays["expert_ids"].ravel(),
            "weights": arrays["weights"].ravel(),
            "token_ids": np.repeat(np.arange(tokens), 3),
        }
        assert np.array_equal(experts(**pairs), expected)
        for count in (1, 3):
            with force_threads(count):
                assert np.array_equal(experts(**arrays), expected)


def test_a_corrupted_stripe_is_noticed() -> None:
    arrays = problem(20, 64, 32, 4, 2, ml_dtypes.bfloat16)
    out = experts(**arrays)
    broken = {**arrays, "down": arrays["down"].copy()}
    broken["down"][:, 16:32] = broken["down"][:, 32:48]
    assert_within_budget(out, truth(arrays), plain(arrays), norm="frobenius")
    with pytest.raises(AssertionError):
        assert_within_budget(experts(**broken), truth(arrays), plain(arrays), norm="frobenius")


# Quantisation.


def assert_is_the_reference(gate_up: np.ndarray, down: np.ndarray) -> QuantisedExperts:
    found = quantise_experts(gate_up, down)
    wide = [weight.astype(np.float64) for weight in (gate_up, down)]
    for name, got, want in zip(found._fields, found, reference.moe.quantise_experts(*wide), strict=True):
        assert got.dtype == want.dtype and np.array_equal(got, want), name
    for weight, bytes_, scale in ((wide[0], *found[:2]), (wide[1], *found[2:])):
        assert np.abs(bytes_.astype(int)).max(initial=0) <= 127
        half = np.broadcast_to(scale[..., None].astype(np.float64) / 2, weight.shape)
        error = np.abs(weight - reference.moe.dequantise(bytes_, scale))
        assert (error <= half * (1 + 2**-40)).all()
        assert (np.abs(bytes_.astype(int)).max(axis=-1, initial=0) == 127)[scale > np.finfo(np.float32).tiny].all()
    return found


@names
def test_quantised_weights_are_the_references(dtype: Any) -> None:
    for experts_, rows, columns in ((1, 1, 1), (3, 7, 33), (5, 130, 64)):
        up = normal((experts_, rows, columns), dtype, seed=1, scale=0.02)
        down = normal((experts_, columns, rows), dtype, seed=2, scale=30.0)
        found = assert_is_the_reference(up, down)
        for layout, view in layouts(up):
            for got, want in zip(quantise_experts(view, down), found, strict=True):
                assert np.array_equal(got, want), layout
        with force_threads(3):
            assert all(map(np.array_equal, quantise_experts(up, down), found))


@given(extra.arrays(np.float32, (1, 3, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_error_bound_holds_at_any_size(weight: np.ndarray) -> None:
    assert_is_the_reference(weight, np.swapaxes(weight, 1, 2))


def test_tiny_and_huge_weights() -> None:
    least = np.float32(1e-45)
    for size in (least, 60 * least, 100 * least, 189 * least, 1e-36, 1e-38, 3.4e38):
        row = np.array([[[1, -0.5, 0.25, 0]]], np.float32) * np.float32(size)
        assert assert_is_the_reference(row, row).gate_up_scale[0, 0] > 0
    for size in (1e-300, 4e40):  # float64 only
        row = np.array([[[1, -0.5, 0.25, 0]]]) * size
        assert_is_the_reference(row, row)
    with pytest.raises(ArgumentError, match="gate_up: expected weights that float32 can scale"):
        quantise_experts(np.full((1, 1, 2), 1e42), np.ones((1, 2, 1)))


def test_halves_go_to_the_even_byte() -> None:
    row = np.array([[[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]], np.float32)
    assert quantise_experts(row, row).gate_up.tolist() == [[[127, 0, 2, 2, 0, -2, -2, 126]]]


def test_the_first_place_without_a_number_is_named() -> None:
    for value, word in ((np.nan, "NaN"), (-np.inf, "-inf")):
        weight = np.ones((3, 200, 20))
        weight[1, 150, 7] = weight[2, 0, 0] = weight[1, 151, 3] = value
        with pytest.raises(ArgumentError, match=f"down: .*got {word} at expert 1, row 150, column 7"):
            quantise_experts(np.ones((3, 2, 200)), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_operators(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, up, down = torch.randn(20, 12).to(dtype), torch.randn(4, 10, 12).to(dtype), torch.randn(4, 12, 5).to(dtype)
    torch.library.opcheck(torch.ops.tilewise.moe_quantise_experts.default, (up, down))
    quantised = twt.moe.quantise_experts(up, down)
    same = quantise_experts(*(weight.double().numpy() for weight in (up, down)))
    assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(quantised, same, strict=True))
    ids, weights = torch.randint(0, 4, (20, 2)), torch.rand(20, 2)
    scales = (quantised.gate_up_scale, quantised.down_scale)
    args = (x, ids, weights, None, quantised.gate_up, quantised.down, None, None, *scales, "swiglu", "interleaved", 1.7)
    torch.library.opcheck(torch.ops.tilewise.moe_experts_quantised.default, (*args, 7.0))

    def run(x: torch.Tensor) -> torch.Tensor:
        return twt.moe.experts(x, ids, weights, **quantised._asdict(), layout="interleaved")

    wide = [q.double() * s.double()[..., None] for q, s in (quantised[:2], quantised[2:])]
    want = twt.moe.experts(x.double(), ids, weights, *wide, layout="interleaved")
    assert run(x).dtype == dtype
    assert torch.linalg.norm(run(x).double() - want) < 4 * torch.finfo(dtype).eps * torch.linalg.norm(want)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    with torch.no_grad():
        assert torch.equal(run(x.clone().requires_grad_()), run(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x), run(x if dtype == torch.float64 else x.bfloat16()))


def test_a_parameter_is_quantised_without_a_graph() -> None:
    up, down = torch.nn.Parameter(torch.randn(2, 6, 4)), torch.nn.Parameter(torch.randn(2, 4, 3))
    assert not any(tensor.requires_grad for tensor in twt.moe.quantise_experts(up, down))
