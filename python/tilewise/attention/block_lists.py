"""Lists of blocks: conversions, and the calls of the core that fill them.

A row of blocks is listed by a count and the ascending columns of its blocks; what follows is undefined (here -1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise import _core
from tilewise._arrays import native
from tilewise.errors import ArgumentError
from tilewise.expr import Mod
from tilewise.expr.mod import naming

__all__ = [
    "block_size", "ceil_div", "check_lengths", "dense_mask", "dense_to_ordered", "dense_values", "fill_blocks",
    "ordered_to_dense", "uses",
]  # fmt: skip


def block_size(size: Any) -> tuple[int, int]:
    """``(queries, keys)`` of a block, of one number or a pair.

    Raises:
        ArgumentError: not positive.
    """
    pair = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(pair) != 2 or any(not isinstance(x, int | np.integer) or x < 1 for x in pair):
        raise ArgumentError(f"BLOCK_SIZE: expected one positive number or a pair (queries, keys), got {size!r}")
    return int(pair[0]), int(pair[1])


def ceil_div(length: int, size: int) -> int:
    """How many blocks of a size a length needs."""
    return -(-length // size)


def ordered_to_dense(counts: np.ndarray, indices: np.ndarray, columns: int) -> np.ndarray:
    """Lists of columns as bools ``[..., rows, columns]``; entries beyond a row's count are not looked at."""
    width = indices.shape[-1]
    dense = np.zeros((*indices.shape[:-1], columns), bool)
    used = np.arange(width) < counts[..., None]
    *places, slots = np.nonzero(used)
    dense[(*places, indices[(*places, slots)])] = True
    return dense


def dense_to_ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bools ``[..., rows, columns]`` as counts and ascending lists of columns, with a tail of -1."""
    counts = dense.sum(-1, dtype=np.int32)
    indices = np.full(dense.shape, -1, np.int32)
    *places, columns = np.nonzero(dense)
    slots = (np.cumsum(dense, -1, dtype=np.int64) - 1)[(*places, columns)]
    indices[(*places, slots)] = columns
    return counts, indices


def uses(mod: Mod, leaf: str) -> bool:
    """Whether a program reads an index (``"batch"``, ``"head"``) at all."""
    return leaf in mod.program.split("\n")


def check_lengths(B: Any, H: Any, Q_LEN: Any, KV_LEN: Any) -> tuple[int, int, int, int]:
    """The extents as numbers; None for batches or heads is 1.

    Raises:
        ArgumentError: below 0 (lengths) or 1 (batches, heads).
    """
    extents = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    for name, extent, least in zip(("B", "H", "Q_LEN", "KV_LEN"), extents, (1, 1, 0, 0), strict=True):
        if not isinstance(extent, int | np.integer) or isinstance(extent, bool) or extent < least:
            raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {extent!r}")
    return tuple(int(extent) for extent in extents)  # type: ignore[return-value]


def fill_blocks(
    mod: Mod, B: int, H: int, Q_LEN: int, KV_LEN: int, size: tuple[int, int], separate_full_blocks: bool = True
) -> list[np.ndarray]:
    """``[kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices]`` of a mask program, computed by the core.

    Axes on which the mask does not depend have an extent of 1: the caller broadcasts.
    """
    if mod.kind != "mask":
        raise ArgumentError(f"expected a mask_mod (b, h, q, k), got a score_mod: {mod}")
    rows, columns = ceil_div(Q_LEN, size[0]), ceil_div(KV_LEN, size[1])
    batch, heads = (B if uses(mod, "batch") else 1), (H if uses(mod, "head") else 1)
    arrays = [np.full((batch, heads, rows, columns)[: 3 + place % 2], -1, np.int32) for place in range(4)]
    captures = [native(name, array) for name, array in zip(mod.names, mod.captures, strict=True)]
    with naming(mod):
        _core.block_mask(
            mod.program, captures, batch=batch, heads=heads, queries=Q_LEN, keys=KV_LEN,
            query_block=size[0], key_block=size[1], kv_num_blocks=arrays[0], kv_indices=arrays[1],
            full_kv_num_blocks=arrays[2], full_kv_indices=arrays[3],
        )  # fmt: skip
    if not separate_full_blocks:
        dense = ordered_to_dense(arrays[0], arrays[1], columns) | ordered_to_dense(arrays[2], arrays[3], columns)
        arrays = list(dense_to_ordered(dense))
    return arrays


def dense_values(mod: Mod, B: int, H: int, Q_LEN: int, KV_LEN: int, score: float = 0.0) -> np.ndarray:
    """What a program returns for every element, ``[B, H, Q_LEN, KV_LEN]``: bool, or float32 for scores all alike."""
    batch, heads = (B if uses(mod, "batch") else 1), (H if uses(mod, "head") else 1)
    shape = (batch, heads, Q_LEN, KV_LEN)
    captures = [native(name, array) for name, array in zip(mod.names, mod.captures, strict=True)]
    out = np.zeros(shape, bool if mod.kind == "mask" else np.float32)
    scores = None if mod.kind == "mask" else np.full(shape, score, np.float32)
    with naming(mod):
        _core.expr_evaluate(
            mod.program, captures, out, score=scores, batch=batch, heads=heads, queries=Q_LEN, keys=KV_LEN
        )
    return np.broadcast_to(out, (B, H, Q_LEN, KV_LEN))


def dense_mask(mod: Mod, B: int, H: int, Q_LEN: int, KV_LEN: int) -> np.ndarray:
    """The dense mask of a program, bool ``[B, H, Q_LEN, KV_LEN]``.

    Of a score program it is False where a score of 0 becomes -inf.
    """
    values = dense_values(mod, B, H, Q_LEN, KV_LEN)
    return values if mod.kind == "mask" else ~np.isneginf(values)
