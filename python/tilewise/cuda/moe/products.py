"""The launches of the expert layer's matrix products and of the sums beside them.

Each function takes checked arrays, allocates its outputs and launches one kernel. What the kernels compute stands in
``cuda/moe/rows.cuh``, ``weights.cuh`` and ``reduce.cuh``. An instantiation depends on the element type and on who
multiplies (:class:`Engine`); activation, layout and biases are arguments, so no other choice can be stale in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewise.cuda.kernel import ITEMSIZES, TYPES, Kernel
from tilewise.cuda.launch import DeviceArray, architecture, empty, launch, warpgroups_wanted
from tilewise.cuda.moe.sorting import TILE, Plan
from tilewise.moe import ACTIVATIONS

__all__ = ["KERNELS", "Problem", "bias_gradient", "down", "down_gradient", "input_gradient", "score_gradient", "up"]

_THREADS = 256
_SCORE_WARPS, _BIAS_WARPS = 4, 8
_INDEX = {"int32": "int", "int64": "long long"}


@dataclass(frozen=True)
class Engine:
    """Who multiplies a tile (``cuda/gemm/operand.cuh``), how many columns it has, and the shared memory that takes."""

    name: str
    suffix: str
    columns: int
    shared: int
    only: str | None = None


_PITCH = 8  # columns of unused room behind each row of unloaded sums
_ALIGNED = Engine("Aligned", "", 128, TILE * (128 + _PITCH) * 4)
_UNALIGNED = Engine("Unaligned", "_unaligned", 128, TILE * (128 + _PITCH) * 4)
_WARPGROUPS = Engine("Warpgroups", "_warpgroups", 256, 4 * (TILE + 256) * 128, "sm_90a")
_ENGINES = (_ALIGNED, _UNALIGNED, _WARPGROUPS)


def _product(operation: str, dtype: str, engine: Engine, *parameters: str, label: str | None = None) -> Kernel:
    name = f"tilewise_moe_{label or operation}_{TYPES[dtype]}{engine.suffix}"
    element = f"tilewise::{TYPES[dtype]}"
    arguments = ", ".join((name, element, f"{engine.name}<{element}>", *parameters))
    stub = f"INSTANTIATE_MOE_{operation.upper()}({arguments})\n"
    return Kernel(name, "moe.cuh", stub, engine.shared, engine.only)


def _up(dtype: str, engine: Engine) -> Kernel:
    return _product("up", dtype, engine)


def _down(dtype: str, engine: Engine) -> Kernel:
    return _product("linear", dtype, engine, "false", label="down")


def _down_gradient(dtype: str, engine: Engine) -> Kernel:
    return _product("down_gradient", dtype, engine)


def _input_gradient(dtype: str, engine: Engine) -> Kernel:
    return _product("linear", dtype, engine, "true", label="input_gradient")


def _weight_gradient(dtype: str, engine: Engine) -> Kernel:
    return _product("weight_gradient", dtype, engine)


def _score_gradient(dtype: str, index: str) -> Kernel:
    name = f"tilewise_moe_score_gradient_{TYPES[dtype]}_{index}"
    arguments = f"{name}, tilewise::{TYPES[dtype]}, {_INDEX[index]}, {_SCORE_WARPS}"
    return Kernel(name, "moe.cuh", f"INSTANTIATE_MOE_SCORE_GRADIENT({arguments})\n")


def _bias_gradient(dtype: str) -> Kernel:
    name = f"tilewise_moe_bias_gradient_{TYPES[dtype]}"
    stub = f"INSTANTIATE_MOE_BIAS_GRADIENT({name}, tilewise::{TYPES[dtype]}, {_BIAS_WARPS})\n"
    return Kernel(name, "moe.cuh", stub)


#: Every instantiation of the layer's products and sums.
KERNELS: tuple[Kernel, ...] = (
    *(
        make(dtype, engine)
        for make in (_up, _down, _down_gradient, _input_gradient, _weight_gradient)
        for dtype in TYPES
        for engine in _ENGINES
        if not (engine is _WARPGROUPS and dtype == "float32")
    ),
    *(_score_gradient(dtype, index) for dtype in TYPES for index in _INDEX),
    *(_bias_gradient(dtype) for dtype in TYPES),
)


@dataclass(frozen=True)
class Problem:
    """A checked call of the layer. Arrays have neighbouring elements in their last axis.

    Attributes:
        x: ``[tokens, d]``.
        gate_up: ``[experts, wide, d]``; wide is 2n with a gate, else n.
        down: ``[experts, d, n]``.
        gate_up_bias, down_bias: float32, contiguous, or ``None``.
        scores: the weight of each pair, float32, contiguous.
        plan: the sorted pairs.
        activation, interleaved, alpha, limit: as the caller said.
    """

    x: DeviceArray
    gate_up: DeviceArray
    down: DeviceArray
    gate_up_bias: DeviceArray | None
    down_bias: DeviceArray | None
    scores: DeviceArray
    plan: Plan
    activation: str
    interleaved: bool
    alpha: float
    limit: float

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def n(self) -> int:
        return self.down.shape[2]

    @property
    def wide(self) -> int:
        return self.gate_up.shape[1]

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    @property
    def code(self) -> np.int32:
        """Number of the activation: ``enum Activation`` in ``cuda/moe/activation.cuh`` has the order of the table."""
        return np.int32(list(ACTIVATIONS).index(self.activation))

    @property
    def order(self) -> tuple[np.int64, np.int32]:
        """Units, and whether gates and ups alternate; a plain activation has no order."""
        return np.int64(self.n), np.int32(self.interleaved and ACTIVATIONS[self.activation])


def _stride(array: DeviceArray, axis: int) -> np.int64:
    """In elements; 0 for an axis that is never stepped along, whatever the framework says there."""
    return np.int64(array.strides[axis] if array.shape[axis] > 1 else 0)


def _engine(problem: Problem, columns: int, *arrays: DeviceArray) -> Engine:
    """The engine for a product of that many columns.

    Rows that do not all start and end at multiples of 16 bytes have one of their own. Warpgroups are asked for by
    ``TILEWISE_CUDA_WARPGROUPS=1``, and take products with more than half of their columns.
    """
    size = ITEMSIZES[problem.x.dtype]
    together = problem.d * size | problem.n * size
    for array in arrays:
        together |= array.pointer
        for axis in range(len(array.shape) - 1):
            together |= int(_stride(array, axis)) * size
    if together % 16 != 0:
        return _UNALIGNED
    if size == 2 and columns > _ALIGNED.columns and warpgroups_wanted():
        return _WARPGROUPS if architecture(problem.x) == _WARPGROUPS.only else _ALIGNED
    return _ALIGNED


def _over(problem: Problem, columns: int, width: int) -> tuple[int, int, int]:
    return problem.plan.slots * -(-columns // width), 1, 1


_BLOCK = (_THREADS, 1, 1)


def up(problem: Problem, *, keep: bool) -> tuple[DeviceArray | None, DeviceArray]:
    """``(H, A)``: the first product, if it is to be kept, and its activation."""
    x, plan, weight = problem.x, problem.plan, problem.gate_up
    h = empty(x, (plan.pairs, problem.wide), x.dtype) if keep else None
    a = empty(x, (plan.pairs, problem.n), x.dtype)
    arguments = (
        *(h, a, x, _stride(x, 0), plan.row_token, plan.offsets, plan.schedule),
        *(weight, _stride(weight, 0), _stride(weight, 1), problem.gate_up_bias, np.int64(problem.d)),
        *(np.int64(problem.n), np.int32(problem.experts), problem.code, problem.order[1]),
        *(np.float32(problem.alpha), np.float32(problem.limit)),
    )
    engine = _engine(problem, problem.wide, x, weight, a, *(() if h is None else (h,)))
    width = engine.columns // 2 if ACTIVATIONS[problem.activation] else engine.columns
    launch(_up(x.dtype, engine), _over(problem, problem.n, width), _BLOCK, arguments, x)
    return h, a


def down(problem: Problem, a: DeviceArray) -> DeviceArray:
    """``Y``: the second product with its bias, a row for each pair."""
    x, plan, weight = problem.x, problem.plan, problem.down
    y = empty(x, (plan.pairs, problem.d), x.dtype)
    arguments = (
        *(y, a, plan.offsets, plan.schedule, weight, _stride(weight, 0), _stride(weight, 1), problem.down_bias),
        *(np.int64(problem.n), np.int64(problem.d), np.int32(problem.experts), np.int64(0), np.int32(0)),
    )
    engine = _engine(problem, problem.d, a, weight, y)
    launch(_down(x.dtype, engine), _over(problem, problem.d, engine.columns), _BLOCK, arguments, x)
    return y


def down_gradient(
    problem: Problem, grad: DeviceArray, h: DeviceArray, *, inner: bool, scaled: bool, scores: bool
) -> tuple[DeviceArray | None, DeviceArray | None, DeviceArray | None]:
    """``(dH, A', partial sums of the scores' gradients)``, each only if asked for."""
    x, plan, weight = problem.x, problem.plan, problem.down
    dh = empty(x, (plan.pairs, problem.wide), x.dtype) if inner else None
    a = empty(x, (plan.pairs, problem.n), x.dtype) if scaled else None
    touched = [array for array in (grad, h, weight, dh, a) if array is not None]
    engine = _engine(problem, problem.n, *touched)
    partial = empty(x, (plan.pairs, -(-problem.n // engine.columns)), "float32") if scores else None
    arguments = (
        *(dh, a, partial, grad, _stride(grad, 0), h, plan.row_token, plan.row_pair, problem.scores),
        *(plan.offsets, plan.schedule, weight, _stride(weight, 0), _stride(weight, 1), np.int64(problem.d)),
        *(np.int64(problem.n), np.int32(problem.experts), problem.code),
        *(np.float32(problem.alpha), np.float32(problem.limit)),
    )
    launch(_down_gradient(x.dtype, engine), _over(problem, problem.n, engine.columns), _BLOCK, arguments, x)
    return dh, a, partial


def input_gradient(problem: Problem, dh: DeviceArray) -> DeviceArray:
    """``dX'``: the gradient of each row's input."""
    x, plan, weight = problem.x, problem.plan, problem.gate_up
    dx = empty(x, (plan.pairs, problem.d), x.dtype)
    arguments = (
        *(dx, dh, plan.offsets, plan.schedule, weight, _stride(weight, 0), _stride(weight, 1), None),
        *(np.int64(problem.wide), np.int64(problem.d), np.int32(problem.experts), *problem.order),
    )
    engine = _engine(problem, problem.d, dh, weight, dx)
    launch(_input_gradient(x.dtype, engine), _over(problem, problem.d, engine.columns), _BLOCK, arguments, x)
    return dx


def _outer(
    problem: Problem, left: DeviceArray, left_map: Any, right: DeviceArray, right_map: Any, order: tuple[Any, Any]
) -> DeviceArray:
    """Of each expert, the sum over its rows of left row (outer) right row."""
    rows, columns = left.shape[1], right.shape[1]
    out = empty(problem.x, (problem.experts, rows, columns), problem.x.dtype)
    arguments = (
        *(out, left, _stride(left, 0), left_map, right, _stride(right, 0), right_map, problem.plan.offsets),
        *(np.int64(rows), np.int64(columns), *order),
    )
    engine = _engine(problem, columns, left, right, out)
    tiles = -(-rows // TILE) * -(-columns // engine.columns)
    launch(_weight_gradient(problem.x.dtype, engine), (problem.experts * tiles, 1, 1), _BLOCK, arguments, problem.x)
    return out


def gate_up_gradient(problem: Problem, dh: DeviceArray) -> DeviceArray:
    """``dW1``, rows in the caller's layout; zeros for an expert without rows."""
    return _outer(problem, dh, None, problem.x, problem.plan.row_token, problem.order)


def down_weight_gradient(problem: Problem, grad: DeviceArray, scaled: DeviceArray) -> DeviceArray:
    """``dW2``; zeros for an expert without rows."""
    return _outer(problem, grad, problem.plan.row_token, scaled, None, (np.int64(0), np.int32(0)))


def score_gradient(problem: Problem, grad: DeviceArray, partial: DeviceArray) -> DeviceArray:
    """Gradient of the weight of each pair, float32; 0 for a sentinel."""
    plan = problem.plan
    out = empty(problem.x, plan.ids.shape, "float32")
    arguments = (
        *(out, partial, np.int64(partial.shape[1]), plan.pair_row, plan.row_token, plan.ids, grad, _stride(grad, 0)),
        *(problem.down_bias, np.int64(plan.pairs), np.int64(problem.d)),
    )
    grid = (-(-plan.pairs // _SCORE_WARPS), 1, 1)
    launch(_score_gradient(problem.x.dtype, plan.ids.dtype), grid, (32 * _SCORE_WARPS, 1, 1), arguments, problem.x)
    return out


def bias_gradient(problem: Problem, source: DeviceArray, *, of_down: bool) -> DeviceArray:
    """Of each expert, the sum of its rows of dH; or (`of_down`) of its tokens' rows of dO, each times its score."""
    plan, columns = problem.plan, source.shape[1]
    out = empty(problem.x, (problem.experts, columns), problem.x.dtype)
    gather = (plan.row_token, plan.row_pair, problem.scores) if of_down else (None, None, None)
    order = (np.int64(0), np.int32(0)) if of_down else problem.order
    arguments = (out, source, _stride(source, 0), *gather, plan.offsets, np.int64(columns), *order)
    grid = (problem.experts * -(-columns // 32), 1, 1)
    launch(_bias_gradient(problem.x.dtype), grid, (32 * _BIAS_WARPS, 1, 1), arguments, problem.x)
    return out
