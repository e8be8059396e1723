"""Measuring: what ``tilewise bench`` and the repository's benchmarks share.

* :mod:`tilewise.bench.harness`: timings side by side, round by round;
* :mod:`tilewise.bench.moe`: the expert layer, its peers in torch, and routings to run them on.
"""

from __future__ import annotations

from tilewise.bench.harness import Timing, interleave, machine, memory_reader, speedup

__all__ = ["Timing", "interleave", "machine", "memory_reader", "speedup"]
