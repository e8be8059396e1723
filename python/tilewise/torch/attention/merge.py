"""Attention over a union of key sets, from the results over each of them: plain torch operations, so differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.errors import ShapeError

__all__ = ["merge_attention"]


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`tilewise.attention.merge` of torch tensors on any device, differentiable by every part.

    Args:
        outs: parts ``[..., value_dim]``, over disjoint keys.
        lses: their natural-log LSEs ``[...]``.

    Returns:
        ``(out, lse)``: `out` in the parts' type, computed in the type of the LSEs.

    Raises:
        ShapeError: no parts, or parts of different shapes.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> q, k, v = torch.randn(3, 1, 2, 8, 4).unbind(0)
        >>> halves = [twt.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(5), slice(5, 8))]
        >>> out, lse = twt.merge_attention(*zip(*halves))
        >>> torch.allclose(out, twt.attention(q, k, v), atol=1e-6)
        True
    """
    parts, logs = list(outs), list(lses)
    if not parts or len(parts) != len(logs):
        raise ShapeError(f"merge: expected as many outs as lses and at least one, got {len(parts)} and {len(logs)}")
    for number, (part, log) in enumerate(zip(parts, logs, strict=True)):
        if part.shape != parts[0].shape or log.shape != part.shape[:-1]:
            raise ShapeError(
                f"merge: part {number} has {list(part.shape)} with an LSE of {list(log.shape)}, expected "
                f"{list(parts[0].shape)} with {list(parts[0].shape[:-1])}"
            )
    stacked = torch.stack(logs)
    peak = stacked.detach().amax(0)
    # The one guard: -inf - -inf. An empty part has the weight 0, and its values are not read, NaN or not.
    weights = torch.exp(stacked - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights.sum(0)
    empty = total == 0
    shares = weights / torch.where(empty, 1.0, total)
    mixed = torch.zeros_like(parts[0], dtype=stacked.dtype)
    for part, share in zip(parts, shares, strict=True):
        used = torch.where((share == 0)[..., None], 0.0, part.to(stacked.dtype))
        mixed = mixed + share[..., None] * used
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)) + peak)
    return mixed.to(parts[0].dtype), lse
