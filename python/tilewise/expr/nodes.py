"""Typed nodes of an expression, and the one table of operations that both tracers build them by.

A node is immutable and of one of three classes: ``bool``, ``int`` (64 bits) or ``float`` (the accumulator's type).
The functions here check classes, insert the casts that Python's arithmetic implies (bool -> int -> float) and refuse
the rest with the expression in their message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tilewise.errors import ArgumentError, UnsupportedError

__all__ = [
    "BINARY_FLOAT",
    "BITWISE",
    "COMPARISONS",
    "LEAVES",
    "UNARY_FLOAT",
    "Capture",
    "Node",
    "binary",
    "bitwise",
    "cast",
    "compare",
    "constant",
    "fill",
    "floating",
    "gather",
    "integer_only",
    "invert",
    "leaf",
    "power",
    "unary",
    "where",
]

#: The inputs of a program and their classes.
LEAVES = {"score": "float", "grad": "float", "batch": "int", "head": "int", "query": "int", "key": "int"}
#: Operations of one float; an int or a bool becomes a float first.
UNARY_FLOAT = (
    "floor", "ceil", "round", "trunc", "sqrt", "rsqrt", "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log1p",
    "sin", "cos", "tan", "tanh", "sigmoid", "erf", "relu", "square",
)  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
BITWISE = ("and", "or", "xor")
#: Operations of two floats; the others of :func:`binary` take two floats or two ints.
BINARY_FLOAT = ("div", "atan2", "pow")

_RANK = {"bool": 0, "int": 1, "float": 2}
_LARGEST = 2**63 - 1


class Capture:
    """An array that the program reads, by identity; `name` is what messages call it."""

    __slots__ = ("cls", "name", "rank", "shape", "source")

    def __init__(self, source: Any, cls: str, shape: Sequence[int], name: str) -> None:
        self.source, self.cls, self.shape, self.rank, self.name = source, cls, tuple(shape), len(shape), name


class Node:
    """One operation: its name, its operands, the class of its value, and a constant or a capture."""

    __slots__ = ("cls", "op", "operands", "value")

    def __init__(self, op: str, operands: tuple[Node, ...], cls: str, value: Any = None) -> None:
        self.op, self.operands, self.cls, self.value = op, operands, cls, value

    def __repr__(self) -> str:
        from tilewise.expr.show import show_node

        return show_node(self)


def leaf(name: str) -> Node:
    """An input of the program, by name (see :data:`LEAVES`)."""
    return Node(name, (), LEAVES[name])


def constant(value: bool | int | float) -> Node:
    """A constant of the class of the Python number."""
    if isinstance(value, bool):
        return Node("bool", (), "bool", value)
    if isinstance(value, int):
        if not -_LARGEST - 1 <= value <= _LARGEST:
            raise ArgumentError(f"the integer {value} does not fit 64 bits; write it as a float: {float(value)!r}")
        return Node("int", (), "int", value)
    return Node("float", (), "float", float(value))


def fill(value: bool | int | float, cls: str) -> Node:
    """A constant of a given class."""
    return constant({"bool": bool, "int": int, "float": float}[cls](value))


def cast(node: Node, cls: str) -> Node:
    """The node as another class: bool and int widen exactly, a float turns to an int toward zero, to a bool by != 0."""
    if node.cls == cls:
        return node
    if node.op in ("bool", "int", "float") and not (cls == "int" and not _finite(node.value)):
        return fill(node.value, cls)
    return Node(f"to_{cls}", (node,), cls)


def floating(node: Node) -> Node:
    """The node as a float."""
    return cast(node, "float")


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _arithmetic(*nodes: Node) -> tuple[str, list[Node]]:
    """The common class for arithmetic (a bool counts as 0 or 1), and the nodes cast to it."""
    cls = max((node.cls for node in nodes), key=_RANK.__getitem__)
    cls = "int" if cls == "bool" else cls
    return cls, [cast(node, cls) for node in nodes]


def unary(op: str, node: Node) -> Node:
    """An operation of one operand, by its name in the program text."""
    if op in UNARY_FLOAT:
        if op in ("floor", "ceil", "round", "trunc") and node.cls != "float":
            return cast(node, "int")  # a whole number already
        if op in ("relu", "square") and node.cls != "float":
            node = cast(node, "int")
            return binary("max", node, constant(0)) if op == "relu" else binary("mul", node, node)
        return Node(op, (floating(node),), "float")
    if op in ("neg", "abs", "sign"):
        cls, (node,) = _arithmetic(node)
        if op == "neg" and node.op in ("int", "float"):
            return constant(-node.value)
        return Node(op, (node,), cls)
    raise UnsupportedError(f"{op}: there is no such operation; there are {', '.join((*UNARY_FLOAT, 'neg', 'abs'))}")


def invert(node: Node) -> Node:
    """``~x``: logical for a bool, of every bit for an int."""
    if node.cls == "bool":
        return Node("not", (node,), "bool")
    integer_only("~", node)
    return Node("xor", (node, constant(-1)), "int")


def integer_only(spelling: str, *nodes: Node) -> None:
    """Refuses floats where only bools and ints have a meaning."""
    for node in nodes:
        if node.cls == "float":
            raise UnsupportedError(
                f"{spelling} takes bools and integers, and {node!r} is a float; compare it first (x > 0), or cast it"
            )


def binary(op: str, left: Node, right: Node) -> Node:
    """Arithmetic of two operands after Python's promotion (bool -> int -> float)."""
    if op in BINARY_FLOAT:
        return Node(op, (floating(left), floating(right)), "float")
    if op in ("shl", "shr"):
        integer_only("a shift", left, right)
        return Node(op, (cast(left, "int"), cast(right, "int")), "int")
    cls, (left, right) = _arithmetic(left, right)
    if op == "trunc_div" and cls == "float":
        return Node("trunc", (Node("div", (left, right), "float"),), "float")
    if op in ("floor_div", "mod", "trunc_div") and cls == "int" and right.op == "int" and right.value == 0:
        raise ArgumentError(f"{left!r} is divided by the integer 0, which has no value")
    return Node(op, (left, right), cls)


def bitwise(op: str, left: Node, right: Node) -> Node:
    """``&``, ``|`` and ``^``: logical for two bools, of every bit for ints."""
    integer_only({"and": "&", "or": "|", "xor": "^"}[op], left, right)
    cls = "bool" if left.cls == right.cls == "bool" else "int"
    return Node(op, (cast(left, cls), cast(right, cls)), cls)


def compare(op: str, left: Node, right: Node) -> Node:
    """A comparison after promotion; two bools are compared as 0 and 1."""
    _, (left, right) = _arithmetic(left, right)
    return Node(op, (left, right), "bool")


def where(condition: Node, yes: Node, no: Node) -> Node:
    """``yes`` where the condition holds, else ``no``; both of their common class."""
    if condition.cls != "bool":
        raise UnsupportedError(f"where takes a condition, and {condition!r} is a number; write {condition!r} != 0")
    cls = max(yes.cls, no.cls, key=_RANK.__getitem__)
    return Node("where", (condition, cast(yes, cls), cast(no, cls)), cls)


def power(base: Node, exponent: Node) -> Node:
    """``base ** exponent``: products for the whole exponents 0 to 3, else in floats."""
    if exponent.op in ("int", "float") and float(exponent.value) in (0.0, 1.0, 2.0, 3.0):
        if exponent.cls == "float":
            base = floating(base)
        return _product(base, int(exponent.value))
    if exponent.op == "int" and exponent.value > 3 and base.cls != "float":
        return _product(base, exponent.value)
    if base.cls != "float" and exponent.cls != "float":
        raise UnsupportedError(
            f"{base!r} ** {exponent!r}: an integer to the power of an integer that is not a small constant has no "
            "64-bit value in general; make one of them a float, or for powers of two write 1 << n"
        )
    if exponent.op == "float" and exponent.value == 0.5:
        return unary("sqrt", base)
    return binary("pow", base, exponent)


def _product(base: Node, count: int) -> Node:
    if count == 0:
        return fill(1, "float" if base.cls == "float" else "int")
    _, (base,) = _arithmetic(base)
    result: Node | None = None
    square = base
    while count:  # by repeated squaring
        if count & 1:
            result = square if result is None else binary("mul", result, square)
        count >>= 1
        if count:
            square = binary("mul", square, square)
    assert result is not None
    return result


def gather(capture: Capture, indices: Sequence[Node]) -> Node:
    """An element of a captured array; one integer for each of its axes."""
    for axis, index in enumerate(indices):
        if index.cls != "int":
            raise UnsupportedError(
                f"{capture.name}: axis {axis} is indexed by {index!r}, which is a {index.cls}; expected an integer "
                + ("(where(condition, a, b) chooses by a bool)" if index.cls == "bool" else "(cast it first)")
            )
        if index.op == "int" and not -capture.shape[axis] <= index.value < capture.shape[axis]:
            raise ArgumentError(
                f"{capture.name}: index {index.value} is outside axis {axis} of {capture.shape[axis]} elements"
            )
    if len(indices) != capture.rank:
        shown = ", ".join(map(repr, indices))
        raise ArgumentError(
            f"{capture.name}[{shown}]: the array has {capture.rank} axes {list(capture.shape)} and {len(indices)} "
            "are indexed; a score or a mask is one number, so give one integer for each axis"
        )
    return Node("gather", tuple(indices), capture.cls, capture)
