"""Exact attention of NumPy arrays: prefill and decode, every rule, forward and backward."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar, Unpack, overload

import numpy as np

from tilewise import _core
from tilewise._arrays import dtype_name, is_torch, like, native
from tilewise.attention.lower import block_fields, program_of
from tilewise.attention.options import (
    AttentionOptions,
    check_blocks,
    check_dropout,
    check_seed,
    check_sequences,
    expand_mask,
    window_bounds,
    with_softcap,
)
from tilewise.attention.programs import Program
from tilewise.attention.rules import Rules
from tilewise.errors import ShapeError, UnsupportedError

__all__ = ["AttentionGradients", "attention", "attention_backward"]

ArrayT = TypeVar("ArrayT")


class AttentionGradients(NamedTuple):
    """Gradients by the arguments of :func:`attention`, in their shapes.

    ``query``, ``key`` and ``value`` have the type of `query`, the others the accumulator's (float32; float64 for
    float64). ``captures`` has one entry per array that `score_mod` captured, None for integers and bools; ``sinks`` is
    None without sinks.
    """

    query: Any
    key: Any
    value: Any
    sinks: Any
    captures: tuple[Any, ...]


def _trace(function: Any, kind: str) -> Program:
    from tilewise import expr

    mod = expr.trace(function, kind)
    return Program(mod.program, mod.captures)


def _prepared(query: Any, key: Any, value: Any, options: AttentionOptions) -> tuple[tuple[Any, Any, Any], Rules]:
    """Operands that the core reads, and the rules."""
    given: dict[str, Any] = dict(options)
    unknown = given.keys() - AttentionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"attention() got an unexpected keyword argument {min(unknown)!r}")
    operands = tuple(native(name, array) for name, array in (("query", query), ("key", key), ("value", value)))
    for name, array in zip(("query", "key", "value"), operands, strict=True):
        if array.ndim != 4:
            raise ShapeError(
                f"{name}: expected rank 4 [batch, heads, length, head_dim], got shape {tuple(array.shape)}"
            )
    batch, heads, queries, head_dim = operands[0].shape
    shape = (batch, heads, queries, operands[1].shape[2])
    get = given.get
    left, right = window_bounds(get("window", (-1, -1)))
    check_blocks(get("block_indices"), get("block_size"))
    splits = int(get("splits", 0))
    check_sequences(
        get("sequences"), get("block_table"), splits,
        mask=get("mask"), block_indices=get("block_indices"), block_mask=get("block_mask"),
    )  # fmt: skip
    score = with_softcap(get("softcap", 0.0), program_of(get("score_mod"), "score", _trace)) or Program("")
    keep, blocks = block_fields(get("block_mask"), get("mask_mod"), shape, _trace)
    keep = keep or Program("")
    scale = get("scale")
    mask, sequences, table = get("mask"), get("sequences"), get("block_table")
    rules = Rules(
        scale=float(scale) if scale is not None else head_dim**-0.5 if head_dim else 0.0,
        causal=bool(get("causal", False)),
        left=left,
        right=right,
        mask=None if mask is None else expand_mask(native("mask", mask), shape),
        sinks=_native("sinks", get("sinks")),
        block_indices=_native("block_indices", get("block_indices")),
        block_size=get("block_size") or 0,
        score_mod=score.text or None,
        score_captures=[_captured(f"score_mod capture {at}", array) for at, array in enumerate(score.captures)],
        mask_mod=keep.text or None,
        mask_captures=[_captured(f"mask_mod capture {at}", array) for at, array in enumerate(keep.captures)],
        dropout=check_dropout(get("dropout", 0.0)),
        seed=check_seed(get("seed") or 0),
        sequences=None if sequences is None else _table("sequences", sequences, "int64"),
        block_table=None if table is None else _table("block_table", table, "int32"),
        splits=splits,
        **{name: _native(name, part) if hasattr(part, "shape") else part for name, part in blocks.items()},
    )
    return (operands[0], operands[1], operands[2]), rules


def _captured(name: str, array: Any) -> Any:
    """A captured array as the core reads it; small integers, which programs may capture too, become int64."""
    if dtype_name(array) in ("int8", "int16", "uint8"):
        return array.long() if is_torch(array) else np.asarray(array).astype(np.int64)
    return native(name, array)


def _native(name: str, array: Any) -> Any:
    return None if array is None else native(name, array)


def _table(name: str, array: Any, dtype: str) -> Any:
    array = native(name, array)
    if is_torch(array):
        import torch

        return array.to(getattr(torch, dtype))
    return np.asarray(array).astype(dtype, copy=False)


def _accumulator(query: Any) -> str:
    return "float64" if dtype_name(query) == "float64" else "float32"


@overload
def attention(
    query: ArrayT, key: Any, value: Any, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
) -> ArrayT: ...
@overload
def attention(
    query: ArrayT, key: Any, value: Any, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[ArrayT, Any]: ...
@overload
def attention(
    query: ArrayT, key: Any, value: Any, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> ArrayT | tuple[ArrayT, Any]: ...
def attention(
    query: Any, key: Any, value: Any, *, return_lse: bool = False, **options: Unpack[AttentionOptions]
) -> Any:
    """Scaled dot-product attention ``softmax(mod(scale * Q K^T)) V`` over the keys that every rule keeps.

    Query i and key j are compared at the bottom right corner: i stands at ``i + keys - queries``. Programs
    (`score_mod`, `mask_mod`) see the plain indices instead.

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
        score_mod: ``f(score, batch, head, query, key) -> score``, a function of :mod:`tilewise.expr` expressions or a
            Mod (:mod:`tilewise.mods`); it changes the score after `scale` and `softcap`.
        mask_mod: ``f(batch, head, query, key) -> bool``, likewise (:mod:`tilewise.masks`); evaluated for every pair
            that the other rules keep.
        block_mask: a BlockMask instead: blocks that it does not list are never visited.
        softcap: ``s -> softcap * tanh(s / softcap)``; 0 is none.
        dropout: probability that a weight is dropped; the kept ones are divided by ``1 - dropout``. The LSE is that
            of all weights.
        seed: of the dropout; the same seed drops the same weights.
        sequences: integers ``[n, 6]``: sequences that share the arrays, as (query_batch, query_start, query_count,
            key_batch, key_start, key_count); see :func:`packed_sequences`. Causality and windows are those of each
            sequence, programs see its number as `batch` and indices that begin at 0.
        block_table: integers ``[n, slots]``: sequence i's keys are in the pages ``block_table[i]``; `key` and `value`
            are then ``[pages, key_heads, page_size, dim]``, and key_batch and key_start are not read.
        splits: for few queries over many keys: 0 cuts the keys into chunks of a fixed length (so a row does not
            depend on the batch), n into n equal parts.
        return_lse: also return the log-sum-exp.

    Returns:
        ``[batch, query_heads, queries, value_dim]`` of the type and kind of `query`; with `return_lse` a pair with
        the natural-log LSE ``[batch, query_heads, queries]`` (float32; float64 for float64). A query that may attend
        nothing, or that belongs to no sequence, gives 0 and an LSE of -inf (its sink, if there is one).

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
    FlashAttention-4's (docs/numerics.md); score and mask programs as in FlexAttention (Dong et al. 2024); selected
    blocks as in MiniMax Sparse Attention (2026).
    """
    operands, rules = _prepared(query, key, value, options)
    batch, heads, queries, _ = operands[0].shape
    out, result = like(query, (batch, heads, queries, operands[2].shape[3]))
    lse, lse_result = like(query, (batch, heads, queries), _accumulator(query))
    if rules.sequences is not None:  # rows between the sequences are nobody's
        out[...] = 0
        lse[...] = -np.inf
    _core.attention_forward(*operands, out, lse, rules)
    return (result, lse_result) if return_lse else result


def attention_backward(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    grad_out: Any,
    *,
    grad_lse: Any = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Gradients of a loss by the arguments of :func:`attention`.

    Args:
        query, key, value: as they were.
        out, lse: what :func:`attention` returned for them, under the same options (and the same `seed`).
        grad_out: the loss's gradient by `out`, same shape and type.
        grad_lse: by `lse`, if the loss depends on it.
        options: as in :func:`attention`. Keys in pages (`block_table`) have no gradient.

    Returns:
        :class:`AttentionGradients`. The gradient of a row that attends nothing is 0.

    Raises:
        UnsupportedError: with a `block_table`.
        ShapeError, DtypeError, ArgumentError, DeviceError: the message names the argument.

    Example:
        >>> import numpy as np
        >>> from tilewise.attention import attention, attention_backward
        >>> q, k, v = np.zeros((1, 1, 1, 2)), np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 1))
        >>> out, lse = attention(q, k, v, return_lse=True)
        >>> attention_backward(q, k, v, out, lse, np.ones_like(out)).value.ravel()
        array([0.5, 0.5])

    Source: Dao, "FlashAttention-2" (2023): probabilities are computed again from the LSE, and
    ``dS = P * (dO V^T - rowsum(O * dO) + dLSE)``.
    """
    operands, rules = _prepared(query, key, value, options)
    if rules.block_table is not None:
        raise UnsupportedError("attention_backward: keys in pages have no gradient; gather them (key[block_table])")
    batch, heads, queries, _ = operands[0].shape
    for name, array, shape in (
        ("out", out, (batch, heads, queries, operands[2].shape[3])),
        ("grad_out", grad_out, (batch, heads, queries, operands[2].shape[3])),
        ("lse", lse, (batch, heads, queries)),
        ("grad_lse", grad_lse, (batch, heads, queries)),
    ):
        if array is not None and tuple(array.shape) != shape:
            raise ShapeError(f"{name}: expected {list(shape)}, got {list(array.shape)}")
    made = [like(query, tuple(operand.shape)) for operand in operands]
    if rules.sequences is not None:
        for gradient, _ in made:
            gradient[...] = 0
    wide = _accumulator(query)
    sinks = (None, None) if rules.sinks is None else like(query, tuple(rules.sinks.shape), wide)
    captures = [
        like(query, tuple(capture.shape), wide) if dtype_name(capture).startswith(("float", "bfloat")) else (None, None)
        for capture in (program_of(options.get("score_mod"), "score", _trace) or Program("")).captures
    ]
    _core.attention_backward(
        *operands,
        native("out", out),
        native("lse", lse),
        native("grad_out", grad_out),
        _native("grad_lse", grad_lse),
        made[0][0],
        made[1][0],
        made[2][0],
        sinks[0],
        [gradient for gradient, _ in captures],
        rules,
    )
    return AttentionGradients(made[0][1], made[1][1], made[2][1], sinks[1], tuple(result for _, result in captures))
