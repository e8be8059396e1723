"""A checked call, and the argument that every kernel of the room takes (``cuda/attention/problem.cuh``)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewise import _core
from tilewise._arrays import is_torch
from tilewise.cuda.attention import kernels
from tilewise.cuda.expr import Mod, capture_argument, render
from tilewise.cuda.kernel import ITEMSIZES, TYPES
from tilewise.cuda.launch import DeviceArray, describe, empty, same_place
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError

__all__ = [
    "ARGUMENT",
    "MAX_WIDTH",
    "Problem",
    "beside",
    "fault_of",
    "multiple",
    "output",
    "raise_faults",
    "rows_together",
]

#: The widest head that kernels take; the CPU takes 512.
MAX_WIDTH = 256

_NO_LIMIT = 1 << 30
_LONGEST = 1 << 30
_CUT = 512  # keys of a part, if the caller names no number of parts

_POINTERS = (
    "query", "key", "value", "out", "grad_out", "lse", "grad_lse", "delta", "grad_query", "grad_key", "grad_value",
    "grad_sinks", "partial", "partial_lse", "sinks", "mask", "partial_count", "partial_list", "full_count", "full_list",
    "turned_count", "turned_list", "sequences", "block_table",
)  # fmt: skip
_AXES = ("query", "key", "value", "out", "grad_out", "lse", "grad_lse", "grad_query", "grad_key", "grad_value")
_WIDE = (
    "batches", "queries", "keys", "sequence_count", "table_width", "page_size", "list_batches", "list_heads",
    "query_blocks", "key_blocks", "partial_slots", "full_slots", "splits", "split_keys",
)  # fmt: skip
_SMALL = (
    "query_heads", "key_heads", "width", "value_width", "left", "right", "query_block", "key_block", "pack", "aligned",
    "out_aligned",
)  # fmt: skip

#: ``struct Problem``, field by field.
ARGUMENT = np.dtype(
    [
        *((name, np.uint64) for name in _POINTERS),
        *((f"{name}_at", np.int64, (3,)) for name in _AXES),
        ("mask_at", np.int64, (4,)),
        *((name, np.int64) for name in _WIDE),
        ("seed", np.uint64),
        ("drop_below", np.uint64),
        *((name, np.int32) for name in _SMALL),
        *((name, np.float32) for name in ("scale", "scale_log2", "threshold", "keep_scale")),
    ],
    align=True,
)

_IDENTITY = "tilewise-expr 1 score\nscore\nreturn 0\n"


def _array(name: str, array: Any, query: DeviceArray, dtypes: tuple[str, ...] | None = None) -> DeviceArray:
    """An array beside `query`; of its type unless `dtypes` says otherwise."""
    described = describe(name, array, dtypes)
    same_place("query", query, name, described)
    if dtypes is None and described.dtype != query.dtype:
        raise DtypeError(f"{name}: expected dtype {query.dtype}, as query, got {described.dtype}; convert one of them")
    return described


def _table(name: str, array: Any, query: DeviceArray, dtype: str) -> DeviceArray:
    """Integers beside `query`, contiguous. A host array is copied to the GPU, which a graph capture refuses."""
    if query.is_torch and (isinstance(array, np.ndarray) or (is_torch(array) and array.device.type == "cpu")):
        array = sys.modules["torch"].as_tensor(array).to(query.array.device)
    elif isinstance(array, np.ndarray) and not isinstance(array, type(query.array)):
        import cupy  # pyright: ignore[reportMissingImports]

        with cupy.cuda.Device(query.device):
            array = cupy.asarray(array)
    return _array(name, array, query, ("int32", "int64")).cast(dtype).contiguous()


def rows_together(array: DeviceArray) -> DeviceArray:
    """Any strides but that of the last axis, which is 1; a copy only if it is not."""
    return array if 0 in array.shape or array.shape[-1] == 1 or array.strides[-1] == 1 else array.contiguous()


def _strides(array: DeviceArray) -> list[int]:
    """In elements; 0 for an axis that is never stepped along, whatever the framework says there."""
    return [stride if extent > 1 else 0 for stride, extent in zip(array.strides, array.shape, strict=True)]


def multiple(arrays: list[DeviceArray], count: int) -> bool:
    """Whether rows of all arrays begin and end at multiples of `count` bytes."""
    together = 0
    for array in arrays:
        size = ITEMSIZES[array.dtype]
        together |= array.pointer | array.shape[-1] * size
        for stride in _strides(array)[:-1]:
            together |= stride * size
    return together % count == 0


_FAULTS: dict[tuple[str, int], DeviceArray] = {}


def fault_of(query: DeviceArray) -> DeviceArray:
    """The fault flag of a GPU: int32 ``[1]``, made at the first call and kept.

    Kernels set it when a program reads outside a captured array (1) or divides an integer by 0 (2).
    """
    key = ("torch" if query.is_torch else "cupy", query.device)
    if key not in _FAULTS:
        flag = empty(query, (1,), "int32")
        if query.is_torch:
            flag.array.zero_()
        else:
            flag.array.fill(0)
        _FAULTS[key] = flag
    return _FAULTS[key]


def raise_faults(array: Any) -> None:
    """Wait for the GPU of `array` and raise what programs did wrong there since the last call.

    Kernels never read outside a captured array and never divide an integer by 0: they go on with 0 and leave a mark,
    since nobody waits for them.

    Args:
        array: a CuPy array or a torch CUDA tensor.

    Raises:
        ArgumentError: a program indexed outside a captured array, or divided an integer by 0.
    """
    flag = fault_of(describe("array", array))
    found = int(flag.array[0])
    if not found:
        return
    flag.array.fill_(0) if flag.is_torch else flag.array.fill(0)
    what = "an index outside a captured array" if found == 1 else "an integer division by 0"
    raise ArgumentError(f"score_mod or mask_mod: {what}, in a call since the last look; such elements counted as 0")


@dataclass
class Problem:
    """A checked call: arrays, and ``argument``, the kernels' struct, filled but for outputs.

    Attributes:
        query, key, value: with neighbouring elements in their last axis.
        features: bits of ``enum Feature`` but SPLIT.
        few: whether all rows of a sequence's head group fit into one tile of 64, so that keys are cut into parts.
        parts: how many.
    """

    query: DeviceArray
    key: DeviceArray
    value: DeviceArray
    rules: Any
    argument: np.ndarray
    features: int = 0
    few: bool = False
    parts: int = 1
    held: list[Any] = field(default_factory=list)  # what `argument` points to

    @classmethod
    def checked(cls, query: Any, key: Any, value: Any, rules: Any) -> Problem:
        """Check everything that does not need values.

        Raises:
            ArgumentError, DtypeError, ShapeError, UnsupportedError: as they say.
        """
        q = rows_together(describe("query", query, tuple(TYPES)))
        k, v = rows_together(_array("key", key, q)), rows_together(_array("value", value, q))
        for name, array in (("query", q), ("key", k), ("value", v)):
            if len(array.shape) != 4:
                raise ShapeError(f"{name}: expected rank 4 [batch, heads, length, width], got shape {array.shape}")
        batches, query_heads, _, width = q.shape
        pages = rules.block_table is not None
        free = pages or rules.sequences is not None
        if k.shape[3] != width or (k.shape[0] != batches and not free):
            raise ShapeError(f"key: expected [{batches}, heads, keys, {width}], to match query, got shape {k.shape}")
        if v.shape[:3] != k.shape[:3]:
            raise ShapeError(f"value: expected {list(k.shape[:3])} and a width, to match key, got shape {v.shape}")
        key_heads = k.shape[1]
        if query_heads and (key_heads == 0 or query_heads % key_heads):
            raise ShapeError(f"key: expected a number of heads that divides query's {query_heads}, got {key_heads}")
        for name, extent in (("query", width), ("value", v.shape[3])):
            if not 1 <= extent <= MAX_WIDTH:
                raise UnsupportedError(
                    f"{name}: the CUDA kernels take head widths from 1 to {MAX_WIDTH}, got {extent}; "
                    "call tilewise on the CPU for others"
                )
        problem = cls(q, k, v, rules, np.zeros((), ARGUMENT))
        problem._arrays(max(key_heads, 1))
        problem._bounds()
        problem._masks()
        problem._lists()
        problem._places()
        problem._split()
        return problem

    # --- filling the argument ---------------------------------------------------------------------------------

    def point(self, name: str, array: DeviceArray | None) -> None:
        """Set a pointer, and its strides where the argument has them."""
        if array is None:
            return
        self.held.append(array)
        self.argument[name] = array.pointer
        if name in _AXES:
            self.argument[f"{name}_at"] = _strides(array)[:3]

    def _arrays(self, key_heads: int) -> None:
        for name, array in (("query", self.query), ("key", self.key), ("value", self.value)):
            self.point(name, array)
        a, scale = self.argument, float(self.rules.scale)
        if not np.isfinite(scale):
            raise ArgumentError(f"scale: expected a finite number, got {scale}")
        if not 0.0 <= float(self.rules.threshold) <= 64.0:
            raise ArgumentError(f"threshold: expected powers of two from 0 to 64, got {self.rules.threshold}")
        a["batches"], a["query_heads"], a["queries"], a["width"] = self.query.shape
        a["key_heads"], a["keys"], a["value_width"] = key_heads, self.key.shape[2], self.value.shape[3]
        a["scale"], a["scale_log2"] = scale, scale * np.log2(np.e)
        a["threshold"] = self.rules.threshold
        a["list_batches"] = a["list_heads"] = 1
        a["pack"] = self.query.shape[1] // key_heads if self.query.shape[1] else 1
        a["aligned"] = multiple([self.query, self.key, self.value], 16)
        a["keep_scale"] = 1.0
        dropout = float(self.rules.dropout)
        if not 0.0 <= dropout <= 1.0:
            raise ArgumentError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        if dropout > 0:
            self.features |= kernels.DROPOUT
            a["seed"] = int(self.rules.seed) % 2**64
            a["drop_below"] = round(dropout * 2**32)
            a["keep_scale"] = 1.0 / (1.0 - dropout) if dropout < 1 else 0.0

    def _bounds(self) -> None:
        rules, a = self.rules, self.argument
        for name, value in (("left", rules.left), ("right", rules.right)):
            if value is not None and value < 0:
                raise ArgumentError(f"{name}: expected at least 0, or None for no limit, got {value}")
        right = 0 if rules.causal else rules.right
        a["left"] = _NO_LIMIT if rules.left is None else min(int(rules.left), _NO_LIMIT)
        a["right"] = _NO_LIMIT if right is None else min(int(right), _NO_LIMIT)

    def _masks(self) -> None:
        rules, a = self.rules, self.argument
        heads = self.query.shape[1]
        if rules.mask is not None:
            if rules.sequences is not None:
                raise ArgumentError("mask: expected none beside sequences, got both; write it as a mask_mod")
            mask = _array("mask", rules.mask, self.query, ("bool",))
            expected = (*self.query.shape[:3], self.key.shape[2])
            if mask.shape != expected:
                raise ShapeError(
                    f"mask: expected [batch, query_heads, queries, keys] = {list(expected)}, got {mask.shape}"
                )
            self.features |= kernels.DENSE
            self.point("mask", mask)
            a["mask_at"] = _strides(mask)
        if rules.sinks is not None:
            sinks = _array("sinks", rules.sinks, self.query, (*TYPES, "float64"))
            if sinks.shape != (heads,):
                raise ShapeError(f"sinks: expected [query_heads] = [{heads}], got shape {sinks.shape}")
            self.point("sinks", sinks.cast("float32").contiguous())

    def _lists(self) -> None:
        rules, a = self.rules, self.argument
        partial, full = rules.kv_indices is not None, rules.full_kv_indices is not None
        if rules.block_indices is not None:
            if partial or full:
                raise UnsupportedError(
                    "block_indices beside a block mask is not built for CUDA; fold one into the other"
                )
            if rules.sequences is not None:
                raise ArgumentError("block_indices: expected none beside sequences, got both")
            if rules.block_size < 1:
                raise ArgumentError(f"block_size: expected at least 1 with block_indices, got {rules.block_size}")
            blocks = _table("block_indices", rules.block_indices, self.query, "int32")
            shape, (batches, heads, queries, _) = blocks.shape, self.query.shape
            if len(shape) != 4 or shape[0] != batches or shape[2] != queries or not shape[1] or heads % shape[1]:
                allowed = f"[{batches}, a divisor of {heads}, {queries}, slots]"
                raise ShapeError(f"block_indices: expected {allowed}, got shape {shape}")
            self.features |= kernels.LISTS
            self.point("partial_list", blocks)
            a["query_block"], a["key_block"] = 1, rules.block_size
            a["list_batches"], a["list_heads"], a["query_blocks"], a["partial_slots"] = shape
        elif partial or full:
            if min(rules.query_block, rules.key_block) < 1:
                raise ArgumentError(
                    f"query_block, key_block: expected at least 1, got {rules.query_block} and {rules.key_block}"
                )
            self.features |= kernels.LISTS
            a["query_block"], a["key_block"] = rules.query_block, rules.key_block
            known: tuple[int, ...] | None = None
            for kind, counts, indices in (
                ("partial", rules.kv_num_blocks, rules.kv_indices),
                ("full", rules.full_kv_num_blocks, rules.full_kv_indices),
            ):
                if indices is None:
                    continue
                lists = _table(f"{kind} block list", indices, self.query, "int32")
                count = _table(f"{kind} block counts", counts, self.query, "int32")
                if len(lists.shape) != 4 or count.shape != lists.shape[:3] or known not in (None, lists.shape[:3]):
                    raise ShapeError(
                        f"block mask: expected counts [b, h, query_blocks] and indices [b, h, query_blocks, slots], "
                        f"got {count.shape} and {lists.shape}"
                    )
                known = lists.shape[:3]
                self.point(f"{kind}_list", lists)
                self.point(f"{kind}_count", count)
                a["list_batches"], a["list_heads"], a["query_blocks"], a[f"{kind}_slots"] = lists.shape
            heads = self.query.shape[1]
            if heads and (heads % int(a["list_heads"]) or int(a["list_heads"]) == 0):
                raise ShapeError(f"block mask: expected 1 or {heads} heads, got {a['list_heads']}")
        if self.features & kernels.LISTS:
            a["key_blocks"] = -(-int(self._longest()) // int(a["key_block"]))
            group, heads = int(a["pack"]), self.query.shape[1]
            if heads and (heads // int(a["list_heads"])) % group:
                a["pack"] = 1  # heads of a group see different blocks

    def _longest(self) -> int:
        """Keys that a sequence can have, as far as shapes say."""
        if self.rules.block_table is not None:
            return self.key.shape[2] * self.rules.block_table.shape[-1]
        return self.key.shape[2]

    def _places(self) -> None:
        rules, a = self.rules, self.argument
        if rules.sequences is not None:
            sequences = _table("sequences", rules.sequences, self.query, "int64")
            if len(sequences.shape) != 2 or sequences.shape[1] != 6:
                raise ShapeError(f"sequences: expected [n, 6], got shape {sequences.shape}")
            self.point("sequences", sequences)
            a["sequence_count"] = sequences.shape[0]
        if rules.block_table is not None:
            if rules.sequences is None:
                raise ArgumentError("block_table: expected sequences beside it, which say how many keys are used")
            table = _table("block_table", rules.block_table, self.query, "int32")
            if len(table.shape) != 2 or table.shape[0] != int(a["sequence_count"]):
                raise ShapeError(f"block_table: expected [{a['sequence_count']}, pages], got shape {table.shape}")
            self.features |= kernels.PAGED
            self.point("block_table", table)
            a["table_width"], a["page_size"] = table.shape[1], self.key.shape[2]
        longest = max(self.query.shape[2] * max(int(a["pack"]), 1), self._longest())
        slots = (int(a["partial_slots"]) + int(a["full_slots"])) * int(a["key_block"])
        if max(longest, slots) >= _LONGEST:
            raise UnsupportedError(
                f"the CUDA kernels take fewer than 2^30 rows and keys a sequence, got {max(longest, slots)}"
            )

    def _split(self) -> None:
        """Few rows over many keys: parts of the keys, by a rule that does not know the batch."""
        rules, a = self.rules, self.argument
        if rules.splits < 0:
            raise ArgumentError(f"splits: expected 0 (parts of {_CUT} keys) or their number, got {rules.splits}")
        lists = bool(self.features & kernels.LISTS)
        columns = (int(a["partial_slots"]) + int(a["full_slots"])) * int(a["key_block"]) if lists else self._longest()
        self.few = self.query.shape[2] * int(a["pack"]) <= 64
        if not self.few:
            return
        if rules.splits > 0:
            self.parts = int(rules.splits)
        elif columns > _CUT:
            self.parts = -(-columns // _CUT)
            a["split_keys"] = _CUT
        a["splits"] = self.parts

    # --- what launches ask ------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        return self.query.dtype

    @property
    def widths(self) -> tuple[int, int]:
        return kernels.bucket(self.query.shape[3]), kernels.bucket(self.value.shape[3])

    def mod(self, *, gradient: bool) -> tuple[Mod, list[DeviceArray]]:
        """The rendered programs and their captures. A scale that is not positive needs its scores one by one."""
        rules = self.rules
        score = rules.score_mod
        if score is None and not float(rules.scale) > 0:
            score = _IDENTITY
        captures = [
            [describe(f"{name}_captures[{i}]", array) for i, array in enumerate(arrays)]
            for name, arrays in (("score", rules.score_captures), ("mask", rules.mask_captures))
        ]
        for name, arrays in (("score", captures[0]), ("mask", captures[1])):
            for number, array in enumerate(arrays):
                same_place("query", self.query, f"{name}_captures[{number}]", array)
        made = render(
            score,
            tuple(array.dtype for array in captures[0]) if score is not None else (),
            rules.mask_mod,
            tuple(array.dtype for array in captures[1]) if rules.mask_mod is not None else (),
            _core.expr_gradient(score) if gradient and score is not None else None,
        )
        used = [*(captures[0] if score is not None else []), *(captures[1] if rules.mask_mod is not None else [])]
        return made, used

    def captures(self, mod: Mod, arrays: list[DeviceArray], sums: list[DeviceArray | None] | None = None) -> np.ndarray:
        """The second argument of kernels with a mod."""
        totals = list(sums or [])
        totals += [None] * (len(arrays) - len(totals))
        self.held += [*arrays, *totals]
        return capture_argument(mod, fault_of(self.query), arrays, totals)

    def row_tiles(self, size: int) -> int:
        """A bound on the tiles of packed rows that one head part of one sequence (or of all of a list) has."""
        pack, block = int(self.argument["pack"]), int(self.argument["query_block"])

        def tiles(count: int) -> int:
            return -(-count // block) * -(-block * pack // size) if block else -(-count * pack // size)

        if self.rules.sequences is None:
            return tiles(self.query.shape[2])
        return tiles(self.query.shape[0] * self.query.shape[2]) + int(self.argument["sequence_count"]) * (
            -(-block * pack // size) if block else 1
        )

    def key_tiles(self, size: int) -> int:
        """The same for tiles of keys."""
        block = int(self.argument["key_block"])

        def tiles(count: int) -> int:
            return -(-count // block) * -(-block // size) if block else -(-count // size)

        if self.rules.sequences is None:
            return tiles(self.key.shape[2])
        return tiles(self.key.shape[0] * self.key.shape[2]) + int(self.argument["sequence_count"]) * (
            -(-block // size) if block else 1
        )

    @property
    def head_parts(self) -> int:
        return self.query.shape[1] // int(self.argument["pack"]) if self.query.shape[1] else 0

    @property
    def copies(self) -> int:
        """Times that the grid repeats for the batch."""
        return 1 if self.rules.sequences is not None else self.query.shape[0]


def beside(name: str, array: Any, like: DeviceArray, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """A caller's array of a known shape and type, any strides.

    Raises:
        DeviceError, DtypeError, ShapeError: it does not fit.
    """
    described = describe(name, array, (dtype,))
    same_place("query", like, name, described)
    if described.shape != shape:
        raise ShapeError(f"{name}: expected {list(shape)}, got shape {described.shape}")
    return described


def output(name: str, array: Any, like: DeviceArray, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """A caller's array for a result.

    Raises:
        ArgumentError: its last axis is not contiguous.
        DeviceError, DtypeError, ShapeError: it does not fit.
    """
    described = beside(name, array, like, shape, dtype)
    if shape[-1] > 1 and described.strides[-1] != 1 and 0 not in shape:
        raise ArgumentError(f"{name}: expected a contiguous last axis, got strides {described.strides}")
    return described
