"""A small evaluator of program texts, independent of the tracers and of the core."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_TWO = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "min": np.minimum, "max": np.maximum,
    "atan2": np.arctan2, "pow": np.power, "floor_div": np.floor_divide, "mod": np.remainder, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "trunc_div": lambda x, y: np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)),
}  # fmt: skip
_ONE = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "not": np.logical_not, "round": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x), "reciprocal": lambda x: 1 / x, "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf, otypes=[float]), "relu": lambda x: np.where(x > 0, x, 0), "square": lambda x: x * x,
    "to_float": lambda x: np.asarray(x, np.float64), "to_int": lambda x: np.trunc(x).astype(np.int64),
    "to_bool": lambda x: np.asarray(x) != 0,
} | {
    name: getattr(np, name)
    for name in ("floor", "ceil", "trunc", "sqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan",
                 "tanh")
}  # fmt: skip


def values(array: Any) -> np.ndarray:
    """A captured array (NumPy or torch) as int64, float64 or bool."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    array = np.asarray(array)
    return array.astype({"f": np.float64, "b": bool}.get(array.dtype.kind, np.int64))


def evaluate(program: str, captures: Any, *, score: Any = None, **indices: Any) -> np.ndarray:
    """The value of a program over arrays of indices (batch, head, query, key) that broadcast, in float64 and int64."""
    classes: list[tuple[str, int]] = []
    nodes: list[Any] = []
    arrays = [values(capture) for capture in captures]
    inputs = {"score": score, **indices}
    lines = program.splitlines()
    assert lines[0].split()[:2] == ["tilewise-expr", "1"]
    with np.errstate(all="ignore"):
        for line in lines[1:]:
            op, *words = line.split()
            if op == "capture":
                classes.append((words[0], int(words[1])))
            elif op == "return":
                assert len(classes) == len(arrays)
                for (name, rank), array in zip(classes, arrays, strict=True):
                    assert array.ndim == rank and array.dtype.kind == {"float": "f", "int": "i", "bool": "b"}[name]
                return nodes[int(words[0])]
            elif op in ("float", "int", "bool"):
                nodes.append({"float": float, "int": int, "bool": lambda x: bool(int(x))}[op](words[0]))
            elif op in inputs:
                nodes.append(inputs[op])
            elif op == "gather":
                nodes.append(arrays[int(words[0])][tuple(np.asarray(nodes[int(word)]) for word in words[1:])])
            elif op == "where":
                nodes.append(np.where(*(nodes[int(word)] for word in words)))
            elif len(words) == 2:
                nodes.append(_TWO[op](nodes[int(words[0])], nodes[int(words[1])]))
            else:
                nodes.append(_ONE[op](nodes[int(words[0])]))
    raise AssertionError("no return line")


def grid(batch: int, heads: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    """Index arrays that broadcast to [batch, heads, queries, keys]."""
    b, h, q, k = np.ogrid[:batch, :heads, :queries, :keys]
    return {"batch": b, "head": h, "query": q, "key": k}


def dense(mod: Any, extents: tuple[int, int, int, int], score: np.ndarray | None = None) -> np.ndarray:
    """The mask or the scores of a mod, ``[batch, heads, queries, keys]``."""
    return np.broadcast_to(evaluate(mod.program, mod.captures, score=score, **grid(*extents)), extents)


def stand_in_block_mask(program: str, captures: Any, *, batch: int, heads: int, queries: int, keys: int,
                        query_block: int, key_block: int, **out: np.ndarray) -> None:  # fmt: skip
    """What ``_core.block_mask`` does, from the dense mask."""
    dense_mask = np.broadcast_to(evaluate(program, captures, **grid(batch, heads, queries, keys)),
                                 (batch, heads, queries, keys))  # fmt: skip
    rows, columns = -(-queries // query_block), -(-keys // key_block)
    for place in np.ndindex(batch, heads, rows):
        found: dict[str, list[int]] = {"kv": [], "full_kv": []}
        top = place[2] * query_block
        for column in range(columns):
            left = column * key_block
            block = dense_mask[place[0], place[1], top : top + query_block, left : left + key_block]
            if block.any():
                found["full_kv" if block.sum() == query_block * key_block else "kv"].append(column)
        for name, listed in found.items():
            out[f"{name}_num_blocks"][place] = len(listed)
            out[f"{name}_indices"][place] = listed + [-1] * (columns - len(listed))
