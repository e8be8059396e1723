"""The command line: ``tilewise generate``, ``tilewise bench`` and ``tilewise doctor``.

Commands live in modules of their names; torch and transformers load inside the commands that need them, so
``tilewise --help`` answers at once.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the entry point ``tilewise``. Exits with 0, 1 (it failed) or 2 (it was called wrongly)."""
    try:
        from tilewise.cli.app import app
    except ImportError as error:
        sys.exit(f"the command line needs typer and rich ({error}); install them with: pip install 'tilewise[cli]'")
    app()
