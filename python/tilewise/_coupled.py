"""Coupled sampling: target and draft race over the same clocks, so where their laws agree their tokens do."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise import _core

class Races:
    def __init__(self, seed: int, vocabulary: int):
        self.vocabulary = vocabulary
        self._races = _core.Races(int(seed), int(vocabulary))

    def rank(self, logits: Any, *, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, requests: Any, positions: Any, count: int = 1) -> Any:
        rows = len(logits)
        full = lambda v, d: np.full(rows, v, d) if np.ndim(v) == 0 else np.ascontiguousarray(v, d)
        out = np.empty((rows, count), np.int64)
        self._races.rank(logits, full(temperature, np.float64), full(top_k, np.int64), full(top_p, np.float64), full(requests, np.int64), full(np.asarray(positions), np.int64), out)
        return out
