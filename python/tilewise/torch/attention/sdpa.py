"""``scaled_dot_product_attention`` with torch's signature and conventions."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.attention.options import check_dropout
from tilewise.attention.programs import Program, added_bias
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.torch.attention.operators import attend, random_seed

__all__ = ["scaled_dot_product_attention"]


def _four(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """``[*lead, heads, length, dim]`` as ``[batch, heads, length, dim]``; without heads, one head."""
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.expand(*lead, -1, -1)[:, None]
    return tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, -4)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, with a gradient for a float mask.

    Args:
        query: ``[..., Hq, L, E]``, at least ``[L, E]``.
        key: ``[..., H, S, E]``; leading axes broadcast.
        value: ``[..., H, S, Ev]``.
        attn_mask: broadcastable to ``[..., Hq, L, S]``: bool, True = attend, or a float that is added to the scores.
        dropout_p: probability that a weight is dropped, whatever the module's mode; the seed is drawn from torch's
            generator.
        is_causal: query i attends keys 0 to i (aligned to the top left, as torch does).
        scale: ``E ** -0.5`` if None.
        enable_gqa: `H` may divide `Hq`.

    Returns:
        ``[..., Hq, L, Ev]`` of the type of `query`. A query that may attend nothing gives 0.

    Raises:
        ArgumentError: `attn_mask` and `is_causal` together; a dropout that is no probability.
        ShapeError, DtypeError: the message names the argument.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
        >>> out = twt.scaled_dot_product_attention(q, k, k, is_causal=True)
        >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True), atol=1e-6)
        True
    """
    dropout = check_dropout(dropout_p)
    if attn_mask is not None and is_causal:
        raise ArgumentError("attn_mask and is_causal: expected one of them; put the causal rule into the mask")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ShapeError(f"{name}: expected at least 2 axes [length, head_dim], got {tuple(tensor.shape)}")
    if not query.dim() == key.dim() == value.dim():
        raise ShapeError(f"key: expected {query.dim()} axes as in query, got {key.dim()} (value has {value.dim()})")
    rank = query.dim()
    leads = [tensor.shape[: -3 if rank > 3 else -2] for tensor in (query, key, value)]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        raise ShapeError(f"key: the leading axes {[tuple(x) for x in leads]} do not broadcast") from None
    q, k, v = (_four(tensor, lead) for tensor in (query, key, value))
    if not enable_gqa and q.shape[1] != k.shape[1]:
        if 1 not in (k.shape[1], q.shape[1]):
            raise ShapeError(f"key: {k.shape[1]} heads for {q.shape[1]} query heads; pass enable_gqa=True")
        q = q.expand(-1, max(q.shape[1], k.shape[1]), -1, -1)
    queries, keys = q.shape[2], k.shape[2]
    mask: Tensor | None = None
    score: Program | None = None
    if attn_mask is not None:
        whole = (*lead, queries, keys) if rank < 4 else (*lead, q.shape[1], queries, keys)
        given = _mask(attn_mask, whole, rank)
        if given.dtype == torch.bool:
            mask = given.expand(q.shape[0], q.shape[1], queries, keys)
        elif given.dtype.is_floating_point:
            score = added_bias(given)
        else:
            raise DtypeError(f"attn_mask: expected bool or a floating type, got {given.dtype}")
    right = None
    if is_causal:  # top left: the keys behind the queries are nobody's; then both corners are one, or shifted
        k, v = k[:, :, :queries], v[:, :, :queries]
        right = queries - k.shape[2]
    out, _ = attend(
        q, k, v, scale=scale, score=score, mask=mask, right=right, dropout=dropout, seed=random_seed(dropout)
    )
    if rank == 4:
        return out
    return out[0, 0] if rank == 2 else out[:, 0] if rank == 3 else out.unflatten(0, lead)


def _mask(mask: Tensor, whole: tuple[int, ...], rank: int) -> Tensor:
    """The mask with four axes, each of the full extent or 1."""
    if mask.dim() > len(whole) or any(
        extent not in (1, full) for extent, full in zip(reversed(mask.shape), reversed(whole), strict=False)
    ):
        raise ShapeError(f"attn_mask: expected something broadcastable to {list(whole)}, got {list(mask.shape)}")
    mask = mask.reshape((1,) * (len(whole) - mask.dim()) + tuple(mask.shape))
    if rank == 4:
        return mask
    if rank < 4:
        return mask[None, None] if rank == 2 else mask[:, None]
    return mask.expand(*whole[:-3], *mask.shape[-3:]).flatten(0, -4)
