"""From what users hand over (functions, Mods, block masks) to programs and block lists.

``trace`` turns a function into a :class:`Program`; the NumPy and the torch floor each have theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilewise.attention.programs import Program, both
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["Trace", "block_fields", "program_of"]

Trace = Callable[[Any, str], Program]


def program_of(mod: Any, kind: str, trace: Trace) -> Program | None:
    """A ``score_mod`` or ``mask_mod`` argument as a program of that kind; a Program stays as it is."""
    if mod is None or isinstance(mod, Program):
        return mod
    return trace(mod, kind)


def block_fields(
    block_mask: Any, mask_mod: Any, shape: tuple[Any, Any, Any, Any], trace: Trace
) -> tuple[Program | None, dict[str, Any]]:
    """The mask program and the block fields of :class:`~tilewise.attention.rules.Rules`.

    Args:
        block_mask: tilewise's or torch's BlockMask, or None.
        mask_mod: a mask beside it; both must keep a pair.
        shape: ``(batch, query_heads, queries, keys)``.
        trace: for the functions.

    Raises:
        ArgumentError: a sliced BlockMask of torch, which has lost its function; a function; both arguments at once.
        TypeError: something else.
        ShapeError: a block mask of other lengths.
    """
    if block_mask is None:
        return program_of(mask_mod, "mask", trace), {}
    if mask_mod is not None:
        raise ArgumentError("block_mask and mask_mod: expected one of them; combine the functions with and_masks")
    if not hasattr(block_mask, "kv_num_blocks"):
        if callable(block_mask):
            raise ArgumentError("block_mask: got a function; make the mask once by create_block_mask(mask_mod, ...)")
        raise TypeError(f"block_mask: expected a BlockMask (tilewise's or torch's), got {type(block_mask).__name__}")
    query_block, key_block = (int(extent) for extent in block_mask.BLOCK_SIZE)
    batch, heads, queries, keys = shape
    fields = {
        name: getattr(block_mask, name)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    }
    # Ours is traced already (once, when it was made); torch's is a function.
    mod = getattr(block_mask, "mod", None)
    program = program_of(block_mask.mask_mod if mod is None else mod, "mask", trace)
    if min(query_block, key_block) >= 2**30:  # torch's way to say "no mask"
        return both(program, None), {}
    lengths = tuple(int(extent) for extent in block_mask.seq_lengths)
    if lengths != (queries, keys):
        raise ShapeError(
            f"block_mask: it was made for {lengths[0]} queries and {lengths[1]} keys, got {queries} and {keys}; make "
            "one with create_block_mask for these lengths"
        )
    for axis, (name, extent) in enumerate((("batch", batch), ("query heads", heads))):
        found = fields["kv_num_blocks"].shape[axis]
        if found not in (1, extent):
            raise ShapeError(f"block_mask: expected 1 or {extent} {name}, got {found}")
    return program, fields | {"query_block": query_block, "key_block": key_block}
