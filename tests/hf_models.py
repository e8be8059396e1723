"""Small random models of transformers, for tests/test_hf_training.py and its sibling on attention; loaded by path."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
if importlib.util.find_spec("transformers.models.minimax_m3_vl"):  # younger than transformers 5.3
    NAMES.append("minimax_m3")

DENSE = ["llama", "gemma2"]  # without experts

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _config(name: str) -> Any:
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, **_GROUPED, **_SIZES
        )
    if name == "mixtral":
        return MixtralConfig(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **_GROUPED, **_SIZES)
    if name == "gpt_oss":
        return GptOssConfig(
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, rope_parameters=_ROPE,
            layer_types=["sliding_attention", "full_attention"], **_GROUPED, **_SIZES,
        )  # fmt: skip
    if name == "llama":
        return LlamaConfig(intermediate_size=48, **_GROUPED, **_SIZES)
    if name == "gemma2":
        return Gemma2Config(
            intermediate_size=48, attn_logit_softcapping=2.0, final_logit_softcapping=20.0, sliding_window=6,
            query_pre_attn_scalar=8, **_GROUPED, **_SIZES,
        )  # fmt: skip
    return DeepseekV3Config(
        intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        v_head_dim=8, qk_nope_head_dim=8, num_key_value_heads=4, routed_scaling_factor=1.5, num_mtp_layers=0,
        rope_parameters=_ROPE, **_SIZES,
    )  # fmt: skip


def build(name: str) -> PreTrainedModel:
    """The model in float64, eager, in training mode, with no parameter at a trivial value."""
    torch.manual_seed(0)
    if name == "minimax_m3":
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

        config = MiniMaxM3VLTextConfig(
            dense_intermediate_size=48, intermediate_size=24, shared_intermediate_size=16, num_local_experts=4,
            num_experts_per_tok=2, routed_scaling_factor=1.5, layer_types=["full_attention"] * 2,
            mlp_layer_types=["dense", "sparse"], rope_parameters=_ROPE | {"partial_rotary_factor": 0.5},
            **_GROUPED, **_SIZES,
        )  # fmt: skip
        model: Any = MiniMaxM3VLForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(_config(name))
    model = model.double().train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key or "sinks" in key:
                parameter.normal_(std=0.1)
            elif key.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.5)  # some models begin with zeros, where every choice is a tie
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def batches(count: int, rows: int = 4, length: int = 16) -> list[torch.Tensor]:
    """Sequences with something to learn: each token is the one before it times 3 plus noise."""
    random = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = [torch.randint(0, VOCABULARY, (rows,), generator=random)]
        for _ in range(length - 1):
            ids.append((3 * ids[-1] + torch.randint(0, 2, (rows,), generator=random)) % VOCABULARY)
        made.append(torch.stack(ids, dim=1))
    return made


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    """Keep softmax in float64 where a model is, which transformers narrows to float32 whatever the model's dtype."""
    original = torch.nn.functional.softmax

    def softmax(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = original
