"""``tilewise plan --measure``: the numbers that a plan is made of, taken from a pair of models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tilewise.errors import ArgumentError, MissingExtraError

__all__ = ["measured"]


def measured(
    model: str | None, draft: str | None, prompts: Path | None, temperature: float, as_json: bool
) -> dict[str, Any]:
    """Run a pair (the default one if none is named) in several modes and return what was measured.

    Raises:
        ArgumentError: a file that cannot be read, or holds no text.
        MissingExtraError: torch or transformers is not installed.
    """
    try:
        import transformers

        from tilewise.hf.engine import measure
        from tilewise.hf.models import load_pair
    except ImportError as error:
        raise MissingExtraError(
            f"tilewise plan --measure needs torch and transformers ({error}): pip install 'tilewise[hf]'"
        ) from error
    texts = _texts(prompts)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pair = load_pair(model, draft)
    if pair.draft is None:
        raise ArgumentError(
            "--measure needs a draft beside --model: name one that speaks its tokens with --draft-model"
        )
    tokens = [list(pair.tokenizer.encode(text)) for text in texts]
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("measuring", total=1.0)
        return measure(
            pair.target,
            pair.draft,
            tokens,
            temperature=temperature,
            watch=lambda done: bar.update(task, completed=done),
        )


def _texts(prompts: Path | None) -> list[str]:
    if prompts is None:
        from tilewise.cli.generate import DEFAULT_PROMPT

        return [DEFAULT_PROMPT, "import os\n\n\ndef ", "class Queue:\n    def __init__(self, maxsize=0):\n"]
    try:
        texts = [text.strip("\n") for text in prompts.read_text().split("\n\n\n")]
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--prompts: cannot read {str(prompts)!r} as text: {error}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ArgumentError(f"--prompts: expected texts with two empty lines between them, found none in {prompts}")
    return texts
