"""Mixture of experts (see :mod:`tilewise.moe`), with gradients.

* :mod:`tilewise.torch.moe.routers`, :mod:`~tilewise.torch.moe.rounding`, :mod:`~tilewise.torch.moe.layer`,
  :mod:`~tilewise.torch.moe.quantise`: functions;
* :mod:`tilewise.torch.moe.module`: :class:`MoE`, all of it as one module;
* :mod:`tilewise.torch.moe.parallel`: experts over several processes;
* :mod:`tilewise.torch.moe.fills`: what rounding needs in a training step.
"""

from __future__ import annotations

from tilewise.moe import QuantisedExperts, Routing
from tilewise.torch.moe.layer import experts
from tilewise.torch.moe.module import MoE
from tilewise.torch.moe.parallel import AllToAll, Dispatched, Dispatcher, Local
from tilewise.torch.moe.quantise import quantise_experts
from tilewise.torch.moe.rounding import round_tokens
from tilewise.torch.moe.routers import load_balance_loss, route

__all__ = [
    "AllToAll",
    "Dispatched",
    "Dispatcher",
    "Local",
    "MoE",
    "QuantisedExperts",
    "Routing",
    "experts",
    "load_balance_loss",
    "quantise_experts",
    "round_tokens",
    "route",
]
