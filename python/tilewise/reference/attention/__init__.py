"""The meaning of :mod:`tilewise.attention`: softmax attention over a visibility rule, and its gradients.

``s[i, j] = mod(scale * Q[i].K[j])``, ``O[i] = sum_j softmax_j(s[i, j]) V[j]`` over the keys that every condition keeps
(Vaswani et al. 2017); a sink (gpt-oss) is one more logit in the denominator that carries no value. Gradients are those
of the recompute form (Dao 2023): with ``D[i] = O[i].dO[i] - dLSE[i]``, ``dS = P * (dP - D)``.

* :mod:`~tilewise.reference.attention.visible`: which pairs are kept;
* :mod:`~tilewise.reference.attention.dense`: one problem, forward and backward;
* :mod:`~tilewise.reference.attention.packed`: sequences in one buffer or in pages; merging of partial results.

Programs (``score_mod``, ``mask_mod``) mean what :mod:`tilewise.reference.expr` says.
"""

from __future__ import annotations

from tilewise.reference.attention.dense import Gradients, attention, attention_backward
from tilewise.reference.attention.packed import merge, packed, packed_backward
from tilewise.reference.attention.visible import visible

__all__ = ["Gradients", "attention", "attention_backward", "merge", "packed", "packed_backward", "visible"]
