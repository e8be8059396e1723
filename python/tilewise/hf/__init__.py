"""tilewise inside Hugging Face models::

    import tilewise.hf
    tilewise.hf.register()
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="tilewise", experts_implementation="tilewise"
    )

or, for a model that is there already, ``tilewise.hf.switch(model)``. Both train (attention with dropout, soft caps and
sinks too); ``tilewise.hf.round_tokens(model)`` adds token rounding to the experts.
``tilewise.hf.SpeculativeDecoder`` generates with a draft model, ``tilewise.hf.SpeculativeGenerator`` with drafts made
ahead, in processes of their own.

Importing this package changes nothing in transformers; :func:`register` does, explicitly and as often as one likes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tilewise.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tilewise.hf.attention import attention_forward
    from tilewise.hf.engine import EngineStats, SpeculativeGenerator, custom_generate, serve_draft
    from tilewise.hf.experts import experts_forward
    from tilewise.hf.generate import SpeculativeDecoder
    from tilewise.hf.masks import attention_mask
    from tilewise.hf.rounding import TokenRounding, round_tokens

__all__ = [
    "NAME",
    "EngineStats",
    "SpeculativeDecoder",
    "SpeculativeGenerator",
    "TokenRounding",
    "attention_forward",
    "attention_mask",
    "custom_generate",
    "experts_forward",
    "register",
    "round_tokens",
    "serve_draft",
    "switch",
]

NAME = "tilewise"
"""The name to give as ``attn_implementation`` and ``experts_implementation``."""

_HOMES = {
    "attention_forward": "tilewise.hf.attention",
    "attention_mask": "tilewise.hf.masks",
    "experts_forward": "tilewise.hf.experts",
    "TokenRounding": "tilewise.hf.rounding",
    "round_tokens": "tilewise.hf.rounding",
    "SpeculativeDecoder": "tilewise.hf.generate",
    "SpeculativeGenerator": "tilewise.hf.engine",
    "EngineStats": "tilewise.hf.engine",
    "custom_generate": "tilewise.hf.engine",
    "serve_draft": "tilewise.hf.engine",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; they come with the first name that needs them.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Add ``"tilewise"`` to the attention, mask and experts interfaces of transformers.

    Calling it again is harmless. Models are not touched: choose the name when loading one, or call :func:`switch`.

    Raises:
        MissingExtraError: torch or transformers (5.3 or later) is not installed.

    Example:
        >>> import tilewise.hf
        >>> tilewise.hf.register()
        >>> from transformers import AttentionInterface
        >>> "tilewise" in AttentionInterface()
        True
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise MissingExtraError(
            f"tilewise.hf needs torch and transformers >= 5.3 ({error}); install them with: pip install 'tilewise[hf]'"
        ) from error
    from tilewise.hf.attention import attention_forward
    from tilewise.hf.experts import experts_forward
    from tilewise.hf.masks import attention_mask

    # The mask comes first: an attention without its mask function would silently attend padding.
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(NAME, attention_forward)
    ExpertsInterface.register(NAME, experts_forward)


def switch(model: PreTrainedModel, *, attention: bool = True, experts: bool = True) -> None:
    """Let a model compute its attention and its experts with tilewise from now on.

    Args:
        model: any model of transformers.
        attention: switch attention.
        experts: switch the experts, if the model has any.

    What ``model.set_attn_implementation`` and ``model.set_experts_implementation`` do; the latter takes names of others
    than transformers' own only from 5.10 on, and this function takes care of that.

    Raises:
        MissingExtraError: torch or transformers is not installed.
    """
    register()
    if attention:
        model.set_attn_implementation(NAME)
    if not experts or not model._can_set_experts_implementation():
        return
    try:
        model.set_experts_implementation(NAME)
    except ValueError:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation_internal"):
                config._experts_implementation_internal = NAME
