"""The expert layer on torch tensors (see :mod:`tilewise.moe.layer`), with gradients.

Three operators: the layer (with or without its pre-activation), its gradients, and the layer on int8 weights, which has
none. Between the passes autograd keeps the inputs and the pre-activation, nothing else: ``2 T d + 4 T K n`` bytes in
bfloat16 beside ids and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise import moe
from tilewise.errors import UnsupportedError
from tilewise.moe import Activation, ExpertGradients, Layout
from tilewise.torch._library import autocast_dtype, define, differentiate, refuse_device

__all__ = ["experts"]

_ARGUMENTS = (
    "Tensor x, Tensor expert_ids, Tensor weights, Tensor? token_ids, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, str layout, float alpha, float limit"
)


def _options(rest: tuple[Any, ...]) -> dict[str, Any]:
    """Operator arguments from ``token_ids`` on, as keywords of :func:`tilewise.moe.experts`."""
    names = ("token_ids", "gate_up", "down", "gate_up_bias", "down_bias", "activation", "layout", "alpha", "limit")
    return dict(zip(names, rest, strict=True))


def _experts_kernel(x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    keep = rest[-1]
    options = _options(rest[:-1])
    if keep:
        return moe.experts_forward(x, expert_ids, weights, **options)
    return moe.experts(x, expert_ids, weights, **options), x.new_empty(0)


def _experts_fake(x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate_up, keep = rest[1], rest[-1]
    kept = (expert_ids.numel(), gate_up.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(kept)


_experts = define(
    "moe_experts",
    f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)",
    _experts_kernel,
    _experts_fake,
    cuda=("tilewise.cuda.moe.operators", "experts"),
)


def _backward_kernel(
    grad: Tensor, pre_activation: Tensor, x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any
) -> list[Tensor]:
    wanted = rest[-1]
    names = [name for name, want in zip(ExpertGradients._fields, wanted, strict=True) if want]
    gradients = moe.experts_backward(grad, pre_activation, x, expert_ids, weights, **_options(rest[:-1]), wanted=names)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _backward_fake(
    grad: Tensor, pre_activation: Tensor, x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any
) -> list[Tensor]:
    wanted = rest[-1]
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    _, gate_up, down, gate_up_bias, down_bias, *_ = rest
    shaped = (x, expert_ids, gate_up, down, gate_up_bias, down_bias)
    return [
        x.new_empty(0)
        if not want or like is None
        else x.new_empty(like.shape, dtype=accumulator if like is expert_ids else x.dtype)
        for want, like in zip(wanted, shaped, strict=True)
    ]


_backward = define(
    "moe_experts_backward",
    f"(Tensor grad, Tensor pre_activation, {_ARGUMENTS}, bool[] wanted) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    cuda=("tilewise.cuda.moe.operators", "experts_backward"),
)

# Positions in the operator's arguments of what has a gradient, in the order of ExpertGradients.
_DIFFERENTIABLE = (0, 2, 4, 5, 6, 7)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:12]
    ctx.set_materialize_grads(False)
    # The last output is not differentiable: it is the pre-activation that the backward pass reads.
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * 13
    if grad is None:
        return tuple(nothing)
    *tensors, pre_activation = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[at] for at in _DIFFERENTIABLE]
    gradients = _backward(grad, pre_activation, *tensors, *ctx.options, wanted)
    for at, want, gradient in zip(_DIFFERENTIABLE, wanted, gradients, strict=True):
        if want:
            nothing[at] = gradient.to(tensors[at].dtype)
    return tuple(nothing)


differentiate("moe_experts", _setup, _differentiate, operator="moe_experts_backward")


def _autocast(x: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor | None) -> tuple[Any, ...]:
    """The operands in autocast's type, where it is on; as torch does, double precision is left alone,
    and so are int8 weights."""
    operands = (x, gate_up, down, *biases)
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return operands
    kept = (torch.float64, torch.int8)
    return tuple(tensor.to(dtype) if tensor is not None and tensor.dtype not in kept else tensor for tensor in operands)


_QUANTISED = _ARGUMENTS.replace(", str activation", ", Tensor? gate_up_scale, Tensor? down_scale, str activation")


def _quantised_kernel(x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    *tensors, gate_up_scale, down_scale, activation, layout, alpha, limit = rest
    options = _options((*tensors, activation, layout, alpha, limit))
    return moe.experts(x, expert_ids, weights, **options, gate_up_scale=gate_up_scale, down_scale=down_scale)


def _quantised_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_quantised = define("moe_experts_quantised", f"({_QUANTISED}) -> Tensor", _quantised_kernel, _quantised_fake)


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    token_ids: Tensor | None = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """The expert layer on torch tensors; arguments, result and errors as in :func:`tilewise.moe.experts`.

    Differentiable by `x`, `weights`, `gate_up`, `down` and both biases; without a gradient nothing is kept.
    Tensors on a GPU go to :func:`tilewise.cuda.moe.experts`. Under autocast, `x`, expert weights and biases are cast
    to its type; the routing weights stay as they are, and so do int8 weights and their scales. The layer on int8
    weights is for inference, on the CPU.

    Raises:
        UnsupportedError: on a second derivative; int8 weights where a gradient is asked for.

    Example:
        >>> import torch
        >>> from tilewise.torch import moe
        >>> x, up, down = torch.ones(2, 4), torch.ones(3, 6, 4, requires_grad=True), torch.ones(3, 4, 3)
        >>> moe.experts(x, torch.tensor([[0], [2]]), torch.ones(2, 1), up, down).sum().backward()
        >>> up.grad[1].abs().max()
        tensor(0.)
    """
    int8 = gate_up_scale is not None or down_scale is not None or torch.int8 in (gate_up.dtype, down.dtype)
    refuse_device(
        cuda=not int8,
        x=x,
        expert_ids=expert_ids,
        weights=weights,
        token_ids=token_ids,
        gate_up=gate_up,
        down=down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
    )
    x, gate_up, down, gate_up_bias, down_bias = _autocast(x, gate_up, down, gate_up_bias, down_bias)
    differentiable = (x, weights, gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    operands = (x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias)
    options = (activation, layout, float(alpha), float(limit))
    if not int8:
        return _experts(*operands, *options, keep)[0]
    if keep:
        raise UnsupportedError(
            "moe.experts: an argument requires a gradient and the layer on int8 weights has none; dequantise for "
            "training (gate_up * gate_up_scale[..., None], in the type of x), or call it under torch.no_grad()"
        )
    return _quantised(*operands, gate_up_scale, down_scale, *options)
