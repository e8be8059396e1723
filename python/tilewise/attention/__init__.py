"""Attention on the NumPy floor.

* :mod:`~tilewise.attention.dense`: ``attention``, every rule in one function.
"""

from __future__ import annotations

from tilewise.attention.dense import attention

__all__ = ["attention"]
