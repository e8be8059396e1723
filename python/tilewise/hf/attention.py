"""The attention hook: what a transformers attention module calls instead of its eager loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewise import torch as twt
from tilewise.attention.programs import added_bias
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
    "indices": "selects single keys (DeepSeek sparse attention)",
    "cache": "is the paged cache of continuous batching",
    "head_mask": "scales whole heads",
    "alibi": "is added to the scores",
}


def _refuse(module: nn.Module, what: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} handed `{what}` to its attention, which {why}; tilewise's hook takes masks and "
        "biases, sliding windows, soft caps, sinks (`s_aux`) and `block_indices`. Load this model with "
        "attn_implementation='eager'."
    )


def _as_rules(module: nn.Module, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask as ``(bool, True = attend; what is added to the scores)``; either may be None.

    Additive masks of zeros and the lowest float are bools. Others are biases (with a gradient, if they require one),
    in which the lowest float still says "do not attend", so that a row without any key is empty.
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.dtype.is_floating_point:
        raise _refuse(module, "attention_mask", f"is {mask.dtype}, where bool or an additive float mask is meant")
    keep = mask > torch.finfo(mask.dtype).min
    if not mask.requires_grad and bool(((mask == 0) | ~keep).all()):
        return keep, None
    return keep, torch.where(keep, mask, 0.0)


def _four_axes(module: nn.Module, name: str, bias: Tensor) -> Tensor:
    if bias.dim() > 4:
        raise _refuse(module, name, f"has {bias.dim()} axes, where [batch, heads, queries, keys] is meant")
    return bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))


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
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers module, with the meaning of ``sdpa_attention_forward`` and with gradients.

    Differentiable by queries, keys, values, sinks and additive masks; it trains.

    Args:
        module: the calling module; read for ``is_causal``, ``sinks``, ``indexer`` and ``config``.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hk, Sk, D]``, before any repetition of heads.
        attention_mask: ``None`` (causal if the module is and ``Sq > 1``), bool, or additive, in which the lowest float
            masks; broadcastable to ``[B, Hq, Sq, Sk]``.
        dropout: probability that a weight is dropped (modules pass 0 in evaluation); the seed is drawn from torch's
            generator.
        scaling: factor on the scores; ``1 / sqrt(D)`` when ``None``.
        is_causal: overrides ``module.is_causal``.
        sliding_window: already in the mask; applied here where no mask was built.
        s_aux: ``[Hq]``, the attention sinks of gpt-oss; ``module.sinks`` when not given.
        block_indices: ``[B, groups, Sq, K]``, key blocks chosen by the indexer of MiniMax-M3, ANDed with the mask.
        softcap: ``s -> softcap * tanh(s / softcap)``, as in Gemma 2.
        position_bias: added to the scores, broadcastable as the mask.
        kwargs: known-harmless ones are ignored, others refused.

    A query that sees no key gives zeros. MiniMax-M3 with left padding is the one place where that shows: its indexer
    scores pad keys too, so the model's choice of blocks depends on pad rows, and transformers' eager and sdpa
    already disagree there. Pad such models on the right.

    Returns:
        ``[B, Sq, Hq, D]`` contiguous, and ``None`` for the weights, which are never formed.

    Raises:
        UnsupportedError: an argument that changes the scores in another way, or an unknown argument.
        DeviceError: tensors that are not on the CPU.
    """
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
            position_bias = None if position_bias is None else position_bias[..., :query_length]
        if sliding_window is not None and is_causal:
            window = (int(sliding_window) - 1, -1)
    bias: Tensor | None = None
    if attention_mask is not None:
        attention_mask, bias = _as_rules(module, attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
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
        score_mod=None if bias is None else added_bias(_four_axes(module, "position_bias", bias)),
        softcap=softcap or 0.0,
        dropout=dropout,
        sinks=s_aux,
        block_indices=block_indices,
        block_size=None if block_indices is None else _block_size(module),
    )
    return output.transpose(1, 2).contiguous(), None
