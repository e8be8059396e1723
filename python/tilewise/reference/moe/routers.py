"""The meaning of :mod:`tilewise.moe.routers`: choose experts for each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["SCORINGS", "load_balance_loss", "route", "sigmoid"]

SCORINGS = ("softmax_topk", "softmax", "softmax_renormalised", "sigmoid")


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The softmax of each row; its largest elements share it if they are infinite."""
    top = x.max(axis=-1, keepdims=True) if x.size else np.zeros((*x.shape[:-1], 1))
    with np.errstate(invalid="ignore"):
        e = np.exp(np.where(x == top, 0.0, x - top))
    return e / e.sum(axis=-1, keepdims=True)


def route(
    logits: ArrayLike,
    top_k: int,
    *,
    scoring: str = "softmax_topk",
    bias: ArrayLike | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Choose ``top_k`` experts for each token and weigh them.

    Args:
        logits: ``[T, E]``, never NaN; ``-inf`` ranks last.
        top_k: experts a token, ``1 <= top_k <= E``.
        scoring: ``softmax_topk``: the largest logits, softmax over the chosen ones (Mixtral, gpt-oss).
            ``softmax``: softmax over all experts, its values at the chosen ones as they are.
            ``softmax_renormalised``: the same, divided by their sum (Qwen3-MoE).
            ``sigmoid``: each expert's own sigmoid (DeepSeek-V3, MiniMax-M3).
        bias: ``[E]``, with ``sigmoid`` alone: added to the scores for the choice only; the weights do not see it.
        renormalise: divide the weights of a token by their sum.
        scale: factor on the final weights.
        groups: with ``sigmoid``: experts stand in this many groups of neighbours.
        top_groups: only experts of this many groups may be chosen: those whose two largest scores, bias included, have
            the largest sum (a group of one: its one score), ties to the lower group. All of them by default.

    Experts rank by their logits, with which every score rises, so no ties arise from rounding; with a bias or groups,
    by score + bias.

    Returns:
        ``(expert_ids, weights)``: int32 ``[T, top_k]`` in falling order, ties to the lower expert, and float64
        ``[T, top_k]``.

    Raises:
        ShapeError: ``logits`` is not a matrix, or ``bias`` does not fit.
        ArgumentError: NaN among the logits, an unknown scoring, a ``top_k`` out of range, groups that do not fit, or a
            bias or groups without ``sigmoid``.

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
    if scoring != "sigmoid" and (bias is not None or groups != 1):
        raise ArgumentError(f"a selection bias or groups go with scoring 'sigmoid' only, got {scoring!r}")
    kept = groups if top_groups is None else top_groups
    if groups < 1 or z.shape[1] % groups or not 1 <= kept <= groups or top_k > kept * (z.shape[1] // groups):
        raise ArgumentError(f"groups {groups} and top_groups {kept} do not fit {z.shape[1]} experts and top_k {top_k}")
    choice = z
    if bias is not None or groups > 1:
        choice = sigmoid(z)
    if bias is not None:
        b = np.asarray(bias, dtype=np.float64)
        if b.shape != (z.shape[1],):
            raise ShapeError(f"expected bias [{z.shape[1]}], got {b.shape}")
        choice = choice + b
    if kept < groups:
        members = choice.reshape(len(z), groups, z.shape[1] // groups)
        best = np.sort(members, axis=-1)[:, :, -2:].sum(axis=-1)
        open_groups = np.argsort(-best, axis=-1, kind="stable")[:, :kept]
        is_open = np.zeros((len(z), groups), dtype=bool)
        np.put_along_axis(is_open, open_groups, True, axis=-1)
        # Closed experts rank behind open ones of any score, -inf included.
        closed = np.repeat(~is_open, z.shape[1] // groups, axis=1)
        ids = np.lexsort((-choice, closed), axis=-1)[:, :top_k]
    else:
        ids = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    logits_of_chosen = np.take_along_axis(z, ids, axis=-1)
    if scoring == "sigmoid":
        weights = sigmoid(logits_of_chosen)
        if renormalise:
            # e^-top cancels out of the quotients, and they survive where every sigmoid underflows.
            top = np.maximum(np.minimum(logits_of_chosen.max(axis=-1, keepdims=True), 0.0), -1e300)
            negative = np.minimum(logits_of_chosen, 0.0)
            weights = np.where(logits_of_chosen < 0, np.exp(negative - top) / (1.0 + np.exp(negative)), weights)
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    elif scoring == "softmax" and not renormalise:
        weights = np.take_along_axis(_softmax(z), ids, axis=-1)
    else:
        weights = _softmax(logits_of_chosen)
    return ids.astype(np.int32), weights * scale


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):  # exp overflows to inf, and 1 / inf is the right zero
        return 1.0 / (1.0 + np.exp(-x))


def load_balance_loss(probabilities: ArrayLike, expert_ids: ArrayLike) -> float:
    """``E * sum_e (P_e / sum P) * (f_e / sum f)``: `P_e` sums the probabilities of expert e, `f_e` counts its tokens.

    Example:
        >>> load_balance_loss([[0.5, 0.5], [0.5, 0.5]], [[0], [0]])
        1.0
    """
    p = np.asarray(probabilities, dtype=np.float64)
    counts = np.zeros(p.shape[1])
    for expert in np.ravel(expert_ids):
        counts[expert] += 1
    mass = p.sum(axis=0)
    return float(p.shape[1] * sum(m / mass.sum() * c / counts.sum() for m, c in zip(mass, counts)))
