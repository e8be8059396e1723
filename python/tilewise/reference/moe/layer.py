"""The meaning of :mod:`tilewise.moe.layer`: run the experts of each token, add them up."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError
from tilewise.reference.moe.routers import sigmoid

__all__ = ["GATED", "PLAIN", "activate", "experts"]

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


def _gelu_tanh(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * sigmoid(x)


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
    return (u + 1.0) * g * sigmoid(alpha * g)


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
