"""tilewise: the primitives that make sparse language models fast, on any CPU and NVIDIA GPU.

Rooms, each under one name on every floor (Rust core, NumPy here, PyTorch in :mod:`tilewise.torch`):

* :mod:`tilewise.gemm`: matrix products with strided and gathered rows;
* :mod:`tilewise.attention`: exact attention, forward and backward, prefill and decode;
* :mod:`tilewise.expr`: score and mask functions as programs; :mod:`tilewise.masks` and :mod:`tilewise.mods` name many;
* :mod:`tilewise.moe`: routers, ``Routing`` and the expert layer;
* :mod:`tilewise.speculation`: exact verification of drafted tokens, in two rules; guesses, caches, look-up drafts;
* :mod:`tilewise.scheduler`: who runs when, as state machines without I/O: rounds, planning, confidence, paths;
* :mod:`tilewise.agents`: agents that plan speculatively, with asyncio;
* :mod:`tilewise.plots`: pictures, a module a room.

``import tilewise`` loads the native core alone; a room loads when it is first asked for (``tw.moe``), NumPy with it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from tilewise import _core, errors

__version__: str = _core.build_info()["version"]

_ROOMS = (
    "agents", "attention", "cuda", "expr", "gemm", "hf", "masks", "mods", "moe", "plots", "reference", "scheduler",
    "speculation", "testing", "torch",
)  # fmt: skip

__all__ = ["__version__", "errors"]

# A wrong TILEWISE_CPU_ISA must fail here, with a message, and not at the first kernel.
_core.force_isa(None)


def __getattr__(name: str) -> ModuleType:
    """Rooms load when they are first asked for: ``import tilewise as tw; tw.moe.route(...)``."""
    if name in _ROOMS:
        return importlib.import_module(f"tilewise.{name}")
    raise AttributeError(f"module 'tilewise' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
