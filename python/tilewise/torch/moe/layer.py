"""The expert layer on torch tensors (see :mod:`tilewise.moe.layer`), with gradients.

Three operators: the layer (with or without its pre-activation), its gradients, and the layer on int8 weights (no
gradients). Between the passes autograd keeps the
inputs and the pre-activation, nothing else: ``2 T d + 4 T K n`` bytes in bfloat16 beside ids and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise import moe
from tilewise.errors import UnsupportedError
from tilewise.moe import Activation, ExpertGradients, Layout
from tilewise.torch._library import define, refuse_device

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
    *rest, keep = rest
    options = _options(tuple(rest))
    if keep:
        return moe.experts_forward(x, expert_ids, weights, **options)
    return moe.experts(x, expert_ids, weights, **options), x.new_empty(0)


def _experts_fake(x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate_up, keep = rest[1], rest[-1]
    kept = (expert_ids.numel(), gate_up.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(kept)


_experts = define("moe_experts", f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)", _experts_kernel, _experts_fake)


def _backward_kernel(
    grad: Tensor, pre_activation: Tensor, x: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any
) -> list[Tensor]:
    *rest, wanted = rest
    names = [name for name, want in zip(ExpertGradients._fields, wanted, strict=True) if want]
    gradients = moe.experts_backward(
        grad, pre_activation, x, expert_ids, weights, **_options(tuple(rest)), wanted=names
    )
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


def _refuse_twice(ctx: Any, *_: Any) -> None:
    raise UnsupportedError(
        "moe.experts: a second derivative (create_graph=True, then backward through the gradient) is not supported; "
        "use the module's eager experts where you need one"
    )


torch.library.register_autograd("tilewise::moe_experts", _differentiate, setup_context=_setup)
torch.library.register_autograd("tilewise::moe_experts_backward", _refuse_twice, setup_context=lambda *_, **__: None)


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

    Differentiable by `x`, `weights`, `gate_up`, `down` and both biases; nothing is kept where no gradient is asked for.
    Under autocast, `x`, the expert weights and biases are cast to its type; the routing weights stay as they are, and
    so do int8 weights and their scales. The layer on int8 weights is for inference.

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
    refuse_device(x=x, expert_ids=expert_ids, weights=weights, token_ids=token_ids, gate_up=gate_up, down=down)
    refuse_device(gate_up_bias=gate_up_bias, down_bias=down_bias, gate_up_scale=gate_up_scale, down_scale=down_scale)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, gate_up, down, gate_up_bias, down_bias = (
            tensor if tensor is None or tensor.dtype == torch.int8 else tensor.to(dtype)
            for tensor in (x, gate_up, down, gate_up_bias, down_bias)
        )
    operands = (x, expert_ids, weights, token_ids, gate_up, down, gate_up_bias, down_bias)
    differentiable = {
        "x": x,
        "weights": weights,
        "gate_up": gate_up,
        "down": down,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
    }
    wanted = [name for name, tensor in differentiable.items() if tensor is not None and tensor.requires_grad]
    keep = torch.is_grad_enabled() and len(wanted) > 0
    options = (activation, layout, float(alpha), float(limit))
    if gate_up_scale is None and down_scale is None and torch.int8 not in (gate_up.dtype, down.dtype):
        return _experts(*operands, *options, keep)[0]
    if keep:
        raise UnsupportedError(
            f"moe.experts: {wanted[0]} requires a gradient and int8 weights have none; dequantise for training "
            "(gate_up * gate_up_scale[..., None], in the type of x), or call it under torch.no_grad()"
        )
    return _quantised(*operands, gate_up_scale, down_scale, *options)
