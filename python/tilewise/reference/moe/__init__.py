"""The meaning of :mod:`tilewise.moe`."""

from __future__ import annotations

from tilewise.reference.moe.layer import GATED, PLAIN, activate, experts
from tilewise.reference.moe.quantise import dequantise, quantise_experts
from tilewise.reference.moe.rounding import RULES, round_tokens
from tilewise.reference.moe.routers import SCORINGS, load_balance_loss, route

__all__ = [
    "GATED",
    "PLAIN",
    "RULES",
    "SCORINGS",
    "activate",
    "dequantise",
    "experts",
    "load_balance_loss",
    "quantise_experts",
    "round_tokens",
    "route",
]
