"""The attention room: values and LSE against the float64 meaning; every rule, level, type and layout."""

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
from tilewise.attention import attention
from tilewise.testing import assert_within_budget, force_threads, layouts, normal

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
# batch, query heads, key heads, queries, keys, head dim, value dim: odd everywhere, decode (few rows) and prefill
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 1, 129, 40, 24),
    (1, 6, 2, 5, 77, 33, 17),
    (1, 2, 2, 70, 70, 64, 64),
    (2, 3, 1, 65, 130, 16, 128),
    (1, 1, 1, 130, 63, 512, 5),
    (1, 8, 1, 1, 1100, 128, 128),
]


def inputs(size: tuple[int, ...], dtype: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    b, hq, hk, sq, sk, d, dv = size
    return (
        normal((b, hq, sq, d), dtype, seed=seed),
        normal((b, hk, sk, d), dtype, seed=seed + 1),
        normal((b, hk, sk, dv), dtype, seed=seed + 2),
    )


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Attention with every intermediate rounded to the inputs' type, as an unfused run in that precision does."""
    kind = getattr(torch, np.dtype(q.dtype).name)
    group = q.shape[1] // k.shape[1]
    tq, tk, tv = (torch.from_numpy(x.astype(np.float64)).to(kind) for x in (q, k, v))
    tk, tv = tk.repeat_interleave(group, 1), tv.repeat_interleave(group, 1)
    scores = (tq @ tk.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(keep), float("-inf"))
    weights = torch.nan_to_num(scores.softmax(-1), 0.0)
    return (weights @ tv).double().numpy()


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, **rules: Any) -> None:
    wide = [x.astype(np.float64) for x in (q, k, v)]
    truth, truth_lse = reference.attention.attention(*wide, **rules, return_lse=True)
    out, lse = attention(q, k, v, **rules, return_lse=True)
    visible = {name: rules[name] for name in rules if name not in ("scale", "sinks")}
    keep = reference.attention.visible(*q.shape[:3], k.shape[2], **visible)
    # A sink only shrinks values, so the plain run without it is a fair measure of the rounding.
    floor = 8 * float(np.finfo(q.dtype).eps) * float(np.abs(truth).max(initial=0.0)) if q.itemsize >= 4 else None
    assert_within_budget(out, truth, plain(q, k, v, keep), floor=floor)
    scores = np.abs(truth_lse[np.isfinite(truth_lse)]).max(initial=1.0)
    accumulator = np.float64 if q.dtype == np.float64 else np.float32
    bound = np.finfo(accumulator).eps * (8 + q.shape[-1]) * scores
    assert_within_budget(lse, truth_lse, truth_lse, floor=float(bound))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_values_equal_the_reference(isa: str, dtype: Any, size: tuple[int, ...], causal: bool) -> None:
    check(*inputs(size, dtype), causal=causal)


@pytest.mark.parametrize("window", [(0, 0), (3, -1), (-1, 2), (10, 5), (0, 100), (200, 200)])
@pytest.mark.parametrize(("sq", "sk"), [(40, 40), (40, 70), (70, 40), (1, 90), (4, 9)])
def test_windows(isa: str, window: tuple[int, int], sq: int, sk: int) -> None:
    for causal in (False, True):
        check(*inputs((1, 2, 1, sq, sk, 16, 8), np.float32), window=window, causal=causal)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("sq", "sk"), [(50, 131), (2, 131)])
def test_masks_of_every_broadcast(isa: str, dtype: Any, sq: int, sk: int) -> None:
    q, k, v = inputs((2, 4, 2, sq, sk, 24, 20), dtype)
    random = np.random.default_rng(0)
    for shape in [(2, 4, sq, sk), (2, 1, sq, sk), (1, 1, 1, sk), (2, 1, 1, sk), (sq, sk)]:
        mask = random.random(shape) < 0.4
        check(q, k, v, mask=mask)
        check(q, k, v, mask=mask, causal=True)
    strided = np.asfortranarray(random.random((2, 4, sq, sk)) < 0.5)
    check(q, k, v, mask=strided)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("block_size", [1, 3, 16, 200])
@pytest.mark.parametrize("sq", [2, 60])
def test_selected_blocks(isa: str, dtype: Any, block_size: int, sq: int) -> None:
    sk = 131
    q, k, v = inputs((2, 6, 2, sq, sk, 16, 16), dtype)
    count = -(-sk // block_size)
    random = np.random.default_rng(block_size)
    for groups in (1, 2, 6):
        chosen = np.stack([random.permutation(max(count, 4))[:4] for _ in range(2 * groups * sq)])
        chosen = np.where(chosen < count, chosen, -1).reshape(2, groups, sq, 4)
        for kind in (np.int32, np.int64):
            check(q, k, v, block_indices=chosen.astype(kind), block_size=block_size)
        check(
            q, k, v, block_indices=chosen, block_size=block_size, causal=True, mask=random.random((2, 1, 1, sk)) < 0.8
        )


@pytest.mark.parametrize("sq", [2, 40])
def test_sinks(isa: str, sq: int) -> None:
    q, k, v = inputs((1, 4, 2, sq, 40, 16, 16), np.float32)
    for sinks in ([0.0, 1.0, -1.0, 3.0], [-np.inf] * 4, [200.0, -200.0, 1e4, 0.0]):
        check(q, k, v, sinks=np.array(sinks, np.float32), causal=True)
    none = np.zeros((1, 1, sq, 40), bool)
    out, lse = attention(q, k, v, mask=none, sinks=np.array([1.0, 2, 3, 4], np.float32), return_lse=True)
    assert np.array_equal(out, np.zeros_like(out))
    assert np.allclose(lse, np.array([1.0, 2, 3, 4])[None, :, None])


@pytest.mark.parametrize("size", [(1, 2, 1, 3, 20, 8, 8), (1, 2, 1, 60, 20, 8, 8)])
def test_empty_rows_are_zero_with_lse_of_minus_infinity(isa: str, size: tuple[int, ...]) -> None:
    q, k, v = inputs(size, np.float32)
    mask = np.ones((1, 1, size[3], 20), bool)
    mask[0, 0, 1] = False
    out, lse = attention(q, k, v, mask=mask, return_lse=True)
    assert np.array_equal(out[:, :, 1], np.zeros_like(out[:, :, 1])) and np.all(lse[:, :, 1] == -np.inf)
    assert np.all(np.isfinite(lse[:, :, 0])) and np.all(np.isfinite(out))


@pytest.mark.parametrize("axis", range(4))
def test_empty_extents(isa: str, axis: int) -> None:
    shape = [2, 2, 5, 8]
    shape[axis] = 0
    if axis == 3:
        return  # a head dimension of 0 is refused; see test_errors
    q = np.ones(shape, np.float32)
    out, lse = attention(q, q, q, return_lse=True)
    assert out.shape == tuple(shape) and lse.shape == tuple(shape[:3])
    some = np.ones((2, 2, 5, 8), np.float32)
    out, lse = attention(some, some[:, :, :0], some[:, :, :0], return_lse=True)
    assert np.array_equal(out, np.zeros_like(some)) and np.all(lse == -np.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("sq", [3, 21])
def test_layout_does_not_change_the_value(isa: str, dtype: Any, sq: int) -> None:
    q, k, v = inputs((1, 4, 2, sq, 21, 12, 10), dtype)
    expected = attention(q, k, v, causal=True)
    for position, array in enumerate((q, k, v)):
        for name, view in layouts(array):
            arrays = [q, k, v]
            arrays[position] = view
            assert np.array_equal(attention(*arrays, causal=True), expected), (position, name)


@pytest.mark.parametrize("sq", [2, 30])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_poison_only_the_rows_that_attend_them(isa: str, sq: int, bad: float) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        q, k, v = inputs((1, 2, 1, sq, 30, 16, 8), dtype)
        clean = attention(q, k, v, causal=True)
        v = v.copy()
        v[0, 0, 29, 3] = bad
        out = attention(q, k, v, causal=True)
        assert np.array_equal(out[:, :, :-1], clean[:, :, :-1])
        assert not np.isfinite(out[0, 0, -1, 3].astype(np.float32)) and np.isfinite(out[0, 0, -1, 2].astype(np.float32))
        k = k.copy()
        k[0, 0, 29] = np.nan
        out = attention(q, k, v, causal=True).astype(np.float32)
        assert np.array_equal(out[:, :, :-1], clean[:, :, :-1].astype(np.float32)) and np.isnan(out[:, :, -1]).all()


def test_extreme_scores(isa: str) -> None:
    for sq in (2, 40):
        q, k, v = inputs((1, 2, 2, sq, 40, 16, 8), np.float32)
        for scale in (0.0, -0.3, 1e4, 1e-30):
            out = attention(q, k, v, scale=scale, causal=True)
            truth = reference.attention.attention(*(x.astype(np.float64) for x in (q, k, v)), scale=scale, causal=True)
            # One rounding of a score of size s moves a weight by s * eps.
            assert np.abs(out - truth).max() < 1e-6 + abs(scale) * 16 * 8e-7 * np.abs(v).max()
        rising = np.linspace(-50, 50, 40, dtype=np.float32)
        for order in (rising, rising[::-1]):
            k2 = np.zeros_like(k)
            k2[..., 0] = order
            q2 = np.zeros_like(q)
            q2[..., 0] = 4.0
            check(q2, k2, v)


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60), st.integers(1, 90),
    st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(-1, 20), st.integers(0, 9),
)  # fmt: skip
def test_random_problems(
    b: int, hk: int, group: int, sq: int, sk: int, d: int, dv: int, causal: bool, left: int, seed: int
) -> None:
    check(*inputs((b, hk * group, hk, sq, sk, d, dv), np.float32, seed), causal=causal, window=(left, -1))


def test_split_and_threads_do_not_change_a_row() -> None:
    q, k, v = inputs((2, 8, 2, 1, 3000, 64, 64), np.float32)
    with force_threads(1):
        one = attention(q, k, v)
    with force_threads(3):
        assert np.array_equal(attention(q, k, v), one)
    # A row alone equals the row in its batch.
    assert np.array_equal(attention(q[1:], k[1:], v[1:]), one[1:])


def test_decode_step_by_step_equals_prefill(isa: str) -> None:
    q, k, v = inputs((1, 4, 2, 40, 40, 16, 16), np.float64)
    whole = attention(q, k, v, causal=True)
    for i in range(40):
        step = attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        assert np.allclose(step, whole[:, :, i : i + 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_operator(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 8)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mask = torch.rand(2, 4, 9, 12) < 0.7
    sinks = torch.randn(4)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return twt.attention(q, k, v, scale=0.25, causal=True, window=(5, -1), mask=mask, sinks=sinks, return_lse=True)

    eager, compiled = run(q, k, v), torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    wide = [x.double().numpy() for x in (q, k, v)]
    truth = reference.attention.attention(
        *wide, scale=0.25, causal=True, window=(5, -1), mask=mask.numpy(), sinks=sinks.double().numpy()
    )
    assert np.abs(eager[0].double().numpy() - truth).max() < {2: 2e-2, 4: 2e-6, 8: 1e-14}[q.element_size()]


def test_foreign_devices_are_refused() -> None:
    from tilewise.errors import DeviceError

    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(DeviceError, match=r"meta|CPU"):
        attention(*(x.to("meta") for x in (q, q, q)))
