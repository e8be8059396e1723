"""Fine-tune a small model on packed documents: a document mask and a learnable bias by distance, on the CPU.

    python examples/finetune_document_mask.py                     # 40 steps, a plot in runs/documents/
    python examples/finetune_document_mask.py --steps 300 --lr 5e-4

Functions of Python's standard library, each one document, are packed into rows. The mask lets a byte attend its own
document only; every head of every layer learns what to add to a score at each distance. Both are a few characters of
Python that FlexAttention users know; `tilewise.torch.flex_attention` runs them, forward and backward, without a
compiler and without ever forming the scores. The model is the package's own draft (Llama, 0.7 million weights).
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

import tilewise
import tilewise.torch as twt

NAME, REACH = "documents", 64
MODEL = Path(tilewise.__file__).parent / "models" / "draft"
MODULES = ["argparse", "ast", "csv", "dataclasses", "difflib", "heapq", "inspect", "pathlib", "statistics", "textwrap"]


def functions() -> list[bytes]:
    """The source of the functions of a few modules, as documents of at most 400 bytes."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for module in MODULES:
        path = root / f"{module}.py"
        if not path.exists():
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                found.append((ast.get_source_segment(text, node) or "").encode()[:400])
    return sorted(document for document in found if len(document) > 40)


def packed(documents: list[bytes], rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches ``[rows, length]`` of bytes, the number of each byte's document, and its place in it."""
    order = random.Random(seed)
    while True:
        tokens, numbers, places = (torch.zeros(rows, length, dtype=torch.long) for _ in range(3))
        for row in range(rows):
            start = number = 0
            while start < length:
                text = list(order.choice(documents))[: length - start]
                part = slice(start, start + len(text))
                tokens[row, part] = torch.tensor(text)
                numbers[row, part], places[row, part] = number, torch.arange(len(text))
                start, number = start + len(text), number + 1
        yield tokens, numbers, places


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any) -> tuple[Any, None]:
    """What each attention layer calls: its own table of biases, and the mask of the batch."""
    table = module.distance_bias

    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + table[h, (q - k).clamp(0, REACH)]

    out = twt.flex_attention(
        query, key, value, score_mod, options["documents"], scale=options.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def prepared() -> LlamaForCausalLM:
    """The draft model in float32, with a table of zeros in each attention layer: at first it changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # the block mask says it all
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=NAME)
    for layer in model.model.layers:
        layer.self_attn.distance_bias = nn.Parameter(torch.zeros(model.config.num_attention_heads, REACH + 1))
    return model


def loss_of(model: LlamaForCausalLM, tokens: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
    """Bits per byte of each next byte of the same document."""
    rows, length = tokens.shape
    mask = twt.create_block_mask(
        lambda b, h, q, k: (numbers[b, q] == numbers[b, k]) & (q >= k), rows, None, length, length, "cpu"
    )
    logits = model(tokens, position_ids=places, use_cache=False, documents=mask).logits[:, :-1]
    answers = torch.where(numbers[:, 1:] == numbers[:, :-1], tokens[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten()) / torch.log(torch.tensor(2.0))


def train(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, ...]], steps: int, rate: float) -> list[float]:
    """The loss of every step; tables learn ten times as fast as weights."""
    tables = [parameter for name, parameter in model.named_parameters() if "distance_bias" in name]
    others = [parameter for name, parameter in model.named_parameters() if "distance_bias" not in name]
    optimiser = torch.optim.AdamW([{"params": others}, {"params": tables, "lr": 10 * rate, "weight_decay": 0}], lr=rate)
    losses = []
    bar = tqdm(range(steps), unit="step")
    for _ in bar:
        loss = loss_of(model, *next(batches))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(bits_per_byte=f"{sum(losses[-10:]) / len(losses[-10:]):.3f}")
    return losses


def plot(losses: list[float], held: tuple[float, float], model: LlamaForCausalLM, path: Path) -> None:
    """The losses, and what each head learnt to add at each distance."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, linewidth=1, label="training batches")
    left.plot([0, len(losses)], held, "o--", label="held-out documents")
    left.set_xlabel("step")
    left.set_ylabel("bits per byte")
    left.legend()
    for number, layer in enumerate(model.model.layers):
        for row in layer.self_attn.distance_bias.detach():
            right.plot(row, color=f"C{number}", linewidth=0.8)
        right.plot([], color=f"C{number}", label=f"layer {number}")
    right.set_xlabel("distance in bytes")
    right.set_ylabel("added to the score")
    right.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=512, help="bytes of a row")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/documents"))
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    documents = functions()
    random.Random(options.seed).shuffle(documents)
    held = documents[: len(documents) // 10]
    model = prepared()
    sample = next(packed(held, options.rows, options.length, 1))
    with torch.no_grad():
        before = loss_of(model, *sample).item()
    batches = packed(documents[len(held) :], options.rows, options.length, options.seed)
    losses = train(model, batches, options.steps, options.lr)
    with torch.no_grad():
        after = loss_of(model, *sample).item()
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "loss.png"
    plot(losses, (before, after), model, picture)
    print(f"held-out documents: {before:.3f} bits per byte before, {after:.3f} after {options.steps} steps; {picture}")
    return {"losses": losses, "held": (before, after), "picture": picture, "model": model}


if __name__ == "__main__":
    main()
