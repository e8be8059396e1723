"""Symbols of the torch tracer: tensors without data that record what ATen does to them.

A :class:`SymbolTensor` is a tensor subclass whose elements are nodes of an expression, so torch itself decides what an
expression means: operators, functions and methods reach ``__torch_dispatch__`` as ATen operators, where
:mod:`tilewise.torch.expr.aten` translates them, and torch's own meta kernels say which type the result has. Most
symbols are scalars; a small array of nodes (a row of a captured table, a stack of bools) may occur on the way.

:class:`Recorder` is the function mode around a trace. It turns ``table[q]`` into a gather (torch would ask the index
for its value), refuses to give values away, and notes what decides whether a trace may be cached.
"""

from __future__ import annotations

import linecache
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tilewise.errors import TilewiseError, UnsupportedError
from tilewise.expr import nodes
from tilewise.expr.nodes import Capture, Node
from tilewise.expr.symbols import class_of, truth_error

__all__ = ["LIMIT", "Recorder", "SymbolTensor", "box", "class_of_dtype", "current", "elements", "where_from"]

#: Most elements that a captured tensor may have where it is used as a whole (a row of a table, say).
LIMIT = 4096

_CLASSES = {torch.bool: "bool"} | dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8), "int")
_HERE = (str(Path(__file__).resolve().parents[2]), str(Path(torch.__file__).resolve().parent))


class _Stack(threading.local):
    """The recorders of this thread's traces under way, the innermost last."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_stack = _Stack()


def current() -> Recorder:
    """The recorder of the trace under way.

    Raises:
        UnsupportedError: there is none: a symbol outlived its trace.
    """
    if not _stack.recorders:
        raise UnsupportedError("a symbol of a finished trace was used; a mod must not keep its arguments")
    return _stack.recorders[-1]


def class_of_dtype(dtype: torch.dtype) -> str:
    """bool, int or float.

    Raises:
        UnsupportedError: complex numbers and such.
    """
    if dtype in _CLASSES:
        return _CLASSES[dtype]
    if dtype.is_floating_point:
        return "float"
    raise UnsupportedError(f"values of {dtype} have no program; there are bools, integers and floats{where_from()}")


def where_from() -> str:
    """The user's line that is being traced, for messages."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_HERE) and "/contextlib.py" not in path:
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"\n  in {path}, line {frame.f_lineno}" + (f": {line}" if line else "")
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def box(node: Node) -> np.ndarray:
    """A node as an array without axes."""
    array = np.ndarray((), object)
    array[()] = node
    return array


class SymbolTensor(torch.Tensor):
    """A tensor whose elements are nodes; it has a shape and a type, and no data."""

    graph: np.ndarray
    meta: torch.Tensor

    @staticmethod
    def __new__(cls, values: np.ndarray, dtype: torch.dtype, device: torch.device) -> SymbolTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=device)
        self.graph = values
        self.meta = torch.empty(values.shape, dtype=dtype, device="meta")
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if not self.graph.ndim:
            return f"SymbolTensor({self.graph.item()!r})"
        return f"SymbolTensor({list(self.graph.shape)}: {self.graph.flat[0]!r}, ...)" if self.graph.size else "[]"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tilewise.torch.expr.aten import translate

        return translate(func, args, kwargs or {})


# Methods that ask a tensor for its value.
_VALUES = ("item", "tolist", "numpy", "__int__", "__index__", "__float__", "__complex__", "__array__", "data_ptr")
_TRUTHS = ("__bool__", "is_nonzero", "__contains__", "equal", "allclose")
# What a tensor may be asked without its values being read.
_ABOUT = (
    "__get__", "dim", "size", "stride", "numel", "nelement", "ndimension", "__len__", "is_floating_point", "is_complex",
    "element_size", "is_contiguous", "get_device", "__repr__", "__hash__", "__format__", "result_type",
)  # fmt: skip
# Functions that make a tensor of Python numbers, the same one at each call.
_CONSTANTS = ("tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "full", "arange", "linspace", "eye")
_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "uniform_", "exponential_")


class Recorder(TorchFunctionMode):
    """The function mode around a trace.

    Attributes:
        cacheable: nothing was read of a tensor that may change.
        constants: by id, tensors that were made of Python numbers.
        captures: by id, the captured tensors that the program reads.
    """

    def __init__(self, names: dict[int, str], device: torch.device) -> None:
        super().__init__()
        self.names, self.device = names, device
        self.cacheable = True
        self.constants: dict[int, torch.Tensor] = {}
        self.captures: dict[int, Capture] = {}
        self.keep: list[Any] = []  # ids stay unique
        self.arguments: set[int] = set()

    def __enter__(self) -> Recorder:
        _stack.recorders.append(self)
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        _stack.recorders.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        _collect(args, tensors)
        _collect(kwargs.values(), tensors)
        name = getattr(func, "__name__", "")
        if name != "__rand__" and any(word in name for word in _RANDOM):
            raise UnsupportedError(
                f"{name} is random, and a mod is a function of its arguments; capture a table of random numbers, and "
                f"for dropout use the attention's own dropout probability{where_from()}"
            )
        if any(isinstance(x, SymbolTensor) for x in tensors):
            try:
                if name == "__getitem__":
                    from tilewise.torch.expr.indexing import getitem

                    return getitem(args[0], args[1])
                self._refuse(name, func, tensors)
                self.arguments = {id(x) for x in tensors}
                return func(*args, **kwargs)
            except TilewiseError as error:
                if "\n  in " in str(error):
                    raise
                raise type(error)(f"{error}{where_from()}") from None
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.keep.append(result)
            if not tensors and name in _CONSTANTS:
                self.constants[id(result)] = result
        elif tensors and name not in _ABOUT:
            self.cacheable = False
        return result

    @staticmethod
    def _refuse(name: str, func: Any, tensors: list[torch.Tensor]) -> None:
        if name in _TRUTHS:
            symbol = next(x for x in tensors if isinstance(x, SymbolTensor))
            raise UnsupportedError(f"{truth_error(symbol.graph.flat[0])}{where_from()}")
        if name in _VALUES:
            symbol = next(x for x in tensors if isinstance(x, SymbolTensor))
            raise UnsupportedError(
                f"`{symbol.graph.flat[0]!r}` has no value while the function is traced, so {name}() of it has none; "
                "keep computing with tensors (torch.exp for math.exp), and capture tables as torch tensors or by "
                f"tilewise.expr.array(x){where_from()}"
            )
        if name == "__setitem__":
            raise UnsupportedError(
                "an assignment to elements writes into a tensor, and a mod has only values; write "
                f"torch.where(condition, a, b){where_from()}"
            )

    def capture(self, tensor: torch.Tensor) -> Capture:
        """The capture of a tensor, by identity."""
        known = self.captures.get(id(tensor))
        if known is None:
            name = self.names.get(id(tensor), "computed")
            source = tensor
            if tensor.dtype in (torch.int8, torch.int16, torch.uint8):
                source = tensor.to(torch.int32)  # what the core reads; a snapshot
                self.cacheable = False
            known = Capture(source, class_of(tensor, name), tensor.shape, name)
            self.captures[id(tensor)] = known
            self.keep.append(tensor)
        return known


def _collect(found: Any, tensors: list[torch.Tensor]) -> None:
    for one in found:
        if isinstance(one, torch.Tensor):
            tensors.append(one)
        elif isinstance(one, list | tuple):
            _collect(one, tensors)


def elements(value: Any) -> np.ndarray:
    """What an ATen operator was given, as an array of nodes: symbols, numbers, or tensors as a whole.

    Raises:
        UnsupportedError: a tensor of more than :data:`LIMIT` elements.
    """
    if isinstance(value, SymbolTensor):
        return value.graph
    if isinstance(value, bool | int | float):
        return box(nodes.constant(value))
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"{type(value).__name__} has no place in an expression{where_from()}")
    recorder = current()
    inner = not value.ndim and id(value) not in recorder.arguments and value._base is None and not value.requires_grad
    if inner or (id(value) in recorder.constants and value.numel() == 1):
        array = np.ndarray(tuple(value.shape), object)
        array[...] = nodes.fill(value.item(), class_of_dtype(value.dtype))
        return array
    if value.numel() > LIMIT:
        name = recorder.names.get(id(value), "a tensor")
        raise UnsupportedError(
            f"{name} {list(value.shape)} meets a symbol as a whole, {value.numel()} elements; a score or a mask is one "
            f"number, so index every axis: {name}[b, h, q, k]{where_from()}"
        )
    capture = recorder.capture(value)
    array = np.ndarray(tuple(value.shape), object)
    for place in np.ndindex(*value.shape):
        array[place] = nodes.gather(capture, [nodes.constant(int(index)) for index in place])
    return array


def numel(shape: Any) -> int:
    return math.prod(shape)
