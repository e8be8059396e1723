"""The experts hook: what a transformers expert module calls instead of its loop over experts."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewise import torch as twt
from tilewise.errors import UnsupportedError
from tilewise.moe import Activation, Layout
from tilewise.torch._library import autocast_dtype

__all__ = ["ROUNDING", "Plan", "experts_forward", "plan"]

ROUNDING = "_tilewise_rounding"
"""Attribute of an expert module whose tokens are rounded (see :mod:`tilewise.hf.rounding`)."""

_GATED: tuple[Activation, ...] = ("swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "reglu")
_PLAIN: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# transformers' own defaults, for modules written before the decorator knew a flag (5.3).
_FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


@dataclass(frozen=True)
class Plan:
    """How to compute one expert module with :func:`tilewise.torch.moe.experts`.

    ``alpha`` and ``limit`` matter to ``swiglu_clamped`` alone.
    """

    activation: Activation
    layout: Layout
    alpha: float
    limit: float
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    fingerprint: tuple[Any, ...]


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def _refuse(module: nn.Module, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__}: {what}. Load this model with experts_implementation='eager' (or 'grouped_mm')."
    )


def _activate(name: str, hidden: Tensor, layout: str, alpha: float, limit: float) -> Tensor:
    """The candidates in torch, for comparison with a module's own gate. Not used to compute anything."""
    functional = nn.functional
    plain = {
        "silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "relu2": lambda x: functional.relu(x).square(),
    }  # fmt: skip
    if name in plain:
        return plain[name](hidden)
    gate, up = hidden.chunk(2, dim=-1) if layout == "concatenated" else (hidden[..., ::2], hidden[..., 1::2])
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1.0) * gate * torch.sigmoid(alpha * gate)
    return plain[{"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[name]](gate) * up


def _numbers(module: nn.Module, *names: str) -> list[float]:
    """The distinct numbers that a module or its config holds under any of these names."""
    found: list[float] = []
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            number = getattr(owner, name, None)
            if isinstance(number, int | float) and not isinstance(number, bool) and float(number) not in found:
                found.append(float(number))
    return found


def _recognise(
    module: nn.Module, has_gate: bool, layouts: tuple[Layout, ...], device: torch.device
) -> tuple[Activation, Layout, float, float]:
    """Name the activation and its layout by what the module computes, not by what it is called.

    The module's gate runs on numbers of every magnitude from 1e-3 to 1e3 and both signs, so a clamp, a factor or a
    different curve shows; the candidate that gives the same numbers wins.
    """
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** (torch.rand(64, 64, generator=generator, dtype=torch.float64) * 6.0 - 3.0)
    sign = torch.randint(0, 2, size.shape, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    probe = (size * sign).to(device)
    with torch.no_grad():
        try:
            gate: Any = module._apply_gate if has_gate else module.act_fn
            answer = gate(probe)
        except Exception as error:
            raise _refuse(
                module, f"its activation does not run on a probe ({type(error).__name__}: {error})"
            ) from error
        constants = [(1.702, 7.0)]
        clamped = [
            (alpha, limit)
            for alpha in _numbers(module, "alpha", "swiglu_alpha")
            for limit in _numbers(module, "limit", "swiglu_limit")
        ]
        for name in _GATED if has_gate else _PLAIN:
            for layout in layouts:
                for alpha, limit in clamped if name == "swiglu_clamped" else constants:
                    guess = _activate(name, probe, layout, alpha, limit)
                    # Some modules gate in float32 whatever they are given, hence not the tolerance of float64.
                    if answer.shape == guess.shape and torch.allclose(answer.double(), guess, rtol=1e-5, atol=1e-7):
                        return name, layout, alpha, limit
    known = ", ".join(_GATED if has_gate else _PLAIN)
    raise _refuse(module, f"its activation ({' or '.join(layouts)} layout) computes none of the known ones: {known}")


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on. If a user changes it after the first call, the plan is made anew."""
    return (
        getattr(module, "act_fn", None),
        getattr(module, "limit", None),
        getattr(module, "swiglu_limit", None),
        getattr(module, "alpha", None),
        getattr(module, "swiglu_alpha", None),
    )


@torch.compiler.assume_constant_result  # the probe is no part of a compiled graph, its answer is
def plan(module: nn.Module, device: torch.device | str = "cpu") -> Plan:
    """Decide how to compute an expert module; made once a module and remembered.

    Raises:
        UnsupportedError: a flag or an activation that tilewise does not compute, by name.
    """
    fingerprint = _fingerprint(module)
    made = _plans.get(module)
    if made is not None and made.fingerprint == fingerprint:
        return made
    flags = {name: bool(getattr(module, name, default)) for name, default in _FLAGS.items()}
    if flags["has_post_expert_norm"]:
        raise _refuse(module, "has_post_expert_norm=True (a norm on each expert's output) is not supported")
    # Before transformers 5.10 no flag told the layout; then the probe does.
    flag = getattr(module, "is_concatenated", None)
    layouts: tuple[Layout, ...]
    layouts = ("concatenated", "interleaved") if flag is None else ("concatenated",) if flag else ("interleaved",)
    activation, layout, alpha, limit = _recognise(module, flags["has_gate"], layouts, torch.device(device))
    made = Plan(
        activation, layout, alpha, limit, flags["has_gate"], flags["has_bias"], flags["is_transposed"], fingerprint
    )
    _plans[module] = made
    return made


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The expert layer of a transformers module.

    Args:
        module: the expert module, with the flags that ``use_experts_implementation`` puts on it. ``is_transposed``
            weights are used as transposed views; nothing is copied.
        hidden_states: ``[T, d]``.
        top_k_index: integers ``[T, K]``. Ids from ``num_experts`` on are the sentinels of expert parallelism and
            contribute nothing.
        top_k_weights: ``[T, K]``.

    Gradients flow to the states, the weights of the routing and every parameter. Under autocast it computes in
    autocast's type; otherwise in the parameters'.

    Returns:
        ``[T, d]`` in the dtype of ``hidden_states``.

    Raises:
        UnsupportedError: a flag or an activation that tilewise does not compute, by name.
    """
    how = plan(module, hidden_states.device)
    held: Any = module  # what a module holds under a name is known to its class alone
    first: Tensor = held.gate_up_proj if how.has_gate else held.up_proj
    second: Tensor = held.down_proj
    first_bias: Tensor | None = None
    second_bias: Tensor | None = None
    if how.has_bias:
        first_bias = held.gate_up_proj_bias if how.has_gate else held.up_proj_bias
        second_bias = held.down_proj_bias
    if how.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    token_ids: Tensor | None = None
    rounding = getattr(module, ROUNDING, None)
    if rounding is not None and (rounded := rounding.take(top_k_index)) is not None:
        top_k_index, top_k_weights, token_ids = rounded
    # The weights decide the type; under autocast `experts` itself casts all of them, as a linear layer does.
    x = hidden_states.to(first.dtype) if autocast_dtype(hidden_states.device.type) is None else hidden_states
    output = twt.moe.experts(
        x,
        top_k_index,
        top_k_weights.to(torch.float64 if first.dtype == torch.float64 else torch.float32),
        first,
        second,
        token_ids=token_ids,
        activation=how.activation,
        layout=how.layout,
        gate_up_bias=first_bias,
        down_bias=second_bias,
        alpha=how.alpha,
        limit=how.limit,
    )
    return output.to(hidden_states.dtype)
