"""How things are timed: side by side, round by round, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PAUSE", "Timing", "interleave", "machine", "memory_reader", "speedup"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one function, a number for each round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a part of the median: what the machine's noise is worth."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


#: Seconds between two timings.
PAUSE = 0.02


def interleave(
    functions: dict[str, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 1,
    least: float = 0.02,
    watch: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times every function once a round, in an order that rotates.

    Args:
        functions: what to call, by name.
        rounds: how often each is timed.
        warmup: rounds that do not count.
        least: seconds that one timing should take; shorter calls are repeated within it.
        watch: called with a name after each timing that counts, outside of what is timed.

    Returns:
        Seconds of one call, by name.

    Example:
        >>> timings = interleave({"a": lambda: sum(range(10)), "b": lambda: None}, rounds=3, least=0.0)
        >>> len(timings["a"].seconds)
        3
    """
    repeats: dict[str, int] = {}
    for name, function in functions.items():
        seconds = 0.0
        for _ in range(max(warmup, 1)):
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
        repeats[name] = max(1, round(least / max(seconds, 1e-9)))
    names = list(functions)
    seconds_of: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            function, count = functions[name], repeats[name]
            # OpenMP's threads go on spinning for a while after a call: nobody should start beside another's.
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(count):
                function()
            seconds_of[name].append((time.perf_counter() - start) / count)
            if watch is not None:
                watch(name)
    return {name: Timing(name, tuple(times)) for name, times in seconds_of.items()}


def speedup(ours: Timing, peer: Timing) -> float:
    """How many times faster ours is: the median over rounds of the ratio within a round."""
    return statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True))


def memory_reader(threads: int, megabytes: int = 256) -> tuple[Callable[[], Any], float]:
    """A function that reads memory no cache holds with `threads` threads, and the bytes of one call.

    Each thread takes the inner product of its part of one array with itself: of NumPy's passes over memory the fastest
    here (a maximum reads a tenth less a second).

    Example:
        >>> read, size = memory_reader(1, megabytes=1)
        >>> read(), size
        ([np.float32(262144.0)], 1048576.0)
    """
    values = np.ones(megabytes * 2**20 // 4, np.float32)
    parts = np.array_split(values, threads)
    pool = ThreadPoolExecutor(threads)
    # NumPy lets go of the interpreter meanwhile.
    return lambda: list(pool.map(np.dot, parts, parts)), float(values.nbytes)


def _others() -> float | None:
    """Processes that want a core right now, ourselves left out (an average would still count the build before)."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1.0
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine() -> dict[str, Any]:
    """What a result depends on; no names of hosts or users."""
    from tilewise import _core

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    build = _core.build_info()
    return {
        "processor": model,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _core.num_threads(),
        "isa": _core.isa_chosen(),
        "load": _others(),
        "tilewise": build["version"],
        "commit": build["commit"],
        "rustc": build["rustc"],
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
