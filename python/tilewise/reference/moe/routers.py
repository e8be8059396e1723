"""The meaning of :mod:`tilewise.moe.routers`: choose experts for each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["SCORINGS", "route", "sigmoid"]

SCORINGS = ("softmax_topk", "softmax", "softmax_renormalised", "sigmoid")


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def route(
    logits: ArrayLike,
    top_k: int,
    *,
    scoring: str = "softmax_topk",
    bias: ArrayLike | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Choose ``top_k`` experts for each token and weigh them.

    Args:
        logits: ``[T, E]``, never NaN; ``-inf`` ranks last.
        top_k: experts a token, ``1 <= top_k <= E``.
        scoring: ``softmax_topk``: the largest logits, softmax over the chosen ones (Mixtral, gpt-oss).
            ``softmax``: softmax over all experts, its values at the chosen ones as they are.
            ``softmax_renormalised``: the same, divided by their sum (Qwen3-MoE).
            ``sigmoid``: each expert's own sigmoid (DeepSeek-V3, MiniMax-M3).
        bias: ``[E]``, added to the scores (to the logits for ``softmax_topk``) for the choice only; the weights do
            not see it.
        renormalise: divide the weights of a token by their sum.
        scale: factor on the final weights.

    Returns:
        ``(expert_ids, weights)``: int32 ``[T, top_k]`` by falling score, ties to the lower expert, and float64
        ``[T, top_k]``.

    Raises:
        ShapeError: ``logits`` is not a matrix, or ``bias`` does not fit.
        ArgumentError: NaN among the logits, an unknown scoring, or a ``top_k`` out of range.

    Example:
        >>> ids, weights = route([[0.0, 2.0, 2.0]], 2)
        >>> ids.tolist(), weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ShapeError(f"expected logits [T, E], got {z.shape}")
    if not 1 <= top_k <= z.shape[1]:
        raise ArgumentError(f"top_k must lie in [1, {z.shape[1]}], got {top_k}")
    if scoring not in SCORINGS:
        raise ArgumentError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if np.isnan(z).any():
        raise ArgumentError("logits hold NaN, which ranks nowhere; look for the layer that made it")
    if scoring == "softmax_topk":
        scores = z
    elif scoring == "sigmoid":
        scores = sigmoid(z)
    else:
        scores = _softmax(z)
    choice = scores
    if bias is not None:
        b = np.asarray(bias, dtype=np.float64)
        if b.shape != (z.shape[1],):
            raise ShapeError(f"expected bias [{z.shape[1]}], got {b.shape}")
        choice = scores + b
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == "softmax_topk":
        weights = _softmax(weights) if weights.size else weights
    if renormalise or scoring == "softmax_renormalised":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids.astype(np.int32), weights * scale


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):  # exp overflows to inf, and 1 / inf is the right zero
        return 1.0 / (1.0 + np.exp(-x))
