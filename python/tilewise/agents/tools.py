"""Tools of a plan, and the guard that keeps side effects away from unconfirmed steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tilewise.errors import ArgumentError
from tilewise.scheduler.planning import Handling, State

__all__ = ["Tool", "Toolbox"]

Effects = Literal["pure", "idempotent", "effects"]
Run = Callable[[Any, State], Awaitable[Any]]
_HANDLING: dict[tuple[str, bool], Handling] = {
    ("pure", False): "free", ("pure", True): "free", ("idempotent", False): "free", ("idempotent", True): "free",
    ("effects", False): "guarded", ("effects", True): "dry",
}  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        run: async ``(action, state) -> observation``, where `state` is the prefix before the step.
        effects: ``"pure"`` or ``"idempotent"``: may run for a step that is only guessed, and its observation is kept
            if the guess turns out right. ``"effects"`` (the default): runs exactly once, and only for a confirmed step.
        dry: async ``(action, state) -> observation`` without any effect, for a tool with effects: planning goes on
            from what it says, and is cut if the real run says something else.

    Raises:
        ArgumentError: an unknown kind of effects.
    """

    run: Run
    effects: Effects = "effects"
    dry: Run | None = None

    def __post_init__(self) -> None:
        if (self.effects, False) not in _HANDLING:
            raise ArgumentError(f"Tool: effects is 'pure', 'idempotent' or 'effects'; got {self.effects!r}")


class Toolbox:
    """Finds the tool of an action, and says what may be done with the action before it is confirmed.

    Args:
        tools: by name.
        name: the tool's name for an action; None: the action has no tool. By default the action's first element if it
            is a tuple, the text before ``(`` or ``[`` if it is a string.

    Raises:
        ArgumentError: when an action names a tool that is not there.

    Example:
        >>> async def look(action, state):
        ...     return "found"
        >>> box = Toolbox({"search": Tool(look, "pure"), "book": Tool(look)})
        >>> box.guard("search(flights)"), box.guard("book(7)")
        ('free', 'guarded')
    """

    def __init__(self, tools: Mapping[str, Tool], name: Callable[[Any], str | None] | None = None) -> None:
        self.tools = dict(tools)
        self._name = _first if name is None else name

    def find(self, action: Any) -> Tool | None:
        """The tool of an action, or None."""
        name = self._name(action)
        if name is None:
            return None
        if name not in self.tools:
            known = ", ".join(sorted(self.tools)) or "none"
            raise ArgumentError(f"Toolbox: action {action!r} names the tool {name!r}; there is {known}")
        return self.tools[name]

    def guard(self, action: Any) -> Handling:
        """What may be done with an action whose step is not confirmed: the rule that the planner's machine follows.

        An unknown tool, or an action that cannot be read, is guarded: the guess may be wrong, and only a confirmed
        step may raise.
        """
        try:
            name = self._name(action)
        except Exception:
            return "guarded"  # find() raises it once the step is confirmed
        if name is None:
            return "none"
        tool = self.tools.get(name)
        return "guarded" if tool is None else _HANDLING[tool.effects, tool.dry is not None]


def _first(action: Any) -> str | None:
    if isinstance(action, tuple) and action:
        return str(action[0])
    if isinstance(action, str):
        return action.partition("(")[0].partition("[")[0].strip()
    raise ArgumentError(f"Toolbox: give name=..., the default reads tuples and strings, got {type(action).__name__}")
