"""A small value model in NumPy: hashed words of the recent history, a hidden layer, Adam.

Any other model takes its place if it has the methods of :class:`ValueModel`; see
:mod:`tilewise.agents.torch_predictor` for one around a torch encoder.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning.trajectory import State

__all__ = ["HashedModel", "ValueModel", "expectile_loss", "generator", "recent_words"]

_PREDICT = 8  # the purpose of planning's random numbers, among the ones of tilewise


def generator(seed: int, request: int, lane: int = 0) -> np.random.Generator:
    """Random numbers of one use in planning: NumPy's Philox, whose key is (seed, purpose) and whose counter names the
    request and the lane. The streams of two uses never overlap, and depend on nothing that was drawn before.

    Example:
        >>> float(generator(1, 2).random()) == float(generator(1, 2).random()) != float(generator(1, 3).random())
        True
    """
    return np.random.Generator(np.random.Philox(key=[seed, _PREDICT], counter=[0, 0, request, lane]))


def expectile_loss(values: np.ndarray, targets: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """Mean of ``w (target - value)^2`` with w = tau where the target is above the value, 1 - tau below; and its slope.

    tau = 0.5 is half the squared error, whose minimiser is the mean; above, the minimiser lies above the mean
    (Newey and Powell, 1987).

    Args:
        values, targets: float64 ``[n]``.
        tau: in (0, 1).

    Returns:
        The loss, and its derivative by each value ``[n]``.

    Example:
        >>> loss, slope = expectile_loss(np.array([1.0, 1.0]), np.array([2.0, 0.0]), 0.75)
        >>> loss, slope.tolist()
        (0.5, [-0.75, 0.25])
    """
    error = targets - values
    weight = np.where(error > 0, tau, 1.0 - tau)
    count = max(1, values.size)
    return float((weight * error**2).sum() / count), -2.0 * weight * error / count


def recent_words(state: State, most: int = 512) -> tuple[list[str], list[list[str]]]:
    """Words of the task, and of each step from the newest to the oldest; at most `most`, the *newest* are kept.

    The task has at most a quarter of them. (The published predictor cuts on the right: of a long history it loses
    what happened last, which says most about what comes next.)

    Example:
        >>> from tilewise.scheduler.planning import Step
        >>> recent_words(State("plan a trip", (Step(0, "search(flights)"), Step(1, "book(7)"))), most=8)
        (['plan', 'a'], [['book', '7'], ['search', 'flights']])
    """
    task = _words(state.task)[: most // 4]
    left = most - len(task)
    history = []
    for step in reversed(state.steps):
        words = _words(step.action)[:left]
        if not words:
            break
        history.append(words)
        left -= len(words)
    return task, history


def _words(thing: Any) -> list[str]:
    return re.findall(r"\w+", str(thing).lower())


class ValueModel(Protocol):
    """What a predictor needs of a model. One instance is only ever used by one thread at a time, but ``values`` of the
    copy in service may run while another copy is fitted."""

    def encode(self, state: State) -> Any:
        """What is kept of a state, once; cheap."""
        ...

    def values(self, encoded: Sequence[Any]) -> np.ndarray:
        """Predicted values, float64 ``[n]``."""
        ...

    def fit(self, encoded: Sequence[Any], targets: np.ndarray, tau: float) -> float:
        """One step of training towards ``targets [n]``; returns the loss before it."""
        ...

    def copy(self) -> ValueModel:
        """An independent model with the same state."""
        ...

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        ...


class HashedModel:
    """Hashed words of task and history, their position from the end, one hidden layer, one output.

    Args:
        buckets: of the hash table, a power of two or not.
        hidden: width of the hidden layer.
        rate: of Adam (Kingma and Ba, 2015).
        most_words: of a state; the newest are kept.
        seed: of the initial weights.

    Raises:
        ArgumentError: sizes below 1 or a rate that is not positive.

    Example:
        >>> model = HashedModel(seed=1)
        >>> model.values([model.encode(State("task"))]).round(3).tolist()  # nothing learnt: speculate one step
        [1.0]
    """

    def __init__(
        self, *, buckets: int = 1024, hidden: int = 16, rate: float = 0.02, most_words: int = 512, seed: int = 0
    ) -> None:
        if buckets < 1 or hidden < 1 or most_words < 4 or not rate > 0:
            raise ArgumentError(
                "HashedModel: expected buckets >= 1, hidden >= 1, most_words >= 4, rate > 0; got "
                f"{buckets}, {hidden}, {most_words}, {rate}"
            )
        self.buckets, self.rate, self.most_words = buckets, rate, most_words
        # Only the first layer starts at random: with a zero output layer the first prediction is exactly 1.
        table = 2.0 * generator(seed, 0).random((buckets, hidden)) - 1.0
        self.weights: dict[str, np.ndarray] = {
            "table": table, "hidden": np.zeros(hidden), "out": np.zeros(hidden), "linear": np.zeros(buckets),
            "bias": np.ones(1),
        }  # fmt: skip
        self._first = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._second = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._steps = 0

    def encode(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Buckets ``[m]`` and weights ``[m]`` of a state's words; a group (the task, a step) has the norm 1."""
        task, history = recent_words(state, self.most_words)
        # A word of the task says something about the plan, and another thing at each step of it.
        groups = [[f"task {word}" for word in task], [f"steps {min(state.index, 12)}"]]
        groups.append([f"task {word} at {state.index}" for word in task])
        for age, words in enumerate(history):
            # The last few steps are told apart; older ones are one bag.
            groups.append([f"{age if age < 3 else 'old'} {word}" for word in words])
        old = max(1, len(history) - 3)
        buckets, weights = [], []
        for place, group in enumerate(groups):
            weight = 1.0 / np.sqrt(max(1, len(group))) / (old if place > 5 else 1)
            for word in group:
                buckets.append(zlib.crc32(word.encode()) % self.buckets)
                weights.append(weight)
        return np.array(buckets, np.int64), np.array(weights)

    def _forward(self, encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
        """Values ``[n]``, the hidden layer ``[n, hidden]``, and for each word of each state its row, bucket, weight.

        Sums over the words of a row by ``reduceat``, and no matrix product: a BLAS would bring its threads to work of
        microseconds.
        """
        w = self.weights
        sizes = [buckets.size for buckets, _ in encoded]  # none is 0: a state has at least its step's word
        begins = np.cumsum([0, *sizes[:-1]])
        buckets = np.concatenate([buckets for buckets, _ in encoded])
        weight = np.concatenate([weights for _, weights in encoded])
        inner = np.add.reduceat(w["table"][buckets] * weight[:, None], begins)
        direct = np.add.reduceat(w["linear"][buckets] * weight, begins)
        active = np.tanh(inner + w["hidden"])
        values = (active * w["out"]).sum(1) + direct + w["bias"]
        return values, active, np.repeat(np.arange(len(sizes)), sizes), buckets, weight

    def values(self, encoded: Sequence[Any]) -> np.ndarray:
        """Values ``[n]`` of encoded states."""
        return self._forward(encoded)[0] if len(encoded) else np.zeros(0)

    def fit(self, encoded: Sequence[Any], targets: np.ndarray, tau: float) -> float:
        """One step of Adam on the expectile loss; returns the loss before it."""
        w = self.weights
        values, active, row, buckets, weight = self._forward(encoded)
        loss, slope = expectile_loss(values, targets, tau)
        inner = slope[:, None] * w["out"] * (1.0 - active**2)
        order = np.argsort(buckets, kind="stable")
        seen, begins = np.unique(buckets[order], return_index=True)
        table = np.zeros_like(w["table"])
        table[seen] = np.add.reduceat((inner[row] * weight[:, None])[order], begins)
        slopes = {
            "table": table, "hidden": inner.sum(0), "out": (slope[:, None] * active).sum(0),
            "linear": np.bincount(buckets, slope[row] * weight, minlength=self.buckets),
            "bias": slope.sum(keepdims=True),
        }  # fmt: skip
        self._steps += 1
        for name, gradient in slopes.items():
            first, second = self._first[name], self._second[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            step = first / (1.0 - 0.9**self._steps)
            w[name] = w[name] - self.rate * step / (np.sqrt(second / (1.0 - 0.999**self._steps)) + 1e-8)
        return loss

    def copy(self) -> HashedModel:
        """An independent model with the same weights and the same state of Adam."""
        return copy.deepcopy(self)

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(np.isfinite(value).all()) for value in self.weights.values())
