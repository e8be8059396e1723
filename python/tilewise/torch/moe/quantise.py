"""Expert weights as int8, on torch tensors (see :mod:`tilewise.moe.quantise`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise import moe
from tilewise.moe import QuantisedExperts
from tilewise.torch._library import define, refuse_device

__all__ = ["quantise_experts"]


def _kernel(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return moe.quantise_experts(gate_up, down)


def _fake(gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    def rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        return (
            weight.new_empty(weight.shape, dtype=torch.int8),
            weight.new_empty(weight.shape[:2], dtype=torch.float32),
        )

    return (*rows(gate_up), *rows(down))


_quantise = define(
    "moe_quantise_experts", "(Tensor gate_up, Tensor down) -> (Tensor, Tensor, Tensor, Tensor)", _kernel, _fake
)


@torch.no_grad()
def quantise_experts(gate_up: Tensor, down: Tensor) -> QuantisedExperts:
    """Expert weights as int8 on torch tensors; arguments, result and errors as :func:`tilewise.moe.quantise_experts`.

    No gradient flows through it.

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> up, down, x = torch.randn(3, 8, 4), torch.randn(3, 4, 4), torch.randn(2, 4)
        >>> quantised = moe.quantise_experts(up, down)
        >>> moe.experts(x, torch.tensor([[0], [2]]), torch.ones(2, 1), **quantised._asdict()).shape
        torch.Size([2, 4])
    """
    refuse_device(gate_up=gate_up, down=down)
    return QuantisedExperts(*_quantise(gate_up, down))
