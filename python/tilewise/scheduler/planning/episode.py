"""Dynamic speculative planning of one episode, as a machine without I/O.

The source is Guan et al., "Dynamic Speculative Agent Planning" (2025), which inherits its loop from Hua et al.,
"Interactive Speculative Planning" (arXiv 2410.00079). In short::

    round:    ask the predictor for k; the first step of the round is known
    step i:   call A and T with the prefix (A's guesses, as far as T has not answered)
              A answers: its action is presumed, step i + 1 begins, up to k steps
    compare:  T answers step i: the same -> kept; different -> T's action stands, everything later is discarded and
              cancelled. An earlier step that is still open may differ too, and moves the cut to the left.
    commit:   in order, once every earlier step is committed
    round ends at a committed mismatch, or when k steps are committed; the plan ends when T says so

Departures from the published code:

1. *T overtakes A.* If T answers first, A's call is cancelled and T's action is the presumed one: nothing waits for a
   guess that is no longer needed. Whether A would have agreed is then not known, so nothing is learnt from that step.
2. *Caps.* Calls are commanded in the order of their use: T by step, then A. With one call at a time the machine is
   plain planning by T.
3. *What speculation broke cannot break the plan.* A failed A ends the speculation at its step. A T that fails while an
   earlier step is open is asked again once its step is the next one; only that failure ends the episode.
4. *Tools.* A guarded action is executed when its step is confirmed, never before. With a rehearsal (``"dry"``)
   planning goes on from what the rehearsal said, and is cut if the real run says something else.
5. *The predictor may be late.* Until it answers one step is speculated; a late answer counts from the step it was
   asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning.events import (
    Abandoned,
    Ask,
    CallApproximate,
    CallTarget,
    Cancel,
    Cancelled,
    Command,
    Commit,
    Event,
    Execute,
    Executed,
    Failed,
    Finish,
    Finished,
    Predicted,
    Record,
    Spent,
    Started,
    Stop,
)
from tilewise.scheduler.planning.ledger import Fate, Ledger
from tilewise.scheduler.planning.trajectory import (
    TERMINATE,
    Handling,
    Reply,
    State,
    Step,
    Trajectory,
    exact,
    no_tools,
    same,
)
from tilewise.scheduler.planning.window import CallRecord, Caps, Slot

__all__ = ["Episode"]


class Episode:
    """One episode: events in, commands out.

    Args:
        task: handed to the agents in :class:`~tilewise.scheduler.planning.trajectory.State`.
        limit: most steps of the plan, 1 or more.
        agree: whether a guess (first) and the target's action (second) are the same step. Anything but equality may
            keep actions that are not the target's own.
        handling: what may be done with an action before it is confirmed.
        caps: most calls in flight.

    Attributes:
        steps: committed so far.
        records: every call, in the order of their commands.
        ledger: tokens by role, kind and fate.
        rounds: the budgets k of the rounds, in order; None where the predictor had not answered.
        peak: most calls of agents in flight at once.
        ignored: events that came too late, twice, or for no call.
        censored: trajectories that nothing was learnt from, because an agreement was not known or the limit came.
        reason: why it ended, or None.

    Raises:
        ArgumentError: a limit below 1, or an event with a time or a k that is no number.

    Example:
        >>> from tilewise.scheduler.planning import Finished, Predicted, Reply, Started, TERMINATE
        >>> episode = Episode("task")
        >>> [type(command).__name__ for command in episode.handle(Started(0.0))]
        ['Ask', 'CallTarget', 'CallApproximate']
        >>> episode.handle(Predicted(0.1, 0, k=2))
        []
        >>> [type(command).__name__ for command in episode.handle(Finished(0.5, 2, Reply("a")))]
        ['CallTarget', 'CallApproximate']
        >>> [type(command).__name__ for command in episode.handle(Finished(1.0, 1, Reply("b")))]  # it disagrees
        ['Cancel', 'Cancel', 'Commit', 'Record', 'Ask', 'CallTarget', 'CallApproximate']
        >>> episode.steps
        [Step(index=0, action='b', observation=None)]
    """

    def __init__(
        self,
        task: Any,
        *,
        limit: int = 20,
        agree: Callable[[Any, Any], bool] = exact,
        handling: Callable[[Any], Handling] = no_tools,
        caps: Caps = Caps(),  # noqa: B008 (frozen)
    ) -> None:
        if not isinstance(limit, int) or limit < 1:
            raise ArgumentError(f"Episode: limit is a number of steps, 1 or more; got {limit!r}")
        self.limit, self.caps = limit, caps
        self._agree, self._handling = agree, handling
        self.steps: list[Step] = []
        self.records: list[CallRecord] = []
        self.ledger = Ledger()
        self.rounds: list[int | None] = []
        self.peak = self.ignored = self.censored = 0
        self.reason: Literal["terminated", "limit", "failed", "stopped"] | None = None
        self._state = State(task)  # after the last committed step
        self._slots: list[Slot] = []
        self._trail: list[State] = []  # states since the last mismatch whose steps agreed
        self._corrections: tuple[tuple[int, Any], ...] = ()
        self._begin = 0  # the first step of the round
        self._budget: int | None = None
        self._asked: int | None = None  # the predictor's call in flight
        self._flying: dict[int, CallRecord] = {}
        self._out: list[Command] = []
        self._now = -math.inf

    @property
    def closed(self) -> bool:
        """Whether the episode is over and every call has ended."""
        return self.reason is not None and not self._flying

    def handle(self, event: Event) -> list[Command]:
        """Take one event; returns the commands that follow from it, in the order in which to carry them out."""
        if not isinstance(event.time, int | float) or not math.isfinite(event.time):
            raise ArgumentError(f"{type(event).__name__}: time is a number of seconds, got {event.time!r}")
        self._now = max(self._now, event.time)
        self._take(event)
        if self.reason is None and self.rounds:
            self._compare()
            while self.reason is None and self._commit_next():
                pass
            if self.reason is None:
                self._launch()
        out, self._out = self._out, []
        return out

    # What came in.

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            if self.rounds or self.reason is not None:
                self.ignored += 1
            else:
                self._new_round()
            return
        if isinstance(event, Stop):
            if self.reason is None:
                self._finish("stopped")
            else:
                self.ignored += 1
            return
        if isinstance(event, Predicted) and (not isinstance(event.k, int) or event.k < 1):
            raise ArgumentError(f"Predicted: k is a number of steps, 1 or more; got {event.k!r}")
        if isinstance(event, Finished) and event.reply.action is None:  # nothing that can be read
            event = Failed(event.time, event.call, event.reply.prompt_tokens, event.reply.generation_tokens)
        record = self._flying.get(event.call)
        if record is None or not _fits(event, record):
            self.ignored += 1
            return
        if isinstance(event, Spent):
            self.ledger.waste(record.role, event.prompt_tokens, event.generation_tokens)  # type: ignore[arg-type]
            return
        del self._flying[event.call]
        record.end = self._now
        gone = isinstance(event, Cancelled | Abandoned)
        record.abandoned = isinstance(event, Abandoned)
        record.failed = isinstance(event, Failed) or (gone and not record.discarded)
        self._charge(record, event)
        if record.discarded:
            if record.fate == "running":
                self._settle(record, "completed")
            return
        if record.role == "predictor":
            self._asked = None
            if isinstance(event, Predicted):
                self._budget = max(1, record.step + event.k - self._begin)
                self.rounds[-1] = self._budget
            return
        slot = self._slots[record.step - self._slots[0].index]
        if record.role == "tool":
            self._take_tool(slot, record, event)
        elif record.role == "approximate":
            if isinstance(event, Finished):
                slot.guess = event.reply
            else:
                slot.guess_failed = True
        elif isinstance(event, Finished):
            slot.truth = event.reply
            if slot.guess is None:
                self._drop(slot.approximate)  # departure 1
        else:
            slot.target_failed = True
            if slot is self._slots[0]:
                self._finish("failed", event.call)
            else:
                slot.target = None  # departure 3

    def _take_tool(self, slot: Slot, record: CallRecord, event: Event) -> None:
        slot.run = None
        if isinstance(event, Executed):
            if slot.run_mode == "real":
                slot.real = event.observation
            else:
                slot.observation = event.observation
        elif slot.run_mode == "real":
            self._finish("failed", record.call)
        else:
            slot.run_failed = True

    def _charge(self, record: CallRecord, event: Event) -> None:
        """Put what the call cost on the ledger. A failed call is waste at once, any other waits for its fate."""
        if record.role == "tool":
            record.fate = "cancelled" if isinstance(event, Cancelled | Abandoned) else "kept"
            if (record.discarded and record.fate == "kept") or record.failed:
                record.fate = "completed"
            return
        role: Any = record.role
        if isinstance(event, Cancelled | Abandoned):
            record.prompt_tokens = self.ledger.cancel(event.call, role, event.prompt_tokens, event.generation_tokens)
            record.generation_tokens = event.generation_tokens or 0
            record.fate = "cancelled"
            return
        spent: Any = event.reply if isinstance(event, Finished) else event
        record.prompt_tokens, record.generation_tokens = spent.prompt_tokens, spent.generation_tokens
        self.ledger.end(record.call, role, record.prompt_tokens, record.generation_tokens)
        if record.failed:
            self._settle(record, "completed")
        elif isinstance(event, Predicted) and not record.discarded:
            self._settle(record, "kept")

    def _settle(self, record: CallRecord, fate: Fate) -> None:
        if record.role != "tool":
            self.ledger.settle(record.call, fate)
        record.fate = fate

    # What follows.

    def _compare(self) -> None:
        """Compare where both have answered; the first difference discards everything later."""
        for place, slot in enumerate(self._slots):
            if slot.guess is None or slot.truth is None or slot.agreed is not None:
                continue
            slot.agreed = same(slot.guess, slot.truth, self._agree)
            if not slot.agreed:
                slot.broken = True
                self._discard_run(slot)
                self._discard_after(place)
                return

    def _commit_next(self) -> bool:
        """Commit the next step if it is confirmed and executed; whether anything changed."""
        slot = self._slots[0]
        choice = slot.choice
        if slot.truth is None or choice is None:
            return False
        if choice.action is TERMINATE:
            self._fates(slot)
            self._learn(slot, end=True)
            self._finish("terminated")
            return False
        if not self._execute_for_real(slot, choice):
            return False
        observation = slot.real if slot.executed else None
        step = Step(slot.index, choice.action, observation)
        moved = slot.seen and len(self._slots) > 1 and not _equal(slot.observation, observation)
        if moved:
            self._discard_after(0)  # departure 4: the rehearsal was wrong
        self.steps.append(step)
        self._state = State(self._state.task, (*self._state.steps, step))
        self._fates(slot)
        own = slot.truth.action
        self._out.append(Commit(self._state, slot.agreed, choice is slot.truth or _equal(choice.action, own)))
        if slot.broken and slot.guess is not None:
            self._corrections = (*self._corrections, (slot.index, slot.guess.action))
        self._learn(slot, end=choice.last)
        if choice.last:
            self._finish("terminated")
        elif len(self.steps) >= self.limit:
            self._finish("limit")
        else:
            del self._slots[0]
            if slot.broken or moved or len(self.steps) >= self._begin + (self._budget or 1):
                self._discard_after(-1)
                self._new_round()
            elif not self._slots:
                self._slots.append(Slot(self._state))
        return self.reason is None

    def _execute_for_real(self, slot: Slot, choice: Reply) -> bool:
        """Whether the confirmed step has its observation; commands the tool if it must run (again)."""
        handling = self._handling(choice.action)
        if handling == "none" or slot.executed:
            return True
        if handling == "free" and slot.seen:
            slot.real = slot.observation
            return True
        if slot.run is not None and slot.run_mode == "dry":
            self._discard_run(slot)  # the real one makes it needless
        if slot.run is None:
            slot.run, slot.run_mode = self._execute(slot, choice, "real"), "real"
        return False

    def _fates(self, slot: Slot) -> None:
        """The fates of a committed step's calls."""
        if slot.target is not None:
            self._settle(self.records[slot.target], "kept")
        if slot.approximate is not None and slot.guess is not None:
            self._settle(self.records[slot.approximate], "kept" if slot.agreed else "completed")
        self._drop(slot.approximate)

    def _learn(self, slot: Slot, *, end: bool) -> None:
        """Keep the state of a committed step, and hand out the trajectory at a mismatch or at the plan's end.

        Never where the budget or the limit ran out: the length of such a run says nothing about the agents, and
        predictions made from it would shrink by themselves.
        """
        if end or slot.agreed is not None:
            self._trail.append(slot.state)
        if end or slot.agreed is False:
            self._out.append(Record(Trajectory(tuple(self._trail))))
            self._trail.clear()
        elif slot.agreed is None and self._trail:
            self._trail.clear()
            self.censored += 1

    def _new_round(self) -> None:
        self._begin, self._budget = len(self.steps), None
        self._slots = [Slot(self._state)]
        self.rounds.append(None)
        if self._asked is None:  # departure 5: a question that is still open will do
            self._asked = self._command("predictor", self._begin)
            self._out.append(Ask(self._asked, self._state))

    def _launch(self) -> None:
        """Begin the steps that may begin, then command what they need: T in their order, then A."""
        while self._extend():
            pass
        for slot in self._slots:
            if slot.target is None and slot.truth is None and self._room("target"):
                if slot.target_failed and slot is not self._slots[0]:
                    continue
                slot.target = self._command("target", slot.index)
                self._out.append(CallTarget(slot.target, slot.state))
        slot = self._slots[-1]
        if slot.approximate is None and slot.truth is None and self._room("approximate"):
            slot.approximate = self._command("approximate", slot.index)
            state = State(slot.state.task, slot.state.steps, self._corrections)
            self._out.append(CallApproximate(slot.approximate, state))

    def _extend(self) -> bool:
        """Begin the step after the last slot, if its prefix is known; whether it did."""
        slot = self._slots[-1]
        choice = slot.choice
        following = slot.index + 1
        if choice is None or choice.ends or slot.broken or following >= self.limit:
            return False
        if following >= self._begin + (self._budget or 1):
            return False
        handling = self._handling(choice.action)
        if handling == "none":
            observation = None
        elif slot.executed:
            observation = slot.real
        elif slot.seen:
            observation = slot.observation
        else:
            if slot.run is None and not slot.run_failed and handling in ("free", "dry"):
                slot.run_mode = "speculative" if handling == "free" else "dry"
                slot.run = self._execute(slot, choice, slot.run_mode)
            return False
        step = Step(slot.index, choice.action, observation)
        self._slots.append(Slot(State(slot.state.task, (*slot.state.steps, step))))
        return True

    # Calls.

    def _room(self, role: str) -> bool:
        flying = [record.role for record in self._flying.values() if record.role in ("approximate", "target")]
        cap, total = getattr(self.caps, role), self.caps.total
        return (cap is None or flying.count(role) < cap) and (total is None or len(flying) < total)

    def _command(self, role: str, step: int) -> int:
        record = CallRecord(len(self.records), role, len(self.rounds) - 1, step, self._now)
        self.records.append(record)
        self._flying[record.call] = record
        busy = sum(other.role in ("approximate", "target") for other in self._flying.values())
        self.peak = max(self.peak, busy)
        return record.call

    def _execute(self, slot: Slot, choice: Reply, mode: Any) -> int:
        call = self._command("tool", slot.index)
        self._out.append(Execute(call, slot.state, choice.action, mode))
        return call

    def _cancel(self, call: int) -> None:
        record = self.records[call]
        if not record.discarded:
            record.discarded = True
            self._out.append(Cancel(call))

    def _drop(self, call: int | None) -> None:
        """A call has no use any more: cancel it if it runs, else its answer is waste unless its fate is known."""
        if call is None:
            return
        if call in self._flying:
            self._cancel(call)
        elif self.records[call].fate == "running":
            self._settle(self.records[call], "completed")

    def _discard_run(self, slot: Slot) -> None:
        self._drop(slot.run)
        slot.run, slot.run_mode, slot.run_failed = None, "", False
        slot.observation = Slot(slot.state).observation

    def _discard_after(self, place: int) -> None:
        for slot in self._slots[place + 1 :]:
            for call in (slot.approximate, slot.target, slot.run):
                self._drop(call)
        del self._slots[place + 1 :]

    def _finish(self, reason: Literal["terminated", "limit", "failed", "stopped"], call: int | None = None) -> None:
        self.reason = reason
        self._discard_after(-1)
        if self._trail:
            self.censored += 1
        for flying in list(self._flying):
            self._cancel(flying)
        self._out.append(Finish(reason, call))


def _fits(event: Event, record: CallRecord) -> bool:
    """Whether a call of this role can end in this way."""
    if isinstance(event, Finished):
        return record.role in ("approximate", "target")
    if isinstance(event, Predicted):
        return record.role == "predictor"
    return not isinstance(event, Executed | Spent) or (record.role == "tool") == isinstance(event, Executed)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays, for one; "not the same" is safe: it discards, and it does not claim to be lossless
        return False
