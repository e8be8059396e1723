"""The parts of a running episode: the speculated steps, the calls in flight, and the limits on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning.trajectory import Reply, State

__all__ = ["CallRecord", "Caps", "Slot"]


@dataclass(frozen=True)
class Caps:
    """Most calls in flight at once; None: no limit. A call that is being cancelled counts until it has ended.

    Attributes:
        approximate, target: by role. (The approximation agent has at most one that matters in any case.)
        total: of both agents together. With 1 the plan is the target's alone, step by step, and nothing is wasted.

    Raises:
        ArgumentError: a cap below 1.
    """

    approximate: int | None = None
    target: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name in ("approximate", "target", "total"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"Caps: {name} is a number of calls, 1 or more, or None; got {value!r}")


@dataclass
class CallRecord:
    """One call, from command to end: the account of an episode in time.

    Attributes:
        call: its number.
        role: ``"approximate"``, ``"target"``, ``"predictor"`` or ``"tool"``.
        round: which speculation it belongs to; a new one begins after each mismatch and when the budget is used up.
        step: its index in the plan.
        start, end: times; `end` is None while it runs.
        fate: ``"kept"``, ``"completed"`` (waste), ``"cancelled"`` (waste), or ``"running"``.
        failed: it raised, timed out, or gave nothing that can be read.
        abandoned: it did not end when it was cancelled.
        prompt_tokens, generation_tokens: as in the ledger.
    """

    call: int
    role: str
    round: int
    step: int
    start: float
    end: float | None = None
    fate: Literal["kept", "completed", "cancelled", "running"] = "running"
    failed: bool = False
    abandoned: bool = False
    prompt_tokens: int = 0
    generation_tokens: int = 0
    discarded: bool = False  # a Cancel was commanded: whatever comes back has no use


_NOTHING = object()  # no observation yet; None is one


@dataclass
class Slot:
    """One step that is being worked on, confirmed or not.

    The slots of an episode are the steps from the last committed one on. A slot exists only when the action of the
    one before it is presumed, so its `state` is known.
    """

    state: State
    approximate: int | None = None  # calls, once they are commanded
    target: int | None = None
    guess: Reply | None = None  # what they said
    truth: Reply | None = None
    guess_failed: bool = False
    target_failed: bool = False
    agreed: bool | None = None  # None: not known, or never to be known
    broken: bool = False  # guess and truth differ: nothing may follow before this step is committed
    run: int | None = None  # the tool's call in flight
    run_mode: str = ""
    run_failed: bool = False  # the unconfirmed run failed: wait for the confirmed one
    observation: Any = _NOTHING  # of an unconfirmed run
    real: Any = _NOTHING  # of a confirmed one

    @property
    def index(self) -> int:
        return self.state.index

    @property
    def choice(self) -> Reply | None:
        """The presumed answer: the guess as long as nothing speaks against it."""
        return self.truth if self.guess is None or self.broken else self.guess

    @property
    def seen(self) -> bool:
        """Whether there is an observation to go on with."""
        return self.observation is not _NOTHING

    @property
    def executed(self) -> bool:
        """Whether the confirmed run has answered."""
        return self.real is not _NOTHING
