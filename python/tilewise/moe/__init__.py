"""Mixture of experts.

* :mod:`tilewise.moe.routers`: logits to expert ids and weights;
* :mod:`tilewise.moe.layer`: the expert layer.
"""

from __future__ import annotations

from tilewise.moe.layer import ACTIVATIONS, Activation, Layout, experts
from tilewise.moe.routers import Scoring, route

__all__ = ["ACTIVATIONS", "Activation", "Layout", "Scoring", "experts", "route"]
