"""The meaning of :mod:`tilewise.moe.quantise`: bytes and scales, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["dequantise", "quantise_experts"]


def _quantise(name: str, weight: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    w = np.asarray(weight, dtype=np.float64)
    if w.ndim != 3:
        raise ShapeError(f"expected {name} [experts, rows, columns], got {w.shape}")
    if not np.isfinite(w).all():
        raise ArgumentError(f"{name} holds NaN or infinity")
    top = np.abs(w).max(axis=-1, initial=0.0)
    scale = (top / 127.0).astype(np.float32)
    # A subnormal scale has few bits: rounded down, the largest element would not fit.
    short = (scale < np.finfo(np.float32).tiny) & (scale.astype(np.float64) * 127.0 < top)
    scale = np.where(short, np.nextafter(scale, np.float32(1)), scale)
    divisor = np.where(scale == 0, 1.0, scale.astype(np.float64))
    return np.rint(w / divisor[..., None]).astype(np.int8), scale


def dequantise(quantised: ArrayLike, scale: ArrayLike) -> NDArray[np.float64]:
    """``scale[e, r] * q[e, r, :]``, exact in float64.

    Example:
        >>> dequantise([[[2, -1]]], [[0.5]]).tolist()
        [[[1.0, -0.5]]]
    """
    return np.asarray(quantised, dtype=np.float64) * np.asarray(scale, dtype=np.float64)[..., None]


def quantise_experts(
    gate_up: ArrayLike, down: ArrayLike
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """Weights ``[experts, rows, columns]`` as int8 with one float32 scale a row.

    Args:
        gate_up: ``[E, 2n, d]`` or ``[E, n, d]``.
        down: ``[E, d, n]``.

    Returns:
        ``(gate_up, gate_up_scale, down, down_scale)``.

    Raises:
        ShapeError: another rank.
        ArgumentError: NaN or infinity.

    Example:
        >>> quantise_experts([[[1.0, -0.5]]], [[[0.0]]])[0].tolist()
        [[[127, -64]]]
    """
    return (*_quantise("gate_up", gate_up), *_quantise("down", down))
