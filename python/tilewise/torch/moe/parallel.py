"""Expert parallelism: the experts of one layer spread over processes, tokens sent to them and back.

A *dispatcher* has two methods. ``dispatch`` brings the rows of x to the processes that hold their experts and
translates the routing to what each of them holds; ``combine`` brings the results home and adds them up::

    sent = dispatcher.dispatch(x, expert_ids, weights)
    y = experts(sent.x, sent.expert_ids, sent.weights, gate_up, down, token_ids=sent.token_ids)
    out = dispatcher.combine(y, sent.handle)

where ``gate_up`` and ``down`` hold only ``dispatcher.local_experts``. Both methods are differentiable, and the backward
of each is the exchange of the other, so gradients of x, of the weights and of every process's experts are complete.

* :class:`Local`: one process holds all experts, nothing moves;
* :class:`AllToAll`: ``torch.distributed.all_to_all_single`` over a process group (gloo on the CPU, nccl on GPUs).

A row travels once to each process that holds any of its token's experts, however many those are, and one row comes
back: the experts there have already been weighted and summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewise.errors import ArgumentError, ShapeError, UnsupportedError

__all__ = ["AllToAll", "Dispatched", "Dispatcher", "Local"]


class Dispatched(NamedTuple):
    """What a process has after ``dispatch``: rows, and a routing over its own experts.

    ``expert_ids`` count from 0 at the first of the dispatcher's ``local_experts``. With ``token_ids`` the routing is a
    list of pairs whose ``token_ids`` (ascending) are rows of ``x``; without, it has the fixed slots that came in.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    token_ids: Tensor | None
    #: ``[rows, len(local_experts)]``, the rows' scores for the experts here, if ``dispatch`` was given scores.
    scores: Tensor | None
    #: What ``combine`` needs.
    handle: Any


class Dispatcher(Protocol):
    """The protocol. An adapter to another transport implements these four names."""

    @property
    def num_experts(self) -> int:
        """Experts of the whole layer."""
        ...

    @property
    def local_experts(self) -> range:
        """Ids of the experts that this process holds."""
        ...

    def dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        token_ids: Tensor | None = None,
        *,
        scores: Tensor | None = None,
    ) -> Dispatched:
        """Send rows to the holders of their experts; receive the rows that others sent here."""
        ...

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Send results ``[rows, d]`` back to the processes their rows came from; returns this process's tokens."""
        ...


class Local:
    """All experts are here: ``dispatch`` hands its arguments on, ``combine`` its first one.

    Args:
        num_experts: experts of the layer.

    Example:
        >>> import torch
        >>> sent = Local(4).dispatch(torch.ones(2, 3), torch.tensor([[0], [3]]), torch.ones(2, 1))
        >>> sent.expert_ids.tolist(), sent.token_ids
        ([[0], [3]], None)
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.local_experts = range(num_experts)

    def dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        token_ids: Tensor | None = None,
        *,
        scores: Tensor | None = None,
    ) -> Dispatched:
        """The arguments, as they came."""
        return Dispatched(x, expert_ids, weights, token_ids, scores, None)

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """``y``, as it came."""
        return y


@dataclass(frozen=True)
class _Plan:
    """One dispatch: who gets what. Lists have a number for each process of the group, in the order of ranks."""

    group: Any
    bounds: list[int]  # process r holds experts bounds[r] to bounds[r + 1]
    tokens: int
    row_tokens: Tensor  # [rows sent] the token of each, grouped by destination, ascending within
    pairs: Tensor  # [pairs sent] places in the flat list of pairs, in the same order
    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]


class AllToAll:
    """Experts in contiguous ranges over the ranks of a process group.

    Rank r of W holds the experts from ``E * r // W`` to ``E * (r + 1) // W``. Every rank has its own tokens, as many as
    it likes, none included, and all ranks must call ``dispatch``, ``combine`` and the backward pass together. Ids
    outside ``0..E`` are sentinels: they are sent nowhere, and their weights get a gradient of 0. The order of additions
    follows from ranks alone, so results repeat bit for bit.

    The sizes of messages are exchanged first, which waits for the device: not capturable in a CUDA graph.

    Args:
        num_experts: experts of the whole layer, at least one a rank.
        group: the process group; the default one if ``None``.

    Raises:
        UnsupportedError: torch.distributed is not initialised.
        ArgumentError: fewer experts than ranks.
    """

    def __init__(self, num_experts: int, group: Any = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedError(
                "AllToAll needs a process group: call torch.distributed.init_process_group first (torchrun sets up "
                "what it reads), or use tilewise.torch.moe.Local in one process"
            )
        self.group = group
        world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if num_experts < world:
            raise ArgumentError(f"num_experts: expected at least one expert a rank ({world}), got {num_experts}")
        self.num_experts = num_experts
        self._bounds = [num_experts * rank // world for rank in range(world + 1)]
        self.local_experts = range(self._bounds[self.rank], self._bounds[self.rank + 1])

    @torch.compiler.disable()
    def dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        token_ids: Tensor | None = None,
        *,
        scores: Tensor | None = None,
    ) -> Dispatched:
        """Send rows to the holders of their experts, and receive.

        Args:
            x: ``[T, d]``, this rank's tokens.
            expert_ids: integers ``[T, K]``, or ``[pairs]`` with ``token_ids``; ids of the whole layer.
            weights: floating, like ``expert_ids``.
            token_ids: ``[pairs]``, ascending.
            scores: ``[T, E]``, if the receiving ranks are to round; a row's scores travel with it.

        Returns:
            The rows received, in the order of ranks and their tokens, and their pairs with ``token_ids``.

        Raises:
            ShapeError: arguments that do not fit together.
        """
        self._check(x, expert_ids, weights, token_ids, scores)
        plan, local_ids, places = self._plan(x, expert_ids, token_ids)
        rows, pair_weights, row_scores = _Dispatch.apply(x, weights, scores, plan, self.rank)
        return Dispatched(rows, local_ids, pair_weights, places, row_scores, plan)

    @torch.compiler.disable()
    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Send results back and add them up for each token.

        Args:
            y: ``[rows, d]``, a result for each row that ``dispatch`` received.
            handle: of that dispatch.

        Returns:
            ``[T, d]``: for each of this rank's tokens the sum over ranks, added in float32 (float64 for float64) in the
            order of ranks. Tokens that went nowhere are 0.

        Raises:
            ShapeError: not a row of y for each row received.
        """
        rows = sum(handle.rows_received)
        if y.dim() != 2 or y.shape[0] != rows:
            raise ShapeError(f"y: expected [{rows}, d], a row for each one that dispatch received, got {list(y.shape)}")
        return _Combine.apply(y, handle)

    def _check(self, x: Tensor, ids: Tensor, weights: Tensor, token_ids: Tensor | None, scores: Tensor | None) -> None:
        if x.dim() != 2:
            raise ShapeError(f"x: expected [tokens, width], got {list(x.shape)}; flatten batch and sequence first")
        if token_ids is None and (ids.dim() != 2 or ids.shape[0] != x.shape[0]):
            raise ShapeError(
                f"expert_ids: expected [{x.shape[0]}, slots] for x {list(x.shape)}, got {list(ids.shape)}; a list of "
                "pairs needs token_ids"
            )
        if token_ids is not None and (ids.dim() != 1 or token_ids.shape != ids.shape):
            raise ShapeError(
                f"expert_ids and token_ids: expected one [pairs] both, got {list(ids.shape)} and "
                f"{list(token_ids.shape)}"
            )
        if weights.shape != ids.shape:
            raise ShapeError(f"weights: expected {list(ids.shape)} like expert_ids, got {list(weights.shape)}")
        if scores is not None and scores.shape != (x.shape[0], self.num_experts):
            raise ShapeError(f"scores: expected {[x.shape[0], self.num_experts]}, got {list(scores.shape)}")

    def _plan(self, x: Tensor, expert_ids: Tensor, token_ids: Tensor | None) -> tuple[_Plan, Tensor, Tensor]:
        """Who gets what; and of the pairs received, the local expert and the row."""
        device, world = x.device, len(self._bounds) - 1
        ids = expert_ids.reshape(-1).long()
        if token_ids is None:
            tokens = torch.arange(x.shape[0], device=device).repeat_interleave(expert_ids.shape[1])
        else:
            tokens = token_ids.long()
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < x.shape[0]):
            raise ArgumentError(
                f"token_ids: expected 0 to {x.shape[0] - 1}, the rows of x, got {int(tokens.min())} to "
                f"{int(tokens.max())}"
            )
        bounds = torch.tensor(self._bounds, device=device)
        # Sentinels come out as rank -1 or rank W; they sort to the ends and are cut off.
        owner = torch.bucketize(ids, bounds, right=True) - 1
        order = torch.argsort(owner, stable=True)
        order = order[(owner[order] >= 0) & (owner[order] < world)]
        owner, tokens, ids = owner[order], tokens[order], ids[order]
        # A row for each change of (destination, token); neighbours in `order` that share both share the row.
        fresh = torch.ones_like(owner, dtype=torch.bool)
        fresh[1:] = (owner[1:] != owner[:-1]) | (tokens[1:] != tokens[:-1])
        row_owner = owner[fresh]
        rows_sent, pairs_sent = torch.bincount(row_owner, minlength=world), torch.bincount(owner, minlength=world)
        sizes = torch.stack([rows_sent, pairs_sent], dim=1)
        incoming = torch.empty_like(sizes)
        dist.all_to_all_single(incoming, sizes, group=self.group)
        rows_received, pairs_received = incoming.t().tolist()
        plan = _Plan(
            self.group, self._bounds, x.shape[0], tokens[fresh], order,
            rows_sent.tolist(), rows_received, pairs_sent.tolist(), pairs_received,
        )  # fmt: skip
        # A pair's row counts from the start of its message here, and from the start of all messages there.
        places = torch.cumsum(fresh, 0) - 1 - (torch.cumsum(rows_sent, 0) - rows_sent)[owner]
        labels = torch.stack([ids - bounds[owner], places], dim=1)
        labels = _exchange(labels, plan.pairs_sent, plan.pairs_received, plan.group)
        starts = torch.cumsum(incoming[:, 0], 0) - incoming[:, 0]
        shift = starts.repeat_interleave(incoming[:, 1])
        return plan, labels[:, 0].contiguous(), labels[:, 1] + shift


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Rows grouped by destination to rows grouped by source."""
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _add_up(rows: Tensor, plan: _Plan) -> Tensor:
    """The sum over ranks of the rows of each token.

    One rank at a time: within a rank no token occurs twice, so no two additions race, on a GPU neither.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros((plan.tokens, rows.shape[1]), dtype=wide, device=rows.device)
    for part, tokens in zip(rows.split(plan.rows_sent), plan.row_tokens.split(plan.rows_sent), strict=True):
        out[tokens] += part
    return out.to(rows.dtype)


class _Dispatch(torch.autograd.Function):
    """Rows, weights and scores to where the experts are. One node, so that every rank's backward pass makes the same
    exchanges in the same order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, scores: Tensor | None, plan: _Plan, rank: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.plan, ctx.rank, ctx.weights_shape = plan, rank, weights.shape
        ctx.experts = None if scores is None else scores.shape[1]
        rows = _exchange(x[plan.row_tokens], plan.rows_sent, plan.rows_received, plan.group)
        pairs = weights.reshape(-1)[plan.pairs]
        pairs = _exchange(pairs, plan.pairs_sent, plan.pairs_received, plan.group)
        if scores is None:
            return rows, pairs, None
        # Ranks may differ by one in their number of experts; messages have the width of the widest.
        parts = scores.new_zeros((len(plan.row_tokens), _widest(plan)))
        for part, tokens, first, end in _by_rank(parts, plan):
            part[:, : end - first] = scores[tokens, first:end]
        parts = _exchange(parts, plan.rows_sent, plan.rows_received, plan.group)
        return rows, pairs, parts[:, : plan.bounds[rank + 1] - plan.bounds[rank]].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan: _Plan = ctx.plan
        by_row, by_pair, by_score = gradients
        back = _exchange(by_row, plan.rows_received, plan.rows_sent, plan.group)
        d_x = _add_up(back, plan)
        back = _exchange(by_pair, plan.pairs_received, plan.pairs_sent, plan.group)
        d_weights = back.new_zeros(ctx.weights_shape.numel())
        d_weights[plan.pairs] = back
        d_scores = None
        if ctx.experts is not None:
            parts = torch.nn.functional.pad(by_score, (0, _widest(plan) - by_score.shape[1]))
            parts = _exchange(parts, plan.rows_received, plan.rows_sent, plan.group)
            d_scores = parts.new_zeros((plan.tokens, ctx.experts))
            for part, tokens, first, end in _by_rank(parts, plan):
                d_scores[tokens, first:end] = part[:, : end - first]
        return d_x, d_weights.view(ctx.weights_shape), d_scores, None, None


class _Combine(torch.autograd.Function):
    """Results back to their tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return _add_up(_exchange(y, plan.rows_received, plan.rows_sent, plan.group), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan: _Plan = ctx.plan
        (gradient,) = gradients
        return _exchange(gradient[plan.row_tokens], plan.rows_sent, plan.rows_received, plan.group), None


def _widest(plan: _Plan) -> int:
    return max(end - first for first, end in zip(plan.bounds[:-1], plan.bounds[1:], strict=True))


def _by_rank(rows: Tensor, plan: _Plan) -> Any:
    """For each rank its part of rows grouped by destination, their tokens, and the range of its experts."""
    tokens = plan.row_tokens.split(plan.rows_sent)
    return zip(rows.split(plan.rows_sent), tokens, plan.bounds[:-1], plan.bounds[1:], strict=True)
