"""Kernels for NVIDIA GPUs (Ampere and newer): compiled at run time, launched through CuPy.

* :mod:`tilewise.cuda.kernel`: what a kernel is, and the list of all of them;
* :mod:`tilewise.cuda.compile`: source text to cubin (NVRTC), and the cache of cubins;
* :mod:`tilewise.cuda.launch`: CuPy arrays and torch tensors in, a launch on the caller's stream;
* the rooms, under the names that they have on the CPU: :mod:`tilewise.cuda.moe`.

Importing this package imports neither CuPy nor torch nor any of NVIDIA's packages: they load inside calls, and
:func:`why_not` says which one is missing. Device code lies in ``cuda/`` of the repository and travels inside the
native core; see ``docs/cuda.md``.
"""

from __future__ import annotations

from tilewise.cuda.launch import why_not

__all__ = ["why_not"]
