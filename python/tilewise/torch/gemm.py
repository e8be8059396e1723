"""Matrix products (see :mod:`tilewise.gemm`)."""

from __future__ import annotations

import torch

from tilewise import gemm
from tilewise.torch._library import define, refuse_device

__all__ = ["matmul"]


def _kernel(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return gemm.matmul(a, b, rows=rows)


def _fake(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return a.new_empty((a.shape[0] if rows is None else rows.shape[0], b.shape[1]))


_matmul = define("matmul", "(Tensor a, Tensor b, Tensor? rows) -> Tensor", _kernel, _fake)


def matmul(a: torch.Tensor, b: torch.Tensor, *, rows: torch.Tensor | None = None) -> torch.Tensor:
    """``a[rows] @ b`` of torch tensors; arguments, result and errors as in :func:`tilewise.gemm.matmul`.

    Example:
        >>> import torch
        >>> from tilewise.torch import matmul
        >>> matmul(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rows=torch.tensor([1]))
        tensor([[3., 4.]])
    """
    refuse_device(a=a, b=b, rows=rows)
    return _matmul(a, b, rows)
