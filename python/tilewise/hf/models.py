"""Find and load a pair of models: the default one that ships with tilewise, a directory, or a cached repository."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tilewise
import tilewise.hf
from tilewise.errors import ModelNotFoundError, UnsupportedError, VocabularyError
from tilewise.hf.tokenizers import ByteTokenizer, HubTokenizer, Tokenizer

__all__ = ["DEFAULT_DRAFT", "DEFAULT_TARGET", "Pair", "check_vocabulary", "load_model", "load_pair", "load_tokenizer"]

_SHIPPED = Path(tilewise.__file__).parent / "models"
DEFAULT_TARGET = _SHIPPED / "target"
"""The model that ships with tilewise: bytes in, bytes out, MiniMax-M3's text architecture."""
DEFAULT_DRAFT = _SHIPPED / "draft"
"""Its dense draft."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_ALLOWED = (
    "Allowed: a directory with config.json and model.safetensors, or the name of a repository that is already in the "
    "Hugging Face cache (fetch one with `hf download NAME`; tilewise itself never downloads)"
)


@dataclass(frozen=True)
class Pair:
    """A target, perhaps a draft that speaks the same tokens, and the target's tokenizer."""

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: Tokenizer
    target_name: str
    draft_name: str | None
    stop_tokens: frozenset[int]


def _find(model: str | os.PathLike[str], role: str) -> str:
    """Resolve a model to something ``from_pretrained`` reads without a network."""
    text = os.fspath(model)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ModelNotFoundError(
            f"the {role} {text!r} is a directory without config.json (it holds {inside}). {_ALLOWED}."
        )
    if path in (DEFAULT_TARGET, DEFAULT_DRAFT):
        raise ModelNotFoundError(
            f"the default {role} is not installed: {path} does not exist. A wheel carries it; in a source tree write "
            f"it with examples/train_tiny.py, or name another model. {_ALLOWED}."
        )
    if path.exists():
        raise ModelNotFoundError(f"the {role} {text!r} is a file. {_ALLOWED}.")
    if not _REPOSITORY.fullmatch(text):
        raise ModelNotFoundError(
            f"the {role} {text!r} does not exist (looked for the directory {path.absolute()}). {_ALLOWED}."
        )
    return text


def _config(source: str, role: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if os.path.isdir(source):
            raise ModelNotFoundError(
                f"the {role} {source!r} has a config.json that transformers cannot use: {error}"
            ) from error
        raise ModelNotFoundError(
            f"the {role} {source!r} is neither a directory here ({Path(source).absolute()}) nor a repository in the "
            f"Hugging Face cache. {_ALLOWED}."
        ) from error


def _vocabulary_size(config: Any) -> int:
    return int(config.get_text_config(decoder=True).vocab_size)


def load_model(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    implementation: str = "tilewise",
    role: str = "model",
) -> PreTrainedModel:
    """Load a causal language model for inference, never from the network.

    Args:
        model: a directory, or the name of a repository in the Hugging Face cache; the default target when ``None``.
        dtype: of the weights and the arithmetic; float32 when ``None`` (exact comparisons of speculative with plain
            output need it: in bfloat16 near-ties fall differently for different numbers of tokens a step). ``"auto"``
            takes what the checkpoint was saved in.
        implementation: for attention and experts: ``"tilewise"``, or any other that transformers knows.
        role: what to call the model in error messages.

    Raises:
        ModelNotFoundError: no such model; the message says where it looked.

    Example:
        >>> model = load_model()
    """
    source = _find(DEFAULT_TARGET if model is None else model, role)
    return _load(source, _config(source, role), dtype, implementation, role)


def _load(source: str, config: Any, dtype: torch.dtype | str | None, implementation: str, role: str) -> PreTrainedModel:
    tilewise.hf.register()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=implementation,
            local_files_only=True,
        )
        if implementation == tilewise.hf.NAME:
            tilewise.hf.switch(loaded)
        elif loaded._can_set_experts_implementation():
            loaded.set_experts_implementation(implementation)
    except OSError as error:
        raise ModelNotFoundError(
            f"the {role} {source!r} has a config.json but no weights that load: {error}"
        ) from error
    except ValueError as error:
        raise UnsupportedError(
            f"the {role} {source!r} does not load with implementation={implementation!r}: {error}"
        ) from error
    return loaded.eval().requires_grad_(False)


def load_tokenizer(model: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model: its own, or bytes if it has none and knows 256 tokens.

    Raises:
        ModelNotFoundError: the model has no tokenizer and its vocabulary is not 256 bytes.
    """
    source = os.fspath(model)
    present = not os.path.isdir(source) or any(os.path.exists(os.path.join(source, name)) for name in _TOKENIZER_FILES)
    if present:
        try:
            return HubTokenizer(AutoTokenizer.from_pretrained(source, local_files_only=True))
        except (OSError, ValueError) as error:
            if vocab_size != 256:
                raise ModelNotFoundError(f"the tokenizer of {source!r} does not load: {error}") from error
    if vocab_size == 256:
        return ByteTokenizer()
    raise ModelNotFoundError(
        f"{source!r} has no tokenizer (looked for {', '.join(_TOKENIZER_FILES)}), and its vocabulary of {vocab_size} "
        "tokens is not the 256 bytes that need none. Put the tokenizer's files beside config.json."
    )


def check_vocabulary(target: Tokenizer, draft: Tokenizer, target_size: int, draft_size: int) -> None:
    """Refuse a draft whose tokens mean something else than the target's.

    Args:
        target, draft: the two tokenizers.
        target_size, draft_size: the models' own vocabulary sizes, which may be padded beyond the tokenizers'.

    Raises:
        VocabularyError: sizes or meanings differ; names the first token that does.
    """
    if target_size != draft_size:
        raise VocabularyError(
            f"the draft knows {draft_size} tokens and the target {target_size}; a draft must speak the target's "
            "tokens. Choose a draft of the same model family, or none."
        )
    if isinstance(target, HubTokenizer) and isinstance(draft, HubTokenizer):
        theirs, ours = draft.inner.get_vocab(), target.inner.get_vocab()
        if theirs != ours:
            token = next(name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name))
            raise VocabularyError(
                f"the token {token!r} is {ours.get(token, 'absent')} for the target and {theirs.get(token, 'absent')} "
                "for the draft; a draft must speak the target's tokens: choose one of the same family, or none."
            )
    elif type(target) is not type(draft):
        kinds = [("bytes" if isinstance(t, ByteTokenizer) else "a tokenizer of its own") for t in (target, draft)]
        raise VocabularyError(
            f"the target speaks {kinds[0]} and the draft {kinds[1]}; choose a draft that fits, or none."
        )


def load_pair(
    target: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    implementation: str = "tilewise",
) -> Pair:
    """Load a target and, if there is one, its draft.

    Args:
        target: a directory or a cached repository's name; ``None`` is the default pair's target.
        draft: likewise; ``None`` is the default draft for the default target, and no draft for any other.
        dtype: see :func:`load_model`.
        implementation: see :func:`load_model`.

    Raises:
        ModelNotFoundError: a model or a tokenizer is missing; nothing is downloaded.
        VocabularyError: the draft does not speak the target's tokens (checked before any weight is read).

    Example:
        >>> pair = load_pair()
        >>> pair.tokenizer.encode("def ")
        [100, 101, 102, 32]
    """
    if target is None and draft is None:
        draft = DEFAULT_DRAFT
    source = _find(DEFAULT_TARGET if target is None else target, "target")
    config = _config(source, "target")
    tokenizer = load_tokenizer(source, _vocabulary_size(config))
    small, small_source = None, None
    if draft is not None:
        small_source = _find(draft, "draft")
        small_config = _config(small_source, "draft")
        check_vocabulary(
            tokenizer,
            load_tokenizer(small_source, _vocabulary_size(small_config)),
            _vocabulary_size(config),
            _vocabulary_size(small_config),
        )
        small = _load(small_source, small_config, dtype, implementation, "draft")
    large = _load(source, config, dtype, implementation, "target")
    return Pair(large, small, tokenizer, source, small_source, _stop_tokens(large))


def _stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """End-of-sequence ids as a set; configs write none, one or several."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)
