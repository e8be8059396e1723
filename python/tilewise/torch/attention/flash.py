"""flash_attn 2's functions: its names, its argument order, its layout ``[batch, length, heads, head_dim]``.

The tensors are read as strided views, nothing is transposed in memory. Causality and windows are aligned to the bottom
right. Beyond flash_attn: float32 and float64, any head dimension up to 512, CPU tensors, a gradient for ALiBi slopes,
soft caps together with dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.attention.options import check_dropout, packed_sequences, window_bounds
from tilewise.attention.programs import Program, alibi, chained, softcapped
from tilewise.errors import ArgumentError, ShapeError
from tilewise.torch.attention.operators import attend, random_seed

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def score_program(softcap: float, alibi_slopes: Tensor | None, shift: Tensor, batch: int, heads: int) -> Program | None:
    """Soft cap, then ALiBi, as flash_attn orders them; `shift` is keys minus queries, ``[1]`` or one a sequence."""
    capped = softcapped(softcap) if softcap > 0 else None
    if alibi_slopes is None:
        return capped
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ShapeError(f"alibi_slopes: expected [{heads}] or [{batch}, {heads}], got {list(alibi_slopes.shape)}")
    return chained(capped, alibi(alibi_slopes, shift))


def window_fields(causal: bool, window_size: tuple[int | None, int | None]) -> dict[str, Any]:
    """Causality and window as fields of Rules; -1 and None are unlimited."""
    try:
        left, right = (-1 if bound is None else bound for bound in window_size)
    except (TypeError, ValueError):
        raise ArgumentError(f"window_size: expected two integers (left, right), got {window_size!r}") from None
    left, right = window_bounds((left, right))
    return {"causal": bool(causal), "left": left, "right": right}


def _check_rank(rank: int, layout: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ShapeError(f"{name}: expected rank {rank} {layout}, got shape {list(tensor.shape)}")


def _check_packed(name: str, tensor: Tensor, layout: str, axis: int, count: int) -> None:
    if tensor.dim() != len(layout.split()) or tensor.shape[axis] != count:
        raise ShapeError(f"{name}: expected [{layout.replace(' ', ', ')}], got {list(tensor.shape)}")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn 2's ``flash_attn_func``.

    Args:
        q: ``[B, Sq, Hq, D]``; any strides.
        k, v: ``[B, Sk, Hk, D]``; `Hk` divides `Hq`. The width of `v` may differ.
        dropout_p: probability that a weight is dropped; the seed is drawn from torch's generator.
        softmax_scale: ``D ** -0.5`` if None.
        causal: keep ``j <= i + Sk - Sq``.
        window_size: ``(left, right)`` around ``i + Sk - Sq``, inclusive; -1 is unlimited.
        softcap: ``s -> softcap * tanh(s / softcap)``; 0 or less is none.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: adds ``-slope * |i + Sk - Sq - j|``.
        deterministic: accepted; the result and the gradients always are.
        return_attn_probs: also return the LSE, and None in the place of the probabilities.

    Returns:
        ``[B, Sq, Hq, Dv]``, with `return_attn_probs` ``(out, softmax_lse [B, Hq, Sq], None)``. A query that may
        attend nothing gives 0 and an LSE of -inf (flash_attn 2 says +inf).

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: the message names the argument.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
        >>> twt.flash_attn_func(q, k, k, causal=True).shape
        torch.Size([2, 3, 4, 8])

    Source: Dao, "FlashAttention-2" (2023).
    """
    _check_rank(4, "[batch, length, heads, head_dim]", q=q, k=k, v=v)
    batch, queries, heads, _ = q.shape
    shift = torch.full((1,), k.shape[1] - queries, dtype=torch.int64, device=q.device)
    dropout = check_dropout(dropout_p)
    out, lse = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=softmax_scale,
        score=score_program(softcap, alibi_slopes, shift, batch, heads),
        dropout=dropout,
        seed=random_seed(dropout),
        **window_fields(causal, window_size),
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of one tensor ``[B, S, 3, H, D]``: queries, keys and values of the same heads.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> twt.flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 4, 8)).shape
        torch.Size([2, 5, 4, 8])
    """
    _check_packed("qkv", qkv, "batch length 3 heads head_dim", 2, 3)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one tensor ``[B, Sk, 2, Hk, D]``.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> twt.flash_attn_kvpacked_func(torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 2, 8)).shape
        torch.Size([2, 3, 4, 8])
    """
    _check_packed("kv", kv, "batch length 2 heads head_dim", 2, 2)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """flash_attn 2's ``flash_attn_varlen_func``: sequences of different lengths, packed.

    Args:
        q: ``[total_q, Hq, D]``.
        k, v: ``[total_k, Hk, D]``, or pages ``[pages, page_size, Hk, D]`` with a `block_table`.
        cu_seqlens_q, cu_seqlens_k: integers ``[B + 1]`` from 0 on; sequence i has rows ``cu[i]`` up to ``cu[i + 1]``.
            Sequences of length 0 are allowed.
        max_seqlen_q, max_seqlen_k: not needed here, so not read.
        block_table: integers ``[B, slots]``: the pages of each sequence's keys; no gradient then.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            :func:`flash_attn_func`, for each sequence alone.

    Returns:
        ``[total_q, Hq, Dv]``, with `return_attn_probs` ``(out, softmax_lse [Hq, total_q], None)``. Rows beyond
        the last sequence are 0.

    Raises:
        ShapeError, DtypeError, ArgumentError, DeviceError: the message names the argument.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> q, cu = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> twt.flash_attn_varlen_func(q, q, q, cu, cu, 3, 3, causal=True).shape
        torch.Size([5, 2, 8])
    """
    _check_rank(3, "[total_q, heads, head_dim]", q=q)
    if block_table is None:
        _check_rank(3, "[total_k, heads, head_dim]", k=k, v=v)
        key, value = k[None].transpose(1, 2), v[None].transpose(1, 2)
    else:
        _check_rank(4, "[pages, page_size, heads, head_dim]", k=k, v=v)
        key, value = k.transpose(1, 2), v.transpose(1, 2)
    sequences = packed_sequences(cu_seqlens_q, cu_seqlens_k)
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != sequences.shape[0]):
        raise ShapeError(f"block_table: expected [{sequences.shape[0]}, slots], got {list(block_table.shape)}")
    shift = sequences[:, 5] - sequences[:, 2]
    dropout = check_dropout(dropout_p)
    out, lse = attend(
        q[None].transpose(1, 2),
        key,
        value,
        scale=softmax_scale,
        score=score_program(softcap, alibi_slopes, shift, sequences.shape[0], q.shape[1]),
        dropout=dropout,
        seed=random_seed(dropout),
        sequences=sequences,
        block_table=None if block_table is None else block_table.int(),
        **window_fields(causal, window_size),
    )
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of one tensor ``[total, 3, H, D]``.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> twt.flash_attn_varlen_qkvpacked_func(torch.randn(5, 3, 2, 8), torch.tensor([0, 2, 5]), 3).shape
        torch.Size([5, 2, 8])
    """
    _check_packed("qkv", qkv, "total 3 heads head_dim", 1, 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor ``[total_k, 2, Hk, D]``.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> cu = torch.tensor([0, 2, 5])
        >>> twt.flash_attn_varlen_kvpacked_func(torch.randn(5, 4, 8), torch.randn(5, 2, 2, 8), cu, cu, 3, 3).shape
        torch.Size([5, 4, 8])
    """
    _check_packed("kv", kv, "total 2 heads head_dim", 1, 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
