"""How many steps to speculate: fixed, or the value of the state, learnt online.

Speculating from a state earns 1 for each step up to and including the first mismatch, and nothing after it; agents are
fixed, so this is the estimation of a value and not of a policy (Guan et al., 2025)::

    G_t = r_t + (1 - lambda) V(s_{t+1}) + lambda G_{t+1},   V = G = 0 after the last state     (textbook lambda-return)
    loss = w (G - V)^2,  w = tau if G > V else 1 - tau                                          (expectile)
    k = max(1, round(V) + offset)

Departures from the published code: its recursion has V of the *same* state in place of V(s_{t+1}) and no cut at the
end, so that a last state is worth 1.053 and not 1; here it is exact. Its text input loses the newest steps, here it
keeps them (:func:`tilewise.scheduler.planning.model.recent_words`).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning.model import HashedModel, ValueModel, generator
from tilewise.scheduler.planning.trajectory import State, Trajectory

__all__ = ["Fitted", "FixedPredictor", "Job", "Predictor", "ValuePredictor", "lambda_return"]


def lambda_return(rewards: np.ndarray, values: np.ndarray, lambda_: float, gamma: float = 1.0) -> np.ndarray:
    """Returns of the states of one whole trajectory (Sutton and Barto, 2nd edition, section 12.1).

    Args:
        rewards: ``[n]``, of leaving each state.
        values: ``[n]``, estimates of the same states; the state after the last is worth 0.
        lambda_: 1 is Monte Carlo, 0 one-step temporal difference.
        gamma: discount.

    Returns:
        float64 ``[n]``.

    Raises:
        ArgumentError: lengths that differ, or numbers outside [0, 1].

    Example:
        >>> lambda_return(np.ones(3), np.array([9.0, 5.0, 7.0]), 1.0).tolist()
        [3.0, 2.0, 1.0]
        >>> lambda_return(np.ones(3), np.array([9.0, 5.0, 7.0]), 0.0).tolist()
        [6.0, 8.0, 1.0]
    """
    if rewards.shape != values.shape or rewards.ndim != 1:
        raise ArgumentError(f"lambda_return: expected rewards and values [n], got {rewards.shape} and {values.shape}")
    if not (0 <= lambda_ <= 1 and 0 <= gamma <= 1):
        raise ArgumentError(f"lambda_return: lambda_ and gamma are in [0, 1], got {lambda_} and {gamma}")
    returns = []
    after, value = 0.0, 0.0
    # Python's own numbers: a trajectory is short.
    for reward, own in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        after = reward + gamma * ((1.0 - lambda_) * value + lambda_ * after)
        value = own
        returns.append(after)
    return np.array(returns[::-1], np.float64)


@dataclass(frozen=True)
class Job:
    """Something to train on: a private copy of the model, and trajectories of encoded states."""

    model: ValueModel
    trajectories: tuple[tuple[Any, ...], ...]
    lambda_: float
    tau: float
    epochs: int


@dataclass(frozen=True)
class Fitted:
    """A trained copy, and the loss of each epoch."""

    model: ValueModel
    losses: tuple[float, ...]


class Predictor(Protocol):
    """Says how many steps to speculate from a state, and may learn.

    ``prepare``, ``publish``, ``predict`` and ``record`` are called by the planner between events; ``fit`` in a thread
    of its own (or in virtual time), and touches nothing but its job. With :attr:`blocking` predictions are made in a
    thread as well.
    """

    blocking: bool

    def predict(self, state: State) -> int:
        """k, 1 or more."""
        ...

    def record(self, trajectory: Trajectory) -> None:
        """Keep a trajectory that ended in a mismatch or with the plan."""
        ...

    def prepare(self) -> Job | None:
        """What to train on now; None: nothing new."""
        ...

    def fit(self, job: Job) -> Fitted:
        """Train; long."""
        ...

    def publish(self, fitted: Fitted) -> bool:
        """Put a trained copy into service; False if it is refused."""
        ...


@dataclass
class FixedPredictor:
    """Always the same k, as in Interactive Speculative Planning (arXiv 2410.00079).

    Example:
        >>> FixedPredictor(3).predict(State("task"))
        3
    """

    k: int
    blocking: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ArgumentError(f"FixedPredictor: k is a number of steps, 1 or more; got {self.k!r}")

    def predict(self, state: State) -> int:
        """k."""
        return self.k

    def record(self, trajectory: Trajectory) -> None:
        """Nothing is learnt."""

    def prepare(self) -> Job | None:
        """Nothing to train."""
        return None

    def fit(self, job: Job) -> Fitted:
        """Never called: there is never a job."""
        raise ArgumentError("FixedPredictor does not learn")

    def publish(self, fitted: Fitted) -> bool:
        """Refuses: there is nothing to publish."""
        return False


class ValuePredictor:
    """Learns the value of states online and speculates that many steps. Nothing is learnt yet: k is 1 + offset.

    Args:
        model: see :class:`~tilewise.scheduler.planning.model.ValueModel`; by default the one of NumPy.
        tau: above 0.5 speculates more (faster, dearer), below less; changes take effect with further training.
        offset: added to the rounded value; takes effect at once.
        lambda_: of the return.
        batch: states of a job at least, in whole trajectories without repetition (all there are, if fewer).
        epochs: steps of training of a job.
        replay: states kept; the oldest trajectories go first.
        most: no prediction is larger.
        blocking: predictions take long (a transformer): make them in a thread.
        seed: of the choice of trajectories.

    Attributes:
        updates: copies put into service.
        rejected: copies refused because a loss or a weight was not finite; the one in service stays.

    Raises:
        ArgumentError: values outside of what is meaningful.

    Example:
        >>> predictor = ValuePredictor(offset=1)
        >>> predictor.predict(State("task"))
        2
    """

    def __init__(
        self,
        model: ValueModel | None = None,
        *,
        tau: float = 0.5,
        offset: int = 0,
        lambda_: float = 0.95,
        batch: int = 64,
        epochs: int = 3,
        replay: int = 2500,
        most: int = 64,
        blocking: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < tau < 1:
            raise ArgumentError(f"ValuePredictor: tau is in (0, 1), 0.5 is unbiased; got {tau}")
        if not 0 <= lambda_ <= 1:
            raise ArgumentError(f"ValuePredictor: lambda_ is in [0, 1], got {lambda_}")
        if not isinstance(offset, int):
            raise ArgumentError(f"ValuePredictor: offset is a number of steps, got {offset!r}")
        if min(batch, epochs, replay, most) < 1:
            raise ArgumentError(
                f"ValuePredictor: batch, epochs, replay and most are 1 or more; got {batch}, {epochs}, {replay}, {most}"
            )
        self._serving: ValueModel = HashedModel(seed=seed) if model is None else model
        self.tau, self.offset, self.lambda_, self.most = tau, offset, lambda_, most
        self.batch, self.epochs, self.replay, self.blocking, self.seed = batch, epochs, replay, blocking, seed
        self.updates = self.rejected = 0
        self._replay: deque[tuple[Any, ...]] = deque()
        self._states = self._fresh = self._jobs = 0

    def value(self, state: State) -> float:
        """The predicted number of steps worth speculating."""
        model = self._serving  # one copy for the whole call, whatever is published meanwhile
        return float(model.values([model.encode(state)])[0])

    def predict(self, state: State) -> int:
        """k of a state."""
        return self.choose(self.value(state))

    def choose(self, value: float) -> int:
        """k of a value: rounded (halves up), with the offset, in 1..most.

        Raises:
            ArgumentError: a value that is not finite.
        """
        if not math.isfinite(value):
            raise ArgumentError(f"ValuePredictor: the model's value of a state is {value}")
        return min(self.most, max(1, math.floor(value + 0.5) + self.offset))

    def record(self, trajectory: Trajectory) -> None:
        """Keep a trajectory for training; of more than `replay` states, the last ones."""
        states = trajectory.states[-self.replay :]
        if not states:
            return
        self._replay.append(tuple(self._serving.encode(state) for state in states))
        self._states += len(states)
        self._fresh += 1
        while self._states > self.replay:
            self._states -= len(self._replay.popleft())

    def prepare(self) -> Job | None:
        """A job if anything was recorded since the last: the newest trajectories, and others at random."""
        if not self._fresh:
            return None
        self._jobs += 1
        fresh, self._fresh = min(self._fresh, len(self._replay)), 0
        chosen = [self._replay[-1 - place] for place in range(fresh)]
        count = sum(map(len, chosen))
        others = generator(self.seed, self._jobs, 1).permutation(len(self._replay) - fresh)
        for place in others:
            if count >= self.batch:
                break
            chosen.append(self._replay[place])
            count += len(chosen[-1])
        return Job(self._serving.copy(), tuple(chosen), self.lambda_, self.tau, self.epochs)

    def fit(self, job: Job) -> Fitted:
        """Train the job's copy: returns are computed with its own values, anew in each epoch."""
        states = [state for trajectory in job.trajectories for state in trajectory]
        ends = [0, *itertools.accumulate(len(trajectory) for trajectory in job.trajectories)]
        ones = np.ones(len(states))
        losses = []
        for _ in range(job.epochs):
            values = job.model.values(states)
            targets = [
                lambda_return(ones[begin:end], values[begin:end], job.lambda_)
                for begin, end in itertools.pairwise(ends)
            ]
            losses.append(job.model.fit(states, np.concatenate(targets), job.tau))
        return Fitted(job.model, tuple(losses))

    def publish(self, fitted: Fitted) -> bool:
        """Put a trained copy into service, unless something in it is not finite; whether it did."""
        if not (all(math.isfinite(loss) for loss in fitted.losses) and fitted.model.finite()):
            self.rejected += 1
            return False
        self._serving = fitted.model
        self.updates += 1
        return True
