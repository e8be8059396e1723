"""Mixture of experts.

* :mod:`tilewise.moe.routers`: logits to expert ids and weights;
* :mod:`tilewise.moe.layer`: the expert layer, forward and backward.
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
from tilewise.moe.routers import Scoring, route

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ExpertGradients",
    "Layout",
    "Scoring",
    "experts",
    "experts_backward",
    "experts_forward",
    "route",
]
