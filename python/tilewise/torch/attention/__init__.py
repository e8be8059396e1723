"""Attention of torch tensors.

* :mod:`~tilewise.torch.attention.dense`: ``attention``, every rule in one function;
* :mod:`~tilewise.torch.attention.merge`: ``merge_attention``, results over parts of the keys put together;
* :mod:`~tilewise.torch.attention.operators`: the two operators under all of them, forward and backward.
"""

from __future__ import annotations

from tilewise.torch.attention.dense import attention
from tilewise.torch.attention.merge import merge_attention

__all__ = ["attention", "merge_attention"]
