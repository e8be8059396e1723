"""Tokens by role, kind and fate; every one issued has exactly one fate.

Roles: ``approximate``, ``target``, ``predictor``. Kinds: ``prompt``, ``generation``. Fates:

* ``kept``: the call's answer is a step of the plan (or, for the predictor, was used);
* ``completed``: the call answered, or failed, and its answer is not in the plan: waste;
* ``cancelled``: the call was cancelled: waste.

What a cancelled call cost is what its caller reports. Providers may bill it, so nothing is not assumed: where nobody
reports, its prompt is *estimated* as the last prompt of the same role that is known (prompts grow step by step), its
generation as 0, and both the number of such calls and the estimated tokens are shown apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tilewise.errors import ArgumentError, InternalError

__all__ = ["FATES", "KINDS", "ROLES", "Fate", "Ledger", "Role"]

Role = Literal["approximate", "target", "predictor"]
Fate = Literal["kept", "completed", "cancelled"]
ROLES: tuple[Role, ...] = ("approximate", "target", "predictor")
KINDS = ("prompt", "generation")
FATES: tuple[Fate, ...] = ("kept", "completed", "cancelled")


@dataclass
class Ledger:
    """The account of one episode, or of many (:meth:`add`).

    Attributes:
        tokens: by (role, kind, fate).
        calls: by (role, fate).
        issued: tokens by (role, kind), counted when a call ends and before its fate is known.
        estimated_calls: cancelled calls whose cost nobody reported.
        estimated_tokens: what was put down for them (already in ``tokens``).

    Example:
        >>> ledger = Ledger()
        >>> ledger.end(0, "target", 100, 20); ledger.settle(0, "kept")
        >>> ledger.end(1, "target", 130, 7); ledger.settle(1, "completed")
        >>> ledger.total(role="target", kind="prompt"), ledger.total(fate="completed"), ledger.balances()
        (230, 137, True)
    """

    tokens: dict[tuple[str, str, str], int] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    issued: dict[tuple[str, str], int] = field(default_factory=dict)
    estimated_calls: int = 0
    estimated_tokens: int = 0
    _open: dict[int, tuple[Role, int, int]] = field(default_factory=dict, repr=False)
    _prompts: dict[str, int] = field(default_factory=dict, repr=False)

    def end(self, call: int, role: Role, prompt: int, generation: int) -> None:
        """A call ended and its cost is known; its fate follows (:meth:`settle`).

        Raises:
            ArgumentError: an unknown role or a negative number.
        """
        if role not in ROLES:
            raise ArgumentError(f"ledger: role {role!r} is not one of {', '.join(ROLES)}")
        if prompt < 0 or generation < 0:
            raise ArgumentError(f"ledger: tokens are 0 or more, got prompt {prompt}, generation {generation}")
        if call in self._open:
            raise InternalError(f"ledger: call {call} ended twice")
        for kind, count in (("prompt", prompt), ("generation", generation)):
            self.issued[role, kind] = self.issued.get((role, kind), 0) + count
        if prompt:
            self._prompts[role] = prompt
        self._open[call] = (role, prompt, generation)

    def settle(self, call: int, fate: Fate) -> None:
        """The fate of a call that ended; once only."""
        if call not in self._open:
            raise InternalError(f"ledger: call {call} has not ended, or has its fate already")
        role, prompt, generation = self._open.pop(call)
        self.calls[role, fate] = self.calls.get((role, fate), 0) + 1
        for kind, count in (("prompt", prompt), ("generation", generation)):
            self.tokens[role, kind, fate] = self.tokens.get((role, kind, fate), 0) + count

    def waste(self, role: Role, prompt: int, generation: int) -> None:
        """Tokens of a failed attempt of a call that goes on: issued, and completed waste."""
        for kind, count in (("prompt", prompt), ("generation", generation)):
            self.issued[role, kind] = self.issued.get((role, kind), 0) + count
            self.tokens[role, kind, "completed"] = self.tokens.get((role, kind, "completed"), 0) + count

    def cancel(self, call: int, role: Role, prompt: int | None, generation: int | None) -> int:
        """A call was cancelled. What is None is not known: the prompt is estimated, see the module.

        Returns:
            The prompt tokens put down.
        """
        if prompt is None:
            prompt = self._prompts.get(role, 0)
            self.estimated_calls += 1
            self.estimated_tokens += prompt
        self.end(call, role, prompt, generation or 0)
        self.settle(call, "cancelled")
        return prompt

    def total(self, *, role: str | None = None, kind: str | None = None, fate: str | None = None) -> int:
        """Tokens of a role, a kind and a fate; None: of all."""
        wanted = (role, kind, fate)
        return sum(
            count for key, count in self.tokens.items() if all(w in (None, k) for w, k in zip(wanted, key, strict=True))
        )

    def balances(self) -> bool:
        """Whether every call has its fate, and kept + completed + cancelled = issued for each role and kind."""
        return not self._open and all(
            self.total(role=role, kind=kind) == self.issued.get((role, kind), 0) for role in ROLES for kind in KINDS
        )

    def cost(self, prices: Mapping[tuple[str, str], float], *, fate: str | None = None) -> float:
        """Money: tokens times the price of a token by (role, kind); what has no price is free."""
        return sum(
            price * self.total(role=role, kind=kind, fate=fate) for (role, kind), price in sorted(prices.items())
        )

    def add(self, other: Ledger) -> None:
        """Add a closed account to this one."""
        for mine, theirs in ((self.tokens, other.tokens), (self.calls, other.calls), (self.issued, other.issued)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count  # type: ignore[index]
        self.estimated_calls += other.estimated_calls
        self.estimated_tokens += other.estimated_tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{role: {kind: {fate: tokens}}}``, the calls likewise, and what was estimated."""
        return {
            "tokens": {
                role: {kind: {fate: self.total(role=role, kind=kind, fate=fate) for fate in FATES} for kind in KINDS}
                for role in ROLES
            },
            "calls": {role: {fate: self.calls.get((role, fate), 0) for fate in FATES} for role in ROLES},
            "estimated_calls": self.estimated_calls,
            "estimated_tokens": self.estimated_tokens,
        }
