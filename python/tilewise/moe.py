"""Mixture of experts: routers and the expert layer, forward."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from tilewise import _core
from tilewise._arrays import like, native, to_float64
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["ACTIVATIONS", "Activation", "Layout", "Scoring", "experts", "route"]

Scoring = Literal["softmax_topk", "softmax", "softmax_renormalised", "sigmoid"]
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
