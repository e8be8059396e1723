"""ATen operators of symbols as nodes: one table by name, the same for every overload.

torch's meta kernels say the type and the shape of each result, so its promotion is torch's own; a table entry says the
value. What is not in the table is decomposed the way torch decomposes it, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tilewise.errors import UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.nodes import Node
from tilewise.torch.expr.symbol import SymbolTensor, box, class_of_dtype, current, elements, where_from

__all__ = ["TABLE", "Rule", "Values", "translate"]

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
        values = elementwise(lambda node: _wrap(nodes.cast(node, cls), narrow), values)
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
        try:
            result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                from torch._decomp import decomposition_table  # heavy, and hardly ever needed

                rule = decomposition_table.get(func)
                result = NotImplemented if rule is None else rule(*args, **kwargs)
        except UnsupportedError:  # of a part: the user wrote the whole
            raise _unsupported(func, args) from None
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
def elementwise(function: Callable[..., Node], *arrays: Values) -> Values:
    """A function of nodes over arrays that broadcast."""
    if all(array.ndim == 0 for array in arrays):
        return box(function(*(array.item() for array in arrays)))
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    arrays = tuple(np.broadcast_to(array, shape) for array in arrays)
    result = np.ndarray(shape, object)
    for place in np.ndindex(*shape):
        result[place] = function(*(array[place] for array in arrays))
    return result


def rule_of(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            TABLE[name] = rule
        return rule

    return register


def _register(name: str, function: Callable[..., Node]) -> None:
    TABLE[name] = lambda *args, out: elementwise(function, *map(elements, args))


def number(value: float) -> Node:
    return nodes.constant(value)


def _b(op: str) -> Callable[[Node, Node], Node]:
    return lambda x, y: nodes.binary(op, x, y)


def _u(op: str) -> Callable[[Node], Node]:
    return lambda x: nodes.unary(op, x)


add, sub, mul, div = _b("add"), _b("sub"), _b("mul"), _b("div")
minimum, maximum = _b("min"), _b("max")
floor_div, mod = _b("floor_div"), _b("mod")
eq, lt, gt = (lambda x, y, op=op: nodes.compare(op, x, y) for op in ("eq", "lt", "gt"))


def _nan(x: Node) -> Node:
    return nodes.compare("ne", x, x)


def truth(x: Node) -> Node:
    return nodes.cast(x, "bool")


def _logical(op: str) -> Callable[[Node, Node], Node]:
    return lambda x, y: nodes.bitwise(op, truth(x), truth(y))


def _log10(x: Node) -> Node:
    return mul(nodes.unary("log", x), number(1.0 / math.log(10.0)))


# One operand.
for _name in (*nodes.UNARY_FLOAT, "neg", "abs", "sign"):
    if _name != "round":
        _register(_name, _u(_name))
for _name, _function in {
    "sgn": _u("sign"),
    "positive": lambda x: x,
    "bitwise_not": nodes.invert,
    "logical_not": lambda x: nodes.invert(truth(x)),
    "isnan": _nan,
    "isinf": lambda x: eq(nodes.unary("abs", x), number(math.inf)),
    "isposinf": lambda x: eq(x, number(math.inf)),
    "isneginf": lambda x: eq(x, number(-math.inf)),
    "isfinite": lambda x: lt(nodes.unary("abs", x), number(math.inf)),
    "log10": _log10,
    "frac": lambda x: sub(x, nodes.unary("trunc", x)),
    "silu": lambda x: mul(x, nodes.unary("sigmoid", x)),
    "cosh": lambda x: mul(number(0.5), add(nodes.unary("exp", x), nodes.unary("exp", nodes.unary("neg", x)))),
    "deg2rad": lambda x: mul(x, number(math.pi / 180.0)),
    "rad2deg": lambda x: mul(x, number(180.0 / math.pi)),
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
    "where": nodes.where,
}.items():
    _register(_name, _function)
for _name in nodes.COMPARISONS:
    _register(_name, lambda x, y, op=_name: nodes.compare(op, x, y))
_register("greater_equal", lambda x, y: nodes.compare("ge", x, y))


def typed(value: Any, out: torch.Tensor) -> Values:
    """An operand at the type of the result, since promotion comes before arithmetic (``uint8 + int64``, bools)."""
    cls = class_of_dtype(out.dtype)
    return elementwise(lambda x: nodes.cast(x, "int" if cls == "bool" else cls), elements(value))


@rule_of("add")
def _add(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return elementwise(add if alpha == 1 else lambda a, b: add(a, mul(b, number(alpha))), typed(x, out), typed(y, out))


@rule_of("sub")
def _sub(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return elementwise(sub if alpha == 1 else lambda a, b: sub(a, mul(b, number(alpha))), typed(x, out), typed(y, out))


@rule_of("rsub")
def _rsub(x: Any, y: Any, alpha: Any = 1, *, out: Any) -> Values:
    return _sub(y, x, alpha, out=out)


@rule_of("mul")
def _mul(x: Any, y: Any, *, out: Any) -> Values:
    return elementwise(mul, typed(x, out), typed(y, out))


@rule_of("div", "true_divide", "divide")
def _div(x: Any, y: Any, *, rounding_mode: str | None = None, out: Any) -> Values:
    op = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}[rounding_mode]
    return elementwise(_b(op), elements(x), elements(y))


@rule_of("fmod")
def _fmod(x: Any, y: Any, *, out: Any) -> Values:
    if out.is_floating_point():
        raise UnsupportedError("fmod of floats has no program; x % y has (the sign of y)")
    return elementwise(lambda a, b: sub(a, mul(nodes.binary("trunc_div", a, b), b)), elements(x), elements(y))


@rule_of("pow")
def _pow(x: Any, y: Any, *, out: Any) -> Values:
    base = typed(x, out) if out.is_floating_point() else elements(x)
    return elementwise(nodes.power, base, elements(y))


@rule_of("round")
def _round(x: Any, *, decimals: int = 0, out: Any) -> Values:
    if decimals:
        raise UnsupportedError("round to decimals has no program; scale before and after: torch.round(x * 10) / 10")
    return elementwise(_u("round"), elements(x))


@rule_of("clamp", "clip")
def _clamp(x: Any, low: Any = None, high: Any = None, *, out: Any, min: Any = None, max: Any = None) -> Values:
    low, high = (min if low is None else low), (max if high is None else high)
    values = typed(x, out)
    if low is not None:
        values = elementwise(maximum, values, typed(low, out))
    return values if high is None else elementwise(minimum, values, typed(high, out))


@rule_of("clamp_min")
def _clamp_min(x: Any, low: Any, *, out: Any) -> Values:
    return _clamp(x, low, out=out)


@rule_of("clamp_max")
def _clamp_max(x: Any, high: Any, *, out: Any) -> Values:
    return _clamp(x, None, high, out=out)


@rule_of("masked_fill")
def _masked_fill(x: Any, mask: Any, value: Any, *, out: Any) -> Values:
    return elementwise(nodes.where, elements(mask), typed(value, out), elements(x))


@rule_of("lerp")
def _lerp(x: Any, y: Any, weight: Any, *, out: Any) -> Values:
    return elementwise(lambda a, b, w: add(a, mul(w, sub(b, a))), elements(x), elements(y), elements(weight))


@rule_of("addcmul")
def _addcmul(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any) -> Values:
    return elementwise(lambda a, b, c: add(a, mul(number(value), mul(b, c))), *(typed(i, out) for i in (x, y, z)))


# Copies, casts and constants.
@rule_of("clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "to", "view_of",
       "convert_element_type", "_conj", "resolve_conj")  # fmt: skip
def _copy(x: Any, *_: Any, out: Any, **__: Any) -> Values:
    return elements(x)


def _full(value: Any, out: torch.Tensor) -> Values:
    array = np.ndarray(tuple(out.shape), object)
    array[...] = nodes.fill(value, class_of_dtype(out.dtype))
    return array


for _name, _value in {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}.items():
    TABLE[_name] = lambda *_, out, value=_value, **__: _full(value, out)


@rule_of("new_full")
def _new_full(x: Any, size: Any, value: Any, *, out: Any, **_: Any) -> Values:
    return _full(value, out)


@rule_of("full_like", "fill")
def _full_like(x: Any, value: Any, *, out: Any, **_: Any) -> Values:
    return elementwise(lambda node: node, elements(value)) if isinstance(value, torch.Tensor) else _full(value, out)
