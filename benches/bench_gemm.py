"""asv: matrix products on the frozen cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import DTYPES, GEMM, by_name
from .inputs import normal


class Matmul:
    """``a @ weight.T`` with the weight as torch.nn.Linear stores it."""

    params = ([case.name for case in GEMM], DTYPES)
    param_names = ("case", "dtype")
    warmup_time = 0.2
    repeat = (3, 9, 2.0)
    call: Callable[[], Any]

    def setup(self, name: str, dtype: str) -> None:
        from tilewise.gemm import matmul

        case: Any = by_name(name)
        a, weight = normal((case.m, case.k), dtype), normal((case.n, case.k), dtype)
        self.call = lambda: matmul(a, weight.T)

    def time_matmul(self, name: str, dtype: str) -> None:
        self.call()
