"""The readable meaning of every room: float64, NumPy alone, loops where loops say it best.

Nothing here is fast and nothing fast imports it. Tests and doubters compare the kernels with these functions.
"""

from __future__ import annotations

from tilewise.reference import attention, expr, gemm, moe, speculation

__all__ = ["attention", "expr", "gemm", "moe", "speculation"]
