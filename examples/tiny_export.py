"""Evaluates a finished run on the held-out files and writes the default pair with its card."""

from __future__ import annotations

import json
import math
import platform
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, MiniMaxM3VLForCausalLM
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

from tiny_model import Shape  # isort: skip
from train_tiny import BATCH, DRAFT, LENGTH, Run  # isort: skip

CONTEXT = LENGTH // 2


def target_config(shape: Shape) -> MiniMaxM3VLTextConfig:
    """The configuration under which transformers builds the same model."""
    layers = range(shape.num_hidden_layers)
    return MiniMaxM3VLTextConfig(
        **{name: getattr(shape, name) for name in shape.__dataclass_fields__ if hasattr(MiniMaxM3VLTextConfig, name)},
        max_position_embeddings=2048,
        rotary_dim=int(shape.head_dim * shape.partial_rotary_factor),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": shape.partial_rotary_factor,
        },
        layer_types=["full_attention" if i < shape.dense_attention_layers else "minimax_m3_sparse" for i in layers],
        mlp_layer_types=["dense" if i < shape.dense_mlp_layers else "sparse" for i in layers],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def evaluate(target: MiniMaxM3VLForCausalLM, draft: LlamaForCausalLM, held: Tensor) -> dict[str, float]:
    """Bits per byte of both and greedy agreement, each byte seen once with at least 256 bytes of context."""
    starts = list(range(0, held.numel() - LENGTH - 1, CONTEXT))
    sums = {"target": 0.0, "draft": 0.0, "agreement": 0.0}
    count = 0
    for first in range(0, len(starts), BATCH):
        windows = torch.stack([held[s : s + LENGTH + 1] for s in starts[first : first + BATCH]]).long()
        answers = windows[:, 1 + CONTEXT :]
        logits = {
            name: model(input_ids=windows[:, :-1], use_cache=False).logits[:, CONTEXT:].float()
            for name, model in (("target", target), ("draft", draft))
        }
        for name, values in logits.items():
            sums[name] += F.cross_entropy(values.flatten(0, 1), answers.flatten(), reduction="sum").item()
        sums["agreement"] += (logits["target"].argmax(-1) == logits["draft"].argmax(-1)).sum().item()
        count += answers.numel()
    return {
        "target_bits_per_byte": sums["target"] / count / math.log(2),
        "draft_bits_per_byte": sums["draft"] / count / math.log(2),
        "greedy_agreement": sums["agreement"] / count,
        "bytes_scored": count,
    }


def export(run: Run, held: Tensor, digest: str, trained_on: int, folder: Path) -> None:
    """Writes `target/`, `draft/` (bfloat16 safetensors with their configuration), `card.json` and `README.md`."""
    target = MiniMaxM3VLForCausalLM(target_config(run.target.shape))
    target.load_state_dict(run.target.export(), strict=False)
    draft = run.draft
    pair = {"target": target.eval(), "draft": draft.eval()}
    for model in pair.values():
        # What is shipped is what is measured: rounded to bfloat16, computed in float32.
        model.to(torch.bfloat16).float()
    numbers: dict[str, object] = dict(evaluate(target, draft, held))
    size = 0
    for name, model in pair.items():
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        model.config.dtype = torch.bfloat16
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(place)
        state = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        size += (place / "model.safetensors").stat().st_size
        numbers[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
    numbers |= {
        "steps": run.step,
        "bytes_trained_on": run.step * BATCH * LENGTH,
        "corpus_bytes": trained_on,
        "corpus_digest": digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(run.seconds),
        "file_bytes": size,
    }
    (folder / "card.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / "README.md").write_text(card(numbers))
    print(json.dumps(numbers, indent=1))


def card(n: dict[str, object]) -> str:
    """The model card."""
    return f"""# The default pair

Two byte-level language models (256 tokens, no special ones) that write Python-looking text. They exist so that
`tilewise generate` has something real to run anywhere; they know nothing worth asking for.

| | target | draft |
|---|---|---|
| architecture | MiniMax-M3 text: 6 layers of width 192, 4 with block-sparse attention (blocks of 32, 8 selected), 5 with 8 experts (2 active, 1 shared) | Llama: {DRAFT.num_hidden_layers} layers of width {DRAFT.hidden_size} |
| parameters | {n["target_parameters"]:,} | {n["draft_parameters"]:,} |
| held-out bits per byte | {n["target_bits_per_byte"]:.3f} | {n["draft_bits_per_byte"]:.3f} |

Greedy agreement on held-out text: {n["greedy_agreement"]:.3f} of positions ({n["bytes_scored"]:,} bytes, each with at least 256
bytes of context). Weights are bfloat16, {n["file_bytes"]:,} bytes together; the figures are of the rounded weights, computed in float32.

**Data.** The source of the standard library of Python {n["python"]} ({n["corpus_bytes"]:,} bytes; digest {n["corpus_digest"]}), without tests,
codec tables, lib2to3 and pydoc topics; one file in twenty, chosen by the hash of its path, is held out. The standard library is
distributed under the PSF licence.

**Training.** `python examples/train_tiny.py --run runs/tiny --export python/tilewise/models`: {n["steps"]} steps of 8192 bytes
({n["bytes_trained_on"]:,} bytes), both models on the same batches, Muon and AdamW, bfloat16 autocast, {n["seconds"]} seconds of two shared cores with
torch {n["torch"]}. The draft learns half from the data and half from the target's distribution. The indexers learn by MiniMax
Sparse Attention's KL rule: attention is dense for the first 960 steps, sparse afterwards.
"""


if __name__ == "__main__":
    raise SystemExit("run train_tiny.py with --export")
