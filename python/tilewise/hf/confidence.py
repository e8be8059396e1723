"""Confidence of reasoning traces inside transformers: stop weak ones, and think with many.

* :class:`ConfidenceRecorder` and :class:`ConfidenceStop`: for ``model.generate``, the first as a logits processor that
  reads the model's logits, the second as a stopping criterion, row by row;
* :func:`deep_think`: many traces of one prompt, offline or online, and their vote (:mod:`tilewise.hf.deep_think`).

::

    recorder = ConfidenceRecorder(window=2048)
    stop = ConfidenceStop(recorder, threshold=12.5)
    model.generate(**inputs, do_sample=True, logits_processor=[recorder], stopping_criteria=[stop])

Why two: generate hands its stopping criteria scores only if it was told to keep all of them, and then they have been
cut by temperature, top-k and top-p. Logits processors of the user run before those cuts (and after transformers' own
penalties, if a generation config asks for some).

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from tilewise.errors import ArgumentError, ShapeError
from tilewise.hf import _logits
from tilewise.hf.deep_think import DeepThought, Trace, deep_think
from tilewise.scheduler.confidence import ConfidenceMonitor, Readings, trace_confidence
from tilewise.scheduler.voting import Key, Vote, threshold, weighted

__all__ = ["ConfidenceRecorder", "ConfidenceStop", "DeepThought", "Trace", "deep_think"]


class ConfidenceRecorder(LogitsProcessor):
    """Reads the confidence of every step of ``generate`` and leaves the logits alone.

    A new batch size, or an input that does not continue the last one by one token, begins anew; :meth:`reset` says it.

    Args:
        window: tokens of a group.
        top_k: k of the token confidence; the whole vocabulary if that is smaller.

    Attributes:
        steps: token confidences, float64 ``[rows]`` for each step so far. Rows that have ended go on being recorded,
            as generate goes on feeding them padding.

    Example:
        >>> import torch
        >>> recorder = ConfidenceRecorder(window=2, top_k=4)
        >>> scores = recorder(torch.tensor([[7]]), torch.zeros(1, 4))
        >>> recorder.steps[0].round(3)
        array([1.386])
    """

    # What generate asks of a processor that keeps state between steps.
    supports_continuous_batching = False

    def __init__(self, window: int = 2048, top_k: int = 20) -> None:
        self.window, self.top_k = window, top_k
        self.monitor = ConfidenceMonitor(0, window)
        self.steps: list[NDArray[np.float64]] = []
        self.readings: Readings | None = None
        self._length = -1

    def reset(self) -> None:
        """Forget the last generation."""
        self.monitor = ConfidenceMonitor(0, self.window)
        self.steps, self.readings, self._length = [], None, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Record one step: ``input_ids [rows, length]``, ``scores [rows, V]``; returns the scores as they are."""
        rows, length = input_ids.shape
        if rows != self.monitor.rows or length != self._length + 1:
            self.reset()
            self.monitor = ConfidenceMonitor(rows, self.window)
        self._length = length
        confidence = _logits.confidence(scores, self.top_k)
        self.steps.append(confidence)
        self.readings = self.monitor.update(confidence)
        return scores


class ConfidenceStop(StoppingCriteria):
    """Ends the rows of ``generate`` whose window mean falls below a threshold; every row once the vote is decided.

    Either with a threshold, or with a warm-up generation first::

        recorder = ConfidenceRecorder(window=256)
        stop = ConfidenceStop(recorder)
        for _ in range(2):                                # warm-up: nothing is stopped
            out = model.generate(..., num_return_sequences=8, logits_processor=[recorder], stopping_criteria=[stop])
            stop.add([answer of each row], [tokens of each row])
        stop.calibrate(keep=0.1)                          # from here on weak rows end
        while not stop.decided:
            model.generate(...); stop.add(...)

    Stopped rows are padded to the end of the longest, so give ``pad_token_id`` if the model has none.

    Args:
        recorder: the logits processor of the same generation.
        threshold: s; None: nothing is stopped until :meth:`calibrate`.
        consensus: tau: :attr:`decided` once the best answer has this share of all weight; None: never.
        key: what makes two answers the same; equality if None.

    Raises:
        ArgumentError: a consensus outside [0, 1].
    """

    def __init__(
        self,
        recorder: ConfidenceRecorder,
        threshold: float | None = None,
        *,
        consensus: float | None = None,
        key: Key | None = None,
    ) -> None:
        if consensus is not None and not 0 <= consensus <= 1:
            raise ArgumentError(f"consensus: expected a share in [0, 1] or None, got {consensus!r}")
        self.recorder, self.threshold, self.consensus, self.key = recorder, threshold, consensus, key
        self.stopped_at: NDArray[np.int64] = np.zeros(0, np.int64)
        """int64 ``[rows]``, of the generation that runs or ran last: after how many tokens a row was weak; 0 is never.
        A row that had ended by itself before that has not been stopped: its padding was judged."""
        # Its presence tells generate to pad rows that are done while others go on; without it they go on sampling.
        self.eos_token_id: list[int] = []
        self.answers: list[Any] = []
        self.lowest: list[float] = []
        self.decided = False
        """Whether the vote of the traces so far has reached the consensus."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Which rows are done: bool ``[rows]``. A row is stopped after the token that completes the weak window."""
        readings = self.recorder.readings
        rows = input_ids.shape[0]
        if readings is None or readings.count.size != rows:
            raise ArgumentError(
                "ConfidenceStop reads what its ConfidenceRecorder records: pass that one to the same generate call, "
                "as logits_processor=[recorder]"
            )
        if self.stopped_at.size != rows or readings.count.max() == 1:
            self.stopped_at = np.zeros(rows, np.int64)
        if self.threshold is not None:
            weak = (readings.count >= self.recorder.window) & ~(readings.group >= self.threshold)
            self.stopped_at = np.where((self.stopped_at == 0) & weak, readings.count, self.stopped_at)
        return torch.from_numpy((self.stopped_at > 0) | self.decided).to(input_ids.device)

    def add(self, answers: Sequence[Any], lengths: Sequence[int]) -> Vote:
        """Take the rows of the last generation into the vote.

        Args:
            answers: of each row; None is no answer. Stopped rows do not vote, whatever they say.
            lengths: tokens that each row generated, its stop token included; of a stopped row any number from there on.

        Returns:
            The vote so far (:meth:`vote`).

        Raises:
            ShapeError: not one answer and length for each row.
        """
        steps = np.stack(self.recorder.steps, 1) if self.recorder.steps else np.zeros((0, 0))
        if len(answers) != len(steps) or len(lengths) != len(steps):
            raise ShapeError(
                f"expected an answer and a length for each of {len(steps)} rows, got {len(answers)} and {len(lengths)}"
            )
        own = np.asarray(lengths, np.int64)
        stopped = (self.stopped_at > 0) & (self.stopped_at <= own)
        own = np.where(stopped, self.stopped_at, own)
        lowest = trace_confidence(steps, lengths=own, window=self.recorder.window).lowest
        self.answers += [None if ended else answer for ended, answer in zip(stopped, answers, strict=True)]
        self.lowest += [float(value) for value in lowest]
        return self._decide()

    def calibrate(self, keep: float = 0.9) -> float:
        """Set the threshold from the traces so far: the ``(1 - keep)`` quantile of their lowest groups; returns it.

        Args:
            keep: the share eta of such traces that the threshold lets pass; the paper's "low" is 0.1, "high" 0.9.

        Raises:
            ArgumentError: a share outside (0, 1], or no trace with a finite confidence.
        """
        found = threshold(self.lowest, keep)
        if np.isnan(found):
            raise ArgumentError("calibrate needs traces: generate some with this criterion, and add() their answers")
        self.threshold = found
        self._decide()
        return found

    def vote(self) -> Vote:
        """The vote of the traces so far: those at or above the threshold, weighted by their lowest group."""
        bar = -np.inf if self.threshold is None else self.threshold
        answers = [a if low >= bar else None for a, low in zip(self.answers, self.lowest, strict=True)]
        return weighted(answers, np.maximum(self.lowest, 0.0), key=self.key)

    def _decide(self) -> Vote:
        vote = self.vote()
        self.decided = self.consensus is not None and vote.share >= self.consensus
        return vote
