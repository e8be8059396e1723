"""What there is to see of a mask or a mod: for :mod:`tilewise.plot` and the command line."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from tilewise._arrays import is_torch
from tilewise.attention.block_lists import block_size, check_lengths, dense_values
from tilewise.attention.block_mask import BlockMask
from tilewise.attention.blocks import create_block_mask
from tilewise.errors import ArgumentError
from tilewise.expr import Mod, trace

__all__ = ["MaskPicture", "ModPicture", "look", "look_at_mod"]


class MaskPicture(NamedTuple):
    """A mask of one batch and head.

    Attributes:
        name, expression, program: what it is.
        queries, keys, block: extents.
        kinds: int8 ``[query blocks, key blocks]``: 0 empty, 1 partial, 2 full.
        kept: bool ``[queries, keys]``, or None where that is too many elements.
    """

    name: str
    expression: str
    program: str
    queries: int
    keys: int
    block: tuple[int, int]
    kinds: np.ndarray
    kept: np.ndarray | None

    @property
    def visited(self) -> int:
        """Blocks that are not empty."""
        return int((self.kinds > 0).sum())

    @property
    def full(self) -> int:
        """Blocks of which every element is kept."""
        return int((self.kinds == 2).sum())

    @property
    def sparsity(self) -> float:
        """Per cent of the blocks that are empty."""
        return 100.0 * (1.0 - self.visited / self.kinds.size) if self.kinds.size else 0.0

    def spread(self) -> np.ndarray:
        """The kind of the block of each element, ``[queries, keys]``."""
        rows = np.arange(self.queries) // self.block[0]
        return self.kinds[rows[:, None], np.arange(self.keys) // self.block[1]]

    def shades(self) -> np.ndarray:
        """0 in an empty block, 1 dropped and 2 kept in a partial one, 3 in a full one; by blocks where too large."""
        if self.kept is None:
            return np.array([0, 2, 3], np.int8)[self.kinds]
        kinds = self.spread()
        return np.where(kinds == 2, 3, np.where(self.kept, 2, np.minimum(kinds, 1))).astype(np.int8)


class ModPicture(NamedTuple):
    """What a score_mod makes of one score, ``values [queries, keys]``."""

    name: str
    expression: str
    program: str
    values: np.ndarray

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest finite value."""
        finite = self.values[np.isfinite(self.values)]
        return (float(finite.min()), float(finite.max())) if finite.size else (float("nan"), float("nan"))


def _any_trace(function: Any, kind: str) -> Mod:
    """By torch's tracer where torch is there, since the function may use torch; else by symbols alone."""
    if "torch" in sys.modules and not isinstance(function, Mod):
        from tilewise.torch.expr import trace as torch_trace

        return torch_trace(function, kind)
    return trace(function, kind)


def _on_cpu(mod: Mod) -> Mod:
    captures = tuple(one.detach().cpu() if is_torch(one) else one for one in mod.captures)
    return Mod(mod.kind, mod.program, captures, mod.names)


def look(
    what: Any,
    queries: int | None = None,
    keys: int | None = None,
    block: int | tuple[int, int] | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    elements: int = 2**22,
) -> MaskPicture:
    """A mask by its name, of a function, or of a BlockMask; see :func:`tilewise.plot.mask`.

    Raises:
        ArgumentError: an unknown name, a function without lengths, or a batch or head outside.
    """
    if isinstance(what, str):
        from tilewise.masks import example

        name = what
        what, queries, keys, size = example(what, queries, keys)
        block = size if block is None else block
    else:
        name = getattr(getattr(what, "mask_mod", what), "__name__", None) or "mask"
    if hasattr(what, "kv_num_blocks"):
        return _look_at_blocks(name, what, batch, head, elements)
    if queries is None or keys is None:
        raise ArgumentError("a mask_mod has no lengths: give queries and keys")
    mod = _on_cpu(_any_trace(what, "mask"))
    _, _, queries, keys = check_lengths(1, 1, queries, keys)
    if batch < 0 or head < 0:
        raise ArgumentError(f"batch and head: expected numbers of at least 0, got {batch} and {head}")
    size = block_size(128 if block is None else block)
    kinds = create_block_mask(mod, batch + 1, head + 1, queries, keys, size).kinds()[batch, head]
    return _picture(name, mod, queries, keys, size, kinds, batch, head, elements)


def _look_at_blocks(name: str, what: Any, batch: int, head: int, elements: int) -> MaskPicture:
    if not isinstance(what, BlockMask):
        from tilewise.torch.attention.blocks import coerce

        what = coerce(what)
        assert what is not None
    batches, heads = what.kv_num_blocks.shape[:2]
    if not (0 <= batch < batches and 0 <= head < heads):
        raise ArgumentError(f"batch {batch}, head {head}: the mask has {batches} batches and {heads} heads")
    queries, keys = what.seq_lengths
    return _picture(
        name, _on_cpu(what.mod), queries, keys, what.BLOCK_SIZE, what.kinds()[batch, head], batch, head, elements
    )


def _picture(
    name: str, mod: Mod, queries: int, keys: int, size: tuple[int, int], kinds: np.ndarray, batch: int, head: int,
    elements: int,
) -> MaskPicture:  # fmt: skip
    kept = None
    if queries * keys <= elements:
        kept = dense_values(mod, batch + 1, head + 1, queries, keys)[batch, head]
        visited = np.arange(queries)[:, None] // size[0], np.arange(keys) // size[1]
        kept = kept & (kinds[visited] > 0)  # what a schedule leaves out is not seen, whatever the mask_mod says
    return MaskPicture(name, str(mod), mod.program, queries, keys, size, kinds, kept)


def look_at_mod(what: Any, queries: int, keys: int, *, score: float = 0.0, head: int = 0) -> ModPicture:
    """A mod by its name or of a function; see :func:`tilewise.plot.mod`.

    Raises:
        ArgumentError: an unknown name, or lengths below 1.
    """
    if min(queries, keys) < 1 or head < 0:
        raise ArgumentError(f"expected at least one query and one key, got {queries} and {keys}")
    if isinstance(what, str):
        from tilewise.mods import EXAMPLES

        name = what
        if name not in EXAMPLES:
            raise ArgumentError(f"there is no mod {name!r}; there are {', '.join(EXAMPLES)}")
        what = EXAMPLES[name](queries, keys)
    else:
        name = getattr(what, "__name__", "mod")
    mod = _on_cpu(_any_trace(what, "score"))
    return ModPicture(name, str(mod), mod.program, dense_values(mod, 1, head + 1, queries, keys, score)[0, head])
