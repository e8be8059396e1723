"""Symbols that stand for the arguments of a mod while it is traced, and captured arrays (NumPy alone)."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import numpy as np

from tilewise._arrays import dtype_name, is_torch
from tilewise.errors import DtypeError, UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.nodes import Capture, Node

__all__ = ["Array", "Symbol", "array", "as_node", "class_of", "reads", "truth_error", "value_error"]

#: How often a captured array was read at plain indices: what was read is baked into a program.
reads = 0


def class_of(array: Any, name: str = "array") -> str:
    """The class of a captured array's elements.

    Raises:
        DtypeError: neither numbers nor bools.
    """
    dtype = dtype_name(array)
    if dtype == "bool":
        return "bool"
    if dtype in ("float16", "bfloat16", "float32", "float64"):
        return "float"
    if dtype in ("int8", "int16", "int32", "int64", "uint8"):
        return "int"
    raise DtypeError(
        f"{name}: captured arrays hold bool, int8 to int64, uint8, float16, bfloat16, float32 or float64, got {dtype}"
    )


def truth_error(node: Node) -> UnsupportedError:
    """What to say where Python asks a symbol for its truth value."""
    return UnsupportedError(
        f"the truth value of `{node!r}` is not known while the function is traced. Write & for `and`, | for `or`, "
        "~ for `not`, where(condition, a, b) for `if`, minimum and maximum for min and max, and "
        "(a < b) & (b < c) for a < b < c"
    )


def value_error(node: Node, wanted: str) -> UnsupportedError:
    """What to say where Python asks a symbol for a number."""
    return UnsupportedError(
        f"`{node!r}` has no {wanted} while the function is traced. A captured NumPy array is indexed by symbols after "
        "x = tilewise.expr.array(x); functions of the math module are tilewise.expr's of the same names"
    )


class Symbol:
    """A value of an expression: ``score``, an index, or what was computed of them by operators and functions.

    Operators are Python's; ``&``, ``|`` and ``~`` are logical for bools. NumPy's functions (``np.tanh(score)``) and
    those of :mod:`tilewise.expr` take symbols. ``bool(symbol)``, and so ``if`` and ``and``, is an error.
    """

    __slots__ = ("node",)
    __array_priority__ = 1000.0
    __hash__ = object.__hash__

    def __init__(self, node: Node) -> None:
        self.node = node

    def __repr__(self) -> str:
        return f"Symbol({self.node!r})"

    # Arithmetic.
    def __add__(self, other: Any) -> Any:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("div", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary("floor_div", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary("floor_div", other, self)

    def __mod__(self, other: Any) -> Any:
        return _binary("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _binary("mod", other, self)

    def __lshift__(self, other: Any) -> Any:
        return _binary("shl", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _binary("shl", other, self)

    def __rshift__(self, other: Any) -> Any:
        return _binary("shr", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return _binary("shr", other, self)

    def __pow__(self, other: Any) -> Any:
        return _apply(nodes.power, self, other)

    def __rpow__(self, other: Any) -> Any:
        return _apply(nodes.power, other, self)

    def __neg__(self) -> Symbol:
        return Symbol(nodes.unary("neg", self.node))

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return Symbol(nodes.unary("abs", self.node))

    def __round__(self, digits: None = None) -> Symbol:
        if digits is not None:
            raise UnsupportedError("round: only to whole numbers; scale before and after")
        return Symbol(nodes.unary("round", self.node))

    def __floor__(self) -> Symbol:
        return Symbol(nodes.unary("floor", self.node))

    def __ceil__(self) -> Symbol:
        return Symbol(nodes.unary("ceil", self.node))

    def __trunc__(self) -> Symbol:
        return Symbol(nodes.unary("trunc", self.node))

    # Logic.
    def __and__(self, other: Any) -> Any:
        return _bitwise("and", self, other)

    def __rand__(self, other: Any) -> Any:
        return _bitwise("and", other, self)

    def __or__(self, other: Any) -> Any:
        return _bitwise("or", self, other)

    def __ror__(self, other: Any) -> Any:
        return _bitwise("or", other, self)

    def __xor__(self, other: Any) -> Any:
        return _bitwise("xor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return _bitwise("xor", other, self)

    def __invert__(self) -> Symbol:
        return Symbol(nodes.invert(self.node))

    # Comparisons.
    def __lt__(self, other: Any) -> Any:
        return _compare("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return _compare("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return _compare("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return _compare("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return _compare("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return _compare("ne", self, other)

    # Casts.
    def astype(self, dtype: Any) -> Symbol:
        """The value as another class: any bool, integer or floating NumPy type (floats keep the accumulator's)."""
        kind = np.dtype(dtype).kind
        cls = {"b": "bool", "i": "int", "u": "int", "f": "float"}.get(kind)
        if cls is None:
            raise DtypeError(f"astype: expected a bool, integer or floating type, got {np.dtype(dtype)}")
        return Symbol(nodes.cast(self.node, cls))

    # What Python would need a value for.
    def __bool__(self) -> NoReturn:
        raise truth_error(self.node)

    def __index__(self) -> NoReturn:
        raise value_error(self.node, "value to index or to count with")

    def __int__(self) -> NoReturn:
        raise value_error(self.node, "int value (for a cast write x.astype(int))")

    def __float__(self) -> NoReturn:
        raise value_error(self.node, "float value (for a cast write x.astype(float))")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        raise value_error(self.node, "value to make an array of")

    def __iter__(self) -> NoReturn:
        raise UnsupportedError(f"`{self.node!r}` is one number and cannot be iterated over")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        from tilewise.expr.functions import BY_UFUNC

        function = BY_UFUNC.get(ufunc.__name__)
        if function is None or method != "__call__" or keywords:
            spelled = f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
            shown = ", ".join(repr(x.node) if isinstance(x, Symbol) else type(x).__name__ for x in inputs)
            raise UnsupportedError(
                f"{spelled}({shown}){' with ' + ', '.join(keywords) if keywords else ''} has no program; "
                f"there are {', '.join(sorted(BY_UFUNC))}"
            )
        return function(*inputs)

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        from tilewise.expr.functions import BY_FUNCTION

        ours = BY_FUNCTION.get(function.__name__)
        if ours is None:
            raise UnsupportedError(
                f"np.{function.__name__} of symbols has no program; there are {', '.join(sorted(BY_FUNCTION))}"
            )
        return ours(*arguments, **keywords)


def as_node(value: Any) -> Node:
    """The node of a symbol or of a number.

    Raises:
        UnsupportedError: an array, which must be indexed first.
        TypeError: something else.
    """
    if isinstance(value, Symbol):
        return value.node
    if isinstance(value, bool | int | float):
        return nodes.constant(value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return nodes.fill(value.item(), class_of(value))
    if isinstance(value, Array) and value.ndim == 0:
        return value.gather(())
    if isinstance(value, np.ndarray | Array) or is_torch(value):
        raise UnsupportedError(
            f"an array {list(value.shape)} meets a symbol as a whole; a score or a mask is one number: capture it by "
            "x = tilewise.expr.array(x) and index it, x[h, q - k]"
        )
    raise TypeError(f"expected a symbol or a number, got {type(value).__name__}")


def _apply(build: Any, left: Any, right: Any) -> Any:
    try:
        return Symbol(build(as_node(left), as_node(right)))
    except TypeError:
        return NotImplemented


def _binary(op: str, left: Any, right: Any) -> Any:
    return _apply(lambda a, b: nodes.binary(op, a, b), left, right)


def _bitwise(op: str, left: Any, right: Any) -> Any:
    return _apply(lambda a, b: nodes.bitwise(op, a, b), left, right)


def _compare(op: str, left: Any, right: Any) -> Any:
    return _apply(lambda a, b: nodes.compare(op, a, b), left, right)


class Array:
    """A captured array that symbols index; made by :func:`array`."""

    __slots__ = ("__weakref__", "_numpy", "_tensors", "capture", "source")

    def __init__(self, source: Any, name: str = "array") -> None:
        self.source: Any = source if is_torch(source) else np.asarray(source)
        self.capture = Capture(self.source, class_of(self.source, name), self.source.shape, name)
        self._numpy: np.ndarray | None = None
        self._tensors: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"tilewise.expr.array({self.capture.name}: {dtype_name(self.source)} {list(self.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return tuple(self.source.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.source.shape)

    @property
    def dtype(self) -> Any:
        """Element type, of NumPy or of torch."""
        return self.source.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array; shares memory where it can."""
        if is_torch(self.source):
            tensor = self.source.detach().cpu()
            return (tensor.float() if dtype_name(tensor) == "bfloat16" else tensor).numpy()
        return self.source

    def tensor(self, device: Any) -> Any:
        """The values as a torch tensor on a device: the captured tensor itself where it is one."""
        torch = sys.modules["torch"]
        if is_torch(self.source) and (self.source.device == device or self.source.is_meta):
            return self.source  # (a meta tensor stands for one on the device: tilewise.torch.expr.compiled)
        if is_torch(self.source):
            return self.source.to(device)  # a copy that gradients flow through
        if device not in self._tensors:
            self._tensors[device] = torch.from_numpy(np.ascontiguousarray(self.source)).to(device)
        return self._tensors[device]

    def tensors(self) -> list[Any]:
        """The torch tensors that :meth:`tensor` gave without copying what they were made of."""
        return [self.source] if is_torch(self.source) else list(self._tensors.values())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype=dtype)

    def gather(self, indices: tuple[Any, ...]) -> Node:
        """The node of an element; `indices` are symbols and integers, one for each axis."""
        return nodes.gather(self.capture, [as_node(index) for index in indices])

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        for one in indices:
            if is_torch(one):
                return self.tensor(one.device)[index]
        if any(isinstance(one, Symbol) for one in indices):
            for axis, one in enumerate(indices):
                if not isinstance(one, Symbol | int | np.integer):
                    raise UnsupportedError(
                        f"{self.capture.name}: axis {axis} is indexed by {one!r}; a score or a mask is one number, so "
                        "every axis takes a symbol or an integer"
                    )
            return Symbol(self.gather(indices))
        global reads
        reads += 1
        return self.source[index] if is_torch(self.source) else self.numpy()[index]


def array(source: Any, name: str = "array") -> Array:
    """Wrap an array (NumPy, torch, nested lists) so that a mod can index it by symbols: ``slopes[h]``.

    Args:
        source: any number of axes; bool, integers or floats. It is kept, not copied: a program reads what the array
            holds when it runs, and gradients flow to a torch tensor that requires them.
        name: what messages call it.

    Returns:
        :class:`Array`; indexed by symbols of this package it gives a symbol, by torch tensors a tensor, by NumPy
        arrays and integers values, so that a mod written with it runs on each.

    Raises:
        DtypeError: elements that are not numbers.

    Example:
        >>> import numpy as np
        >>> from tilewise import expr
        >>> slopes = expr.array(np.array([0.5, 0.25]), "slopes")
        >>> print(expr.trace(lambda score, b, h, q, k: score + slopes[h] * (k - q)))
        score + slopes[h] * float(k - q)
    """
    return source if isinstance(source, Array) else Array(source, name)
