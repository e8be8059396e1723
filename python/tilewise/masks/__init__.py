"""Masks by name: functions that make a mask_mod ``(b, h, q, k) -> bool``, True keeps.

* :mod:`~tilewise.masks.text`: causal, windows, documents, prefixes, trees, reasoning paths, diffusion, text with media;
* :mod:`~tilewise.masks.grids`: neighbourhoods, tiles and frames of images and video;
* :mod:`~tilewise.masks.examples`: each with small sizes, for pictures and tests (``tilewise mask show NAME``).

Every mask runs on every front: with torch tensors (``twt.create_block_mask``, and torch's own flex_attention), with
NumPy arrays, and with the symbols of :mod:`tilewise.expr`. Arrays that a mask captures may be NumPy arrays, lists or
torch tensors. Masks combine by :func:`~tilewise.attention.and_masks` and :func:`~tilewise.attention.or_masks`.

``h`` is the query head, and ``q`` and ``k`` count from 0 in each sequence.
"""

from __future__ import annotations

from tilewise.masks.examples import EXAMPLES, Example, example
from tilewise.masks.grids import (
    natten,
    natten_morton,
    natten_tiled,
    sliding_tile,
    stand_alone,
    svg_spatial,
    svg_temporal,
    video_sparse,
)
from tilewise.masks.text import (
    batchify,
    block_diffusion,
    causal,
    dilated_window,
    document,
    document_starts,
    flamingo,
    global_window,
    jetspec_training,
    jetspec_tree,
    merged_attention,
    packed_causal_document,
    parallel_paths,
    prefix_lm,
    shared_prefix,
    sliding_window,
    transfusion,
)

__all__ = [
    "EXAMPLES",
    "Example",
    "batchify",
    "block_diffusion",
    "causal",
    "dilated_window",
    "document",
    "document_starts",
    "example",
    "flamingo",
    "global_window",
    "jetspec_training",
    "jetspec_tree",
    "merged_attention",
    "natten",
    "natten_morton",
    "natten_tiled",
    "packed_causal_document",
    "parallel_paths",
    "prefix_lm",
    "shared_prefix",
    "sliding_tile",
    "sliding_window",
    "stand_alone",
    "svg_spatial",
    "svg_temporal",
    "transfusion",
    "video_sparse",
]
