"""Each token gathers the rows of its experts and adds them up."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise.cuda.kernel import ITEMSIZES, TYPES, Kernel
from tilewise.cuda.launch import DeviceArray, describe, empty, launch, same_place
from tilewise.errors import ShapeError

__all__ = ["KERNELS", "aggregate", "gather_sum"]

_THREADS = 128


def _kernel(dtype: str, width: int) -> Kernel:
    name = f"tilewise_moe_aggregate_{TYPES[dtype]}_{width}"
    stub = f"INSTANTIATE_MOE_AGGREGATE({name}, tilewise::{TYPES[dtype]}, {width}, {_THREADS})\n"
    return Kernel(name, "moe.cuh", stub)


#: Every instantiation of the aggregation.
KERNELS: tuple[Kernel, ...] = tuple(_kernel(dtype, width) for dtype in TYPES for width in (1, 16 // ITEMSIZES[dtype]))


def aggregate(y: Any, rows: Any, weights: Any | None = None) -> Any:
    """``out[t] = sum_k weights[t, k] * y[rows[t, k]]``: each token gathers the rows of its experts.

    Sums in float32 in the order of ``k`` and rounds once: no atomics, so equal inputs give equal bits.

    Args:
        y: ``[R, d]``, float32, float16 or bfloat16; any stride between rows. Vector loads need rows that start at
            multiples of 16 bytes and hold a multiple of 16 bytes; others are read one element at a time.
        rows: int32 ``[T, K]``. A negative row is skipped, its weight too. A row at or past ``R`` is never read: it
            makes the token NaN, as the GPU cannot raise.
        weights: float32 ``[T, K]``; ones by default.

    Returns:
        ``[T, d]`` of ``y``'s type.

    Raises:
        ShapeError: ranks or extents do not fit.
        DtypeError: another element type.
        UnsupportedError: a tensor that requires grad.
        DeviceError: an array that is not on a GPU, or two on different ones.
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.

    Example:
        >>> import cupy, tilewise.cuda.moe                                      # doctest: +SKIP
        >>> y = cupy.asarray([[1.0], [2.0]], "f4")                              # doctest: +SKIP
        >>> tilewise.cuda.moe.aggregate(y, cupy.asarray([[0, 1]], "i4"))        # doctest: +SKIP
    """
    source = describe("y", y, tuple(TYPES))
    index = describe("rows", rows, ("int32",))
    same_place("y", source, "rows", index)
    if len(source.shape) != 2 or len(index.shape) != 2:
        raise ShapeError(f"y, rows: expected [R, d] and [T, K], got shapes {source.shape} and {index.shape}")
    factor = None
    if weights is not None:
        factor = describe("weights", weights, ("float32",))
        same_place("y", source, "weights", factor)
        if factor.shape != index.shape:
            raise ShapeError(f"weights: expected the shape of rows {index.shape}, got {factor.shape}")
        factor = factor.contiguous()
    return gather_sum(source, index, factor, None, index.shape[0], index.shape[1]).array


def gather_sum(
    y: DeviceArray, rows: DeviceArray, weights: DeviceArray | None, starts: DeviceArray | None, tokens: int, top_k: int
) -> DeviceArray:
    """:func:`aggregate` of arrays that have been checked.

    With `starts` (int32 ``[tokens + 1]``) token `t` sums the pairs ``starts[t] .. starts[t + 1]`` of `rows` and
    `weights`, instead of `top_k` of them.
    """
    index, source = rows.contiguous(), y.contiguous(last_axis_only=True)
    count, columns = source.shape
    out = empty(source, (tokens, columns), source.dtype)
    width = _packet(source, out)
    grid, block = _geometry(tokens, columns, width)
    arguments = (
        *(out, np.int64(columns), source, np.int64(source.strides[0]), np.int64(count), index, weights, starts),
        *(np.int64(tokens), np.int32(top_k), np.int64(columns)),
    )
    launch(_kernel(source.dtype, width), grid, block, arguments, source)
    return out


def _packet(source: DeviceArray, out: DeviceArray) -> int:
    """Elements a load: 16 bytes if every row of both arrays starts and ends at a multiple of 16 bytes, else one."""
    size = ITEMSIZES[source.dtype]
    stride = source.strides[0] if source.shape[0] > 1 else 0
    together = source.pointer | out.pointer | stride * size | source.shape[1] * size
    return 16 // size if together % 16 == 0 else 1


def _geometry(tokens: int, columns: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """``(grid, block)`` of the aggregation: packets of a token along x, tokens along y; grid y covers long rows."""
    packets = -(-columns // width)
    across = min(_THREADS, 1 << max(0, packets - 1).bit_length())
    down = _THREADS // across
    return (-(-tokens // down), min(-(-packets // across), 65535), 1), (across, down, 1)
