"""``table[b, q - k]``: indexing by symbols, which torch would do by asking for their values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tilewise.errors import UnsupportedError
from tilewise.expr import nodes
from tilewise.torch.expr.symbol import LIMIT, SymbolTensor, current, elements, where_from

__all__ = ["gather_tensor", "getitem"]


def getitem(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` where either holds symbols; a captured tensor is gathered from at each element asked for.

    Integers, slices, ``...``, ``None`` and arrays of symbols follow torch's rules: integers select, indices given as
    tensors broadcast together and stand at the first of their axes, or in front where a slice lies between them.

    Raises:
        UnsupportedError: a float or a bool as an index, or too many elements.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    shape = tuple(tensor.shape)
    items = _expand(items, len(shape))
    if isinstance(tensor, SymbolTensor) and not any(isinstance(x, SymbolTensor) for x in items):
        return _wrap(tensor.graph[tuple(_static(x) for x in items)], tensor.dtype, tensor.device)
    # Output axes: one for each slice and None, and one group for all indices given as tensors.
    axes: list[tuple[str, Any, int]] = []  # (how, index, axis of the tensor)
    axis = 0
    for item in items:
        if item is None:
            axes.append(("new", None, -1))
            continue
        if isinstance(item, slice):
            axes.append(("slice", np.arange(shape[axis])[item], axis))
        elif isinstance(item, bool | np.bool_):
            raise UnsupportedError(f"a bool is no index; choose by torch.where(condition, a, b){where_from()}")
        elif isinstance(item, int | np.integer):
            axes.append(("select", int(item), axis))
        else:
            axes.append(("tensor", _index_nodes(item, tensor), axis))
        axis += 1
    grouped = [x[1] for x in axes if x[0] == "tensor"]
    group = np.broadcast_shapes(*(x.shape for x in grouped)) if grouped else ()
    plan = [x for x in axes if x[0] != "select"]
    places = [position for position, x in enumerate(plan) if x[0] == "tensor"]
    adjacent = bool(places) and places == list(range(places[0], places[0] + len(places)))
    first = places[0] if adjacent else 0
    # The extents of the result, and for each axis of the tensor an array of nodes that broadcasts to them.
    plain = [x for x in plan if x[0] != "tensor"]
    at = first if adjacent else 0
    extents = [1 if x[0] == "new" else len(x[1]) for x in plain]
    result = [*extents[:at], *group, *extents[at:]]
    if math.prod(result) > LIMIT:
        raise UnsupportedError(
            f"{current().names.get(id(tensor), 'a tensor')} {list(shape)} indexed so has {list(result)} elements; a "
            f"score or a mask is one number, so index every axis by a symbol or an integer{where_from()}"
        )
    chosen: list[np.ndarray] = [np.ndarray(())] * len(shape)
    for position, (how, given, where) in enumerate(plain):
        if how == "slice":
            view = [1] * len(result)
            view[position if position < at else position + len(group)] = len(given)
            array = np.ndarray(len(given), object)
            array[:] = [nodes.constant(int(x)) for x in given]
            chosen[where] = array.reshape(view)
    for how, given, where in axes:
        if how == "tensor":
            view = [1] * at + [1] * (len(group) - given.ndim) + list(given.shape) + [1] * (len(extents) - at)
            chosen[where] = given.reshape(view)
        elif how == "select":
            array = np.ndarray((1,) * len(result), object)
            array[...] = nodes.constant(given)
            chosen[where] = array
    return gather_tensor(tensor, chosen, tuple(result))


def gather_tensor(tensor: torch.Tensor, indices: list[np.ndarray], shape: tuple[int, ...]) -> torch.Tensor:
    """The elements of `tensor` at arrays of nodes (one for each axis, broadcast to `shape`)."""
    spread: list[Any] = [np.broadcast_to(index, shape) for index in indices]
    result = np.ndarray(shape, object)
    if isinstance(tensor, SymbolTensor):
        for place in np.ndindex(*shape):
            result[place] = _choose(tensor.graph, [index[place] for index in spread])
    else:
        capture = current().capture(tensor)
        for place in np.ndindex(*shape):
            result[place] = nodes.gather(capture, [index[place] for index in spread])
    return _wrap(result, tensor.dtype, current().device)


def _choose(values: Any, indices: list[nodes.Node]) -> nodes.Node:
    """An element of a small array of nodes at an index that is a node: a chain of ``where``."""
    if not indices:
        return values.item() if isinstance(values, np.ndarray) else values
    index, rest = indices[0], indices[1:]
    if index.op == "int":
        return _choose(values[index.value], rest)
    extent = len(values)
    if not extent:
        raise UnsupportedError(f"an empty tensor has no element at {index!r}{where_from()}")
    chosen = _choose(values[extent - 1], rest)
    for position in range(extent - 2, -1, -1):
        here = nodes.bitwise(
            "or",
            nodes.compare("eq", index, nodes.constant(position)),
            nodes.compare("eq", index, nodes.constant(position - extent)),
        )
        chosen = nodes.where(here, _choose(values[position], rest), chosen)
    return chosen


def _expand(items: list[Any], rank: int) -> list[Any]:
    """Full slices for ``...`` and for axes that are not named."""
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    for item in items:
        if isinstance(item, torch.Tensor) and item.dtype == torch.bool:
            raise UnsupportedError(
                f"a bool is no index (its length would depend on values); choose by torch.where{where_from()}"
            )
    if used > rank:
        raise UnsupportedError(f"{used} indices for a tensor of {rank} axes{where_from()}")
    fill = [slice(None)] * (rank - used)
    found = [place for place, item in enumerate(items) if item is Ellipsis]
    if found:
        return [*items[: found[0]], *fill, *items[found[0] + 1 :]]
    return [*items, *fill]


def _index_nodes(item: Any, tensor: torch.Tensor) -> np.ndarray:
    if isinstance(item, list | tuple | np.ndarray):
        item = torch.as_tensor(item)
    if not isinstance(item, torch.Tensor):
        raise UnsupportedError(f"{type(item).__name__} is no index{where_from()}")
    if item.is_floating_point():
        shown = item.graph.flat[0] if isinstance(item, SymbolTensor) else item
        name = current().names.get(id(tensor), "a tensor")
        raise UnsupportedError(
            f"{name} is indexed by the float `{shown!r}`; cast it: x.long(), or divide by //{where_from()}"
        )
    current().arguments.add(id(item))
    return elements(item)


def _static(item: Any) -> Any:
    return item.numpy() if isinstance(item, torch.Tensor) else item


def _wrap(values: Any, dtype: torch.dtype, device: torch.device) -> SymbolTensor:
    if not isinstance(values, np.ndarray):
        array = np.ndarray((), object)
        array[()] = values
        values = array
    return SymbolTensor(values, dtype, device)
