"""Mixture of experts (see :mod:`tilewise.moe`)."""

from __future__ import annotations

from tilewise.moe import QuantisedExperts, Routing
from tilewise.torch.moe.layer import experts
from tilewise.torch.moe.quantise import quantise_experts
from tilewise.torch.moe.rounding import round_tokens
from tilewise.torch.moe.routers import load_balance_loss, route

__all__ = [
    "QuantisedExperts",
    "Routing",
    "experts",
    "load_balance_loss",
    "quantise_experts",
    "round_tokens",
    "route",
]
