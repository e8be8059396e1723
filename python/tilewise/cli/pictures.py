"""Files of pictures that commands write."""

from __future__ import annotations

from pathlib import Path

from tilewise.errors import ArgumentError, MissingExtraError

__all__ = ["check_picture"]


def check_picture(path: Path) -> None:
    """Whether a picture can be written to `path`, before the work that it shows.

    Raises:
        MissingExtraError: no matplotlib.
        ArgumentError: a format that matplotlib cannot write, or a directory that does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f"--plot needs matplotlib ({error}): pip install 'tilewise[viz]'") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ArgumentError(
            f"--plot: expected a name that ends in one of {', '.join(sorted(known))}, got {path.name!r}"
        )
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"--plot: the directory {str(path.absolute().parent)!r} does not exist")
