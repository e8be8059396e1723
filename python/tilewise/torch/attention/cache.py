"""``flash_attn_with_kvcache``: append to a cache in place, rotate, attend; contiguous or in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tilewise.torch.attention.flash import score_program, window_fields
from tilewise.torch.attention.operators import attend

__all__ = ["flash_attn_with_kvcache"]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of ``x [B, S, H, D]`` by ``cos, sin [B, S, rotary_dim / 2]``; the rest of D is left alone.

    Pairs are (0, 1), (2, 3), ... if interleaved, else (0, rotary_dim / 2), ... Computed in float32 at least.
    """
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[:, :, None, :].to(wide) for table in (cos, sin))
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _lengths(name: str, given: int | Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor):
        return torch.full((batch,), int(given), dtype=torch.int64, device=device)
    if tuple(given.shape) != (batch,):
        raise ShapeError(f"{name}: expected [{batch}], got {list(given.shape)}")
    if given.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"{name}: expected int32 or int64, got {given.dtype}")
    return given.long()


def _append(cache: Tensor, new: Tensor, rows: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """Writes ``new [B, S, H, D]`` at `positions` of the cache rows, or of the pages of each sequence."""
    if block_table is None:
        cache[rows[:, None], positions] = new.to(cache.dtype)
        return
    page_size = cache.shape[1]
    pages = block_table.long().gather(1, positions // page_size)
    cache[pages, positions % page_size] = new.to(cache.dtype)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """flash_attn 2's ``flash_attn_with_kvcache``: one step of decoding (or of a chunked prefill) on a cache.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k_cache, v_cache: ``[rows, length, Hk, D]``, or pages ``[pages, page_size, Hk, D]`` with a `block_table` (any
            page size). With `k` and `v` they are **written in place**.
        k, v: ``[B, S_new, Hk, D]``: appended at ``cache_seqlens``, before attending.
        rotary_cos, rotary_sin: ``[positions, rotary_dim / 2]``, only beside `k`. Keys are rotated at
            ``cache_seqlens + i``; so are queries if `causal` or a window is set, else all at ``cache_seqlens``.
        cache_seqlens: int or integers ``[B]``: how long each sequence is before the append; the whole cache if None.
        cache_batch_idx: integers ``[B]``: the cache row of each sequence; 0, 1, ... if None.
        cache_leftpad: integers ``[B]``: where each sequence begins in its row; 0 if None.
        block_table: integers ``[B, slots]``: the pages of each sequence.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in
            :func:`~tilewise.torch.attention.flash.flash_attn_func`.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else the first half with the second.
        num_splits: 0 cuts the keys into chunks of a fixed length, so a row does not depend on the batch; n into n.
        return_softmax_lse: also return the LSE.

    Returns:
        ``[B, Sq, Hq, Dv]``; with `return_softmax_lse` a pair with ``[B, Hq, Sq]``.

    Raises:
        UnsupportedError: a tensor that requires a gradient (there is no backward); pages with `cache_batch_idx` or
            `cache_leftpad`, as in flash_attn.
        ArgumentError: `k` without `v` or without `cache_seqlens`, rotary tables without `k`.
        ShapeError: among others, a cache too short for the append. DtypeError, DeviceError.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> cache_k, cache_v = torch.zeros(2, 16, 2, 8), torch.zeros(2, 16, 2, 8)
        >>> q, new = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
        >>> lengths = torch.tensor([3, 7], dtype=torch.int32)
        >>> out = twt.flash_attn_with_kvcache(q, cache_k, cache_v, new, new, cache_seqlens=lengths)
        >>> torch.equal(cache_k[1, 7], new[1, 0])
        True

    Source: Dao et al., "Flash-Decoding" (2023); rotary embedding: Su et al., "RoFormer" (2021).
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() != 4:
            raise ShapeError(f"{name}: expected rank 4 [batch, length, heads, head_dim], got {list(tensor.shape)}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"flash_attn_with_kvcache: {name} requires a gradient and there is no backward; call it under "
                "torch.no_grad(), or use flash_attn_func"
            )
    if (k is None) != (v is None):
        raise ArgumentError("k and v: expected both or neither")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise ArgumentError("rotary_cos and rotary_sin: expected both, beside k and v, or neither")
    if k is not None and cache_seqlens is None:
        raise ArgumentError("cache_seqlens: expected beside k and v; it says where they are written")
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise UnsupportedError(
            "block_table: pages cannot be combined with cache_batch_idx or cache_leftpad; put the rows and their begin "
            "into the table"
        )
    batch, queries, heads, _ = q.shape
    device = q.device
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != batch):
        raise ShapeError(f"block_table: expected [{batch}, slots], got {list(block_table.shape)}")
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = _lengths("cache_seqlens", room if cache_seqlens is None else cache_seqlens, batch, device)
    assert lengths is not None
    rows = _lengths("cache_batch_idx", cache_batch_idx, batch, device)
    if rows is None:
        rows = torch.arange(batch, device=device)
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] != batch:
        raise ShapeError(f"k_cache: expected {batch} rows as in q (or a cache_batch_idx), got {k_cache.shape[0]}")
    begins = _lengths("cache_leftpad", cache_leftpad, batch, device)
    if begins is None:
        begins = torch.zeros_like(lengths)
    total = lengths
    window = window_fields(causal, window_size)
    if k is not None and v is not None:
        steps = torch.arange(k.shape[1], device=device)
        positions = lengths[:, None] + steps
        total = lengths + k.shape[1]
        _check_room(q, lengths, total, room, rows, k_cache.shape[0])
        if rotary_cos is not None and rotary_sin is not None:
            of_queries = torch.arange(queries, device=device)
            if not causal and window["left"] is None and window["right"] is None:
                of_queries = torch.zeros_like(of_queries)
            at = lengths[:, None] + of_queries
            k = _rotated(k, *_table(rotary_cos, rotary_sin, positions, k.shape[3]), rotary_interleaved)
            q = _rotated(q, *_table(rotary_cos, rotary_sin, at, q.shape[3]), rotary_interleaved)
        with torch.no_grad():
            _append(k_cache, k, rows, positions, block_table)
            _append(v_cache, v, rows, positions, block_table)
    zero = torch.zeros_like(lengths)
    count = total - begins
    columns = (torch.arange(batch, device=device), zero, zero + queries, rows, begins, count)
    out, lse = attend(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        scale=softmax_scale,
        score=score_program(softcap, alibi_slopes, count - queries, batch, heads),
        sequences=torch.stack(columns, -1),
        block_table=None if block_table is None else block_table.int(),
        splits=num_splits,
        **window,
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_room(q: Tensor, lengths: Tensor, total: Tensor, room: int, rows: Tensor, count: int) -> None:
    """Refuses an append outside the cache. Only where looking costs nothing: not on a GPU, not under torch.compile."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not len(total):
        return
    if int(lengths.min()) < 0 or int(total.max()) > room:
        raise ShapeError(
            f"k_cache: sequences of up to {int(total.max())} keys after the append (cache_seqlens from "
            f"{int(lengths.min())}) do not fit {room}; make the cache longer, or use more pages"
        )
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        raise ShapeError(f"cache_batch_idx: expected rows from 0 to {count - 1}, got {rows.tolist()}")


def _table(cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The tables' rows at some positions."""
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ShapeError(
            f"rotary_cos: expected [positions, rotary_dim / 2] with rotary_dim up to {head_dim}, like rotary_sin; got "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    cheap = positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel() > 0
    if cheap and int(positions.max()) >= cos.shape[0]:
        raise ShapeError(f"rotary_cos: {cos.shape[0]} positions, and position {int(positions.max())} is needed")
    return cos[positions], sin[positions]
