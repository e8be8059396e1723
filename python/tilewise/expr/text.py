"""Between nodes and the program text, the one form in which a mod crosses languages.

Line based: a header with the kind, a ``capture`` line for each array, one node a line numbered from 0, ``return``.
Equal subexpressions share a line.
"""

from __future__ import annotations

from typing import Any

from tilewise.errors import ArgumentError
from tilewise.expr.nodes import LEAVES, Capture, Node

__all__ = ["parse", "write"]

_CONSTANTS = ("bool", "int", "float")


def write(kind: str, root: Node) -> tuple[str, list[Capture]]:
    """The text of a program that returns `root`, and the captures in the order of their numbers."""
    captures: dict[int, int] = {}
    used: list[Capture] = []
    lines: list[str] = []
    by_line: dict[str, int] = {}
    numbers: dict[int, int] = {}  # id(node) -> number
    stack = [root]
    while stack:
        node = stack[-1]
        if id(node) in numbers:
            stack.pop()
            continue
        waiting = [operand for operand in node.operands if id(operand) not in numbers]
        if waiting:
            stack.extend(reversed(waiting))
            continue
        stack.pop()
        line = _line(node, [numbers[id(operand)] for operand in node.operands], captures, used)
        if line not in by_line:
            by_line[line] = len(lines)
            lines.append(line)
        numbers[id(node)] = by_line[line]
    head = [f"tilewise-expr 1 {kind}"]
    head += [f"capture {capture.cls} {capture.rank}" for capture in used]
    return "\n".join([*head, *lines, f"return {numbers[id(root)]}"]) + "\n", used


def _line(node: Node, operands: list[int], captures: dict[int, int], used: list[Capture]) -> str:
    words = [node.op]
    if node.op == "gather":
        source = id(node.value.source)
        if source not in captures:
            captures[source] = len(used)
            used.append(node.value)
        words.append(str(captures[source]))
    elif node.op == "bool":
        words.append(str(int(node.value)))
    elif node.op in _CONSTANTS:
        words.append(repr(node.value))
    return " ".join([*words, *map(str, operands)])


def parse(text: str, captures: tuple[Any, ...] = ()) -> tuple[str, list[tuple[str, list[Any]]], int]:
    """A text as ``(kind, [(operation, words)], number returned)``; words are operands, and a constant as its number.

    Raises:
        ArgumentError: the header, or a line, is not of this language.
    """
    rows = [(number, line.partition("#")[0].split()) for number, line in enumerate(text.splitlines(), 1)]
    rows = [(number, words) for number, words in rows if words]
    if not rows or rows[0][1][:2] != ["tilewise-expr", "1"] or len(rows[0][1]) != 3:
        raise ArgumentError("program: expected the header 'tilewise-expr 1 score' or 'tilewise-expr 1 mask'")
    kind = rows[0][1][2]
    nodes: list[tuple[str, list[Any]]] = []
    returned: int | None = None
    for number, (op, *words) in rows[1:]:
        if op == "capture":
            continue
        try:
            if op == "return":
                returned = int(words[0])
            elif op == "bool":
                nodes.append((op, [bool(int(words[0]))]))
            elif op == "float":
                nodes.append((op, [float(words[0])]))
            else:
                nodes.append((op, [int(word) for word in words]))
        except (ValueError, IndexError):
            raise ArgumentError(f"program: line {number} is {' '.join([op, *words])!r}, which cannot be read") from None
    if returned is None:
        raise ArgumentError("program: there is no 'return' line")
    return kind, nodes, returned


#: Leaves by name, in the order in which a mod's function takes them.
ARGUMENTS = {"score": tuple(name for name in LEAVES if name != "grad"), "mask": ("batch", "head", "query", "key")}
