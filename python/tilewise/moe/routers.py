"""Routers: which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from tilewise import _core
from tilewise._arrays import dtype_name, like, native, to_float64
from tilewise.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["Scoring", "load_balance_loss", "route"]

_BLOCK = 4096  # tokens

Scoring = Literal["softmax_topk", "softmax", "softmax_renormalised", "sigmoid"]


def route(
    logits: Any,
    top_k: int,
    *,
    scoring: Scoring = "softmax_topk",
    bias: Any = None,
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
) -> tuple[Any, Any]:
    """Chooses `top_k` experts for every token: exact selection, ties to the lower expert.

    Experts are ranked by their logits, or by score + `bias` where there is a bias or groups.

    Args:
        logits: ``[tokens, experts]``, any floating type.
        top_k: experts per token, 1 to `experts`.
        scoring: ``"softmax_topk"``: the K largest logits, softmax over those; ``"softmax"``: softmax over all experts,
            K largest kept as they are; ``"softmax_renormalised"``: those divided by their sum; ``"sigmoid"``: sigmoid
            per expert, chosen by score + `bias` (DeepSeek-V3, MiniMax-M3).
        bias: ``[experts]``, finite or -inf: takes part in a sigmoid's choice, not in its weights.
        renormalise: divide the K weights by their sum (``"softmax_topk"`` sums to 1 already).
        scale: factor on the weights.
        groups: with a sigmoid, experts ``i * experts / groups`` to ``(i + 1) * experts / groups`` are group i, and a
            token chooses from its best `top_groups` groups alone. A group counts the sum of its two largest score +
            bias (a group of one expert: that one); ties go to the lower group.
        top_groups: groups a token may choose from; all of them by default.

    Returns:
        ``(expert_ids, weights)``: int32 and float32 (float64 for float64 logits) ``[tokens, top_k]``, by descending
        choice, of the kind of `logits`.

    Raises:
        ShapeError, DtypeError: see the message.
        ArgumentError: `top_k` out of range, an unknown `scoring`, a bias or groups without a sigmoid, groups that do
            not divide the experts, or a NaN among the logits (its place is named).

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import route
        >>> ids, weights = route(np.array([[0.0, 2.0, 2.0]], np.float32), 2)
        >>> ids.tolist(), weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])

    Source: SonicMoE (arXiv 2512.14080) for the softmax routers, DeepSeek-V3 (arXiv 2412.19437) for the sigmoid's.
    """
    source = native("logits", logits)
    if source.ndim != 2:
        raise ShapeError(f"logits: expected rank 2 [tokens, experts], got shape {tuple(source.shape)}")
    if not 1 <= top_k <= source.shape[1]:
        raise ArgumentError(f"top_k: expected 1..={source.shape[1]} (the number of experts), got {top_k}")
    if not 1 <= groups <= source.shape[1]:
        raise ArgumentError(f"groups: expected a divisor of {source.shape[1]} (the number of experts), got {groups}")
    kept = groups if top_groups is None else top_groups
    if not 1 <= kept <= groups:
        raise ArgumentError(f"top_groups: expected 1..={groups} (the number of groups), got {kept}")
    shape = (source.shape[0], int(top_k))
    ids, ids_result = like(logits, shape, "int32")
    weights, weights_result = like(logits, shape, weights_dtype(logits))
    # Converted here: the bits by which `native` hands over a bfloat16 are no numbers.
    values = None
    if bias is not None:
        native("bias", bias)
        if bias.ndim != 1:
            raise ShapeError(f"bias: expected rank 1 [experts], got shape {tuple(bias.shape)}")
        values = to_float64(bias).tolist()
    _core.route(
        source,
        ids,
        weights,
        top_k=int(top_k),
        scoring=scoring,
        bias=values,
        renormalise=bool(renormalise),
        scale=float(scale),
        groups=int(groups),
        top_groups=int(kept),
    )
    return ids_result, weights_result


def weights_dtype(logits: Any) -> str:
    """The type of routing weights: float64 for float64 logits or scores, else float32."""
    return "float64" if dtype_name(logits) == "float64" else "float32"


def load_balance_loss(logits: Any, expert_ids: Any, *, probabilities: bool = False) -> float:
    """The auxiliary load-balance loss of the Switch Transformer, for any number of experts a token.

    ``experts * sum over e of (P_e / sum P) * (f_e / sum f)``: `P_e` adds up the softmax of the logits of expert e over
    all tokens, `f_e` counts the pairs of expert e (a constant for gradients). 1 when either is uniform, up to `experts`
    when one expert has everything. Hugging Face's ``load_balancing_loss_func`` is `top_k` times as much.

    Args:
        logits: ``[tokens, experts]``, any floating type.
        expert_ids: integers of any shape, the chosen experts; ids outside ``0..experts`` are not counted.
        probabilities: `logits` holds non-negative scores already, sigmoids for example; no softmax is taken.

    Returns:
        The loss; 0 if there is no token or no counted pair.

    Raises:
        ShapeError, DtypeError: see the message.

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import load_balance_loss
        >>> load_balance_loss(np.zeros((4, 2)), np.array([[0], [1], [0], [1]]))
        1.0

    Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), equation 4.
    """
    if native("logits", logits).ndim != 2:
        raise ShapeError(f"logits: expected rank 2 [tokens, experts], got shape {tuple(logits.shape)}")
    if dtype_name(logits) not in ("float32", "float64", "float16", "bfloat16"):
        raise DtypeError(f"logits: expected dtype float32, float64, float16 or bfloat16, got {dtype_name(logits)}")
    if dtype_name(expert_ids) not in ("int32", "int64"):
        raise DtypeError(f"expert_ids: expected dtype int32 or int64, got {dtype_name(expert_ids)}")
    tokens, experts = logits.shape
    mass = np.zeros(experts)
    for first in range(0, tokens, _BLOCK):  # a block at a time: no float64 copy of everything
        block = to_float64(logits[first : first + _BLOCK])
        if not probabilities and experts:
            block = np.exp(block - block.max(axis=1, keepdims=True))
            block /= block.sum(axis=1, keepdims=True)
        mass += block.sum(axis=0)
    ids = np.asarray(expert_ids).ravel()
    counts = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
    if not counts.sum() or not mass.sum():
        return 0.0
    return float(experts * np.sum(mass / mass.sum() * (counts / counts.sum())))
