"""The meaning of :mod:`tilewise.attention`: softmax attention over a visibility rule.

``O[i] = sum_j softmax_j(scale * Q[i].K[j]) V[j]`` over the keys that every condition keeps (Vaswani et al. 2017);
a sink (gpt-oss) is one more logit in the denominator that carries no value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError, ShapeError

__all__ = ["attention", "visible"]


def visible(
    batch: int,
    query_heads: int,
    query_length: int,
    key_length: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: ArrayLike | None = None,
    block_indices: ArrayLike | None = None,
    block_size: int | None = None,
) -> NDArray[np.bool_]:
    """Which keys each query may attend: bool ``[batch, query_heads, query_length, key_length]``.

    Every condition narrows the one before. Query ``i`` stands at key position ``i + key_length - query_length``
    (bottom-right alignment), which ``causal`` and ``window`` refer to.

    Example:
        >>> visible(1, 1, 2, 3, causal=True)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    position = np.arange(query_length)[:, None] + (key_length - query_length)
    key = np.arange(key_length)[None, :]
    keep = np.ones((query_length, key_length), dtype=bool)
    if causal:
        keep &= key <= position
    left, right = window
    if left < -1 or right < -1:
        raise ArgumentError(f"window must hold lengths >= 0, or -1 for unlimited, got {window}")
    if left >= 0:
        keep &= key >= position - left
    if right >= 0:
        keep &= key <= position + right
    full = np.broadcast_to(keep, (batch, query_heads, query_length, key_length)).copy()
    if mask is not None:
        allowed = np.asarray(mask)
        if allowed.dtype != np.bool_:
            raise ArgumentError(f"mask must be bool (True = keep), got {allowed.dtype}")
        full &= np.broadcast_to(allowed, full.shape)
    if block_indices is not None:
        if block_size is None or block_size <= 0:
            raise ArgumentError(f"block_indices needs a block_size >= 1, got {block_size}")
        blocks = np.asarray(block_indices)
        if blocks.ndim != 4 or blocks.shape[0] != batch or blocks.shape[2] != query_length:
            raise ShapeError(f"expected block_indices [{batch}, Hg, {query_length}, K], got {blocks.shape}")
        groups = blocks.shape[1]
        if groups == 0 or query_heads % groups:
            raise ShapeError(f"block_indices has {groups} groups, which do not divide {query_heads} query heads")
        block_of_key = np.arange(key_length) // block_size
        listed = (blocks[..., None] == block_of_key).any(axis=-2)
        full &= np.repeat(listed, query_heads // groups, axis=1)
    return full


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    block_indices: ArrayLike | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exact attention in float64.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hk, Sk, D]``; query head ``h`` reads key head ``h // (Hq / Hk)``.
        value: ``[B, Hk, Sk, Dv]``.
        scale: factor on the scores; ``1 / sqrt(D)`` when not given.
        causal: keep ``j <= i + Sk - Sq``.
        window: ``(left, right)``, inclusive distances around ``i + Sk - Sq``; -1 is unlimited.
        mask: bool, broadcastable to ``[B, Hq, Sq, Sk]``, True keeps.
        sinks: ``[Hq]``, one logit a head that takes part in the softmax and carries no value.
        block_indices: integers ``[B, Hg, Sq, K]``, ``Hg`` divides ``Hq``; -1 is unused; keeps the keys of the
            listed blocks only.
        block_size: keys a block.
        return_lse: also return the natural logarithm of the softmax's denominator.

    Returns:
        float64 ``[B, Hq, Sq, Dv]``, with ``return_lse`` also ``[B, Hq, Sq]``. A row that sees no key gives zeros
        and an LSE of ``-inf`` (the sink's value with a sink).

    Raises:
        ShapeError: ranks or extents do not fit.
        ArgumentError: a mask is not bool, a window is below -1, a block size is missing.

    Example:
        >>> import numpy as np
        >>> q = np.zeros((1, 2, 1, 4)); k = np.zeros((1, 1, 2, 4)); v = np.array([[[[1.0], [3.0]]]])
        >>> attention(q, k, v).ravel().tolist()
        [2.0, 2.0]
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ShapeError(f"expected query, key and value of rank 4, got {q.shape}, {k.shape} and {v.shape}")
    batch, query_heads, query_length, width = q.shape
    key_heads, key_length = k.shape[1], k.shape[2]
    if k.shape != (batch, key_heads, key_length, width) or v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"query {q.shape}, key {k.shape} and value {v.shape} do not fit each other")
    if key_heads == 0 or query_heads % key_heads:
        raise ShapeError(f"{key_heads} key heads do not divide {query_heads} query heads")
    factor = width**-0.5 if scale is None else scale
    group = query_heads // key_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    keep = visible(
        batch, query_heads, query_length, key_length,
        causal=causal, window=window, mask=mask, block_indices=block_indices, block_size=block_size,
    )  # fmt: skip
    # A key that is not visible must not reach the result, not even as 0 * NaN: rows are done one by one.
    output = np.zeros((batch, query_heads, query_length, v.shape[3]))
    lse = np.full((batch, query_heads, query_length), -np.inf)
    sink = None if sinks is None else np.asarray(sinks, dtype=np.float64)
    if sink is not None and sink.shape != (query_heads,):
        raise ShapeError(f"expected sinks [{query_heads}], got {sink.shape}")
    for b, h, i in np.ndindex(lse.shape):
        seen = np.flatnonzero(keep[b, h, i])
        scores = factor * (k[b, h, seen] @ q[b, h, i])
        logits = scores if sink is None else np.append(scores, sink[h])
        if logits.size == 0:
            continue
        peak = logits.max()
        # A peak of -inf (every score -inf) has no softmax: it is an empty row.
        if peak == -np.inf:
            continue
        total = np.exp(logits - peak).sum()
        output[b, h, i] = (np.exp(scores - peak) / total) @ v[b, h, seen]
        lse[b, h, i] = peak + np.log(total)
    return (output, lse) if return_lse else output
