"""Arguments of masks and mods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.expr import Array, array

__all__ = ["MaskMod", "flags", "integers", "named", "numbers", "pair", "whole"]

MaskMod = Callable[[Any, Any, Any, Any], Any]


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def pair(name: str, value: Any, least: int = 1, ranks: tuple[int, ...] = (2,)) -> tuple[int, ...]:
    """Whole numbers, one for each axis of a grid."""
    try:
        numbers = tuple(value)
    except TypeError:
        numbers = ()
    if len(numbers) not in ranks:
        raise ArgumentError(f"{name}: expected {' or '.join(map(str, ranks))} whole numbers, got {value!r}")
    return tuple(whole(name, one, least) for one in numbers)


def _captured(name: str, value: Any, ranks: tuple[int, ...], classes: tuple[str, ...]) -> Array:
    captured = array(value, name)
    if captured.ndim not in ranks:
        raise ShapeError(
            f"{name}: expected {' or '.join(map(str, ranks))} axes, got {captured.ndim} {list(captured.shape)}"
        )
    if captured.capture.cls not in classes:
        raise DtypeError(f"{name}: expected {' or '.join(classes)} elements, got {captured.dtype}")
    return captured


def integers(name: str, value: Any, *ranks: int) -> Array:
    """A captured array of integers with one of the ranks."""
    return _captured(name, value, ranks, ("int",))


def flags(name: str, value: Any, *ranks: int) -> Array:
    """A captured array of bools with one of the ranks."""
    return _captured(name, value, ranks, ("bool",))


def numbers(name: str, value: Any, *ranks: int) -> Array:
    """A captured array of numbers with one of the ranks."""
    return _captured(name, value, ranks, ("float", "int"))


def named(function: Any, name: str) -> Any:
    """The function under the name that messages and pictures show."""
    function.__name__ = function.__qualname__ = name
    return function
