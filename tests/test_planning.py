"""The planner's machine in any order of events (P18 to P21, E19), and what its room imports."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilewise
from tilewise.errors import ArgumentError, InternalError
from tilewise.scheduler.planning import (
    TERMINATE,
    CallTarget,
    Cancel,
    Cancelled,
    Caps,
    Commit,
    Episode,
    Execute,
    Failed,
    Finish,
    Finished,
    Ledger,
    Predicted,
    Record,
    Reply,
    Spent,
    Started,
    State,
    Stop,
)

_spec = importlib.util.spec_from_file_location("planning_agents", Path(__file__).parent / "planning_agents.py")
assert _spec is not None and _spec.loader is not None
agents = sys.modules.setdefault("planning_agents", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(agents)
Pair, World, mix, orders = agents.Pair, agents.World, agents.mix, agents.orders


def issued(ledger: Ledger) -> dict[tuple[str, str], int]:
    return {key: count for key, count in ledger.issued.items() if count}


def random_case(source: random.Random, salt: int) -> tuple[Any, Any, Episode, Any]:
    """A pair of agents, a world, a machine and what the target alone would do."""
    length = source.randint(0, 6)
    wrong: dict[int, Any] = {}
    for step in range(length + 2):
        draw = source.random()
        if draw < 0.25:
            wrong[step] = f"wrong {source.randint(0, 3)}"
        elif draw < 0.32:
            wrong[step] = TERMINATE
        elif draw < 0.37:
            wrong[step] = None
    mode = source.choice(["none", "free", "dry", "guarded", "mixed"])

    def handling(action: Any) -> Any:
        return ["none", "free", "dry", "guarded"][mix(action) % 4] if mode == "mixed" else mode

    def tool(action: Any) -> Any:
        return None if handling(action) == "none" else mix(action, "seen") % 7

    def rehearse(action: Any) -> Any:
        return tool(action) if mix(action, "dry") % 2 else -1

    pair = Pair(length, wrong, salt=salt, last=source.random() < 0.3)
    limit = source.choice([1, 2, 4, 20])
    caps = Caps(source.choice([None, 1]), source.choice([None, 1, 2, 3]), source.choice([None, 1, 2, 3]))
    episode = Episode("task", limit=limit, caps=caps, handling=handling)
    weak = source.random() < 0.4

    def fail(role: str, state: State) -> bool:
        """Anything may fail that is not on the confirmed path."""
        if not weak or source.random() < 0.6:
            return False
        return role in ("approximate", "predictor") or (role == "target" and state.index > len(episode.steps))

    world = World(
        pair, source.randrange, lambda state: source.randint(1, 5), tool=tool, rehearse=rehearse, fail=fail,
        stubborn=source.random() < 0.5, duplicates=source.random() < 0.3,
    )  # fmt: skip
    return pair, world, episode, pair.alone("task", limit, tool)


@given(st.integers(0, 2**32 - 1))
def test_P18_the_plan_is_the_targets_whatever_arrives_when(salt: int) -> None:
    """Lengths, errors, budgets, caps, tools, failures off the confirmed path, late and doubled answers, at random."""
    for number in range(40):
        _, world, episode, alone = random_case(random.Random(salt + number), salt)
        world.run(episode)
        assert episode.steps == alone
        assert [commit.state.steps[-1] for commit in world.commits] == alone
        assert all(commit.exact for commit in world.commits)


@pytest.mark.parametrize("wrong", [{}, {0: "x"}, {1: "x"}, {0: "x", 2: "y"}, {1: TERMINATE}, {3: "on and on"}])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_P18_every_order_of_completion(k: int, wrong: dict[int, Any]) -> None:
    """All orders: at each of the first six arrivals any of the first three waiting answers comes next."""
    pair = Pair(3, wrong)
    alone = pair.alone("task")
    for order in orders(6, 3):
        arrivals = iter(order)
        world = World(pair, lambda n, arrivals=arrivals: min(next(arrivals, 0), n - 1), lambda state: k)
        episode = Episode("task")
        world.run(episode)
        assert episode.steps == alone and episode.ledger.balances()


def test_P18_all_permutations_of_answers_in_flight() -> None:
    """Three targets and the approximation's last call in flight at once: each of their orders gives the same plan."""
    pair = Pair(6, {1: "x", 3: "y"})
    for order in itertools.permutations(range(4)):
        ranks: dict[int, int] = {}
        world = World(pair, lambda n: 0, lambda state: 3)
        episode = Episode("task")
        world.obey(episode.handle(Started(0.0)))
        now = 0.0
        while world.waiting:
            now += 1.0
            guesses = [c for c in world.waiting if episode.records[c].role in ("approximate", "predictor")]
            late = sorted(world.waiting, key=lambda c: ranks.setdefault(c, order[c % 4] + 10 * (c // 4)))
            world.obey(episode.handle(world.answer(now, guesses[0] if guesses else late[0])))
        assert episode.steps == pair.alone("task")


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_P19_targets_in_flight_and_the_extra_calls_of_k_1(salt: int, k: int) -> None:
    source = random.Random(salt)
    wrong = {step: "x" for step in range(6) if source.random() < 0.4}
    world = World(Pair(5, wrong, salt=salt), source.randrange, lambda state: k)
    episode = Episode("task")
    world.run(episode)
    assert world.most_targets <= k  # not counting the ones that are being cancelled
    calls = [record.step for record in episode.records if record.role == "approximate"]
    if k == 1:
        assert len(calls) == len(set(calls))  # at most one a step
        assert [record.step for record in episode.records if record.role == "target"] == list(range(6))


@given(st.integers(0, 2**32 - 1))
def test_P20_nothing_after_a_mismatch_is_committed_and_every_call_ends(salt: int) -> None:
    for number in range(20):
        pair, world, episode, _ = random_case(random.Random(salt + number), salt)
        world.run(episode)
        for record in episode.records:
            assert record.end is not None and record.fate != "running"
        truth = [pair.truth(State("task", tuple(episode.steps[:i]))).action for i in range(len(episode.steps))]
        assert [step.action for step in episode.steps] == truth
        # A call that was commanded before a mismatch was committed, for a later step, is not in the plan.
        broken = [commit.state.index - 1 for commit in world.commits if commit.agreed is False]
        for step in broken:
            ends = [r.end for r in episode.records if r.step == step and r.role == "target" and r.fate == "kept"]
            later = [r for r in episode.records if r.step > step and r.start < max(ends) and r.role == "target"]
            assert all(r.fate != "kept" for r in later)


@given(st.integers(0, 2**32 - 1))
def test_P21_the_ledger_balances(salt: int) -> None:
    """Against what the agents of the test counted themselves, cancelled and failed calls among it."""
    for number in range(40):
        _, world, episode, _ = random_case(random.Random(salt + number), salt)
        world.run(episode)
        ledger = episode.ledger
        assert ledger.balances() and ledger.estimated_calls == 0
        assert issued(ledger) == {key: count for key, count in world.issued.items() if count}
        for role in ("approximate", "target", "predictor"):
            for kind in ("prompt", "generation"):
                fates = sum(ledger.total(role=role, kind=kind, fate=f) for f in ("kept", "completed", "cancelled"))
                assert fates == ledger.issued.get((role, kind), 0)
        # The same by the calls' own records.
        assert sum(r.prompt_tokens + r.generation_tokens for r in episode.records) == ledger.total()


def test_P21_a_cancelled_call_that_nobody_measured_is_estimated_and_said_to_be() -> None:
    ledger = Ledger()
    ledger.end(0, "target", 120, 30)
    assert not ledger.balances()  # its fate is open
    ledger.settle(0, "kept")
    ledger.cancel(1, "target", None, None)  # the last prompt that is known
    ledger.cancel(2, "approximate", None, None)  # nothing is known
    ledger.waste("approximate", 7, 0)
    assert (ledger.estimated_calls, ledger.estimated_tokens) == (2, 120)
    assert ledger.total(fate="cancelled") == 120 and ledger.total(fate="completed") == 7 and ledger.balances()
    assert ledger.cost({("target", "prompt"): 2.0, ("target", "generation"): 10.0}) == 2 * 240 + 300
    whole = Ledger()
    whole.add(ledger)
    whole.add(ledger)
    assert whole.balances() and whole.total() == 2 * ledger.total()
    with pytest.raises(InternalError):
        ledger.settle(0, "kept")
    with pytest.raises(ArgumentError, match="role"):
        ledger.end(9, "judge", 1, 1)  # type: ignore[arg-type]


def start(k: int | None = 3, **options: Any) -> tuple[Episode, list[Any]]:
    """A machine whose first step is under way: calls 1 (target) and 2 (approximation)."""
    episode = Episode("task", **options)
    commands = episode.handle(Started(0.0))
    if k is not None:
        commands += episode.handle(Predicted(0.0, 0, k))
    return episode, commands


def kinds(commands: list[Any]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_E19_the_third_target_answers_before_the_first() -> None:
    episode, _ = start()
    for call, action in ((2, "a"), (4, "b"), (6, "c")):  # A's three guesses
        episode.handle(Finished(1.0, call, Reply(action)))
    assert episode.handle(Finished(2.0, 5, Reply("other"))) == []  # the third step differs; nothing may be committed
    out = episode.handle(Finished(3.0, 1, Reply("a")))
    assert [command.state.index for command in out if isinstance(command, Commit)] == [1]
    out = episode.handle(Finished(4.0, 3, Reply("not b")))  # an earlier mismatch moves the cut to the left
    assert [step.action for step in episode.steps] == ["a", "not b"]
    record = next(command for command in out if isinstance(command, Record))
    assert [state.index for state in record.trajectory.states] == [0, 1]
    assert episode.records[5].fate == "completed"


def test_nothing_begins_behind_a_mismatch_before_it_is_committed() -> None:
    episode, _ = start(k=4)
    episode.handle(Finished(1.0, 2, Reply("a")))
    episode.handle(Finished(1.5, 4, Reply("b")))
    out = episode.handle(Finished(2.0, 3, Reply("not b")))  # the second step differs, the first is open
    assert kinds(out) == ["Cancel", "Cancel"]
    out = episode.handle(Finished(3.0, 1, Reply("a")))
    assert kinds(out) == ["Commit", "Commit", "Record", "Ask", "CallTarget", "CallApproximate"]


def test_a_target_that_overtakes_ends_the_guess_and_planning_goes_on_from_its_answer() -> None:
    episode, _ = start(k=4)
    episode.handle(Finished(1.0, 2, Reply("a")))
    out = episode.handle(Finished(2.0, 3, Reply("b")))  # of the second step, whose guess and whose past are open
    assert kinds(out) == ["Cancel", "CallTarget", "CallApproximate"] and out[0].call == 4
    assert out[1].state.steps[1].action == "b"
    out = episode.handle(Finished(3.0, 1, Reply("a")))
    assert [command.agreed for command in out if isinstance(command, Commit)] == [True, None]
    assert episode.censored == 1  # whether the approximation would have agreed is not known


def test_E19_the_approximation_ends_early() -> None:
    episode, _ = start()
    assert episode.handle(Finished(1.0, 2, Reply(TERMINATE))) == []  # nothing is speculated behind it
    out = episode.handle(Finished(2.0, 1, Reply("go on")))
    assert kinds(out)[0] == "Commit" and episode.reason is None and episode.steps[0].action == "go on"


def test_E19_the_target_ends_while_the_approximation_goes_on() -> None:
    episode, _ = start()
    episode.handle(Finished(1.0, 2, Reply("a")))
    episode.handle(Finished(1.5, 4, Reply("b")))
    out = episode.handle(Finished(2.0, 3, Reply(TERMINATE)))  # of the second step, while the first is open
    assert all(isinstance(command, Cancel) for command in out) and len(out) == 2 and episode.reason is None
    out = episode.handle(Finished(3.0, 1, Reply("a")))
    assert episode.reason == "terminated" and [step.action for step in episode.steps] == ["a"]
    assert isinstance(out[-1], Finish)


def test_E19_answers_that_cannot_be_read_and_failures() -> None:
    episode, _ = start()
    assert episode.handle(Finished(1.0, 2, Reply(None, 40, 2))) == []  # ends the speculation of the step
    assert episode.ledger.total(role="approximate", fate="completed") == 42
    out = episode.handle(Finished(2.0, 1, Reply("a")))
    assert kinds(out)[0] == "Commit" and "CallApproximate" in kinds(out)  # and speculation goes on at the next
    episode, _ = start()
    episode.handle(Finished(1.0, 2, Reply("a")))
    assert episode.handle(Failed(2.0, 3)) == []  # the target, on a step that is not confirmed
    out = episode.handle(Finished(3.0, 1, Reply("a")))
    assert any(isinstance(command, CallTarget) and command.state.index == 1 for command in out)  # asked again
    call = next(command.call for command in out if isinstance(command, CallTarget))
    out = episode.handle(Failed(4.0, call))
    assert episode.reason == "failed" and isinstance(out[-1], Finish) and out[-1].call == call
    episode, _ = start()
    assert "Finish" in kinds(episode.handle(Failed(1.0, 1)))


def test_E19_a_call_that_cancels_itself_is_a_failure() -> None:
    episode, _ = start()
    episode.handle(Cancelled(1.0, 2, 5, 0))
    assert episode.records[2].failed and episode.reason is None
    assert episode.handle(Cancelled(2.0, 1, 5, 0))[-1] == Finish("failed", 1)


def test_E19_one_call_at_a_time_is_the_target_alone() -> None:
    """Cap 1: nothing is speculated, nothing is wasted."""
    for k in (1, 4):
        world = World(Pair(4, {2: "x"}), lambda n: 0, lambda state, k=k: k)
        episode = Episode("task", caps=Caps(total=1))
        world.run(episode)
        assert episode.steps == world.pair.alone("task") and episode.peak == 1
        assert episode.ledger.total(role="approximate") == 0
        assert episode.ledger.total(fate="kept") == episode.ledger.total()


@given(st.integers(0, 2**32 - 1), st.sampled_from([Caps(total=2), Caps(total=3), Caps(target=1), Caps(1, 2, 3)]))
def test_E19_caps_hold_while_cancelled_calls_linger(salt: int, caps: Caps) -> None:
    source = random.Random(salt)
    world = World(Pair(6, {1: "x", 4: "y"}), source.randrange, lambda state: 4, stubborn=True)
    episode = Episode("task", caps=caps)
    world.obey(episode.handle(Started(0.0)))
    while world.waiting:
        roles = [episode.records[call].role for call in world.waiting]
        count = {role: roles.count(role) for role in ("approximate", "target")}
        assert sum(count.values()) <= (caps.total or 99) and count["target"] <= (caps.target or 99)
        calls = sorted(world.waiting)
        world.obey(episode.handle(world.answer(1.0, calls[source.randrange(len(calls))])))
    assert episode.steps == world.pair.alone("task")


def test_E19_side_effects_happen_once_and_only_for_confirmed_steps() -> None:
    for seed in range(200):
        source = random.Random(seed)
        pair = Pair(5, {step: "x" for step in range(5) if source.random() < 0.3})
        world = World(pair, source.randrange, lambda state: 4, tool=lambda a: mix(a), rehearse=lambda a: -1)
        handling = "guarded" if seed % 2 else "dry"
        episode = Episode("task", handling=lambda action, handling=handling: handling)
        world.run(episode)
        real = [action for mode, action in world.executed if mode == "real"]
        assert real == [step.action for step in pair.alone("task", 20, lambda a: mix(a))]  # once, in order
        assert all(mode in ("real", "dry") for mode, _ in world.executed)
        if handling == "guarded":
            assert all(mode == "real" for mode, _ in world.executed)
        assert [step.observation for step in episode.steps] == [mix(action) for action in real]


def test_a_right_rehearsal_keeps_the_speculation_and_a_wrong_one_cuts_it() -> None:
    for right in (True, False):
        episode = Episode("task", handling=lambda action: "dry")
        episode.handle(Started(0.0))
        episode.handle(Predicted(0.0, 0, 3))
        out = episode.handle(Finished(1.0, 2, Reply("a")))
        assert isinstance(out[0], Execute) and out[0].mode == "dry"
        out = episode.handle(agents.Executed(1.1, out[0].call, "seen"))
        assert kinds(out) == ["CallTarget", "CallApproximate"] and out[0].state.steps[0].observation == "seen"
        out = episode.handle(Finished(2.0, 1, Reply("a")))
        assert kinds(out) == ["Execute"] and out[0].mode == "real" and not episode.steps
        out = episode.handle(agents.Executed(3.0, out[0].call, "seen" if right else "something else"))
        assert kinds(out)[: 1 if right else 3] == (["Commit"] if right else ["Cancel", "Cancel", "Commit"])


def test_fuzzy_agreement_keeps_the_guess_and_says_so() -> None:
    episode, _ = start(agree=lambda guess, truth: guess.lower() == truth.lower())
    episode.handle(Finished(1.0, 2, Reply("A")))
    out = episode.handle(Finished(2.0, 1, Reply("a")))
    commit = next(command for command in out if isinstance(command, Commit))
    assert commit.agreed and not commit.exact and episode.steps[0].action == "A"


def test_a_late_prediction_counts_from_where_it_was_asked_for() -> None:
    episode, _ = start(k=None)
    episode.handle(Finished(1.0, 2, Reply("a")))
    out = episode.handle(Finished(2.0, 1, Reply("a")))  # the round of one step is over, the predictor still thinks
    assert "Ask" not in kinds(out)
    out = episode.handle(Predicted(3.0, 0, 3))  # steps 0, 1, 2: two are left
    assert episode.rounds == [None, 2]
    assert episode.handle(Finished(3.5, 4, Reply("b"))) != []


def test_a_stop_cancels_everything_and_the_account_closes() -> None:
    episode, _ = start()
    episode.handle(Finished(1.0, 2, Reply("a", 50, 5)))
    out = episode.handle(Stop(1.5))
    assert kinds(out) == ["Cancel", "Cancel", "Cancel", "Finish"]
    for command in out[:-1]:
        assert not episode.closed
        episode.handle(Cancelled(2.0, command.call, 10, 0))
    assert episode.closed and episode.ledger.balances()
    assert episode.ledger.total(fate="completed") == 55 and episode.ledger.total(fate="cancelled") == 30


def test_late_doubled_and_unknown_events_are_counted() -> None:
    episode, _ = start()
    for event in (Started(1.0), Predicted(1.0, 0, 2), Finished(1.0, 99, Reply("a")), Predicted(1.0, 1, 2)):
        assert episode.handle(event) == []
    assert episode.ignored == 4
    episode.handle(Spent(1.0, 2, 30, 1))  # a failed attempt of the approximation
    assert episode.ledger.total(role="approximate", fate="completed") == 31


def test_bad_events_and_arguments() -> None:
    episode, _ = start()
    for event in (Finished(math.nan, 1, Reply("a")), Finished(math.inf, 1, Reply("a")), Predicted(1.0, 0, 0)):
        with pytest.raises(ArgumentError):
            episode.handle(event)
    with pytest.raises(ArgumentError, match="limit"):
        Episode("task", limit=0)
    with pytest.raises(ArgumentError, match="total"):
        Caps(total=0)
    with pytest.raises(ArgumentError, match="prompt_tokens"):
        Reply("a", -1)


def test_the_room_does_no_input_or_output() -> None:
    """No module of planning reads a clock, sleeps, spawns or imports the driver."""
    folder = Path(tilewise.__file__).parent / "scheduler" / "planning"
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 8
    allowed = {
        "__future__", "collections", "copy", "dataclasses", "heapq", "itertools", "math", "numpy", "re", "tilewise",
        "typing", "zlib",
    }  # fmt: skip
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in allowed, f"{file.name} imports {name}"
                inside = name.startswith(("tilewise.scheduler.planning", "tilewise.errors"))
                assert inside or not name.startswith("tilewise"), f"{file.name} imports {name}"
