"""Attention, forward (see :mod:`tilewise.attention`)."""

from __future__ import annotations

from typing import Literal, overload

import torch

from tilewise import _core
from tilewise.attention.dense import check_blocks, expand_mask, window_bounds
from tilewise.errors import ShapeError, UnsupportedError
from tilewise.torch._library import define, refuse_device

__all__ = ["attention"]

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? block_indices, float scale, "
    "bool causal, int left, int right, int block_size) -> (Tensor, Tensor)"
)


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # [batch, queries, heads, dim] in memory: what the output projection of a model reads without a copy.
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, queries), dtype=wide)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(query, value)
    _core.attention(
        query.detach(),
        key.detach(),
        value.detach(),
        out,
        lse,
        scale=scale,
        causal=causal,
        left=None if left < 0 else left,
        right=None if right < 0 else right,
        mask=mask,
        sinks=None if sinks is None else sinks.detach(),
        block_indices=block_indices,
        block_size=block_size,
    )
    return out, lse


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(query, value)


_attention = define("attention", _SCHEMA, _kernel, _fake)


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of torch tensors; arguments, results and errors as in :func:`tilewise.attention.attention`.

    The result lies in memory as ``[batch, queries, heads, value_dim]``, so ``out.transpose(1, 2).flatten(2)`` is free.

    Raises:
        UnsupportedError: a tensor that requires a gradient (the backward pass is not built yet).

    Example:
        >>> import torch
        >>> from tilewise.torch import attention
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> attention(q, q, torch.ones(1, 2, 3, 5), causal=True).shape
        torch.Size([1, 2, 3, 5])
    """
    refuse_device(query=query, key=key, value=value, mask=mask, sinks=sinks, block_indices=block_indices)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name}: expected rank 4 [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise UnsupportedError("attention: gradients are not built yet; call it under torch.no_grad()")
    check_blocks(block_indices, block_size)
    left, right = window_bounds(window)
    if mask is not None:
        mask = expand_mask(mask, (query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    result = _attention(
        query,
        key,
        value,
        mask,
        sinks,
        block_indices,
        query.shape[3] ** -0.5 if scale is None else float(scale),
        causal,
        -1 if left is None else left,
        -1 if right is None else right,
        block_size or 0,
    )
    return result if return_lse else result[0]
