"""Attention: on the GPU, and the same kernels emulated on a CPU, against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_emulator import Place
from cuda_emulator.attention_cases import CAUSAL, MASK, SCORE, check, make

BOTH = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 70, 130, 64, 64),  # rows of whole chunks: the path of asynchronous copies
        (2, 6, 2, 9, 21, 17, 9),  # no row is aligned
        (1, 1, 1, 1, 1, 1, 1),
        (1, 3, 3, 65, 33, 24, 40),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_equals_the_reference(place: Place, dtype: str, shape: tuple[int, ...]) -> None:
    check(make(dtype, shape), place)
    check(make(dtype, shape, causal=True), place)
