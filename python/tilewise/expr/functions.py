"""Functions of symbols that also take NumPy arrays and torch tensors, so that one mod serves every front."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewise._arrays import is_torch
from tilewise.errors import UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.symbols import Symbol, as_node

__all__ = [
    "abs", "atan2", "ceil", "clip", "constant_like", "cos", "erf", "exp", "exp2", "expm1", "floor", "isinf", "isnan",
    "log", "log1p", "log2", "logical_and", "logical_not", "logical_or", "logical_xor", "maximum", "minimum", "power",
    "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "tan", "tanh", "to_bool",
    "to_float", "to_int", "trunc", "where",
]  # fmt: skip


def _erf(x: Any) -> Any:
    import math

    return np.vectorize(math.erf, otypes=[float])(x)


def _sigmoid(x: Any) -> Any:
    return 0.5 * (np.tanh(0.5 * np.asarray(x, dtype=np.float64)) + 1.0)


# What NumPy spells otherwise or not at all.
_NUMPY: dict[str, Callable[..., Any]] = {
    "round": np.rint,
    "atan2": np.arctan2,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "relu": lambda x: np.maximum(x, 0),
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "reciprocal": lambda x: 1.0 / np.asarray(x, dtype=np.float64),
}
_TORCH = {"power": "pow"}


def _elsewhere(name: str, *arguments: Any) -> Any:
    """The function of NumPy or torch, by what the arguments are."""
    if any(is_torch(x) for x in arguments):
        torch = sys.modules["torch"]
        first = next(x for x in arguments if is_torch(x))
        lifted = [x if is_torch(x) or name in ("where", "power") else _lift(torch, first, x) for x in arguments]
        return getattr(torch, _TORCH.get(name, name))(*lifted)
    return (_NUMPY.get(name) or getattr(np, name))(*arguments)


def _lift(torch: Any, like: Any, value: Any) -> Any:
    """A number as a tensor of the type it has beside `like`: an integer does not widen a float, nor the reverse."""
    return torch.as_tensor(value, dtype=torch.result_type(like, value), device=like.device)


def _one(name: str, build: Callable[[nodes.Node], nodes.Node], meaning: str) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return Symbol(build(x.node)) if isinstance(x, Symbol) else _elsewhere(name, x)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{meaning} of a symbol, a number, a NumPy array or a torch tensor."
    return function


def _two(name: str, build: Callable[[nodes.Node, nodes.Node], nodes.Node], meaning: str) -> Callable[[Any, Any], Any]:
    def function(x: Any, y: Any) -> Any:
        if isinstance(x, Symbol) or isinstance(y, Symbol):
            return Symbol(build(as_node(x), as_node(y)))
        return _elsewhere(name, x, y)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{meaning} of symbols, numbers, NumPy arrays or torch tensors."
    return function


def _unary(op: str) -> Callable[[nodes.Node], nodes.Node]:
    return lambda node: nodes.unary(op, node)


abs = _one("abs", _unary("abs"), "The absolute value")
sign = _one("sign", _unary("sign"), "-1, 0 or 1, as the sign")
floor = _one("floor", _unary("floor"), "The largest whole number not above that")
ceil = _one("ceil", _unary("ceil"), "The smallest whole number not below that")
round = _one("round", _unary("round"), "The nearest whole number (ties to even)")
trunc = _one("trunc", _unary("trunc"), "The whole number next to that, toward zero,")
sqrt = _one("sqrt", _unary("sqrt"), "The square root")
rsqrt = _one("rsqrt", _unary("rsqrt"), "One over the square root")
reciprocal = _one("reciprocal", _unary("reciprocal"), "One over")
exp = _one("exp", _unary("exp"), "e to the power")
exp2 = _one("exp2", _unary("exp2"), "2 to the power")
expm1 = _one("expm1", _unary("expm1"), "e^x - 1, exact near 0,")
log = _one("log", _unary("log"), "The natural logarithm")
log2 = _one("log2", _unary("log2"), "The logarithm to base 2")
log1p = _one("log1p", _unary("log1p"), "log(1 + x), exact near 0,")
sin = _one("sin", _unary("sin"), "The sine")
cos = _one("cos", _unary("cos"), "The cosine")
tan = _one("tan", _unary("tan"), "The tangent")
tanh = _one("tanh", _unary("tanh"), "The hyperbolic tangent")
sigmoid = _one("sigmoid", _unary("sigmoid"), "1 / (1 + exp(-x))")
erf = _one("erf", _unary("erf"), "The error function")
relu = _one("relu", _unary("relu"), "max(x, 0)")
square = _one("square", _unary("square"), "x * x")
logical_not = _one("logical_not", lambda x: nodes.invert(nodes.cast(x, "bool")), "Whether it is false or 0,")
isnan = _one("isnan", lambda x: nodes.compare("ne", x, x), "Whether it is not a number,")
isinf = _one(
    "isinf",
    lambda x: nodes.compare("eq", nodes.unary("abs", x), nodes.constant(float("inf"))),
    "Whether it is infinite,",
)

minimum = _two("minimum", lambda x, y: nodes.binary("min", x, y), "The smaller one (NaN if either is)")
maximum = _two("maximum", lambda x, y: nodes.binary("max", x, y), "The larger one (NaN if either is)")
atan2 = _two("atan2", lambda x, y: nodes.binary("atan2", x, y), "The angle of the point (y, x)")
power = _two("power", nodes.power, "x to the power y")
logical_and = _two("logical_and", lambda x, y: _logical("and", x, y), "Whether both hold,")
logical_or = _two("logical_or", lambda x, y: _logical("or", x, y), "Whether either holds,")
logical_xor = _two("logical_xor", lambda x, y: _logical("xor", x, y), "Whether exactly one holds,")


def _logical(op: str, left: nodes.Node, right: nodes.Node) -> nodes.Node:
    return nodes.bitwise(op, nodes.cast(left, "bool"), nodes.cast(right, "bool"))


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition holds, else ``no``: of symbols, numbers, NumPy arrays or torch tensors."""
    if any(isinstance(x, Symbol) for x in (condition, yes, no)):
        return Symbol(nodes.where(as_node(condition), as_node(yes), as_node(no)))
    return _elsewhere("where", condition, yes, no)


def clip(x: Any, low: Any = None, high: Any = None) -> Any:
    """``x`` moved into ``[low, high]``; an end that is None is open."""
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


def _to(cls: str, torch_name: str, dtype: type) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        if isinstance(x, Symbol):
            return Symbol(nodes.cast(x.node, cls))
        if is_torch(x):
            keep = cls == "float" and x.is_floating_point()
            return x if keep else x.to(getattr(sys.modules["torch"], torch_name))
        return np.asarray(x).astype(dtype)

    function.__name__ = function.__qualname__ = f"to_{cls}"
    function.__doc__ = f"The value as {cls}: a symbol, a number, a NumPy array or a torch tensor."
    return function


to_float = _to("float", "float32", float)
to_int = _to("int", "int64", np.int64)  # type: ignore[arg-type]
to_bool = _to("bool", "bool", bool)


def constant_like(x: Any, value: bool | int | float) -> Any:
    """`value` as the kind of thing that `x` is: a symbol, a torch tensor without axes (on its device), or a number."""
    if isinstance(x, Symbol):
        return Symbol(nodes.constant(value))
    return x.new_full((), value, dtype=getattr(sys.modules["torch"], _DTYPES[type(value)])) if is_torch(x) else value


_DTYPES = {bool: "bool", int: "int64", float: "float32"}


def _negative(x: Any) -> Any:
    return -x


def _spelled(op: str) -> Callable[[Any, Any], Any]:
    return lambda x, y: Symbol(nodes.binary(op, as_node(x), as_node(y)))


def _compared(op: str) -> Callable[[Any, Any], Any]:
    return lambda x, y: Symbol(nodes.compare(op, as_node(x), as_node(y)))


def _bits(op: str) -> Callable[[Any, Any], Any]:
    return lambda x, y: Symbol(nodes.bitwise(op, as_node(x), as_node(y)))


#: NumPy's ufuncs by name, for Symbol.__array_ufunc__. ``np.add(a, b)`` also arrives here as ``array + symbol``.
BY_UFUNC: dict[str, Callable[..., Any]] = {
    "add": _spelled("add"), "subtract": _spelled("sub"), "multiply": _spelled("mul"), "divide": _spelled("div"),
    "floor_divide": _spelled("floor_div"), "remainder": _spelled("mod"), "left_shift": _spelled("shl"),
    "right_shift": _spelled("shr"), "less": _compared("lt"), "less_equal": _compared("le"),
    "greater": _compared("gt"), "greater_equal": _compared("ge"), "equal": _compared("eq"),
    "not_equal": _compared("ne"), "bitwise_and": _bits("and"), "bitwise_or": _bits("or"), "bitwise_xor": _bits("xor"),
    "invert": lambda x: ~x, "negative": _negative, "positive": lambda x: x, "absolute": abs, "fabs": abs,
    "sign": sign, "floor": floor, "ceil": ceil, "rint": round, "trunc": trunc, "sqrt": sqrt, "reciprocal": reciprocal,
    "exp": exp, "exp2": exp2, "expm1": expm1, "log": log, "log2": log2, "log1p": log1p, "sin": sin, "cos": cos,
    "tan": tan, "tanh": tanh, "square": square, "minimum": minimum, "maximum": maximum, "arctan2": atan2,
    "power": power, "float_power": power, "logical_and": logical_and, "logical_or": logical_or,
    "logical_xor": logical_xor, "logical_not": logical_not, "isnan": isnan, "isinf": isinf,
}  # fmt: skip


def _where(condition: Any, *choices: Any) -> Any:
    if len(choices) != 2:
        raise UnsupportedError("np.where of a symbol takes a condition and two values")
    return where(condition, *choices)


#: NumPy's other functions by name, for Symbol.__array_function__.
BY_FUNCTION: dict[str, Callable[..., Any]] = {"where": _where, "clip": clip, "round": round, "around": round}
