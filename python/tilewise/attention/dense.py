"""Exact attention, forward: prefill and decode, grouped queries, windows, masks, sinks, selected key blocks."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

from tilewise import _core
from tilewise._arrays import broadcast, dtype_name, like, native
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["attention"]

ArrayT = TypeVar("ArrayT")


@overload
def attention(
    query: ArrayT,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Any = None,
    sinks: Any = None,
    block_indices: Any = None,
    block_size: int | None = None,
    return_lse: Literal[False] = False,
) -> ArrayT: ...
@overload
def attention(
    query: ArrayT,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Any = None,
    sinks: Any = None,
    block_indices: Any = None,
    block_size: int | None = None,
    return_lse: Literal[True],
) -> tuple[ArrayT, Any]: ...
@overload
def attention(
    query: ArrayT,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Any = None,
    sinks: Any = None,
    block_indices: Any = None,
    block_size: int | None = None,
    return_lse: bool,
) -> ArrayT | tuple[ArrayT, Any]: ...
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Any = None,
    sinks: Any = None,
    block_indices: Any = None,
    block_size: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention ``softmax(scale * Q K^T) V`` over the keys that every rule keeps.

    Query i and key j are compared at the bottom right corner: i stands at ``i + keys - queries``.

    Args:
        query: ``[batch, query_heads, queries, head_dim]``, float32, float64, float16 or bfloat16; any strides.
        key: ``[batch, key_heads, keys, head_dim]``; `key_heads` divides `query_heads` (grouped queries: head h reads
            key head ``h // (query_heads // key_heads)``).
        value: ``[batch, key_heads, keys, value_dim]``. Head dimensions are 1 to 512.
        scale: factor on the scores; ``head_dim ** -0.5`` if None.
        causal: keep ``j <= i + keys - queries``.
        window: ``(left, right)``: keep ``i + keys - queries - left <= j <= i + keys - queries + right``; -1 is
            unlimited.
        mask: boolean, broadcastable to ``[batch, query_heads, queries, keys]``; True = attend.
        sinks: ``[query_heads]``: one more logit per head that takes part in the softmax and has no value.
        block_indices: integers ``[batch, index_heads, queries, slots]``: key blocks each query may attend (MiniMax
            Sparse Attention's selection); negative slots are unused, `index_heads` divides `query_heads`.
        block_size: keys in a block of `block_indices`.
        return_lse: also return the log-sum-exp.

    Returns:
        ``[batch, query_heads, queries, value_dim]`` of the type and kind of `query`; with `return_lse` a pair with
        the natural-log LSE ``[batch, query_heads, queries]`` (float32; float64 for float64). A query that may attend
        nothing gives 0 and an LSE of -inf (its sink, if there is one).

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: the message names the argument.

    Example:
        >>> import numpy as np
        >>> from tilewise.attention import attention
        >>> q = np.zeros((1, 2, 3, 4), np.float32)
        >>> v = np.arange(3, dtype=np.float32).reshape(1, 1, 3, 1)
        >>> attention(q, q[:, :1], v, causal=True)[0, 0, :, 0]
        array([0. , 0.5, 1. ], dtype=float32)

    Source: Dao, "FlashAttention-2" (2023) for the online softmax; the conditional rescale and the exponential are
    FlashAttention-4's (docs/numerics.md); selected blocks as in MiniMax Sparse Attention (2026).
    """
    arrays = {name: native(name, array) for name, array in (("query", query), ("key", key), ("value", value))}
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ShapeError(
                f"{name}: expected rank 4 [batch, heads, length, head_dim], got shape {tuple(array.shape)}"
            )
    batch, heads, queries, head_dim = arrays["query"].shape
    keys, value_dim = arrays["value"].shape[2:]
    left, right = window_bounds(window)
    check_blocks(block_indices, block_size)
    out, result = like(query, (batch, heads, queries, value_dim))
    lse, lse_result = like(query, (batch, heads, queries), "float64" if dtype_name(query) == "float64" else "float32")
    _core.attention(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        out,
        lse,
        scale=head_dim**-0.5 if scale is None and head_dim else float(scale or 0.0),
        causal=bool(causal),
        left=left,
        right=right,
        mask=None if mask is None else expand_mask(native("mask", mask), (batch, heads, queries, keys)),
        sinks=None if sinks is None else native("sinks", sinks),
        block_indices=None if block_indices is None else native("block_indices", block_indices),
        block_size=block_size or 0,
    )
    return (result, lse_result) if return_lse else result


def window_bounds(window: tuple[int, int]) -> tuple[int | None, int | None]:
    """``(left, right)`` with None for unlimited."""
    try:
        left, right = (int(bound) for bound in window)
    except (TypeError, ValueError):
        raise ArgumentError(f"window: expected two integers (left, right), got {window!r}") from None
    if min(left, right) < -1:
        raise ArgumentError(f"window: expected bounds of at least 0, or -1 for unlimited, got {window!r}")
    return (None if left == -1 else left), (None if right == -1 else right)


def check_blocks(block_indices: Any, block_size: int | None) -> None:
    """Refuses selected blocks without their size, a size without blocks, and a size below one."""
    if (block_indices is None) != (block_size is None):
        raise ArgumentError("block_indices and block_size: expected both or neither")
    if block_size is not None and block_size < 1:
        raise ArgumentError(f"block_size: expected at least 1, got {block_size}")


def expand_mask(mask: Any, shape: tuple[int, ...]) -> Any:
    """`mask` broadcast to `shape` without a copy."""
    try:
        return broadcast(mask, shape)
    except (ValueError, RuntimeError):
        raise ShapeError(
            f"mask: expected something broadcastable to [batch, query_heads, queries, keys] = {list(shape)}, "
            f"got shape {tuple(mask.shape)}"
        ) from None
