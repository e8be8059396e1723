"""Programs over every element, by the readable reference: what the tests of tracing compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise.reference.expr import evaluate


def values(array: Any) -> np.ndarray:
    """A captured array, NumPy or torch of any type, as NumPy."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    return np.asarray(array)


def grid(batch: int, heads: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    """Index arrays that broadcast to [batch, heads, queries, keys]."""
    b, h, q, k = np.ogrid[:batch, :heads, :queries, :keys]
    return {"batch": b, "head": h, "query": q, "key": k}


def dense(mod: Any, extents: tuple[int, int, int, int], score: np.ndarray | None = None) -> np.ndarray:
    """The mask or the scores of a mod, ``[batch, heads, queries, keys]``, in float64."""
    batch, heads, queries, keys = extents
    captures = [values(capture) for capture in mod.captures]
    lines = [line.split() for line in mod.program.splitlines() if line.startswith("capture ")]
    kinds = {"float": "f", "int": "i", "bool": "b"}
    assert [(kinds[cls], int(rank)) for _, cls, rank in lines] == [(x.dtype.kind, x.ndim) for x in captures]
    return evaluate(mod.program, captures, batch=batch, heads=heads, queries=queries, keys=keys, score=score)
