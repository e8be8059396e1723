"""What is compared: one case, several functions that compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["OURS", "Comparison"]

OURS = "tilewise"


@dataclass(frozen=True)
class Comparison:
    """One case: functions by name (one of them `OURS`) that compute the same."""

    room: str
    case: Any
    dtype: str
    functions: dict[str, Callable[[], Any]]
    bytes_read: int | None = None  # set where memory is the limit
