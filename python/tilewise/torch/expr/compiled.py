"""Programs of functions inside torch.compile: ``program_and_captures`` leaves no break in the graph.

Dynamo cannot follow a trace, but it can take a function apart: its code is a constant, and what it captured are values
of the graph. So inside a compiled region the function is described (code, captured numbers, and places for captured
tensors), a constant function builds it again around stand-ins without data and traces that, and the program comes back
as a constant together with which tensors it reads.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tilewise.errors import UnsupportedError
from tilewise.expr import Array, Mod
from tilewise.expr.mod import kind_of
from tilewise.torch.expr import cache

__all__ = ["program_and_captures"]

_NARROW = (torch.int8, torch.int16, torch.uint8)


def program_and_captures(function: Callable[..., Any] | Mod, kind: str) -> tuple[str, tuple[torch.Tensor, ...]]:
    """The program of a score_mod or a mask_mod and the tensors that it reads, in eager code and under torch.compile.

    Args:
        function: what :func:`tilewise.torch.expr.trace` takes.
        kind: ``"score"`` or ``"mask"``.

    Returns:
        The text, and the captured tensors in the order of their numbers; in a graph they are values of the graph, so
        gradients flow to them.

    Raises:
        UnsupportedError: as in ``trace``; in a compiled region also a function that computes new tensors of what it
            captured, or reads values: do that outside of it, or pass ``trace(function)``, made outside of the region.

    Dynamo (of torch 2.15) cannot look into the cell of a function that is made inside the region and captures a
    variable of a function outside of it; make the mod outside too, or give it the tensor by a variable inside.

    Example:
        >>> import torch
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> text, captures = program_and_captures(lambda score, b, h, q, k: score * slopes[h], "score")
        >>> captures[0] is slopes
        True
    """
    if isinstance(function, Mod):
        if function.kind != kind:
            return _refuse(kind, function.kind)
        return function.program, tuple([_tensor(one) for one in function.captures])
    if not torch.compiler.is_dynamo_compiling():
        from tilewise.torch.expr import trace

        mod = trace(function, kind)
        return mod.program, tuple([_tensor(one) for one in mod.captures])
    leaves: list[torch.Tensor] = []
    description = _describe(function, leaves)
    # A function may compute with the extents of what it captured: operator.index fixes them, and guards.
    about = tuple([(tuple([operator.index(extent) for extent in leaf.shape]), leaf.dtype) for leaf in leaves])
    program, places = _plan(description, about, kind)
    captures = []
    for place in places:
        leaf = leaves[place]
        captures.append(leaf.to(torch.int32) if leaf.dtype in _NARROW else leaf)
    return program, tuple(captures)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)


def _refuse(kind: str, found: str) -> Any:
    raise UnsupportedError(f"expected a {kind} mod, got a {found} mod")


def _describe(value: Any, leaves: list[torch.Tensor]) -> Any:
    """A constant that says how to build `value` again; tensors go to `leaves`. Written for Dynamo to follow."""
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return ("tensor", len(leaves) - 1)
    if isinstance(value, np.ndarray):
        return _describe(torch.from_numpy(value), leaves)
    if value is None or isinstance(value, bool | int | float | str):
        return ("plain", operator.index(value) if type(value) is int else value)
    if isinstance(value, tuple):
        return ("tuple", tuple([_describe(one, leaves) for one in value]))
    if isinstance(value, list):
        return ("list", tuple([_describe(one, leaves) for one in value]))
    if isinstance(value, Mod):
        return ("mod", value.kind, value.program, value.names, tuple([_describe(x, leaves) for x in value.captures]))
    if isinstance(value, functools.partial):
        arguments = tuple([_describe(one, leaves) for one in value.args])
        keywords = tuple([(name, _describe(one, leaves)) for name, one in value.keywords.items()])
        return ("partial", _describe(value.func, leaves), arguments, keywords)
    if isinstance(value, types.FunctionType):
        cells = tuple([_describe(cell.cell_contents, leaves) for cell in value.__closure__ or ()])
        defaults = tuple([_describe(one, leaves) for one in value.__defaults__ or ()])
        seen = []
        for name in _tensor_globals(value.__code__, value.__module__):
            # By the module, since Dynamo does not give the globals of a function made within the region.
            seen.append((name, _describe(getattr(_module(value.__module__), name), leaves)))
        return ("function", value.__code__, value.__module__, cells, defaults, tuple(seen))
    if isinstance(value, Array):
        return ("array", value.capture.name, _describe(value.source, leaves))
    if isinstance(value, torch.nn.Module):
        raise UnsupportedError(
            "a mod inside a compiled function captures a module, whose attributes torch.compile cannot hand over: "
            "capture the tensor by a local variable (bias = self.bias) before the mod"
        )
    return ("constant", value)


@torch._dynamo.assume_constant_result
def _tensor_globals(code: types.CodeType, module: str) -> tuple[str, ...]:
    """Names of the module that the code looks up, and that hold tensors."""
    scope = sys.modules[module].__dict__ if module in sys.modules else {}
    return tuple(name for name in cache.global_names(code) if _holds_tensors(scope.get(name)))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        home = (value.__module__ or "").partition(".")[0]
        return home not in ("torch", "tilewise") and bool(cache.look_at(value).tensors)
    return isinstance(value, torch.Tensor | Array) or (isinstance(value, Mod) and bool(value.captures))


@torch._dynamo.assume_constant_result
def _module(name: str) -> types.ModuleType:
    return sys.modules[name]


@torch._dynamo.assume_constant_result
def _plan(description: Any, about: Any, kind: str) -> tuple[str, tuple[int, ...]]:
    """The program of a described function, and the places in the leaves of what it reads."""
    from tilewise.torch.expr import record

    stand_ins = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in about]
    function = _build(description, stand_ins)
    seen = cache.look_at(function)
    mod, recorder = record(function, kind_of(function, kind), torch.device("cpu"), seen.names)
    origin = {id(capture.source): name for name, capture in recorder.captures.items()}
    by_id = {id(tensor): place for place, tensor in enumerate(stand_ins)}
    places = []
    for source, name in zip(mod.captures, mod.names, strict=True):
        place = by_id.get(origin[id(source)])
        if place is None:
            raise UnsupportedError(
                f"{getattr(function, '__qualname__', 'the function')} computes `{name}` of what it captured, and "
                "torch.compile cannot see that; compute the tensor before and capture it, or pass "
                "tilewise.torch.expr.trace(function) made outside of the compiled function"
            )
        places.append(place)
    return mod.program, tuple(places)


def _build(description: Any, stand_ins: list[torch.Tensor]) -> Any:
    what, *parts = description
    if what == "tensor":
        return stand_ins[parts[0]]
    if what in ("plain", "constant"):
        return parts[0]
    if what in ("tuple", "list"):
        found = [_build(one, stand_ins) for one in parts[0]]
        return tuple(found) if what == "tuple" else found
    if what == "array":
        name, source = parts
        return Array(_build(source, stand_ins), name)
    if what == "mod":
        kind, program, names, captures = parts
        return Mod(kind, program, tuple(_build(one, stand_ins) for one in captures), names)
    if what == "partial":
        function, arguments, keywords = parts
        given = {name: _build(one, stand_ins) for name, one in keywords}
        return functools.partial(_build(function, stand_ins), *(_build(one, stand_ins) for one in arguments), **given)
    code, module, cells, defaults, seen = parts
    scope = sys.modules[module].__dict__ if module in sys.modules else {}
    scope = {**scope, **{name: _build(one, stand_ins) for name, one in seen}}
    closure = tuple(types.CellType(_build(one, stand_ins)) for one in cells)
    return types.FunctionType(
        code, scope, code.co_name, tuple(_build(one, stand_ins) for one in defaults) or None, closure
    )
