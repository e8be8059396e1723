"""Score and mask functions written with torch, traced to programs.

``trace(fn)`` calls the function once with symbols; operators, torch functions and captured tensors reach ATen, where
each operator becomes a node with torch's own type promotion. The result is the :class:`tilewise.expr.Mod` that NumPy
users get from :func:`tilewise.expr.trace`.

* :mod:`~tilewise.torch.expr.symbol`: tensors without data, and the function mode around a trace;
* :mod:`~tilewise.torch.expr.aten`: operators as nodes, elementwise ones here, those that move elements in
  :mod:`~tilewise.torch.expr.moves`; :mod:`~tilewise.torch.expr.indexing`: ``table[b, q - k]``;
* :mod:`~tilewise.torch.expr.cache`: which traces may be used again;
* :mod:`~tilewise.torch.expr.compiled`: ``program_and_captures``, which also works inside torch.compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tilewise.errors import ArgumentError, TilewiseError, UnsupportedError
from tilewise.expr import Mod, nodes, symbols
from tilewise.expr.mod import finish, kind_of
from tilewise.expr.text import ARGUMENTS
from tilewise.torch.expr import (
    cache,
    moves,  # noqa: F401  (adds its rules to the table)
)
from tilewise.torch.expr.symbol import Recorder, SymbolTensor, box, elements

__all__ = ["Mod", "program_and_captures", "record", "trace"]

_CPU = torch.device("cpu")


def trace(
    function: Callable[..., Any] | Mod, kind: str | None = None, *, device: torch.device | str | None = None
) -> Mod:
    """Trace a score_mod ``(score, b, h, q_idx, kv_idx)`` or a mask_mod ``(b, h, q_idx, kv_idx)`` into a program.

    The function is called once, with zero-dimensional tensors that have no values. Everything that FlexAttention's
    functions do is followed: operators, torch functions, Python scalars, tensors captured by closure, default or
    global name (bool, integer or float, any rank) and gathered by any index expression, small vectors on the way
    (``torch.dot(rope_q[b, h, q], rope_k[b, h, k])``). Captures keep their identity, so gradients flow to those that
    require them. Floats are computed in the accumulator's type and integers in 64 bits.

    A function that sees only numbers, tensors, modules and other such functions is traced once: a later call with
    the same code and captures costs microseconds, and tensors may change their values in between.

    Args:
        function: the kind follows from its positional parameters without a default: 5 is a score_mod, 4 a mask_mod.
            A :class:`~tilewise.expr.Mod` comes back as it is (with NumPy captures as tensors of the same memory).
        kind: ``"score"`` or ``"mask"``, for functions that do not tell.
        device: what ``q_idx.device`` says while the function runs; the CPU if not given.

    Returns:
        :class:`~tilewise.expr.Mod`, whose captures are torch tensors.

    Raises:
        UnsupportedError: an operator without a program, or the truth value of a symbol (``if q_idx > kv_idx``); the
            message shows the expression, the line it came from, and what to write instead.
        ArgumentError: a function of another number of arguments.

    Example:
        >>> import torch
        >>> from tilewise.torch.expr import trace
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> print(trace(lambda score, b, h, q, k: score + slopes[h] * (k - q)))
        score + slopes[h] * float(k - q)
    """
    if isinstance(function, Mod):
        if kind not in (None, function.kind):
            raise ArgumentError(f"expected a {kind} mod, got a {function.kind} mod: {function}")
        if all(isinstance(one, torch.Tensor) for one in function.captures):
            return function
        return Mod(function.kind, function.program, tuple(map(torch.as_tensor, function.captures)), function.names)
    where = _CPU if device is None else torch.device(device)
    seen = cache.look_at(function)
    if seen.key is not None:
        seen = seen._replace(key=(seen.key, kind, where))
        found = cache.remembered(seen.key)
        if found is not None:
            return found
    kind = kind_of(function, kind)
    reads = symbols.reads
    mod, recorder = record(function, kind, where, seen.names)
    if seen.key is not None and recorder.cacheable and symbols.reads == reads:
        # Arrays make their tensors while the function runs.
        after = cache.look_at(function)
        cache.remember(after._replace(key=seen.key), mod, recorder.constants)
    return mod


def record(
    function: Callable[..., Any], kind: str, device: torch.device, names: dict[int, str]
) -> tuple[Mod, Recorder]:
    """One trace, and what was noted on the way; `names` of tensors by id, for messages."""
    recorder = Recorder(names, device)
    # Fake tensors and proxies of whoever traces around this call have no place in it.
    apart = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
    with apart, recorder:
        return finish(kind, _run(function, kind, device)), recorder


def _run(function: Callable[..., Any], kind: str, device: torch.device) -> nodes.Node:
    arguments = [
        SymbolTensor(box(nodes.leaf(name)), torch.float32 if name == "score" else torch.int64, device)
        for name in ARGUMENTS[kind]
    ]
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        returned = function(*arguments)
    except (TilewiseError, NotImplementedError):
        raise
    except RuntimeError as error:
        if "sliced BlockMask" in str(error):
            raise ArgumentError(
                "the mask_mod of a sliced BlockMask is gone, since its indices have moved: set "
                "block_mask.mask_mod to one that adds the offset of the slice to q_idx"
            ) from error
        raise
    if not isinstance(returned, torch.Tensor | bool | int | float):
        raise UnsupportedError(
            f"{name} returned {type(returned).__name__}; expected one number (a tensor without axes)"
        )
    if isinstance(returned, torch.Tensor) and returned.numel() != 1:
        raise UnsupportedError(
            f"{name} returned a tensor {list(returned.shape)}; expected one number: index every axis of its captures"
        )
    return elements(returned).reshape(-1)[0]


from tilewise.torch.expr.compiled import program_and_captures  # noqa: E402  (it calls what is above)
