"""Expert weights as int8 with a float32 scale for each row: half the bytes of bfloat16, for inference."""

from __future__ import annotations

from typing import Any, NamedTuple

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ShapeError

__all__ = ["QuantisedExperts", "quantise_experts"]


class QuantisedExperts(NamedTuple):
    """What :func:`quantise_experts` returns; the fields are keywords of :func:`tilewise.moe.experts`.

    `gate_up` and `down` are int8 of the weights' shapes, the scales float32 of those shapes without the last axis.
    """

    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any


def quantise_experts(gate_up: Any, down: Any) -> QuantisedExperts:
    """Expert weights as int8, symmetric, one scale a row: ``W[e, r, :] ~ scale[e, r] * q[e, r, :]``.

    ``scale = max(abs(W[e, r, :])) / 127`` rounded to float32, ``q = W / scale`` rounded to nearest even: at most 127 in
    size, and ``abs(W - scale * q) <= scale / 2`` (but for one float64 rounding). A row of zeros has scale 0 and zeros;
    a scale that is subnormal in float32 is rounded up.

    Args:
        gate_up: ``[experts, 2n, d]`` (or ``[experts, n, d]``), float32, float64, float16 or bfloat16; any strides.
        down: ``[experts, d, n]``, floating.

    Returns:
        ``(gate_up, gate_up_scale, down, down_scale)``, C-contiguous, of the arguments' kind: pass it on as
        ``experts(x, ids, weights, **quantised._asdict())``.

    Raises:
        ShapeError, DtypeError, DeviceError: see the message.
        ArgumentError: NaN or infinity among the weights, or values above ``127 * 3.4e38`` (the place is named).

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import quantise_experts
        >>> up, down = np.array([[[1.0, -0.5, 0.1]]], np.float32), np.ones((1, 3, 1), np.float32)
        >>> quantise_experts(up, down)[:2]
        (array([[[127, -64,  13]]], dtype=int8), array([[0.00787402]], dtype=float32))

    Source: absolute maximum quantisation by rows, as LLM.int8() (arXiv 2208.07339) does to weights.
    """
    return QuantisedExperts(*_rows("gate_up", gate_up), *_rows("down", down))


def _rows(name: str, weight: Any) -> tuple[Any, Any]:
    source = native(name, weight)
    if source.ndim != 3:
        raise ShapeError(f"{name}: expected rank 3 [experts, rows, columns], got shape {tuple(source.shape)}")
    shape = tuple(source.shape)
    quantised, result = like(weight, shape, "int8")
    scale, scale_result = like(weight, shape[:2], "float32")
    _core.quantise(name, source, quantised, scale)
    return result, scale_result
