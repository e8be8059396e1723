"""Every mask with small sizes: what ``tilewise mask show NAME`` draws, and what the tests check."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.masks import grids, text
from tilewise.masks._check import MaskMod

__all__ = ["EXAMPLES", "Example", "example"]


class Example(NamedTuple):
    """A mask to look at.

    Attributes:
        make: the mask_mod for some number of (queries, keys).
        queries, keys: lengths that show the pattern.
        block: a block size that shows empty, partial and full blocks.
        fixed: the lengths cannot be chosen.
    """

    make: Callable[[int, int], MaskMod]
    queries: int = 64
    keys: int = 64
    block: int = 8
    fixed: bool = False


def _documents(tokens: int) -> np.ndarray:
    """Ids of documents of growing length."""
    ends = np.cumsum(np.arange(1, 64) * max(tokens // 16, 1))
    return np.searchsorted(ends, np.arange(tokens), side="right").astype(np.int32)


def _spans(tokens: int) -> np.ndarray:
    """Two images in a text."""
    spans = np.full(tokens, -1, np.int32)
    spans[tokens // 8 : tokens // 8 + tokens // 4] = 0
    spans[tokens // 2 : tokens // 2 + tokens // 4] = 1
    return spans


def _segments(tokens: int) -> np.ndarray:
    """A prompt, three paths of different lengths, a little padding, a summary."""
    edges = np.array([4, 20, 28, 44, 48]) * tokens // 64
    return np.array([1, 2, 3, 4, 0, -1], np.int32)[np.searchsorted(edges, np.arange(tokens), side="right")]


def _globals(tokens: int) -> np.ndarray:
    return np.arange(tokens) % max(tokens // 2, 1) == 0


def _prefixes(tokens: int) -> MaskMod:
    """A prompt and its continuations, twice."""
    part = max(tokens // 8, 1)
    offsets = np.minimum(np.arange(9) * part, tokens)
    offsets[-1] = tokens
    return text.shared_prefix(offsets, [0, 0, 0, 0, 4, 4, 4, 4])


def _tree_parents(nodes: int) -> np.ndarray:
    """A binary tree in breadth-first order."""
    return np.where(np.arange(nodes) == 0, -1, (np.arange(nodes) - 1) // 2)


def _selected(queries: int, keys: int) -> MaskMod:
    tile = 8
    rows, columns = -(-queries // tile), -(-keys // tile)
    chosen = np.stack([np.arange(rows), np.arange(rows) * 5 + 2], -1) % columns
    return grids.video_sparse(chosen[None, None], tile, columns)


def _intervals(queries: int, keys: int) -> MaskMod:
    media = max(-(-keys // 16), 1)
    edges = np.linspace(0, queries, media + 1).astype(np.int32)
    return text.flamingo(np.stack([edges[:-1], edges[1:]], -1), 16)


#: By the name of the function that makes the mask.
EXAMPLES: dict[str, Example] = {
    "batchify": Example(lambda queries, keys: text.batchify(text.causal(), max(queries // 4, 1))),
    "block_diffusion": Example(lambda queries, keys: text.block_diffusion(max(queries // 2, 1), max(queries // 8, 1))),
    "causal": Example(lambda queries, keys: text.causal()),
    "dilated_window": Example(lambda queries, keys: text.dilated_window(12, 4)),
    "document": Example(lambda queries, keys: text.document(_documents(max(queries, keys)), text.causal())),
    "flamingo": Example(_intervals, 64, 48),
    "global_window": Example(lambda queries, keys: text.global_window(6, _globals(max(queries, keys)))),
    "jetspec_training": Example(lambda queries, keys: text.jetspec_training(max(keys - queries, 0), 8), 48, 64),
    "jetspec_tree": Example(
        lambda queries, keys: text.jetspec_tree(_tree_parents(max(queries, 1)), max(keys - queries, 0)), 31, 64
    ),
    "merged_attention": Example(lambda queries, keys: text.merged_attention(min(queries, keys), window=24), 48, 80),
    "natten": Example(lambda queries, keys: grids.natten((12, 12), (5, 5)), 144, 144, 12, True),
    "natten_morton": Example(lambda queries, keys: grids.natten_morton((16, 16), (5, 5)), 256, 256, 16, True),
    "natten_tiled": Example(lambda queries, keys: grids.natten_tiled((12, 12), (5, 5), (4, 4)), 144, 144, 16, True),
    "packed_causal_document": Example(
        lambda queries, keys: text.packed_causal_document(text.document_starts(_documents(max(queries, keys))))
    ),
    "parallel_paths": Example(lambda queries, keys: text.parallel_paths(_segments(max(queries, keys)))),
    "prefix_lm": Example(lambda queries, keys: text.prefix_lm([keys // 4])),
    "shared_prefix": Example(lambda queries, keys: _prefixes(max(queries, keys))),
    "sliding_tile": Example(
        lambda queries, keys: grids.sliding_tile((4, 8, 8), (2, 4, 4), (2, 2, 2), 16), 272, 272, 16, True
    ),
    "sliding_window": Example(lambda queries, keys: text.sliding_window(12)),
    "stand_alone": Example(lambda queries, keys: grids.stand_alone(12, 2), 144, 144, 12),
    "svg_spatial": Example(lambda queries, keys: grids.svg_spatial(4, 20, 1, first_frame=True, multiple=4), 84, 84, 12),
    "svg_temporal": Example(lambda queries, keys: grids.svg_temporal(4, 20, 4, 1), 84, 84, 12),
    "transfusion": Example(lambda queries, keys: text.transfusion(_spans(max(queries, keys)))),
    "video_sparse": Example(_selected),
}


def example(name: str, queries: int | None = None, keys: int | None = None) -> tuple[MaskMod, int, int, int]:
    """An example of a mask by name: ``(mask_mod, queries, keys, block)``.

    Args:
        name: of a function of :mod:`tilewise.masks`.
        queries, keys: lengths; those of the example if not given.

    Raises:
        ArgumentError: an unknown name, or lengths for a mask whose grid decides them.

    Example:
        >>> mask_mod, queries, keys, block = example("sliding_window")
        >>> mask_mod.__name__, queries, keys, block
        ('sliding_window(12)', 64, 64, 8)
    """
    if name not in EXAMPLES:
        raise ArgumentError(f"there is no mask {name!r}; there are {', '.join(EXAMPLES)}")
    found = EXAMPLES[name]
    chosen = (found.queries if queries is None else queries, found.keys if keys is None else keys)
    if found.fixed and chosen != (found.queries, found.keys):
        raise ArgumentError(f"{name}: the example's grid has {found.queries} queries and {found.keys} keys")
    if min(chosen) < 1:
        raise ArgumentError(f"{name}: expected at least one query and one key, got {chosen[0]} and {chosen[1]}")
    return (found.make(*chosen), *chosen, found.block)
