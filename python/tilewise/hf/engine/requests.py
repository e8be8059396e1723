"""A sequence as the engine sees it: its tokens, when it ends, and what the caller has read of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tilewise.hf.runners import Runner
from tilewise.speculation import MixtureDraft

__all__ = ["Chain", "Content", "Generated", "Request", "Stops"]


@dataclass
class Generated:
    """What came of a prompt.

    Attributes:
        tokens: the new tokens; the last may be a stop token.
        reason: ``"limit"``, ``"stopped"`` (a stop token or a stop string) or ``"aborted"``.
        text: of the new tokens, up to and with the stop string, if a tokenizer was given.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    text: str | None = None


class Stops:
    """When a sequence ends: after a stop token, or where the text first holds a stop string."""

    def __init__(self, tokens: Collection[int], strings: Sequence[str], tokenizer: object | None):
        self._tokens, self._strings = frozenset(tokens), tuple(strings)
        self._stream = tokenizer.stream() if tokenizer is not None and self._strings else None  # type: ignore[attr-defined]
        self._tail = ""
        self._longest = max((len(string) for string in self._strings), default=0)

    def after(self, token: int) -> bool:
        """Whether this token is the last."""
        if token in self._tokens:
            return True
        if self._stream is None:
            return False
        # Only text that this token completes can be new; what is older cannot begin a string that ends here.
        self._tail += self._stream.feed(token)
        found = any(string in self._tail for string in self._strings)
        self._tail = self._tail[max(0, len(self._tail) - self._longest) :]
        return found


class Content(NamedTuple):
    """What a draft sent, until it is verified or of no more use.

    Attributes:
        tokens, laws: drafted.
        share: the chance that all of it is kept.
        whole: whether the draft ended it by itself.
    """

    tokens: list[int]
    laws: list[Any] | None
    share: float
    whole: bool


class Chain(NamedTuple):
    """A chain in verification.

    Attributes:
        tokens, laws: drafted.
        own: how many tokens are the draft's own; those behind were looked up.
        ended: whether the draft ended it by itself.
    """

    tokens: list[int]
    laws: list[Any] | None = None
    own: int = 0
    ended: bool = False


@dataclass
class Request:
    """One sequence in the engine."""

    stream: int
    request: int
    prompt: list[int]
    limit: int
    stops: Stops
    result: Generated
    runner: Runner | None = None
    lookup: MixtureDraft | None = None
    longest: int = 0
    """Most tokens to look up."""
    found: list[int] | None = None
    """What was looked up after the last committed token."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and committed tokens."""
    chains: dict[int, Chain] = field(default_factory=dict)
    """Of rounds in verification."""
    unread: list[int] = field(default_factory=list)
    started: bool = False

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return bool(self.result.reason)

    def look_up(self, least: float) -> float | None:
        """Look up what may follow, as far as the chance of it is `least`; returns how many tokens of it are expected to
        be right, if there is where to look."""
        self.found = None
        if self.lookup is None or self.over:
            return None
        self.lookup.extend(self.tokens[len(self.lookup) :])
        guess = self.lookup.guess(self.longest, least=least)
        self.found = guess.tokens
        return guess.expected

    def look_up_behind(self, chain: list[int], share: float, least: float) -> list[int]:
        """The same behind a chain of the draft's that is kept with the chance `share`."""
        room = min(self.longest, self.limit - len(self.result.tokens) - 1) - len(chain)
        if self.lookup is None or share <= least or room <= 0:
            return []
        return self.lookup.guess(room, chain, least / share).tokens

    def emit(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Commit tokens up to the limit and the first stop; returns how many, and whether a stop was among them."""
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self.result.tokens.append(token)
            self.unread.append(token)
            if self.stops.after(token):
                return count, True
            if len(self.result.tokens) == self.limit:
                return count, False
        return len(tokens), False
