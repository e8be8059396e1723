"""The expert layer."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ShapeError

__all__ = ["ACTIVATIONS", "Activation", "Layout", "experts"]

Layout = Literal["concatenated", "interleaved"]
Activation = Literal[
    "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped", "silu", "gelu", "gelu_tanh", "relu", "relu2"
]

ArrayT = TypeVar("ArrayT")

#: Whether each activation is gated (its first weight holds gates and ups).
ACTIVATIONS: dict[str, bool] = {
    "swiglu": True,
    "geglu": True,
    "geglu_tanh": True,
    "reglu": True,
    "swiglu_clamped": True,
    "silu": False,
    "gelu": False,
    "gelu_tanh": False,
    "relu": False,
    "relu2": False,
}


def experts(
    x: ArrayT,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> ArrayT:
    """The expert layer: ``out[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])``.

    ``expert(x) = act(x @ gate_up.T + gate_up_bias) @ down.T + down_bias``. Products and sums are accumulated in float32
    (float64 for float64); the activation is rounded to the type of `x` before the second product, the result once.

    Args:
        x: ``[tokens, d]``, float32, float64, float16 or bfloat16; any strides.
        expert_ids: ``[tokens, slots]``, int32 or int64; ids outside ``0..experts`` are skipped (expert parallelism).
        weights: ``[tokens, slots]``, floating.
        gate_up: ``[experts, 2n, d]``, or ``[experts, n, d]`` for an activation without a gate; any strides, so a
            checkpoint that stores ``[experts, d, 2n]`` passes ``w.transpose(1, 2)``.
        down: ``[experts, d, n]``.
        activation: ``swiglu``, ``geglu`` (exact), ``geglu_tanh``, ``reglu``, ``swiglu_clamped`` (MiniMax-M3, gpt-oss:
            ``(clamp(u, -limit, limit) + 1) * g * sigmoid(alpha * g)``, ``g = min(gate, limit)``); without a gate
            ``silu``, ``gelu`` (exact), ``gelu_tanh``, ``relu``, ``relu2``.
        layout: order of the rows of `gate_up`: all gates then all ups, or interleaved. Never guessed.
        gate_up_bias: ``[experts, 2n]`` (or ``[experts, n]``).
        down_bias: ``[experts, d]``.
        alpha: gain of ``swiglu_clamped``.
        limit: bound of ``swiglu_clamped``.

    Returns:
        ``[tokens, d]`` of the type and kind of `x`.

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: the message names the argument.

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import experts
        >>> x = np.ones((1, 2), np.float32)
        >>> up, down = np.ones((3, 4, 2), np.float32), np.ones((3, 2, 4), np.float32)
        >>> experts(x, np.array([[2, 0]]), np.array([[0.5, 0.25]], np.float32), up, down, activation="relu")
        array([[6., 6.]], dtype=float32)

    Source: the algebra and layouts of SonicMoE (arXiv 2512.14080), forward.
    """
    source = native("x", x)
    if source.ndim != 2:
        raise ShapeError(f"x: expected rank 2 [tokens, d], got shape {tuple(source.shape)}; flatten batch and sequence")
    out, result = like(x, tuple(source.shape))
    _core.experts(
        source,
        native("expert_ids", expert_ids),
        native("weights", weights),
        native("gate_up", gate_up),
        native("down", down),
        out,
        gate_up_bias=None if gate_up_bias is None else native("gate_up_bias", gate_up_bias),
        down_bias=None if down_bias is None else native("down_bias", down_bias),
        activation=activation,
        alpha=float(alpha),
        limit=float(limit),
        layout=layout,
    )
    return result
