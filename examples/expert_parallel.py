"""Train one mixture-of-experts layer with its experts spread over processes.

    torchrun --nproc-per-node 2 examples/expert_parallel.py
    torchrun --nproc-per-node 4 examples/expert_parallel.py --rounding nearest --tile 16

Every process has its own tokens and holds `experts / processes` of the experts. Tokens travel to their experts and back
inside the layer; the gradients of the experts are complete where they are, and only those of what every process has a
copy of (here the router) are averaged. Uses gloo on the CPU, nccl with `--device cuda`.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tilewise.torch.moe import AllToAll, MoE


def teacher(x: Tensor) -> Tensor:
    """What is to be learnt: eight different maps, one for each octant of the first three coordinates."""
    octant = (x[:, :3] > 0).long() @ torch.tensor([1, 2, 4], device=x.device)
    shifts = torch.linspace(-2.0, 2.0, 8, device=x.device)[octant]
    return torch.sin(x.roll(1, 1) + shifts[:, None]) * shifts[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="of each process, at each step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounding", choices=["nearest", "balance", "up", "down"], help="token rounding in training")
    parser.add_argument("--tile", type=int, default=64, help="rows of a tile for --rounding")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()

    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", dist.get_node_local_rank()) if options.device == "cuda" else torch.device("cpu")

    torch.manual_seed(0)  # the same router everywhere ...
    layer = MoE(
        options.experts, 2, 16, 64, dispatcher=AllToAll(options.experts), rounding=options.rounding, tile=options.tile,
        device=device,
    )  # fmt: skip
    torch.manual_seed(1 + rank)  # ... and other experts and tokens
    torch.nn.init.uniform_(layer.gate_up, -0.25, 0.25)
    torch.nn.init.uniform_(layer.down, -0.125, 0.125)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)

    began = time.perf_counter()
    for step in range(options.steps):
        x = torch.randn(options.tokens, 16, device=device)
        out, balance = layer.train()(x, return_aux_loss=True)
        loss = F.mse_loss(out, teacher(x))
        # A loss is the mean over all tokens of all processes; each has the mean over its own.
        ((loss + 0.01 * balance) / world).backward()
        dist.all_reduce(layer.router.weight.grad)
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == options.steps - 1:
            report = torch.stack([loss.detach(), balance.detach()])
            dist.all_reduce(report)
            loads = [torch.zeros(options.experts, dtype=torch.long, device=device) for _ in range(world)]
            mine = torch.zeros_like(loads[0])
            held = layer.dispatcher.local_experts
            mine[held.start : held.stop] = layer.last_load
            dist.all_gather(loads, mine)
            if rank == 0:
                error, even = (report / world).tolist()
                print(f"step {step:4}: loss {error:.4f}, balance {even:.3f}, rows {sum(loads).tolist()}", flush=True)
    if rank == 0:
        seconds = time.perf_counter() - began
        print(f"{world} processes, {len(layer.dispatcher.local_experts)} experts here, {seconds:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
