"""The meaning of :mod:`tilewise.moe`."""

from __future__ import annotations

from tilewise.reference.moe.layer import GATED, PLAIN, activate, experts
from tilewise.reference.moe.routers import SCORINGS, route

__all__ = ["GATED", "PLAIN", "SCORINGS", "activate", "experts", "route"]
