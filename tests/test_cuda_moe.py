"""Aggregation on the GPU, and the same kernel emulated on a CPU, against float64; streams and graphs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuda_emulator import DTYPES, EPSILON, Place
from tilewise.cuda import moe
from tilewise.cuda.moe import aggregation
from tilewise.errors import DtypeError, ShapeError, UnsupportedError


def check_aggregate(place: Place, y: np.ndarray, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    got = moe.aggregate(place.put(y), place.put(rows), None if weights is None else place.put(weights))
    out = place.get(got)
    assert out.dtype == y.dtype and out.shape == (rows.shape[0], y.shape[1])
    wide = np.asarray(y, np.float64)
    factors = np.where(rows >= 0, 1.0 if weights is None else np.asarray(weights, np.float64), 0.0)
    terms = (
        np.where(rows[..., None] >= 0, wide[np.maximum(rows, 0)], 0.0) * np.where(rows >= 0, factors, 0.0)[..., None]
    )
    expected = terms.sum(axis=1)
    # K fused additions in float32, then one rounding to y's type.
    slack = (
        rows.shape[1] * 2.0**-24 * np.abs(terms).sum(axis=1)
        + EPSILON[str(y.dtype)] * np.abs(expected)
        + 1e-7 * (y.dtype == np.float16)
    )
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - expected), slack + 1e-44)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(1, 1, 1), (3, 2, 5), (7, 8, 64), (5, 3, 200), (2, 9, 2304)])
def test_aggregate(place: Place, dtype: str, tokens: int, top_k: int, columns: int) -> None:
    generator = np.random.default_rng(columns)
    y = generator.normal(size=(tokens * top_k, columns)).astype(DTYPES[dtype])
    rows = generator.permutation(tokens * top_k).reshape(tokens, top_k).astype(np.int32)
    weights = generator.uniform(size=(tokens, top_k)).astype(np.float32)
    first = check_aggregate(place, y, rows, weights)
    check_aggregate(place, y, rows, None)
    again = place.get(moe.aggregate(place.put(y), place.put(rows), place.put(weights)))
    np.testing.assert_array_equal(first.view(np.uint8), again.view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_aggregate_skips_sentinels_and_poisons_what_is_out_of_range(place: Place, dtype: str) -> None:
    y = np.full((4, 16), np.nan, DTYPES[dtype])
    y[1], y[2] = 2.0, 3.0
    rows = np.array([[1, -1, 2], [-1, -7, -1], [1, 4, 2], [2**31 - 1, 1, 1]], np.int32)
    weights = np.array([[0.5, np.nan, 2.0], [np.nan] * 3, [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], np.float32)
    out = np.asarray(place.get(moe.aggregate(place.put(y), place.put(rows), place.put(weights))), np.float32)
    np.testing.assert_array_equal(out[0], 7.0)
    np.testing.assert_array_equal(out[1], 0.0)
    assert np.isnan(out[2:]).all()


def test_aggregate_rounds_once(place: Place) -> None:
    generator = np.random.default_rng(1)
    y = generator.normal(size=(64, 8)).astype(ml_dtypes.bfloat16)
    signs = np.where(np.arange(64) % 2, -1.0, 1.0).astype(np.float32)
    rows = np.arange(64, dtype=np.int32)[None]
    check_aggregate(place, y, rows, signs[None] * 1000)  # large terms that cancel


def test_aggregate_keeps_subnormals(place: Place) -> None:
    y = np.array([[1e-45, -3e-45, 1e-39, 0.0]], np.float32)
    out = place.get(moe.aggregate(place.put(y), place.put(np.zeros((1, 1), np.int32))))
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aggregate_of_unaligned_rows_has_the_same_bits(place: Place, dtype: str) -> None:
    generator = np.random.default_rng(2)
    wide = generator.normal(size=(10, 49)).astype(DTYPES[dtype])
    rows = generator.integers(-1, 10, size=(6, 4)).astype(np.int32)
    weights = generator.uniform(size=(6, 4)).astype(np.float32)
    aligned = place.get(
        moe.aggregate(place.put(np.ascontiguousarray(wide[:, 1:49])), place.put(rows), place.put(weights))
    )
    shifted = place.get(moe.aggregate(place.put(wide)[:, 1:49], place.put(rows), place.put(weights)))
    np.testing.assert_array_equal(aligned.view(np.uint8), shifted.view(np.uint8))
    far = place.get(
        moe.aggregate(place.put(np.ascontiguousarray(wide[:, 1:49].T)).T, place.put(rows), place.put(weights))
    )
    np.testing.assert_array_equal(aligned.view(np.uint8), far.view(np.uint8))


def test_aggregate_of_nothing(place: Place) -> None:
    y = place.put(np.ones((3, 8), np.float32))
    assert tuple(moe.aggregate(y, place.put(np.zeros((0, 2), np.int32))).shape) == (0, 8)
    np.testing.assert_array_equal(place.get(moe.aggregate(y, place.put(np.zeros((2, 0), np.int32)))), np.zeros((2, 8)))
    assert tuple(moe.aggregate(y[:, :0], place.put(np.zeros((2, 2), np.int32))).shape) == (2, 0)


def test_aggregate_past_two_to_the_31_elements(emulated: Place) -> None:
    try:
        y = np.zeros((2**28 + 2, 8), np.float16)  # 4 GiB of address space of which two pages are touched
    except MemoryError:
        pytest.skip("no address space")
    y[2**28 + 1] = 3.0
    rows = np.array([[2**28 + 1, 0]], np.int32)
    np.testing.assert_array_equal(np.asarray(moe.aggregate(emulated.put(y), emulated.put(rows))), [[3.0] * 8])


def test_aggregate_refuses(place: Place) -> None:
    y, rows = place.put(np.ones((3, 8), np.float32)), place.put(np.zeros((2, 2), np.int32))
    with pytest.raises(DtypeError, match="rows: expected dtype int32, got int64"):
        moe.aggregate(y, place.put(np.zeros((2, 2), np.int64)))
    with pytest.raises(DtypeError, match=r"y: .*got float64"):
        moe.aggregate(place.put(np.ones((3, 8))), rows)
    with pytest.raises(ShapeError, match=r"expected \[R, d\] and \[T, K\], got shapes \(3, 8\) and \(2,\)"):
        moe.aggregate(y, rows[0])
    with pytest.raises(ShapeError, match=r"weights: expected the shape of rows \(2, 2\), got \(2, 3\)"):
        moe.aggregate(y, rows, place.put(np.ones((2, 3), np.float32)))


def test_aggregate_of_rows_longer_than_the_grid(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.random.default_rng(4).normal(size=(6, 2307)).astype(np.float32)
    rows = np.array([[0, 5], [3, -1]], np.int32)
    whole = check_aggregate(place, y, rows, None)
    monkeypatch.setattr(
        aggregation, "_geometry", lambda *sizes: ((2, 3, 1), (128, 1, 1))
    )  # 384 threads for 2307 columns
    np.testing.assert_array_equal(check_aggregate(place, y, rows, None), whole)


def test_geometry_covers_every_packet() -> None:
    for tokens, columns, width in [
        (1, 1, 1),
        (1, 7168, 8),
        (1000, 64, 4),
        (3, 2304, 1),
        (5, 3, 1),
        (0, 8, 8),
        (3, 0, 1),
    ]:
        grid, block = aggregation._geometry(tokens, columns, width)
        assert grid[0] * block[1] >= tokens and (grid[1] * block[0] * width >= columns or grid[1] == 65535)
        assert block[0] * block[1] * block[2] == 128 and (0 in grid) == (tokens * columns == 0)


# --- on a GPU only ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_launches_follow_torchs_current_stream(torch_cuda: Any) -> None:
    torch = torch_cuda
    logits = torch.randn(64, 128, device="cuda")
    expected = moe.route(logits, 8)[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is launched on another stream would run before the copy below
        late = torch.empty_like(logits)
        late.copy_(logits)
        ids, _ = moe.route(late, 8)
    stream.synchronize()
    assert torch.equal(ids, expected)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_inputs(torch_cuda: Any) -> None:
    torch = torch_cuda
    logits = torch.randn(32, 64, device="cuda")
    moe.route(logits, 4)  # loads the module before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, weights = moe.route(logits, 4)
    logits.copy_(torch.randn(32, 64, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    expected_ids, expected_weights = moe.route(logits, 4)
    assert torch.equal(ids, expected_ids) and torch.equal(weights, expected_weights)


@pytest.mark.gpu
def test_a_tensor_that_requires_grad_is_refused(torch_cuda: Any) -> None:
    logits = torch_cuda.randn(4, 8, device="cuda", requires_grad=True)
    with pytest.raises(UnsupportedError, match="logits requires grad"):
        moe.route(logits, 2)
    with torch_cuda.no_grad():
        moe.route(logits, 2)


@pytest.mark.gpu
def test_aggregate_past_two_to_the_31_elements_on_a_gpu(torch_cuda: Any) -> None:
    torch = torch_cuda
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of free device memory")
    y = torch.zeros(2**21 + 2, 2048, dtype=torch.bfloat16, device="cuda")
    y[2**21 + 1] = 3.0
    out = moe.aggregate(y, torch.tensor([[2**21 + 1, 0]], dtype=torch.int32, device="cuda"))
    assert (out == 3).all()
