"""The room's functions with the positional arguments of torch's operators ``tilewise::moe_*``.

:mod:`tilewise.torch` registers them for CUDA tensors; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewise.cuda.launch import describe, empty
from tilewise.cuda.moe import layer, routers
from tilewise.moe import ExpertGradients

__all__ = ["experts", "experts_backward", "route", "route_backward"]


def _nothing(like: Any) -> Any:
    """What an operator returns where there is no result."""
    described = describe("x", like)
    return empty(described, (0,), described.dtype).array


def route(
    logits: Any,
    top_k: int,
    scoring: Any,
    bias: Any | None,
    renormalise: bool,
    scale: float,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Any, Any]:
    """``moe_route``; see :func:`tilewise.cuda.moe.route`."""
    return routers.route(
        logits,
        top_k,
        scoring=scoring,
        bias=bias,
        renormalise=renormalise,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
    )


def route_backward(grad: Any, logits: Any, expert_ids: Any, scoring: Any, renormalise: bool, scale: float) -> Any:
    """``moe_route_backward``; see :func:`tilewise.cuda.moe.route_backward`."""
    return routers.route_backward(grad, logits, expert_ids, scoring=scoring, renormalise=renormalise, scale=scale)


def _options(rest: Sequence[Any]) -> dict[str, Any]:
    names = ("token_ids", "gate_up", "down", "gate_up_bias", "down_bias", "activation", "layout", "alpha", "limit")
    return dict(zip(names, rest, strict=True))


def experts(x: Any, expert_ids: Any, weights: Any, *rest: Any) -> tuple[Any, Any]:
    """``moe_experts``: the result, and the pre-activation or nothing; see :func:`tilewise.cuda.moe.experts`.

    ``rest``: token_ids, gate_up, down, gate_up_bias, down_bias, activation, layout, alpha, limit, keep.
    """
    *given, keep = rest
    if keep:
        return layer.experts_forward(x, expert_ids, weights, **_options(given))
    return layer.experts(x, expert_ids, weights, **_options(given)), _nothing(x)


def experts_backward(grad: Any, pre_activation: Any, x: Any, expert_ids: Any, weights: Any, *rest: Any) -> list[Any]:
    """``moe_experts_backward``: six gradients, nothing for those not wanted.

    ``rest``: as in :func:`experts`, and instead of `keep` six flags, in the order of
    :class:`tilewise.moe.ExpertGradients`.
    """
    *given, wanted = rest
    names = [name for name, want in zip(ExpertGradients._fields, wanted, strict=True) if want]
    gradients = layer.experts_backward(grad, pre_activation, x, expert_ids, weights, **_options(given), wanted=names)
    return [_nothing(x) if gradient is None else gradient for gradient in gradients]
