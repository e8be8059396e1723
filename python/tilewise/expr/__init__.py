"""Score and mask functions as programs: ``lambda score, b, h, q, k: score + slopes[h] * (k - q)``.

A *mod* is traced once, by calling it with symbols, into a short text (one typed operation a line) that the core
simplifies, checks, differentiates, bounds over blocks, runs by tiles, and renders to CUDA.

* :mod:`~tilewise.expr.mod`: :class:`Mod` and :func:`trace`;
* :mod:`~tilewise.expr.symbols`: what a traced function computes with, and :func:`array` for what it captures;
* :mod:`~tilewise.expr.functions`: ``where``, ``tanh``, ``minimum`` ... of symbols, NumPy arrays and torch tensors;
* :mod:`~tilewise.expr.nodes`: the typed nodes; :mod:`~tilewise.expr.text`: the program text;
  :mod:`~tilewise.expr.show`: expressions in messages.

torch functions are traced by :mod:`tilewise.torch.expr`, into the same :class:`Mod`.
"""

from __future__ import annotations

from tilewise.expr.functions import (
    abs,
    atan2,
    ceil,
    clip,
    constant_like,
    cos,
    erf,
    exp,
    exp2,
    expm1,
    floor,
    isinf,
    isnan,
    log,
    log1p,
    log2,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    maximum,
    minimum,
    power,
    reciprocal,
    relu,
    round,
    rsqrt,
    sigmoid,
    sign,
    sin,
    sqrt,
    square,
    tan,
    tanh,
    to_bool,
    to_float,
    to_int,
    trunc,
    where,
)
from tilewise.expr.mod import Mod, trace
from tilewise.expr.symbols import Array, Symbol, array

__all__ = [
    "Array",
    "Mod",
    "Symbol",
    "abs",
    "array",
    "atan2",
    "ceil",
    "clip",
    "constant_like",
    "cos",
    "erf",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "isinf",
    "isnan",
    "log",
    "log1p",
    "log2",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "maximum",
    "minimum",
    "power",
    "reciprocal",
    "relu",
    "round",
    "rsqrt",
    "sigmoid",
    "sign",
    "sin",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "to_bool",
    "to_float",
    "to_int",
    "trace",
    "trunc",
    "where",
]
