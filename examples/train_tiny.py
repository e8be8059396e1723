"""Train the default pair on the source of the Python standard library: a sparse target and a dense draft.

    python examples/train_tiny.py --run runs/tiny                 # train, or go on where it stopped
    python examples/train_tiny.py --run runs/tiny --export DIR    # evaluate and write the two models

Both models learn in one pass over the same batches: the target by next-byte cross-entropy, the draft
half from the data and half from the target's own distribution, because a draft is worth what it agrees
with. Every random choice (weights, batches, rows of the indexer's loss) follows from `--seed` and the
step number alone, so a run that was stopped and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_model import Shape, TinyTarget
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, INDEX_ROWS = 512, 16, 32
WARM_UP, DENSE, DECAY = 48, 960, 1200  # steps: learning-rate warm-up; attention stays dense; the rate starts to fall
SKIPPED = {"site-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
DRAFT = LlamaConfig(
    vocab_size=256, hidden_size=160, intermediate_size=448, num_hidden_layers=2, num_attention_heads=5,
    num_key_value_heads=5, head_dim=32, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6,
    tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def corpus() -> tuple[Tensor, Tensor, str]:
    """Training bytes, held-out bytes (one file in twenty, chosen by the hash of its path) and their digest."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            text = path.read_bytes()
            digest.update(str(relative).encode() + b"\0" + text)
            parts[hashlib.sha256(str(relative).encode()).digest()[0] % 20 == 0].append(text + b"\n\n")
    train, held = (torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8) for k in (False, True))
    return train, held, digest.hexdigest()[:16]


def batch(data: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Windows `[BATCH, LENGTH + 1]` and the query rows that carry the indexer's loss at this step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, data.numel() - LENGTH - 1, (BATCH,), generator=generator)
    windows = torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()]).long()
    return windows, torch.randint(0, LENGTH, (INDEX_ROWS,), generator=generator)


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices, AdamW for everything an orthogonal update does not suit."""
    plain = ("embed_tokens", "lm_head", "gate.weight")
    inner, outer = [], []
    for name, parameter in model.named_parameters():
        (inner if parameter.dim() == 2 and not any(p in name for p in plain) else outer).append(parameter)
    return [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(outer, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero at the last step."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, steps - DECAY))


class Run:
    """The whole state of a training run, written and read as one file."""

    def __init__(self, seed: int, experts: str = "tilewise"):
        torch.manual_seed(seed)
        self.target = TinyTarget(Shape(experts=experts))
        self.draft = LlamaForCausalLM(DRAFT)
        self.optimisers = optimisers(self.target) + optimisers(self.draft)
        self.base_rates = [group["lr"] for o in self.optimisers for group in o.param_groups]
        self.step, self.seconds = 0, 0.0

    def save(self, path: Path) -> None:
        state = {
            "target": self.target.state_dict(), "draft": self.draft.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers], "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.target.load_state_dict(state["target"])
        self.draft.load_state_dict(state["draft"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def advance(self, data: Tensor, seed: int, steps: int) -> dict[str, float]:
        """One step of both models; returns losses in bits per byte."""
        windows, rows = batch(data, seed, self.step)
        inputs, answers = windows[:, :-1], windows[:, 1:].reshape(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.target(inputs, select=self.step > DENSE, index_rows=rows).float().flatten(0, 1)
            guesses = self.draft(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, answers)
        index_loss = self.target.index_loss()
        draft_loss = F.cross_entropy(guesses, answers)
        taught = F.cross_entropy(guesses, logits.detach().softmax(dim=-1))
        (loss + index_loss + 0.5 * draft_loss + 0.5 * taught).backward()
        scale = rate(self.step, steps)
        groups = [group for o in self.optimisers for group in o.param_groups]
        for group, base in zip(groups, self.base_rates, strict=True):
            group["lr"] = base * scale
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        worst = self.target.balance(5e-3 * scale)
        self.step += 1
        bits = 1.0 / torch.log(torch.tensor(2.0)).item()
        return {
            "target": loss.item() * bits, "draft": draft_loss.item() * bits,
            "index": index_loss.item(), "load": worst,
        }  # fmt: skip


def train(run: Run, path: Path, data: Tensor, seed: int, steps: int, log: Path) -> None:
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5.0)
    smooth: dict[str, float] = {}
    while run.step < steps:
        began = time.perf_counter()
        for name, value in run.advance(data, seed, steps).items():
            smooth[name] = value if name not in smooth else 0.98 * smooth[name] + 0.02 * value
        run.seconds += time.perf_counter() - began
        bar.update(1)
        bar.set_postfix({k: f"{v:.3f}" for k, v in smooth.items()}, refresh=False)
        if run.step % 20 == 0:
            with log.open("a") as stream:
                stream.write(json.dumps({"step": run.step, "seconds": round(run.seconds), **smooth}) + "\n")
        if run.step % 100 == 0 or run.step == steps:
            run.save(path)
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; an unfinished one is resumed")
    parser.add_argument("--steps", type=int, default=1900, help="training steps of 8192 bytes")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--experts", choices=["tilewise", "torch"], default="tilewise", help="who computes the experts")
    parser.add_argument("--export", type=Path, help="write target/, draft/ and the model card here when done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    options.run.mkdir(parents=True, exist_ok=True)
    data, held, digest = corpus()
    run, path = Run(options.seed, options.experts), options.run / "checkpoint.pt"
    if path.exists():
        run.load(path)
    train(run, path, data, options.seed, options.steps, options.run / "log.jsonl")
    if options.export:
        from tiny_export import export

        export(run, held, digest, data.numel(), options.export)


if __name__ == "__main__":
    main()
