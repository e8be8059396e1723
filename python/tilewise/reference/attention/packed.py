"""Many sequences in one buffer or in pages, and results over parts of the keys put together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.reference.attention.dense import Gradients, attention, attention_backward

__all__ = ["merge", "packed", "packed_backward"]

Float = NDArray[np.float64]


def _sequence(number: int, row: Any, query: Any, key: Any, value: Any, block_table: Any) -> tuple[Any, Any, Any]:
    """One sequence's operands as a batch of one; keys come from its pages where there is a table."""
    query_batch, query_start, query_count, key_batch, key_start, key_count = (int(x) for x in row)
    q = query[query_batch : query_batch + 1, :, query_start : query_start + query_count]
    if block_table is None:
        part = (slice(key_batch, key_batch + 1), slice(None), slice(key_start, key_start + key_count))
        return q, key[part], value[part]
    used = np.asarray(block_table)[number, : -(-key_count // key.shape[2])]
    k, v = (np.concatenate(list(x[used]), axis=1) if len(used) else x[:0].sum(0)[:, :0] for x in (key, value))
    return q, k[None, :, :key_count], v[None, :, :key_count]


def packed(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    sequences: ArrayLike,
    *,
    block_table: ArrayLike | None = None,
    dropout_keep: Any = None,
    **options: Any,
) -> tuple[Float, Float]:
    """:func:`attention` of each sequence alone, written where its queries lie: ``(out, lse)``.

    Args:
        query: ``[B, Hq, rows, D]``, several sequences in it.
        key: ``[B', Hk, rows', D]``, or ``[pages, Hk, page_size, D]`` with a `block_table`.
        value: as `key`, of its own width.
        sequences: ``[n, 6]``: query_batch, query_start, query_count, key_batch, key_start, key_count.
        block_table: ``[n, slots]``: the pages of each sequence, in order.
        dropout_keep: one array a sequence.
        options: those of :func:`attention`. A sequence's number is its batch index in programs.

    Rows that belong to no sequence are 0, with an LSE of -inf.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for number, row in enumerate(np.asarray(sequences)):
        keep = None if dropout_keep is None else dropout_keep[number]
        parts = _sequence(number, row, q, k, v, block_table)
        result = attention(*parts, dropout_keep=keep, first_batch=number, return_lse=True, **options)
        at = (int(row[0]), slice(None), slice(int(row[1]), int(row[1] + row[2])))
        out[at], lse[at] = result[0][0], result[1][0]
    return out, lse


def packed_backward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    grad_out: ArrayLike,
    sequences: ArrayLike,
    *,
    grad_lse: ArrayLike | None = None,
    dropout_keep: Any = None,
    **options: Any,
) -> Gradients:
    """The gradients of :func:`packed` without pages: sums over the sequences."""
    q, k, v, g = (np.asarray(x, dtype=np.float64) for x in (query, key, value, grad_out))
    grad_q, grad_k, grad_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    sinks: Any = None
    captures: list[Any] = []
    for number, row in enumerate(np.asarray(sequences)):
        keep = None if dropout_keep is None else dropout_keep[number]
        at = (slice(int(row[0]), int(row[0]) + 1), slice(None), slice(int(row[1]), int(row[1] + row[2])))
        of_key = (slice(int(row[3]), int(row[3]) + 1), slice(None), slice(int(row[4]), int(row[4] + row[5])))
        one = attention_backward(
            *_sequence(number, row, q, k, v, None), g[at], dropout_keep=keep, first_batch=number,
            grad_lse=None if grad_lse is None else np.asarray(grad_lse)[at], **options,
        )  # fmt: skip
        grad_q[at] += one.query
        grad_k[of_key] += one.key
        grad_v[of_key] += one.value
        sinks = one.sinks if sinks is None else sinks + one.sinks
        captures = one.captures if not captures else [a if a is None else a + b for a, b in zip(captures, one.captures)]
    return Gradients(grad_q, grad_k, grad_v, sinks, None, captures)


def merge(outs: ArrayLike, lses: ArrayLike) -> tuple[Float, Float]:
    """Attention over the union of disjoint key sets, from the results over each: stacked along the first axis.

    Example:
        >>> merge(np.array([[1.0], [3.0]])[..., None], np.zeros((2, 1)))[0].tolist()
        [[2.0]]
    """
    parts, logs = np.asarray(outs, dtype=np.float64), np.asarray(lses, dtype=np.float64)
    peak = logs.max(0, initial=-np.inf)
    weights = np.exp(logs - np.where(peak == -np.inf, 0.0, peak))
    total = weights.sum(0)
    # An empty part is not read: its values may be anything.
    parts = np.where(weights[..., None] == 0, 0.0, parts)
    mixed = (weights[..., None] * parts).sum(0) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return mixed, np.log(total) + np.where(peak == -np.inf, 0.0, peak)
