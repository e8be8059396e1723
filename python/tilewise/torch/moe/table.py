"""The weight that a router would give to every pair of token and expert, chosen or not.

Token rounding adds pairs that the router did not choose (see :mod:`tilewise.moe.rounding`); this is where they get
their weights, with gradients to the logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["weight_table"]


def weight_table(
    logits: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    scoring: Literal["softmax", "sigmoid"],
    renormalise: bool,
    scale: float = 1.0,
) -> Tensor:
    """The router's own weights at the pairs it chose, and elsewhere what the same formula gives.

    A token's chosen experts alone make its denominator: no weight of a chosen pair changes because a pair is added,
    and an added pair weighs less than every chosen one of its token (for a router that chooses by score).

    Args:
        logits: ``[T, E]``.
        expert_ids: ``[T, K]``, what the router chose; no sentinels.
        weights: ``[T, K]``, its weights.
        scoring: ``softmax`` over all experts or over the chosen ones (with `renormalise` they are the same), or
            ``sigmoid`` of each logit.
        renormalise: a token's chosen weights were divided by their sum.
        scale: the factor that they were multiplied by afterwards.

    Returns:
        ``[T, E]``, float32 (float64 for float64 logits); differentiable in `logits` and `weights`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 2.0, 1.0]])
        >>> table = weight_table(
        ...     logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), scoring="softmax", renormalise=True
        ... )
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
    return (table * scale).scatter(1, chosen, weights.to(table.dtype))
