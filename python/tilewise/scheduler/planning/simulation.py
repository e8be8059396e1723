"""The planner's machine in virtual time: the same :class:`Episode` that real calls drive, with a heap for a clock.

A cancelled call is billed what it had used by then (:meth:`tilewise.scheduler.planning.scenario.Agent.billed`).
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Any

from tilewise.errors import InternalError
from tilewise.scheduler.planning.episode import Episode
from tilewise.scheduler.planning.events import (
    Ask,
    CallApproximate,
    CallTarget,
    Cancel,
    Cancelled,
    Commit,
    Execute,
    Finish,
    Finished,
    Predicted,
    Record,
    Started,
)
from tilewise.scheduler.planning.predictor import Fitted, Predictor
from tilewise.scheduler.planning.scenario import SimulatedTask
from tilewise.scheduler.planning.window import Caps

__all__ = ["SimulatedEpisode", "Simulator"]


@dataclass(frozen=True)
class SimulatedEpisode:
    """What one task took.

    Attributes:
        seconds: virtual, from start to the complete plan.
        alone: of the target alone, the same draws.
        episode: the machine afterwards: steps, records, ledger, rounds.
    """

    seconds: float
    alone: float
    episode: Episode


class Simulator:
    """Runs tasks one after another with one predictor, which learns between and during them.

    Training is in virtual time as well: an update takes the scenario's ``training_seconds``, one at a time, beside
    planning; until it is done the copy in service answers.

    Args:
        predictor: see :class:`tilewise.scheduler.planning.predictor.Predictor`.
        limit: most steps of a plan.
        caps: most calls in flight.
        training: whether the predictor learns.

    Example:
        >>> from tilewise.scheduler.planning import FixedPredictor
        >>> from tilewise.scheduler.planning.scenario import Scenario
        >>> task = Scenario().task(0, 0)
        >>> slow, fast = (Simulator(FixedPredictor(k)).run(task).seconds for k in (1, 4))
        >>> fast < slow
        True
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        limit: int = 64,
        caps: Caps = Caps(),  # noqa: B008 (frozen)
        training: bool = True,
    ) -> None:
        self.predictor, self.limit, self.caps, self.training = predictor, limit, caps, training
        self.clock = 0.0
        self._training: tuple[float, Fitted] | None = None  # when it will be done, and what

    def _train(self, seconds: float) -> None:
        if not self.training:
            return
        if self._training is not None and self._training[0] <= self.clock:
            done, self._training = self._training[1], None
            self.predictor.publish(done)
        if self._training is None:
            job = self.predictor.prepare()
            if job is not None:
                self._training = (self.clock + seconds, self.predictor.fit(job))

    def run(self, task: SimulatedTask) -> SimulatedEpisode:
        """Plan one task; the clock goes on from the last one."""
        scenario = task.scenario
        episode = Episode(task.text, limit=self.limit, caps=self.caps)
        begin, finished = self.clock, None
        order = itertools.count()
        heap: list[tuple[float, int, int, Any]] = []
        # By call: role, state and the time it began.
        calls: dict[int, tuple[str, Any, float]] = {}
        commands = episode.handle(Started(begin))
        while True:
            for command in commands:
                if isinstance(command, CallApproximate | CallTarget):
                    role = "approximate" if isinstance(command, CallApproximate) else "target"
                    calls[command.call] = (role, command.state, self.clock)
                    end = self.clock + task.latency(role, command.state)
                    answer = Finished(end, command.call, task.reply(role, command.state))
                elif isinstance(command, Ask):
                    calls[command.call] = ("predictor", command.state, self.clock)
                    end = self.clock + scenario.predictor_seconds
                    answer = Predicted(end, command.call, self.predictor.predict(command.state))
                elif isinstance(command, Cancel):
                    role, state, start = calls.pop(command.call)
                    end, prompt, made = self.clock, 0, 0
                    if role != "predictor":
                        reply = task.reply(role, state)
                        part = min(1.0, (self.clock - start) / task.latency(role, state))
                        agent = scenario.approximate if role == "approximate" else scenario.target
                        prompt, made = agent.billed(reply, part)
                    answer = Cancelled(end, command.call, prompt, made)
                elif isinstance(command, Record):
                    self.predictor.record(command.trajectory)
                    continue
                elif isinstance(command, Finish):
                    finished = self.clock
                    continue
                elif isinstance(command, Execute):
                    raise InternalError("the simulator has no tools")
                else:
                    assert isinstance(command, Commit)
                    continue
                heapq.heappush(heap, (end, next(order), command.call, answer))
            if not heap:
                break
            now, _, call, event = heapq.heappop(heap)
            if isinstance(event, Cancelled) or call in calls:
                self.clock = max(self.clock, now)
                self._train(scenario.training_seconds)
                calls.pop(call, None)
                commands = episode.handle(event)
            else:
                commands = []  # the answer of a call that was cancelled before
        assert finished is not None and episode.closed
        return SimulatedEpisode(finished - begin, task.alone, episode)
