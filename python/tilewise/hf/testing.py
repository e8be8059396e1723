"""Small random models of the architectures that the default pair has: for tests, examples and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

import tilewise.hf

__all__ = ["random_draft", "random_target", "save_random_pair"]

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def _finish(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    tilewise.hf.switch(model)
    return model.to(dtype).eval().requires_grad_(False)


def random_target(*, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """A MiniMax-M3 text model with random weights: a dense layer, then block-sparse layers with experts.

    Args:
        seed: of the weights.
        dtype: of the weights.
        sizes: fields of the configuration to replace.

    Example:
        >>> random_target().config.vocab_size
        256
    """
    fields: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3,
        "dense_intermediate_size": 48, "intermediate_size": 24, "shared_intermediate_size": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "index_n_heads": 2, "index_head_dim": 16,
        "index_block_size": 8, "index_topk_blocks": 2, "index_local_blocks": 1,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    torch.manual_seed(seed)
    return _finish(MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**(_COMMON | fields | sizes))), dtype)


def random_draft(*, seed: int = 1, dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """A dense Llama with random weights (see :func:`random_target`).

    Example:
        >>> random_draft(vocab_size=7).config.vocab_size
        7
    """
    fields: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
        "intermediate_size": 48, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return _finish(LlamaForCausalLM(LlamaConfig(**(_COMMON | fields | sizes))), dtype)


def save_random_pair(directory: Path) -> tuple[Path, Path]:
    """Write a random target and draft as bfloat16 models, as the default pair is stored; returns their directories."""
    places = directory / "target", directory / "draft"
    dtype = torch.bfloat16
    for place, model in zip(places, (random_target(dtype=dtype), random_draft(dtype=dtype)), strict=True):
        model.save_pretrained(place)
    return places
