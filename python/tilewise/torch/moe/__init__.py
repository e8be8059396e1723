"""Mixture of experts (see :mod:`tilewise.moe`)."""

from __future__ import annotations

from tilewise.torch.moe.layer import experts
from tilewise.torch.moe.parallel import AllToAll, Dispatched, Dispatcher, Local
from tilewise.torch.moe.routers import route

__all__ = ["AllToAll", "Dispatched", "Dispatcher", "Local", "experts", "route"]
