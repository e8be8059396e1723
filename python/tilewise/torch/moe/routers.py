"""Routers on torch tensors (see :mod:`tilewise.moe.routers`)."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import _core, moe
from tilewise.errors import DtypeError, ShapeError
from tilewise.moe import Scoring
from tilewise.torch._library import define, differentiate, refuse_device

__all__ = ["load_balance_loss", "route"]


def _route_kernel(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    bias: torch.Tensor | None,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    limits = {"groups": groups, "top_groups": top_groups}
    return moe.route(logits, top_k, scoring=scoring, bias=bias, renormalise=renormalise, scale=scale, **limits)  # type: ignore[arg-type]


def _weights_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _route_fake(logits: torch.Tensor, top_k: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=_weights_dtype(logits))


def _route_backward_kernel(
    grad: torch.Tensor, logits: torch.Tensor, expert_ids: torch.Tensor, scoring: str, renormalise: bool, scale: float
) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype)
    options = {"scoring": scoring, "renormalise": renormalise, "scale": scale}
    _core.route_backward(logits.detach(), expert_ids, grad.detach(), out, **options)
    return out


def _route_backward_fake(grad: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


_route = define(
    "moe_route",
    "(Tensor logits, int top_k, str scoring, Tensor? bias, bool renormalise, float scale, int groups, int top_groups) "
    "-> (Tensor, Tensor)",
    _route_kernel,
    _route_fake,
    cuda=("tilewise.cuda.moe.operators", "route"),
)
_route_backward = define(
    "moe_route_backward",
    "(Tensor grad, Tensor logits, Tensor expert_ids, str scoring, bool renormalise, float scale) -> Tensor",
    _route_backward_kernel,
    _route_backward_fake,
    cuda=("tilewise.cuda.moe.operators", "route_backward"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _, ctx.scoring, _, ctx.renormalise, ctx.scale, *_ = inputs
    ctx.save_for_backward(logits, output[0])


def _backward(ctx: Any, _: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    logits, expert_ids = ctx.saved_tensors
    gradient = _route_backward(grad, logits, expert_ids, ctx.scoring, ctx.renormalise, ctx.scale)
    return (gradient, *[None] * 7)


differentiate("moe_route", _setup, _backward, operator="moe_route_backward")


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax_topk",
    bias: torch.Tensor | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routers on torch tensors; arguments, results and errors as in :func:`tilewise.moe.route`.

    The weights are differentiable with respect to the logits; the choice of experts is a constant, so `bias` gets no
    gradient. Saved for backward: the logits and the expert ids.

    Raises:
        UnsupportedError: a second derivative.

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> logits = torch.tensor([[0.0, 2.0, 2.0]], requires_grad=True)
        >>> expert_ids, weights = moe.route(logits, 2)
        >>> weights[0, 0].backward()
        >>> expert_ids.tolist(), logits.grad.tolist()
        ([[1, 2]], [[0.0, 0.25, -0.25]])
    """
    refuse_device(cuda=True, logits=logits, bias=bias)
    kept = groups if top_groups is None else top_groups
    return _route(logits, top_k, scoring, bias, renormalise, float(scale), groups, kept)


def load_balance_loss(logits: torch.Tensor, expert_ids: torch.Tensor, *, probabilities: bool = False) -> torch.Tensor:
    """The auxiliary load-balance loss, as in :func:`tilewise.moe.load_balance_loss`: a differentiable scalar.

    Plain torch operations: the softmax is float32 (float64 for float64 logits) and is what backward keeps, one tensor
    of the size of the logits. The counts get no gradient.

    Raises:
        ShapeError, DtypeError: see the message.

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> moe.load_balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    if logits.dim() != 2:
        raise ShapeError(f"logits: expected rank 2 [tokens, experts], got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise DtypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"expert_ids: expected dtype int32 or int64, got {expert_ids.dtype}")
    experts = logits.shape[1]
    wide = logits.to(_weights_dtype(logits))
    mass = (wide if probabilities else wide.softmax(-1)).sum(0)
    ids = expert_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)  # one place more, for ids that do not count
    counts = wide.new_zeros(experts + 1).scatter_add(0, ids, torch.ones_like(ids, dtype=wide.dtype))[:experts]
    return experts * (_share(mass) * _share(counts)).sum()


def _share(parts: torch.Tensor) -> torch.Tensor:
    total = parts.sum()
    return parts / torch.where(total == 0, torch.ones_like(total), total)
