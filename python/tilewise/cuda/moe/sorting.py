"""Expert ids to rows grouped by expert: a stable counting sort that never tells the host a count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tilewise.cuda.kernel import Kernel
from tilewise.cuda.launch import DeviceArray, describe, empty, launch, same_place
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError

__all__ = ["KERNELS", "TILE", "Metadata", "Plan", "metadata", "plan"]

#: Rows of a tile of the matrix products (``gemm::TILE``).
TILE = 128

_WARPS = 4
_SCAN_THREADS = 1024
_COUNTERS = 2**22  # of all chunks together, about
_INDEX = {"int32": "int", "int64": "long long"}


def _kernel(operation: str, *parameters: Any, dtype: str | None = None) -> Kernel:
    name = f"tilewise_moe_{operation}" + ("" if dtype is None else f"_{dtype}")
    types = () if dtype is None else (_INDEX[dtype],)
    arguments = ", ".join(map(str, (name, *types, *parameters)))
    return Kernel(name, "moe.cuh", f"INSTANTIATE_MOE_{operation.upper()}({arguments})\n")


_SCAN_CHUNKS = _kernel("scan_chunks")
_SCAN_EXPERTS = _kernel("scan_experts", _SCAN_THREADS, TILE)
_SCHEDULE = _kernel("schedule")
_COUNT = {dtype: _kernel("count", _WARPS, dtype=dtype) for dtype in _INDEX}
_PLACE = {dtype: _kernel("place", _WARPS, dtype=dtype) for dtype in _INDEX}
_TOKEN_STARTS = {dtype: _kernel("token_starts", dtype=dtype) for dtype in _INDEX}

#: Every instantiation of the sort.
KERNELS: tuple[Kernel, ...] = (
    *(_SCAN_CHUNKS, _SCAN_EXPERTS, _SCHEDULE),
    *(kernel for family in (_COUNT, _PLACE, _TOKEN_STARTS) for kernel in family.values()),
)


class Metadata(NamedTuple):
    """Rows grouped by expert; all int32, on the GPU.

    ``expert_offsets`` ``[experts + 1]``: rows of expert `e` are ``expert_offsets[e] .. expert_offsets[e + 1]``; within
    an expert they keep the order of the pairs. ``row_pair`` and ``row_token`` ``[pairs]``: the pair and the token of a
    row, -1 past the last row of an expert. ``pair_row``, of the shape of ``expert_ids``: the row of a pair, -1 for a
    sentinel. ``token_starts`` ``[tokens + 1]``: the first pair of each token, only with ``token_ids``.
    """

    expert_offsets: Any
    row_pair: Any
    row_token: Any
    pair_row: Any
    token_starts: Any


@dataclass(frozen=True)
class Plan:
    """The same, as the kernels take it.

    Attributes:
        ids: expert of each pair, contiguous.
        offsets: ``[experts + 2]``; the last entry ends the rows of no expert.
        schedule: ``[slots, 2]``: expert (-1: nothing) and row tile of each slot.
        slots: how many; at least as many as there are tiles, whatever the routing.
    """

    ids: DeviceArray
    offsets: DeviceArray
    row_pair: DeviceArray
    row_token: DeviceArray
    pair_row: DeviceArray
    token_starts: DeviceArray | None
    schedule: DeviceArray
    slots: int
    pairs: int


def plan(ids: DeviceArray, token_ids: DeviceArray | None, tokens: int, experts: int) -> Plan:
    """Sort pairs by expert.

    Args:
        ids: int32 or int64, ``[tokens, slots]``, or ``[pairs]`` with `token_ids`.
        token_ids: ``[pairs]``, ascending, or ``None``.
        tokens: number of tokens.
        experts: number of experts.
    """
    pairs = math.prod(ids.shape)
    if max(pairs, tokens, experts) >= 2**31 - 1:
        raise UnsupportedError(
            f"expert_ids: the GPU's rows are counted in int32, got {pairs} pairs of {tokens} tokens and {experts} "
            "experts; split the batch"
        )
    if token_ids is not None and token_ids.dtype != ids.dtype:
        ids, token_ids = ids.cast("int64"), token_ids.cast("int64")
    ids = ids.contiguous()
    token_ids = None if token_ids is None else token_ids.contiguous()

    # Chunks long enough that the counters, one for each chunk and expert, stay few.
    chunk = 32 * max(8, -(-pairs * experts // (32 * _COUNTERS)))
    chunks = -(-pairs // chunk)
    groups = min(experts + 1, pairs)  # that can have rows; each adds at most one tile that is not full
    slots = (pairs - groups) // TILE + groups

    counts = empty(ids, (chunks, experts), "int32")
    totals = empty(ids, (experts,), "int32")
    offsets, tiles = empty(ids, (experts + 2,), "int32"), empty(ids, (experts + 2,), "int32")
    schedule = empty(ids, (slots, 2), "int32")
    row_pair, row_token, pair_row = (empty(ids, shape, "int32") for shape in ((pairs,), (pairs,), ids.shape))

    sizes = (np.int64(pairs), np.int64(chunk), np.int32(experts), np.int64(tokens))
    grid, block = (-(-chunks // _WARPS), 1, 1), (32 * _WARPS, 1, 1)
    launch(_COUNT[ids.dtype], grid, block, (counts, ids, token_ids, *sizes), ids)
    scan = (counts, totals, np.int64(chunks), np.int32(experts))
    launch(_SCAN_CHUNKS, (-(-experts // 32), 1, 1), (1024, 1, 1), scan, ids)
    prefix = (offsets, tiles, totals, np.int32(pairs), np.int32(experts))
    launch(_SCAN_EXPERTS, (1, 1, 1), (_SCAN_THREADS, 1, 1), prefix, ids)
    launch(_SCHEDULE, (-(-slots // 256), 1, 1), (256, 1, 1), (schedule, tiles, np.int64(slots), np.int32(experts)), ids)
    per_token = np.int32(ids.shape[1] if len(ids.shape) == 2 else 1)
    placing = (pair_row, row_pair, row_token, counts, offsets, ids, token_ids, *sizes, per_token)
    launch(_PLACE[ids.dtype], grid, block, placing, ids)
    starts = None
    if token_ids is not None:
        starts = empty(ids, (tokens + 1,), "int32")
        searching = (starts, token_ids, np.int64(pairs), np.int64(tokens))
        launch(_TOKEN_STARTS[ids.dtype], (-(-(tokens + 1) // 256), 1, 1), (256, 1, 1), searching, ids)
    return Plan(ids, offsets, row_pair, row_token, pair_row, starts, schedule, slots, pairs)


def check_ids(expert_ids: Any, token_ids: Any, tokens: int) -> tuple[DeviceArray, DeviceArray | None]:
    """The two arrays of a routing, described; see :func:`metadata` for what they may be."""
    ids = describe("expert_ids", expert_ids, tuple(_INDEX))
    if token_ids is None:
        if len(ids.shape) != 2 or ids.shape[0] != tokens:
            raise ShapeError(f"expert_ids: expected [{tokens}, slots], to match x, got shape {ids.shape}")
        return ids, None
    of_pair = describe("token_ids", token_ids, tuple(_INDEX))
    same_place("expert_ids", ids, "token_ids", of_pair)
    if len(ids.shape) != 1 or of_pair.shape != ids.shape:
        raise ShapeError(
            f"token_ids: expected [pairs] beside expert_ids [pairs], got shapes {of_pair.shape} and {ids.shape}"
        )
    return ids, of_pair


def metadata(expert_ids: Any, experts: int, *, token_ids: Any = None, tokens: int | None = None) -> Metadata:
    """Sort pairs (token, expert) by expert, stably, on the GPU and without waiting for it.

    Args:
        expert_ids: int32 or int64 ``[tokens, slots]``, or ``[pairs]`` with `token_ids`. Ids outside ``0..experts`` are
            sentinels: they get row -1.
        experts: number of experts.
        token_ids: int32 or int64 ``[pairs]``, ascending (not checked: that would wait for the GPU). A pair whose token
            lies outside ``0..tokens`` is a sentinel too.
        tokens: number of tokens; needed with `token_ids`.

    Returns:
        See :class:`Metadata`.

    Raises:
        ShapeError: ranks or extents do not fit.
        ArgumentError: `token_ids` without `tokens`, or `experts` below 0.
        UnsupportedError: 2³¹ pairs or more.
        DtypeError: another element type.
        DeviceError: an array that is not on a GPU, or two on different ones.
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.

    Example:
        >>> import cupy, tilewise.cuda.moe                                      # doctest: +SKIP
        >>> tilewise.cuda.moe.metadata(cupy.asarray([[1], [0], [1]]), 2).row_pair   # doctest: +SKIP
        array([1, 0, 2], dtype=int32)
    """
    if experts < 0:
        raise ArgumentError(f"experts: expected 0 or more, got {experts}")
    if token_ids is None:
        tokens = int(expert_ids.shape[0]) if getattr(expert_ids, "ndim", 0) else -1
    elif tokens is None:
        raise ArgumentError("tokens: expected the number of tokens with token_ids, got None")
    ids, of_pair = check_ids(expert_ids, token_ids, tokens)
    made = plan(ids, of_pair, tokens, experts)
    starts = None if made.token_starts is None else made.token_starts.array
    offsets = made.offsets.array[: experts + 1]
    return Metadata(offsets, made.row_pair.array, made.row_token.array, made.pair_row.array, starts)
