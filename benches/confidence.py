"""Confidence of 512 traces of 32k tokens from their top-20 log probabilities, beside the time to read them once.

    PYTHONPATH=python python benches/confidence.py [--traces 512] [--tokens 32768] [--top-k 20]

Needs 1.34 GB for the log probabilities (float32) at the default sizes. NumPy alone; the floor is a sum by the same
threads, which reads the same bytes and does next to nothing with them.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tilewise import _core
from tilewise.scheduler.confidence import token_confidence, trace_confidence


def timed(work, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    values = np.empty((options.traces, options.tokens, options.top_k), np.float32)
    pattern = -np.abs(np.random.default_rng(0).normal(2, 1, 2**20 - 3)).astype(np.float32)
    flat = values.reshape(-1)
    for start in range(0, flat.size, pattern.size):
        flat[start : start + pattern.size] = pattern[: flat.size - start]
    threads = _core.num_threads()
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        floor = timed(lambda: list(pool.map(lambda part: part.sum(), parts)), options.rounds)
    ours = timed(lambda: trace_confidence(values, window=options.window), options.rounds)
    logits = np.random.default_rng(0).normal(0, 3, (64, 128_000)).astype(np.float32)
    step = timed(lambda: token_confidence(logits, options.top_k), options.rounds)
    middle = options.rounds // 2
    print(
        json.dumps(
            {
                "gigabytes": round(values.nbytes / 1e9, 3),
                "threads": threads,
                "isa": _core.isa_chosen(),
                "traces_seconds": {"median": ours[middle], "best": ours[0]},
                "reading_seconds": {"median": floor[middle], "best": floor[0]},
                "logits_seconds_per_row_of_128k": {"median": step[middle] / 64, "best": step[0] / 64},
            }
        )
    )


if __name__ == "__main__":
    main()
