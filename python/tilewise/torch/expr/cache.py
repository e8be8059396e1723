"""Which traces may be used again: a key of everything that a function can see.

A mod that is written inside a model's forward is a new function object at each call, with the same code and the same
captures. The key is the code, the values of plain captures (numbers, strings), the identity, shape and type of
captured tensors, and the same for the functions it calls. A function that can see anything else (an object with
attributes, a list, a NumPy array) is traced at each call.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tilewise.expr import Array, Mod

__all__ = ["Seen", "clear", "global_names", "look_at", "remember", "remembered"]

_LIMIT = 512
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_FIXED = (types.BuiltinFunctionType, types.BuiltinMethodType, type(torch.ops.aten.add))
_LIBRARIES = ("torch", "math", "numpy", "operator", "functools", "tilewise")


class Seen(NamedTuple):
    """What a function can see: the key (None: do not cache), its tensors by id, and their names."""

    key: Any
    tensors: dict[int, torch.Tensor]
    names: dict[int, str]
    alive: list[Any]  # objects whose id is in the key


class _Entry(NamedTuple):
    kind: str
    program: str
    names: tuple[str, ...]
    captures: tuple[Any, ...]  # a weak reference to each, or a function that returns it
    alive: tuple[Any, ...]


_entries: OrderedDict[Any, _Entry] = OrderedDict()
_lock = threading.Lock()


def look_at(function: Callable[..., Any]) -> Seen:
    """Everything that `function` can see."""
    seen = Seen(None, {}, {}, [])
    key = _function(function, seen, 0)
    return seen._replace(key=key)


def _function(function: Any, seen: Seen, depth: int) -> Any:
    """A key of a callable, or None."""
    if depth > 8:
        return None
    if isinstance(function, functools.partial):
        parts: list[Any] = [_function(function.func, seen, depth + 1)]
        parts += [_leaf("argument", value, seen, depth) for value in function.args]
        parts += [(name, _leaf(name, value, seen, depth)) for name, value in sorted(function.keywords.items())]
        if any(part is None or (isinstance(part, tuple) and part[-1] is None) for part in parts):
            return None
        return ("partial", *parts)
    if not isinstance(function, types.FunctionType) or function.__dict__:
        return None
    code = function.__code__
    parts: list[Any] = [code]
    complete = True
    cells = function.__closure__ or ()
    try:
        values = [(name, cell.cell_contents) for name, cell in zip(code.co_freevars, cells, strict=True)]
    except ValueError:  # a cell that is not set yet
        return None
    values += [("default", value) for value in function.__defaults__ or ()]
    values += [(name, value) for name, value in (function.__kwdefaults__ or {}).items()]
    names = global_names(code)
    if names:
        scope = function.__globals__
        values += [(name, scope[name]) for name in names if name in scope]
    for name, value in values:
        if value is function:  # recursion by name
            continue
        part = _leaf(name, value, seen, depth)
        if part is None:
            complete = False  # go on: the names are wanted for messages
        parts.append((name, part))
    return tuple(parts) if complete else None


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code and the functions written in it look up."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(global_names(constant))
    return tuple(found)


def _leaf(name: str, value: Any, seen: Seen, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        seen.tensors[id(value)] = value
        seen.names.setdefault(id(value), name)
        seen.alive.append(value)
        return (id(value), value.shape, value.dtype, value.device)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, tuple):
        parts = [_leaf(f"{name}[{index}]", one, seen, depth + 1) for index, one in enumerate(value)]
        return None if depth > 8 or any(part is None for part in parts) else ("tuple", *parts)
    if isinstance(value, Array):
        seen.alive.append(value)
        for tensor in value.tensors():
            seen.tensors[id(tensor)] = tensor
            seen.names.setdefault(id(tensor), value.capture.name if value.capture.name != "array" else name)
        return ("array", id(value))
    if isinstance(value, Mod):
        seen.alive.append(value)
        for called, capture in zip(value.names, value.captures, strict=True):
            if isinstance(capture, torch.Tensor):
                seen.tensors[id(capture)] = capture
                seen.names.setdefault(id(capture), called)
        return ("mod", id(value))
    if isinstance(value, types.FunctionType | functools.partial):
        home = (getattr(value, "__module__", None) or "").partition(".")[0]
        if home in ("torch", "tilewise") and not getattr(value, "__closure__", None):
            return ("library", value)
        return _function(value, seen, depth + 1)
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__) if value.__name__.partition(".")[0] in _LIBRARIES else None
    if isinstance(value, _FIXED):
        return ("fixed", value)
    if isinstance(value, type) and value.__module__.partition(".")[0] in ("builtins", *_LIBRARIES):
        return ("type", value)  # a user's own class may change its attributes
    return None


def remembered(key: Any) -> Mod | None:
    """The trace of an equal key, with the captures of now."""
    with _lock:
        entry = _entries.get(key)
        if entry is None:
            return None
        captures = tuple(reference() for reference in entry.captures)
        if any(one is None for one in captures) or any(reference() is None for reference in entry.alive):
            del _entries[key]  # another object took the place of one that died
            return None
        _entries.move_to_end(key)
    return Mod(entry.kind, entry.program, captures, entry.names)


def remember(seen: Seen, mod: Mod, constants: dict[int, torch.Tensor]) -> None:
    """Keep a trace, if all it captured is what the function will see again; captured tensors are not kept alive."""
    captures: list[Any] = []
    for source in mod.captures:
        if id(source) in seen.tensors:
            captures.append(weakref.ref(source))
        elif id(source) in constants:
            captures.append(functools.partial(_itself, source))
        else:
            return
    entry = _Entry(mod.kind, mod.program, mod.names, tuple(captures), tuple(map(weakref.ref, seen.alive)))
    with _lock:
        _entries[seen.key] = entry
        while len(_entries) > _LIMIT:
            _entries.popitem(last=False)


def _itself(value: Any) -> Any:
    return value


def clear() -> None:
    """Forget every trace."""
    with _lock:
        _entries.clear()
