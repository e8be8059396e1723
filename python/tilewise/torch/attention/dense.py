"""Attention of torch tensors under every rule (see :mod:`tilewise.attention`), with gradients."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from tilewise.attention.blocks import BlockMask
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
from tilewise.errors import ArgumentError
from tilewise.expr import Mod
from tilewise.torch.attention.blocks import coerce
from tilewise.torch.attention.operators import attend, random_seed
from tilewise.torch.expr import trace

__all__ = ["attention", "tensor_mask", "traced"]


def _mod(function: Any, kind: str) -> Mod:
    return trace(function, kind)


def _mod_of_mask(block_mask: Any) -> Mod:
    return block_mask.mod


# torch.compile does not follow a trace, so one within a graph breaks it; a Mod, or a mask that has one, does not.
_mod_apart: Any = torch.compiler.disable(_mod)
_mod_of_mask_apart: Any = torch.compiler.disable(_mod_of_mask)


def traced(function: Any, kind: str) -> Program:
    """The program of a torch function or a Mod."""
    if isinstance(function, Mod) and function.kind == kind:
        mod = function
    else:
        mod = _mod_apart(function, kind) if torch.compiler.is_compiling() else _mod(function, kind)
    return Program(mod.program, tuple(mod.captures))


def tensor_mask(block_mask: Any) -> Any:
    """A block mask whose arrays are tensors; the NumPy floor's is taken over, others stay as they are."""
    if isinstance(block_mask, BlockMask) and not isinstance(block_mask.kv_num_blocks, Tensor):
        return coerce(block_mask)
    if isinstance(block_mask, BlockMask) and block_mask._mod is None and torch.compiler.is_compiling():
        _mod_of_mask_apart(block_mask)
    return block_mask


def as_seed(seed: int | Tensor | None, dropout: float) -> Tensor | None:
    """The seed as the operator takes it; a fresh one if there is dropout and none was given."""
    if seed is None:
        return random_seed(dropout)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ArgumentError(f"seed: expected an integer or one int64, got {seed.dtype} {list(seed.shape)}")
        return seed.reshape(())
    seed = check_seed(seed)
    return torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64)


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of torch tensors; arguments, results and errors as in :func:`tilewise.attention.attention`.

    Differentiable by `query`, `key`, `value`, `sinks` and the float tensors that `score_mod` captured, through the
    result and through the LSE. `score_mod` and `mask_mod` are functions of torch operations, or Mods; `seed` None
    draws one from torch's generator (so ``torch.manual_seed`` and activation checkpointing fix the dropout). Under
    autocast, query, key and value are cast to its type.

    The result lies in memory as ``[batch, queries, heads, value_dim]``, so ``out.transpose(1, 2).flatten(2)`` is free.

    Raises:
        UnsupportedError: a second derivative, a gradient of keys in pages, a captured tensor of `mask_mod` that
            requires a gradient.

    Example:
        >>> import torch
        >>> from tilewise.torch import attention
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> attention(q, q, torch.ones(1, 2, 3, 5), causal=True).shape
        torch.Size([1, 2, 3, 5])
    """
    given: dict[str, Any] = dict(options)
    unknown = given.keys() - AttentionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"attention() got an unexpected keyword argument {min(unknown)!r}")
    get = given.get
    left, right = window_bounds(get("window", (-1, -1)))
    check_blocks(get("block_indices"), get("block_size"))
    splits, mask, sequences, table = int(get("splits", 0)), get("mask"), get("sequences"), get("block_table")
    check_sequences(
        sequences, table, splits, mask=mask, block_indices=get("block_indices"), block_mask=get("block_mask")
    )
    fields: dict[str, Any] = {}
    keep = program_of(get("mask_mod"), "mask", traced)
    if query.dim() == key.dim() == 4:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        keep, fields = block_fields(tensor_mask(get("block_mask")), keep, shape, traced)
        mask = None if mask is None else expand_mask(mask, shape)
    dropout = check_dropout(get("dropout", 0.0))
    result = attend(
        query,
        key,
        value,
        scale=get("scale"),
        score=with_softcap(get("softcap", 0.0), program_of(get("score_mod"), "score", traced)),
        keep=keep,
        causal=bool(get("causal", False)),
        left=left,
        right=right,
        mask=mask,
        sinks=get("sinks"),
        block_indices=get("block_indices"),
        block_size=get("block_size") or 0,
        dropout=dropout,
        seed=as_seed(get("seed"), dropout),
        sequences=None if sequences is None else sequences.long(),
        block_table=None if table is None else table.int(),
        splits=splits,
        **fields,
    )
    return result if return_lse else result[0]
