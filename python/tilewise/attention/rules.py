"""The rules of one attention call, as the core reads them: what every front fills in and every kernel obeys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Rules"]


@dataclass(kw_only=True, slots=True)
class Rules:
    """Who attends whom, and how a score becomes a weight. Every condition narrows the ones before.

    The core reads the attributes by name; arrays are anything with ``__dlpack__`` on the kernel's device. Fronts are
    the public way in (:func:`tilewise.attention.attention`, ``twt.flex_attention``, ``twt.flash_attn_func``).

    Attributes:
        scale: factor on ``query . key``, before any program.
        causal: keep ``key <= query + keys - queries`` (bottom right), within each sequence.
        left, right: the window around ``query + keys - queries``, inclusive; None is unlimited.
        mask: bool ``[batch, query_heads, queries, keys]``, a broadcast view, True keeps.
        sinks: ``[query_heads]``, one more logit a head, without a value.
        block_indices: integers ``[batch, index_heads, queries, slots]``: each query's own key blocks, -1 unused.
        block_size: keys in a block of `block_indices`.
        score_mod: program text of kind ``score``; `score_captures` are its arrays.
        mask_mod: program text of kind ``mask``; `mask_captures` are its arrays.
        kv_num_blocks, kv_indices: int32 ``[b, h, query_blocks]`` and ``[b, h, query_blocks, key_blocks]``, `b` and
            `h` 1 or the problem's: the blocks in which `mask_mod` decides. Only the first ``kv_num_blocks`` indices
            of a row count.
        full_kv_num_blocks, full_kv_indices: the same for blocks in which every pair is kept.
        query_block, key_block: extents of those blocks.
        dropout: probability that a weight is dropped; the kept ones are divided by what remains.
        seed: of the dropout (Philox; see docs/numerics.md).
        sequences: int64 ``[n, 6]``: query_batch, query_start, query_count, key_batch, key_start, key_count. None is
            one sequence a batch entry. In programs and in the dropout a sequence's number stands for the batch index,
            and its own indices begin at 0.
        block_table: int32 ``[n, pages]``: where the pages of each sequence's keys lie; key and value are then
            ``[pages, key_heads, page_size, dim]``.
        splits: how decode cuts the keys: 0 into chunks of a fixed length, n into n equal parts.
        threshold: by how many powers of two a row's scores may outgrow its reference before it is rescaled.
    """

    scale: float
    causal: bool = False
    left: int | None = None
    right: int | None = None
    mask: Any = None
    sinks: Any = None
    block_indices: Any = None
    block_size: int = 0
    score_mod: str | None = None
    score_captures: list[Any] = field(default_factory=list)
    mask_mod: str | None = None
    mask_captures: list[Any] = field(default_factory=list)
    kv_num_blocks: Any = None
    kv_indices: Any = None
    full_kv_num_blocks: Any = None
    full_kv_indices: Any = None
    query_block: int = 0
    key_block: int = 0
    dropout: float = 0.0
    seed: int = 0
    sequences: Any = None
    block_table: Any = None
    splits: int = 0
    threshold: float = 8.0
