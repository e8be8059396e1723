"""What goes into an :class:`~tilewise.scheduler.planning.episode.Episode` and what comes out.

Events carry the time (seconds, any origin) at which they happened; the machine never asks for it. A *call* is a number
that the machine chose when it commanded the call, and by which the driver answers. Every event is legal at any time: a
late, doubled or unknown one is counted and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tilewise.scheduler.planning.trajectory import Reply, State, Trajectory

__all__ = [
    "Abandoned",
    "Ask",
    "CallApproximate",
    "CallTarget",
    "Cancel",
    "Cancelled",
    "Command",
    "Commit",
    "Event",
    "Execute",
    "Executed",
    "Failed",
    "Finish",
    "Finished",
    "Predicted",
    "Record",
    "Spent",
    "Started",
    "Stop",
]


@dataclass(frozen=True)
class Started:
    """The episode begins."""

    time: float


@dataclass(frozen=True)
class Finished:
    """An agent answered."""

    time: float
    call: int
    reply: Reply


@dataclass(frozen=True)
class Predicted:
    """The predictor answered: speculate `k` steps. Tokens are its own, where it is a language model."""

    time: float
    call: int
    k: int
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(frozen=True)
class Executed:
    """A tool answered."""

    time: float
    call: int
    observation: Any


@dataclass(frozen=True)
class Failed:
    """A call raised, ran out of time, or gave nothing that can be read. Tokens: what is known to be spent."""

    time: float
    call: int
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(frozen=True)
class Cancelled:
    """A call that was to be cancelled has ended. Tokens: None if nobody knows; then the prompt is estimated."""

    time: float
    call: int
    prompt_tokens: int | None = None
    generation_tokens: int | None = None


@dataclass(frozen=True)
class Abandoned:
    """A call did not end though it was cancelled and the patience is over. It may still run: nobody waits for it."""

    time: float
    call: int
    prompt_tokens: int | None = None
    generation_tokens: int | None = None


@dataclass(frozen=True)
class Spent:
    """An attempt of a call failed and cost tokens; the call goes on with the next attempt."""

    time: float
    call: int
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class Stop:
    """The caller wants no more: cancel everything."""

    time: float


Event = Started | Finished | Predicted | Executed | Failed | Cancelled | Abandoned | Spent | Stop


@dataclass(frozen=True)
class CallApproximate:
    """Ask the approximation agent for the step after `state`."""

    call: int
    state: State


@dataclass(frozen=True)
class CallTarget:
    """Ask the target agent for the step after `state`."""

    call: int
    state: State


@dataclass(frozen=True)
class Ask:
    """Ask the predictor how many steps from `state` are worth speculating."""

    call: int
    state: State


@dataclass(frozen=True)
class Execute:
    """Run the tool of `action`. Mode ``"speculative"``: the step is not confirmed, and the tool is pure or idempotent;
    ``"dry"``: not confirmed, run the rehearsal; ``"real"``: the step is confirmed."""

    call: int
    state: State
    action: Any
    mode: Literal["speculative", "dry", "real"]


@dataclass(frozen=True)
class Cancel:
    """End a call; answered by :class:`Cancelled`, by :class:`Abandoned`, or by its result if that was faster."""

    call: int


@dataclass(frozen=True)
class Commit:
    """The step at the end of `state` (``state.steps[-1]``) is final.

    Attributes:
        agreed: whether the approximation agent had said it; None if it had not answered.
        exact: whether the action is the target's own. False only after a fuzzy agreement.
    """

    state: State
    agreed: bool | None
    exact: bool


@dataclass(frozen=True)
class Record:
    """A trajectory to learn from: it ends in a true mismatch or in the end of the plan."""

    trajectory: Trajectory


@dataclass(frozen=True)
class Finish:
    """The episode is over: ``"terminated"``, ``"limit"`` (steps), ``"failed"`` (see `call`) or ``"stopped"``."""

    reason: Literal["terminated", "limit", "failed", "stopped"]
    call: int | None = None


Command = CallApproximate | CallTarget | Ask | Execute | Cancel | Commit | Record | Finish
