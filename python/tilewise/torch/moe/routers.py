"""Routers on torch tensors (see :mod:`tilewise.moe.routers`)."""

from __future__ import annotations

import torch

from tilewise import moe
from tilewise.errors import UnsupportedError
from tilewise.moe import Scoring
from tilewise.torch._library import define, refuse_device

__all__ = ["route"]


def _route_kernel(
    logits: torch.Tensor, top_k: int, scoring: str, bias: torch.Tensor | None, renormalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return moe.route(logits, top_k, scoring=scoring, bias=bias, renormalise=renormalise, scale=scale)  # type: ignore[arg-type]


def _route_fake(
    logits: torch.Tensor, top_k: int, scoring: str, bias: torch.Tensor | None, renormalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


_route = define(
    "moe_route",
    "(Tensor logits, int top_k, str scoring, Tensor? bias, bool renormalise, float scale) -> (Tensor, Tensor)",
    _route_kernel,
    _route_fake,
)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax_topk",
    bias: torch.Tensor | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routers on torch tensors; arguments, results and errors as in :func:`tilewise.moe.route`.

    Raises:
        UnsupportedError: logits that require a gradient (the backward pass is not built yet).

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> moe.route(torch.tensor([[0.0, 3.0, 1.0]]), 1)[0]
        tensor([[1]], dtype=torch.int32)
    """
    refuse_device(logits=logits, bias=bias)
    _refuse_gradient("route", logits=logits)
    return _route(logits, top_k, scoring, bias, renormalise, float(scale))


def _refuse_gradient(operation: str, **tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise UnsupportedError(
                    f"{operation}: {name} requires a gradient and the backward pass is not built yet; "
                    "call it under torch.no_grad()"
                )
