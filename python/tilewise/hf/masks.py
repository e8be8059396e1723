"""The mask hook: which masks transformers builds for ``attn_implementation="tilewise"``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import sdpa_mask

__all__ = ["attention_mask"]


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask of a layer with transformers' own rule for SDPA.

    Arguments are passed on as they come, because their names changed between transformers 5.3 and 5.23.

    Returns:
        ``None`` where causality alone (or nothing) decides, which
        :func:`tilewise.hf.attention.attention_forward` turns into ``causal=True`` for several queries; else bool
        ``[batch, 1, query_length, key_length]``, True = attend.
    """
    return sdpa_mask(*args, **kwargs)
