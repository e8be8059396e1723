"""Scripted agents and a driver in any order, for the tests of planning."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tilewise.scheduler.planning import (
    TERMINATE,
    Abandoned,
    Ask,
    CallApproximate,
    CallTarget,
    Cancel,
    Cancelled,
    Commit,
    Episode,
    Execute,
    Executed,
    Failed,
    Finish,
    Finished,
    Predicted,
    Record,
    Reply,
    Started,
    State,
    Step,
)

PROMPT, GENERATION = (
    {"approximate": 50, "target": 100, "predictor": 9},
    {"approximate": 5, "target": 20, "predictor": 1},
)


def mix(*parts: Any) -> int:
    """A number that depends on all of its arguments, the same in every process."""
    return zlib.crc32(repr(parts).encode())


class Pair:
    """A deterministic target, whose answers depend on its whole prefix, and an approximation that is wrong at `wrong`.

    Args:
        length: steps of the target's plan, along its own prefix.
        wrong: step -> what A says there (an action, TERMINATE, or None for an unreadable answer).
        last: the target marks its last step instead of saying TERMINATE.
    """

    def __init__(self, length: int, wrong: dict[int, Any] | None = None, *, salt: int = 0, last: bool = False) -> None:
        self.length, self.wrong, self.salt, self.last = length, wrong or {}, salt, last

    def truth(self, state: State) -> Reply:
        prefix = [(step.action, step.observation) for step in state.steps]
        tokens = (PROMPT["target"] + 10 * state.index, GENERATION["target"])
        if state.index >= self.length:
            return Reply(TERMINATE, *tokens)
        action = f"{state.index}:{mix(self.salt, state.task, prefix) % 1000}"
        return Reply(action, *tokens, last=self.last and state.index == self.length - 1)

    def guess(self, state: State) -> Reply:
        known = self.truth(State(state.task, state.steps))
        action = self.wrong.get(state.index, known.action)
        last = known.last and state.index not in self.wrong
        return Reply(action, PROMPT["approximate"] + 10 * state.index, GENERATION["approximate"], last=last)

    def alone(self, task: Any, limit: int = 20, tool: Callable[[Any], Any] = lambda action: None) -> list[Step]:
        """The plan of the target alone."""
        steps: list[Step] = []
        while len(steps) < limit:
            reply = self.truth(State(task, tuple(steps)))
            if reply.action is TERMINATE:
                break
            steps.append(Step(len(steps), reply.action, tool(reply.action)))
            if reply.last:
                break
        return steps


class World:
    """Carries out commands, and delivers what comes back in the order in which `choose` picks it.

    Args:
        choose: given a number n, one of 0..n-1: which of the waiting answers arrives next, and other choices.
        k: what the predictor says for a state.
        fail: whether a call (its role and state) fails.
        stubborn: a cancelled call may answer all the same, or never end.
    """

    def __init__(
        self,
        pair: Pair,
        choose: Callable[[int], int],
        k: Callable[[State], int],
        *,
        tool: Callable[[Any], Any] = lambda action: None,
        rehearse: Callable[[Any], Any] = lambda action: None,
        fail: Callable[[str, State], bool] = lambda role, state: False,
        stubborn: bool = False,
        duplicates: bool = False,
    ) -> None:
        self.pair, self.choose, self.k, self.tool, self.rehearse = pair, choose, k, tool, rehearse
        self.fail, self.stubborn, self.duplicates = fail, stubborn, duplicates
        self.waiting: dict[int, Any] = {}
        self.cancelled: set[int] = set()
        self.seen: list[Any] = []
        self.commits: list[Commit] = []
        self.trajectories: list[Any] = []
        self.finish: Finish | None = None
        self.issued: dict[tuple[str, str], int] = {}
        self.executed: list[tuple[str, Any]] = []
        self.confirmed_then: list[tuple[Any, int]] = []  # guarded actions, and how many steps were committed by then
        self.most_targets = 0

    def _spend(self, role: str, prompt: int, generation: int) -> None:
        for kind, count in (("prompt", prompt), ("generation", generation)):
            self.issued[role, kind] = self.issued.get((role, kind), 0) + count

    def obey(self, commands: list[Any]) -> None:
        for command in commands:
            self.seen.append(command)
            if isinstance(command, CallApproximate | CallTarget | Ask | Execute):
                assert self.finish is None, "a call after the end"
                assert command.call not in self.waiting
                self.waiting[command.call] = command
            elif isinstance(command, Cancel):
                assert command.call in self.waiting and command.call not in self.cancelled
                self.cancelled.add(command.call)
            elif isinstance(command, Commit):
                assert self.finish is None
                assert command.state.index == len(self.commits) + 1
                self.commits.append(command)
            elif isinstance(command, Record):
                self.trajectories.append(command.trajectory)
            else:
                assert isinstance(command, Finish) and self.finish is None
                self.finish = command
        live = [self.waiting[call] for call in self.waiting if call not in self.cancelled]
        self.most_targets = max(self.most_targets, sum(isinstance(c, CallTarget) for c in live))

    def answer(self, now: float, call: int) -> Any:
        command = self.waiting.pop(call)
        if isinstance(command, CallApproximate):
            role, reply = "approximate", self.pair.guess(command.state)
        elif isinstance(command, CallTarget):
            assert not command.state.corrections
            role, reply = "target", self.pair.truth(command.state)
        elif isinstance(command, Ask):
            role, reply = "predictor", None
        else:
            role, reply = "tool", None
        if call in self.cancelled:
            how = self.choose(3) if self.stubborn else 0
            if how == 0:
                if role == "tool":
                    return Cancelled(now, call, 0, 0)
                self._spend(role, PROMPT[role], 1)
                return Cancelled(now, call, PROMPT[role], 1)
            if how == 1:
                if role != "tool":
                    self._spend(role, PROMPT[role], 0)
                return Abandoned(now, call, 0 if role == "tool" else PROMPT[role], 0)
        if self.fail(role, command.state):
            if role != "tool":
                self._spend(role, 3, 0)
                return Failed(now, call, 3, 0)
            return Failed(now, call)
        if reply is not None:
            self._spend(role, reply.prompt_tokens, reply.generation_tokens)
            return Finished(now, call, reply)
        if role == "predictor":
            self._spend(role, PROMPT[role], GENERATION[role])
            return Predicted(now, call, self.k(command.state), PROMPT[role], GENERATION[role])
        self.executed.append((command.mode, command.action))
        self.confirmed_then.append((command.action, len(self.commits)))
        return Executed(now, call, (self.rehearse if command.mode == "dry" else self.tool)(command.action))

    def run(self, episode: Episode, most: int = 5000) -> None:
        """Until nothing is waiting; the machine must be closed by then."""
        self.obey(episode.handle(Started(0.0)))
        now = 0.0
        while self.waiting:
            now += 1.0
            assert now < most, "the machine does not come to an end"
            calls = sorted(self.waiting)
            event = self.answer(now, calls[self.choose(len(calls))])
            self.obey(episode.handle(event))
            if self.duplicates and self.choose(4) == 0:
                before = episode.ignored
                self.obey(episode.handle(event))
                assert episode.ignored == before + 1
        assert episode.closed and self.finish is not None


def orders(depth: int, width: int) -> Iterator[tuple[int, ...]]:
    """Every sequence of `depth` numbers below `width`."""
    if depth == 0:
        yield ()
        return
    for head in range(width):
        for tail in orders(depth - 1, width):
            yield (head, *tail)
