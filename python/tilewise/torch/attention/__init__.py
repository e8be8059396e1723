"""Attention of torch tensors. Every front fills in the same rules and calls the same two operators.

* :mod:`~tilewise.torch.attention.dense`: ``attention``, every rule in one function;
* :mod:`~tilewise.torch.attention.flex`: ``flex_attention``, as in torch;
* :mod:`~tilewise.torch.attention.flash`: ``flash_attn_func``, packed and variable-length forms, as in flash_attn 2;
* :mod:`~tilewise.torch.attention.cache`: ``flash_attn_with_kvcache``;
* :mod:`~tilewise.torch.attention.sdpa`: ``scaled_dot_product_attention``, as in torch;
* :mod:`~tilewise.torch.attention.merge`: ``merge_attention``, results over parts of the keys put together;
* :mod:`~tilewise.torch.attention.operators`: the two operators, forward and backward.
* :mod:`~tilewise.torch.attention.blocks`: ``BlockMask``, ``create_block_mask`` and what combines masks.
"""

from __future__ import annotations

from tilewise.torch.attention.blocks import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks
from tilewise.torch.attention.cache import flash_attn_with_kvcache
from tilewise.torch.attention.dense import attention
from tilewise.torch.attention.flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tilewise.torch.attention.flex import AuxOutput, AuxRequest, flex_attention
from tilewise.torch.attention.merge import merge_attention
from tilewise.torch.attention.sdpa import scaled_dot_product_attention

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "attention",
    "create_block_mask",
    "create_mask",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex_attention",
    "merge_attention",
    "noop_mask",
    "or_masks",
    "scaled_dot_product_attention",
]
