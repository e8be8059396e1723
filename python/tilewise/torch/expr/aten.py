"""ATen operators of symbols as nodes: one table by name, the same for every overload.

torch's meta kernels say the type and the shape of each result, so its promotion is torch's own; a table entry says the
value. What is not in the table is decomposed the way torch decomposes it, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from tilewise.errors import UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.nodes import Node
from tilewise.torch.expr.indexing import gather_tensor
from tilewise.torch.expr.symbol import SymbolTensor, box, class_of_dtype, current, elements, numel, where_from

__all__ = ["TABLE", "translate"]

Values = np.ndarray
Rule = Callable[..., Any]

#: Operators by their name without namespace and overload. A rule takes the arguments of the operator and ``out``, the
#: meta tensor of its result, and returns an array of nodes.
TABLE: dict[str, Rule] = {}

# Fixes for what users try.
_INSTEAD = {
    "softmax": "the attention applies the softmax itself; a mod changes one score",
    "sort": "compute the order before, capture it, and index it",
    "topk": "compute the selection before, capture it as a table, and index it",
    "empty": "an empty tensor has no values; write zeros, or compute them",
    "nonzero": "a mod computes one element; write a condition and torch.where",
    "is_nonzero": "write & for and, | for or, torch.where for if",
    "_local_scalar_dense": "keep computing with tensors; a symbol has no Python value",
}


def translate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one ATen operator of which at least one argument is a symbol."""
    name = func.overloadpacket.__name__.removeprefix("_unsafe_")
    rule = TABLE.get(name)
    if rule is None and name.endswith("_") and name[:-1] in TABLE and isinstance(args[0], SymbolTensor):
        return _in_place(name[:-1], args, kwargs)
    if rule is None:
        return _decompose(func, args, kwargs)
    return _apply(func, name, args, kwargs)


def _in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x += y``: the scalar symbol stands for the new value from here on."""
    target = args[0]
    result = _apply(getattr(torch.ops.aten, name), name, args, kwargs)
    if target.ndim or result.ndim:
        raise UnsupportedError(f"{name}_ writes into a tensor with axes; write x = x + y for x += y{where_from()}")
    if not torch.can_cast(result.dtype, target.dtype):
        raise UnsupportedError(
            f"`{result.graph.item()!r}` is {result.dtype} and cannot be written into {target.dtype}; "
            f"write x = x + y for x += y{where_from()}"
        )
    target.graph = box(nodes.cast(result.graph.item(), class_of_dtype(target.dtype)))
    return target


def _apply(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = TABLE[name]
    out = func(*_on_meta(args), **_on_meta_keywords(kwargs))
    values = rule(*args, **kwargs, out=out)
    if not isinstance(out, torch.Tensor):  # several results: unbind, split, chunk
        return [_finish(x, one, name) for x, one in zip(values, out, strict=True)]
    return _finish(values, out, name)


def _finish(values: Values, out: torch.Tensor, name: str) -> SymbolTensor:
    cls = class_of_dtype(out.dtype)
    shape = tuple(out.shape)
    if values.shape != shape:
        values = np.broadcast_to(values, shape)
    narrow = _NARROW.get(out.dtype) if name in _WRAPS else None
    if values.ndim == 0:
        values = box(_wrap(nodes.cast(values.item(), cls), narrow))
    else:
        values = _map(lambda node: _wrap(nodes.cast(node, cls), narrow), values)
    return SymbolTensor(values, out.dtype, current().device)


# Integers narrower than 32 bits wrap around in torch; those of 32 are taken as wide enough.
_NARROW = {torch.uint8: (8, False), torch.int8: (8, True), torch.int16: (16, True)}
_WRAPS = {"add", "sub", "rsub", "mul", "neg", "pow", "_to_copy", "to", "bitwise_left_shift", "__lshift__", "sum"}


def _wrap(node: Node, narrow: tuple[int, bool] | None) -> Node:
    if narrow is None:
        return node
    bits, signed = narrow
    if not signed:
        return nodes.bitwise("and", node, nodes.constant(2**bits - 1))
    shift = nodes.constant(64 - bits)
    return nodes.binary("shr", nodes.binary("shl", node, shift), shift)


def _on_meta(value: Any) -> Any:
    if isinstance(value, SymbolTensor):
        return value.meta
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta")
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(one) for one in value)
    return value


def _on_meta_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: "meta" if name == "device" else _on_meta(value) for name, value in kwargs.items()}


def _decompose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not any(word in str(func) for word in _INSTEAD):  # what looks at values would not end well
        result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            from torch._decomp import decomposition_table  # heavy, and hardly ever needed

            rule = decomposition_table.get(func)
            result = NotImplemented if rule is None else rule(*args, **kwargs)
        # A tensor with values is none that was made of the symbols.
        if result is not NotImplemented and not (
            isinstance(result, torch.Tensor) and not isinstance(result, SymbolTensor)
        ):
            return result
    raise _unsupported(func, args)


def _unsupported(func: Any, args: tuple[Any, ...]) -> UnsupportedError:
    def shown(value: Any) -> str:
        if isinstance(value, SymbolTensor):
            return repr(value.graph.flat[0]) if not value.graph.ndim else f"tensor{list(value.shape)}"
        if isinstance(value, torch.Tensor):
            return current().names.get(id(value), f"tensor{list(value.shape)}")
        return repr(value)

    name = func.overloadpacket.__name__
    fix = next((text for word, text in _INSTEAD.items() if word in name), None)
    if fix is None:
        fix = (
            "compute what does not depend on the arguments before, capture the tensor and index it; of the arguments "
            "there are arithmetic, comparisons, logic, torch.where, clamp, and elementary functions"
        )
    return UnsupportedError(f"{func}({', '.join(map(shown, args))}) has no program: {fix}{where_from()}")


# Helpers of the rules.
def _map(function: Callable[..., Node], *arrays: Values) -> Values:
    """A function of nodes over arrays that broadcast."""
    if all(array.ndim == 0 for array in arrays):
        return box(function(*(array.item() for array in arrays)))
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    arrays = tuple(np.broadcast_to(array, shape) for array in arrays)
    result = np.ndarray(shape, object)
    for place in np.ndindex(*shape):
        result[place] = function(*(array[place] for array in arrays))
    return result


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            TABLE[name] = rule
        return rule

    return register


def _elementwise(name: str, function: Callable[..., Node]) -> None:
    TABLE[name] = lambda *args, out: _map(function, *map(elements, args))


def _c(value: float) -> Node:
    return nodes.constant(value)


def _b(op: str) -> Callable[[Node, Node], Node]:
    return lambda x, y: nodes.binary(op, x, y)


def _u(op: str) -> Callable[[Node], Node]:
    return lambda x: nodes.unary(op, x)


add, sub, mul, div = _b("add"), _b("sub"), _b("mul"), _b("div")
minimum, maximum = _b("min"), _b("max")
eq, lt, gt = (lambda x, y, op=op: nodes.compare(op, x, y) for op in ("eq", "lt", "gt"))


def _nan(x: Node) -> Node:
    return nodes.compare("ne", x, x)


def _truth(x: Node) -> Node:
    return nodes.cast(x, "bool")


def _logical(op: str) -> Callable[[Node, Node], Node]:
    return lambda x, y: nodes.bitwise(op, _truth(x), _truth(y))


def _log10(x: Node) -> Node:
    return mul(nodes.unary("log", x), _c(1.0 / math.log(10.0)))


# One operand.
for _name in (*nodes.UNARY_FLOAT, "neg", "abs", "sign"):
    if _name != "round":
        _elementwise(_name, _u(_name))
for _name, _function in {
    "sgn": _u("sign"),
    "positive": lambda x: x,
    "bitwise_not": nodes.invert,
    "logical_not": lambda x: nodes.invert(_truth(x)),
    "isnan": _nan,
    "isinf": lambda x: eq(nodes.unary("abs", x), _c(math.inf)),
    "isposinf": lambda x: eq(x, _c(math.inf)),
    "isneginf": lambda x: eq(x, _c(-math.inf)),
    "isfinite": lambda x: lt(nodes.unary("abs", x), _c(math.inf)),
    "signbit": lambda x: lt(x, _c(0)) if x.cls != "float" else lt(div(_c(1.0), x), _c(0.0)),
    "log10": _log10,
    "erfc": lambda x: sub(_c(1.0), nodes.unary("erf", x)),
    "frac": lambda x: sub(x, nodes.unary("trunc", x)),
    "silu": lambda x: mul(x, nodes.unary("sigmoid", x)),
    "sinh": lambda x: mul(_c(0.5), sub(nodes.unary("exp", x), nodes.unary("exp", nodes.unary("neg", x)))),
    "cosh": lambda x: mul(_c(0.5), add(nodes.unary("exp", x), nodes.unary("exp", nodes.unary("neg", x)))),
    "deg2rad": lambda x: mul(x, _c(math.pi / 180.0)),
    "rad2deg": lambda x: mul(x, _c(180.0 / math.pi)),
    # Two operands.
    "bitwise_and": lambda x, y: nodes.bitwise("and", x, y),
    "bitwise_or": lambda x, y: nodes.bitwise("or", x, y),
    "bitwise_xor": lambda x, y: nodes.bitwise("xor", x, y),
    "bitwise_left_shift": _b("shl"),
    "bitwise_right_shift": _b("shr"),
    "__lshift__": _b("shl"),
    "__rshift__": _b("shr"),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "minimum": minimum,
    "maximum": maximum,
    "fmin": lambda x, y: nodes.where(_nan(x), y, nodes.where(_nan(y), x, minimum(x, y))),
    "fmax": lambda x, y: nodes.where(_nan(x), y, nodes.where(_nan(y), x, maximum(x, y))),
    "atan2": _b("atan2"),
    "floor_divide": _b("floor_div"),
    "remainder": _b("mod"),
    "hypot": lambda x, y: nodes.unary("sqrt", add(mul(x, x), mul(y, y))),
    "copysign": lambda x, y: nodes.where(
        lt(div(_c(1.0), y), _c(0.0)), nodes.unary("neg", nodes.unary("abs", x)), nodes.unary("abs", x)
    ),
    "where": nodes.where,
}.items():
    _elementwise(_name, _function)
for _name in nodes.COMPARISONS:
    _elementwise(_name, lambda x, y, op=_name: nodes.compare(op, x, y))
_elementwise("greater_equal", lambda x, y: nodes.compare("ge", x, y))


def _typed(value: Any, out: torch.Tensor) -> Values:
    """An operand at the type of the result, since promotion comes before arithmetic (``uint8 + int64``, bools)."""
    cls = class_of_dtype(out.dtype)
    return _map(lambda x: nodes.cast(x, "int" if cls == "bool" else cls), elements(value))


@_rule("add")
def _add(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return _map(add if alpha == 1 else lambda a, b: add(a, mul(b, _c(alpha))), _typed(x, out), _typed(y, out))


@_rule("sub")
def _sub(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return _map(sub if alpha == 1 else lambda a, b: sub(a, mul(b, _c(alpha))), _typed(x, out), _typed(y, out))


@_rule("rsub")
def _rsub(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return _sub(y, x, alpha, out=out)


@_rule("mul")
def _mul(x: Any, y: Any, *, out: Any) -> Values:
    return _map(mul, _typed(x, out), _typed(y, out))


@_rule("div", "true_divide", "divide")
def _div(x: Any, y: Any, *, rounding_mode: str | None = None, out: Any) -> Values:
    op = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}[rounding_mode]
    return _map(_b(op), elements(x), elements(y))


@_rule("fmod")
def _fmod(x: Any, y: Any, *, out: Any) -> Values:
    if out.is_floating_point():
        raise UnsupportedError("fmod of floats has no program; x % y has (the sign of y)")
    return _map(lambda a, b: sub(a, mul(nodes.binary("trunc_div", a, b), b)), elements(x), elements(y))


@_rule("pow")
def _pow(x: Any, y: Any, *, out: Any) -> Values:
    base = _typed(x, out) if out.is_floating_point() else elements(x)
    return _map(nodes.power, base, elements(y))


@_rule("round")
def _round(x: Any, *, decimals: int = 0, out: Any) -> Values:
    if decimals:
        raise UnsupportedError("round to decimals has no program; scale before and after: torch.round(x * 10) / 10")
    return _map(_u("round"), elements(x))


@_rule("clamp", "clip")
def _clamp(x: Any, low: Any = None, high: Any = None, *, out: Any, min: Any = None, max: Any = None) -> Values:
    low, high = (min if low is None else low), (max if high is None else high)
    values = _typed(x, out)
    if low is not None:
        values = _map(maximum, values, _typed(low, out))
    return values if high is None else _map(minimum, values, _typed(high, out))


@_rule("clamp_min")
def _clamp_min(x: Any, low: Any, *, out: Any) -> Values:
    return _clamp(x, low, out=out)


@_rule("clamp_max")
def _clamp_max(x: Any, high: Any, *, out: Any) -> Values:
    return _clamp(x, None, high, out=out)


@_rule("masked_fill")
def _masked_fill(x: Any, mask: Any, value: Any, *, out: Any) -> Values:
    return _map(nodes.where, elements(mask), _typed(value, out), elements(x))


@_rule("lerp")
def _lerp(x: Any, y: Any, weight: Any, *, out: Any) -> Values:
    return _map(lambda a, b, w: add(a, mul(w, sub(b, a))), elements(x), elements(y), elements(weight))


@_rule("addcmul")
def _addcmul(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any) -> Values:
    return _map(lambda a, b, c: add(a, mul(_c(value), mul(b, c))), *(_typed(i, out) for i in (x, y, z)))


# Copies, casts and constants.
@_rule("clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "to", "view_of",
       "convert_element_type", "_conj", "resolve_conj")  # fmt: skip
def _copy(x: Any, *_: Any, out: Any, **__: Any) -> Values:
    return elements(x)


def _full(value: Any, out: torch.Tensor) -> Values:
    array = np.ndarray(tuple(out.shape), object)
    array[...] = nodes.fill(value, class_of_dtype(out.dtype))
    return array


for _name, _value in {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}.items():
    TABLE[_name] = lambda *_, out, value=_value, **__: _full(value, out)


@_rule("new_full")
def _new_full(x: Any, size: Any, value: Any, *, out: Any, **_: Any) -> Values:
    return _full(value, out)


@_rule("full_like", "fill")
def _full_like(x: Any, value: Any, *, out: Any, **_: Any) -> Values:
    return _map(lambda node: node, elements(value)) if isinstance(value, torch.Tensor) else _full(value, out)


# Views.
@_rule("view", "reshape", "expand", "unsqueeze", "squeeze")
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


@_rule("stack")
def _stack(tensors: Any, dim: int = 0, *, out: Any) -> Values:
    return np.stack([_typed_like(x, out) for x in tensors], dim)


@_rule("cat", "concat")
def _cat(tensors: Any, dim: int = 0, *, out: Any) -> Values:
    return np.concatenate([_typed_like(x, out) for x in tensors], dim)


def _typed_like(value: Any, out: torch.Tensor) -> Values:
    return _map(lambda x: nodes.cast(x, class_of_dtype(out.dtype)), elements(value))


# Gathers that are not spelt as an index.
@_rule("index")
def _index(x: Any, indices: Any, *, out: Any) -> Values:
    from tilewise.torch.expr.indexing import getitem

    return elements(getitem(x, tuple(slice(None) if i is None else i for i in indices)))


@_rule("index_select")
def _index_select(x: Any, dim: int, index: Any, *, out: Any) -> Values:
    from tilewise.torch.expr.indexing import getitem

    items: list[Any] = [slice(None)] * x.ndim
    items[dim] = index
    return elements(getitem(x, tuple(items)))


@_rule("embedding")
def _embedding(weight: Any, index: Any, *_: Any, out: Any, **__: Any) -> Values:
    from tilewise.torch.expr.indexing import getitem

    return elements(getitem(weight, (index,)))


@_rule("take")
def _take(x: Any, index: Any, *, out: Any) -> Values:
    # The flat index, which wraps once when negative, by axes.
    where = elements(index)
    size = x.numel()
    where = _map(lambda i: nodes.where(lt(i, _c(0)), add(i, _c(size)), i), where)
    indices: list[Values] = []
    stride = size
    for extent in x.shape:
        stride //= extent
        step, wide = _c(stride), _c(extent)
        indices.append(_map(lambda i, s=step, w=wide: nodes.binary("mod", nodes.binary("floor_div", i, s), w), where))
    return elements(gather_tensor(x, indices, tuple(out.shape)))


# Reductions of small arrays.
def _reduce(function: Callable[[Node, Node], Node], empty: Any) -> Rule:
    def rule(x: Any, dim: Any = None, keepdim: bool = False, *, out: Any, **_: Any) -> Values:
        values = _typed(x, out) if empty is not None and not isinstance(empty, bool) else elements(x)
        if isinstance(empty, bool):
            values = _map(_truth, values)
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
    whole, two = TABLE[f"a{op}"], _b(op)

    def rule(x: Any, *args: Any, out: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            return _map(two, elements(x), elements(args[0]))
        if args or kwargs:
            raise UnsupportedError(f"{op} along an axis gives indices too, which have no program; use torch.a{op}")
        return whole(x, out=out)

    return rule


TABLE["max"], TABLE["min"] = _extreme_of("max"), _extreme_of("min")


@_rule("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, *, out: Any, **_: Any) -> Values:
    total = TABLE["sum"](x, dim, keepdim, out=out)
    count = x.numel() / max(numel(out.shape), 1)
    return _map(lambda node: div(node, _c(float(count))), total)


@_rule("dot", "vdot", "inner")
def _dot(x: Any, y: Any, *, out: Any) -> Values:
    return box(reduce(add, map(mul, _typed(x, out), _typed(y, out))) if x.numel() else nodes.fill(0, "float"))


@_rule("mv", "mm")
def _matrix(x: Any, y: Any, *, out: Any) -> Values:
    left, right = _typed(x, out), _typed(y, out)
    columns = right.reshape(right.shape[0], -1)
    result = np.ndarray((left.shape[0], columns.shape[1]), object)
    for i, j in np.ndindex(*result.shape):
        result[i, j] = reduce(add, map(mul, left[i], columns[:, j]))
    return result.reshape(tuple(out.shape))
