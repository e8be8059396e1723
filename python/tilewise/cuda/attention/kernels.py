"""The room's kernels: which tile a problem gets, and the stubs that instantiate it.

A kernel is compiled for element type, widths, features (``enum Feature`` in ``cuda/attention/problem.cuh``) and the mod
that programs rendered. Programs come at run time, so there is no list of all kernels: :data:`KERNELS` has a specimen of
each shape, plain and with everything, which is what the compile gate looks at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tilewise.cuda.expr import NO_MOD, Mod, render
from tilewise.cuda.kernel import ITEMSIZES, TYPES, Kernel

__all__ = [
    "DENSE",
    "DROPOUT",
    "KERNELS",
    "LISTS",
    "PAGED",
    "SPLIT",
    "BackwardShape",
    "ForwardShape",
    "backward_shape",
    "bucket",
    "combine",
    "delta",
    "forward",
    "forward_shape",
    "key_gradient",
    "mark_blocks",
    "query_gradient",
    "sink_gradient",
    "turn_blocks",
]

LISTS, PAGED, DROPOUT, DENSE, SPLIT = 1, 2, 4, 8, 16
ROW_WARPS, SINK_WARPS, BLOCK_WARPS = 4, 8, 4
GRAD_KEY, GRAD_VALUE = 1, 2
_ENTRY = "attention.cuh"


def bucket(width: int) -> int:
    """The width of a tile in shared memory for heads of `width`: a multiple of 64.

    Example:
        >>> bucket(40), bucket(128), bucket(129)
        (64, 128, 192)
    """
    return max(64, -(-width // 64) * 64)


@dataclass(frozen=True)
class ForwardShape:
    """``ForwardShape`` of ``cuda/attention/forward.cuh``: `row_groups` times 16 rows a warp, `columns` a tile."""

    dtype: str
    key_width: int
    value_width: int
    row_groups: int
    warps: int
    columns: int
    spread: bool
    warpgroups: bool = False

    @property
    def rows(self) -> int:
        return self.row_groups * 16 * (1 if self.spread else self.warps)

    @property
    def shared(self) -> int:
        size = ITEMSIZES[self.dtype]
        own = self.columns // self.warps if self.spread else self.columns
        scratch = self.warps * self.row_groups * 16 * own * 4 if self.dtype == "float32" else 0
        tiles = (self.rows * self.key_width + self.columns * (self.key_width + self.value_width)) * size
        merged = self.warps * self.rows * (self.value_width + 8 + 2) * 4 if self.spread else 0
        return max(tiles + 2 * self.columns * 4 + scratch, merged)


def forward_shape(
    dtype: str,
    key_width: int,
    value_width: int,
    features: int,
    mod: Mod,
    *,
    spread: bool,
    warpgroups: bool = False,
) -> ForwardShape:
    """The tile of a forward pass. Without features and mods there are registers for two groups of rows a warp at 64; at
    128 they would spill on sm_100a and sm_120, and eight warps share the keys instead. `warpgroups`: on sm_90a, where
    they are asked for; they take 16 bits and widths up to 128.
    """
    wide = max(key_width, value_width)
    special = features & ~SPLIT
    plain = not special and mod is NO_MOD
    if warpgroups and not spread and wide <= 128 and dtype != "float32":
        return ForwardShape(dtype, key_width, value_width, 1, 8, 128 if plain else 64, False, True)
    if dtype == "float32":
        warps = 4 if wide <= 128 else 2
        columns = 16 * warps if spread else 16
        if spread and wide > 64:
            warps, columns = 2, 32
        return ForwardShape(dtype, key_width, value_width, 1, warps, columns, spread)
    if spread:
        return ForwardShape(dtype, key_width, value_width, 1, 4, 64, True)
    if plain and wide <= 64:
        return ForwardShape(dtype, key_width, value_width, 2, 4, 64, False)
    if plain and wide <= 128:
        return ForwardShape(dtype, key_width, value_width, 1, 8, 64, False)
    return ForwardShape(dtype, key_width, value_width, 1, 4, 64 if wide <= 128 else 16 if special else 32, False)


@dataclass(frozen=True)
class BackwardShape:
    """``BackwardShape`` of ``cuda/attention/backward.cuh``: 16 rows a warp, `walked` rows of the other side a tile."""

    dtype: str
    key_width: int
    value_width: int
    warps: int
    walked: int

    @property
    def rows(self) -> int:
        return self.warps * 16

    @property
    def shared(self) -> int:
        tiles = (self.rows + 2 * self.walked) * (self.key_width + self.value_width) * ITEMSIZES[self.dtype]
        scratch = self.warps * 16 * self.walked * 4 if self.dtype == "float32" else 0
        return tiles + 2 * self.walked * 16 + scratch

    @property
    def together(self) -> bool:
        """Whether the sums of keys and of values fit into one launch."""
        return max(self.key_width, self.value_width) <= 128


def backward_shape(dtype: str, key_width: int, value_width: int) -> BackwardShape:
    """The tile of both backward kernels."""
    wide = max(key_width, value_width)
    if dtype == "float32":
        return BackwardShape(dtype, key_width, value_width, 4 if wide <= 64 else 2 if wide <= 128 else 1, 16)
    return BackwardShape(dtype, key_width, value_width, 4, 64 if wide <= 64 else 32 if wide <= 128 else 16)


def _kernel(operation: str, label: str, mod: Mod, parameters: str, shared: int, only: str | None = None) -> Kernel:
    name = f"tilewise_attention_{label}{'_' + mod.digest if mod.digest else ''}"
    return Kernel(name, _ENTRY, f"{mod.text}INSTANTIATE_ATTENTION_{operation}({name}, {parameters})\n", shared, only)


def _parameters(*values: object) -> str:
    return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


@functools.lru_cache(maxsize=1024)
def forward(shape: ForwardShape, features: int, mod: Mod) -> Kernel:
    """The forward pass, or with SPLIT its part of the keys."""
    kind, widths = TYPES[shape.dtype], (shape.key_width, shape.value_width)
    suffix = "_spread" if shape.spread else "_warpgroups" if shape.warpgroups else ""
    label = f"forward_{kind}_{widths[0]}x{widths[1]}_r{shape.row_groups}{suffix}_f{features}"
    tile = (*widths, shape.row_groups, shape.warps, shape.columns, shape.spread, shape.warpgroups)
    parameters = _parameters(f"tilewise::{kind}", *tile, features, mod.name)
    return _kernel("FORWARD", label, mod, parameters, shape.shared, "sm_90a" if shape.warpgroups else None)


@functools.lru_cache(maxsize=1024)
def query_gradient(shape: BackwardShape, features: int, mod: Mod) -> Kernel:
    """Gradients of queries, and by atomics of what programs captured."""
    kind, tile = TYPES[shape.dtype], (shape.key_width, shape.value_width, shape.warps, shape.walked)
    label = f"query_gradient_{kind}_{tile[0]}x{tile[1]}_f{features}"
    parameters = _parameters(f"tilewise::{kind}", *tile, 1, features, mod.name)
    return _kernel("QUERY_GRADIENT", label, mod, parameters, shape.shared)


@functools.lru_cache(maxsize=1024)
def key_gradient(shape: BackwardShape, what: int, features: int, mod: Mod) -> Kernel:
    """Gradients of keys (`what` has GRAD_KEY), of values (GRAD_VALUE), or of both."""
    kind, tile = TYPES[shape.dtype], (shape.key_width, shape.value_width, shape.warps, shape.walked)
    label = f"key_gradient{what}_{kind}_{tile[0]}x{tile[1]}_f{features}"
    parameters = _parameters(f"tilewise::{kind}", *tile, what, 1, features, mod.name)
    return _kernel("KEY_GRADIENT", label, mod, parameters, shape.shared)


def combine(dtype: str) -> Kernel:
    """Parts of rows, each over its own keys, put together."""
    kind = TYPES[dtype]
    return _kernel("COMBINE", f"combine_{kind}", NO_MOD, f"tilewise::{kind}, {ROW_WARPS}", 0)


def delta(dtype: str) -> Kernel:
    """Of each row the sum of out * grad_out, less grad_lse."""
    kind = TYPES[dtype]
    return _kernel("DELTA", f"delta_{kind}", NO_MOD, f"tilewise::{kind}, {ROW_WARPS}", 0)


def sink_gradient() -> Kernel:
    """Gradients of the sinks."""
    return _kernel("SINK_GRADIENT", "sink_gradient", NO_MOD, str(SINK_WARPS), SINK_WARPS * 4)


def mark_blocks() -> Kernel:
    """A map of the listed blocks."""
    return _kernel("MARK_BLOCKS", "mark_blocks", NO_MOD, str(BLOCK_WARPS), 0)


def turn_blocks() -> Kernel:
    """Of each key block the query blocks that list it."""
    return _kernel("TURN_BLOCKS", "turn_blocks", NO_MOD, str(BLOCK_WARPS), 0)


# The specimen mod of the gate: a soft cap with a learnable bias of relative positions, under a causal document mask.
_SCORE = """tilewise-expr 1 score
capture float 2
score
head
query
key
sub 2 3
gather 0 1 4
add 0 5
float 30.0
div 6 7
tanh 8
mul 9 7
return 10
"""
_GRADIENT = """tilewise-expr 1 gradient
capture float 2
score
grad
head
query
key
sub 3 4
gather 0 2 5
add 0 6
float 30.0
div 7 8
tanh 9
square 10
float 1.0
sub 12 11
mul 1 13
return 14
scatter 0 14 2 5
"""
_MASK = """tilewise-expr 1 mask
capture int 1
query
key
gather 0 0
gather 0 1
eq 2 3
ge 0 1
and 4 5
return 6
"""


def _specimens() -> tuple[Kernel, ...]:
    mod = render(_SCORE, ("float32",), _MASK, ("int32",), _GRADIENT)
    kernels: list[Kernel] = []

    def forwards(dtype: str, width: int, value_width: int, features: int, of: Mod, **engine: bool) -> None:
        shape = forward_shape(dtype, width, value_width, features, of, **({"spread": False} | engine))
        kernels.append(forward(shape, features, of))

    def backwards(dtype: str, width: int, value_width: int, features: int, of: Mod) -> None:
        shape = backward_shape(dtype, width, value_width)
        kernels.append(query_gradient(shape, features, of))
        whats = (GRAD_KEY | GRAD_VALUE,) if shape.together else (GRAD_KEY, GRAD_VALUE)
        kernels.extend(key_gradient(shape, what, features, of) for what in whats)

    everything = LISTS | DROPOUT | DENSE
    for width in (64, 128, 256):
        forwards("bfloat16", width, width, 0, NO_MOD)
        backwards("bfloat16", width, width, 0, NO_MOD)
    for width in (128, 256):
        forwards("bfloat16", width, width, everything | PAGED, mod)
        backwards("bfloat16", width, width, everything, mod)
    forwards("bfloat16", 256, 256, PAGED | SPLIT, mod, spread=True)
    for features, of in ((0, NO_MOD), (everything | PAGED, mod)):
        forwards("bfloat16", 128, 128, features, of, warpgroups=True)
    forwards("float16", 128, 64, 0, NO_MOD, warpgroups=True)
    forwards("float16", 64, 64, 0, NO_MOD)
    backwards("float16", 64, 64, 0, NO_MOD)
    forwards("float32", 256, 256, 0, NO_MOD)
    forwards("float32", 128, 128, everything | PAGED | SPLIT, mod, spread=True)
    backwards("float32", 256, 256, 0, NO_MOD)
    backwards("float32", 128, 128, everything, mod)
    return tuple(kernels)


#: What the compile gate compiles: every shape of tile, plain and with everything.
KERNELS: tuple[Kernel, ...] = (
    *_specimens(),
    *(make(dtype) for make in (combine, delta) for dtype in TYPES),
    sink_gradient(),
    mark_blocks(),
    turn_blocks(),
)
