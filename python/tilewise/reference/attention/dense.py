"""One dense problem: forward, and backward in the recompute form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ShapeError
from tilewise.reference.attention.visible import evaluate, visible

__all__ = ["Gradients", "attention", "attention_backward"]

Float = NDArray[np.float64]


class Gradients(NamedTuple):
    """What :func:`attention_backward` returns; ``captures`` has one array per capture of the score program (None for
    one that is not float)."""

    query: Float
    key: Float
    value: Float
    sinks: Float | None
    bias: Float | None
    captures: list[Float | None]


class _Problem(NamedTuple):
    """Operands with a key head per query head, modified scores before the mask, and who sees whom."""

    q: Float
    k: Float
    v: Float
    scale: float
    plain: Float
    scores: Float
    keep: NDArray[np.bool_]
    sinks: Float | None
    weight: Float


def _prepare(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None,
    sinks: ArrayLike | None,
    softcap: float,
    score_mod: str | None,
    score_captures: Any,
    bias: ArrayLike | None,
    dropout: float,
    dropout_keep: ArrayLike | None,
    first_batch: int,
    rules: dict[str, Any],
) -> _Problem:
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ShapeError(f"expected query, key and value of rank 4, got {q.shape}, {k.shape} and {v.shape}")
    batch, query_heads, query_length, width = q.shape
    key_heads, key_length = k.shape[1], k.shape[2]
    if k.shape != (batch, key_heads, key_length, width) or v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"query {q.shape}, key {k.shape} and value {v.shape} do not fit each other")
    if query_heads and (key_heads == 0 or query_heads % key_heads):
        raise ShapeError(f"{key_heads} key heads do not divide {query_heads} query heads")
    factor = width**-0.5 if scale is None else scale
    group = query_heads // max(key_heads, 1)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    keep = visible(batch, query_heads, query_length, key_length, first_batch=first_batch, **rules)
    plain = factor * np.einsum("bhid,bhjd->bhij", q, k)
    scores = plain
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    if score_mod is not None:
        scores = evaluate(score_mod, score_captures, scores.shape, first_batch, scores)
    if bias is not None:
        scores = scores + np.asarray(bias, dtype=np.float64)
    sink = None if sinks is None else np.asarray(sinks, dtype=np.float64)
    if sink is not None and sink.shape != (query_heads,):
        raise ShapeError(f"expected sinks [{query_heads}], got {sink.shape}")
    # What a probability is multiplied with on its way to the values: 1, or 0 and 1 / (1 - dropout).
    weight = np.ones(scores.shape)
    if dropout_keep is not None:
        weight = np.asarray(dropout_keep) / (1.0 - dropout) if dropout < 1 else np.zeros(scores.shape)
    return _Problem(q, k, v, factor, plain, scores, keep, sink, weight)


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None = None,
    sinks: ArrayLike | None = None,
    softcap: float = 0.0,
    score_mod: str | None = None,
    score_captures: Any = (),
    bias: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_keep: ArrayLike | None = None,
    first_batch: int = 0,
    return_lse: bool = False,
    **rules: Any,
) -> Any:
    """Exact attention in float64.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hk, Sk, D]``; query head ``h`` reads key head ``h // (Hq / Hk)``.
        value: ``[B, Hk, Sk, Dv]``.
        scale: factor on the scores; ``1 / sqrt(D)`` when not given.
        sinks: ``[Hq]``, one logit a head that takes part in the softmax and carries no value.
        softcap: ``s -> softcap * tanh(s / softcap)``, before every other change of the score; 0 is none.
        score_mod: program text of kind ``score``, with `score_captures`.
        bias: added to the scores after that; broadcastable to ``[B, Hq, Sq, Sk]``.
        dropout: probability of dropping a weight; needs `dropout_keep`, bool ``[B, Hq, Sq, Sk]``, True keeps. The
            softmax's denominator is that of all weights.
        first_batch: batch index of the first entry, for programs.
        return_lse: also return the natural logarithm of the softmax's denominator.
        rules: the conditions of :func:`visible`: ``causal``, ``window``, ``mask``, ``block_indices`` with
            ``block_size``, ``mask_mod`` with ``mask_captures``, ``blocks``.

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
    problem = _prepare(
        query, key, value, scale=scale, sinks=sinks, softcap=softcap, score_mod=score_mod,
        score_captures=score_captures, bias=bias, dropout=dropout, dropout_keep=dropout_keep, first_batch=first_batch,
        rules=rules,
    )  # fmt: skip
    output, lse = _forward(problem)
    return (output, lse) if return_lse else output


def _forward(problem: _Problem) -> tuple[Float, Float]:
    output = np.zeros((*problem.q.shape[:3], problem.v.shape[3]))
    lse = np.full(problem.q.shape[:3], -np.inf)
    # A key that is not visible must not reach the result, not even as 0 * NaN: rows are done one by one.
    for b, h, i in np.ndindex(lse.shape):
        seen = np.flatnonzero(problem.keep[b, h, i])
        scores = problem.scores[b, h, i, seen]
        logits = scores if problem.sinks is None else np.append(scores, problem.sinks[h])
        if logits.size == 0:
            continue
        peak = logits.max()
        # A peak of -inf (every score -inf) has no softmax: it is an empty row.
        if peak == -np.inf:
            continue
        total = np.exp(logits - peak).sum()
        output[b, h, i] = (np.exp(scores - peak) / total * problem.weight[b, h, i, seen]) @ problem.v[b, h, seen]
        lse[b, h, i] = peak + np.log(total)
    return output, lse


def attention_backward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    grad_out: ArrayLike,
    *,
    grad_lse: ArrayLike | None = None,
    scale: float | None = None,
    sinks: ArrayLike | None = None,
    softcap: float = 0.0,
    score_mod: str | None = None,
    score_gradient: str | None = None,
    score_captures: Any = (),
    bias: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_keep: ArrayLike | None = None,
    first_batch: int = 0,
    **rules: Any,
) -> Gradients:
    """Gradients of a loss whose gradients by :func:`attention`'s results are `grad_out` and `grad_lse`.

    Arguments as in :func:`attention`; `score_gradient` is the gradient program of `score_mod` (the core derives it;
    :func:`tilewise.reference.expr.gradients` says what it means). A row that sees no key has no gradient (but its sink's share of `grad_lse`).

    Example:
        >>> import numpy as np
        >>> q = np.zeros((1, 1, 1, 2)); k = np.ones((1, 1, 2, 2)); v = np.zeros((1, 1, 2, 1))
        >>> attention_backward(q, k, v, np.ones((1, 1, 1, 1))).value.ravel().tolist()
        [0.5, 0.5]
    """
    p = _prepare(
        query, key, value, scale=scale, sinks=sinks, softcap=softcap, score_mod=score_mod,
        score_captures=score_captures, bias=bias, dropout=dropout, dropout_keep=dropout_keep, first_batch=first_batch,
        rules=rules,
    )  # fmt: skip
    output, lse = _forward(p)
    grad_out = np.asarray(grad_out, dtype=np.float64)
    row = (output * grad_out).sum(-1)
    if grad_lse is not None:
        row = row - np.asarray(grad_lse, dtype=np.float64)
    grad_v, grad_score = np.zeros(p.v.shape), np.zeros(p.scores.shape)
    for b, h, i in np.ndindex(lse.shape):
        if lse[b, h, i] == -np.inf:
            continue
        seen = np.flatnonzero(p.keep[b, h, i])
        probability = np.exp(p.scores[b, h, i, seen] - lse[b, h, i])
        grad_probability = p.weight[b, h, i, seen] * (p.v[b, h, seen] @ grad_out[b, h, i])
        grad_v[b, h, seen] += np.outer(probability * p.weight[b, h, i, seen], grad_out[b, h, i])
        grad_score[b, h, i, seen] = probability * (grad_probability - row[b, h, i])
    grad_sinks = None
    if p.sinks is not None:
        share = np.where(lse == -np.inf, 0.0, np.exp(p.sinks[:, None] - np.where(lse == -np.inf, 0.0, lse)))
        grad_sinks = -(share * np.where(share == 0, 0.0, row)).sum((0, 2))
    grad_bias = None if bias is None else _summed(grad_score, np.shape(bias))
    grad_captures: list[Float | None] = []
    if score_mod is not None:
        assert score_gradient is not None, "the gradient program of score_mod is missing"
        grad_score, grad_captures = _through(score_gradient, score_captures, grad_score, p, softcap, first_batch)
    if softcap > 0:
        grad_score = np.where(p.keep, grad_score * (1 - np.tanh(p.plain / softcap) ** 2), 0.0)
    grad_q, grad_k = np.zeros(p.q.shape), np.zeros(p.k.shape)
    for b, h, i in np.ndindex(lse.shape):
        seen = np.flatnonzero(p.keep[b, h, i]) if lse[b, h, i] != -np.inf else []
        grad_q[b, h, i] = p.scale * grad_score[b, h, i, seen] @ p.k[b, h, seen]
        grad_k[b, h, seen] += p.scale * np.outer(grad_score[b, h, i, seen], p.q[b, h, i])
    key_heads = np.shape(key)[1]
    return Gradients(
        grad_q, _pooled(grad_k, key_heads), _pooled(grad_v, key_heads), grad_sinks, grad_bias, grad_captures
    )


def _through(text: str, captures: Any, grad: Float, p: _Problem, softcap: float, first: int) -> Any:
    """The gradient by the score that entered a program, and by what the program captured."""
    from tilewise.reference import expr

    score = p.plain if softcap <= 0 else softcap * np.tanh(p.plain / softcap)
    batch, heads, queries, keys = score.shape
    before = np.zeros((first, heads, queries, keys))  # programs count batches from 0
    by_score, by_captures = expr.gradients(
        text, captures, batch=first + batch, heads=heads, queries=queries, keys=keys,
        score=np.concatenate([before, score]), grad=np.concatenate([before, grad]),
    )  # fmt: skip
    # A derivative may be infinite where nothing is kept.
    return np.where(p.keep, by_score[first:], 0.0), by_captures


def _pooled(grad: Float, key_heads: int) -> Float:
    """Sums the query heads that share a key head."""
    batch, heads, *rest = grad.shape
    return grad.reshape(batch, key_heads, heads // max(key_heads, 1), *rest).sum(2)


def _summed(grad: Float, shape: tuple[int, ...]) -> Float:
    """Sums over the axes along which `shape` was broadcast."""
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    return grad.sum(tuple(i for i, extent in enumerate(shape) if extent == 1), keepdims=True).reshape(shape)
