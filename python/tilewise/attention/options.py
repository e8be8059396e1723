"""What the fronts share: the keywords of an attention call, checked and turned into :class:`Rules`."""

from __future__ import annotations

import sys
from typing import Any, TypedDict

import numpy as np

from tilewise._arrays import broadcast, dtype_name, is_torch
from tilewise.attention.programs import Program, chained, softcapped
from tilewise.errors import ArgumentError, DtypeError, ShapeError

__all__ = [
    "AttentionOptions",
    "check_blocks",
    "check_dropout",
    "check_seed",
    "check_sequences",
    "expand_mask",
    "packed_sequences",
    "window_bounds",
    "with_softcap",
]


class AttentionOptions(TypedDict, total=False):
    """Keywords that ``attention`` and ``attention_backward`` share."""

    scale: float | None
    causal: bool
    window: tuple[int, int]
    mask: Any
    sinks: Any
    block_indices: Any
    block_size: int | None
    score_mod: Any
    mask_mod: Any
    block_mask: Any
    softcap: float
    dropout: float
    seed: Any
    sequences: Any
    block_table: Any
    splits: int


def window_bounds(window: tuple[int, int]) -> tuple[int | None, int | None]:
    """``(left, right)`` with None for unlimited."""
    try:
        left, right = (int(bound) for bound in window)
    except (TypeError, ValueError):
        raise ArgumentError(f"window: expected two integers (left, right), got {window!r}") from None
    if min(left, right) < -1:
        raise ArgumentError(f"window: expected bounds of at least 0, or -1 for unlimited, got {window!r}")
    return (None if left == -1 else left), (None if right == -1 else right)


def check_blocks(block_indices: Any, block_size: int | None) -> None:
    """Refuses selected blocks without their size, a size without blocks, and a size below one."""
    if (block_indices is None) != (block_size is None):
        raise ArgumentError("block_indices and block_size: expected both or neither")
    if block_size is not None and block_size < 1:
        raise ArgumentError(f"block_size: expected at least 1, got {block_size}")


def check_dropout(dropout: float) -> float:
    """Refuses what is no probability."""
    if not 0.0 <= dropout <= 1.0:
        raise ArgumentError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    return float(dropout)


def check_seed(seed: int) -> int:
    """Refuses what does not fit the 64 bits of a Philox key."""
    if not 0 <= int(seed) < 2**64:
        raise ArgumentError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed}")
    return int(seed)


def expand_mask(mask: Any, shape: tuple[int, ...]) -> Any:
    """`mask` broadcast to `shape` without a copy."""
    try:
        return broadcast(mask, shape)
    except (ValueError, RuntimeError):
        raise ShapeError(
            f"mask: expected something broadcastable to [batch, query_heads, queries, keys] = {list(shape)}, "
            f"got shape {tuple(mask.shape)}"
        ) from None


def with_softcap(softcap: float, score: Program | None) -> Program | None:
    """The score program with a soft cap before it; 0 is none."""
    if not softcap >= 0:
        raise ArgumentError(f"softcap: expected a number above 0, or 0 for none, got {softcap}")
    return chained(softcapped(softcap), score) if softcap > 0 else score


def check_sequences(sequences: Any, block_table: Any, splits: int, **dense_only: Any) -> None:
    """Refuses tables of other shapes and types, and rules that know one dense problem only.

    `dense_only` are arguments that index the queries of the whole array.
    """
    if splits < 0:
        raise ArgumentError(f"splits: expected 0 (a fixed length of chunk) or a number of splits, got {splits}")
    if sequences is None:
        if block_table is not None:
            raise ArgumentError(
                "block_table: expected `sequences` beside it, which say how many keys of the pages each query sees"
            )
        return
    given = [name for name, argument in dense_only.items() if argument is not None]
    if given:
        raise ArgumentError(f"{given[0]}: it indexes one dense problem, not `sequences`; write the rule as a mask_mod")
    if len(sequences.shape) != 2 or sequences.shape[1] != 6:
        raise ShapeError(
            "sequences: expected [n, 6] rows of (query_batch, query_start, query_count, key_batch, key_start, "
            f"key_count), got {list(sequences.shape)}"
        )
    for name, table, allowed in (
        ("sequences", sequences, ("int32", "int64")),
        ("block_table", block_table, ("int32", "int64")),
    ):
        if table is not None and dtype_name(table) not in allowed:
            raise DtypeError(f"{name}: expected {' or '.join(allowed)}, got {dtype_name(table)}")
    if block_table is not None and (len(block_table.shape) != 2 or block_table.shape[0] != sequences.shape[0]):
        raise ShapeError(
            f"block_table: expected [{sequences.shape[0]}, pages], one row a sequence, got {list(block_table.shape)}"
        )


def packed_sequences(cu_seqlens_q: Any, cu_seqlens_k: Any = None) -> Any:
    """The ``sequences`` of a packed batch from its cumulative lengths.

    Args:
        cu_seqlens_q: integers ``[n + 1]`` from 0 on: sequence i has the query rows ``cu_seqlens_q[i]`` up to
            ``cu_seqlens_q[i + 1]``.
        cu_seqlens_k: the same for keys; as the queries if None.

    Returns:
        int64 ``[n, 6]`` of the caller's kind.

    Raises:
        ShapeError: not one axis, or of different lengths. DtypeError: not integers.

    Example:
        >>> import numpy as np
        >>> from tilewise.attention import packed_sequences
        >>> packed_sequences(np.array([0, 2, 5])).tolist()
        [[0, 0, 2, 0, 0, 2], [0, 2, 3, 0, 2, 3]]
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if len(lengths.shape) != 1 or lengths.shape[0] < 1:
            raise ShapeError(f"{name}: expected [sequences + 1] offsets that begin with 0, got {list(lengths.shape)}")
        if dtype_name(lengths) not in ("int32", "int64"):
            raise DtypeError(f"{name}: expected int32 or int64, got {dtype_name(lengths)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ShapeError(
            f"cu_seqlens_k: expected {cu_seqlens_q.shape[0]} offsets as in cu_seqlens_q, got {cu_seqlens_k.shape[0]}"
        )
    if is_torch(cu_seqlens_q):
        q, k = cu_seqlens_q.long(), cu_seqlens_k.long()
        none = q.new_zeros(q.shape[0] - 1)
        columns = [none, q[:-1], q[1:] - q[:-1], none, k[:-1], k[1:] - k[:-1]]
        return sys.modules["torch"].stack(columns, -1)
    q, k = np.asarray(cu_seqlens_q).astype(np.int64), np.asarray(cu_seqlens_k).astype(np.int64)
    none = np.zeros(len(q) - 1, np.int64)
    return np.stack([none, q[:-1], np.diff(q), none, k[:-1], np.diff(k)], -1)
