"""Attention of torch tensors.

* :mod:`~tilewise.torch.attention.dense`: ``attention``, every rule in one function.
"""

from __future__ import annotations

from tilewise.torch.attention.dense import attention

__all__ = ["attention"]
