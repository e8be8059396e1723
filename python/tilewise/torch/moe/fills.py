"""Token rounding as a training step needs it: weights for pairs that no router chose, and draws that repeat.

Three callers round in the same way: the module :class:`~tilewise.torch.moe.MoE`, its experts on a rank that received
tokens from others, and the router hook of :mod:`tilewise.hf`.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from tilewise.moe import Routing
from tilewise.moe.rounding import Rule
from tilewise.torch.moe.rounding import round_tokens

__all__ = ["round_routing", "weight_table"]

_DRAWS = ("stochastic", "nearest_score")


def weight_table(
    logits: Tensor, expert_ids: Tensor, *, scoring: Literal["softmax", "sigmoid"], renormalise: bool, scale: float = 1.0
) -> Tensor:
    """The weight of every pair of token and expert by the formula of a router, chosen or not.

    A token's chosen experts alone make its denominator. So no weight of a chosen pair changes because another is added,
    and an added pair weighs less than each chosen one of its token (for a router that chooses by score).

    Args:
        logits: ``[T, E]``.
        expert_ids: ``[T, K]``, what the router chose; no sentinels.
        scoring: ``softmax`` over all experts or over the chosen ones (with `renormalise` they are the same), or
            ``sigmoid`` of each logit.
        renormalise: the router divides a token's chosen weights by their sum.
        scale: the factor that it multiplies them by afterwards.

    Returns:
        ``[T, E]``, float32 (float64 for float64 logits), differentiable.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 2.0, 1.0]])
        >>> table = weight_table(logits, torch.tensor([[0, 1]]), scoring="softmax", renormalise=True)
        >>> [round(w, 4) for w in table[0].tolist()]
        [0.5, 0.5, 0.1839]
    """
    values = logits if logits.dtype == torch.float64 else logits.float()
    chosen = expert_ids.long()
    if scoring == "softmax":
        over = values.gather(1, chosen) if renormalise else values
        table = torch.exp(values - torch.logsumexp(over, dim=-1, keepdim=True))
    else:
        table = torch.sigmoid(values)
        if renormalise:
            table = table / table.gather(1, chosen).sum(dim=-1, keepdim=True)
    return table * scale


@torch.compiler.disable()  # how many pairs there are depends on the data
def round_routing(
    table: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    token_ids: Tensor | None = None,
    *,
    tile: int,
    rule: Rule,
    seed: int = 0,
    layer: int = 0,
) -> Routing:
    """:func:`tilewise.torch.moe.round_tokens` for either spelling of a routing, with draws that follow from the loads.

    What a rule draws is a function of `seed`, `layer` and the number of tokens of each expert: different at every step,
    and the same when gradient checkpointing computes a step again or a run resumes.

    Args:
        table: ``[rows, experts]``, the weight of every pair.
        expert_ids: integers ``[rows, slots]``, or ``[pairs]`` with `token_ids`; others than ``0..experts`` are dropped.
        weights: like `expert_ids`: the weights of the chosen pairs.
        token_ids: ``[pairs]``, ascending.
        tile, rule: of :func:`tilewise.torch.moe.round_tokens`.
        seed, layer: of the draws.

    Under torch.compile the graph breaks here.

    Returns:
        The rounded routing, differentiable in `table` and `weights`.
    """
    if token_ids is not None:
        expert_ids, weights = _slots(expert_ids, weights, token_ids, table.shape[0])
    chosen = weights.to(table.dtype)
    if rule not in _DRAWS:
        return round_tokens(table, expert_ids, chosen, tile=tile, rule=rule)
    digest = hashlib.blake2b(f"{seed} {layer}".encode(), digest_size=16)
    ids = expert_ids[(expert_ids >= 0) & (expert_ids < table.shape[1])]
    digest.update(ids.bincount(minlength=table.shape[1]).cpu().numpy().tobytes())
    first, second = (int.from_bytes(half, "little") >> 1 for half in (digest.digest()[:8], digest.digest()[8:]))
    return round_tokens(table, expert_ids, chosen, tile=tile, rule=rule, seed=first, step=second)


def _slots(expert_ids: Tensor, weights: Tensor, token_ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs as slots ``[rows, most pairs of a row]``; slots without a pair have the id -1."""
    tokens = token_ids.long()
    sizes = tokens.bincount(minlength=rows)
    first = torch.cumsum(sizes, 0) - sizes
    slot = torch.arange(len(tokens), device=tokens.device) - first[tokens]
    shape = (rows, int(sizes.max()) if rows else 0)
    ids = expert_ids.new_full(shape, -1).index_put((tokens, slot), expert_ids)
    return ids, weights.new_zeros(shape).index_put((tokens, slot), weights)
