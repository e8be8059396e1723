"""Routers: which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import Any, Literal

from tilewise import _core
from tilewise._arrays import like, native, to_float64
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["Scoring", "route"]

Scoring = Literal["softmax_topk", "softmax", "softmax_renormalised", "sigmoid"]


def route(
    logits: Any,
    top_k: int,
    *,
    scoring: Scoring = "softmax_topk",
    bias: Any = None,
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Any, Any]:
    """Chooses `top_k` experts for every token: exact selection, ties to the lower expert.

    Args:
        logits: ``[tokens, experts]``, any floating type.
        top_k: experts per token, 1 to `experts`.
        scoring: ``"softmax_topk"``: the K largest logits, softmax over those; ``"softmax"``: softmax over all experts,
            K largest kept as they are; ``"softmax_renormalised"``: those divided by their sum; ``"sigmoid"``: sigmoid
            per expert, chosen by score + `bias` (DeepSeek-V3, MiniMax-M3).
        bias: ``[experts]``: takes part in a sigmoid's choice, not in its weights.
        renormalise: divide the K weights by their sum (``"softmax_topk"`` sums to 1 already).
        scale: factor on the weights.

    Returns:
        ``(expert_ids, weights)``: int32 and float32 ``[tokens, top_k]``, by descending score, of the kind of `logits`.

    Raises:
        ShapeError, DtypeError: see the message.
        ArgumentError: `top_k` out of range, an unknown `scoring`, or a NaN among the logits (its place is named).

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import route
        >>> ids, weights = route(np.array([[0.0, 2.0, 2.0]], np.float32), 2)
        >>> ids.tolist(), weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    source = native("logits", logits)
    if source.ndim != 2:
        raise ShapeError(f"logits: expected rank 2 [tokens, experts], got shape {tuple(source.shape)}")
    if not 1 <= top_k <= source.shape[1]:
        raise ArgumentError(f"top_k: expected 1..={source.shape[1]} (the number of experts), got {top_k}")
    shape = (source.shape[0], int(top_k))
    ids, ids_result = like(logits, shape, "int32")
    weights, weights_result = like(logits, shape, "float32")
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
    )
    return ids_result, weights_result
