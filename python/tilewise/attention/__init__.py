"""Attention on the NumPy floor.

* :mod:`~tilewise.attention.dense`: ``attention``, every rule in one function.
* :mod:`~tilewise.attention.blocks`: ``BlockMask``, ``create_block_mask`` and what combines masks.
"""

from __future__ import annotations

from tilewise.attention.dense import attention

__all__ = ["attention"]

from tilewise.attention.blocks import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks

__all__ += ["BlockMask", "and_masks", "create_block_mask", "create_mask", "noop_mask", "or_masks"]
