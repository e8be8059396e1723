"""Agreement that is not equality: lossy, and said to be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tilewise.errors import ArgumentError

__all__ = ["similar"]


def similar(threshold: float = 0.5) -> Callable[[Any, Any], bool]:
    """Agreement of calls written as text: the same function name, and arguments that are alike.

    The guess is kept though it is not what the target said, so the plan may not be the target's
    (``PlanResult.lossless`` is False where that happened).

    Args:
        threshold: the similarity of the arguments must be above it: 1 - edit distance / the longer length, in [0, 1].

    Raises:
        ArgumentError: a threshold outside [0, 1].

    Example:
        >>> agree = similar(0.5)
        >>> agree("search(flights to Rome)", "search(flight to Rome)"), agree("search(Rome)", "book(Rome)")
        (True, False)
    """
    if not 0 <= threshold <= 1:
        raise ArgumentError(f"similar: threshold is in [0, 1], got {threshold}")

    def agree(guess: Any, truth: Any) -> bool:
        names, arguments = zip(*(_split(str(action)) for action in (guess, truth)), strict=True)
        if names[0] != names[1]:
            return False
        longer = max(map(len, arguments))
        return longer == 0 or 1.0 - _distance(*arguments) / longer > threshold or arguments[0] == arguments[1]

    return agree


def _split(action: str) -> tuple[str, str]:
    found = re.match(r"\s*([\w.-]*)\s*[(\[]?(.*?)[)\]]?\s*$", action, flags=re.DOTALL)
    assert found is not None  # every part may be empty
    return found.group(1), found.group(2)


def _distance(one: str, other: str) -> int:
    """Levenshtein: the fewest insertions, deletions and replacements of a character."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
