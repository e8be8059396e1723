"""What the first call of flex_attention costs in a fresh process, and block masks: ``python -m benches.first_call``.

The imports are done before; tracing, the program and the first pass are in the time. ``--json`` for machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from .attention import rules

RULES = ("causal", "window", "documents", "alibi", "softcap")


def one(rule: str, length: int) -> dict[str, Any]:
    """Milliseconds in this process."""
    import torch

    import tilewise.torch as twt

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 4096, 64) for _ in range(3))
    twt.attention(query[:, :, :1], key[:, :, :1], value[:, :, :1])  # the pool of threads
    mask, score = rules(rule, 8, length)
    start = time.perf_counter()
    blocks = twt.create_block_mask(mask, None, None, length, length, device="cpu") if mask else None
    masked = time.perf_counter()
    if length == 4096:
        twt.flex_attention(query, key, value, score_mod=score, block_mask=blocks)
    first = time.perf_counter()
    if length == 4096:
        twt.flex_attention(query, key, value, score_mod=score, block_mask=blocks)
    again = time.perf_counter()
    return {
        "rule": rule,
        "length": length,
        "mask_ms": (masked - start) * 1e3,
        "first_ms": (first - masked) * 1e3,
        "again_ms": (again - first) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("RULE", "LENGTH"), help="measure this in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]))))
        return
    rows = []
    for rule, length in [*((rule, 4096) for rule in RULES), ("documents", 131072)]:
        command = [sys.executable, "-m", "benches.first_call", "--one", rule, str(length)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(found.stdout.splitlines()[-1]))
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        mask = f"{row['rule']:10} {row['length']:7}: block mask {row['mask_ms']:.1f} ms"
        print(f"{mask}, first call {row['first_ms']:.1f} ms, second {row['again_ms']:.1f} ms")


if __name__ == "__main__":
    main()
