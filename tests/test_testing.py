"""The test kit itself: a check that cannot fail would hide everything else."""

from __future__ import annotations

import numpy as np
import pytest

import tilewise
from tilewise import _core
from tilewise.errors import ArgumentError
from tilewise.testing import (
    ODD,
    assert_within_budget,
    empties,
    force_isa,
    force_threads,
    layouts,
    levels,
    normal,
    poisoned,
    repeated,
)


def test_levels_are_forced_and_restored() -> None:
    before = _core.isa_chosen()
    for name in levels():
        with force_isa(name):
            assert _core.isa_chosen() == name
    assert _core.isa_chosen() == before
    with pytest.raises(RuntimeError, match="body"), force_isa("scalar"):
        raise RuntimeError("body")
    assert _core.isa_chosen() == before


def test_the_isa_fixture_forces(isa: str) -> None:
    assert _core.isa_chosen() == isa


def test_threads_are_forced_and_restored() -> None:
    before = _core.num_threads()
    with force_threads(3):
        assert _core.num_threads() == 3
    assert _core.num_threads() == before
    with pytest.raises(ArgumentError, match="at least 1"), force_threads(0):
        pass


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int32", "int64", "uint16", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5), (0, 4)])
def test_layouts_equal_their_array(dtype: str, shape: tuple[int, ...]) -> None:
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    array = normal(shape, np.float64, scale=10).astype(kind)
    names = []
    for name, view in layouts(array):
        names.append(name)
        assert view.dtype == array.dtype and view.shape == array.shape, name
        np.testing.assert_array_equal(view, array, err_msg=name)
        if name == "unaligned" and array.size:
            assert not view.flags.aligned
        if name == "read-only":
            assert not view.flags.writeable
        if name in ("strided", "padded rows") and array.size > array.shape[-1] > 1:
            assert not view.flags.c_contiguous
    assert len(names) == len(set(names)) >= 1


def test_a_constant_axis_has_a_stride_0_layout() -> None:
    array = np.repeat(normal((3, 1, 4)), 5, axis=1)
    view = dict(layouts(array))["stride 0 on axis 1"]
    assert view.strides[1] == 0
    np.testing.assert_array_equal(view, array)
    assert repeated(normal(3), 1, 4).strides == (4, 0)
    assert list(empties((1, 2))) == [(0, 2), (1, 0)]
    assert min(ODD) == 1 and all(any(abs(n - lanes) == 1 for n in ODD) for lanes in (4, 8, 16, 32, 64))


def test_poison_reaches_what_the_fronts_allocate() -> None:
    assert np.isnan(np.empty((2, 3), np.float32)).all()
    assert np.isnan(poisoned(3, np.float16)).all()
    assert (poisoned(2, np.int32) == np.iinfo(np.int32).max).all()
    torch = pytest.importorskip("torch")
    torch.use_deterministic_algorithms(True)  # the fixture came before the import, if this test ran alone
    assert torch.empty(4).isnan().all() and torch.zeros(1).new_empty(4).isnan().all()


def test_the_budget_can_fail() -> None:
    truth = normal((4, 5), np.float64)
    plain = truth.astype(np.float32)
    good = assert_within_budget(plain, truth, plain)
    assert 0 < good.error <= good.allowed
    wrong = plain.copy()
    wrong[2, 3] += 1e-3
    with pytest.raises(AssertionError, match=r"worst at \(2, 3\)"):
        assert_within_budget(wrong, truth, plain)
    with pytest.raises(AssertionError, match="frobenius error"):
        assert_within_budget(wrong, truth, plain, norm="frobenius")
    assert_within_budget(wrong, truth, plain, floor=2e-3)
    wrong[2, 3] = np.nan
    with pytest.raises(AssertionError, match="nan"):
        assert_within_budget(wrong, truth, plain)
    with pytest.raises(AssertionError, match="nan"):
        assert_within_budget(wrong, truth, plain, norm="frobenius")
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_budget(plain[:2], truth, plain)


def test_the_budget_wants_the_same_infinities() -> None:
    truth = np.array([1.0, -np.inf, np.nan])
    same = truth.astype(np.float32)
    assert_within_budget(same, truth, same)
    with pytest.raises(AssertionError, match="expected -inf, got 0"):
        assert_within_budget(np.array([1, 0, np.nan], np.float32), truth, same)
    with pytest.raises(AssertionError, match="expected nan"):
        assert_within_budget(np.array([1, -np.inf, 5], np.float32), truth, same)


def test_an_overflow_of_the_plain_run_is_no_excuse() -> None:
    truth = np.array([1.0, 2.0])
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(np.array([1, 2.5], np.float32), truth, np.array([1, np.inf], np.float32))


def test_the_package_says_its_version() -> None:
    assert tilewise.__version__ == _core.build_info()["version"]
