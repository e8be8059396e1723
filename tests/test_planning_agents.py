"""The asyncio driver: the target's plan, no orphan call, no swallowed cancellation (P18, P20, P21, P24, E19)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import random
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewise.agents import (
    TERMINATE,
    Caps,
    FixedPredictor,
    OrphanedCallWarning,
    PlanResult,
    Reply,
    Retry,
    SpeculativePlanner,
    State,
    Tool,
    Toolbox,
    ValuePredictor,
    report_tokens,
    similar,
)
from tilewise.agents.planner import PlanStream
from tilewise.errors import ArgumentError, ReplyError

_spec = importlib.util.spec_from_file_location("planning_agents", Path(__file__).parent / "planning_agents.py")
assert _spec is not None and _spec.loader is not None
scripted = sys.modules.setdefault("planning_agents", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(scripted)
Pair, mix = scripted.Pair, scripted.mix

TICK = 0.004


def alone_in_loop() -> bool:
    """Whether the running task is the only one that has not ended."""
    return [task for task in asyncio.all_tasks() if not task.done()] == [asyncio.current_task()]


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run in a fresh loop, and see that nothing is left in it."""

    async def checked() -> Any:
        try:
            async with asyncio.timeout(60):  # (wait_for would put main into a task of its own)
                return await main()
        finally:
            await asyncio.sleep(0)
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
            assert not left, left

    return asyncio.run(checked())


def sleepy(answer: Callable[[State], Reply], seconds: Callable[[State], float]) -> Callable[[State], Awaitable[Reply]]:
    async def agent(state: State) -> Reply:
        await asyncio.sleep(seconds(state))
        return answer(state)

    return agent


def planner_of(pair: Any, predictor: Any = 3, *, source: random.Random | None = None, **options: Any):
    draw = (source or random.Random(0)).random
    guess = sleepy(pair.guess, lambda state: TICK * draw())
    return SpeculativePlanner(guess, sleepy(pair.truth, lambda state: 3 * TICK * draw()), predictor, **options)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_P18_the_plan_is_the_targets_with_real_latencies(k: int) -> None:
    source = random.Random(k)
    for salt in range(4):
        pair = Pair(5, {step: "x" for step in range(6) if source.random() < 0.3}, salt=salt)
        result = run(lambda pair=pair: planner_of(pair, k, source=source).run("task"))
        assert result.steps == pair.alone("task") and result.reason == "terminated"
        assert result.lossless and result.ledger.balances() and not result.problems
        assert len(result.agreed) == len(result.steps) == len(result.timings.commits)
        assert result.timings.planned <= result.timings.total and result.timings.speedup > 0


def test_speculation_is_faster_where_guesses_are_right() -> None:
    """By order of events and not by the clock: the target is asked for step 3 before it has answered step 0."""
    asked: list[tuple[str, int]] = []
    pair = Pair(4)
    release = asyncio.Event

    async def main() -> PlanResult:
        gate = release()

        async def target(state: State) -> Reply:
            asked.append(("ask", state.index))
            if state.index == 3:
                gate.set()
            await gate.wait()
            asked.append(("answer", state.index))
            return pair.truth(state)

        async def approximate(state: State) -> Reply:
            return pair.guess(state)

        return await SpeculativePlanner(approximate, target, 5).run("task")

    assert run(main).steps == pair.alone("task")
    assert asked.index(("ask", 3)) < asked.index(("answer", 0))


def test_cancelling_a_run_cancels_every_call() -> None:
    """P20: no task is left, every callee saw its cancellation, and the caller gets CancelledError."""
    began: list[str] = []
    ended: list[str] = []

    async def hang(role: str, state: State) -> Reply:
        began.append(role)
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            await asyncio.sleep(TICK)  # a clean-up that takes its time
            ended.append(role)
            raise
        raise AssertionError

    pair = Pair(5)

    async def approximate(state: State) -> Reply:
        return pair.guess(state) if state.index < 2 else await hang("approximate", state)

    async def main() -> None:
        planner = SpeculativePlanner(approximate, lambda state: hang("target", state), 4)
        task = asyncio.create_task(planner.run("task"))
        while len(began) < 4:
            await asyncio.sleep(TICK)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled() and alone_in_loop()
        assert sorted(ended) == sorted(began) == ["approximate", "target", "target", "target"]

    run(main)


def test_cancelling_twice_does_not_leave_the_clean_up_half_done() -> None:
    ended = []

    async def stubborn(state: State) -> Reply:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5 * TICK)
            ended.append(state.index)
        raise AssertionError

    async def main() -> None:
        task = asyncio.create_task(SpeculativePlanner(stubborn, stubborn, 2).run("task"))
        await asyncio.sleep(TICK)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(TICK / 2)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [0, 0] and alone_in_loop()

    run(main)


def test_a_timeout_around_the_run_works() -> None:
    async def slow(state: State) -> Reply:
        await asyncio.sleep(1000)
        raise AssertionError

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * TICK):
                await SpeculativePlanner(slow, slow, 2).run("task")
        assert alone_in_loop()

    run(main)


def test_E19_a_retry_loop_that_swallows_cancellation_is_ended_and_reported() -> None:
    """The loop of published agent code: a catch-all around the call, which asks again when it is cancelled."""
    pair = Pair(3, {0: "x"})
    tries = []

    async def target(state: State) -> Reply:
        if state.index > 0 and state.steps[0].action == "x":  # a step behind the wrong guess
            for attempt in range(3):
                try:
                    tries.append(attempt)
                    await asyncio.sleep(1000)
                except BaseException:
                    continue
            return pair.truth(state)
        await asyncio.sleep(TICK)
        return pair.truth(state)

    async def approximate(state: State) -> Reply:
        return pair.guess(state)

    async def main() -> PlanResult:
        result = await SpeculativePlanner(approximate, target, 3, patience=20 * TICK).run("task")
        assert alone_in_loop()
        return result

    result = run(main)
    assert result.steps == pair.alone("task") and result.ledger.balances()
    assert len(tries) >= 2
    assert {problem.kind for problem in result.problems} == {"swallowed"}


def test_E19_a_call_that_never_ends_is_reported_and_nobody_waits_for_it() -> None:
    pair = Pair(3, {0: "x"})
    freed = []

    async def target(state: State) -> Reply:
        if state.index == 1 and state.steps[0].action == "x":
            while not freed:  # deaf
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(TICK)
        await asyncio.sleep(TICK)
        return pair.truth(state)

    async def approximate(state: State) -> Reply:
        return pair.guess(state)

    async def main() -> PlanResult:
        planner = SpeculativePlanner(approximate, target, 2, patience=4 * TICK)
        with pytest.warns(OrphanedCallWarning, match="target call of step 1"):
            result = await planner.run("task")
        assert len(planner.orphans) == 1
        freed.append(True)
        while planner.orphans:
            await asyncio.sleep(TICK)
        assert alone_in_loop()
        return result

    result = run(main)
    assert result.steps == pair.alone("task") and result.ledger.balances()
    assert "orphan" in {problem.kind for problem in result.problems}
    assert any(record.abandoned for record in result.records)


def test_retries_never_retry_a_cancellation() -> None:
    calls = []

    async def target(state: State) -> Reply:
        calls.append(state.index)
        await asyncio.sleep(1000)
        raise AssertionError

    async def main() -> None:
        retry = Retry(attempts=5, delay=0.0)
        planner = SpeculativePlanner(target, target, 1, target_retry=retry, approximate_retry=retry)
        task = asyncio.create_task(planner.run("task"))
        await asyncio.sleep(TICK)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(calls) == 2 and alone_in_loop()

    run(main)


def test_retries_back_off_and_a_stop_ends_the_pause() -> None:
    """The target fails twice and then answers; the approximation would pause for an hour and is not waited for."""
    pair, fails = Pair(2), [ConnectionError("503"), ConnectionError("503")]

    async def target(state: State) -> Reply:
        report_tokens(prompt=11)
        if fails:
            raise fails.pop()
        return pair.truth(state)

    async def approximate(state: State) -> Reply:
        raise ConnectionError("never")

    planner = SpeculativePlanner(
        approximate,
        target,
        2,
        target_retry=Retry(3, delay=TICK / 4),
        approximate_retry=Retry(9, delay=3600.0, most=1e9),
    )
    result = run(lambda: planner.run("task"))
    assert result.steps == pair.alone("task") and result.ledger.balances()
    assert result.ledger.total(role="target", fate="completed") == 22  # what the failed attempts reported
    assert Retry(attempts=4, delay=1.0, factor=3.0, most=5.0).pause(3) == 5.0


def test_exceptions_of_the_target_come_out_and_those_of_the_approximation_do_not() -> None:
    class Broken(Exception):
        pass

    pair = Pair(4, {1: "x"})

    async def bad(state: State) -> Reply:
        if state.index == 2:
            raise Broken("at two")
        await asyncio.sleep(TICK)
        return pair.truth(state)

    async def approximate(state: State) -> Reply:
        await asyncio.sleep(TICK / 4)
        if state.index == 1:
            raise Broken("a guess")
        return pair.guess(state)

    async def main() -> None:
        with pytest.raises(Broken, match="at two"):
            await SpeculativePlanner(approximate, bad, 4).run("task")
        assert alone_in_loop()
        result = await planner_of(pair, 4).run("task")
        assert result.steps == pair.alone("task")
        planner = SpeculativePlanner(approximate, sleepy(pair.truth, lambda state: TICK), 4)
        result = await planner.run("task")
        assert result.steps == pair.alone("task")
        assert {(problem.kind, problem.step) for problem in result.problems} == {("approximate", 1)}

    run(main)


def test_a_target_that_only_fails_behind_wrong_guesses_does_not_end_the_plan() -> None:
    pair = Pair(3, {0: "x"})

    async def target(state: State) -> Reply:
        if any(step.action == "x" for step in state.steps):
            raise RuntimeError("no such place")
        await asyncio.sleep(TICK)
        return pair.truth(state)

    async def approximate(state: State) -> Reply:
        return pair.guess(state)

    result = run(lambda: SpeculativePlanner(approximate, target, 3).run("task"))
    assert result.steps == pair.alone("task")


def test_E19_replies_that_cannot_be_used() -> None:
    pair = Pair(2)

    async def empty(state: State) -> Any:
        return Reply(None, 40, 2)

    async def text(state: State) -> Any:
        return "search(x)"

    async def main() -> None:
        truth = sleepy(pair.truth, lambda state: TICK)
        for bad in (empty, text):
            result = await SpeculativePlanner(bad, truth, 3).run("task")
            assert result.steps == pair.alone("task") and result.problems[0].kind == "approximate"
            assert result.ledger.balances()
            with pytest.raises(ReplyError, match="Reply"):
                await SpeculativePlanner(sleepy(pair.guess, lambda state: 0.0), bad, 3).run("task")
            assert alone_in_loop()

    run(main)


def test_time_outs() -> None:
    pair = Pair(2)

    async def stuck(state: State) -> Reply:
        await asyncio.sleep(1000)
        raise AssertionError

    async def main() -> None:
        truth = sleepy(pair.truth, lambda state: 4 * TICK)
        result = await SpeculativePlanner(stuck, truth, 3, approximate_timeout=TICK).run("task")
        assert result.steps == pair.alone("task")
        assert "TimeoutError" in result.problems[0].text
        with pytest.raises(TimeoutError, match="took more than"):
            await SpeculativePlanner(stuck, stuck, 3, target_timeout=TICK).run("task")
        assert alone_in_loop()

    run(main)


def test_P21_cancelled_calls_report_what_they_spent() -> None:
    pair = Pair(3, {0: "x"})
    spent = {"prompt": 0, "generation": 0}

    async def metered(state: State, answer: Reply, seconds: float) -> Reply:
        report_tokens(prompt=answer.prompt_tokens)
        spent["prompt"] += answer.prompt_tokens
        await asyncio.sleep(seconds)
        spent["generation"] += answer.generation_tokens
        return answer

    async def main() -> PlanResult:
        return await SpeculativePlanner(
            lambda state: metered(state, pair.guess(state), TICK / 4),
            lambda state: metered(state, pair.truth(state), 4 * TICK),
            4,
        ).run("task")

    ledger = run(main).ledger
    assert ledger.balances() and ledger.estimated_calls == 0
    assert {kind: ledger.total(kind=kind) for kind in spent} == spent
    assert ledger.total(fate="cancelled") > 0


def test_caps_are_kept_by_real_calls() -> None:
    pair, now, most = Pair(5, {2: "x"}), [0], [0]

    def counted(answer: Callable[[State], Reply]) -> Callable[[State], Awaitable[Reply]]:
        async def agent(state: State) -> Reply:
            now[0] += 1
            most[0] = max(most[0], now[0])
            try:
                await asyncio.sleep(TICK / 2)
                return answer(state)
            finally:
                now[0] -= 1

        return agent

    for total in (1, 2, 3):
        most[0] = 0
        planner = SpeculativePlanner(counted(pair.guess), counted(pair.truth), 4, caps=Caps(total=total))
        result = run(lambda planner=planner: planner.run("task"))
        assert result.steps == pair.alone("task") and most[0] <= total
        assert result.peak == total or total == 3


def test_the_guard_of_side_effects() -> None:
    pair = Pair(4, {1: "book(wrong)"})
    done: list[tuple[str, Any]] = []

    def name(action: Any) -> str:
        return "book" if str(action).startswith("book") or mix(action) % 2 else "look"

    async def look(action: Any, state: State) -> Any:
        done.append(("look", action))
        return mix(action)

    async def book(action: Any, state: State) -> Any:
        done.append(("book", action))
        return mix(action)

    async def rehearse(action: Any, state: State) -> Any:
        done.append(("dry", action))
        return mix(action)

    for dry in (None, rehearse):
        done.clear()
        tools = Toolbox({"look": Tool(look, "pure"), "book": Tool(book, dry=dry)}, name)
        result = run(lambda tools=tools: planner_of(pair, 4, tools=tools).run("task"))
        assert result.steps == pair.alone("task", 20, lambda action: mix(action))
        booked = [action for kind, action in done if kind == "book"]
        assert booked == [step.action for step in result.steps if name(step.action) == "book"]
        assert ("book", "book(wrong)") not in done
        assert (dry is None) == all(kind != "dry" for kind, _ in done)


def test_a_confirmed_tool_that_fails_ends_the_run_and_an_unconfirmed_one_does_not() -> None:
    pair = Pair(3, {1: "other"})

    async def tool(action: Any, state: State) -> Any:
        if action == "other":
            raise LookupError("guessed")
        return mix(action)

    async def broken(action: Any, state: State) -> Any:
        raise LookupError(action)

    box = Toolbox({"t": Tool(tool, "pure")}, lambda action: "t")
    result = run(lambda: planner_of(pair, 4, tools=box).run("task"))
    assert result.steps == pair.alone("task", 20, lambda action: mix(action))
    with pytest.raises(LookupError):
        run(lambda: planner_of(pair, 4, tools=Toolbox({"t": Tool(broken)}, lambda a: "t")).run("task"))
    with pytest.raises(ArgumentError, match="there is look"):
        run(lambda: planner_of(pair, 4, tools=Toolbox({"look": Tool(broken)})).run("task"))


def test_fuzzy_agreement_is_flagged() -> None:
    async def target(state: State) -> Reply:
        await asyncio.sleep(TICK)
        return Reply(TERMINATE if state.index == 2 else f"search(flights to Rome {state.index})")

    async def approximate(state: State) -> Reply:
        return Reply(TERMINATE if state.index == 2 else f"search(flight to Rome {state.index})")

    result = run(lambda: SpeculativePlanner(approximate, target, 3, agree=similar(0.5)).run("task"))
    assert not result.lossless and result.actions[0] == "search(flight to Rome 0)" and all(result.agreed)
    exact = run(lambda: SpeculativePlanner(approximate, target, 3).run("task"))
    assert exact.lossless and exact.actions[0] == "search(flights to Rome 0)"

    def raises(guess: Any, truth: Any) -> bool:
        raise KeyError("no")

    broken = run(lambda: SpeculativePlanner(approximate, target, 3, agree=raises).run("task"))
    assert broken.actions == exact.actions and {problem.kind for problem in broken.problems} == {"agree"}


def test_actions_that_are_arrays_are_planned_and_not_called_lossless_by_mistake() -> None:
    async def agent(state: State) -> Reply:
        await asyncio.sleep(0)
        return Reply(TERMINATE if state.index == 2 else np.arange(3) + state.index)

    agree = lambda a, b: bool(np.array_equal(a, b))  # noqa: E731
    result = run(lambda: SpeculativePlanner(agent, agent, 3, agree=agree).run("task"))
    assert len(result.steps) == 2 and result.actions[1].tolist() == [1, 2, 3]


def test_a_stream_gives_each_step_when_it_is_final_and_then_the_result() -> None:
    pair = Pair(5, {2: "x"})

    async def main() -> None:
        stream = planner_of(pair, 3).stream("task")
        assert isinstance(stream, PlanStream) and stream.result is None
        steps = [step async for step in stream]
        assert steps == pair.alone("task")
        assert stream.result is not None and stream.result.steps == steps

    run(main)


@pytest.mark.parametrize("how", ["with", "collect", "cancel"])
def test_leaving_a_stream_early_cancels_the_planning(how: str) -> None:
    pair = Pair(50)

    async def take_one(planner: SpeculativePlanner) -> None:
        if how == "with":
            async with planner.stream("task") as steps:
                async for _ in steps:
                    break
            assert alone_in_loop()
        else:
            async for _ in planner.stream("task"):
                if how == "collect":
                    break

    async def main() -> None:
        task = asyncio.create_task(take_one(planner_of(pair, 3, limit=60)))
        if how == "cancel":
            await asyncio.sleep(4 * TICK)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancel")
        gc.collect()
        for _ in range(100):
            await asyncio.sleep(TICK)
            if alone_in_loop():
                break
        assert alone_in_loop()

    async def direct() -> None:
        await take_one(planner_of(pair, 3, limit=60))

    run(direct if how == "with" else main)


def test_a_stream_raises_what_the_target_raised() -> None:
    async def target(state: State) -> Reply:
        if state.index == 1:
            raise ValueError("at one")
        return Reply("a")

    async def main() -> None:
        stream = SpeculativePlanner(target, target, 1).stream("task")
        assert (await anext(stream)).action == "a"
        with pytest.raises(ValueError, match="at one"):
            await anext(stream)
        assert alone_in_loop()

    run(main)


class Gated(ValuePredictor):
    """Training waits at a gate; the test opens it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate, self.began = threading.Event(), threading.Event()

    def fit(self, job: Any) -> Any:
        self.began.set()
        assert self.gate.wait(60)
        return super().fit(job)


def test_P24_planning_never_waits_for_training() -> None:
    """Whole episodes finish while the first training is held; then its copy goes into service."""
    predictor = Gated()
    pair = Pair(6, {1: "x", 4: "y"})
    planner = planner_of(pair, predictor)

    async def main() -> None:
        for _ in range(3):
            result = await planner.run("task")
            assert result.steps == pair.alone("task")
        assert predictor.began.is_set() and predictor.updates == 0
        predictor.gate.set()
        planner.trainer.settle(60)
        assert planner.trainer.updates >= 1 and predictor.updates == planner.trainer.updates

    run(main)
    planner.close()


def test_P24_a_training_that_raises_is_reported_and_planning_goes_on() -> None:
    class Broken(ValuePredictor):
        def fit(self, job: Any) -> Any:
            raise FloatingPointError("no")

    pair = Pair(6, {1: "x"})
    planner = planner_of(pair, Broken())

    async def main() -> list[PlanResult]:
        results = [await planner.run("task")]
        planner.trainer.settle(60)
        results.append(await planner.run("task"))
        return results

    results = run(main)
    assert all(result.steps == pair.alone("task") for result in results)
    assert "training" in {problem.kind for result in results for problem in result.problems}


def test_a_predictor_in_a_thread_and_one_that_fails() -> None:
    class Slow(FixedPredictor):
        blocking = True

        def predict(self, state: State) -> int:
            assert threading.current_thread() is not threading.main_thread()
            return 3

    class Bad(FixedPredictor):
        def predict(self, state: State) -> int:
            return 0

    pair = Pair(4, {1: "x"})
    slow = Slow(3)
    slow.blocking = True
    result = run(lambda: planner_of(pair, slow).run("task"))
    assert result.steps == pair.alone("task") and 3 in result.rounds
    result = run(lambda: planner_of(pair, Bad(1)).run("task"))
    assert result.steps == pair.alone("task") and result.problems[0].kind == "predictor"
    assert result.rounds[0] is None


def test_many_episodes_at_once_on_one_planner() -> None:
    pair = Pair(4, {1: "x"})
    planner = planner_of(pair, ValuePredictor())

    async def main() -> None:
        results = await asyncio.gather(*(planner.run(f"task {number}") for number in range(8)))
        assert all(result.steps == pair.alone(f"task {number}") for number, result in enumerate(results))

    run(main)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a: SpeculativePlanner(None, a), "approximate"),  # type: ignore[arg-type]
        (lambda a: SpeculativePlanner(a, a, patience=0), "patience"),
        (lambda a: SpeculativePlanner(a, a, target_timeout=-1), "target_timeout"),
        (lambda a: SpeculativePlanner(a, a, limit=0), "limit"),
        (lambda a: SpeculativePlanner(a, a, 0), "k is a number"),
        (lambda a: Tool(a, "none"), "effects"),  # type: ignore[arg-type]
        (lambda a: Retry(0), "attempts"),
        (lambda a: Retry(delay=-1), "delay"),
        (lambda a: Retry(on=(asyncio.CancelledError,)), "Exception"),  # type: ignore[arg-type]
        (lambda a: similar(2), "threshold"),
        (lambda a: report_tokens(prompt=-1), "report_tokens"),
    ],
)
def test_arguments_are_checked(make: Callable[[Any], Any], words: str) -> None:
    async def agent(state: State) -> Reply:
        return Reply(TERMINATE)

    with pytest.raises(ArgumentError, match=words):
        make(agent)
