"""PyTorch front: the rooms as custom operators, for eager code and torch.compile.

``import tilewise.torch as twt``; every function takes and returns torch tensors and keeps the names of the NumPy floor:
``twt.attention``, ``twt.matmul``, ``twt.moe.route``, ``twt.moe.experts``, ``twt.speculation.verify``. Beside them stand
names that users have already: ``twt.flex_attention``, ``twt.create_block_mask``, ``twt.scaled_dot_product_attention``
(torch's), ``twt.flash_attn_func`` and its family (flash_attn 2's).

This package is the only place that imports torch.
"""

from __future__ import annotations

from tilewise.errors import MissingExtraError

try:
    import torch  # noqa: F401  (the message below, before anything else fails)
except ImportError as error:
    raise MissingExtraError(
        f"tilewise.torch needs PyTorch 2.10 or newer ({error}); install it with: pip install 'tilewise[torch]'"
    ) from error

from tilewise.torch import moe, speculation
from tilewise.torch.attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    and_masks,
    attention,
    create_block_mask,
    create_mask,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    flex_attention,
    merge_attention,
    noop_mask,
    or_masks,
    scaled_dot_product_attention,
)
from tilewise.torch.gemm import matmul

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
    "matmul",
    "merge_attention",
    "moe",
    "noop_mask",
    "or_masks",
    "scaled_dot_product_attention",
    "speculation",
]
