"""The attention hook: what a transformers attention module calls instead of its eager loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewise import torch as twt
from tilewise.errors import UnsupportedError

__all__ = ["attention_forward"]

# Arguments that modules pass through to every implementation and that do not change the result here, for the
# reason given. Anything else that is not None is refused by name, so that a new model fails loudly.
_HARMLESS = frozenset(
    (
        # Positions are already in the rotated queries and keys, and in the mask.
        "position_ids", "cache_position", "position_embeddings", "mm_token_type_ids", "token_type_ids",
        # The cache has been updated before the call; the hook sees its keys and values.
        "past_key_values", "past_key_value", "use_cache", "encoder_hidden_states", "layer_idx",
        # What the model collects or computes after attention.
        "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "num_items_in_batch",
        "labels", "shift_labels", "hidden_states", "input_ids", "inputs_embeds",
        # Packed layouts: transformers says the same in the 4-D mask, and these only serve flash kernels.
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens", "max_seqlen",
        # Choices of other kernels that change speed or memory alone.
        "deterministic", "target_dtype", "implementation", "use_top_left_mask",
    )
)  # fmt: skip

_REFUSED = {
    "softcap": "caps the scores",
    "position_bias": "is added to the scores",
    "indices": "selects single keys (DeepSeek sparse attention)",
    "cache": "is the paged cache of continuous batching",
    "head_mask": "scales whole heads",
    "alibi": "is added to the scores",
}


def _refuse(module: nn.Module, what: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} handed `{what}` to its attention, which {why}; tilewise's hook takes masks, sliding "
        "windows, sinks (`s_aux`) and `block_indices`. Load this model with attn_implementation='eager'."
    )


def _as_bool(module: nn.Module, mask: Tensor) -> Tensor:
    """A mask as bool, True = attend. An additive mask must hold only zero and minus infinity (or the lowest float)."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        raise _refuse(module, "attention_mask", f"is {mask.dtype}, where bool or an additive float mask is meant")
    keep = mask == 0
    if not bool((keep | (mask <= torch.finfo(mask.dtype).min)).all()):
        raise _refuse(module, "attention_mask", "holds numbers other than 0 and the lowest float: a bias on the scores")
    return keep


def _block_size(module: nn.Module) -> int:
    indexer = getattr(module, "indexer", None)
    size = getattr(indexer, "block_size", None)
    if size is None:
        size = getattr(getattr(module, "config", None), "index_block_size", None)
    if size is None:
        raise _refuse(module, "block_indices", "needs `indexer.block_size` or `config.index_block_size`")
    return int(size)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers module, with the meaning of ``sdpa_attention_forward``.

    Args:
        module: the calling module; read for ``is_causal``, ``sinks``, ``indexer`` and ``config``.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hk, Sk, D]``, before any repetition of heads.
        attention_mask: ``None`` (causal if the module is and ``Sq > 1``), bool, or additive with zeros and the
            lowest float only; broadcastable to ``[B, Hq, Sq, Sk]``.
        dropout: must be 0.
        scaling: factor on the scores; ``1 / sqrt(D)`` when ``None``.
        is_causal: overrides ``module.is_causal``.
        sliding_window: already in the mask; applied here where no mask was built.
        s_aux: ``[Hq]``, the attention sinks of gpt-oss; ``module.sinks`` when not given.
        block_indices: ``[B, groups, Sq, K]``, key blocks chosen by the indexer of MiniMax-M3, ANDed with the mask.
        kwargs: known-harmless ones are ignored, others refused.

    A query that sees no key gives zeros. MiniMax-M3 with left padding is the one place where that shows: its indexer
    scores pad keys too, so the model's choice of blocks depends on pad rows, and transformers' eager and sdpa
    already disagree there. Pad such models on the right.

    Returns:
        ``[B, Sq, Hq, D]`` contiguous, and ``None`` for the weights, which are never formed.

    Raises:
        UnsupportedError: dropout, an argument that changes the scores, or an unknown argument.
        DeviceError: tensors that are not on the CPU.
    """
    if dropout:
        raise _refuse(module, f"dropout={dropout}", "drops weights in training; set attention_dropout to 0")
    for name, argument in kwargs.items():
        if argument is None or name in _HARMLESS:
            continue
        if name == "output_attentions":
            if argument:
                raise _refuse(module, "output_attentions=True", "asks for the weights, which are never formed")
        elif name == "sinks" and s_aux is None:
            s_aux = argument
        else:
            raise _refuse(module, name, _REFUSED.get(name, "may change the result and is unknown here"))
    if s_aux is None:
        sinks = getattr(module, "sinks", None)
        s_aux = sinks if isinstance(sinks, Tensor) else None

    query_length = query.shape[2]
    causal, window = False, (-1, -1)
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal = bool(is_causal) and query_length > 1
        if causal and key.shape[2] > query_length:
            # transformers leaves the mask out here only for the prefill of an empty static cache, whose
            # unused tail lies behind the queries (its causality is aligned top-left).
            key, value = key[:, :, :query_length], value[:, :, :query_length]
        if sliding_window is not None and is_causal:
            window = (int(sliding_window) - 1, -1)
    else:
        attention_mask = _as_bool(module, attention_mask)
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)

    output = twt.attention(
        query,
        key,
        value,
        scale=scaling,
        causal=causal,
        window=window,
        mask=attention_mask,
        sinks=s_aux,
        block_indices=block_indices,
        block_size=None if block_indices is None else _block_size(module),
    )
    return output.transpose(1, 2).contiguous(), None
