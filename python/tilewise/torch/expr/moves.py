"""ATen operators that move elements of symbols, gather them from tables, or reduce small arrays of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from tilewise.errors import UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.nodes import Node
from tilewise.torch.expr.aten import (
    TABLE,
    Rule,
    Values,
    add,
    div,
    elementwise,
    lt,
    maximum,
    minimum,
    mul,
    number,
    rule_of,
    truth,
    typed,
)
from tilewise.torch.expr.indexing import gather_tensor, getitem
from tilewise.torch.expr.symbol import box, class_of_dtype, elements, numel

__all__: list[str] = []  # rules of the table


# Views.
@rule_of("view", "reshape", "expand", "unsqueeze", "squeeze")
def _reshaped(x: Any, *_: Any, out: Any, **__: Any) -> Values:
    values = elements(x)
    if values.size == numel(out.shape):
        return values.reshape(tuple(out.shape))
    return np.broadcast_to(values, tuple(out.shape))


def _by_positions(operator: Any) -> Rule:
    """A view that chooses elements: let torch do it to their numbers."""

    def rule(x: Any, *args: Any, out: Any, **kwargs: Any) -> Any:
        values = elements(x)
        numbers = torch.arange(values.size).reshape(values.shape)
        chosen = operator(numbers, *args, **kwargs)
        flat = values.reshape(-1)
        if isinstance(chosen, torch.Tensor):
            return flat[chosen.numpy()] if chosen.ndim else box(flat[int(chosen)])
        return [flat[one.numpy()] if one.ndim else box(flat[int(one)]) for one in chosen]

    return rule


_ATEN = torch.ops.aten
for _name, _operator in {
    "permute": _ATEN.permute, "transpose": _ATEN.transpose, "t": _ATEN.t, "select": _ATEN.select,
    "slice": _ATEN.slice, "diagonal": _ATEN.diagonal, "unbind": _ATEN.unbind, "split": _ATEN.split,
    "flip": _ATEN.flip, "repeat": _ATEN.repeat, "unfold": _ATEN.unfold,
}.items():  # fmt: skip
    TABLE[_name] = _by_positions(_operator)


@rule_of("stack")
def _stack(tensors: Any, dim: int = 0, *, out: Any) -> Values:
    return np.stack([_typed_like(x, out) for x in tensors], dim)


@rule_of("cat", "concat")
def _cat(tensors: Any, dim: int = 0, *, out: Any) -> Values:
    return np.concatenate([_typed_like(x, out) for x in tensors], dim)


def _typed_like(value: Any, out: torch.Tensor) -> Values:
    return elementwise(lambda x: nodes.cast(x, class_of_dtype(out.dtype)), elements(value))


# Gathers that are not spelt as an index.
@rule_of("index")
def _index(x: Any, indices: Any, *, out: Any) -> Values:
    return elements(getitem(x, tuple(slice(None) if i is None else i for i in indices)))


@rule_of("index_select")
def _index_select(x: Any, dim: int, index: Any, *, out: Any) -> Values:
    items: list[Any] = [slice(None)] * x.ndim
    items[dim] = index
    return elements(getitem(x, tuple(items)))


@rule_of("embedding")
def _embedding(weight: Any, index: Any, *_: Any, out: Any, **__: Any) -> Values:
    return elements(getitem(weight, (index,)))


@rule_of("take")
def _take(x: Any, index: Any, *, out: Any) -> Values:
    # The flat index, which wraps once when negative, by axes.
    where = elements(index)
    size = x.numel()
    where = elementwise(lambda i: nodes.where(lt(i, number(0)), add(i, number(size)), i), where)
    indices: list[Values] = []
    stride = size
    for extent in x.shape:
        stride //= extent
        step, wide = number(stride), number(extent)
        indices.append(
            elementwise(lambda i, s=step, w=wide: nodes.binary("mod", nodes.binary("floor_div", i, s), w), where)
        )
    return elements(gather_tensor(x, indices, tuple(out.shape)))


# Reductions of small arrays.
def _reduce(function: Callable[[Node, Node], Node], empty: Any) -> Rule:
    def rule(x: Any, dim: Any = None, keepdim: bool = False, *, out: Any, **_: Any) -> Values:
        values = typed(x, out) if empty is not None and not isinstance(empty, bool) else elements(x)
        if isinstance(empty, bool):
            values = elementwise(truth, values)
        axes = range(values.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        axes = tuple(sorted(axis % max(values.ndim, 1) for axis in axes)) if values.ndim else ()
        kept = [axis for axis in range(values.ndim) if axis not in axes]
        rows = values.transpose(*kept, *axes).reshape(*(values.shape[axis] for axis in kept), -1)
        result = np.ndarray(rows.shape[:-1], object)
        for place in np.ndindex(*result.shape):
            row = list(rows[place])
            if not row and empty is None:
                raise UnsupportedError("a reduction of no elements has no value")
            result[place] = reduce(function, row) if row else nodes.fill(empty or 0, class_of_dtype(out.dtype))
        return result.reshape(tuple(out.shape))

    return rule


TABLE["sum"] = _reduce(add, 0)
TABLE["prod"] = _reduce(mul, 1)
TABLE["any"] = _reduce(lambda x, y: nodes.bitwise("or", x, y), False)
TABLE["all"] = _reduce(lambda x, y: nodes.bitwise("and", x, y), True)
TABLE["amax"] = _reduce(maximum, None)
TABLE["amin"] = _reduce(minimum, None)


def _extreme_of(op: str) -> Rule:
    whole, two = TABLE[f"a{op}"], {"max": maximum, "min": minimum}[op]

    def rule(x: Any, *args: Any, out: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            return elementwise(two, elements(x), elements(args[0]))
        if args or kwargs:
            raise UnsupportedError(f"{op} along an axis gives indices too, which have no program; use torch.a{op}")
        return whole(x, out=out)

    return rule


TABLE["max"], TABLE["min"] = _extreme_of("max"), _extreme_of("min")


@rule_of("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, *, out: Any, **_: Any) -> Values:
    total = TABLE["sum"](x, dim, keepdim, out=out)
    count = x.numel() / max(numel(out.shape), 1)
    return elementwise(lambda node: div(node, number(float(count))), total)


@rule_of("dot", "vdot", "inner")
def _dot(x: Any, y: Any, *, out: Any) -> Values:
    return box(reduce(add, map(mul, typed(x, out), typed(y, out))) if x.numel() else nodes.fill(0, "float"))


@rule_of("mv", "mm")
def _matrix(x: Any, y: Any, *, out: Any) -> Values:
    left, right = typed(x, out), typed(y, out)
    columns = right.reshape(right.shape[0], -1)
    result = np.ndarray((left.shape[0], columns.shape[1]), object)
    for i, j in np.ndindex(*result.shape):
        result[i, j] = reduce(add, map(mul, left[i], columns[:, j]))
    return result.reshape(tuple(out.shape))
