"""``flex_attention`` with the signature of ``torch.nn.attention.flex_attention`` (torch 2.15)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from tilewise.attention.lower import block_fields, program_of
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError
from tilewise.torch.attention.dense import tensor_mask, traced
from tilewise.torch.attention.operators import attend

__all__ = ["AuxOutput", "AuxRequest", "flex_attention"]

# Options of torch's kernels: they choose tiles and schedules, not values.
_OPTIONS = frozenset(
    (
        "num_warps", "num_stages", "BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2",
        "PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "WRITE_DQ", "FORCE_USE_FLEX_ATTENTION",
        "USE_TMA", "SPLIT_KV", "PARTITION_SIZE", "OUTPUT_LOGSUMEXP", "OUTPUT_MAX", "BACKEND", "kpack",
        "matrix_instr_nonkdim", "waves_per_eu",
    )
)  # fmt: skip


def _check_options(options: Mapping[str, Any] | None) -> None:
    for name in options or {}:
        if name.removeprefix("fwd_").removeprefix("bwd_") not in _OPTIONS:
            warnings.warn(f"kernel_options: {name!r} is not an option of flex_attention; ignored", stacklevel=3)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Attention under a score function and a block mask, as torch's ``flex_attention``, with a backward on the CPU.

    Args:
        query: ``[B, Hq, L, E]``.
        key: ``[B, Hk, S, E]``; its batch may be 1 beside a block mask made for the query's.
        value: ``[B, Hk, S, Ev]``.
        score_mod: ``f(score, b, h, q, k) -> score``, of torch operations, or a Mod (:mod:`tilewise.mods`). Float
            tensors that it captures get gradients.
        block_mask: tilewise's or torch's BlockMask.
        scale: ``E ** -0.5`` if None.
        enable_gqa: allow fewer key heads than query heads.
        return_lse: also return the LSE; ``return_aux=AuxRequest(lse=True)`` is the newer spelling.
        kernel_options: accepted; torch's options choose tiles, which tilewise chooses itself. Unknown ones warn.
        return_aux: what to return beside the result.

    Returns:
        ``[B, Hq, L, Ev]``; with `return_aux` a pair with ``AuxOutput(lse, max_scores)``, with `return_lse` a pair with
        the LSE ``[B, Hq, L]`` (natural log, float32; float64 for float64). Nothing to attend gives 0 and -inf.
        Lengths of 0 are allowed.

    Raises:
        ShapeError: ranks, heads without `enable_gqa`, batches, or a block mask of other lengths.
        ArgumentError: both `return_lse` and `return_aux`; a sliced BlockMask of torch.
        UnsupportedError: ``max_scores``; a function that is no program; a mask that captures a parameter.

    Example:
        >>> import torch
        >>> import tilewise.torch as twt
        >>> q = torch.randn(1, 2, 5, 8)
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> twt.flex_attention(q, q, q, lambda score, b, h, q, k: score + slopes[h] * (k - q)).shape
        torch.Size([1, 2, 5, 8])

    Source: Dong et al., "Flex Attention" (2024).
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name}: expected rank 4 [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if not enable_gqa and heads != key_heads:
        raise ShapeError(f"key: {key_heads} heads for {heads} query heads; pass enable_gqa=True for grouped queries")
    if key.shape[0] != batch:
        if block_mask is None or key.shape[0] != 1 or block_mask.kv_num_blocks.shape[0] != batch:
            raise ShapeError(
                f"key: expected a batch of {batch} as in query, got {key.shape[0]} (1 is allowed beside a block_mask "
                f"made for B={batch})"
            )
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if return_lse and return_aux is not None:
        raise ArgumentError("return_lse and return_aux: expected one of them; use return_aux=AuxRequest(lse=True)")
    if return_aux is not None and return_aux.max_scores:
        raise UnsupportedError(
            "return_aux: max_scores is not computed (the kernel keeps a reference that may lie below the maximum); "
            "ask for lse, which bounds it: max_scores <= lse <= max_scores + log(keys)"
        )
    _check_options(kernel_options)
    keep, fields = block_fields(tensor_mask(block_mask), None, (batch, heads, queries, keys), traced)
    score = program_of(score_mod, "score", traced)
    out, lse = attend(query, key, value, scale=scale, score=score, keep=keep, **fields)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=None)
    return (out, lse) if return_lse else out
