"""Inputs of the asv benchmarks: NumPy alone, the same numbers every time.

Not `tilewise.testing`: a commit that is measured may not have it.
"""

from __future__ import annotations

import numpy as np

__all__ = ["normal"]


def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Normally distributed values of a NumPy dtype or ``"bfloat16"``."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind: np.dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    return (np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(scale)).astype(kind)
