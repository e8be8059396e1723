"""The test kit that tilewise tests itself with, for tests of code built on it.

* :func:`levels`, :func:`force_isa`, :func:`force_threads`: run the same test at every instruction-set level;
* :func:`normal`, :func:`layouts`, :func:`repeated`, :func:`empties`, :data:`ODD`: arrays as users really have them;
* :func:`poisoned`: outputs full of NaN, so that an element nobody wrote is found;
* :func:`assert_within_budget`: a tolerance derived from what a plain low-precision run loses, not guessed.

Needs NumPy alone; torch tensors are taken where arrays are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tilewise import _core
from tilewise._arrays import dtype_name, to_float64
from tilewise.errors import ArgumentError

__all__ = [
    "ODD",
    "Budget",
    "assert_within_budget",
    "empties",
    "force_isa",
    "force_threads",
    "layouts",
    "levels",
    "normal",
    "poisoned",
    "repeated",
]

#: Extents around the edges that kernels have: lanes (4, 8, 16), registers of lanes, tiles, and one.
ODD: tuple[int, ...] = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49, 63, 65, 97, 129)

# Distance from 1 to the next number: what rounding to the type may cost, relative.
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def levels() -> tuple[str, ...]:
    """Instruction-set levels that this machine can run, weakest first (``"scalar"`` always is).

    Example:
        >>> from tilewise.testing import levels
        >>> levels()[0]
        'scalar'
    """
    return tuple(_core.isa_detected())


@contextmanager
def force_isa(name: str) -> Iterator[str]:
    """Runs the body at one instruction-set level, for the whole process, and then goes back.

    Args:
        name: one of :func:`levels`.

    Raises:
        ArgumentError: a level that is unknown or that this machine cannot run.

    Example:
        >>> from tilewise.testing import force_isa
        >>> with force_isa("scalar") as level:
        ...     print(level)
        scalar
    """
    before = _core.isa_chosen()
    _core.force_isa(name)
    try:
        yield name
    finally:
        _core.force_isa(before)


@contextmanager
def force_threads(count: int) -> Iterator[int]:
    """Runs the body with this many threads, for the whole process, and then goes back.

    Raises:
        ArgumentError: less than one.

    Example:
        >>> from tilewise.testing import force_threads
        >>> with force_threads(1) as count:
        ...     print(count)
        1
    """
    if count < 1:
        raise ArgumentError(f"count: expected at least 1 thread, got {count}")
    before = _core.num_threads()
    _core.set_num_threads(count)
    try:
        yield count
    finally:
        _core.set_num_threads(before)


def poisoned(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A fresh array in which every element is wrong: NaN, or the largest integer, or True.

    Args:
        shape: extents.
        dtype: anything NumPy takes, and ``ml_dtypes.bfloat16``.

    Example:
        >>> from tilewise.testing import poisoned
        >>> poisoned(2)
        array([nan, nan], dtype=float32)
    """
    return np.full(shape, _poison(np.dtype(dtype)), dtype)


def _poison(dtype: np.dtype[Any]) -> Any:
    if dtype.kind in "iu":
        return np.iinfo(dtype).max
    if dtype.kind == "b":
        return True
    return np.nan  # floating types, ml_dtypes' included (their kind is "V")


def normal(shape: int | tuple[int, ...], dtype: Any = np.float32, *, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normally distributed values, the same for the same seed; `dtype` as in :func:`poisoned`."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def layouts(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays equal to `array` in value that lie differently in memory, each with a name for messages.

    What lies between the elements is poisoned (see :func:`poisoned`), so a kernel that reads it is found. Layouts that
    an array of this rank or type cannot have are left out.

    Example:
        >>> import numpy as np
        >>> from tilewise.testing import layouts
        >>> x = np.arange(6.0).reshape(2, 3)
        >>> for name, view in layouts(x):
        ...     assert np.array_equal(view, x), name
        >>> [name for name, _ in layouts(x)]
        ['contiguous', 'fortran', 'strided', 'padded rows', 'reversed', 'offset', 'unaligned', 'read-only']
    """
    yield "contiguous", array.copy(order="C")
    if array.ndim >= 2:
        yield "fortran", array.copy(order="F")
    if array.ndim >= 1:
        last = array.shape[-1]
        strided = poisoned((*array.shape[:-1], 2 * last), array.dtype)
        strided[..., ::2] = array
        yield "strided", strided[..., ::2]
    if array.ndim >= 2:
        # An odd stride: no row but the first starts at a multiple of a vector.
        pad = 3 if array.shape[-1] % 2 == 0 else 2
        padded = poisoned((*array.shape[:-1], array.shape[-1] + pad), array.dtype)
        padded[..., :-pad] = array
        yield "padded rows", padded[..., :-pad]
    if array.ndim >= 1:
        flip = (slice(None, None, -1),) * array.ndim
        yield "reversed", array[flip].copy()[flip]
        flat = poisoned(array.size + 1, array.dtype)
        flat[1:] = array.ravel()
        yield "offset", flat[1:].reshape(array.shape)
    if array.dtype.itemsize > 1:
        memory = np.empty(array.nbytes + 1, np.uint8)
        unaligned = memory[1:].view(array.dtype).reshape(array.shape)
        unaligned[...] = array
        yield "unaligned", unaligned
    if array.ndim >= 1:
        frozen = array.copy()
        frozen.flags.writeable = False
        yield "read-only", frozen
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            yield f"stride 0 on axis {axis}", np.broadcast_to(first.copy(), array.shape)


def repeated(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """`array` with a new axis of `count` copies that share one memory (a stride of 0), read-only.

    Example:
        >>> import numpy as np
        >>> from tilewise.testing import repeated
        >>> repeated(np.ones(3), 0, 4).strides
        (0, 8)
    """
    view = np.expand_dims(array, axis)
    shape = list(view.shape)
    shape[axis] = count
    return np.broadcast_to(view, shape)


def empties(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The shapes that have one extent of `shape` replaced by 0.

    Example:
        >>> from tilewise.testing import empties
        >>> list(empties((2, 3)))
        [(0, 3), (2, 0)]
    """
    for axis in range(len(shape)):
        yield (*shape[:axis], 0, *shape[axis + 1 :])


@dataclass(frozen=True)
class Budget:
    """What :func:`assert_within_budget` found; errors are absolute for ``"max"``, relative for ``"frobenius"``."""

    error: float
    allowed: float
    low_precision_error: float
    worst: tuple[int, ...]


def assert_within_budget(
    fast: Any,
    reference: Any,
    low_precision: Any,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    norm: Literal["max", "frobenius"] = "max",
) -> Budget:
    """Asserts that `fast` is nearly as close to the truth as a plain run in the same precision.

    Allowed is ``max(factor * error of low_precision, floor)``, errors against `reference`. Where the reference is
    infinite `fast` must be the same infinity, and where it is NaN, NaN.

    Args:
        fast: what is tested; an array or torch tensor of any floating type.
        reference: the same in float64, from a readable reference.
        low_precision: the same by plain operations in `fast`'s precision.
        factor: how much worse than the plain run is still as good.
        floor: an error that always passes; by default one rounding of the largest value (for ``"frobenius"``: of
            every value), since the plain run may be exact by luck.
        norm: ``"max"`` for the largest absolute error, ``"frobenius"`` for ``|fast - reference| / |reference|``.

    Returns:
        The errors and where the largest is.

    Raises:
        AssertionError: shapes differ, or the error is larger; says by how much, and where.

    Example:
        >>> import numpy as np
        >>> from tilewise.testing import assert_within_budget
        >>> x = np.linspace(0, 1, 100)
        >>> budget = assert_within_budget(x.astype(np.float32), x, x.astype(np.float32))
        >>> budget.error <= budget.allowed
        True
    """
    rounding = _EPSILON[dtype_name(fast)]
    got, want, plain = to_float64(fast), to_float64(reference), to_float64(low_precision)
    assert got.shape == want.shape == plain.shape, (
        f"shapes differ: fast {got.shape}, reference {want.shape}, low_precision {plain.shape}"
    )
    finite = np.isfinite(want)
    special = ~finite & ~((got == want) | (np.isnan(got) & np.isnan(want)))
    if special.any():
        at = tuple(int(i) for i in np.argwhere(special)[0])
        raise AssertionError(
            f"{int(special.sum())} of {want.size} values should be NaN or infinite: at {at} expected {want[at]}, "
            f"got {got[at]}"
        )
    truth = np.where(finite, want, 0.0)
    errors = np.where(finite, np.abs(got - truth), 0.0)
    # A plain run that overflows is no excuse, so its non-finite errors count as none.
    plain_errors = np.abs(plain - truth)
    plain_errors = np.where(finite & np.isfinite(plain_errors), plain_errors, 0.0)
    # NaN sorts last: argmax finds it.
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape)) if errors.size else ()
    if norm == "frobenius":
        size = float(np.linalg.norm(truth)) or 1.0
        error, plain_error = float(np.linalg.norm(errors)) / size, float(np.linalg.norm(plain_errors)) / size
        floor = rounding if floor is None else floor
    else:
        error, plain_error = float(errors.max(initial=0.0)), float(plain_errors.max(initial=0.0))
        floor = rounding * float(np.abs(truth).max(initial=0.0)) if floor is None else floor
    allowed = max(factor * plain_error, floor)
    # Not `error > allowed`: a NaN must fail.
    if not error <= allowed:
        raise AssertionError(
            f"{norm} error {error:.3e} exceeds the budget {allowed:.3e} "
            f"(= max({factor:g} x {plain_error:.3e} of the plain run, {floor:.3e})); "
            f"worst at {worst}: expected {want[worst]!r}, got {got[worst]!r}, the plain run gave {plain[worst]!r}"
        )
    return Budget(error, allowed, plain_error, worst)
