"""The meaning of :mod:`tilewise.gemm`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["matmul"]


def matmul(a: ArrayLike, b: ArrayLike, *, rows: ArrayLike | None = None) -> NDArray[np.float64]:
    """Product of two matrices, optionally of gathered rows of the first.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``.
        rows: integers in ``[0, M)``, ``[R]``: which rows of ``a`` to multiply, in this order, repeats allowed.

    Returns:
        float64 ``[M, N]``, or ``[R, N]`` with ``rows``.

    Raises:
        ShapeError: a rank is not two or the inner extents differ.
        ArgumentError: a row lies outside ``a``.

    Example:
        >>> matmul([[1.0, 2.0], [3.0, 4.0]], [[1.0], [10.0]], rows=[1, 1, 0]).tolist()
        [[43.0], [43.0], [21.0]]
    """
    a64, b64 = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a64.ndim != 2 or b64.ndim != 2 or a64.shape[1] != b64.shape[0]:
        raise ShapeError(f"expected a [M, K] and b [K, N], got {a64.shape} and {b64.shape}")
    if rows is not None:
        chosen = np.asarray(rows)
        if chosen.ndim != 1:
            raise ShapeError(f"expected rows [R], got {chosen.shape}")
        if chosen.size and (chosen.min() < 0 or chosen.max() >= a64.shape[0]):
            raise ArgumentError(f"rows must lie in [0, {a64.shape[0]}), got {chosen.min()} to {chosen.max()}")
        a64 = a64[chosen.astype(np.intp)]
    return a64 @ b64
