"""The meaning of :mod:`tilewise.moe`: choose experts for each token, run them, add them up."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["GATED", "PLAIN", "SCORINGS", "activate", "experts", "route"]

SCORINGS = ("softmax_topk", "softmax", "softmax_renormalised", "sigmoid")
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


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
        scores = _sigmoid(z)
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


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # exp overflows to inf, and 1 / inf is the right zero
        return 1.0 / (1.0 + np.exp(-x))


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


def _gelu_tanh(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * _sigmoid(x)


def activate(
    h: NDArray[np.float64], activation: str, *, layout: str = "concatenated", alpha: float = 1.702, limit: float = 7.0
) -> NDArray[np.float64]:
    """Apply an activation to ``[..., n]`` (plain) or ``[..., 2n]`` (gated); returns ``[..., n]``.

    ``swiglu_clamped`` (gpt-oss, MiniMax-M3): ``g = min(gate, limit)``, ``u = clamp(up, -limit, limit)``,
    ``(u + 1) * g * sigmoid(alpha * g)``. ``layout`` says where gate and up lie: ``concatenated`` holds all gates,
    then all ups; ``interleaved`` alternates gate and up.

    Example:
        >>> activate(np.array([[2.0, -1.0]]), "relu2").tolist()
        [[4.0, 0.0]]
    """
    if activation in PLAIN:
        if activation == "silu":
            return _silu(h)
        if activation == "gelu":
            return _gelu(h)
        if activation == "gelu_tanh":
            return _gelu_tanh(h)
        rectified = np.maximum(h, 0.0)
        return rectified if activation == "relu" else rectified**2
    if activation not in GATED:
        raise ArgumentError(f"activation must be one of {', '.join(GATED + PLAIN)}, got {activation!r}")
    if h.shape[-1] % 2:
        raise ShapeError(f"a gated activation needs an even width, got {h.shape[-1]}")
    if layout == "concatenated":
        gate, up = np.split(h, 2, axis=-1)
    elif layout == "interleaved":
        gate, up = h[..., ::2], h[..., 1::2]
    else:
        raise ArgumentError(f"layout must be 'concatenated' or 'interleaved', got {layout!r}")
    if activation == "swiglu":
        return _silu(gate) * up
    if activation == "geglu":
        return _gelu(gate) * up
    if activation == "geglu_tanh":
        return _gelu_tanh(gate) * up
    if activation == "reglu":
        return np.maximum(gate, 0.0) * up
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (u + 1.0) * g * _sigmoid(alpha * g)


def experts(
    x: ArrayLike,
    expert_ids: ArrayLike,
    weights: ArrayLike,
    gate_up: ArrayLike,
    down: ArrayLike,
    *,
    activation: str = "swiglu",
    layout: str = "concatenated",
    gate_up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> NDArray[np.float64]:
    """The expert layer: ``O[t] = sum_k weights[t, k] * expert(expert_ids[t, k])(x[t])``.

    Args:
        x: ``[T, d]``.
        expert_ids: integers ``[T, K]``; an id outside ``[0, E)`` is a sentinel and contributes nothing.
        weights: ``[T, K]``.
        gate_up: ``[E, 2n, d]`` for gated activations, ``[E, n, d]`` for plain ones.
        down: ``[E, d, n]``.
        activation: one of :data:`GATED` or :data:`PLAIN`.
        layout: where gate and up lie in ``gate_up``: ``concatenated`` or ``interleaved``.
        gate_up_bias: ``[E, 2n]`` (``[E, n]`` for plain ones).
        down_bias: ``[E, d]``.
        alpha, limit: constants of ``swiglu_clamped``.

    Returns:
        float64 ``[T, d]``.

    Raises:
        ShapeError: ranks or extents do not fit.
        ArgumentError: an unknown activation or layout.

    Example:
        >>> experts([[2.0]], [[0, 7]], [[0.5, 9.0]], [[[3.0]]], [[[1.0]]], activation="relu").tolist()
        [[3.0]]
    """
    x64, up64, down64 = (np.asarray(a, dtype=np.float64) for a in (x, gate_up, down))
    ids, scores = np.asarray(expert_ids), np.asarray(weights, dtype=np.float64)
    if x64.ndim != 2 or up64.ndim != 3 or down64.ndim != 3:
        raise ShapeError(
            f"expected x [T, d], gate_up [E, 2n, d] and down [E, d, n], got {x64.shape}, {up64.shape}, {down64.shape}"
        )
    tokens, width = x64.shape
    count, wide, _ = up64.shape
    narrow = wide // 2 if activation in GATED else wide
    if up64.shape[2] != width or down64.shape != (count, width, narrow):
        raise ShapeError(f"x {x64.shape}, gate_up {up64.shape} and down {down64.shape} do not fit ({activation})")
    if ids.ndim != 2 or ids.shape != scores.shape or ids.shape[0] != tokens:
        raise ShapeError(f"expected expert_ids and weights [{tokens}, K], got {ids.shape} and {scores.shape}")
    first = np.zeros((count, wide)) if gate_up_bias is None else np.asarray(gate_up_bias, dtype=np.float64)
    second = np.zeros((count, width)) if down_bias is None else np.asarray(down_bias, dtype=np.float64)
    if first.shape != (count, wide) or second.shape != (count, width):
        raise ShapeError(f"expected biases [{count}, {wide}] and [{count}, {width}], got {first.shape}, {second.shape}")
    output = np.zeros((tokens, width))
    for expert in range(count):
        token, slot = np.nonzero(ids == expert)
        hidden = x64[token] @ up64[expert].T + first[expert]
        inner = activate(hidden, activation, layout=layout, alpha=alpha, limit=limit)
        result = inner @ down64[expert].T + second[expert]
        np.add.at(output, token, result * scores[token, slot, None])
    return output
