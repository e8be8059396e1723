"""Attention over a union of key sets, from the results over each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise._arrays import dtype_name, is_torch, like, native, to_float64
from tilewise.errors import ShapeError

__all__ = ["merge"]


def merge(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Combines attention over disjoint parts of the keys: ring attention, shared prefixes, split keys.

    ``LSE = log sum_p e^{LSE_p}`` and ``O = sum_p e^{LSE_p - LSE} O_p``. Up to rounding the operation is associative
    and commutative, and a part that attended nothing (LSE of -inf) changes nothing; its values are not read.

    Args:
        outs: a sequence of ``[..., value_dim]`` arrays, or one array with the parts along its first axis.
        lses: their natural-log LSEs ``[...]``.

    Returns:
        ``(out, lse)`` of the kind of the parts, `out` of their type. Where every part is empty, 0 and -inf.

    Raises:
        ShapeError: no parts, or parts of different shapes.

    Example:
        >>> import numpy as np
        >>> from tilewise.attention import merge
        >>> out, lse = merge([np.full((1, 2), 1.0), np.full((1, 2), 3.0)], [np.zeros(1), np.zeros(1)])
        >>> out
        array([[2., 2.]])

    Source: Dao et al., "Flash-Decoding" (2023).
    """
    parts, logs = list(outs), list(lses)
    if not parts or len(parts) != len(logs):
        raise ShapeError(f"merge: expected as many outs as lses and at least one, got {len(parts)} and {len(logs)}")
    for number, (part, log) in enumerate(zip(parts, logs, strict=True)):
        shape = tuple(parts[0].shape)
        if tuple(part.shape) != shape or tuple(log.shape) != shape[:-1]:
            raise ShapeError(
                f"merge: part {number} has {list(part.shape)} with an LSE of {list(log.shape)}, expected {list(shape)} "
                f"with {list(shape[:-1])}"
            )
    if is_torch(parts[0]):
        from tilewise.torch.attention import merge_attention

        return merge_attention(parts, logs)
    wide = np.stack([to_float64(log) for log in logs])
    peak = wide.max(0)
    weights = np.exp(wide - np.where(peak == -np.inf, 0.0, peak))
    total = weights.sum(0)
    mixed = np.zeros(tuple(parts[0].shape))
    for part, weight in zip(parts, weights, strict=True):
        mixed += np.where(weight == 0, 0.0, weight)[..., None] * np.where(weight[..., None] == 0, 0.0, to_float64(part))
    mixed /= np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        log = np.log(total) + np.where(peak == -np.inf, 0.0, peak)
    out, result = like(native("outs", parts[0]) if is_torch(parts[0]) else parts[0], mixed.shape)
    lse, lse_result = like(logs[0], log.shape)
    out[...] = mixed if dtype_name(parts[0]) != "bfloat16" else mixed.astype(parts[0].dtype).view(np.uint16)
    lse[...] = log
    return result, lse_result
