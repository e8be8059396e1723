"""What a round of speculation costs beside the models: verification, outcome prediction, cache and fan-out.

    python -m benches.speculation_overhead [--rounds 11] [--threads 2] [--json]

Vocabulary 131072, 7 drafted tokens, a budget of 24 guesses, 8 rows. "kept": all drafted tokens are accepted, which is
the most work there is; "mixed": drafts that are as good as drafts are. The straightforward torch implementation
(softmax over all logits in float32, gather, compare, residual at the refused place, multinomial) runs in turns with
ours, in one process, with the same threads. Every answer is compared with the reference before it is timed.

The floor is what the memory takes: 33.6 MB of logits must be read once. The arithmetic of exact laws is 36 operations
of 64 bits a logit (the exponential is not fused, so that its bits do not depend on the machine): 8.4 million logits are
0.3 G operations, 38 M instructions of eight lanes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH, DEPTH, VOCABULARY, BUDGET, TEMPERATURE = 8, 7, 131072, 24, 0.8
WHERE = {"seed": 1, "requests": np.arange(BATCH), "positions": 100}


def chains(kept: bool) -> dict[str, Any]:
    """Logits of the target, drafted tokens, and their laws, dense and sparse."""
    from tilewise import speculation

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((BATCH, DEPTH + 1, VOCABULARY), np.float32) * 3
    noise = rng.standard_normal((BATCH, DEPTH, VOCABULARY), np.float32) * np.float32(0.3)
    likely = rng.integers(0, VOCABULARY, (BATCH, DEPTH))
    for b, i in np.ndindex(BATCH, DEPTH):
        logits[b, i, likely[b, i]] = 45.0 if kept else 17.0
    tokens, dense, ids, weights = [], [], [], []
    for i in range(DEPTH):
        draft = logits[:, i] + noise[:, i]
        keywords: dict[str, Any] = {**WHERE, "positions": 100 + i, "temperature": TEMPERATURE, "laws_dtype": "float32"}
        drafted = speculation.draft_token(draft, support=64, **keywords)
        tokens.append(drafted.tokens)
        ids.append(drafted.laws.ids)
        weights.append(drafted.laws.probabilities)
        law = np.zeros((BATCH, VOCABULARY), np.float32)
        for b in range(BATCH):
            used = drafted.laws.ids[b] >= 0
            law[b, drafted.laws.ids[b][used]] = drafted.laws.probabilities[b][used]
        dense.append(law)
    return {
        "logits": logits,
        "tokens": np.stack(tokens, 1),
        "dense": np.stack(dense, 1),
        "sparse": speculation.SparseLaws(np.stack(ids, 1), np.stack(weights, 1)),
    }


def torch_verify(tokens: Any, laws: Any, logits: Any) -> tuple[Any, Any]:
    """The straightforward implementation."""
    import torch

    p = torch.softmax(logits / TEMPERATURE, -1)
    chosen = p[:, :-1].gather(-1, tokens[..., None])[..., 0]
    proposed = laws.gather(-1, tokens[..., None])[..., 0]
    accepted = (torch.rand(tokens.shape) < chosen / proposed).long().cumprod(1).sum(1)
    every = torch.arange(len(tokens))
    row = p[every, accepted]
    refused = accepted < tokens.shape[1]
    excess = (row - laws[every, accepted.clamp(max=tokens.shape[1] - 1)]).clamp(min=0)
    row = torch.where(refused[:, None], excess, row)
    return accepted, torch.multinomial(row / row.sum(-1, keepdim=True), 1)[:, 0]


def torch_greedy(tokens: Any, logits: Any) -> tuple[Any, Any]:
    """The same at temperature 0."""
    import torch

    best = logits.argmax(-1)
    accepted = (best[:, :-1] == tokens).long().cumprod(1).sum(1)
    return accepted, best[torch.arange(len(tokens)), accepted]


def check(case: dict[str, Any], result: Any) -> None:
    """The first and the last row, by the reference."""
    from tilewise.reference import speculation as reference

    for row in (0, BATCH - 1):
        expected = reference.verify(
            case["tokens"][row], case["dense"][row], case["logits"][row],
            temperature=TEMPERATURE, seed=1, request=row, position=100,
        )  # fmt: skip
        assert (result.accepted[row], result.tokens[row]) == expected, (row, result, expected)


def lines() -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed, by line and implementation."""
    import torch

    from tilewise import speculation
    from tilewise.speculation import Outcome, OutcomeCache, RankCurve, fan_out_limits, water_filling

    groups: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, case in {"kept": chains(True), "mixed": chains(False)}.items():
        logits, tokens, dense, sparse = case["logits"], case["tokens"], case["dense"], case["sparse"]
        verify = lambda t=tokens, q=sparse, z=logits: speculation.verify(t, q, z, temperature=TEMPERATURE, **WHERE)  # noqa: E731
        full = lambda t=tokens, q=dense, z=logits: speculation.verify(t, q, z, temperature=TEMPERATURE, **WHERE)  # noqa: E731
        result = verify()
        check(case, result)
        same = full()
        assert np.array_equal(same.tokens, result.tokens) and np.array_equal(same.accepted, result.accepted)
        assert (result.accepted == DEPTH).all() if name == "kept" else len(set(result.accepted)) > 2, result.accepted
        tensors = tuple(torch.from_numpy(array) for array in (tokens, dense, logits))
        groups[f"verify from f32 logits, {name}"] = {
            "sparse laws": verify,
            "dense laws": full,
            "torch": lambda t=tensors: torch_verify(*t),
        }
        q = np.take_along_axis(dense, tokens[..., None], -1)[..., 0].astype(np.float64)
        p = speculation.token_probabilities(tokens, logits, temperature=TEMPERATURE)
        every, accepted = np.arange(BATCH), result.accepted
        place = np.minimum(accepted, DEPTH - 1)
        refused = np.where(accepted < DEPTH, tokens[every, place], -1)
        row = speculation.process(logits[every, accepted], TEMPERATURE).astype(np.float32)
        lists = speculation.SparseLaws(sparse.ids[every, place], sparse.probabilities[every, place])

        def scalars(p: Any = p, q: Any = q, refused: Any = refused, laws: Any = lists, row: Any = row) -> Any:
            kept = speculation.accept(q, p, **WHERE)
            return kept, speculation.correct(kept, refused, laws, probabilities=row, **WHERE)

        kept, following = scalars()
        assert np.array_equal(kept, accepted) and np.array_equal(following, result.tokens)
        groups[f"accept + correct from probabilities, {name}"] = {"sparse laws": scalars}
    case = chains(True)
    logits, tokens = case["logits"], case["tokens"]
    rule = {"temperature": 0.0, **WHERE}
    pair = torch.from_numpy(tokens), torch.from_numpy(logits)
    greedy, other = speculation.verify(tokens, None, logits, **rule), torch_greedy(*pair)
    assert np.array_equal(greedy.accepted, other[0]) and np.array_equal(greedy.tokens, other[1])
    groups["verify, greedy"] = {
        "points": lambda: speculation.verify(tokens, None, logits, **rule),
        "torch": lambda: torch_greedy(*pair),
    }
    rows = logits.reshape(-1, VOCABULARY)
    count = np.full(len(rows), 4)
    guesses = speculation.predict_outcomes(rows, count)
    assert np.array_equal(guesses, torch.topk(torch.from_numpy(rows), 4).indices)
    groups["outcome prediction, 64 rows, 4 each"] = {
        "ours": lambda: speculation.predict_outcomes(rows, count),
        "torch": lambda: torch.topk(torch.from_numpy(rows), 4),
    }
    groups["draft_token, support 64, 8 rows"] = {
        "ours": lambda: speculation.draft_token(logits[:, 0], temperature=TEMPERATURE, support=64, **WHERE),
        "torch": lambda: torch.multinomial(torch.softmax(pair[1][:, 0] / TEMPERATURE, -1), 1),
    }
    cache: Any = OutcomeCache()
    for stream in range(BATCH):
        for guess in range(BUDGET):
            cache.insert(Outcome(stream, 5, guess % (DEPTH + 1), guess), guess + 1)
    hit, miss = Outcome(3, 5, 2, 2), Outcome(3, 5, 2, 999)
    assert cache.get(hit) is not None and cache.get(miss) is None
    groups["cache look-up"] = {"hit": lambda: cache.get(hit), "miss": lambda: cache.get(miss)}
    curves = [RankCurve(1.0) for _ in range(DEPTH + 1)]
    weights, most = [0.1] * (DEPTH + 1), fan_out_limits(VOCABULARY, DEPTH)
    groups["fan-out of 24"] = {"ours": lambda: water_filling(weights, curves, BUDGET, most)}
    return groups


def main() -> None:
    """Runs everything and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    import torch

    from tilewise import _core
    from tilewise.bench.harness import interleave, machine, memory_reader, speedup

    torch.set_num_threads(options.threads)
    _core.set_num_threads(options.threads)
    read, size = memory_reader(options.threads)
    records = []
    for line, functions in lines().items():
        timings = interleave({**functions, "memory read": read}, rounds=options.rounds)
        rate = size / timings["memory read"].median
        for name in functions:
            record = {"line": line, "implementation": name, "milliseconds": timings[name].median * 1e3}
            record["spread"] = timings[name].spread
            record["speedup_over_torch"] = speedup(timings[name], timings["torch"]) if "torch" in timings else None
            record["read_bandwidth"] = rate / 1e9
            records.append(record)
    if options.json:
        print(json.dumps({"machine": machine(), "results": records}, indent=1))
        return
    print(machine())
    print("| line | implementation | ms | spread | x torch | read GB/s |\n|---|---|---|---|---|---|")
    for record in records:
        ratio = "" if record["speedup_over_torch"] is None else f"{record['speedup_over_torch']:.2f}"
        print(
            f"| {record['line']} | {record['implementation']} | {record['milliseconds']:.4f} | {record['spread']:.0%} "
            f"| {ratio} | {record['read_bandwidth']:.0f} |"
        )


if __name__ == "__main__":
    main()
