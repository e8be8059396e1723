"""One rank of tests/test_moe_parallel.py: ``python parallel.py RANK WORLD FILE LAYER``.

Every rank also computes the whole layer by itself and compares its share; a difference is an AssertionError and an exit
code, which the test reads. gloo over a file: no ports.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tilewise.torch as twt
from tilewise.torch.moe import AllToAll, Local

WIDTH, HIDDEN = 6, 4


def loop(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, token_ids: Tensor | None = None
) -> Tensor:
    """The expert layer as a plain loop that autograd differentiates; sentinels fall through."""
    if token_ids is None:
        token_ids = torch.arange(x.shape[0]).repeat_interleave(expert_ids.shape[1])
    ids, weights = expert_ids.reshape(-1), weights.reshape(-1)
    out = x.new_zeros(x.shape)
    for expert in range(gate_up.shape[0]):
        at = torch.where(ids == expert)[0]
        rows = token_ids[at].long()
        gate, up = (x[rows] @ gate_up[expert].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out = out.index_add(0, rows, (weights[at, None].to(x.dtype) * y).to(x.dtype))
    return out


LAYERS: dict[str, Any] = {"loop": loop, "tilewise": twt.moe.experts}


class Case:
    """One layer and a routing, whole; `share` is what a rank has of it."""

    def __init__(self, name: str, tokens: list[int], experts: int, slots: int, seed: int, dtype: torch.dtype):
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=random, dtype=torch.float64) * scale).to(dtype)

        self.name, self.tokens, self.experts = name, tokens, experts
        total = sum(tokens)
        self.x, self.answer = draw(total, WIDTH), draw(total, WIDTH)
        self.gate_up = draw(experts, 2 * HIDDEN, WIDTH, scale=WIDTH**-0.5)
        self.down = draw(experts, WIDTH, HIDDEN, scale=HIDDEN**-0.5)
        self.ids = torch.randint(0, experts, (total, slots), generator=random)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = torch.rand(total, slots, generator=random, dtype=torch.float64).to(wide)
        self.token_ids: Tensor | None = None

    def as_pairs(self, keep: Tensor) -> None:
        """The general spelling, with the pairs of `keep` ``[T, K]``."""
        rows = torch.arange(keep.shape[0])[:, None].expand_as(keep)
        self.token_ids, self.ids, self.weights = rows[keep], self.ids[keep], self.weights[keep]

    def share(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, slice, Any]:
        first = sum(self.tokens[:rank])
        mine = slice(first, first + self.tokens[rank])
        if self.token_ids is None:
            return self.x[mine], self.ids[mine], self.weights[mine], None, mine, mine
        pairs = (self.token_ids >= mine.start) & (self.token_ids < mine.stop)
        return self.x[mine], self.ids[pairs], self.weights[pairs], self.token_ids[pairs] - first, mine, pairs


def cases(world: int) -> list[Case]:
    even = [5] * world
    uneven = [7, 0, 3, 4][:world]
    made = [
        Case("slots", even, 2 * world, 2, 1, torch.float64),
        Case("uneven tokens and experts", uneven, 2 * world + 1, 3, 2, torch.float64),
        Case("float32", uneven, world, 2, 3, torch.float32),
        Case("bfloat16", even, world + 1, 2, 4, torch.bfloat16),
        Case("sentinels", even, world + 2, 3, 5, torch.float64),
        Case("one expert gets everything", uneven, world, 2, 6, torch.float64),
        Case("pairs", uneven, world + 3, 3, 7, torch.float64),
        Case("nobody has tokens", [0] * world, world, 2, 8, torch.float64),
    ]
    sentinels = made[4]
    sentinels.ids[::3, 0], sentinels.ids[1::4, 1], sentinels.ids[2] = sentinels.experts, -1, sentinels.experts + 9
    made[5].ids.fill_(world - 1)
    pairs = made[6]
    keep = torch.rand(pairs.ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[1] = False  # a token without experts
    pairs.as_pairs(keep)
    return made


def differentiate(out: Tensor, answer: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * answer).sum(), leaves))


def close(got: Tensor, want: Tensor, what: str) -> None:
    """Sums over ranks round in another order than sums over slots: a few roundings of the largest value."""
    budget = 8 * torch.finfo(got.dtype).eps * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    assert got.shape == want.shape and got.dtype == want.dtype, f"{what}: {got.shape} {want.shape}"
    if got.numel():
        error = float((got.double() - want.double()).abs().max())
        assert error <= budget, f"{what}: {error} exceeds {budget}"


def compare(case: Case, layer: Any, rank: int) -> None:
    whole = [t.clone().requires_grad_() for t in (case.x, case.weights, case.gate_up, case.down)]
    x, weights, gate_up, down = whole
    want = layer(x, case.ids, weights, gate_up, down, token_ids=case.token_ids)
    d_x, d_weights, d_gate_up, d_down = differentiate(want, case.answer, *whole)

    dispatcher = AllToAll(case.experts)
    held = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
    part_x, ids, part_weights, token_ids, mine, pairs = case.share(rank)
    parts = [t.clone().requires_grad_() for t in (part_x, part_weights, case.gate_up[held], case.down[held])]
    sent = dispatcher.dispatch(parts[0], ids, parts[1], token_ids)
    assert sent.token_ids is not None
    assert (sent.token_ids.diff() >= 0).all(), "token_ids must ascend"
    assert len(sent.token_ids.unique()) == len(sent.x), "a row without a pair was sent"
    y = layer(sent.x, sent.expert_ids, sent.weights, parts[2], parts[3], token_ids=sent.token_ids)
    got = dispatcher.combine(y, sent.handle)
    gradients = differentiate(got, case.answer[mine], *parts)

    close(got, want[mine], f"{case.name}: output")
    close(gradients[0], d_x[mine], f"{case.name}: gradient of x")
    # A pair's products are the same numbers wherever they are computed, and an expert's rows come in the same order
    # (ranks in order, tokens in order): these gradients are equal bit for bit.
    assert torch.equal(gradients[1], d_weights[pairs]), f"{case.name}: gradient of the weights"
    assert torch.equal(gradients[2], d_gate_up[held]), f"{case.name}: gradient of gate_up"
    assert torch.equal(gradients[3], d_down[held]), f"{case.name}: gradient of down"
    if case.name == "sentinels":
        outside = (case.ids[mine] < 0) | (case.ids[mine] >= case.experts)
        assert outside.any() and (gradients[1][outside] == 0).all()
        assert (got[2] == 0).all() or rank > 0

    again = dispatcher.dispatch(parts[0], ids, parts[1], token_ids)
    y = layer(again.x, again.expert_ids, again.weights, parts[2], parts[3], token_ids=again.token_ids)
    assert torch.equal(dispatcher.combine(y, again.handle), got), f"{case.name}: two runs differ"


def scores_travel(rank: int, world: int) -> None:
    """A row brings its scores for the experts here, and their gradient goes home."""
    case = Case("scores", [4] * world, 2 * world + 1, 2, 9, torch.float64)
    dispatcher = AllToAll(case.experts)
    held = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
    x, ids, weights, _, mine, _ = case.share(rank)
    table = torch.arange(4 * world * case.experts, dtype=torch.float64).view(-1, case.experts)
    scores = table[mine].clone().requires_grad_()
    sent = dispatcher.dispatch(x, ids, weights, scores=scores)
    assert sent.scores is not None and sent.token_ids is not None
    every = [(t, e) for t in range(4 * world) for e in case.ids[t].tolist() if e in dispatcher.local_experts]
    tokens = sorted({t for t, _ in every})
    assert torch.equal(sent.scores, table[tokens, held])
    (gradient,) = torch.autograd.grad(sent.scores.sum() * (rank + 1), scores)
    want = torch.zeros_like(scores)
    for other in range(world):
        place = range(case.experts * other // world, case.experts * (other + 1) // world)
        hit = torch.tensor([any(e in place for e in row) for row in ids.tolist()])
        want[:, place.start : place.stop] += hit[:, None] * (other + 1.0)
    assert torch.equal(gradient, want)


def moe_module(rank: int, world: int, **options: Any) -> None:
    """The module over the group, against the module alone on all tokens: outputs and gradients.

    With rounding and every expert chosen by every token, each rank has all tokens, so rounding on the receiving ranks
    is rounding of the whole: then these must agree too.
    """
    experts, total = 2 * world + 1, 10 * world
    random = torch.Generator().manual_seed(3)
    x, answer = (torch.randn(total, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    sizes: dict[str, Any] = {
        "num_experts": experts,
        "top_k": 3,
        "width": WIDTH,
        "hidden": HIDDEN,
        "dtype": torch.float64,
    }
    sizes |= options
    torch.manual_seed(0)
    whole = twt.moe.MoE(**sizes).train()
    dispatcher = AllToAll(experts)
    part = twt.moe.MoE(**sizes, dispatcher=dispatcher).train()
    held = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
    part.load_state_dict({k: v if k == "router.weight" else v[held] for k, v in whole.state_dict().items()})
    mine = slice(10 * rank, 10 * (rank + 1))
    want, loss = whole(x, return_aux_loss=True)
    ((want * answer).sum() + 0.0 * loss).backward()
    got = part(x[mine])
    (got * answer[mine]).sum().backward()
    assert part.router.weight.grad is not None and whole.router.weight.grad is not None
    dist.all_reduce(part.router.weight.grad)  # every rank has the gradient of its own tokens
    close(got, want[mine], f"module {options}: output")
    close(part.router.weight.grad, whole.router.weight.grad, f"module {options}: gradient of the router")
    for name in ("gate_up", "down"):
        mine_grad, whole_grad = getattr(part, name).grad, getattr(whole, name).grad
        close(mine_grad, whole_grad[held], f"module {options}: gradient of {name}")
    assert torch.equal(part.last_load, whole.last_load[held])


def rounding_on_the_receiving_rank(rank: int, world: int) -> None:
    """Every expert's load is a multiple of the tile on the rank that computes it, or all rows that came there."""
    experts = 2 * world
    torch.manual_seed(0)
    layer = twt.moe.MoE(experts, 2, WIDTH, HIDDEN, rounding="nearest", tile=8, dispatcher=AllToAll(experts)).train()
    plain = twt.moe.MoE(experts, 2, WIDTH, HIDDEN, dispatcher=AllToAll(experts))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(rank))
    out = layer(x)
    out.sum().backward()
    assert layer.last_load is not None and layer.router.weight.grad is not None
    assert (layer.last_load % 8 == 0).all(), layer.last_load
    want = plain(x)
    assert plain.last_load is not None
    changed = torch.tensor(int(not torch.equal(layer.last_load, plain.last_load)))
    dist.all_reduce(changed)
    assert changed, "nothing was rounded: the test proves nothing"
    assert torch.equal(layer.eval()(x), want)


def local_is_the_identity(layer: Any) -> None:
    case = cases(1)[0]
    dispatcher = Local(case.experts)
    sent = dispatcher.dispatch(case.x, case.ids, case.weights)
    y = layer(sent.x, sent.expert_ids, sent.weights, case.gate_up, case.down, token_ids=sent.token_ids)
    assert torch.equal(
        dispatcher.combine(y, sent.handle), layer(case.x, case.ids, case.weights, case.gate_up, case.down)
    )


def main() -> None:
    rank, world, path, layer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], LAYERS[sys.argv[4]]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    for case in cases(world):
        compare(case, layer, rank)
    scores_travel(rank, world)
    if sys.argv[4] == "tilewise":
        moe_module(rank, world)
        moe_module(rank, world, rounding="nearest", tile=8, top_k=2 * world + 1)
        moe_module(rank, world, rounding="balance", tile=12, top_k=2 * world + 1, scoring="sigmoid", renormalise=True)
        rounding_on_the_receiving_rank(rank, world)
    local_is_the_identity(layer)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
