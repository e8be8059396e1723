"""``Mod``: a traced score_mod or mask_mod, as the core takes it; and the tracer of NumPy users."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tilewise._arrays import is_torch
from tilewise.errors import ArgumentError, TilewiseError, UnsupportedError
from tilewise.expr import functions, nodes
from tilewise.expr.nodes import Node
from tilewise.expr.show import show_node
from tilewise.expr.symbols import Symbol, array, as_node
from tilewise.expr.text import ARGUMENTS, parse, write

__all__ = ["Mod", "finish", "kind_of", "naming", "trace"]

_BINARY = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
    "min": functions.minimum, "max": functions.maximum, "atan2": functions.atan2, "pow": functions.power,
    "floor_div": lambda x, y: x // y, "mod": lambda x, y: x % y, "and": lambda x, y: x & y, "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y, "shl": lambda x, y: x << y, "shr": lambda x, y: x >> y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "trunc_div": lambda x, y: functions.abs(x) // functions.abs(y) * functions.sign(x) * functions.sign(y),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mod:
    """A traced function: its program, and the arrays that the program reads.

    Attributes:
        kind: ``"score"`` or ``"mask"``.
        program: the text that the core takes (`capture` lines, one operation a line, ``return``).
        captures: the captured arrays in the order of their numbers, as they were given (NumPy or torch); torch
            tensors keep their identity, so that gradients flow to them.
        names: what messages call the captures.

    ``print(mod)`` shows the expression. A mod is also a function: ``mod(b, h, q, k)`` computes with symbols, NumPy
    arrays or torch tensors, so it stands wherever the function it was traced from may stand.
    """

    kind: str
    program: str
    captures: tuple[Any, ...] = ()
    names: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        arguments = [Symbol(nodes.leaf(name)) for name in ARGUMENTS[self.kind]]
        return show_node(as_node(self(*arguments)))

    def __call__(self, *arguments: Any) -> Any:
        """The value for ``(score, b, h, q, k)`` or ``(b, h, q, k)``; symbols, numbers, NumPy arrays or torch tensors.

        Raises:
            ArgumentError: not as many arguments as the kind takes.
        """
        wanted = ARGUMENTS[self.kind]
        if len(arguments) != len(wanted):
            raise ArgumentError(f"a {self.kind} mod takes {len(wanted)} arguments ({', '.join(wanted)})")
        given = dict(zip(wanted, arguments, strict=True))
        names = self.names or tuple(f"capture{index}" for index in range(len(self.captures)))
        arrays = [array(source, name) for source, name in zip(self.captures, names, strict=True)]
        _, rows, returned = parse(self.program)
        values: list[Any] = []
        for op, words in rows:
            values.append(_meaning(op, words, values, given, arrays))
        return values[returned]


def _meaning(op: str, words: list[Any], values: list[Any], given: dict[str, Any], arrays: list[Any]) -> Any:
    if op in given:
        return given[op]
    if op in ("bool", "int", "float"):
        return words[0]
    if op == "gather":
        captured = arrays[words[0]]
        if len(words) == 1:  # no index says which kind of value is wanted
            return _scalar(captured, next(iter(given.values())))
        return captured[tuple(values[word] for word in words[1:])]
    operands = [values[word] for word in words]
    if op in _BINARY:
        return _BINARY[op](*operands)
    if op == "neg":
        return -operands[0]
    return getattr(functions, {"not": "logical_not"}.get(op, op))(*operands)


def _scalar(captured: Any, like: Any) -> Any:
    if isinstance(like, Symbol):
        return Symbol(captured.gather(()))
    return captured.tensor(like.device) if is_torch(like) else captured.numpy()[()]


@contextlib.contextmanager
def naming(mod: Mod) -> Iterator[None]:
    """Around a call of the core: its errors speak of captures by number, the user's names are put in their place."""
    try:
        yield
    except TilewiseError as error:
        text = re.sub(
            r"\bcapture ?(\d+)\b",
            lambda found: mod.names[int(found[1])] if int(found[1]) < len(mod.names) else found[0],
            str(error),
        )
        raise type(error)(text) from None


def kind_of(function: Callable[..., Any], kind: str | None = None) -> str:
    """``"score"`` for five positional parameters without a default, ``"mask"`` for four; `kind` where given.

    Raises:
        ArgumentError: another number of parameters, or not the number that `kind` takes.
        TypeError: not a function.
    """
    if kind not in (None, "score", "mask"):
        raise ArgumentError(f"kind: expected 'score', 'mask' or None, got {kind!r}")
    if not callable(function):
        raise TypeError(f"expected a function (score, b, h, q, k) or (b, h, q, k), got {type(function).__name__}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions tell nothing
        if kind is None:
            raise ArgumentError(f"{_name(function)} has no signature; say kind='score' or kind='mask'") from None
        return kind
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    rest = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise ArgumentError(f"{_name(function)} has a keyword that must be given; bind it with functools.partial")
    found = {5: "score", 4: "mask"}.get(required)
    if kind is None:
        if found is None or rest:
            raise ArgumentError(
                f"{_name(function)} takes {'any number of' if rest else required} positional arguments; expected 5 "
                "(score, b, h, q, k) for a score_mod or 4 (b, h, q, k) for a mask_mod; others may have defaults"
                + (", or say kind='score' or kind='mask'" if rest else "")
            )
        return found
    wanted = len(ARGUMENTS[kind])
    if required > wanted or (len(positional) < wanted and not rest):
        raise ArgumentError(
            f"{_name(function)} takes {required} positional arguments, and a {kind}_mod takes {wanted}: "
            f"({'score, ' if kind == 'score' else ''}b, h, q, k)"
        )
    return kind


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def finish(kind: str, root: Node) -> Mod:
    """The mod of what a function returned.

    Raises:
        UnsupportedError: a mask that is a number, or a score that is a bool.
    """
    if kind == "mask" and root.cls != "bool":
        raise UnsupportedError(
            f"a mask_mod returns a bool (True keeps), and this one returns the {root.cls} `{root!r}`; compare it: != 0"
        )
    if kind == "score":
        if root.cls == "bool":
            raise UnsupportedError(
                f"a score_mod returns a number, and this one returns the bool `{root!r}`; "
                "write where(condition, score, -inf), or pass it as a mask_mod without the score"
            )
        root = nodes.floating(root)
    text, captures = write(kind, root)
    return Mod(kind, text, tuple(capture.source for capture in captures), tuple(capture.name for capture in captures))


def trace(function: Callable[..., Any] | Mod, kind: str | None = None) -> Mod:
    """Trace a score_mod ``(score, b, h, q, k)`` or a mask_mod ``(b, h, q, k)`` of NumPy users into a program.

    The function is called once, with symbols. It may use operators, the functions of :mod:`tilewise.expr`, NumPy's
    functions of one or two numbers, and captured arrays wrapped by :func:`tilewise.expr.array`.

    Args:
        function: the kind follows from its positional parameters without a default: 5 is a score_mod, 4 a mask_mod.
            A :class:`Mod` comes back as it is.
        kind: ``"score"`` or ``"mask"``, for functions that do not tell.

    Returns:
        :class:`Mod`.

    Raises:
        UnsupportedError: something without a program, such as the truth value of a symbol (``if q > k``); the message
            shows the expression.
        ArgumentError: a function of another number of arguments.

    Example:
        >>> from tilewise import expr
        >>> mod = expr.trace(lambda b, h, q, k: (q >= k) & (q - k < 256))
        >>> print(mod.program)
        tilewise-expr 1 mask
        query
        key
        ge 0 1
        sub 0 1
        int 256
        lt 3 4
        and 2 5
        return 6
        <BLANKLINE>
    """
    if isinstance(function, Mod):
        if kind not in (None, function.kind):
            raise ArgumentError(f"expected a {kind} mod, got a {function.kind} mod: {function}")
        return function
    kind = kind_of(function, kind)
    arguments = [Symbol(nodes.leaf(name)) for name in ARGUMENTS[kind]]
    returned = function(*arguments)
    try:
        root = as_node(returned)
    except TypeError:
        raise UnsupportedError(
            f"{_name(function)} returned {type(returned).__name__}; expected one number made of its arguments"
        ) from None
    return finish(kind, root)
