"""The gemm room: products against the float64 meaning, on every level, layout and type."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tilewise.torch as twt
from tilewise import reference
from tilewise.gemm import matmul
from tilewise.testing import assert_within_budget, layouts, normal

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 1, 1), (3, 5, 7), (8, 200, 65), (9, 49, 31), (97, 193, 130)]


def plain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A run in the accumulator's precision, rounded once."""
    wide = np.float64 if a.dtype == np.float64 else np.float32
    return (a.astype(wide) @ b.astype(wide)).astype(a.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product_equals_the_reference(isa: str, dtype: Any, m: int, n: int, k: int) -> None:
    a, b = normal((m, k), dtype, seed=1), normal((k, n), dtype, seed=2)
    truth = reference.gemm.matmul(a.astype(np.float64), b.astype(np.float64))
    # The order of k additions is free; a random walk of k roundings of partial sums no larger than |A| |B|.
    size = float((np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)).max())
    floor = float(np.finfo(dtype).eps) * k**0.5 * size if a.itemsize >= 4 else None
    assert_within_budget(matmul(a, b), truth, plain(a, b), floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_layout_does_not_change_the_value(isa: str, dtype: Any) -> None:
    a, b = normal((13, 34), dtype, seed=1), normal((34, 50), dtype, seed=2)
    expected = matmul(a, b)
    for name, view in layouts(a):
        assert np.array_equal(matmul(view, b), expected), name
    for name, view in layouts(b):
        got = matmul(a, view)
        # Few rows against adjacent lines take another path: the order of the additions may differ.
        assert_within_budget(got, expected.astype(np.float64), expected, floor=2e-2 if a.itemsize == 2 else 1e-4), name


def test_rows_are_gathered_in_order(isa: str) -> None:
    a, b = normal((20, 33), seed=1), normal((33, 17), seed=2)
    for rows in ([], [3], [19, 0, 0, 7], list(range(20))[::-1]):
        for dtype in (np.int32, np.int64):
            got = matmul(a, b, rows=np.array(rows, dtype))
            assert np.allclose(got, matmul(a[rows], b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 2), (3, 0, 2), (2, 3, 0)])
def test_empty_extents(isa: str, m: int, n: int, k: int) -> None:
    out = matmul(np.ones((m, k), np.float32), np.ones((k, n), np.float32))
    assert out.shape == (m, n) and np.array_equal(out, np.zeros((m, n), np.float32))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    from tilewise.testing import force_threads

    a, b = normal((300, 257), seed=1), normal((257, 400), seed=2)
    with force_threads(1):
        one = matmul(a, b)
    with force_threads(4):
        four = matmul(a, b)
    assert np.array_equal(one, four)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_operator(dtype: torch.dtype) -> None:
    a, b = torch.randn(9, 20).to(dtype), torch.randn(20, 30).to(dtype)
    rows = torch.tensor([4, 4, 0])
    torch.library.opcheck(torch.ops.tilewise.matmul.default, (a, b, rows))
    compiled = torch.compile(lambda a, b: twt.matmul(a, b, rows=rows), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), twt.matmul(a, b, rows=rows))
    assert torch.equal(twt.matmul(a, b.T.contiguous().T)[rows], twt.matmul(a, b, rows=rows)[:]) or dtype in (
        torch.float32,
        torch.float64,
    )
