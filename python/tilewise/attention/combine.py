"""Mask functions of mask functions: all of them, any of them, none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from tilewise.errors import ArgumentError
from tilewise.expr import functions

__all__ = ["and_masks", "noop_mask", "or_masks", "sliced_mask"]


def noop_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
    """The mask_mod that keeps everything.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(noop_mask))
        True
    """
    return functions.constant_like(b, True)


def and_masks(*mask_mods: Callable[..., Any]) -> Callable[..., Any]:
    """The mask_mod that keeps what all of `mask_mods` keep; of none it keeps everything.

    Args:
        mask_mods: functions ``(b, h, q, k) -> bool`` or traced :class:`~tilewise.expr.Mod`.

    Raises:
        TypeError: not a function.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 4)))
        (q >= k) & (q - k < 4)
    """
    _check_callables(mask_mods)

    def and_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        result = None
        for mask_mod in mask_mods:
            kept = mask_mod(b, h, q, k)
            result = kept if result is None else result & kept
        return functions.constant_like(b, True) if result is None else result

    return and_mask


def or_masks(*mask_mods: Callable[..., Any]) -> Callable[..., Any]:
    """The mask_mod that keeps what any of `mask_mods` keeps; of none it keeps nothing.

    Args:
        mask_mods: functions ``(b, h, q, k) -> bool`` or traced :class:`~tilewise.expr.Mod`.

    Raises:
        TypeError: not a function.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(or_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: k < 4)))
        (q >= k) | (k < 4)
    """
    _check_callables(mask_mods)

    def or_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        result = None
        for mask_mod in mask_mods:
            kept = mask_mod(b, h, q, k)
            result = kept if result is None else result | kept
        return functions.constant_like(b, False) if result is None else result

    return or_mask


def _check_callables(mask_mods: tuple[Any, ...]) -> None:
    for place, mask_mod in enumerate(mask_mods):
        if not callable(mask_mod):
            raise TypeError(
                f"mask_mods[{place}]: expected a function (b, h, q, k) -> bool, got {type(mask_mod).__name__}"
            )


def sliced_mask(b: Any, h: Any, q: Any, k: Any) -> NoReturn:
    """The mask_mod of a sliced BlockMask: an error, since its query indices have moved."""
    raise ArgumentError(
        "this BlockMask was sliced, so the query indices of its mask_mod have moved: set sliced.mask_mod to a function "
        "that adds the offset of the first query to q, made from the mask_mod of the unsliced BlockMask"
    )
