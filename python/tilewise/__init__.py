"""tilewise: the primitives that make sparse language models fast, on any CPU and NVIDIA GPU.

Rooms, each under one name on every floor (Rust core, NumPy here, PyTorch in :mod:`tilewise.torch`):

* :mod:`tilewise.gemm`: matrix products with strided and gathered rows;
* :mod:`tilewise.attention`: exact attention forward, prefill and decode;
* :mod:`tilewise.moe`: routers, ``Routing`` and the expert layer;
* :mod:`tilewise.speculation`: exact verification of drafted tokens.

``import tilewise`` loads NumPy and the native core, nothing heavier.
"""

from __future__ import annotations

from tilewise import _core, errors

__version__: str = _core.build_info()["version"]

__all__ = ["__version__", "errors"]

# A wrong TILEWISE_CPU_ISA must fail here, with a message, and not at the first kernel.
_core.force_isa(None)
