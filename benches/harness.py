"""How things are timed: the package's own harness, which `tilewise bench` uses too (:mod:`tilewise.bench.harness`)."""

from __future__ import annotations

from tilewise.bench.harness import PAUSE, Timing, interleave, machine, memory_reader, speedup

__all__ = ["PAUSE", "Timing", "interleave", "machine", "memory_reader", "speedup"]
