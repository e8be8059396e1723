"""Mixture of experts (see :mod:`tilewise.moe`)."""

from __future__ import annotations

from tilewise.moe import Routing
from tilewise.torch.moe.layer import experts
from tilewise.torch.moe.parallel import AllToAll, Dispatched, Dispatcher, Local
from tilewise.torch.moe.rounding import round_tokens
from tilewise.torch.moe.routers import load_balance_loss, route

__all__ = [
    "AllToAll",
    "Dispatched",
    "Dispatcher",
    "Local",
    "Routing",
    "experts",
    "load_balance_loss",
    "round_tokens",
    "route",
]
