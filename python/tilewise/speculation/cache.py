"""What was drafted ahead, by the outcome it was drafted for: each entry is found by its whole outcome and used once."""

from __future__ import annotations

import operator
from typing import Any, Generic, NamedTuple, TypeVar

from tilewise import _core
from tilewise.errors import ArgumentError, DtypeError

__all__ = ["Outcome", "OutcomeCache"]

Entry = TypeVar("Entry")

_BITS = {"stream": 32, "round": 64, "accepted": 32, "token": 32}


class Outcome(NamedTuple):
    """How a verification came out, or may come out.

    Attributes:
        stream: the sequence, in [0, 2^32).
        round: the verification, counted from 0 in its stream; rounds never repeat. In [0, 2^64).
        accepted: how many drafted tokens were accepted, in [0, 2^32).
        token: the token that follows them, in [0, 2^32).
    """

    stream: int
    round: int
    accepted: int
    token: int


class OutcomeCache(Generic[Entry]):
    """Entries of any kind by :class:`Outcome`.

    Exactness rests on two things. A lookup compares all four numbers: the same token after another number of accepted
    ones, or in another round, is another key. And :meth:`take` removes what it returns: two uses of one random
    continuation would not be two independent ones.

    Example:
        >>> from tilewise.speculation import Outcome, OutcomeCache
        >>> cache = OutcomeCache()
        >>> cache.insert(Outcome(stream=0, round=5, accepted=2, token=7), [1, 2, 3])
        >>> cache.take(Outcome(0, 5, 1, 7)), cache.take(Outcome(0, 5, 2, 7)), cache.take(Outcome(0, 5, 2, 7))
        (None, [1, 2, 3], None)
    """

    def __init__(self) -> None:
        self._entries = _core.OutcomeCache()

    def insert(self, outcome: Outcome, entry: Entry) -> Entry | None:
        """Keeps `entry`, which must not be None.

        Returns:
            What is not kept: the entry that is replaced, or, if the outcome's round is retired, `entry` itself.

        Raises:
            ArgumentError, DtypeError: numbers outside their range, or none at all; `entry` None.
        """
        if entry is None:
            raise ArgumentError("entry: expected anything but None, which says 'no entry'")
        return self._call(self._entries.insert, outcome, entry)

    def take(self, outcome: Outcome) -> Entry | None:
        """The entry of exactly this outcome, which leaves the cache; None: a miss."""
        return self._call(self._entries.take, outcome)

    def get(self, outcome: Outcome) -> Entry | None:
        """The entry of exactly this outcome, which stays; None: there is none."""
        return self._call(self._entries.get, outcome)

    def retire(self, stream: int, round: int) -> list[Entry]:
        """Removes and returns what is left of a stream's rounds up to `round`, and refuses what comes later."""
        try:
            return self._entries.retire(stream, round)
        except (OverflowError, TypeError):
            raise _explain(stream=stream, round=round) from None

    def forget(self, stream: int) -> list[Entry]:
        """Removes and returns all entries of a stream; its number may be given to another one."""
        try:
            return self._entries.forget(stream)
        except (OverflowError, TypeError):
            raise _explain(stream=stream) from None

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def _call(method: Any, outcome: Outcome, *entry: Any) -> Any:
        try:
            return method(*outcome, *entry)
        except (OverflowError, TypeError):
            if len(outcome) != 4:
                raise ArgumentError(f"outcome: expected (stream, round, accepted, token), got {outcome!r}") from None
            raise _explain(**Outcome(*outcome)._asdict()) from None


def _explain(**numbers: Any) -> Exception:
    """Which of the numbers the core did not take."""
    for name, value in numbers.items():
        try:
            number = operator.index(value)
        except TypeError:
            return DtypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if not 0 <= number < 2 ** _BITS[name]:
            return ArgumentError(f"{name}: expected an integer in [0, 2^{_BITS[name]}), got {number}")
    return ArgumentError(f"expected {', '.join(numbers)}, got {tuple(numbers.values())}")
