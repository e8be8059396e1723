"""How many steps to speculate: returns, expectiles, what is learnt and what must not be (P22, P23, E20)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning import (
    Cancel,
    Cancelled,
    Episode,
    Finished,
    FixedPredictor,
    HashedModel,
    Predicted,
    Record,
    Reply,
    Started,
    State,
    Step,
    Trajectory,
    ValuePredictor,
    lambda_return,
)
from tilewise.scheduler.planning.model import expectile_loss, generator, recent_words
from tilewise.scheduler.planning.predictor import Fitted


def state(*actions: str, task: str = "task") -> State:
    return State(task, tuple(Step(index, action) for index, action in enumerate(actions)))


def run_of(length: int, kind: str = "walk") -> Trajectory:
    """A trajectory whose first mismatch is at its last state."""
    return Trajectory(tuple(state(*[kind] * index, task=kind) for index in range(length)))


def train(predictor: ValuePredictor, trajectories: list[Trajectory], updates: int) -> None:
    for update in range(updates):
        predictor.record(trajectories[update % len(trajectories)])
        job = predictor.prepare()
        assert job is not None
        assert predictor.publish(predictor.fit(job))


floats = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


@given(floats, floats, st.floats(0, 1), st.floats(0, 1))
def test_P23_lambda_return(rewards: list[float], values: list[float], lambda_: float, gamma: float) -> None:
    size = min(len(rewards), len(values))
    r, v = np.array(rewards[:size]), np.array(values[:size])
    after = np.append(v[1:], 0.0)
    got = lambda_return(r, v, lambda_, gamma)
    # The definition: the mixture of n-step returns with weights (1 - lambda) lambda^(n - 1), the rest on the last.
    for t in range(size):
        total, weight = 0.0, 1.0
        for n in range(1, size - t + 1):
            reward = sum(gamma**i * r[t + i] for i in range(n))
            step = reward + (gamma**n * v[t + n] if t + n < size else 0.0)
            last = n == size - t
            total += (weight if last else weight * (1 - lambda_)) * step
            weight *= lambda_
        assert got[t] == pytest.approx(total, abs=1e-9)
    monte_carlo = [sum(gamma**i * x for i, x in enumerate(r[t:])) for t in range(size)]
    np.testing.assert_allclose(lambda_return(r, v, 1.0, gamma), monte_carlo, atol=1e-9)
    np.testing.assert_allclose(lambda_return(r, v, 0.0, gamma), r + gamma * after, atol=1e-9)


def test_P23_the_last_state_is_worth_exactly_1() -> None:
    """And not 1 / (1 - 0.05), where the published recursion ends up."""
    for value in (0.0, 1.0, 20.0):
        assert lambda_return(np.ones(1), np.array([value]), 0.95)[0] == 1.0
    with pytest.raises(ArgumentError):
        lambda_return(np.ones(2), np.ones(3), 0.5)
    with pytest.raises(ArgumentError):
        lambda_return(np.ones(2), np.ones(2), 1.5)


def expectile(sample: np.ndarray, tau: float) -> float:
    """The minimiser, by bisection on the slope."""
    low, high = float(sample.min()), float(sample.max())
    for _ in range(200):
        middle = (low + high) / 2
        slope = np.where(sample > middle, tau, 1 - tau) @ (middle - sample)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return low


@given(st.lists(st.integers(1, 9), min_size=2, max_size=20))
def test_P22_the_expectile_is_monotone_in_tau_and_the_mean_in_the_middle(sample: list[int]) -> None:
    data = np.array(sample, np.float64)
    taus = [0.05, 0.2, 0.5, 0.8, 0.95, 0.99]
    found = [expectile(data, tau) for tau in taus]
    assert found == sorted(found) and found[2] == pytest.approx(data.mean())
    for tau, value in zip(taus, found, strict=True):
        loss, slope = expectile_loss(np.full(data.size, value), data, tau)
        assert abs(slope.sum()) < 1e-9
        for other in (value - 0.1, value + 0.1):
            assert expectile_loss(np.full(data.size, other), data, tau)[0] >= loss - 1e-12
    eps = 1e-6
    values = data[::-1] + 0.3
    for place in range(data.size):  # the slope against differences
        moved = values.copy()
        moved[place] += eps
        change = (expectile_loss(moved, data, 0.8)[0] - expectile_loss(values, data, 0.8)[0]) / eps
        assert change == pytest.approx(expectile_loss(values, data, 0.8)[1][place], abs=1e-4)


def test_P22_the_model_learns_the_expectile_and_k_is_monotone() -> None:
    """One state, targets 1, 2, 3 and 10: the model in training comes to the minimiser, whatever tau is."""
    sample = np.array([1.0, 2.0, 3.0, 10.0])
    reached = []
    for tau in (0.2, 0.5, 0.8, 0.95):
        model = HashedModel(rate=0.05)
        encoded = [model.encode(state("a"))] * sample.size
        for _ in range(1500):
            model.fit(encoded, sample, tau)
        value = float(model.values(encoded[:1])[0])
        assert value == pytest.approx(expectile(sample, tau), abs=0.1)
        reached.append(ValuePredictor(tau=tau).choose(value))
    assert reached == sorted(reached)
    for value in (-3.0, 0.2, 1.4, 1.5, 2.5, 6.0, 900.0):
        ks = [ValuePredictor(offset=offset).choose(value) for offset in (-2, -1, 0, 1, 2)]
        assert ks == sorted(ks) and min(ks) >= 1 and max(ks) <= 64
    assert [ValuePredictor().choose(value) for value in (1.5, 2.49, 2.5)] == [2, 2, 3]  # halves up
    with pytest.raises(ArgumentError):
        ValuePredictor().choose(float("nan"))


def test_the_model_tells_states_apart_and_its_slopes_are_right() -> None:
    predictor = ValuePredictor(seed=3)
    train(predictor, [run_of(6, "easy"), run_of(1, "hard"), run_of(2, "middling")], 200)
    assert predictor.value(state(task="easy")) == pytest.approx(6.0, abs=0.5)
    assert predictor.value(state("easy", "easy", "easy", task="easy")) == pytest.approx(3.0, abs=0.5)
    assert predictor.value(state(task="hard")) == pytest.approx(1.0, abs=0.3)
    assert [predictor.predict(state(task=kind)) for kind in ("easy", "middling", "hard")] == [6, 2, 1]
    # One step of Adam moves every weight by rate x sign of its slope: the signs are the ones of differences.
    model = HashedModel(buckets=32, hidden=3, rate=1e-3, seed=1)
    model.weights["out"] += np.array([0.5, -0.3, 0.2])
    encoded = [model.encode(state("a b", "c")), model.encode(state("d"))]
    targets = np.array([4.0, 0.0])
    before = model.copy()
    model.fit(encoded, targets, 0.7)
    for name, weights in before.weights.items():
        for place in np.ndindex(weights.shape):
            ends = []
            for side in (1e-5, -1e-5):
                moved = before.copy()
                moved.weights[name][place] += side
                ends.append(expectile_loss(moved.values(encoded), targets, 0.7)[0])
            slope = (ends[0] - ends[1]) / 2e-5
            step = float((model.weights[name] - weights)[place])
            if abs(slope) < 1e-7:
                assert abs(step) < 2e-3
            else:
                assert step == pytest.approx(-1e-3 * np.sign(slope), rel=1e-2)


def test_the_same_seed_learns_the_same() -> None:
    values = []
    for _ in range(2):
        predictor = ValuePredictor(seed=5, batch=8)
        train(predictor, [run_of(n) for n in (1, 4, 2, 3)], 30)
        values.append(predictor.value(state("walk")))
    assert values[0] == values[1]
    assert generator(1, 2).random() != generator(1, 2, 1).random()


def test_E19_a_history_beyond_512_tokens_keeps_its_newest_steps() -> None:
    long = [f"word{index} " * 30 for index in range(60)]
    task, history = recent_words(state(*long))
    assert sum(map(len, history)) + len(task) <= 512
    assert history[0][0] == "word59" and history[-1] == ["word42"]
    model = HashedModel()
    one, other = model.encode(state(*long)), model.encode(state("something else", *long[1:]))
    assert np.array_equal(one[0], other[0])  # the oldest step is gone ...
    assert not np.array_equal(one[0], model.encode(state(*long[:-1], "newest"))[0])  # ... the newest is not


def machine_trajectories(k: int, wrong: set[int], length: int) -> list[list[int]]:
    """Trajectories that the machine hands out, as step numbers, with fixed k."""
    episode, found = Episode("task", limit=length), []
    waiting: dict[str, list[Any]] = {"Ask": [], "CallApproximate": [], "CallTarget": []}

    def take(commands: list[Any]) -> None:
        for command in commands:
            name = type(command).__name__
            if name in waiting:
                waiting[name].append(command)
            elif isinstance(command, Record):
                found.append([one.index for one in command.trajectory.states])
            elif isinstance(command, Cancel):
                for calls in waiting.values():
                    calls[:] = [one for one in calls if one.call != command.call]
                take(episode.handle(Cancelled(0.0, command.call, 0, 0)))

    take(episode.handle(Started(0.0)))
    while any(waiting.values()):  # the predictor is the fastest, the target the slowest
        name = next(name for name, calls in waiting.items() if calls)
        command = waiting[name].pop(0)
        if name == "Ask":
            take(episode.handle(Predicted(0.0, command.call, k)))
        else:
            step = command.state.index
            wrongly = name == "CallApproximate" and step in wrong
            take(episode.handle(Finished(0.0, command.call, Reply("wrong" if wrongly else str(step)))))
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_E20_nothing_is_recorded_when_the_budget_or_the_limit_runs_out(k: int) -> None:
    """Mismatches at steps 3 and 5 of 9: runs of 4 and 2 steps, whatever k is; the open end is not a sample."""
    assert machine_trajectories(k, {3, 5}, 9) == [[0, 1, 2, 3], [4, 5]]


def test_E20_short_budgets_do_not_teach_short_budgets() -> None:
    """Started at k = 1 and only ever shown what its own budgets allow, the predictor finds runs of six."""
    predictor = ValuePredictor(seed=0)
    seen = []
    for _ in range(120):
        k = predictor.predict(state(task="task"))
        seen.append(k)
        for steps in machine_trajectories(k, {5}, 6):
            predictor.record(Trajectory(tuple(state(*map(str, range(step))) for step in steps)))
        job = predictor.prepare()
        assert job is not None
        predictor.publish(predictor.fit(job))
    assert seen[0] == 1 and seen[-1] == 6


def test_E20_an_approximation_that_changes_is_followed() -> None:
    predictor = ValuePredictor(replay=120, seed=1)
    train(predictor, [run_of(6)], 80)
    assert predictor.predict(state(task="walk")) == 6
    train(predictor, [run_of(1)], 250)  # it is wrong at every step now
    assert predictor.predict(state(task="walk")) == 1


class Poisoned(HashedModel):
    """Its training gives NaN from the given step on."""

    fatal = 3

    def fit(self, encoded: Any, targets: np.ndarray, tau: float) -> float:
        loss = super().fit(encoded, targets, tau)
        if self._steps >= self.fatal:
            self.weights["bias"] = np.array([np.nan])
            return float("nan")
        return loss


def test_E20_a_nan_never_reaches_the_copy_in_service() -> None:
    predictor = ValuePredictor(Poisoned(), epochs=1)
    for _ in range(6):
        predictor.record(run_of(4))
        job = predictor.prepare()
        assert job is not None
        predictor.publish(predictor.fit(job))
        assert np.isfinite(predictor.value(state(task="walk")))
    assert predictor.updates == 2 and predictor.rejected == 4
    fine = HashedModel()
    assert not predictor.publish(Fitted(fine, (1.0, float("inf"))))
    fine.weights["table"][3, 1] = np.inf
    assert not predictor.publish(Fitted(fine, (1.0,)))


def test_E20_weights_that_are_swapped_during_a_prediction() -> None:
    """The prediction goes on with the copy that it began with, all of it."""

    class Swapping(HashedModel):
        def encode(self, one: State) -> Any:
            if self is first and not predictor.updates:
                changed = HashedModel(seed=9)
                changed.weights["bias"] = np.array([40.0])
                assert predictor.publish(Fitted(changed, (0.0,)))
            return super().encode(one)

    first = Swapping()
    predictor = ValuePredictor(first)
    assert predictor.predict(state()) == 1
    assert predictor.predict(state()) == 40


def test_a_fit_does_not_touch_what_is_in_service() -> None:
    predictor = ValuePredictor()
    before = {name: value.copy() for name, value in predictor._serving.weights.items()}  # type: ignore[attr-defined]
    predictor.record(run_of(5))
    job = predictor.prepare()
    assert job is not None and predictor.prepare() is None  # nothing new
    fitted = predictor.fit(job)
    for name, value in predictor._serving.weights.items():  # type: ignore[attr-defined]
        assert np.array_equal(value, before[name])
    assert predictor.publish(fitted) and predictor.value(state(task="walk")) != 1.0


def test_the_replay_forgets_the_oldest() -> None:
    predictor = ValuePredictor(replay=10, batch=100)
    for length in (4, 5, 3, 2):
        predictor.record(run_of(length))
    job = predictor.prepare()
    assert job is not None and sorted(map(len, job.trajectories)) == [2, 3, 5]
    predictor.record(Trajectory(()))
    assert predictor.prepare() is None
    predictor.record(run_of(30))
    job = predictor.prepare()
    assert job is not None and list(map(len, job.trajectories)) == [10]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ValuePredictor(tau=1.0),
        lambda: ValuePredictor(lambda_=-0.1),
        lambda: ValuePredictor(offset=0.5),  # type: ignore[arg-type]
        lambda: ValuePredictor(batch=0),
        lambda: FixedPredictor(0),
        lambda: FixedPredictor(True),
        lambda: HashedModel(buckets=0),
        lambda: HashedModel(rate=0.0),
        lambda: FixedPredictor(2).fit(None),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(make: Any) -> None:
    with pytest.raises(ArgumentError):
        make()
