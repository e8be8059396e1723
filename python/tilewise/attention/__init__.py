"""Attention on the NumPy floor.

* :mod:`~tilewise.attention.dense`: ``attention`` and its gradients, every rule in one function;
* :mod:`~tilewise.attention.parts`: results over parts of the keys put together;
* :mod:`~tilewise.attention.options`: the keywords, checked; ``packed_sequences`` for packed batches;
* :mod:`~tilewise.attention.rules`: the one form in which a call reaches the core;
* :mod:`~tilewise.attention.programs`, :mod:`~tilewise.attention.lower`: programs that the fronts write, and where the
  users' own come in.
"""

from __future__ import annotations

from tilewise.attention.dense import AttentionGradients, attention, attention_backward
from tilewise.attention.options import packed_sequences
from tilewise.attention.parts import merge

__all__ = ["AttentionGradients", "attention", "attention_backward", "merge", "packed_sequences"]
