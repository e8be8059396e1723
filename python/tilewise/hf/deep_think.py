"""Many reasoning traces of one prompt in a transformers model: :func:`deep_think`.

::

    prompt     computed once
    cohort     traces that began together: one cache, one forward pass a step, no padding
    step       sample a token of each row, read its confidence, let the vote judge it; feed the rows that go on
    refill     once a quarter of the places is free: a new cohort from the prompt's cache

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tilewise import speculation
from tilewise.errors import ArgumentError
from tilewise.hf import _logits
from tilewise.hf.models import _stop_tokens
from tilewise.scheduler.confidence import ConfidenceMonitor
from tilewise.scheduler.stopping import OnlineVote
from tilewise.scheduler.voting import Key, Vote, extract_answer, filtered, majority, weighted

__all__ = ["DeepThought", "Trace", "deep_think"]


@dataclass(frozen=True)
class Trace:
    """One trace of :func:`deep_think`.

    Attributes:
        number: its place in the vote; its random numbers belong to it.
        tokens: what it wrote, its stop token included.
        confidence: float64 ``[tokens]``.
        answer: None for a trace that was stopped, cancelled or says none.
        lowest: its lowest group confidence.
        end: ``"stop token"``, ``"length"``, ``"stopped"`` (weak) or ``"cancelled"`` (the vote was decided).
    """

    number: int
    tokens: list[int]
    confidence: NDArray[np.float64]
    answer: Any
    lowest: float
    end: str


@dataclass(frozen=True)
class DeepThought:
    """What :func:`deep_think` found.

    Attributes:
        answer: of the vote that the mode decides by; None if no trace has one.
        votes: by name: ``"majority"``, ``"weighted"`` and ``"filtered"`` offline, ``"online"`` online.
        traces: by number.
        threshold: online, the confidence below which traces were stopped.
        tokens: written by all traces.
        steps: forward passes after the prompt's.
    """

    answer: Any
    votes: dict[str, Vote]
    traces: list[Trace]
    threshold: float | None
    tokens: int
    steps: int


class _Row:
    """A trace that runs."""

    def __init__(self, number: int, slot: int) -> None:
        self.number, self.slot = number, slot
        self.tokens: list[int] = []
        self.confidence: list[float] = []


class _Cohort:
    """Rows that began together: one cache, no padding."""

    def __init__(self, cache: Any, rows: list[_Row], logits: Tensor) -> None:
        self.cache, self.rows, self.logits = cache, rows, logits

    def keep(self, which: list[int]) -> None:
        """Drop the rows that ended; the logits are those of the last step until the next one."""
        if len(which) < len(self.rows):
            self.rows = [self.rows[index] for index in which]
            if which:
                self.cache.batch_select_indices(torch.tensor(which, device=self.logits.device))


def deep_think(
    model: PreTrainedModel,
    prompt: Tensor | Sequence[int],
    *,
    decode: Callable[[list[int]], str] | None = None,
    answer: Callable[[list[int]], Any] | None = None,
    mode: Literal["offline", "online"] = "online",
    budget: int = 64,
    warmup: int = 16,
    keep: float = 0.9,
    consensus: float | None = 0.95,
    window: int = 2048,
    confidence_top_k: int = 20,
    max_new_tokens: int = 1024,
    stop_tokens: Sequence[int] | frozenset[int] | None = None,
    batch: int = 8,
    temperature: float = 0.6,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    key: Key | None = None,
    progress: Callable[[], None] | None = None,
) -> DeepThought:
    """Many traces of one prompt in a model, and the answer they agree on.

    The prompt is computed once. Traces run `batch` at a time; freed places are given to new traces as soon as a quarter
    is free. Rows that began together share a cache and a forward pass, so no padding is ever attended, and any model
    with a growing cache runs. A trace's random numbers are those of (seed, its number, position): it does not depend on
    the batch but for the rounding of the model's products.

    Args:
        model: a causal language model in evaluation mode.
        prompt: token ids, ``[n]`` or ``[1, n]``.
        decode: tokens to text, whose last ``\\boxed{...}`` is the answer. Give this, or `answer`.
        answer: tokens of a trace to its answer, None for none.
        mode: ``"offline"`` runs the whole budget and votes; ``"online"`` stops weak traces after a warm-up, and all
            once the vote is decided (:class:`~tilewise.scheduler.stopping.OnlineVote`).
        budget: traces at most.
        warmup, consensus: online only.
        keep: the share eta: of the filtered vote offline, of the threshold online.
        window: tokens of a confidence group.
        confidence_top_k: k of the token confidence; the whole vocabulary if that is smaller.
        max_new_tokens: of a trace.
        stop_tokens: end a trace; None: the model's end-of-sequence tokens.
        batch: traces at once.
        temperature, top_k, top_p: of the sampling.
        seed: of the random numbers.
        key: what makes two answers the same; equality if None.
        progress: called after every trace.

    Returns:
        :class:`DeepThought`. Offline its answer is that of the filtered vote.

    Raises:
        ArgumentError: neither or both of `decode` and `answer`, an unknown mode, an empty prompt, a model in training
            mode, or a setting outside its range.
        ShapeError: several prompts.

    Source: Fu et al. 2025, arXiv 2508.15260, algorithms 1 and 2.
    """
    if (decode is None) == (answer is None):
        raise ArgumentError("give one of decode (tokens to text, for \\boxed answers) and answer (tokens to an answer)")
    if mode not in ("offline", "online"):
        raise ArgumentError(f"mode: expected 'offline' or 'online', got {mode!r}")
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("budget", budget)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    if model.training:
        raise ArgumentError("the model is in training mode; call model.eval()")
    if decode is not None:
        reader = decode
        answer = lambda tokens: extract_answer(reader(tokens))  # noqa: E731
    assert answer is not None
    if mode == "online":
        machine = OnlineVote(warmup=warmup, budget=budget, keep=keep, consensus=consensus, key=key)
    else:
        # Warm-up traces are never stopped, and all are warm-up.
        machine = OnlineVote(warmup=budget, budget=budget, keep=keep, consensus=None, key=key)
    stops = _stop_tokens(model) if stop_tokens is None else frozenset(map(int, stop_tokens))
    think = _Thinker(
        model, _logits.one_prompt(prompt, model.device), machine, answer, ConfidenceMonitor(batch, window),
        confidence_top_k, max_new_tokens, stops,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p}, seed, progress,
    )  # fmt: skip
    with torch.inference_mode():
        think.run()
    traces = [think.ended[number] for number in sorted(think.ended)]
    votes: dict[str, Vote] = {}
    if mode == "online":
        votes["online"] = machine.result()
        found = votes["online"].answer
    else:
        answers, lowest = [trace.answer for trace in traces], [trace.lowest for trace in traces]
        votes["majority"] = majority(answers, key=key)
        votes["weighted"] = weighted(answers, lowest, key=key)
        votes["filtered"] = filtered(answers, lowest, keep=keep, key=key)
        found = votes["filtered"].answer
    threshold = machine.threshold if mode == "online" else None
    return DeepThought(found, votes, traces, threshold, sum(len(trace.tokens) for trace in traces), think.steps)


class _Thinker:
    """The driver of :class:`OnlineVote`: it owns the caches, and decides nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Tensor,
        machine: OnlineVote,
        answer: Callable[[list[int]], Any],
        monitor: ConfidenceMonitor,
        top_k: int,
        most: int,
        stops: frozenset[int],
        rules: dict[str, Any],
        seed: int,
        progress: Callable[[], None] | None,
    ) -> None:
        self.model, self.prompt, self.machine, self.answer, self.monitor = model, prompt, machine, answer, monitor
        self.top_k, self.most, self.stops, self.rules, self.seed = top_k, most, stops, rules, seed
        self.progress = progress
        self.free = list(range(monitor.rows))
        self.cohorts: list[_Cohort] = []
        self.ended: dict[int, Trace] = {}
        self.steps = 0

    def run(self) -> None:
        cache = DynamicCache(config=self.model.config)
        output = self.model(input_ids=self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first = output.logits[:, -1]
        while not self.machine.done:
            self._begin(cache, first)
            for cohort in list(self.cohorts):
                self._step(cohort)
                if self.machine.done:
                    break
            self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]

    def _begin(self, cache: Any, first: Tensor) -> None:
        """Give free places to new traces, once a quarter of the places is free or nothing runs."""
        if self.cohorts and 4 * len(self.free) < self.monitor.rows:
            return
        rows: list[_Row] = []
        while self.free and (number := self.machine.start()) is not None:
            rows.append(_Row(number, self.free.pop(0)))
        if not rows:
            return
        self.monitor.reset([row.slot for row in rows])
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(rows))
        self.cohorts.append(_Cohort(own, rows, first.expand(len(rows), -1)))

    def _step(self, cohort: _Cohort) -> None:
        """One token for each row: sample, judge, and feed those that go on."""
        rows = cohort.rows
        length = self.prompt.shape[1] + len(rows[0].tokens)
        drawn = speculation.sample_target(
            _logits.rows(cohort.logits), **self.rules, seed=self.seed,
            requests=np.array([row.number for row in rows]), positions=length,
        )  # fmt: skip
        confidence = _logits.confidence(cohort.logits, self.top_k)
        readings = self.monitor.update(confidence, rows=[row.slot for row in rows])
        for index, row in enumerate(rows):
            row.tokens.append(int(drawn[index]))
            row.confidence.append(float(confidence[index]))
        going: list[int] = []
        for index, row in enumerate(rows):
            lowest = float(readings.lowest[index])
            full = len(row.tokens) >= self.monitor.window
            if full and self.machine.judge(row.number, float(readings.group[index])):
                self._end(row, "stopped", lowest)
            elif row.tokens[-1] in self.stops:
                self._end(row, "stop token", lowest)
            elif len(row.tokens) == self.most:
                self._end(row, "length", lowest)
            else:
                going.append(index)
            if self.machine.done:
                return
        cohort.keep(going)
        if not cohort.rows:
            return
        fed = torch.tensor([[row.tokens[-1]] for row in cohort.rows], device=self.prompt.device)
        output = self.model(input_ids=fed, past_key_values=cohort.cache, use_cache=True, logits_to_keep=1)
        cohort.logits = output.logits[:, -1]
        self.steps += 1

    def _end(self, row: _Row, end: str, lowest: float) -> None:
        said = None if end == "stopped" else self.answer(row.tokens)
        self._record(row, end, lowest, said)
        if end == "stopped":
            cancelled = self.machine.stop(row.number, lowest=lowest, tokens=len(row.tokens))
        else:
            cancelled = self.machine.finish(row.number, said, lowest=lowest, tokens=len(row.tokens))
        for cohort in self.cohorts:
            for other in cohort.rows:
                if other.number in cancelled:
                    self._record(other, "cancelled", float(self.monitor.read([other.slot]).lowest[0]), None)

    def _record(self, row: _Row, end: str, lowest: float, said: Any) -> None:
        self.ended[row.number] = Trace(row.number, row.tokens, np.array(row.confidence), said, lowest, end)
        self.free.append(row.slot)
        if self.progress is not None:
            self.progress()
