"""What a type checker makes of the public API. `make lint` runs pyright over this file; pytest runs it too."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import pytest

from tilewise import testing
from tilewise.attention import attention
from tilewise.errors import ArgumentError, TilewiseError
from tilewise.gemm import matmul
from tilewise.moe import Scoring, experts, route

Floats = npt.NDArray[np.float32]


def test_arrays_keep_their_kind() -> None:
    query: Floats = np.ones((1, 2, 3, 4), np.float32)
    assert_type(attention(query, query, query, causal=True), Floats)
    out, _ = attention(query, query, query, window=(2, 0), return_lse=True)
    assert_type(out, Floats)
    later = bool(len(out))
    assert_type(attention(query, query, query, return_lse=later), Floats | tuple[Floats, Any])

    x: Floats = np.ones((3, 4), np.float32)
    assert_type(matmul(x, x.T, rows=np.array([0, 2])), Floats)
    scoring: Scoring = "sigmoid"
    ids, weights = route(x, 2, scoring=scoring, bias=np.zeros(4))
    weight: Floats = np.ones((4, 4, 4), np.float32)
    assert_type(experts(x, ids, weights, weight, weight[:, :, :2]), Floats)


def test_tensors_stay_tensors() -> None:
    torch = pytest.importorskip("torch")
    import tilewise.torch as twt

    query = torch.ones(1, 2, 3, 4)
    assert twt.attention(query, query, query).shape == query.shape
    out, lse = twt.attention(query, query, query, return_lse=True)
    assert (out.dim(), lse.dim()) == (4, 3)
    assert twt.matmul(query[0, 0], query[0, 0].T).shape == (3, 3)


def test_the_kit_is_typed() -> None:
    assert_type(testing.levels(), tuple[str, ...])
    with testing.force_isa("scalar") as level:
        assert_type(level, str)
    for name, view in testing.layouts(np.ones(2)):
        assert_type(name, str)
        assert isinstance(view, np.ndarray)
    budget = testing.assert_within_budget(np.ones(2, np.float32), np.ones(2), np.ones(2, np.float32), norm="frobenius")
    assert_type(budget.error, float)


def test_errors_are_typed_by_the_built_in() -> None:
    with pytest.raises(ValueError, match="top_k") as caught:
        route(np.ones((1, 2)), 3)
    error: ValueError = ArgumentError("an ArgumentError is a ValueError, and a TilewiseError")
    base: TilewiseError = ArgumentError("too")
    assert isinstance(caught.value, type(error)) and isinstance(base, TilewiseError)
