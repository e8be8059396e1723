"""Mixture of experts.

* :mod:`tilewise.moe.routers`: logits to expert ids and weights, and the loss that balances the load;
* :mod:`tilewise.moe.rounding`: token rounding, and :class:`Routing`, a routing as pairs;
* :mod:`tilewise.moe.layer`: the expert layer, forward and backward;
* :mod:`tilewise.moe.quantise`: expert weights as int8 with scales, for inference.
"""

from __future__ import annotations

from tilewise.moe.layer import (
    ACTIVATIONS,
    Activation,
    ExpertGradients,
    Layout,
    experts,
    experts_backward,
    experts_forward,
)
from tilewise.moe.quantise import QuantisedExperts, quantise_experts
from tilewise.moe.rounding import Routing, Rule, round_tokens
from tilewise.moe.routers import Scoring, load_balance_loss, route

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ExpertGradients",
    "Layout",
    "QuantisedExperts",
    "Routing",
    "Rule",
    "Scoring",
    "experts",
    "experts_backward",
    "experts_forward",
    "load_balance_loss",
    "quantise_experts",
    "round_tokens",
    "route",
]
