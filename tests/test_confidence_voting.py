"""Votes, online stopping and the study of both."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.errors import ArgumentError, ShapeError
from tilewise.scheduler.confidence import ConfidenceMonitor, trace_confidence
from tilewise.scheduler.confidence_study import POLICIES, Policy, Study, make_question, run_online, simulate
from tilewise.scheduler.stopping import OnlineVote
from tilewise.scheduler.voting import (
    extract_answer,
    filtered,
    keep_most_confident,
    majority,
    vote,
    weighted,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{a}{b + {c}}} rest }", r"\frac{a}{b + {c}}"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed {x}", "x"),
        (r"$\boxed 7$ and $8$", "7"),
        (r"\boxed 9", "9"),
        (r"\boxed{never closed", None),
        (r"\boxed{1} \boxed{2", None),  # the last one counts, and it is none
        (r"\boxed{}", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_answers_of_texts(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_votes() -> None:
    answers = ["a", None, "b", "b", "c"]
    assert majority(answers).answer == "b" and majority(answers).voters == (0, 2, 3, 4)
    assert majority(["a", "b"]).answer == "a" and majority(["b", "a", "a", "b"]).answer == "b"
    assert majority([]).answer is None and majority([None, None]).answer is None
    assert weighted(answers, [5.0, 99.0, 2.0, 2.0, 1.0]).answer == "a"
    assert weighted(answers, [4.0, 99.0, 2.0, 2.0, 1.0]).answer == "a"  # a tie, first seen
    result = weighted(["1/2", "0.5", "3"], [1.0, 1.0, 1.5], key=lambda text: eval(text, {}))
    assert result.answer == "1/2" and result.counts == {"1/2": 2, "3": 1} and result.share == 2 / 3.5
    assert vote("filtered", ["a", "b"], [1.0, 2.0], keep=0.5).answer == "b"


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), max_size=20))
def test_equal_weights_are_the_majority(answers: list[str | None]) -> None:
    plain = majority(answers)
    assert weighted(answers, np.full(len(answers), 2.5)).answer == plain.answer
    assert filtered(answers, np.full(len(answers), 2.5), keep=0.1).answer == plain.answer  # all tie with the edge


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_what_is_not_finite_never_wins(odd: float) -> None:
    assert weighted(["a", "b"], [odd, 0.1]).answer == "b"
    assert filtered(["a", "b", "b"], [odd, 0.1, 0.2], keep=0.1).answer == "b"
    assert weighted(["a"], [odd]).answer is None and filtered(["a"], [odd]).answer is None
    assert weighted(["a", "b"], [0.0, 0.0]).answer == "a"


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_the_share_is_numpys_percentile(count: int, keep: float) -> None:
    values = np.random.default_rng(count).random(count)
    np.testing.assert_array_equal(
        keep_most_confident(values, keep), values >= np.percentile(values, (1 - keep) * 100, method="linear")
    )


def test_sixteen_traces_keep_two() -> None:
    assert keep_most_confident(np.arange(16.0), 0.1).sum() == 2
    assert keep_most_confident(np.ones(16), 0.1).all()
    # Traces without an answer are dropped before they are ranked.
    assert filtered([None] * 10 + ["a", "b"], [9.0] * 10 + [1.0, 2.0], keep=0.5).voters == (11,)


def test_bad_votes() -> None:
    with pytest.raises(ArgumentError, match=r"keep: expected a share in \(0, 1\], got 10"):
        filtered(["a"], [1.0], keep=10)
    with pytest.raises(ArgumentError, match="at least 0, got -1"):
        weighted(["a"], [-1.0])
    with pytest.raises(ShapeError, match="each of 2 answers, got 1"):
        weighted(["a", "b"], [1.0])
    with pytest.raises(ArgumentError, match="method"):
        vote("best", ["a"])
    with pytest.raises(ArgumentError, match="one number per trace"):
        vote("weighted", ["a"])
    with pytest.raises(ArgumentError, match="consensus"):
        OnlineVote(consensus=95)
    with pytest.raises(ArgumentError, match="warmup"):
        OnlineVote(warmup=0)
    machine = OnlineVote(warmup=1)
    with pytest.raises(ArgumentError, match="started"):
        machine.judge(0, 1.0)
    machine.start()
    machine.finish(0, "a", lowest=1.0, tokens=1)
    with pytest.raises(ArgumentError, match="ended already"):
        machine.finish(0, "a", lowest=1.0, tokens=1)


def drive(machine: OnlineVote, answers, lowest, order) -> None:
    """Runs traces `slots` at a time; `order` picks which of the running ends next."""
    running: list[int] = []
    while not machine.done:
        while len(running) < order.slots and (trace := machine.start()) is not None:
            running.append(trace)
        trace = running.pop(order.pick(len(running)))
        weak = trace >= machine.warmup and machine.judge(trace, lowest[trace])
        end = machine.stop if weak else machine.finish
        arguments = (trace,) if weak else (trace, answers[trace])
        for other in end(*arguments, lowest=lowest[trace], tokens=10):
            running.remove(other)
    assert not machine.running or all(trace >= machine.counted for trace in machine.running)


class Order:
    def __init__(self, slots: int, seed: int) -> None:
        self.slots, self._rng = slots, np.random.default_rng(seed)

    def pick(self, count: int) -> int:
        return int(self._rng.integers(count))


@pytest.mark.parametrize("consensus", [None, 0.6, 0.9])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_any_batch_and_order_decide_the_same(consensus: float | None, keep: float) -> None:
    rng = np.random.default_rng(3)
    answers = [str(a) if a else None for a in rng.integers(0, 4, 40)]
    lowest = rng.random(40) * 5 + 1
    lowest[[3, 20]] = math.nan, math.inf
    results = set()
    for slots in (1, 2, 7, 40):
        for seed in range(8):
            machine = OnlineVote(warmup=6, budget=40, keep=keep, consensus=consensus)
            drive(machine, answers, lowest, Order(slots, seed))
            found = machine.result()
            results.add((found.answer, found.voters, machine.counted, round(found.share, 12), machine.threshold))
    assert len(results) == 1


def test_warm_up_threshold_and_votes() -> None:
    machine = OnlineVote(warmup=4, budget=8, keep=0.5, consensus=None)
    started = [machine.start() for _ in range(5)]
    assert started == [0, 1, 2, 3, None], "later traces wait for the threshold"
    for trace, low in zip(range(4), [1.0, 2.0, 3.0, 4.0], strict=True):
        assert not machine.judge(trace, -5.0), "warm-up traces run to their end"
        machine.finish(trace, f"a{trace}", lowest=low, tokens=5)
    assert machine.threshold == np.percentile([1, 2, 3, 4], 50)
    assert machine.result().voters == (2, 3)
    trace = machine.start()
    assert trace == 4
    assert not machine.judge(4, machine.threshold), "strictly below"
    assert machine.judge(4, np.nextafter(machine.threshold, 0)) and machine.judge(4, math.nan)
    machine.stop(4, lowest=1.0, tokens=3)
    assert 4 not in machine.result().voters and machine.tokens == 23


def test_equal_confidences_stop_nothing() -> None:
    machine = OnlineVote(warmup=4, budget=12, keep=0.1, consensus=None)
    drive(machine, ["a"] * 12, [2.5] * 12, Order(3, 0))
    assert not any(end.stopped for end in machine.ends.values()) and len(machine.result().voters) == 12


def test_consensus_edges() -> None:
    unanimous = OnlineVote(warmup=2, budget=50, consensus=1.0)
    drive(unanimous, ["a"] * 50, [0.1, 0.2, *[0.3] * 48], Order(1, 0))
    assert unanimous.counted == 2
    # tau = 0 ends after the warm-up, also without any valid answer.
    for answers in (["a", "b"] * 25, [None] * 50):
        machine = OnlineVote(warmup=3, budget=50, consensus=0.0)
        drive(machine, answers, [1.0] * 50, Order(2, 1))
        assert machine.counted == 3
    assert machine.result().answer is None
    split = OnlineVote(warmup=2, budget=10, consensus=1.0)
    drive(split, ["a", "b"] * 5, [1.0] * 10, Order(2, 1))
    assert split.counted == 10, "the budget"
    small = OnlineVote(warmup=16, budget=3, consensus=None)
    drive(small, ["a"] * 3, [1.0] * 3, Order(2, 0))
    assert small.counted == 3


def test_nothing_finite_in_the_warm_up() -> None:
    machine = OnlineVote(warmup=2, budget=6, consensus=None)
    drive(machine, ["a"] * 6, [math.nan] * 6, Order(2, 0))
    assert machine.result().answer is None and math.isnan(machine.threshold)


STUDY = Study(questions=12, traces=32, warmup=8, tokens=500, window=64, slots=8)


def test_the_study_steps_as_a_driver_would() -> None:
    """Token by token through the monitor, in lockstep: the same answer and the same tokens as the study's shortcut."""
    cancelled = 0
    for number in range(8):
        question = make_question(STUDY, 7, number)
        policy = Policy("", online=True, keep=0.3, consensus=0.8)
        answer, spent, quick = run_online(question, STUDY, policy)
        machine = OnlineVote(warmup=STUDY.warmup, budget=STUDY.traces, keep=0.3, consensus=0.8)
        monitor = ConfidenceMonitor(STUDY.slots, STUDY.window)
        slots: dict[int, int] = {}
        tokens = 0
        while not machine.done:
            for slot in range(STUDY.slots):
                if slot not in slots and (trace := machine.start()) is not None:
                    slots[slot] = trace
                    monitor.reset([slot])
            # In the order of the numbers: the study ends simultaneous traces so.
            for slot, trace in sorted(slots.items(), key=lambda pair: pair[1]):
                at = int(monitor.read([slot]).count[0])
                reading = monitor.update([question.tokens[trace, at]], rows=[slot])
                tokens += 1
                lowest, group = float(reading.lowest[0]), float(reading.group[0])
                if at + 1 >= STUDY.window and machine.judge(trace, group):
                    machine.stop(trace, lowest=lowest, tokens=at + 1)
                elif at + 1 == question.lengths[trace]:
                    machine.finish(trace, int(question.answers[trace]), lowest=lowest, tokens=at + 1)
                else:
                    continue
                del slots[slot]
                if machine.done:
                    break
        assert machine.result() == quick.result() and machine.threshold == quick.threshold
        assert answer == machine.result().answer
        # At the step of the decision the lockstep has not yet run the traces after the deciding one.
        assert 0 <= spent - tokens < STUDY.slots
        cancelled += len(machine.running)
    assert cancelled > 0, "some votes were decided while traces ran"


def test_the_study_saves_tokens_at_equal_accuracy() -> None:
    outcomes = {outcome.policy: outcome for outcome in simulate(range(6), STUDY)}
    low = outcomes["online, keep 10 %"]
    assert low.saved_interval[0] >= 0.4
    assert low.difference >= 0.0
    assert outcomes["majority"].saved == 0.0 and outcomes["majority"].difference == 0.0
    blind = Study(questions=12, traces=32, warmup=8, tokens=500, window=64, slots=8, gap=0.0)
    nothing = {outcome.policy: outcome for outcome in simulate(range(6), blind)}
    best = {outcome.policy: outcome for outcome in simulate(range(6), STUDY, against="filtered 10 %")}
    full = best["online, keep 10 %, no consensus"]
    assert full.saved_interval[0] >= 0.4 and full.difference_interval[1] >= 0.0, "equal to the best vote of all traces"
    # Where confidence tells nothing, keeping the most confident tenth cannot be better than all.
    assert nothing["filtered 10 %"].difference <= 0.0


def test_questions_are_functions_of_their_numbers() -> None:
    one, two = make_question(STUDY, 1, 2), make_question(STUDY, 1, 2)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert not np.array_equal(one.lengths, make_question(STUDY, 2, 2).lengths)
    # More traces leave those that were there as they are.
    more = make_question(Study(traces=64, window=64, tokens=500), 1, 2)
    np.testing.assert_array_equal(more.lengths[:32], one.lengths)
    with pytest.raises(ArgumentError, match="window"):
        Study(window=0)


def test_command(tmp_path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from tilewise.cli.app import app

    sizes = ["--seeds", "2", "--questions", "3", "--traces", "12", "--warmup", "4", "--tokens", "200", "--window", "32"]
    picture = tmp_path / "study.svg"
    result = CliRunner().invoke(app, ["simulate", "confidence", *sizes, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "online" in result.output and picture.stat().st_size > 10_000
    found = json.loads(CliRunner().invoke(app, ["simulate", "confidence", *sizes, "--json"]).stdout)
    assert [row["policy"] for row in found["policies"]] == [policy.name for policy in POLICIES]
    wrong = CliRunner().invoke(app, ["simulate", "confidence", *sizes, "--difficulty", "1.5"])
    assert wrong.exit_code == 1 and "difficulty" in wrong.output
    wrong = CliRunner().invoke(app, ["simulate", "confidence", *sizes, "--against", "best"])
    assert wrong.exit_code == 1 and "'majority'" in wrong.output


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    from tilewise.plots import confidence as plots

    axes = plots.traces(np.ones((2, 5)), window=9, threshold=0.5)  # shorter than the window: nothing to draw
    assert axes.get_title() == "0 of 2 traces stopped"
    assert plots.vote(majority([])).get_title() == "no answer"
    assert trace_confidence(np.ones((2, 5)), window=9).lowest.tolist() == [1.0, 1.0]
    with pytest.raises(ShapeError):
        plots.traces(np.ones(3), window=2)
