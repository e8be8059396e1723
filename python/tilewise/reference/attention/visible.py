"""Who attends whom: bottom-right causal and windows, masks, selected blocks, block masks, mask programs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["evaluate", "visible"]


def visible(
    batch: int,
    query_heads: int,
    query_length: int,
    key_length: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: ArrayLike | None = None,
    block_indices: ArrayLike | None = None,
    block_size: int | None = None,
    mask_mod: str | None = None,
    mask_captures: Any = (),
    blocks: Any = None,
    first_batch: int = 0,
) -> NDArray[np.bool_]:
    """Which keys each query may attend: bool ``[batch, query_heads, query_length, key_length]``.

    Every condition narrows the one before. Query ``i`` stands at key position ``i + key_length - query_length``
    (bottom-right alignment), which ``causal`` and ``window`` refer to. `blocks` is ``(kv_num_blocks, kv_indices,
    full_kv_num_blocks, full_kv_indices, (query_block, key_block))``: pairs of no listed block are dropped, and in full
    blocks `mask_mod` is not asked. `first_batch` is the batch index of the first entry, for programs.

    Example:
        >>> visible(1, 1, 2, 3, causal=True)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    position = np.arange(query_length)[:, None] + (key_length - query_length)
    key = np.arange(key_length)[None, :]
    keep = np.ones((query_length, key_length), dtype=bool)
    if causal:
        keep &= key <= position
    left, right = window
    if left < -1 or right < -1:
        raise ArgumentError(f"window must hold lengths >= 0, or -1 for unlimited, got {window}")
    if left >= 0:
        keep &= key >= position - left
    if right >= 0:
        keep &= key <= position + right
    full = np.broadcast_to(keep, (batch, query_heads, query_length, key_length)).copy()
    if mask is not None:
        allowed = np.asarray(mask)
        if allowed.dtype != np.bool_:
            raise ArgumentError(f"mask must be bool (True = keep), got {allowed.dtype}")
        full &= np.broadcast_to(allowed, full.shape)
    if block_indices is not None:
        full &= _selected(np.asarray(block_indices), block_size, full.shape)
    decided = np.ones(full.shape, dtype=bool)
    if mask_mod is not None:
        decided = evaluate(mask_mod, mask_captures, full.shape, first_batch)
    if blocks is not None:
        partial_count, partial, full_count, full_index, size = blocks
        listed = _listed(partial_count, partial, size, full.shape)
        whole = (
            np.zeros(full.shape, dtype=bool)
            if full_count is None
            else _listed(full_count, full_index, size, full.shape)
        )
        decided = (listed & decided) | whole
    return full & decided


def _selected(blocks: NDArray[Any], block_size: int | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pairs whose key lies in one of the blocks that their query lists."""
    batch, query_heads, query_length, key_length = shape
    if block_size is None or block_size <= 0:
        raise ArgumentError(f"block_indices needs a block_size >= 1, got {block_size}")
    if blocks.ndim != 4 or blocks.shape[0] != batch or blocks.shape[2] != query_length:
        raise ShapeError(f"expected block_indices [{batch}, Hg, {query_length}, K], got {blocks.shape}")
    groups = blocks.shape[1]
    if groups == 0 or query_heads % groups:
        raise ShapeError(f"block_indices has {groups} groups, which do not divide {query_heads} query heads")
    block_of_key = np.arange(key_length) // block_size
    listed = (blocks[..., None] == block_of_key).any(axis=-2)
    return np.repeat(listed, query_heads // groups, axis=1)


def _listed(count: ArrayLike, indices: ArrayLike, size: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pairs in the blocks that a block mask lists; only the first `count` indices of a row count."""
    count, indices = np.asarray(count), np.asarray(indices)
    batch, heads, rows, columns = indices.shape
    grid = np.zeros((batch, heads, rows, columns), dtype=bool)
    for at in np.ndindex(batch, heads, rows):
        grid[(*at, indices[at][: count[at]])] = True
    pairs = grid.repeat(size[0], axis=2)[:, :, : shape[2]].repeat(size[1], axis=3)[..., : shape[3]]
    return np.broadcast_to(pairs, shape)


def evaluate(
    text: str, captures: Any, shape: tuple[int, ...], first_batch: int, score: NDArray[np.float64] | None = None
) -> Any:
    """A program's value for every pair."""
    from tilewise.reference import expr

    batch, heads, queries, keys = shape
    if first_batch:  # computed for the batch entries before, too
        wide = None if score is None else np.concatenate([np.zeros((first_batch, *shape[1:])), score])
        return evaluate(text, captures, (batch + first_batch, *shape[1:]), 0, wide)[first_batch:]
    return expr.evaluate(text, captures, score=score, batch=batch, heads=heads, queries=queries, keys=keys)
