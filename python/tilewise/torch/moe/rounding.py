"""Token rounding of torch tensors (see :mod:`tilewise.moe.rounding`)."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import _core
from tilewise.moe import Routing, Rule
from tilewise.moe.rounding import draws, rounded
from tilewise.torch._library import define, differentiate, refuse_device

__all__ = ["round_tokens"]


def _fake(scores: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    ids, tokens, slots = (scores.new_empty(pairs, dtype=torch.int32) for _ in range(3))
    weights = scores.new_empty(pairs, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return ids, weights, tokens, slots


def _backward_kernel(
    grad: torch.Tensor,
    scores: torch.Tensor,
    weights: torch.Tensor | None,
    expert_ids: torch.Tensor,
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    renormalise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    score_grad = torch.empty(scores.shape, dtype=scores.dtype)
    weight_grad = None if weights is None else torch.empty(weights.shape, dtype=weights.dtype)
    _core.round_tokens_backward(
        grad.detach(),
        scores.detach(),
        None if weights is None else weights.detach(),
        expert_ids,
        token_ids,
        slots,
        score_grad,
        weight_grad,
        renormalise=renormalise,
    )
    return score_grad, scores.new_empty(0) if weight_grad is None else weight_grad


def _backward_fake(
    grad: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(0) if weights is None else weights.new_empty(weights.shape)


_round_tokens = define(
    "moe_round_tokens",
    "(Tensor scores, Tensor expert_ids, Tensor? weights, int tile, str rule, bool renormalise, SymInt seed, "
    "SymInt step) -> (Tensor, Tensor, Tensor, Tensor)",
    rounded,
    _fake,
)
_round_tokens_backward = define(
    "moe_round_tokens_backward",
    "(Tensor grad, Tensor scores, Tensor? weights, Tensor expert_ids, Tensor token_ids, Tensor slots, "
    "bool renormalise) -> (Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    scores, _, weights, _, _, ctx.renormalise, *_ = inputs
    expert_ids, _, token_ids, slots = output
    ctx.save_for_backward(scores, weights, expert_ids, token_ids, slots)


def _backward(ctx: Any, _: Any, grad: torch.Tensor, *__: Any) -> tuple[Any, ...]:
    scores, weights, *pairs = ctx.saved_tensors
    score_grad, weight_grad = _round_tokens_backward(grad, scores, weights, *pairs, ctx.renormalise)
    return (score_grad, None, None if weights is None else weight_grad, *[None] * 5)


differentiate("moe_round_tokens", _setup, _backward, operator="moe_round_tokens_backward")


def round_tokens(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    tile: int,
    rule: Rule = "nearest",
    renormalise: bool = False,
    seed: int | None = None,
    step: int = 0,
) -> Routing:
    """Token rounding of torch tensors; arguments, results and errors as in :func:`tilewise.moe.round_tokens`.

    Which pairs are kept is a constant. Each kept pair's gradient goes to the number its weight came from: the entry of
    `weights` of a chosen pair (of `scores` without `weights`), the entry of `scores` of a fill; through the sum of the
    token's kept pairs if `renormalise`. Saved for backward: the inputs and twelve bytes a pair.

    The number of pairs depends on the data. ``torch.compile(fullgraph=True)`` therefore wants
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``; without `fullgraph` the graph breaks here.

    Raises:
        UnsupportedError: a second derivative.

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> logits = torch.randn(64, 8, requires_grad=True)
        >>> expert_ids, weights = moe.route(logits, 2)
        >>> routing = moe.round_tokens(logits.softmax(-1), expert_ids, weights, tile=16)
        >>> (routing.counts(8) % 16).tolist()
        [0, 0, 0, 0, 0, 0, 0, 0]
    """
    refuse_device(scores=scores, expert_ids=expert_ids, weights=weights)
    outputs = _round_tokens(scores, expert_ids, weights, tile, rule, renormalise, *draws(rule, seed, step))
    return Routing(*outputs[:3])
