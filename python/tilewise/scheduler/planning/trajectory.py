"""What an episode is made of: steps, what agents see of them, and what they answer. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from tilewise.errors import ArgumentError

__all__ = ["TERMINATE", "Handling", "Reply", "State", "Step", "Trajectory", "exact", "no_tools"]


class _Terminate:
    """The one value of :data:`TERMINATE`: equal to itself alone, also after a copy or a pickle."""

    _one: _Terminate | None = None

    def __new__(cls) -> _Terminate:
        if cls._one is None:
            cls._one = super().__new__(cls)
        return cls._one

    def __repr__(self) -> str:
        return "TERMINATE"

    def __reduce__(self) -> tuple[type[_Terminate], tuple[()]]:
        return _Terminate, ()


#: The action that says: the plan is complete, there is no further step.
TERMINATE: Final = _Terminate()

#: What may be done with an action before the target has confirmed it: ``"none"`` (there is nothing to execute),
#: ``"free"`` (execute it: pure or idempotent), ``"dry"`` (only its rehearsal), ``"guarded"`` (nothing: wait).
Handling = Literal["none", "free", "dry", "guarded"]


@dataclass(frozen=True)
class Step:
    """One step of a plan as agents see it: nothing says who proposed it.

    Attributes:
        index: 0 for the first.
        action: what an agent answered.
        observation: what the action's tool gave back; None where there is no tool.
    """

    index: int
    action: Any
    observation: Any = None


@dataclass(frozen=True)
class State:
    """What an agent is asked with.

    Attributes:
        task: what the episode was started with.
        steps: the prefix, the oldest first.
        corrections: guesses of the approximation agent that the target replaced, as (step, guess). Only the
            approximation agent gets them: the target must answer as if nobody had guessed.
    """

    task: Any
    steps: tuple[Step, ...] = ()
    corrections: tuple[tuple[int, Any], ...] = ()

    @property
    def index(self) -> int:
        """Of the step that is asked for."""
        return len(self.steps)


@dataclass(frozen=True)
class Reply:
    """An agent's answer: the next action, and what the call cost.

    Attributes:
        action: anything that :func:`exact` (or the planner's ``agree``) can compare; :data:`TERMINATE` ends the plan
            without a further step. None means that the answer could not be read.
        prompt_tokens, generation_tokens: of the call.
        last: the plan ends after this step.

    Raises:
        ArgumentError: a negative number of tokens.
    """

    action: Any
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "generation_tokens"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ArgumentError(f"Reply: {name} is a number of tokens, 0 or more; got {count!r}")

    @property
    def ends(self) -> bool:
        """Whether no step follows."""
        return self.last or self.action is TERMINATE


@dataclass(frozen=True)
class Trajectory:
    """States up to and including the one whose step was the first mismatch, or the end of the plan.

    The reward of each is 1 and the value after the last is 0, so the state ``j`` from the end (1 for the last) is
    worth ``j``: that many steps are worth speculating from there, the corrected one among them (k >= 1).
    """

    states: tuple[State, ...]


def exact(guess: Any, truth: Any) -> bool:
    """Whether two actions are equal: the agreement that keeps planning lossless.

    Example:
        >>> exact("search(a)", "search(a)"), exact("search(a)", "search(A)")
        (True, False)
    """
    return bool(guess == truth)


def no_tools(action: Any) -> Handling:
    """The handling of every action where nothing is executed."""
    return "none"


def same(guess: Reply, truth: Reply, agree: Callable[[Any, Any], bool]) -> bool:
    """Whether two answers are the same step: both end the plan in the same way, or neither does and they agree."""
    if guess.action is TERMINATE or truth.action is TERMINATE:
        return guess.action is truth.action
    return guess.last == truth.last and bool(agree(guess.action, truth.action))
