"""How sure a model was along a reasoning trace, by its own probabilities.

* :func:`token_confidence`: ``C = -(1/k) * sum of log P`` over the k most probable next tokens: high where the law is
  peaked, low where it is flat;
* :func:`trace_confidence`: windows of C along whole traces, and what they say about each;
* :class:`ConfidenceMonitor`: the same while the traces are being written.

Use logits as the model gives them, before temperature, top-k and top-p: a token that was masked among the k makes C
infinite. What is infinite or undefined stays so in every window it is in, and never wins a vote
(:mod:`tilewise.scheduler.voting`). Both ways of computing give the same bits, on every instruction set and for any
number of threads.

Source: Fu et al., "Deep think with confidence" (2025), arXiv 2508.15260.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise import _core
from tilewise._arrays import is_torch, like, native
from tilewise.errors import ArgumentError, ShapeError

__all__ = ["ConfidenceMonitor", "Readings", "TraceConfidence", "token_confidence", "trace_confidence"]


@dataclass(frozen=True)
class TraceConfidence:
    """The confidence of each trace, float64 ``[N]``; 0 for a trace without tokens.

    Attributes:
        mean: of all tokens.
        tail: of the last tokens.
        bottom: mean of the lowest groups.
        lowest: the lowest group.
        tokens: ``[N, T]``, if asked for; NaN beyond a trace's length.
        groups: ``[N, max(T - window + 1, 1)]``, if asked for: the mean of each window, in order; NaN beyond a trace's
            last. A trace shorter than the window has one group, its mean.
    """

    mean: Any
    tail: Any
    bottom: Any
    lowest: Any
    tokens: Any = None
    groups: Any = None


@dataclass(frozen=True)
class Readings:
    """What a :class:`ConfidenceMonitor` knows of some rows.

    Attributes:
        group: float64 ``[R]``, the mean of the last `window` tokens; NaN before there are so many.
        lowest: float64 ``[R]``, the lowest group so far; the mean while there is none.
        mean: float64 ``[R]``, of all tokens.
        count: int64 ``[R]``, tokens seen.
    """

    group: NDArray[np.float64]
    lowest: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: NDArray[np.int64]


def token_confidence(logits: Any, top_k: int = 20) -> Any:
    """Confidence of the next token: ``-(1/k) * sum of log P(j)`` over the k most probable tokens j.

    Adding a constant to the logits changes nothing; a uniform law over V tokens has confidence ``ln V`` for any k; with
    k = V it is the cross-entropy from the uniform law to P.

    Args:
        logits: ``[..., V]``, float32, float64, float16 or bfloat16, unprocessed.
        top_k: k, from 1 to V.

    Returns:
        float64 ``[...]``, of the kind of `logits`. +inf where one of the k tokens has probability 0, NaN where a logit
        is NaN or all are -inf.

    Raises:
        ArgumentError: k outside 1 to V.
        ShapeError, DtypeError, DeviceError: the message names the argument.

    Source: DeepConf, arXiv 2508.15260, section 2.

    Example:
        >>> import numpy as np
        >>> from tilewise.scheduler.confidence import token_confidence
        >>> token_confidence(np.log([[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]]), top_k=2).round(3)
        array([1.386, 2.318])
    """
    array = native("logits", logits)
    if len(array.shape) == 0:
        raise ShapeError("logits: expected [..., V], got a number")
    *lead, width = array.shape
    count = int(np.prod(lead, dtype=np.int64))
    out, result = like(logits, (count, 1), "float64")
    _core.confidence_tokens(array.reshape(count, width), _whole("top_k", top_k), out)
    return result.reshape(tuple(lead))


def trace_confidence(
    values: Any,
    *,
    lengths: Any = None,
    window: int = 2048,
    tail: int | None = None,
    bottom: float = 0.1,
    tokens: bool = False,
    groups: bool = False,
) -> TraceConfidence:
    """Confidence of whole traces: mean, tail, bottom and lowest group.

    Args:
        values: log probabilities ``[N, T, k]`` of the k most probable tokens at each place, or token confidences
            ``[N, T]``; float32, float64, float16 or bfloat16. float64 sums in any case.
        lengths: int ``[N]``, tokens of each trace; what lies beyond is not read. None: all T.
        window: n, tokens of a group; groups overlap, one begins at every token.
        tail: tokens of the tail; as many as the window if None.
        bottom: share of the groups that make the bottom: the lowest ``max(1, floor(bottom * groups))``.
        tokens, groups: also return those confidences.

    Returns:
        :class:`TraceConfidence`, arrays of the kind of `values`.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument.
        ArgumentError: lengths outside 0 to T, windows below 1, a share outside [0, 1].

    Source: DeepConf, arXiv 2508.15260, section 2; nothing is rounded on the way.

    Example:
        >>> import numpy as np
        >>> from tilewise.scheduler.confidence import trace_confidence
        >>> trace = trace_confidence(np.array([[4.0, 2.0, 0.0, 6.0, 8.0]]), window=2, groups=True)
        >>> trace.groups
        array([[3., 1., 3., 7.]])
        >>> trace.mean, trace.tail, trace.bottom, trace.lowest
        (array([4.]), array([7.]), array([1.]), array([1.]))
    """
    array = native("values", values)
    if len(array.shape) not in (2, 3):
        raise ShapeError(
            "values: expected log probabilities [traces, tokens, k] or token confidences [traces, tokens], "
            f"got shape {tuple(array.shape)}"
        )
    count, longest = array.shape[:2]
    window = _whole("window", window)
    metrics_out, metrics = like(values, (count, 4), "float64")
    tokens_out, token_values = like(values, (count, longest), "float64") if tokens else (None, None)
    group_shape = (count, max(longest - window + 1, 1))
    groups_out, group_values = like(values, group_shape, "float64") if groups else (None, None)
    _core.confidence_traces(
        array,
        None if lengths is None else native("lengths", lengths if is_torch(lengths) else np.asarray(lengths)),
        window,
        window if tail is None else _whole("tail", tail),
        float(bottom),
        metrics_out,
        tokens_out,
        groups_out,
    )
    mean, end, low, lowest = (metrics[:, column] for column in range(4))
    return TraceConfidence(mean, end, low, lowest, token_values, group_values)


class ConfidenceMonitor:
    """Windows of a running batch: what :func:`trace_confidence` says of a trace, after every token of it.

    Each row has a ring of its last `window` confidences: 8 bytes a token, whatever the length of the trace.

    Args:
        rows: requests that run at once.
        window: n, tokens of a group.

    Raises:
        ArgumentError: a window below 1.

    Example:
        >>> from tilewise.scheduler.confidence import ConfidenceMonitor
        >>> monitor = ConfidenceMonitor(rows=2, window=2)
        >>> _ = monitor.update([4.0, 1.0])
        >>> monitor.update([2.0, 3.0]).group
        array([3., 2.])
        >>> monitor.update([0.0], rows=[0]).lowest
        array([1.])
    """

    def __init__(self, rows: int, window: int = 2048) -> None:
        self.rows = _whole("rows", rows, 0)
        self.window = _whole("window", window)
        self._windows = _core.ConfidenceWindows(self.rows, self.window)

    def update(self, confidence: Any, rows: Sequence[int] | NDArray[np.integer] | None = None) -> Readings:
        """One more token for some rows.

        Args:
            confidence: ``[R]``, of the new tokens (:func:`token_confidence`).
            rows: int ``[R]``, which rows they belong to, each named once; None: all, in order.

        Returns:
            :class:`Readings` of those rows.

        Raises:
            ShapeError: not one number per row.
            ArgumentError: rows outside the batch or named twice.
        """
        if is_torch(confidence):
            confidence = confidence.detach().cpu().double().numpy()
        return self._call(rows, np.ascontiguousarray(confidence, np.float64))

    def read(self, rows: Sequence[int] | NDArray[np.integer] | None = None) -> Readings:
        """What is known of some rows; None: of all.

        Raises:
            ArgumentError: rows outside the batch or named twice.
        """
        return self._call(rows, None)

    def reset(self, rows: Sequence[int] | NDArray[np.integer] | None = None) -> None:
        """Begin anew in some rows; None: in all.

        Raises:
            ArgumentError: rows outside the batch or named twice.
        """
        self._windows.reset(self._rows(rows))

    def _rows(self, rows: Any) -> NDArray[np.int64]:
        return np.arange(self.rows) if rows is None else np.asarray(rows, np.int64).reshape(-1)

    def _call(self, rows: Any, values: NDArray[np.float64] | None) -> Readings:
        chosen = self._rows(rows)
        out = np.empty((chosen.size, 4))
        self._windows.update(chosen, values, out)
        return Readings(out[:, 0], out[:, 1], out[:, 2], out[:, 3].astype(np.int64))


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)
