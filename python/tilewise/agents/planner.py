"""Speculative planning with asyncio: the machine of :mod:`tilewise.scheduler.planning`, driven by real calls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from tilewise.agents.learning import Trainer
from tilewise.agents.result import PlanResult, Problem, Timings, alone, warn_orphan
from tilewise.agents.supervise import Meter, Outcome, Retry, supervise
from tilewise.agents.tools import Toolbox
from tilewise.errors import ArgumentError, InternalError, ReplyError
from tilewise.scheduler.planning import (
    Abandoned,
    Ask,
    CallApproximate,
    CallTarget,
    Cancel,
    Cancelled,
    Caps,
    Command,
    Commit,
    Episode,
    Event,
    Execute,
    Executed,
    Failed,
    Finish,
    Finished,
    Predicted,
    Record,
    Reply,
    Spent,
    Started,
    State,
    Step,
    Stop,
    exact,
)
from tilewise.scheduler.planning.predictor import FixedPredictor, Predictor, ValuePredictor
from tilewise.scheduler.planning.trajectory import no_tools

__all__ = ["PlanStream", "SpeculativePlanner"]

Agent = Callable[[State], Awaitable[Reply]]


class SpeculativePlanner:
    """Plans with a strong agent at the speed of a cheap one's good guesses.

    The approximation agent proposes steps ahead; the target agent, called with those proposals as its prefix, answers
    each step itself; where they differ the target's step stands and planning goes on from there. With the default
    ``agree`` the plan is the one that a deterministic target alone would have made, whatever arrives when.

    Args:
        approximate: async ``State -> Reply``, the cheap agent.
        target: async ``State -> Reply``, the strong one. (It may be called for prefixes that turn out wrong.)
        predictor: how many steps to speculate: a number (fixed), or a predictor; by default one that learns online.
        agree: whether a guess and the target's action are the same step. Anything but equality can keep actions that
            are not the target's: the result then says ``lossless=False``.
        tools: runs actions; without it actions are not executed and observations are None.
        limit: most steps of a plan.
        caps: most calls in flight.
        approximate_timeout, target_timeout, tool_timeout: seconds for one attempt; None: no limit.
        approximate_retry, target_retry: attempts and pauses. Tools are run once.
        patience: seconds that a cancelled call has for its clean-up before it counts as orphaned.

    Raises:
        ArgumentError: agents that cannot be called, a patience or time-out that is not positive.

    Example:
        >>> import asyncio
        >>> from tilewise.scheduler.planning import TERMINATE
        >>> async def target(state):
        ...     await asyncio.sleep(0.01)
        ...     return Reply(f"step {state.index}" if state.index < 3 else TERMINATE, 100, 10)
        >>> async def approximate(state):
        ...     return Reply(f"step {state.index}" if state.index < 3 else TERMINATE, 50, 5)
        >>> result = asyncio.run(SpeculativePlanner(approximate, target, predictor=4).run("a task"))
        >>> result.actions, result.lossless, result.ledger.balances()
        (['step 0', 'step 1', 'step 2'], True, True)
    """

    def __init__(
        self,
        approximate: Agent,
        target: Agent,
        predictor: Predictor | int | None = None,
        *,
        agree: Callable[[Any, Any], bool] = exact,
        tools: Toolbox | None = None,
        limit: int = 20,
        caps: Caps = Caps(),  # noqa: B008 (frozen)
        approximate_timeout: float | None = None,
        target_timeout: float | None = None,
        tool_timeout: float | None = None,
        approximate_retry: Retry = Retry(),  # noqa: B008 (frozen)
        target_retry: Retry = Retry(),  # noqa: B008 (frozen)
        patience: float = 1.0,
    ) -> None:
        for name, agent in (("approximate", approximate), ("target", target), ("agree", agree)):
            if not callable(agent):
                raise ArgumentError(f"SpeculativePlanner: {name} is called and must be callable, got {agent!r}")
        times = {"approximate": approximate_timeout, "target": target_timeout, "tool": tool_timeout}
        for name, seconds in (*((f"{role}_timeout", value) for role, value in times.items()), ("patience", patience)):
            if seconds is not None and not seconds > 0:
                raise ArgumentError(f"SpeculativePlanner: {name} is a number of seconds above 0, got {seconds!r}")
        if predictor is None:
            predictor = ValuePredictor()
        elif isinstance(predictor, int):
            predictor = FixedPredictor(predictor)
        self.agents: dict[str, Agent] = {"approximate": approximate, "target": target}
        self.predictor, self.agree, self.tools, self.limit, self.caps = predictor, agree, tools, limit, caps
        self.timeouts, self.patience = times, patience
        self.retries = {"approximate": approximate_retry, "target": target_retry, "tool": Retry()}
        self.trainer = Trainer(predictor)
        self.orphans: set[asyncio.Task[Any]] = set()  #: calls that were cancelled, did not end, and still run
        Episode(None, limit=limit, caps=caps)  # a wrong limit is an error here, not at the first run

    async def run(self, task: Any) -> PlanResult:
        """Plan one task.

        Cancelling this call cancels every call it made and waits for their end, at most :attr:`patience` seconds.

        Raises:
            Exception: what the target (on a confirmed prefix, after its retries) or a confirmed tool raised.
            ReplyError: the target's answer could not be used.
        """
        return await _Run(self, task, lambda step: None).main()

    def stream(self, task: Any) -> PlanStream:
        """Plan one task and give each step when it is final: ``async for step in planner.stream(task)``."""
        return PlanStream(self, task)

    def close(self) -> None:
        """Let the threads of the predictor end."""
        self.trainer.close()


class PlanStream:
    """Steps of a plan as they become final, and then its :attr:`result`.

    Leaving the loop early cancels the planning: at once with ``async with planner.stream(task) as steps``, else when
    the object is collected.

    Attributes:
        result: the :class:`~tilewise.agents.PlanResult`, once all steps were taken; None before.
    """

    def __init__(self, planner: SpeculativePlanner, task: Any) -> None:
        self.result: PlanResult | None = None
        # A generator of its own, which asyncio closes when it is collected; it must not refer to this object, else
        # the two would be a cycle and wait for the collector.
        self._box: list[PlanResult] = []
        self._steps = _stream(planner, task, self._box)

    def __aiter__(self) -> PlanStream:
        return self

    async def __anext__(self) -> Step:
        try:
            return await anext(self._steps)
        except StopAsyncIteration:
            self.result = self._box[0] if self._box else None
            raise

    async def __aenter__(self) -> PlanStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is left, and wait for its end."""
        await self._steps.aclose()


async def _stream(planner: SpeculativePlanner, task: Any, box: list[PlanResult]) -> AsyncGenerator[Step, None]:
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    running = asyncio.create_task(_Run(planner, task, steps.put_nowait).main())
    running.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        while (step := await steps.get()) is not None:
            yield step
        box.append(await running)
    finally:
        if not running.done():
            running.cancel()
            while not running.done():  # bounded by the planner's patience
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # seen: it was raised above, or nobody takes more steps


class _Run:
    """One episode: a queue of events, and a supervised task for each call."""

    def __init__(self, planner: SpeculativePlanner, task: Any, commit: Callable[[Step], None]) -> None:
        self.planner, self.commit = planner, commit
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.watchers: dict[int, tuple[asyncio.Task[None], asyncio.Future[None]]] = {}
        self.failures: dict[int, BaseException] = {}
        self.problems: list[Problem] = []
        self.agreed: list[bool | None] = []
        self.commits: list[float] = []
        self.lossless = True
        self.finish: Finish | None = None
        self.planned = 0.0
        self.broken: BaseException | None = None
        handling = no_tools if planner.tools is None else planner.tools.guard
        self.episode = Episode(task, limit=planner.limit, agree=self._agree, handling=handling, caps=planner.caps)

    def now(self) -> float:
        return asyncio.get_running_loop().time() - self.begin

    async def main(self) -> PlanResult:
        self.begin = asyncio.get_running_loop().time()
        try:
            self._handle(Started(self.now()))
            while not self.episode.closed:
                self._handle(await self.events.get())
                self.planner.trainer.poll()
        finally:
            await self._end()
        if self.broken is not None:
            raise self.broken
        assert self.finish is not None
        if self.finish.reason == "failed":
            assert self.finish.call is not None
            raise self.failures[self.finish.call]
        for error in self.planner.trainer.errors:
            self._problem("training", -1, repr(error))
        self.planner.trainer.errors.clear()
        episode = self.episode
        return PlanResult(
            episode.steps, self.finish.reason, self.agreed, self.lossless, episode.ledger,
            Timings(self.now(), self.planned, tuple(self.commits), alone(episode)), episode.rounds, episode.peak,
            episode.records, self.problems,
        )  # fmt: skip

    async def _end(self) -> None:
        """Stop what still runs and wait for it. Bounded: a supervised call ends within the planner's patience.

        A cancellation that arrives here is remembered and raised at the end: cleaning up is not left half done.
        """
        again: asyncio.CancelledError | None = None
        if not self.episode.closed:
            self._handle(Stop(self.now()))
        while self.watchers:
            try:
                await asyncio.wait([watch for watch, _ in self.watchers.values()])
            except asyncio.CancelledError as cancelled:
                again = cancelled
        while not self.events.empty():
            self._handle(self.events.get_nowait())
        if again is not None:
            raise again

    # The machine.

    def _handle(self, event: Event) -> None:
        for command in self.episode.handle(event):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        planner, now = self.planner, self.now()
        if isinstance(command, CallApproximate | CallTarget):
            role = "approximate" if isinstance(command, CallApproximate) else "target"
            self._start(command.call, role, functools.partial(planner.agents[role], command.state), command.state)
        elif isinstance(command, Ask):
            self._ask(command)
        elif isinstance(command, Execute):
            self._start(command.call, "tool", functools.partial(self._tool, command), command.state)
        elif isinstance(command, Cancel):
            if command.call in self.watchers:  # else its result is in the queue already
                stop = self.watchers[command.call][1]
                if not stop.done():
                    stop.set_result(None)
        elif isinstance(command, Commit):
            self.agreed.append(command.agreed)
            self.commits.append(now)
            self.lossless &= command.exact
            self.commit(command.state.steps[-1])
        elif isinstance(command, Record):
            try:
                planner.predictor.record(command.trajectory)
            except Exception as error:
                self._problem("predictor", len(self.commits) - 1, repr(error))
        else:
            self.finish, self.planned = command, now

    def _ask(self, command: Ask) -> None:
        if getattr(self.planner.predictor, "blocking", True):
            predict = functools.partial(self.planner.trainer.predict, command.state)
            self._start(command.call, "predictor", predict, command.state)
            return
        try:
            k = self.planner.predictor.predict(command.state)
            _check_k(k)
            self.events.put_nowait(Predicted(self.now(), command.call, k))
        except Exception as error:
            self._problem("predictor", command.state.index, repr(error))
            self.events.put_nowait(Failed(self.now(), command.call))

    async def _tool(self, command: Execute) -> Any:
        assert self.planner.tools is not None
        tool = self.planner.tools.find(command.action)
        if tool is None:
            return None
        if command.mode == "dry":
            if tool.dry is None:
                raise InternalError(f"a rehearsal of {command.action!r}, whose tool has none")
            return await tool.dry(command.action, command.state)
        return await tool.run(command.action, command.state)

    def _agree(self, guess: Any, truth: Any) -> bool:
        try:
            return bool(self.planner.agree(guess, truth))
        except Exception as error:
            self._problem("agree", len(self.commits), repr(error))
            return False

    def _problem(self, kind: str, step: int, text: str) -> None:
        self.problems.append(Problem(kind, step, text))

    # Calls.

    def _start(self, call: int, role: str, make: Callable[[], Awaitable[Any]], state: State) -> None:
        stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watch = asyncio.create_task(self._watch(call, role, make, state, stop), name=f"tilewise {role} {state.index}")
        self.watchers[call] = (watch, stop)
        watch.add_done_callback(lambda task: self._watched(task, call))

    async def _watch(
        self, call: int, role: str, make: Callable[[], Awaitable[Any]], state: State, stop: asyncio.Future[None]
    ) -> None:
        planner = self.planner

        def spent(meter: Meter) -> None:
            self._problem(role, state.index, "an attempt failed and is repeated")
            self.events.put_nowait(Spent(self.now(), call, meter.prompt, meter.generation))

        def orphan(task: asyncio.Task[Any]) -> None:
            planner.orphans.add(task)
            task.add_done_callback(planner.orphans.discard)
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._problem("orphan", state.index, f"a {role} call did not end within {planner.patience:g} s")
            warn_orphan(state.index, role, planner.patience)

        outcome = await supervise(
            make, stop, timeout=planner.timeouts.get(role), retry=planner.retries.get(role, Retry()),
            patience=planner.patience, check=_CHECKS[role], spent=spent if role in planner.agents else _free,
            orphan=orphan,
        )  # fmt: skip
        self.events.put_nowait(self._event(call, role, state, outcome))

    def _watched(self, task: asyncio.Task[None], call: int) -> None:
        """A watcher ended. That it was cancelled or raised is not foreseen: the episode must not wait for it."""
        del self.watchers[call]
        if task.cancelled() or task.exception() is not None:
            self.broken = self.broken or (None if task.cancelled() else task.exception())
            self.failures.setdefault(call, asyncio.CancelledError())
            self.events.put_nowait(Abandoned(self.now_or_never(), call))

    def now_or_never(self) -> float:
        """The time, also from a callback while the loop is being closed."""
        with contextlib.suppress(RuntimeError):
            return self.now()
        return 0.0

    def _event(self, call: int, role: str, state: State, outcome: Outcome) -> Event:
        now, meter = self.now(), outcome.meter or Meter()
        if outcome.swallowed and outcome.kind != "abandoned":
            self._problem("swallowed", state.index, f"a {role} call went on after its cancellation")
        if outcome.kind == "answer":
            if role == "tool":
                return Executed(now, call, outcome.value)
            return Predicted(now, call, outcome.value) if role == "predictor" else Finished(now, call, outcome.value)
        if outcome.kind == "failed":
            assert outcome.error is not None
            self.failures[call] = outcome.error
            self._problem(role, state.index, repr(outcome.error))
            return Failed(now, call, meter.prompt, meter.generation)
        if isinstance(outcome.late, Reply) and outcome.late.action is not None:
            return Finished(now, call, outcome.late)
        known = meter.known or role not in self.planner.agents  # a tool and a local predictor cost no tokens
        prompt, generation = (meter.prompt, meter.generation) if known else (None, None)
        kind = Abandoned if outcome.kind == "abandoned" else Cancelled
        return kind(now, call, prompt, generation)


def _check_reply(value: Any) -> None:
    if not isinstance(value, Reply):
        raise ReplyError(f"an agent returns tilewise.agents.Reply(action, ...), got {type(value).__name__}")
    if value.action is None:
        raise ReplyError("the agent's answer holds no action (Reply.action is None)")


def _check_k(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ReplyError(f"a predictor returns a number of steps, 1 or more; got {value!r}")


def _free(_: Meter) -> None:
    """Failed attempts of what costs no tokens."""


_CHECKS: dict[str, Callable[[Any], None]] = {
    "approximate": _check_reply, "target": _check_reply, "tool": lambda _: None, "predictor": _check_k,
}  # fmt: skip
