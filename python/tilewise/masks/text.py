"""Masks of token sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise.errors import ArgumentError, ShapeError
from tilewise.expr import abs as absolute
from tilewise.expr import array, clip
from tilewise.masks._check import MaskMod, flags, integers, named, whole

__all__ = [
    "batchify", "block_diffusion", "causal", "dilated_window", "document", "document_starts", "flamingo",
    "global_window", "jetspec_training", "jetspec_tree", "merged_attention", "packed_causal_document", "parallel_paths",
    "prefix_lm", "shared_prefix", "sliding_window", "transfusion",
]  # fmt: skip


def causal() -> MaskMod:
    """Each query sees the keys up to its own index: ``q >= k`` (top-left, as in FlexAttention).

    Source: Vaswani et al. 2017, arXiv 1706.03762.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(causal()))
        q >= k
    """
    return named(lambda b, h, q, k: q >= k, "causal")


def sliding_window(window: int) -> MaskMod:
    """The last ``window + 1`` keys: ``q >= k and q - k <= window``.

    Args:
        window: how far back a query sees, at least 0.

    Source: Beltagy et al. 2020, arXiv 2004.05150; Jiang et al. 2023 (Mistral), arXiv 2310.06825.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(sliding_window(4)))
        (q >= k) & (q - k <= 4)
    """
    window = whole("window", window)
    return named(lambda b, h, q, k: (q >= k) & (q - k <= window), f"sliding_window({window})")


def dilated_window(window: int, dilation: int) -> MaskMod:
    """Every ``dilation``-th key on both sides: ``|q - k| <= window and |q - k| % dilation == 0``.

    Symmetric; combine it with :func:`causal` by and_masks where wanted.

    Args:
        window: how far a query sees on either side, at least 0.
        dilation: at least 1.

    Source: Beltagy et al. 2020 (Longformer), arXiv 2004.05150, section 3.1.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(dilated_window(4, 2)))
        (abs(q - k) <= 4) & (abs(q - k) % 2 == 0)
    """
    window, dilation = whole("window", window), whole("dilation", dilation, 1)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = absolute(q - k)
        return (distance <= window) & (distance % dilation == 0)

    return named(mask, f"dilated_window({window}, {dilation})")


def global_window(window: int, is_global: Any) -> MaskMod:
    """A symmetric window, and some tokens that see and are seen by all: ``|q - k| <= window or g[q] or g[k]``.

    Args:
        window: how far a query sees on either side, at least 0.
        is_global: bool ``[tokens]``.

    Source: Beltagy et al. 2020 (Longformer), arXiv 2004.05150, section 3.1.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(global_window(2, [True, False, False, False])))
        (abs(q - k) <= 2) | is_global[q] | is_global[k]
    """
    window, seen = whole("window", window), flags("is_global", is_global, 1)
    return named(lambda b, h, q, k: (absolute(q - k) <= window) | seen[q] | seen[k], f"global_window({window})")


def prefix_lm(lengths: Any) -> MaskMod:
    """The prefix is seen by all, the rest is causal: ``k < lengths[b] or q >= k``.

    Args:
        lengths: of the prefix: a whole number, or integers ``[batch]``.

    Source: Raffel et al. 2020 (T5), arXiv 1910.10683, section 3.2.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(prefix_lm([3, 5])))
        (k < lengths[b]) | (q >= k)
    """
    if isinstance(lengths, int):
        fixed = whole("lengths", lengths)
        return named(lambda b, h, q, k: (k < fixed) | (q >= k), f"prefix_lm({fixed})")
    of = integers("lengths", lengths, 1)
    return named(lambda b, h, q, k: (k < of[b]) | (q >= k), "prefix_lm")


def document(ids: Any, inner: MaskMod | None = None) -> MaskMod:
    """Packed documents that do not see one another: ``ids[q] == ids[k]``, and an inner mask within each.

    The inner mask counts from the start of the document: ``inner(b, h, q - start, k - start)``.

    Args:
        ids: integers ``[tokens]`` or ``[batch, tokens]``, the document of each token, each document in one piece.
        inner: a mask_mod within documents; everything if not given. (For causal documents
            ``and_masks(document(ids), causal())`` says the same and needs no starts.)

    Source: Krell et al. 2021, arXiv 2107.02027 (packing without cross-contamination).

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(document([0, 0, 0, 1, 1], inner=sliding_window(1))))
        (ids[q] == ids[k]) & ((q - start[q] >= k - start[k]) & (q - start[q] - (k - start[k]) <= 1))
    """
    of = integers("ids", ids, 1, 2)
    start = None if inner is None else array(document_starts(ids), "start")

    def at(table: Any, b: Any, place: Any) -> Any:
        return table[place] if table.ndim == 1 else table[b, place]

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        same = at(of, b, q) == at(of, b, k)
        if inner is None:
            return same
        return same & inner(b, h, q - at(start, b, q), k - at(start, b, k))

    return named(mask, "document" if inner is None else f"document of {getattr(inner, '__name__', 'mask')}")


def document_starts(ids: Any) -> np.ndarray:
    """Where the document of each token begins: int32 in the shape of `ids`, for :func:`packed_causal_document`.

    Args:
        ids: integers ``[tokens]`` or ``[batch, tokens]``.

    Example:
        >>> document_starts([4, 4, 7, 7, 7]).tolist()
        [0, 0, 2, 2, 2]
    """
    values = integers("ids", ids, 1, 2).numpy()
    places = np.broadcast_to(np.arange(values.shape[-1], dtype=np.int32), values.shape)
    begins = np.ones(values.shape, bool)
    begins[..., 1:] = values[..., 1:] != values[..., :-1]
    return np.maximum.accumulate(np.where(begins, places, 0), axis=-1).astype(np.int32)


def packed_causal_document(starts: Any) -> MaskMod:
    """Causal packed documents by their starts: ``k >= starts[q] and q >= k``, one gather instead of two.

    Args:
        starts: integers ``[tokens]`` or ``[batch, tokens]``, where the document of each token begins (see
            :func:`document_starts`).

    Source: attention-gym's packed causal document mask; the same mask as document and causal.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(packed_causal_document([0, 0, 2, 2])))
        (k >= starts[q]) & (q >= k)
    """
    start = integers("starts", starts, 1, 2)
    if start.ndim == 1:
        return named(lambda b, h, q, k: (k >= start[q]) & (q >= k), "packed_causal_document")
    return named(lambda b, h, q, k: (k >= start[b, q]) & (q >= k), "packed_causal_document")


def parallel_paths(segments: Any) -> MaskMod:
    """Independent reasoning paths after one prompt, and a summary that sees them all, packed in one sequence.

    A token sees, up to itself, the prompt and its own path; a token of the summary sees everything before it. Padding
    neither sees nor is seen: ``k <= q and s[k] != 0 and s[q] != 0 and (s[k] == 1 or s[k] == s[q] or s[q] < 0)``.

    Args:
        segments: integers ``[tokens]`` or ``[batch, tokens]``: 0 is padding, 1 the prompt, 2, 3, ... the paths, -1 the
            summary.

    Source: ParaThinker, arXiv 2509.04475, two-phase attention mask.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(parallel_paths([1, 2, 3, -1])))
        (k <= q) & (segments[k] != 0) & (segments[q] != 0) & ((segments[k] == 1) | (segments[k] == segments[q]) | (segments[q] < 0))
    """  # noqa: E501
    of = integers("segments", segments, 1, 2)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        mine, other = (of[q], of[k]) if of.ndim == 1 else (of[b, q], of[b, k])
        return (k <= q) & (other != 0) & (mine != 0) & ((other == 1) | (other == mine) | (mine < 0))

    return named(mask, "parallel_paths")


def shared_prefix(offsets: Any, prefix: Any) -> MaskMod:
    """Many continuations of one prompt, packed without repeating it.

    A token sees its own document up to itself, and all of its prefix document:
    ``(starts[doc] <= k <= q) or (prefix[doc] != doc and starts[prefix[doc]] <= k < ends[prefix[doc]])``.

    Args:
        offsets: integers ``[documents + 1]``, where each document begins, and the end.
        prefix: integers ``[documents]``, the document that is the prompt of each; prompts name themselves.

    Source: attention-gym's shared prefix mask; Hydragen (Juravsky et al. 2024, arXiv 2402.05099) for the idea.

    Example:
        >>> import numpy as np
        >>> mask = shared_prefix([0, 2, 3, 5], [0, 0, 0])
        >>> q, k = np.ogrid[:5, :5]
        >>> print(mask(0, 0, q, k).astype(int))
        [[1 0 0 0 0]
         [1 1 0 0 0]
         [1 1 1 0 0]
         [1 1 0 1 0]
         [1 1 0 1 1]]
    """
    edges, prompt = integers("offsets", offsets, 1).numpy(), integers("prefix", prefix, 1).numpy()
    count = len(prompt)
    if len(edges) != count + 1:
        raise ShapeError(f"offsets [{len(edges)}] and prefix [{count}]: expected one offset more than documents")
    if count and (prompt.min() < 0 or prompt.max() >= count):
        raise ArgumentError(f"prefix: expected documents from 0 to {count - 1}, got {prompt.min()} to {prompt.max()}")
    document_of = np.repeat(np.arange(count), np.diff(edges))
    # By token, so that a mask element costs three gathers and no chain of them.
    own = array(edges[document_of].astype(np.int32), "start")
    shared = prompt[document_of]
    first = array(np.where(shared == document_of, 0, edges[shared]).astype(np.int32), "prompt_start")
    last = array(np.where(shared == document_of, 0, edges[shared + 1]).astype(np.int32), "prompt_end")
    return named(lambda b, h, q, k: ((k >= own[q]) & (q >= k)) | ((k >= first[q]) & (k < last[q])), "shared_prefix")


def batchify(mask_mod: MaskMod, length: int) -> MaskMod:
    """A batch flattened into one sequence: ``q // length == k // length`` and the mask within each piece.

    Args:
        mask_mod: within a piece, with indices from 0.
        length: tokens of a piece, at least 1.

    Source: attention-gym's batchify.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(batchify(causal(), 4)))
        (q // 4 == k // 4) & (q % 4 >= k % 4)
    """
    length = whole("length", length, 1)
    return named(
        lambda b, h, q, k: (q // length == k // length) & mask_mod(b, h, q % length, k % length),
        f"batchify({getattr(mask_mod, '__name__', 'mask')}, {length})",
    )


def block_diffusion(length: int, block: int) -> MaskMod:
    """Training of block diffusion: ``2 * length`` tokens, the noisy ones and then the clean ones.

    Noisy tokens see their own noisy block and the clean blocks before it; clean tokens see the clean blocks up to
    their own.

    Args:
        length: tokens of the sequence.
        block: tokens of a block.

    Source: Arriola et al. 2025 (BD3-LM), arXiv 2503.09573, section 3.1.

    Example:
        >>> import numpy as np
        >>> q, k = np.ogrid[:4, :4]
        >>> print(block_diffusion(2, 1)(0, 0, q, k).astype(int))
        [[1 0 0 0]
         [0 1 1 0]
         [0 0 1 0]
         [0 0 1 1]]
    """
    length, block = whole("length", length, 1), whole("block", block, 1)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        q_noisy, k_noisy = q < length, k < length
        q_block, k_block = q % length // block, k % length // block
        within = (q_block == k_block) & (q_noisy == k_noisy)
        before = (q_block > k_block) & ~k_noisy
        return within | before

    return named(mask, f"block_diffusion({length}, {block})")


def flamingo(intervals: Any, tokens: int) -> MaskMod:
    """Text sees the media whose interval holds it: ``intervals[k // tokens, 0] <= q < intervals[k // tokens, 1]``.

    Cross-attention: queries are text tokens, keys the tokens of all media in order.

    Args:
        intervals: integers ``[media, 2]``, the text tokens that see each one.
        tokens: of one image.

    Source: Alayrac et al. 2022 (Flamingo), arXiv 2204.14198.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(flamingo([[0, 7], [7, 12]], 3)))
        (q >= intervals[k // 3, 0]) & (q < intervals[k // 3, 1])
    """
    ends, tokens = integers("intervals", intervals, 2), whole("tokens", tokens, 1)
    if ends.shape[1] != 2:
        raise ShapeError(f"intervals: expected [media, 2], got {list(ends.shape)}")
    return named(lambda b, h, q, k: (q >= ends[k // tokens, 0]) & (q < ends[k // tokens, 1]), "flamingo")


def jetspec_tree(parents: Any, prefix: int) -> MaskMod:
    """A tree of drafted tokens after a prefix: a node sees the prefix and its ancestors, itself among them.

    Args:
        parents: integers ``[nodes]``, the parent of each node, before the node; roots are -1.
        prefix: keys before the tree.

    Source: JetSpec, arXiv 2606.18394; SpecInfer (Miao et al. 2024, arXiv 2305.09781) for tree attention.

    Example:
        >>> import numpy as np
        >>> q, k = np.ogrid[:3, :4]
        >>> print(jetspec_tree([-1, 0, 0], prefix=1)(0, 0, q, k).astype(int))
        [[1 1 0 0]
         [1 1 1 0]
         [1 1 0 1]]
    """
    tree, prefix = integers("parents", parents, 1).numpy(), whole("prefix", prefix)
    nodes = len(tree)
    if not nodes:
        raise ArgumentError("parents: expected at least one node")
    if (tree >= np.arange(nodes)).any() or tree.min() < -1:
        raise ArgumentError("parents: expected -1 or an earlier node for each node")
    ancestors = np.eye(nodes, dtype=bool)
    for node, parent in enumerate(tree):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    seen = array(ancestors, "ancestors")

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        node = clip(k - prefix, 0, nodes - 1)
        row = clip(q, 0, nodes - 1)
        return (k < prefix) | ((k - prefix < nodes) & seen[row, node])

    return named(mask, f"jetspec_tree({nodes} nodes, {prefix})")


def jetspec_training(prefix: int, block: int) -> MaskMod:
    """Sampled blocks after a prefix: a query sees the prefix and, causally, its own block.

    Queries are the tokens of the blocks; keys the prefix and then those tokens.

    Args:
        prefix: keys before the blocks.
        block: tokens of a block, its anchor among them.

    Source: JetSpec, arXiv 2606.18394.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(jetspec_training(4, 2)))
        (k < 4) | (q // 2 == (k - 4) // 2) & (q >= k - 4)
    """
    prefix, block = whole("prefix", prefix), whole("block", block, 1)
    return named(
        lambda b, h, q, k: (k < prefix) | ((q // block == (k - prefix) // block) & (q >= k - prefix)),
        f"jetspec_training({prefix}, {block})",
    )


def transfusion(spans: Any) -> MaskMod:
    """Text is causal, the tokens of one image see each other: ``q >= k or (spans[q] == spans[k] and spans[q] >= 0)``.

    Args:
        spans: integers ``[tokens]`` or ``[batch, tokens]``, the image of each token; text tokens are negative.

    Source: Zhou et al. 2024 (Transfusion), arXiv 2408.11039, section 3.2.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(transfusion([-1, 0, 0, -1])))
        (q >= k) | (spans[q] == spans[k]) & (spans[q] >= 0)
    """
    of = integers("spans", spans, 1, 2)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        mine, other = (of[q], of[k]) if of.ndim == 1 else (of[b, q], of[b, k])
        return (q >= k) | ((mine == other) & (mine >= 0))

    return named(mask, "transfusion")


def merged_attention(decoder: int, encoder: Any = None, window: int | None = None) -> MaskMod:
    """T5Gemma 2's merged attention: one softmax over the decoder's keys, causal, and the encoder's, all of them.

    Keys are the ``decoder`` tokens of the decoder itself and then those of the encoder:
    ``q >= k`` (within the window) for ``k < decoder``, ``k - decoder < encoder[b]`` beyond.

    Args:
        decoder: how many keys are the decoder's own.
        encoder: how many of the encoder's keys are no padding: a whole number, or integers ``[batch]``; all if not
            given.
        window: of the decoder's own keys, as in :func:`sliding_window`; all earlier ones if not given.

    Source: T5Gemma 2, arXiv 2512.14856, merged attention.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(merged_attention(8, 5)))
        (k < 8) & (q >= k) | (k >= 8) & (k - 8 < 5)
    """
    decoder = whole("decoder", decoder)
    window = None if window is None else whole("window", window)
    fixed = whole("encoder", encoder) if isinstance(encoder, int) else None
    of = None if encoder is None or fixed is not None else integers("encoder", encoder, 1)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        own = (k < decoder) & (q >= k)
        if window is not None:
            own = own & (q - k <= window)
        other = k >= decoder
        if fixed is not None:
            other = other & (k - decoder < fixed)
        elif of is not None:
            other = other & (k - decoder < of[b])
        return own | other

    return named(mask, f"merged_attention({decoder})")
