"""Confidence of traces: batch and running windows against the float64 reference."""

from __future__ import annotations

import math
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.reference import confidence as reference
from tilewise.scheduler.confidence import ConfidenceMonitor, token_confidence, trace_confidence
from tilewise.testing import layouts

close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def expected(tokens: np.ndarray, window: int, tail: int, fraction: float) -> list[float]:
    return [
        reference.mean(tokens),
        reference.tail(tokens, tail),
        reference.bottom(tokens, window, fraction),
        reference.lowest(tokens, window),
    ]


def measured(trace) -> np.ndarray:
    return np.stack([trace.mean, trace.tail, trace.bottom, trace.lowest], -1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 1, 1), (3, 20, 20), (5, 257, 20), (2, 4099, 7), (0, 8, 2)])
def test_tokens_of_logits(isa: str, dtype, rows: int, width: int, k: int) -> None:
    logits = (4 * random(rows, width)).astype(dtype)
    want = [reference.token_confidence(row.astype(np.float64), k) for row in logits]
    got = token_confidence(logits, k)
    assert got.shape == (rows,) and got.dtype == np.float64
    close(got, want)


def test_tokens_of_any_layout_and_rank() -> None:
    logits = random(2, 3, 50)
    want = token_confidence(logits, 5)
    assert want.shape == (2, 3)
    for _, view in layouts(logits):
        np.testing.assert_array_equal(token_confidence(view, 5), want)
    assert token_confidence(logits[0, 0], 5) == want[0, 0]


def test_laws_of_token_confidence() -> None:
    logits = 3 * random(4, 100)
    close(token_confidence(logits + 7.5, 20), token_confidence(logits, 20))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    close(token_confidence(logits, 100), -np.log(p).mean(-1))
    for k in (1, 2, 100):
        close(token_confidence(np.full((1, 100), 0.3), k), math.log(100))
    order = np.random.default_rng(1).permutation(100)
    close(token_confidence(logits[:, order], 20), token_confidence(logits, 20))
    huge = np.array([[1e308, -1e308, 0.0]])
    assert token_confidence(huge, 1)[0] == 0.0
    assert np.isfinite(token_confidence(huge, 2)[0])


def test_masked_and_undefined_logits() -> None:
    row = np.array([2.0, 1.0, -np.inf, 0.0])
    assert np.isfinite(token_confidence(row, 3)) and token_confidence(row, 4) == np.inf
    close(token_confidence(row, 3), reference.token_confidence(row, 3))
    assert np.isnan(token_confidence(np.array([1.0, np.nan]), 1))
    assert np.isnan(token_confidence(np.full(3, -np.inf), 1))
    infinite = np.array([np.inf, 1.0, np.inf])
    close(token_confidence(infinite, 2), math.log(2))
    assert token_confidence(infinite, 3) == np.inf
    # One row's trouble stays its own.
    both = token_confidence(np.stack([row, np.full(4, np.nan)]), 2)
    assert np.isfinite(both[0]) and np.isnan(both[1])


@pytest.mark.parametrize("window", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_traces_of_ragged_lengths(window: int, dtype) -> None:
    lengths = np.array([0, 1, window - 1, window, window + 1, 2 * window, 2 * window + 1, 53, 64])
    logprobs = (-np.abs(3 * random(lengths.size, 64, 5))).astype(dtype)
    trace = trace_confidence(logprobs, lengths=lengths, window=window, tail=3, bottom=0.3, tokens=True, groups=True)
    tokens = -logprobs.astype(np.float64).mean(-1)
    for row, length in enumerate(lengths):
        own = tokens[row, :length]
        close(trace.tokens[row, :length], own)
        assert np.isnan(trace.tokens[row, length:]).all()
        groups = reference.group_confidences(own, window)
        close(trace.groups[row, : groups.size], groups)
        assert np.isnan(trace.groups[row, groups.size :]).all()
        close(measured(trace)[row], expected(own, window, 3, 0.3))
    # The same from token confidences, which need no k.
    again = trace_confidence(trace.tokens, lengths=lengths, window=window, tail=3, bottom=0.3)
    np.testing.assert_array_equal(measured(again), measured(trace))


@given(
    st.lists(st.floats(0, 40, width=32), max_size=120),
    st.integers(1, 50),
    st.integers(1, 50),
    st.floats(0, 1),
)
def test_traces_equal_the_reference(tokens: list[float], window: int, tail: int, fraction: float) -> None:
    own = np.array(tokens, np.float64)
    trace = trace_confidence(own[None], window=window, tail=tail, bottom=fraction)
    close(measured(trace)[0], expected(own, window, tail, fraction))
    if own.size:
        assert own.min() - 1e-9 <= trace.lowest[0] <= trace.mean[0] * (1 + 1e-12) + own.max()
        assert trace.lowest[0] <= trace.bottom[0] + 1e-9


@pytest.mark.parametrize("windows", range(1, 20))
def test_a_tenth_of_few_windows_is_the_lowest(windows: int) -> None:
    own = np.abs(random(1, windows + 3, seed=windows))
    trace = trace_confidence(own, window=4)
    assert trace.bottom[0] == trace.lowest[0]


def test_layouts_threads_and_torch() -> None:
    torch = pytest.importorskip("torch")
    from tilewise import _core

    values = -np.abs(random(7, 40, 20))
    want = measured(trace_confidence(values, window=6))
    for _, view in layouts(values):
        np.testing.assert_array_equal(measured(trace_confidence(view, window=6)), want)
    big = np.abs(random(9, 8000, seed=3))
    one = measured(trace_confidence(big, window=100))
    before = _core.num_threads()
    try:
        _core.set_num_threads(1)
        np.testing.assert_array_equal(measured(trace_confidence(big, window=100)), one)
    finally:
        _core.set_num_threads(before)
    trace = trace_confidence(torch.from_numpy(values), lengths=torch.tensor([40] * 7), window=6)
    assert isinstance(trace.mean, torch.Tensor)
    np.testing.assert_array_equal(measured(trace), want)
    half = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(token_confidence(half, 3), token_confidence(half.double(), 3))


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_windows(odd: float) -> None:
    tokens = np.ones((1, 30))
    tokens[0, 10] = odd
    trace = trace_confidence(tokens, window=4, tail=5, groups=True)
    finite = np.isfinite(trace.groups[0])
    assert not finite[7:11].any() and finite[:7].all() and finite[11:].all()
    assert (trace.groups[0, finite] == 1).all()
    assert trace.tail[0] == 1 and not np.isfinite(trace.mean[0])
    assert np.isnan(trace.lowest[0]) == np.isnan(odd) == np.isnan(trace.bottom[0])


def test_sums_do_not_drift() -> None:
    tokens = np.full((1, 100_000), 0.1)
    tokens[0, 0] = 1e17
    trace = trace_confidence(tokens, window=2048, groups=True)
    assert abs(trace.groups[0, -1] - 0.1) < 1e-13
    close(trace.lowest, 0.1)


def test_the_monitor_gives_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    lengths, window = np.array([3, 17, 40, 8, 64]), 8
    tokens = np.abs(rng.normal(size=(5, 64)))
    tokens[3, 2] = np.inf
    batch = trace_confidence(tokens, lengths=lengths, window=window, groups=True)
    monitor = ConfidenceMonitor(5, window)
    at = np.zeros(5, int)
    while (at < lengths).any():  # rows advance in any order
        open_rows = np.flatnonzero(at < lengths)
        rows = rng.permutation(rng.choice(open_rows, rng.integers(1, open_rows.size + 1), replace=False))
        readings = monitor.update(tokens[rows, at[rows]], rows=rows)
        at[rows] += 1
        np.testing.assert_array_equal(readings.count, at[rows])
        for row, group in zip(rows, readings.group, strict=True):
            want = batch.groups[row, at[row] - window] if at[row] >= window else np.nan
            np.testing.assert_array_equal(group, want)
    readings = monitor.read()
    np.testing.assert_array_equal(readings.lowest, batch.lowest)
    np.testing.assert_array_equal(readings.mean, batch.mean)
    monitor.reset([1])
    assert monitor.read([1]).count == 0 and monitor.read([1]).lowest == 0.0 and monitor.read([2]).count == 40


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="top_k: expected 1 to the vocabulary, 4, got 5"):
        token_confidence(np.zeros((2, 4)), 5)
    with pytest.raises(ArgumentError, match="top_k"):
        token_confidence(np.zeros((2, 4)), 0)
    with pytest.raises(ShapeError, match="a number"):
        token_confidence(np.zeros(()), 1)
    with pytest.raises(DtypeError, match="logits"):
        token_confidence(np.zeros((2, 4), np.int64), 1)
    with pytest.raises(ShapeError, match="token confidences"):
        trace_confidence(np.zeros(4))
    with pytest.raises(ShapeError, match="k >= 1"):
        trace_confidence(np.zeros((1, 2, 0)))
    with pytest.raises(ArgumentError, match="window"):
        trace_confidence(np.zeros((1, 2)), window=0)
    with pytest.raises(ArgumentError, match="bottom"):
        trace_confidence(np.zeros((1, 2)), bottom=math.nan)
    with pytest.raises(ArgumentError, match=r"lengths\[1\]: expected 0 to 4 tokens, got 5"):
        trace_confidence(np.zeros((2, 4)), lengths=[4, 5])
    with pytest.raises(ShapeError, match="lengths"):
        trace_confidence(np.zeros((2, 4)), lengths=[4])
    with pytest.raises(DtypeError, match="lengths"):
        trace_confidence(np.zeros((2, 4)), lengths=[1.0, 2.0])
    monitor = ConfidenceMonitor(2, 4)
    with pytest.raises(ArgumentError, match="row 1 twice"):
        monitor.update([1.0, 2.0], rows=[1, 1])
    with pytest.raises(ArgumentError, match=r"rows\[0\]"):
        monitor.update([1.0], rows=[2])
    with pytest.raises(ShapeError, match="one per row"):
        monitor.update([1.0])
    assert monitor.read().count.tolist() == [0, 0]
