"""The expert layer, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from tilewise import _core
from tilewise._arrays import dtype_name, like, native
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ExpertGradients",
    "Layout",
    "experts",
    "experts_backward",
    "experts_forward",
]

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


class ExpertGradients(NamedTuple):
    """Gradients of :func:`experts`, one for each argument of that name; ``None`` where not asked for.

    `weights` has the shape of ``expert_ids`` and is float32 (float64 for a float64 `x`); the others have their
    argument's shape and the type of `x`.
    """

    x: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any


def _operands(
    x: Any,
    expert_ids: Any,
    weights: Any,
    token_ids: Any,
    gate_up: Any,
    down: Any,
    gate_up_bias: Any,
    down_bias: Any,
    gate_up_scale: Any = None,
    down_scale: Any = None,
) -> tuple[Any, ...]:
    """The arrays as the core reads them, in the binding's order."""
    source = native("x", x)
    if source.ndim != 2:
        raise ShapeError(f"x: expected rank 2 [tokens, d], got shape {tuple(source.shape)}; flatten batch and sequence")
    return (
        source,
        native("expert_ids", expert_ids),
        native("weights", weights),
        None if token_ids is None else native("token_ids", token_ids),
        native("gate_up", gate_up, int8=True),
        native("down", down, int8=True),
        None if gate_up_bias is None else native("gate_up_bias", gate_up_bias),
        None if down_bias is None else native("down_bias", down_bias),
        None if gate_up_scale is None else native("gate_up_scale", gate_up_scale),
        None if down_scale is None else native("down_scale", down_scale),
    )


def _refuse_int8(operation: str, gate_up: Any, down: Any) -> None:
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if dtype_name(native(name, weight, int8=True)) == "int8":
            raise UnsupportedError(
                f"{operation}: expected a floating {name}, got int8, which experts takes for inference only; "
                f"dequantise for training ({name} * {name}_scale[..., None], in the type of x)"
            )


def experts(
    x: ArrayT,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    gate_up_scale: Any = None,
    down_scale: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> ArrayT:
    """The expert layer: ``out[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])``.

    ``expert(x) = act(x @ gate_up.T + gate_up_bias) @ down.T + down_bias``. Products and sums are accumulated in float32
    (float64 for float64); the activation is rounded to the type of `x` before the second product, the result once.

    `gate_up` and `down` may be int8 with a scale for each row (:func:`quantise_experts`): a weight is then
    ``scale[e, r] * w[e, r, :]``, and only its bytes are read from memory. Products of bytes are accumulated like any
    other, and the sums scaled before the bias.

    Args:
        x: ``[tokens, d]``, float32, float64, float16 or bfloat16; any strides.
        expert_ids: ``[tokens, slots]``, int32 or int64; ids outside ``0..experts`` are skipped (expert parallelism).
        weights: ``[tokens, slots]``, floating.
        gate_up: ``[experts, 2n, d]``, or ``[experts, n, d]`` for an activation without a gate; any strides, so a
            checkpoint that stores ``[experts, d, 2n]`` passes ``w.transpose(1, 2)``.
        down: ``[experts, d, n]``.
        token_ids: ``[pairs]``, int32 or int64, ascending: then `expert_ids` and `weights` are ``[pairs]`` too, and a
            token has as many experts as it has pairs, none included (what token rounding gives). A pair that stands
            twice counts twice.
        activation: ``swiglu``, ``geglu`` (exact), ``geglu_tanh``, ``reglu``, ``swiglu_clamped`` (MiniMax-M3, gpt-oss:
            ``(clamp(u, -limit, limit) + 1) * g * sigmoid(alpha * g)``, ``g = min(gate, limit)``); without a gate
            ``silu``, ``gelu`` (exact), ``gelu_tanh``, ``relu``, ``relu2``.
        layout: order of the rows of `gate_up`: all gates then all ups, or interleaved. Never guessed.
        gate_up_bias: ``[experts, 2n]`` (or ``[experts, n]``).
        down_bias: ``[experts, d]``.
        gate_up_scale: ``[experts, 2n]`` (or ``[experts, n]``), float32: with an int8 `gate_up`, and only then.
        down_scale: ``[experts, d]``, float32: with an int8 `down`, and only then.
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

    Source: the algebra and layouts of SonicMoE (arXiv 2512.14080).
    """
    arrays = _operands(
        x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale
    )
    out, result = like(x, tuple(arrays[0].shape))
    _core.experts(arrays, (activation, float(alpha), float(limit), layout), out, None)
    return result


def experts_forward(
    x: ArrayT,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[ArrayT, ArrayT]:
    """:func:`experts`, and what :func:`experts_backward` needs beside the inputs.

    Returns:
        ``(out, pre_activation)``: the second is ``[pairs, 2n]`` (``[pairs, n]`` without a gate) of the type of `x`,
        ``pairs`` the number of elements of `expert_ids`: the first product with its bias, rows grouped by expert
        (within one, in pair order), all gates then all ups whatever the `layout`; zeros in the last rows where
        ids were skipped.

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: as :func:`experts`.
        UnsupportedError: int8 weights.

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import experts_forward
        >>> x, up, down = np.ones((1, 2), np.float32), np.ones((3, 4, 2), np.float32), np.ones((3, 2, 4), np.float32)
        >>> experts_forward(x, np.array([[2]]), np.ones((1, 1), np.float32), up, down, activation="relu")[1]
        array([[2., 2., 2., 2.]], dtype=float32)
    """
    _refuse_int8("experts_forward", gate_up, down)
    arrays = _operands(x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias)
    out, result = like(x, tuple(arrays[0].shape))
    pre, kept = like(x, (math.prod(expert_ids.shape), gate_up.shape[1] if gate_up.ndim == 3 else 0))
    _core.experts(arrays, (activation, float(alpha), float(limit), layout), out, pre)
    return result, kept


def experts_backward(
    grad: ArrayT,
    pre_activation: ArrayT,
    x: ArrayT,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    wanted: Sequence[str] = ExpertGradients._fields,
) -> ExpertGradients:
    """Gradients of :func:`experts` from its inputs and the pre-activation: nothing else is kept between the passes.

    Args:
        grad: gradient of the result, ``[tokens, d]`` of the type of `x`; any strides, expanded ones included.
        pre_activation: as :func:`experts_forward` returned it for the same arguments.
        x, expert_ids, weights, gate_up, down, token_ids, activation, layout, gate_up_bias, down_bias, alpha, limit: as
            in :func:`experts`.
        wanted: names of the gradients to compute (fields of :class:`ExpertGradients`); a bias that is not there has
            none.

    Returns:
        The gradients; exact zeros for the weights of experts that no token went to, and for skipped pairs. They do not
        depend on the number of threads.

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: as :func:`experts`; ArgumentError for an unknown name.
        UnsupportedError: int8 weights.

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import experts_backward, experts_forward
        >>> x, up, down = np.ones((1, 2), np.float32), np.ones((3, 4, 2), np.float32), np.ones((3, 2, 4), np.float32)
        >>> call = (x, np.array([[2]]), np.ones((1, 1), np.float32), up, down)
        >>> out, pre = experts_forward(*call, activation="relu")
        >>> experts_backward(np.ones_like(out), pre, *call, activation="relu").weights
        array([[16.]], dtype=float32)

    Source: SonicMoE (arXiv 2512.14080), section 3: ``d weights = <dA', A>`` row by row, so that neither the rows'
    outputs nor gathered copies are kept.
    """
    unknown = [name for name in wanted if name not in ExpertGradients._fields]
    if unknown:
        raise ArgumentError(f"wanted: expected names among {', '.join(ExpertGradients._fields)}, got {unknown[0]!r}")
    _refuse_int8("experts_backward", gate_up, down)
    arrays = _operands(x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias)
    accumulator = "float64" if dtype_name(x) == "float64" else "float32"
    targets = {
        "x": (x, None),
        "weights": (expert_ids, accumulator),
        "gate_up": (gate_up, None),
        "down": (down, None),
        "gate_up_bias": (gate_up_bias, None),
        "down_bias": (down_bias, None),
    }
    outputs: list[Any] = []
    results: list[Any] = []
    for name, (shaped, dtype) in targets.items():
        out, result = (None, None)
        if name in wanted and shaped is not None:
            out, result = like(x, tuple(shaped.shape), dtype)
        outputs.append(out)
        results.append(result)
    _core.experts_backward(
        native("grad", grad),
        native("pre_activation", pre_activation),
        arrays,
        (activation, float(alpha), float(limit), layout),
        tuple(outputs),
    )
    return ExpertGradients(*results)
