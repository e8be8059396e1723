"""The rounds' machine through the binding: what may come in, and schedules that Hypothesis looks for.

The Rust tests explore 10^5 schedules with all that can go wrong (``cargo test -p tilewise-core adversarial``); single
cases by name are there too.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.errors import ArgumentError
from tilewise.scheduler import Rounds


class Driver:
    """Answers commands in whatever order it is told, and checks what it is asked."""

    def __init__(self, limit: int, streams: int, **options: Any) -> None:
        self.machine = Rounds(vocabulary=5, **options)
        self.limit, self.now, self.handles = limit, 0.0, 0
        self.emitted = dict.fromkeys(range(streams), 0)
        self.finished: dict[int, str] = {}
        self.target: list[tuple[Any, ...]] = []
        self.workers: list[tuple[Any, ...]] = []
        self.told: set[int] = set()
        self.freed: set[int] = set()
        self.last: dict[int, tuple[int, int, int]] = {}
        self.made: dict[int, tuple[int, int, int | None, int | None]] = {}
        self.used: set[int] = set()
        for worker in range(options.get("workers", 1)):
            self.give(("worker_ready", worker))
        for stream in self.emitted:
            self.give(("join", stream, limit))

    def give(self, event: tuple[Any, ...]) -> None:
        self.now += 0.001
        if event[0] == "verified":
            for stream, accepted, token, emitted, *_ in event[3]:
                self.emitted[stream] += emitted
                self.last[stream] = (self.rounds[stream], accepted, token)
        if event[0] == "prefilled":
            self.emitted[event[1]] += 1
        if event[0] == "entries":
            self.told |= {handle for *_, handle, _ in event[4]}
        if event[0] == "drafted":
            self.told.add(event[5])
        for command in self.machine.handle(self.now, event):
            getattr(self, command[0])(*command[1:])

    rounds: dict[int, int]

    def prefill(self, stream: int) -> None:
        self.target.append(("prefilled", stream, False, None, None))

    def open(self, worker: int, stream: int) -> None:
        self.workers.append(("opened", worker, stream))

    def verify(self, batch: int, rows: list[tuple[int, int, str, int, int]]) -> None:
        self.rounds = {stream: number for stream, number, *_ in rows}
        verdicts = []
        for stream, number, source, handle, length in rows:
            assert self.emitted[stream] + length + 1 <= self.limit
            if handle >= 0:
                assert handle not in self.freed and handle not in self.used
                self.used.add(handle)
                its, of, accepted, token = self.made[handle]
                assert its == stream and of == number - 1
                if source == "cached":
                    assert self.last[stream] == (of, accepted, token)
            accepted = (number * 7 + stream) % (length + 1)
            fast = [None, 0.5, 4.0][number % 3]
            verdicts.append((stream, accepted, (number + stream) % 5, accepted + 1, False, fast))
        self.target.append(("verified", batch, 0.01, verdicts))

    def build(
        self, worker: int, stream: int, number: int, source: str, handle: int, fan_out: list[int], depth: int
    ) -> None:
        for length in range(1, depth + 1):
            entries = []
            for accepted, count in enumerate(fan_out):
                for token in range(count):
                    self.handles += 1
                    self.made[self.handles] = (stream, number, accepted, token)
                    entries.append((accepted, token, length, self.handles, False))
            self.workers.append(("entries", worker, stream, number, entries))
        self.workers.append(("built", worker, stream, number, 0.005, depth, sum(fan_out)))

    def draft(self, worker: int, stream: int, number: int, accepted: int, token: int, length: int) -> None:
        self.handles += 1
        self.made[self.handles] = (stream, number, None, None)
        self.workers.append(("drafted", worker, stream, number, length, self.handles, 0.002, 0))

    def outcome(self, worker: int, stream: int, number: int, accepted: int, token: int, handle: int) -> None:
        assert self.last[stream] == (number, accepted, token)
        self.workers.append(("rank", worker, stream, number, token))

    def stop(self, worker: int, stream: int, number: int) -> None: ...

    def forget(self, worker: int, stream: int) -> None: ...

    def discard(self, handles: list[int]) -> None:
        assert not self.freed & set(handles) and len(set(handles)) == len(handles)
        self.freed |= set(handles)

    def finish(self, stream: int, reason: str) -> None:
        assert stream not in self.finished
        self.finished[stream] = reason


@settings(deadline=None)
@given(
    order=st.lists(st.integers(0, 9), max_size=200),
    limit=st.integers(1, 12),
    streams=st.integers(1, 3),
    draft_length=st.integers(0, 4),
    budget=st.integers(0, 6),
    fallback=st.sampled_from(["adaptive", "neural", "fast"]),
    workers=st.integers(0, 2),
    together=st.booleans(),
    adaptive=st.booleans(),
)
def test_every_order_ends_with_the_tokens_that_were_asked_for(
    order: list[int], limit: int, streams: int, **options: Any
) -> None:
    driver = Driver(limit, streams, patience=0.5, max_batch=2, **options)
    steps = iter(order)
    for _ in range(3000):
        if len(driver.finished) == streams:
            break
        choice = next(steps, 0)
        queue = driver.workers if driver.workers and choice < 7 else driver.target
        if queue:
            event = queue.pop(choice % len(queue) if queue is driver.workers else 0)
            if choice == 6:
                continue  # lost
            driver.give(event)
            if choice == 5 and event[0] not in ("prefilled",):
                again = driver.machine.handle(driver.now, event)  # a second copy
                assert all(command[0] == "discard" for command in again) or event[0] == "opened"
        else:
            deadline = driver.machine.next_deadline()
            assert deadline is not None, "nothing goes on"
            driver.now = max(driver.now, deadline)
            driver.give(("tick",))
    assert driver.finished == dict.fromkeys(range(streams), "limit")
    assert driver.emitted == dict.fromkeys(range(streams), limit)
    for event in driver.workers:
        driver.give(event)
    assert driver.freed == driver.told and driver.machine.stats()["held"] == 0
    assert driver.machine.stats()["tokens"] == streams * limit


@pytest.mark.parametrize(
    "event",
    [
        (),
        ("join",),
        ("join", -1, 3),
        ("join", 1, 0),
        ("join", 2**40, 3),
        ("jump", 1),
        ["join", 1, 3],
        ("verified", 1, 0.1),
        ("verified", 1, float("nan"), []),
        ("verified", 1, 0.1, [(1, 2)]),
        ("verified", 1, 0.1, 7),
        ("entries", 0, 0, 0, [(0, 0, 0, 1, False)]),
        ("entries", 0, 0, 0, [(0, 99, 1, 1, False)]),
        ("entries", 0, 0, 0, [(0, 0, 1, 1)]),
        ("drafted", 0, 0, 0, 1, 1, 0.1, 2),
        ("rank", 0, 0, 0, -2),
        ("tick", 1),
        "tick",
        None,
    ],
)
def test_tuples_that_are_no_events_are_refused_by_name(event: Any) -> None:
    machine = Rounds(vocabulary=10)
    before = machine.stats()
    with pytest.raises(ArgumentError, match=r"event|limit|seconds|entries|held"):
        machine.handle(0.0, event)
    assert machine.stats() == before


def test_unknown_late_and_doubled_events_are_counted() -> None:
    machine = Rounds(vocabulary=10)
    events = [
        ("abort", 1),
        ("prefilled", 1, False, None, None),
        ("opened", 0, 1),
        ("verified", 9, 0.1, []),
        ("resume", 1),
        ("worker_lost", 7),
    ]
    for event in events:
        assert machine.handle(0.0, event) == []
    assert machine.handle(0.0, ("drafted", 0, 1, 0, 2, 5, 0.1, 0)) == [("discard", [5])]
    assert machine.handle(0.0, ("drafted", 0, 1, 0, 2, 5, 0.1, 0)) == []
    assert machine.stats()["ignored"] == len(events) + 2


@pytest.mark.parametrize(
    "settings_",
    [
        {"draft_length": -1}, {"draft_length": 5000}, {"max_batch": 0}, {"vocabulary": 0}, {"patience": 0.0},
        {"patience": float("inf")}, {"fallback": "slow"}, {"seed": -1}, {"seed": 2**64}, {"workers": True},
        {"budget": 2**20},
    ],
)  # fmt: skip
def test_settings_out_of_range(settings_: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(settings_))):
        Rounds(**{"vocabulary": 10} | settings_)


def test_a_copy_goes_its_own_way() -> None:
    machine = Rounds(vocabulary=10, workers=0)
    machine.handle(0.0, ("join", 0, 5))
    other = machine.copy()
    machine.handle(0.1, ("prefilled", 0, True, None, None))
    assert machine.stats()["finished"] == 1 and other.stats()["finished"] == 0


def test_misses_are_answered_by_what_the_driver_expects_of_its_own_draft() -> None:
    """The draft's chains are kept and take a fifth of a verification; the driver's are right or not, and it knows."""
    machine = Rounds(draft_length=4, budget=0, workers=1, vocabulary=9, ordered=True)
    now, handle, told = 0.0, 0, 0.0
    chosen: dict[float, list[str]] = {0.0: [], 4.0: []}
    commands = machine.handle(now, ("worker_ready", 0)) + machine.handle(now, ("join", 0, 2000))
    commands += machine.handle(now, ("opened", 0, 0)) + machine.handle(now, ("prefilled", 0, False, None, told))
    while sum(map(len, chosen.values())) < 160:
        event: tuple[Any, ...] | None = None
        for command in commands:
            if command[0] == "draft":
                handle, now = handle + 1, now + 0.02
                event = ("drafted", 0, 0, command[3], command[6], handle, 0.02, 0)
            if command[0] == "verify":
                [(_, _, source, _, length)] = command[2]
                chosen[told].append(source)
                accepted = length if source == "drafted" else min(length, int(told))
                told, now = 4.0 - told, now + 0.1
                event = ("verified", command[1], 0.1, [(0, accepted, 1, accepted + 1, False, told)])
        assert event is not None
        commands = machine.handle(now, event)
    for told, answer in ((0.0, "drafted"), (4.0, "fast")):  # now and then something else is tried
        assert chosen[told].count(answer) >= 0.85 * len(chosen[told])


def test_the_first_token_is_guessed_while_the_prompt_is_read() -> None:
    machine = Rounds(draft_length=3, budget=4, workers=1, vocabulary=9, fallback="neural", guess_first=True)
    machine.handle(0.0, ("worker_ready", 0))
    machine.handle(0.0, ("join", 7, 20))
    assert machine.handle(0.1, ("opened", 0, 7)) == [("build", 0, 7, 0, "none", -1, [4], 3)]
    machine.handle(0.2, ("entries", 0, 7, 0, [(0, 5, 3, 11, False), (0, 6, 3, 12, False)]))
    other = machine.copy()
    commands = machine.handle(0.3, ("prefilled", 7, False, 6, None))
    assert commands[:3] == [("outcome", 0, 7, 0, 0, 6, 12), ("stop", 0, 7, 0), ("verify", 1, [(7, 1, "cached", 12, 3)])]
    assert ("discard", [11]) in commands
    # Another token, and a driver that does not say which: the draft is asked, and the guesses go.
    for token in (4, None):
        commands = other.copy().handle(0.3, ("prefilled", 7, False, token, None))
        assert ("draft", 0, 7, 0, 0, -1 if token is None else token, 3) in commands
        assert any(command[0] == "discard" and sorted(command[1]) == [11, 12] for command in commands)
    for bad in ((9, None), (1, -1.0), (1, float("inf"))):
        with pytest.raises(ArgumentError):
            machine.handle(0.3, ("prefilled", 7, False, *bad))


def test_the_drivers_own_tokens_may_follow_a_chain_of_the_models() -> None:
    machine = Rounds(draft_length=3, budget=4, workers=1, vocabulary=9, fallback="neural", adaptive=False)
    machine.handle(0.0, ("worker_ready", 0))
    machine.handle(0.0, ("join", 7, 20))
    machine.handle(0.1, ("opened", 0, 7))
    machine.handle(0.2, ("prefilled", 7, False, None, None))
    machine.handle(0.3, ("drafted", 0, 7, 0, 3, 11, 0.1, 0))
    with pytest.raises(ArgumentError, match="at most 3 accepted"):
        machine.handle(0.4, ("verified", 1, 0.1, [(7, 5, 2, 6, False, None)]))
    machine.handle(0.35, ("fast", 7, 1, 6))
    with pytest.raises(ArgumentError, match="at most 6 accepted"):
        machine.handle(0.4, ("verified", 1, 0.1, [(7, 7, 2, 8, False, None)]))
    machine.handle(0.4, ("verified", 1, 0.1, [(7, 5, 2, 6, False, None)]))
    assert machine.stats()["tokens"] == 7 and machine.stats()["drafted"] == 6
