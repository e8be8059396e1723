"""The meaning of a program text: NumPy over every element, one array a node.

A program modifies attention: a ``score`` program maps a score to a score, a ``mask`` program says which keys a query
attends, a ``gradient`` program is the derivative of a score program. A text has a line a node::

    tilewise-expr 1 score
    capture float 1
    score
    head
    gather 0 1
    add 0 2
    return 3

Operands are numbers of earlier nodes. Values are ``float``, ``int`` (64-bit, wrapping) or ``bool``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewise.errors import ArgumentError

__all__ = ["evaluate", "gradients"]

_Array = NDArray[Any]


def _sigmoid(x: _Array) -> _Array:
    return 1 / (1 + np.exp(-x))


def _int_divide(rounded: Callable[[_Array, _Array], _Array]) -> Callable[[_Array, _Array], _Array]:
    def divide(a: _Array, b: _Array) -> _Array:
        if np.any(b == 0):
            raise ArgumentError("an integer division by zero")
        return rounded(a, b)

    return divide


def _truncated(a: _Array, b: _Array) -> _Array:
    return np.where((a < 0) != (b < 0), -(np.abs(a) // np.abs(b)), np.abs(a) // np.abs(b))


def _shift_left(a: _Array, b: _Array) -> _Array:
    return np.where((b >= 0) & (b < 64), np.left_shift(a, np.clip(b, 0, 63)), 0)


def _shift_right(a: _Array, b: _Array) -> _Array:
    return np.right_shift(a, np.where((b >= 0) & (b < 63), b, 63))


def _to_int(x: _Array) -> _Array:
    if x.dtype == np.bool_:
        return x.astype(np.int64)
    inside = (x >= -(2.0**63)) & (x < 2.0**63)
    whole = np.where(inside, x, 0).astype(np.int64)
    ends = np.where(x >= 2.0**63, np.iinfo(np.int64).max, np.where(x < -(2.0**63), np.iinfo(np.int64).min, 0))
    return np.where(inside, whole, ends)


_ANY: dict[str, Callable[..., _Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    # Like torch: the sign of NaN is 0.
    "sign": lambda x: ((x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)),
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "erf": lambda x: np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),
    "relu": lambda x: np.where(x < 0, x.dtype.type(0), x),
    "square": lambda x: x * x,
    "not": np.logical_not,
    "to_int": _to_int,
    "to_bool": lambda x: x != 0,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "div": np.divide,
    "atan2": np.arctan2,
    "pow": np.power,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift_left,
    "shr": _shift_right,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "where": np.where,
}
_INT: dict[str, Callable[..., _Array]] = {
    "floor_div": _int_divide(np.floor_divide),
    "mod": _int_divide(np.mod),
    "trunc_div": _int_divide(_truncated),
}
_FLOAT: dict[str, Callable[..., _Array]] = {"floor_div": np.floor_divide, "mod": np.mod}


def _captured(spec: str, capture: ArrayLike, dtype: Any) -> _Array:
    kinds: dict[str, Any] = {"float": dtype, "int": np.int64, "bool": np.bool_}
    return np.asarray(capture).astype(kinds[spec])


def _place(index: list[_Array], shape: tuple[int, ...]) -> tuple[_Array, ...]:
    for axis, (numbers, extent) in enumerate(zip(index, shape, strict=True)):
        if np.any((numbers < -extent) | (numbers >= extent)):
            raise ArgumentError(f"an index outside axis {axis} of a captured array of shape {shape}")
    return tuple(index)


def _run(
    program: str,
    captures: Sequence[ArrayLike],
    extents: tuple[int, int, int, int],
    score: ArrayLike | None,
    grad: ArrayLike | None,
    dtype: Any,
) -> tuple[_Array, list[_Array | None]]:
    batch, heads, queries, keys = extents
    lines = [line.split("#")[0].split() for line in program.splitlines()]
    lines = [line for line in lines if line]
    if lines[0][:2] != ["tilewise-expr", "1"]:
        raise ArgumentError(f"expected a program that starts with 'tilewise-expr 1', got '{program[:40]}'")
    zeros = np.zeros(extents, dtype)
    leaves: dict[str, _Array] = {
        "score": zeros if score is None else np.asarray(score).astype(dtype),
        "grad": zeros if grad is None else np.asarray(grad).astype(dtype),
        "batch": np.arange(batch, dtype=np.int64)[:, None, None, None],
        "head": np.arange(heads, dtype=np.int64)[:, None, None],
        "query": np.arange(queries, dtype=np.int64)[:, None],
        "key": np.arange(keys, dtype=np.int64),
    }
    classes = [line[1] for line in lines[1:] if line[0] == "capture"]
    arrays = [_captured(kind, array, dtype) for kind, array in zip(classes, captures, strict=True)]
    sums: list[_Array | None] = [None] * len(arrays)
    nodes: list[_Array] = []
    result = zeros
    for name, *words in lines[1:]:
        if name == "capture":
            continue
        if name == "return":
            result = np.broadcast_to(nodes[int(words[0])], extents)
        elif name == "scatter":
            capture, value, *index = (int(word) for word in words)
            place = [np.broadcast_to(nodes[i], extents).ravel() for i in index]
            total = sums[capture]
            if total is None:
                total = sums[capture] = np.zeros(arrays[capture].shape, dtype)
            added = np.broadcast_to(nodes[value], extents).ravel()
            if place:
                np.add.at(total, _place(place, total.shape), added)
            else:
                total += added.sum()
        elif name in leaves:
            nodes.append(leaves[name])
        elif name in ("float", "int", "bool"):
            kinds: dict[str, Any] = {"float": dtype, "int": np.int64, "bool": np.bool_}
            nodes.append(np.asarray(float(words[0]) if name == "float" else int(words[0])).astype(kinds[name]))
        elif name == "gather":
            array = arrays[int(words[0])]
            index = np.broadcast_arrays(*(nodes[int(i)] for i in words[1:])) if words[1:] else []
            nodes.append(array[_place(list(index), array.shape)])
        else:
            operands = [nodes[int(i)] for i in words]
            table = _INT if operands[-1].dtype == np.int64 else _FLOAT
            if name == "to_float":
                nodes.append(operands[0].astype(dtype))
            else:
                nodes.append(np.asarray((table.get(name) or _ANY[name])(*operands)))
    return result.copy(), sums


def evaluate(
    program: str,
    captures: Sequence[ArrayLike] = (),
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    score: ArrayLike | None = None,
    grad: ArrayLike | None = None,
    dtype: Any = np.float64,
) -> _Array:
    """What a program returns for every element.

    Args:
        program: the text.
        captures: one array for each ``capture`` line.
        batch, heads, queries, keys: extents.
        score: ``[batch, heads, queries, keys]``, scaled scores; zeros if not given.
        grad: the same shape: derivative of a loss by the modified score, for gradient programs.
        dtype: what floats are computed in (float64; float32 shows what a plain run in that precision loses).

    Returns:
        ``[batch, heads, queries, keys]``, bool for a mask and ``dtype`` otherwise.

    Raises:
        ArgumentError: an index outside a captured array, an integer division by zero.

    Example:
        >>> causal = "tilewise-expr 1 mask\\nquery\\nkey\\nge 0 1\\nreturn 2"
        >>> evaluate(causal, batch=1, heads=1, queries=2, keys=3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    with np.errstate(all="ignore"):
        return _run(program, captures, (batch, heads, queries, keys), score, grad, dtype)[0]


def gradients(
    program: str,
    captures: Sequence[ArrayLike] = (),
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    score: ArrayLike | None = None,
    grad: ArrayLike | None = None,
    dtype: Any = np.float64,
) -> tuple[_Array, list[_Array | None]]:
    """What a gradient program returns and adds into its captures' gradients.

    Args:
        program, captures, batch, heads, queries, keys, score, grad, dtype: as in :func:`evaluate`.

    Returns:
        The derivative by the score ``[batch, heads, queries, keys]``, and for each capture its gradient, or None if the
        program adds nothing to it.

    Raises:
        ArgumentError: as in :func:`evaluate`.

    Example:
        >>> text = "tilewise-expr 1 gradient\\ncapture float 1\\ngrad\\nhead\\nreturn 0\\nscatter 0 0 1"
        >>> ones = np.ones((1, 2, 3, 4))
        >>> gradients(text, [[0.0, 0.0]], batch=1, heads=2, queries=3, keys=4, grad=ones)[1][0].tolist()
        [12.0, 12.0]
    """
    with np.errstate(all="ignore"):
        return _run(program, captures, (batch, heads, queries, keys), score, grad, dtype)
