"""Attention on the NumPy floor.

* :mod:`~tilewise.attention.dense`: ``attention`` and its gradients, every rule in one function;
* :mod:`~tilewise.attention.parts`: results over parts of the keys put together;
* :mod:`~tilewise.attention.options`: the keywords, checked; ``packed_sequences`` for packed batches;
* :mod:`~tilewise.attention.rules`: the one form in which a call reaches the core;
* :mod:`~tilewise.attention.programs`, :mod:`~tilewise.attention.lower`: programs that the fronts write, and where the
  users' own come in.
* :mod:`~tilewise.attention.blocks`: ``BlockMask``, ``create_block_mask`` and what combines masks.
"""

from __future__ import annotations

from tilewise.attention.blocks import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks
from tilewise.attention.dense import AttentionGradients, attention, attention_backward
from tilewise.attention.options import packed_sequences
from tilewise.attention.parts import merge

__all__ = [
    "AttentionGradients",
    "BlockMask",
    "and_masks",
    "attention",
    "attention_backward",
    "create_block_mask",
    "create_mask",
    "merge",
    "noop_mask",
    "or_masks",
    "packed_sequences",
]
