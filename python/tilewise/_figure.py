"""Where pictures are drawn: axes that were given, or those of a new figure that nothing global knows of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewise.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes"]


def axes(ax: Axes | None, width: float = 7.0, height: float = 3.6) -> Axes:
    """`ax`, or the axes of a new figure of this size in inches.

    Raises:
        MissingExtraError: no matplotlib.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"pictures need matplotlib ({error}); install it with: pip install 'tilewise[viz]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained").subplots()
