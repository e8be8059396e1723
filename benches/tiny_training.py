"""Training steps of the demo's target model, with its experts computed in three ways, and by transformers.

    python -m benches.tiny_training [--rounds 7] [--rows 16] [--length 512] [--steps 50] [--dtype bfloat16] [--json F]

* `tilewise`: one call of `tilewise.torch.moe.experts` a layer;
* `torch`: the example's own products, grouped by expert;
* `eager`: the expert module of transformers (`experts_implementation="eager"`), a loop over experts of one tensor.

First the three train from the same weights on the same batches, and their losses are compared with those of `torch` in
float64. Then whole steps (forward, backward, optimisers, as in `examples/train_tiny.py`) are timed side by side, and so
are the expert layers of a step alone: attention, norms, the dense layer and the optimisers cost the same whoever
computes the experts, and bound what a whole step can gain. `transformers` is a step of the same model as that library
has it, eager throughout, without the indexer's loss that the others pay for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts, MiniMaxM3VLForCausalLM

from tilewise import _core

from .harness import Timing, interleave, machine, speedup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from tiny_export import target_config
from tiny_model import Shape, SparseMLP, TinyTarget
from train_tiny import optimisers

WAYS = ("tilewise", "torch", "eager")


class Eager(nn.Module):
    """transformers' experts in the place of the example's."""

    def __init__(self, experts: Any):
        super().__init__()
        shape = experts.shape
        fields = ("hidden_size", "intermediate_size", "num_local_experts", "swiglu_alpha", "swiglu_limit")
        config = MiniMaxM3VLTextConfig(**{name: getattr(shape, name) for name in fields})
        config._experts_implementation = "eager"
        self.count, self.inner = shape.num_local_experts, MiniMaxM3VLExperts(config)
        with torch.no_grad():
            self.inner.gate_up_proj.copy_(torch.stack(list(experts.gate_up_proj)))
            self.inner.down_proj.copy_(torch.stack(list(experts.down_proj)))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x, chosen, weights), torch.bincount(chosen.reshape(-1), minlength=self.count)


def build(way: str, shape: Shape | None = None) -> TinyTarget:
    """The model, always from the same weights."""
    torch.manual_seed(0)
    model = TinyTarget(Shape(experts="torch") if shape is None else shape)
    for module in model.modules():
        if isinstance(module, SparseMLP):
            if way == "eager":
                module.experts = Eager(module.experts)
            else:
                module.experts.shape = dataclasses.replace(module.experts.shape, experts=way)
    return model


def batch(step: int, rows: int, length: int) -> Tensor:
    """Bytes in which each follows from the one before, but for one in eight."""
    random = torch.Generator().manual_seed(step)
    columns = [torch.randint(0, 256, (rows,), generator=random)]
    for _ in range(length):
        noise = torch.randint(0, 256, (rows,), generator=random)
        keep = torch.rand(rows, generator=random) < 0.875
        columns.append(torch.where(keep, (5 * columns[-1] + 17) % 256, noise))
    return torch.stack(columns, dim=1)


def stepper(model: TinyTarget, rows: int, length: int, dtype: torch.dtype) -> Callable[[], float]:
    """A function that trains one step on the next batch and returns its loss."""
    made = optimisers(model)
    done = 0

    def step() -> float:
        nonlocal done
        tokens = batch(done, rows, length)
        done += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens[:, :-1], select=True, index_rows=torch.arange(0, length, 16))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).to(torch.float64), tokens[:, 1:].flatten())
        (loss + model.index_loss()).backward()
        for optimiser in made:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_stepper(rows: int, length: int, dtype: torch.dtype) -> Callable[[], float]:
    """The same for the model as transformers has it."""
    original = build("torch")
    model: Any = MiniMaxM3VLForCausalLM(target_config(original.shape))
    model.load_state_dict(original.export())
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    made = optimisers(model.train())
    done = 0

    def step() -> float:
        nonlocal done
        tokens = batch(done, rows, length)
        done += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).to(torch.float64), tokens[:, 1:].flatten())
        loss.backward()
        for optimiser in made:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def layers_alone(model: TinyTarget, rows: int, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of the model's expert layers on tokens of order one, routed as a fresh router routes."""
    found = [module for module in model.modules() if isinstance(module, SparseMLP)]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows * length, model.shape.hidden_size, generator=random)
    with torch.no_grad():
        routings = [layer.gate(x) for layer in found]

    def run() -> None:
        for layer, (chosen, weights) in zip(found, routings, strict=True):
            states, factors = x.clone().requires_grad_(), weights.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out, _ = layer.experts(states, chosen, factors)
            out.backward(torch.ones_like(out))
            layer.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=512, help="bytes of a sequence")
    parser.add_argument("--steps", type=int, default=50, help="of the loss curves; 0 leaves them out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="bfloat16 is autocast")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    torch.set_num_threads(_core.num_threads())
    dtype = getattr(torch, options.dtype)
    size = options.rows, options.length
    found: dict[str, Any] = {
        "machine": machine() | {"torch": torch.__version__},
        "options": vars(options) | {"json": None},
    }

    if options.steps:
        small = options.rows // 4 or 1, options.length // 4 or 1
        curves = {}
        for way in WAYS:
            step = stepper(build(way), *small, dtype)
            curves[way] = [step() for _ in range(options.steps)]
        step = stepper(build("torch").double(), *small, torch.float64)
        truth = [step() for _ in range(options.steps)]
        found["losses"] = curves | {"float64": truth}
        print(f"{options.steps} steps, loss {truth[0]:.3f} to {truth[-1]:.3f}; furthest from float64:")
        for way, curve in curves.items():
            print(f"  {way:9} {max(abs(a - b) for a, b in zip(curve, truth, strict=True)):.2e}")

    print(f"\n| {options.dtype}, {options.rows} x {options.length} bytes | median | spread | tilewise is |")
    print("|---|---|---|---|")
    parts: dict[str, Callable[[TinyTarget], Callable[[], Any]]] = {
        "step": lambda model: stepper(model, *size, dtype), "experts": lambda model: layers_alone(model, *size, dtype)
    }  # fmt: skip
    for part, make in parts.items():
        functions = {way: make(build(way)) for way in WAYS}
        if part == "step":
            functions["transformers"] = transformers_stepper(*size, dtype)
        timings: dict[str, Timing] = interleave(functions, options.rounds)
        found[part] = {way: timing.seconds for way, timing in timings.items()}
        for way, timing in timings.items():
            times = "" if way == "tilewise" else f"{speedup(timings['tilewise'], timing):.2f}x as fast"
            print(f"| {part}, {way} | {timing.median * 1e3:.1f} ms | {timing.spread:.0%} | {times} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
