"""Expressions as a reader writes them, for messages: ``score + slopes[h] * (k - q)``."""

from __future__ import annotations

from tilewise.expr.nodes import Node

__all__ = ["show_node"]

_NAMES = {"batch": "b", "head": "h", "query": "q", "key": "k"}
# How tightly an operator binds, as in Python.
_INFIX = {
    "or": ("|", 2), "xor": ("^", 3), "and": ("&", 4), "shl": ("<<", 5), "shr": (">>", 5), "add": ("+", 6),
    "sub": ("-", 6), "mul": ("*", 7), "div": ("/", 7), "floor_div": ("//", 7), "mod": ("%", 7), "pow": ("**", 9),
    "lt": ("<", 1), "le": ("<=", 1), "gt": (">", 1), "ge": (">=", 1), "eq": ("==", 1), "ne": ("!=", 1),
}  # fmt: skip
_LIMIT = 400


def show_node(node: Node, limit: int = _LIMIT) -> str:
    """The expression under a node, cut in the middle where it is longer than `limit` characters."""
    text = _show(node, 0, [150])
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"


def _show(node: Node, outer: int, left_over: list[int]) -> str:
    """`outer`: how tightly the surrounding operator binds; `left_over`: how many nodes may still be shown, since a
    graph with shared nodes can be exponentially longer as text."""
    left_over[0] -= 1
    if left_over[0] < 0:
        return "..."
    op, operands = node.op, node.operands
    if not operands and op != "gather":
        return repr(node.value) if op in ("bool", "int", "float") else _NAMES.get(op, op)
    if op in _INFIX:
        sign, bind = _INFIX[op]
        left = _show(operands[0], bind, left_over)
        right = _show(operands[1], bind + 1, left_over)
        text = f"{left} {sign} {right}"
        return f"({text})" if bind < outer or (bind == 1 and outer == 1) else text
    if op in ("neg", "not"):
        text = ("-" if op == "neg" else "~") + _show(operands[0], 8, left_over)
        return f"({text})" if outer > 8 else text
    inner = ", ".join(_show(operand, 0, left_over) for operand in operands)
    if op == "gather":
        return f"{node.value.name}[{inner}]" if operands else node.value.name
    return f"{op.removeprefix('to_')}({inner})"
