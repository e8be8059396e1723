"""Attention of torch tensors.

* :mod:`~tilewise.torch.attention.dense`: ``attention``, every rule in one function.
* :mod:`~tilewise.torch.attention.blocks`: ``BlockMask``, ``create_block_mask`` and what combines masks.
"""

from __future__ import annotations

from tilewise.torch.attention.dense import attention

__all__ = ["attention"]

from tilewise.torch.attention.blocks import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks

__all__ += ["BlockMask", "and_masks", "create_block_mask", "create_mask", "noop_mask", "or_masks"]
