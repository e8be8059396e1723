"""The expert layer on torch tensors (see :mod:`tilewise.moe.layer`)."""

from __future__ import annotations

import torch

from tilewise import moe
from tilewise.errors import UnsupportedError
from tilewise.moe import Activation, Layout
from tilewise.torch._library import define, refuse_device

__all__ = ["experts"]


def _experts_kernel(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    return moe.experts(
        x,
        expert_ids,
        weights,
        gate_up,
        down,
        activation=activation,  # type: ignore[arg-type]
        layout=layout,  # type: ignore[arg-type]
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        alpha=alpha,
        limit=limit,
    )


def _experts_fake(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    return x.new_empty(x.shape)


_experts = define(
    "moe_experts",
    "(Tensor x, Tensor expert_ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, str layout, float alpha, float limit) -> Tensor",
    _experts_kernel,
    _experts_fake,
)


def experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """The expert layer on torch tensors; arguments, result and errors as in :func:`tilewise.moe.experts`.

    Raises:
        UnsupportedError: a tensor that requires a gradient (the backward pass is not built yet).

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> x, up, down = torch.ones(2, 4), torch.ones(3, 6, 4), torch.ones(3, 4, 3)
        >>> moe.experts(x, torch.tensor([[0], [2]]), torch.ones(2, 1), up, down, activation="swiglu").shape
        torch.Size([2, 4])
    """
    refuse_device(x=x, expert_ids=expert_ids, weights=weights, gate_up=gate_up, down=down)
    refuse_device(gate_up_bias=gate_up_bias, down_bias=down_bias)
    _refuse_gradient("experts", x=x, weights=weights, gate_up=gate_up, down=down)
    return _experts(
        x,
        expert_ids,
        weights,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        layout,
        float(alpha),
        float(limit),
    )


def _refuse_gradient(operation: str, **tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise UnsupportedError(
                    f"{operation}: {name} requires a gradient and the backward pass is not built yet; "
                    "call it under torch.no_grad()"
                )
