"""Measuring a pair on this machine, in the form that ``tilewise plan`` reads.

Times are taken where they are spent: verifications while the draft builds beside them, builds while the target
verifies. Acceptance and ranks come from the same runs. Chains and budgets are fixed and varied, so that every size
occurs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tilewise.hf.engine.generator import SpeculativeGenerator
from tilewise.hf.engine.stats import EngineStats
from tilewise.hf.generate import computing, step_threads
from tilewise.hf.runners import runners

__all__ = ["measure"]

_MODES = ((2, 4), (4, 8), (6, 12), (9, 6), (12, 16), (5, 3), (7, 8))
"""Chain lengths and budgets that are run."""


def measure(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    watch: Callable[[float], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What :func:`tilewise.scheduler.plan` wants to know of a target and a draft.

    Args:
        target, draft: as for :class:`SpeculativeGenerator`.
        prompts: token ids; one sequence at a time is generated from each, in every mode.
        max_new_tokens: of each.
        watch: called with the share that is done.
        settings: of :class:`SpeculativeGenerator` (``temperature``, ``rule``, ``threads``, ...).

    Returns:
        A dict for :func:`tilewise.scheduler.plan`, or to be written as JSON for ``tilewise plan``.

    Raises:
        As :class:`SpeculativeGenerator`.

    Example:
        >>> from tilewise.hf.testing import random_draft
        >>> found = measure(random_draft(seed=1), random_draft(seed=2), [[1, 2, 3]], max_new_tokens=8)
        >>> sorted(found)[:3]
        ['accepted', 'batch', 'draft_step_seconds']
    """
    verify, steps, glue = defaultdict(list), defaultdict(list), []
    accepted, tried, asked, reached = ([0] * 64 for _ in range(4))
    curve = np.zeros(16)
    ranked = 0.0
    links: list[float] = []
    for number, (length, budget) in enumerate(_MODES):
        fixed = {"draft_length": length, "budget": budget, "adaptive": False, "fallback": "neural", "lookup": False}
        with SpeculativeGenerator(target, draft, **(settings | fixed)) as generator:
            generator.wait_until_ready()
            generator.generate([prompts[0]], min(16, max_new_tokens))
            generator.stats = EngineStats()
            for prompt in prompts:
                generator.generate([prompt], max_new_tokens)
            stats = generator.stats
        for record in stats.records:
            verify[record.length + 1].append(record.seconds)
            for place in range(record.length + record.ended):  # where a draft ended a chain nothing can be accepted
                tried[place] += record.accepted >= place
                accepted[place] += record.accepted > place
                asked[place] += 1
                reached[place] += place < record.length
        for built in stats.builds:
            if built.steps:
                steps[built.branches].append(built.seconds / (built.steps + 1))
                glue.append(built.seconds / (built.steps + 1))
        for drafted in stats.drafts:
            if drafted.made:
                steps[1].append(drafted.seconds / drafted.made)
                links.append(max(0.0, drafted.waited - drafted.seconds))
        learnt = stats.machine["learnt"]["model"]
        whole = sum(record.accepted == record.length for record in stats.records) / max(1, len(stats.records))
        mixed = whole * np.array(learnt["rank_curve_whole"]) + (1 - whole) * np.array(learnt["rank_curve_refused"])
        curve += len(stats.records) * mixed[1:17]
        ranked += len(stats.records)
        if watch is not None:
            watch((number + 1) / (len(_MODES) + 1))
    alone = _alone(target, prompts[0], settings.get("threads"))
    if watch is not None:
        watch(1.0)
    places = max((index + 1 for index, count in enumerate(tried) if count >= 8), default=1)
    few = {size: values for size, values in verify.items() if len(values) >= 5}
    return {
        "batch": 1,
        "target_seconds": {str(size): _thin(values) for size, values in sorted(few.items() or verify.items())},
        "target_seconds_alone": alone,
        "draft_step_seconds": {str(size): _thin(values) for size, values in sorted(steps.items())},
        "glue_seconds": _thin(glue),
        "link_seconds": _thin(links) if links else [0.0],
        "accepted": accepted[:places],
        "tried": tried[:places],
        "reached": [float(share) for share in np.cumprod(np.array(reached[:places]) / np.maximum(asked[:places], 1))],
        "rank_curve": [float(value) for value in np.maximum.accumulate(np.clip(curve / max(1.0, ranked), 0.0, 1.0))],
    }


def _thin(values: Sequence[float]) -> list[float]:
    """At most fifty of the samples, evenly chosen in their order."""
    step = max(1, len(values) // 50)
    return [float(value) for value in values[::step]]


def _alone(target: PreTrainedModel, prompt: Sequence[int], threads: int | None) -> dict[str, list[float]]:
    """Seconds of a step of so many tokens with nothing beside it."""
    found = {}
    with computing(step_threads(target, threads)):
        runner = runners(target, rollback=True)()
        runner.feed(list(prompt), last=1)
        length = runner.length
        for size in (1, 2, 4, 6, 8, 12, 16):
            samples = []
            for _ in range(15):
                began = time.perf_counter()
                runner.feed(([*prompt] * size)[:size])
                samples.append(time.perf_counter() - began)
                runner.truncate(length)
            found[str(size)] = samples[3:]
    return found
