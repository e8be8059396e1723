"""Block masks on NumPy arrays: which blocks of (queries x keys) are empty, partial or full.

* :class:`BlockMask`: for each row of query blocks its partial and its full key blocks, and the mask_mod;
* :func:`create_block_mask`: from a mask_mod, in time and memory of the number of blocks, never of elements;
* :func:`create_mask`: the dense mask, for tests and pictures;
* :func:`and_masks`, :func:`or_masks`, :func:`noop_mask`: mask_mods of mask_mods.

This is the NumPy floor; :mod:`tilewise.torch.attention.blocks` is the same on tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewise.attention.block_lists import block_size, check_lengths, dense_mask, fill_blocks
from tilewise.attention.block_mask import BlockMask
from tilewise.attention.combine import and_masks, noop_mask, or_masks
from tilewise.expr import Mod, trace

__all__ = ["BlockMask", "and_masks", "create_block_mask", "create_mask", "noop_mask", "or_masks"]


def create_block_mask(
    mask_mod: Callable[..., Any] | Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    *,
    separate_full_blocks: bool = True,
) -> BlockMask:
    """The block mask of a mask_mod, without ever making the dense mask.

    Each block is bounded by interval arithmetic on the traced function; only where bounds cannot decide are elements
    computed. Time and memory grow with the number of blocks.

    Args:
        mask_mod: ``(b, h, q, k) -> bool``, True keeps; captured arrays wrapped by :func:`tilewise.expr.array`.
        B, H: batches and query heads; None is 1 (shared by all).
        Q_LEN, KV_LEN: lengths.
        BLOCK_SIZE: ``(queries, keys)`` of a block, or one number for both.
        separate_full_blocks: list full blocks apart, so that the mask_mod is not asked there.

    Returns:
        :class:`BlockMask`.

    Raises:
        ArgumentError: lengths or sizes out of range, or a score_mod.
        UnsupportedError: a function that cannot be traced.

    Example:
        >>> mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 100), None, None, 512, 512, 128)
        >>> print(mask.to_string())
        (0, 0)
        ██
        ████
          ████
            ████
        <BLANKLINE>
    """
    B, H, Q_LEN, KV_LEN = check_lengths(B, H, Q_LEN, KV_LEN)
    size = block_size(BLOCK_SIZE)
    mod = trace(mask_mod, "mask")
    found = fill_blocks(mod, B, H, Q_LEN, KV_LEN, size, separate_full_blocks)
    arrays = [np.broadcast_to(array, (B, H, *array.shape[2:])) for array in found]
    mask = BlockMask((Q_LEN, KV_LEN), *arrays, BLOCK_SIZE=size, mask_mod=mask_mod)
    mask._mod = mod
    return mask


def create_mask(mod_fn: Callable[..., Any] | Mod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int) -> np.ndarray:
    """The dense mask of a mask_mod, or of a score_mod (False where it returns -inf for a score of 0).

    Args:
        mod_fn: a function of 4 (mask) or 5 (score) arguments.
        B, H: batches and query heads; None is 1.
        Q_LEN, KV_LEN: lengths.

    Returns:
        bool ``[B, H, Q_LEN, KV_LEN]``.

    Raises:
        ArgumentError: lengths out of range.
        UnsupportedError: a function that cannot be traced.

    Example:
        >>> create_mask(lambda b, h, q, k: q >= k, None, None, 2, 3).astype(int).tolist()
        [[[[1, 0, 0], [1, 1, 0]]]]
    """
    return dense_mask(trace(mod_fn), *check_lengths(B, H, Q_LEN, KV_LEN))
