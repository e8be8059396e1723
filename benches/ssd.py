"""Plain, speculative and speculative speculative decoding of the default pair, side by side, as an honest report asks.

    python -m benches.ssd [--prompts 12] [--samples 3] [--new-tokens 128] [--temperature 0 0.8] [--json]

One sequence at a time. The target's process has one thread and the draft's process the other core; plain and
speculative decoding are also run with two threads. Chain length, budget and the rest of each method are tuned (or
learnt) on other prompts than those that are timed. "ssd" also looks up what the text so far suggests, on misses and
behind its chains; "ssd without look-ups" is the draft model alone, as "speculative" is. The modes take turns on every
prompt, in an order that reverses from prompt to prompt; speeds include the prompt. Where tokens are sampled, ways that
draw other numbers write other texts, some easier to draft than others: every prompt is then continued several times,
and its speed is that of all of them. Intervals are bootstraps over prompts.

At temperature 0 every mode's tokens must be plain decoding's; sampled, those of the engine must be those of the engine
without drafts (the coupled rule), and the others follow the same law with other numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benches.fifty_prompts import prompts as pieces


def timed(work: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Seconds, and what was made."""
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its bootstrap interval."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return statistics.median(ratios), *map(float, np.quantile(medians, [0.025, 0.975]))


OURS = ("ssd", "ssd without look-ups", "look-up drafts")
"""Modes of the engine: coupled, so that they write the same text."""


class Contest:
    """The modes of one temperature."""

    def __init__(self, pair: Any, temperature: float, new_tokens: int) -> None:
        from tilewise.hf.engine import SpeculativeGenerator

        self.pair, self.temperature, self.count = pair, temperature, new_tokens
        self.generator = SpeculativeGenerator(pair.target, pair.draft, temperature=temperature, threads=1)
        self.pure = SpeculativeGenerator(
            pair.target, pair.draft, temperature=temperature, threads=1, lookup=False, fallback="neural"
        )
        self.alone = SpeculativeGenerator(pair.target, draft_length=0, lookup=False, temperature=temperature, threads=1)
        self.lookup = SpeculativeGenerator(pair.target, temperature=temperature, threads=1)
        self.modes: dict[str, Callable[[list[int], int], list[int]]] = {}

    def decoder(self, threads: int, **rules: Any) -> Callable[[list[int], int], list[int]]:
        """One process with its own loop."""
        from tilewise import _core
        from tilewise.hf.generate import SpeculativeDecoder

        draft = self.pair.draft if rules else None
        decoder = SpeculativeDecoder(self.pair.target, draft, temperature=self.temperature, threads=threads, **rules)

        def run(prompt: list[int], request: int) -> list[int]:
            _core.set_num_threads(threads)
            made = list(decoder.generate(prompt, self.count, request=request))
            _core.set_num_threads(1)
            return made

        return run

    def transformers(self, **options: Any) -> Callable[[list[int], int], list[int]]:
        """Transformers' own ways."""
        import torch

        sampling = (
            {"do_sample": True, "temperature": self.temperature, "top_k": 0}
            if self.temperature
            else {"do_sample": False}
        )

        def run(prompt: list[int], request: int) -> list[int]:
            torch.manual_seed(request)
            ids = torch.tensor([prompt])
            out = self.pair.target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.count, min_new_tokens=self.count,
                pad_token_id=0, **sampling, **options,
            )  # fmt: skip
            return out[0, len(prompt) :].tolist()

        return run

    def tune(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Choose the serial decoder's settings, and let the engine learn, on prompts that are not timed."""
        found = {}
        for threads in (1, 2):
            best: tuple[float, dict[str, Any]] = (float("inf"), {})
            for length in (4, 6, 8, 10, 12, 16):
                for confidence in (0.0, 0.1, 0.3):
                    rules = {"draft_length": length, "confidence": confidence}
                    run = self.decoder(threads, **rules)
                    run(prompts[0], 0)
                    seconds = sum(timed(lambda p=p: run(p, 0))[0] for p in prompts)  # noqa: B023
                    best = min(best, (seconds, rules), key=lambda pair: pair[0])
            found[f"speculative, {threads} thread{'s' * (threads > 1)}"] = best[1]
        for engine in (self.generator, self.pure):
            engine.wait_until_ready()
            for prompt in prompts * 2:
                engine.generate([prompt], self.count)
        self.modes = {
            "plain, 1 thread": self.decoder(1),
            "plain, 2 threads": self.decoder(2),
            "speculative, 1 thread": self.decoder(1, **found["speculative, 1 thread"]),
            "speculative, 2 threads": self.decoder(2, **found["speculative, 2 threads"]),
            "ssd": lambda prompt, request: self.generator.generate([prompt], self.count, request=request)[0].tokens,
            "ssd without look-ups": lambda prompt, request: (
                self.pure.generate([prompt], self.count, request=request)[0].tokens
            ),
            "look-up drafts": lambda prompt, request: (
                self.lookup.generate([prompt], self.count, request=request)[0].tokens
            ),
            "transformers, assisted": self.transformers(assistant_model=self.pair.draft),
            "transformers, prompt lookup": self.transformers(prompt_lookup_num_tokens=8),
        }
        for name, run in list(self.modes.items()):
            try:
                run(prompts[0], 0)
            except Exception as error:  # a peer that cannot run this model is reported, not hidden
                found[name] = f"does not run: {type(error).__name__}: {error}"
                del self.modes[name]
        return found

    def run(self, prompts: list[list[int]], samples: int) -> dict[str, Any]:
        """The timed rounds: every prompt `samples` times, with other random numbers."""
        from tqdm import tqdm

        from tilewise.hf.engine import EngineStats

        self.generator.stats = EngineStats()
        speeds: dict[str, list[float]] = {name: [] for name in self.modes}
        same = dict.fromkeys(self.modes, True)
        for index, prompt in enumerate(tqdm(prompts, unit="prompt", disable=not sys.stderr.isatty())):
            spent = dict.fromkeys(self.modes, 0.0)
            for request in range(index * samples, (index + 1) * samples):
                made = {}
                for name in list(self.modes) if request % 2 else list(reversed(self.modes)):
                    seconds, made[name] = timed(
                        lambda name=name, request=request: self.modes[name](prompt, request)  # noqa: B023
                    )
                    spent[name] += seconds
                want = made["plain, 1 thread"]
                if self.temperature:
                    want = self.alone.generate([prompt], self.count, request=request)[0].tokens
                for name in made:
                    same[name] &= made[name] == want
            for name, seconds in spent.items():
                speeds[name].append(samples * self.count / seconds)
        stats = self.generator.stats
        stats.machine = self.generator._machine.stats()
        base, serial = (
            speeds["plain, 1 thread"],
            max((speeds[name] for name in speeds if name.startswith("speculative")), key=statistics.median),
        )
        rows = {}
        for name, values in speeds.items():
            rows[name] = {
                "tokens_per_second": statistics.median(values),
                "over_plain": interval([a / b for a, b in zip(values, base, strict=True)]),
                "over_speculative": interval([a / b for a, b in zip(values, serial, strict=True)]),
                "identical": same[name] if not self.temperature or name in OURS else None,
            }
        return {"rows": rows, "engine": stats.stats()}

    def close(self) -> None:
        """End the processes."""
        for each in (self.generator, self.pure, self.alone, self.lookup):
            each.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, for each temperature."""
    import torch
    import transformers

    from tilewise import _core
    from tilewise.hf.engine import measure as measure_pair
    from tilewise.hf.models import load_pair
    from tilewise.scheduler import plan

    transformers.utils.logging.set_verbosity_error()
    _core.set_num_threads(1)
    pair = load_pair()
    texts = [list(piece) for piece in pieces(options.prompts + 8)]
    tuning, testing = texts[:8], texts[8:]
    report: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for temperature in options.temperature:
        measured = measure_pair(pair.target, pair.draft, tuning[:4], temperature=temperature, threads=1)
        advice = plan(measured)
        contest = Contest(pair, temperature, options.new_tokens)
        try:
            tuned = contest.tune(tuning)
            found = contest.run(testing, options.samples if temperature else 1)
        finally:
            contest.close()
        rows = found["rows"]
        measured_ratio = rows["ssd"]["over_plain"][0]
        found |= {
            "tuned": tuned,
            "plan": {name: getattr(advice, name) for name in ("mode", "draft_length", "budget", "over_plain",
                     "over_plain_interval", "over_speculative", "over_speculative_interval", "reason")},
            "prediction_error": advice.over_plain / measured_ratio - 1.0,
        }  # fmt: skip
        report[f"temperature {temperature}"] = found
    return report


def show(report: dict[str, Any]) -> None:
    """Tables."""
    for title, found in report.items():
        if not isinstance(found, dict):
            continue
        print(
            f"\n{title}\n\n| mode | tokens/s | over plain, 1 thread | over the better speculative | tokens as plain |"
        )
        print("|---|---|---|---|---|")
        for name, row in found["rows"].items():
            cells = [
                f"{row[key][0]:.2f} [{row[key][1]:.2f}, {row[key][2]:.2f}]"
                for key in ("over_plain", "over_speculative")
            ]
            same = {True: "yes", False: "NO", None: "other numbers"}[row["identical"]]
            print(f"| {name} | {row['tokens_per_second']:.0f} | {' | '.join(cells)} | {same} |")
        engine, advice = found["engine"], found["plan"]
        rounds = max(1, engine["rounds"])
        machine = engine["scheduler"]
        print(
            f"\nengine: {engine['tokens_per_round']:.2f} tokens a round (the target's own included), hits "
            f"{100 * engine['hit_rate']:.0f} %, verification {1e3 * engine['target_seconds'] / rounds:.2f} ms, waiting "
            f"{1e3 * engine['wait_seconds'] / rounds:.2f} ms, deciding "
            f"{1e3 * engine['decide_seconds'] / rounds:.2f} ms; accepted lengths {engine['accepted_lengths']}; "
            f"discarded {machine['discarded']} of {machine['drafted']} "
            f"drafted tokens; present choice {machine['plan']}"
        )
        print(f"tuned on other prompts: {found['tuned']}")
        print(
            f"plan: {advice['mode']}, chains of {advice['draft_length']}, {advice['budget']} guesses: "
            f"{advice['over_plain']:.2f}x plain {tuple(round(x, 2) for x in advice['over_plain_interval'])}, "
            f"{advice['over_speculative']:.2f}x speculative; {advice['reason']}; error of the prediction over plain "
            f"{100 * found['prediction_error']:+.0f} %"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--samples", type=int, default=3, help="continuations of a prompt, where tokens are sampled")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options)
    if options.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
