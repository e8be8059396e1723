"""Greedy generation on fifty prompts, plain and speculative in turns: are the tokens identical, and how much faster?

    python -m benches.fifty_prompts [--prompts 50] [--new-tokens 128] [--draft-length 8] [--json]

Prompts are pieces of the standard library of the running Python, one a file, chosen by the hash of the file's path: the
same on every machine with that Python. The two runs of a prompt are interleaved and have the same threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

BYTES = 96


def prompts(count: int) -> list[bytes]:
    """`count` pieces of source, each from the start of a line about a third into its file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if {"site-packages", "test", "tests"}.isdisjoint(path.parts)]
    files.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
    pieces = []
    for path in files:
        text = path.read_bytes()
        start = text.find(b"\n", len(text) // 3) + 1
        if len(text) - start > 4 * BYTES:
            pieces.append(text[start : start + BYTES])
        if len(pieces) == count:
            break
    return pieces


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all prompts; medians over prompts."""
    # asv imports every module here, in an environment with NumPy alone.
    from tqdm import tqdm

    from tilewise.hf.compare import compare
    from tilewise.hf.models import load_pair

    pair = load_pair()
    rows = []
    for piece in tqdm(prompts(options.prompts), unit="prompt", disable=options.json):
        found = compare(
            pair,
            list(piece),
            options.new_tokens,
            draft_length=options.draft_length,
            confidence=options.confidence,
            threads=options.threads,
        )
        plain, fast = (found.median(mode).stats for mode in ("plain", "speculative"))
        rows.append((not found.different, plain.tokens_per_second, fast.tokens_per_second, fast.tokens_per_round))
    return {
        "prompts": len(rows),
        "new_tokens": options.new_tokens,
        "identical": sum(bool(row[0]) for row in rows),
        "plain_tokens_per_second": statistics.median(row[1] for row in rows),
        "speculative_tokens_per_second": statistics.median(row[2] for row in rows),
        "speedup_median": statistics.median(row[2] / row[1] for row in rows),
        "speedup_least": min(row[2] / row[1] for row in rows),
        "tokens_per_target_step": statistics.median(row[3] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--confidence", type=float, default=0.4, help="stop drafting below this chain probability")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in both runs")
    parser.add_argument("--json", action="store_true", help="print numbers for machines, no progress bar")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")
    sys.exit(found["identical"] != found["prompts"])


if __name__ == "__main__":
    main()
