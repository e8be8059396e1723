"""Matrix products with strided and gathered operands."""

from __future__ import annotations

from typing import Any, TypeVar

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ShapeError

__all__ = ["matmul"]

ArrayT = TypeVar("ArrayT")


def matmul(a: ArrayT, b: Any, *, rows: Any = None) -> ArrayT:
    """Product ``a[rows] @ b``, accumulated in float32 (float64 for float64) and rounded once.

    Args:
        a: ``[rows, depth]``, float32, float64, float16 or bfloat16; any strides.
        b: ``[depth, columns]``, the same type; any strides (a transposed weight is read as it lies).
        rows: int32 or int64 row numbers of `a` to take, in order; all rows if None.

    Returns:
        ``[rows, columns]`` of the type and kind of `a`.

    Raises:
        ShapeError: wrong rank, or depths that differ.
        DtypeError: unsupported or mixed types.
        ArgumentError: a row number outside `a`.
        DeviceError: an array that is not in CPU memory.

    Example:
        >>> import numpy as np
        >>> from tilewise.gemm import matmul
        >>> matmul(np.eye(3, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(3, 2), rows=np.array([2, 0]))
        array([[4., 5.],
               [0., 1.]], dtype=float32)
    """
    left, right = native("a", a), native("b", b)
    gather = None if rows is None else native("rows", rows)
    for name, array in (("a", left), ("b", right)):
        if array.ndim != 2:
            raise ShapeError(f"{name}: expected rank 2, got shape {tuple(array.shape)}")
    if gather is not None and gather.ndim != 1:
        raise ShapeError(f"rows: expected rank 1, got shape {tuple(gather.shape)}")
    count = left.shape[0] if gather is None else gather.shape[0]
    out, result = like(a, (count, right.shape[1]))
    _core.matmul(left, right, gather, out)
    return result
