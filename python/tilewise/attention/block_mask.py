"""``BlockMask``: which blocks of (queries x keys) are empty, partial or full, in FlexAttention's layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from tilewise._arrays import dtype_name
from tilewise.attention.block_lists import block_size, ceil_div, dense_to_ordered, ordered_to_dense
from tilewise.attention.combine import noop_mask, sliced_mask
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.expr import Mod, trace

__all__ = ["BlockMask"]

_BLOCK = 128


class BlockMask:
    """A block-sparse mask in torch's layout: for each row of query blocks, the key blocks that are visited.

    Blocks of which every element is kept are *full*: the mask_mod is not asked there. Those with some kept elements
    are *partial*. The others are empty, and cost nothing. A ragged last block can never be full.

    Attributes:
        seq_lengths: ``(queries, keys)``.
        kv_num_blocks: int32 ``[B, H, query blocks]``, how many partial blocks a row has.
        kv_indices: int32 ``[B, H, query blocks, key blocks]``, their columns, ascending; what follows is undefined.
        full_kv_num_blocks, full_kv_indices: the same of the full blocks, or None.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the transposes ``[B, H, key blocks(, query
            blocks)]``, made when first asked for (None if made with ``compute_q_blocks=False``).
        BLOCK_SIZE: ``(queries, keys)`` of a block.
        mask_mod: the function that decides within partial blocks.
        mod: the traced mask_mod.

    ``B`` and ``H`` are 1 where all batches or heads share the mask. Made by :func:`create_block_mask` or
    :meth:`from_kv_blocks`.

    Example:
        >>> from tilewise.attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256)
        >>> mask.kv_num_blocks.tolist(), mask.full_kv_num_blocks.tolist()
        ([[[1, 1]]], [[[0, 1]]])
        >>> mask.sparsity()
        25.0
    """

    _noop: ClassVar[Callable[..., Any]] = staticmethod(noop_mask)
    _FIELDS: ClassVar[tuple[str, ...]] = (
        "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
        "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
    )  # fmt: skip

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Any,
        kv_indices: Any,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        q_num_blocks: Any = None,
        q_indices: Any = None,
        full_q_num_blocks: Any = None,
        full_q_indices: Any = None,
        BLOCK_SIZE: int | tuple[int, int] = _BLOCK,
        mask_mod: Callable[..., Any] | None = None,
        *,
        compute_q_blocks: bool = True,
    ) -> None:
        self.BLOCK_SIZE = block_size(BLOCK_SIZE)
        self.seq_lengths = (int(seq_lengths[0]), int(seq_lengths[1]))
        self.kv_num_blocks, self.kv_indices = kv_num_blocks, kv_indices
        self.full_kv_num_blocks, self.full_kv_indices = full_kv_num_blocks, full_kv_indices
        self._transposed: list[Any] = [q_num_blocks, q_indices, full_q_num_blocks, full_q_indices]
        self._compute_q_blocks = compute_q_blocks
        self._mod: Mod | None = None
        self._mask_mod: Callable[..., Any] = type(self)._noop if mask_mod is None else mask_mod
        self._check()

    # What the torch floor does otherwise.
    @staticmethod
    def _to_numpy(array: Any) -> np.ndarray:
        return np.asarray(array)

    @staticmethod
    def _from_numpy(array: np.ndarray, like: Any) -> Any:
        return array

    @staticmethod
    def _strides(array: Any) -> tuple[int, ...]:
        return array.strides

    @staticmethod
    def _expand(array: Any, shape: tuple[int, ...]) -> Any:
        return np.broadcast_to(array, shape)

    @staticmethod
    def _trace(mask_mod: Any) -> Mod:
        return trace(mask_mod, "mask")

    @staticmethod
    def _is_array(value: Any) -> bool:
        return isinstance(value, np.ndarray)

    # Construction.
    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Any,
        kv_indices: Any,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        BLOCK_SIZE: int | tuple[int, int] = _BLOCK,
        mask_mod: Callable[..., Any] | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
    ) -> Self:
        """A mask of lists of key blocks.

        Args:
            kv_num_blocks: integers ``[B, H, query blocks]``.
            kv_indices: integers ``[B, H, query blocks, key blocks]``; beyond a row's count anything may stand.
            full_kv_num_blocks, full_kv_indices: the same of full blocks; both or neither.
            BLOCK_SIZE: ``(queries, keys)`` of a block, or one number for both.
            mask_mod: for the partial blocks; keeps everything if not given.
            seq_lengths: ``(queries, keys)``; whole blocks if not given.
            compute_q_blocks: whether the transposes may be asked for.

        Raises:
            ShapeError: arrays that do not fit one another.
            DtypeError: not integers.
            ArgumentError: only one of the full arrays, or a count or an index out of range.
        """
        size = block_size(BLOCK_SIZE)
        if seq_lengths is None:
            if len(getattr(kv_indices, "shape", ())) < 2:
                raise ShapeError("kv_indices: expected at least 2 axes [.., query blocks, key blocks]")
            seq_lengths = (kv_indices.shape[-2] * size[0], kv_indices.shape[-1] * size[1])
        mask = cls(
            seq_lengths, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices,
            BLOCK_SIZE=size, mask_mod=mask_mod, compute_q_blocks=compute_q_blocks,
        )  # fmt: skip
        mask._check_values()
        return mask

    def _check(self) -> None:
        if (self.full_kv_num_blocks is None) != (self.full_kv_indices is None):
            raise ArgumentError("full_kv_num_blocks and full_kv_indices: give both or neither")
        if not callable(self._mask_mod):
            raise TypeError(f"mask_mod: expected a function (b, h, q, k), got {type(self._mask_mod).__name__}")
        if min(self.seq_lengths) < 0:
            raise ArgumentError(f"seq_lengths: expected lengths of at least 0, got {self.seq_lengths}")
        for name in ("kv", "full_kv"):
            counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
            if counts is None:
                continue
            for what, array in ((f"{name}_num_blocks", counts), (f"{name}_indices", indices)):
                if not self._is_array(array):
                    raise TypeError(f"{what}: expected an array of this floor, got {type(array).__name__}")
                if dtype_name(array) not in ("int32", "int64"):
                    raise DtypeError(f"{what}: expected int32, got {dtype_name(array)}")
            if len(indices.shape) < 2 or tuple(counts.shape) != tuple(indices.shape[:-1]):
                raise ShapeError(
                    f"{name}_num_blocks {list(counts.shape)} and {name}_indices {list(indices.shape)}: expected "
                    "[B, H, query blocks] and [B, H, query blocks, key blocks]"
                )
            if tuple(counts.shape) != tuple(self.kv_num_blocks.shape):
                raise ShapeError(
                    f"full_kv_num_blocks {list(counts.shape)}: expected the shape of kv_num_blocks, "
                    f"{list(self.kv_num_blocks.shape)}"
                )

    def _check_values(self) -> None:
        columns = max(ceil_div(self.seq_lengths[1], self.BLOCK_SIZE[1]), self.kv_indices.shape[-1])
        for name in ("kv", "full_kv"):
            counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
            if counts is None:
                continue
            counts, indices = self._to_numpy(counts), self._to_numpy(indices)
            width = indices.shape[-1]
            if counts.size and (counts.min() < 0 or counts.max() > width):
                raise ArgumentError(
                    f"{name}_num_blocks: expected counts from 0 to {width}, got {counts.min()} to {counts.max()}"
                )
            used = indices[np.arange(width) < counts[..., None]]
            if used.size and (used.min() < 0 or used.max() >= columns):
                raise ArgumentError(
                    f"{name}_indices: expected columns from 0 to {columns - 1}, got {used.min()} to {used.max()}"
                )

    # The mask_mod, and its trace.
    @property
    def mask_mod(self) -> Callable[..., Any]:
        """The function that decides within partial blocks; may be set."""
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: Callable[..., Any]) -> None:
        self._mask_mod, self._mod = mask_mod, None

    @property
    def mod(self) -> Mod:
        """The traced mask_mod.

        Raises:
            ArgumentError: the mask was sliced, and has no mask_mod any more.
            UnsupportedError: the mask_mod cannot be traced.
        """
        if self._mod is None:
            self._mod = self._trace(self._mask_mod)
        return self._mod

    # The transposes.
    def _transpose(self, place: int) -> Any:
        if self._transposed[place] is None and self._compute_q_blocks:
            counts, indices = (
                (self.kv_num_blocks, self.kv_indices) if place < 2 else (self.full_kv_num_blocks, self.full_kv_indices)
            )
            if counts is not None:
                columns = ceil_div(self.seq_lengths[1], self.BLOCK_SIZE[1])
                # Batches and heads that share one list share its transpose.
                shared = tuple(slice(0, 1) if step == 0 else slice(None) for step in self._strides(counts)[:-1])
                own, lists = self._to_numpy(counts[shared]), self._to_numpy(indices[shared])
                found = dense_to_ordered(ordered_to_dense(own, lists, columns).swapaxes(-1, -2))
                lead = tuple(counts.shape[:-1])
                self._transposed[place // 2 * 2 : place // 2 * 2 + 2] = [
                    self._expand(self._from_numpy(array, counts), (*lead, *array.shape[len(lead) :])) for array in found
                ]
        return self._transposed[place]

    @property
    def q_num_blocks(self) -> Any:
        """int32 ``[B, H, key blocks]``: how many query blocks see this key block partially."""
        return self._transpose(0)

    @property
    def q_indices(self) -> Any:
        """int32 ``[B, H, key blocks, query blocks]``: their rows, ascending."""
        return self._transpose(1)

    @property
    def full_q_num_blocks(self) -> Any:
        """As ``q_num_blocks``, of the full blocks; None without full blocks."""
        return self._transpose(2)

    @property
    def full_q_indices(self) -> Any:
        """As ``q_indices``, of the full blocks; None without full blocks."""
        return self._transpose(3)

    # Descriptions.
    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, H, queries, keys)``."""
        return (*tuple(self.kv_indices.shape[:-2]), *self.seq_lengths)

    def numel(self) -> int:
        """Elements of the dense mask, kept or not."""
        return math.prod(self.shape)

    def sparsity(self) -> float:
        """Per cent of the blocks that are empty."""
        total = math.prod(self.kv_num_blocks.shape[:-1])
        for length, size in zip(self.seq_lengths, self.BLOCK_SIZE, strict=True):
            total *= ceil_div(length, size)
        visited = int(self.kv_num_blocks.sum())
        if self.full_kv_num_blocks is not None:
            visited += int(self.full_kv_num_blocks.sum())
        return 100.0 * (1.0 - visited / total) if total else 0.0

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """All attributes in torch's order (its four of the deterministic FLASH backward are None here).

        Args:
            flatten: lengths and block sizes as single numbers instead of pairs.
        """
        lengths = self.seq_lengths if flatten else (self.seq_lengths,)
        size = self.BLOCK_SIZE if flatten else (self.BLOCK_SIZE,)
        fields = [getattr(self, name) for name in self._FIELDS]
        return (*lengths, *fields, None, None, None, None, *size, self.mask_mod)

    def kinds(self) -> np.ndarray:
        """Of each block 0 (empty), 1 (partial) or 2 (full): int8 ``[B, H, query blocks, key blocks]`` (NumPy)."""
        columns = max(ceil_div(self.seq_lengths[1], self.BLOCK_SIZE[1]), 0)
        partial = ordered_to_dense(self._to_numpy(self.kv_num_blocks), self._to_numpy(self.kv_indices), columns)
        result = partial.astype(np.int8)
        if self.full_kv_num_blocks is not None:
            counts, indices = self._to_numpy(self.full_kv_num_blocks), self._to_numpy(self.full_kv_indices)
            result[ordered_to_dense(counts, indices, columns)] = 2
        return result

    def to_dense(self) -> Any:
        """Which blocks are visited: int32 ``[B, H, query blocks, key blocks]`` of 0 and 1."""
        width = self.kv_indices.shape[-1]
        dense = ordered_to_dense(self._to_numpy(self.kv_num_blocks), self._to_numpy(self.kv_indices), width)
        if self.full_kv_num_blocks is not None:
            counts, indices = self._to_numpy(self.full_kv_num_blocks), self._to_numpy(self.full_kv_indices)
            dense = dense | ordered_to_dense(counts, indices, width)
        return self._from_numpy(dense.astype(np.int32), self.kv_indices)

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A drawing: ``█`` where all blocks are visited, ``░`` where some are, for each batch and head.

        Args:
            grid_size: most rows and columns to draw; -1 draws every block.
            limit: most pairs of batch and head to draw.
        """
        dense = self._to_numpy(self.to_dense())
        *batch, rows, columns = dense.shape
        most = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
        down, across = (
            1 if most_of < 1 else max(1, ceil_div(extent, most_of))
            for extent, most_of in zip((rows, columns), most, strict=True)
        )
        parts = []
        for number, place in enumerate(itertools.product(*map(range, batch))):
            if number == limit:
                parts.append("...\nto draw more, set limit, or choose by mask[batch, head]")
                break
            lines = [str(place)]
            for top in range(0, rows, down):
                cells = [dense[place][top : top + down, left : left + across] for left in range(0, columns, across)]
                lines.append("".join(("█" if cell.all() else "░" if cell.any() else " ") * 2 for cell in cells))
            parts.append("\n".join(lines) + "\n")
        return "\n".join(parts)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string().strip()}\n)"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        return (
            f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, sparsity={self.sparsity():.2f}%, "
            f"kv_indices={list(self.kv_indices.shape)}, full blocks: {self.full_kv_num_blocks is not None}, "
            f"mask_mod={name})"
        )

    # Parts.
    def __getitem__(self, index: Any) -> Self:
        """Some batches, heads and rows of query blocks: ``mask[b]``, ``mask[b, h]``, ``mask[:, :, rows]``.

        Axes stay (an integer is a slice of one), key blocks are not cut, and rows are packed to start at 0, so the
        result has a mask_mod that raises: set it to one that adds the offset.

        Raises:
            IndexError: more than three indices, or an integer out of range.
        """
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > 3:
            raise IndexError(f"a BlockMask is indexed by batch, head and query block, got {len(items)} indices")
        sizes = tuple(self.kv_num_blocks.shape)
        if len(sizes) != 3:
            raise IndexError(f"indexing needs kv_num_blocks [B, H, query blocks], got {list(sizes)}")
        chosen = []
        for item, size in zip((*items, *[slice(None)] * (3 - len(items))), sizes, strict=True):
            if isinstance(item, int | np.integer):
                if not -size <= item < size:
                    raise IndexError(f"index {item} is outside an axis of {size}")
                item = slice(int(item) % size, int(item) % size + 1)
            chosen.append(item)
        place = tuple(chosen)
        parts: list[Any] = [getattr(self, name) for name in self._FIELDS[:4]]
        parts = [None if array is None else array[place] for array in parts]
        queries = self._queries_of(place[2], parts[0].shape[-1])
        return type(self)(
            (queries, self.seq_lengths[1]), *parts, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=sliced_mask,
            compute_q_blocks=self._compute_q_blocks,
        )  # fmt: skip

    def _queries_of(self, rows: Any, count: int) -> int:
        """Queries in the chosen rows; rows chosen by an array count whole, since their values are not looked at."""
        size = self.BLOCK_SIZE[0]
        if not isinstance(rows, slice):
            return count * size
        chosen = range(self.kv_num_blocks.shape[-1])[rows]
        return sum(max(0, min(size, self.seq_lengths[0] - row * size)) for row in chosen)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> Self:
        """The upper left corner for other lengths, as torch's method of this name."""
        rows, columns = ceil_div(new_q_len, self.BLOCK_SIZE[0]), ceil_div(new_kv_len, self.BLOCK_SIZE[1])
        parts: list[Any] = []
        for name in ("kv", "full_kv"):
            counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
            if counts is None:
                parts += [None, None]
                continue
            dense = ordered_to_dense(self._to_numpy(counts), self._to_numpy(indices), indices.shape[-1])
            found = dense_to_ordered(dense[..., :rows, :columns])
            parts += [self._from_numpy(array, counts) for array in found]
        return type(self)(
            (new_q_len, new_kv_len), *parts, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=self.mask_mod,
            compute_q_blocks=self._compute_q_blocks,
        )  # fmt: skip
