"""Programs that the fronts write themselves: soft caps, biases, ALiBi; and programs joined into one.

A program is text (one node a line, see :mod:`tilewise.expr`) with the arrays that it reads. The functions here only
put lines together; the core checks and simplifies them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Program", "added_bias", "alibi", "both", "chained", "softcapped"]


class Program(NamedTuple):
    """Program text and the arrays that it reads, in the order of its ``capture`` lines."""

    text: str
    captures: tuple[Any, ...] = ()


def _program(kind: str, captures: list[str], nodes: list[str]) -> str:
    lines = [f"tilewise-expr 1 {kind}", *(f"capture {capture}" for capture in captures), *nodes]
    return "\n".join([*lines, f"return {len(nodes) - 1}"]) + "\n"


def softcapped(cap: float) -> Program:
    """``cap * tanh(score / cap)``.

    Example:
        >>> from tilewise.attention.programs import softcapped
        >>> softcapped(30.0).text.splitlines()[1:]
        ['score', 'float 30.0', 'div 0 1', 'tanh 2', 'mul 3 1', 'return 4']
    """
    return Program(_program("score", [], ["score", f"float {float(cap)!r}", "div 0 1", "tanh 2", "mul 3 1"]))


def added_bias(bias: Any) -> Program:
    """``score + bias[batch, head, query, key]`` for a bias of rank 4; an axis of extent 1 is broadcast."""
    indices = [
        name if extent != 1 else "int 0"
        for name, extent in zip(("batch", "head", "query", "key"), bias.shape, strict=True)
    ]
    nodes = ["score", *indices, "gather 0 1 2 3 4", "add 0 5"]
    return Program(_program("score", ["float 4"], nodes), (bias,))


def alibi(slopes: Any, shift: Any) -> Program:
    """``score - slope * |query + shift - key|``: ALiBi as flash_attn computes it.

    Args:
        slopes: ``[heads]`` or ``[batch, heads]``.
        shift: int64 ``[1]`` or ``[batch]``: keys minus queries of each sequence.
    """
    rank = len(slopes.shape)
    slope = "gather 0 2" if rank == 1 else "gather 0 1 2"
    where = 3 if shift.shape[0] == 1 else 1
    nodes = [
        "score", "batch", "head", "int 0", slope, f"gather 1 {where}", "query", "add 6 5", "key", "sub 7 8",
        "abs 9", "to_float 10", "mul 4 11", "sub 0 12",
    ]  # fmt: skip
    return Program(_program("score", [f"float {rank}", "int 1"], nodes), (slopes, shift))


def _parts(text: str) -> tuple[list[str], list[str], int]:
    """Captures, nodes and the returned node of a program without scatters."""
    _, *lines = text.splitlines()
    captures = [line.split(" ", 1)[1] for line in lines if line.startswith("capture ")]
    nodes = [line for line in lines if line and not line.startswith(("capture ", "return "))]
    (end,) = (int(line.split()[1]) for line in lines if line.startswith("return "))
    return captures, nodes, end


# Lines whose words after the operation are not nodes.
_LEAVES = frozenset(("score", "grad", "batch", "head", "query", "key", "float", "int", "bool"))


def _moved(nodes: list[str], node_of: list[int], captures: int) -> list[str]:
    """`nodes` with node i called ``node_of[i]`` and captures counted from `captures`."""
    moved = []
    for node in nodes:
        name, *words = node.split()
        if name == "gather":
            first, *indices = (int(word) for word in words)
            words = [str(first + captures), *(str(node_of[index]) for index in indices)]
        elif name not in _LEAVES:
            words = [str(node_of[int(word)]) for word in words]
        moved.append(" ".join((name, *words)))
    return moved


def chained(first: Program | None, second: Program | None) -> Program | None:
    """The score program that applies `first` and hands its result to `second` as its score.

    Example:
        >>> from tilewise.attention.programs import Program, chained, softcapped
        >>> twice = Program("tilewise-expr 1 score\\nscore\\nadd 0 0\\nreturn 1\\n")
        >>> chained(softcapped(2.0), twice).text.splitlines()[1:]
        ['score', 'float 2.0', 'div 0 1', 'tanh 2', 'mul 3 1', 'add 4 4', 'return 5']
    """
    if first is None or second is None:
        return second if first is None else first
    captures, nodes, end = _parts(first.text)
    more, others, other_end = _parts(second.text)
    node_of, kept, following = [], [], len(nodes)
    for node in others:
        if node == "score":
            node_of.append(end)
            continue
        node_of.append(following)
        kept.append(node)
        following += 1
    kept = _moved(kept, node_of, len(captures))
    lines = ["tilewise-expr 1 score", *(f"capture {capture}" for capture in captures + more), *nodes, *kept]
    text = "\n".join([*lines, f"return {node_of[other_end]}"]) + "\n"
    return Program(text, (*first.captures, *second.captures))


def both(first: Program | None, second: Program | None) -> Program | None:
    """The mask program that keeps what `first` and `second` keep."""
    if first is None or second is None:
        return second if first is None else first
    captures, nodes, end = _parts(first.text)
    more, others, other_end = _parts(second.text)
    moved = _moved(others, list(range(len(nodes), len(nodes) + len(others))), len(captures))
    lines = ["tilewise-expr 1 mask", *(f"capture {capture}" for capture in captures + more), *nodes, *moved]
    last = len(nodes) + len(others)
    text = "\n".join([*lines, f"and {end} {len(nodes) + other_end}", f"return {last}"]) + "\n"
    return Program(text, (*first.captures, *second.captures))
