"""The expert layer on NVIDIA GPUs (see :mod:`tilewise.moe.layer`).

Forward: sort the pairs, the first product with the activation behind it, the second product, each token's sum.
Backward, from the inputs and the pre-activation alone: sort again, one product that gives dH, A' and the scores'
gradients, then two weight gradients and the input's. Nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from tilewise.cuda.kernel import TYPES
from tilewise.cuda.launch import DeviceArray, describe, same_place
from tilewise.cuda.moe import products
from tilewise.cuda.moe.aggregation import gather_sum
from tilewise.cuda.moe.products import Problem
from tilewise.cuda.moe.sorting import check_ids, plan
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.moe import ACTIVATIONS, Activation, ExpertGradients, Layout

__all__ = ["experts", "experts_backward", "experts_forward"]


def _array(name: str, array: Any, x: DeviceArray, dtypes: Sequence[str] | None = None) -> DeviceArray:
    """An array beside `x`, and of its type unless `dtypes` says otherwise."""
    described = describe(name, array, dtypes)
    same_place("x", x, name, described)
    if dtypes is None and described.dtype != x.dtype:
        raise DtypeError(f"{name}: expected dtype {x.dtype}, as x, got {described.dtype}; convert one of them")
    return described


def _rows(array: DeviceArray) -> DeviceArray:
    """Any strides but that of the last axis, which is 1; a copy only if it is not."""
    return array if 0 in array.shape or array.shape[-1] == 1 or array.strides[-1] == 1 else array.contiguous()


def _problem(
    x: Any,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    token_ids: Any,
    activation: str,
    layout: str,
    gate_up_bias: Any,
    down_bias: Any,
    alpha: float,
    limit: float,
) -> Problem:
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if layout not in get_args(Layout):
        raise ArgumentError(f"layout: expected one of {' or '.join(get_args(Layout))}, got {layout!r}")
    gated = ACTIVATIONS[activation]
    source = describe("x", x, tuple(TYPES))
    if len(source.shape) != 2:
        raise ShapeError(f"x: expected rank 2 [tokens, d], got shape {source.shape}; flatten batch and sequence")
    tokens, width = source.shape
    ids, of_pair = check_ids(expert_ids, token_ids, tokens)
    same_place("x", source, "expert_ids", ids)
    scores = _array("weights", weights, source, (*TYPES, "float64"))
    if scores.shape != ids.shape:
        raise ShapeError(f"weights: expected {list(ids.shape)}, as expert_ids, got shape {scores.shape}")
    first, second = _array("gate_up", gate_up, source), _array("down", down, source)
    if len(first.shape) != 3 or first.shape[2] != width:
        raise ShapeError(f"gate_up: expected [experts, features, {width}], to match x, got shape {first.shape}")
    experts, wide, _ = first.shape
    if gated and wide % 2:
        raise ShapeError(
            "gate_up: expected an even number of features (gates and ups) for a gated activation, "
            f"got shape {first.shape}"
        )
    narrow = wide // 2 if gated else wide
    if second.shape != (experts, width, narrow):
        raise ShapeError(
            f"down: expected [experts, width, hidden] = [{experts}, {width}, {narrow}], got shape {second.shape}"
        )
    biases: list[DeviceArray | None] = []
    for name, bias, columns in (("gate_up_bias", gate_up_bias, wide), ("down_bias", down_bias, width)):
        if bias is None:
            biases.append(None)
            continue
        described = _array(name, bias, source)
        if described.shape != (experts, columns):
            raise ShapeError(f"{name}: expected [{experts}, {columns}], got shape {described.shape}")
        biases.append(described.cast("float32").contiguous())
    return Problem(
        _rows(source),
        _rows(first),
        _rows(second),
        biases[0],
        biases[1],
        scores.cast("float32").contiguous(),
        plan(ids, of_pair, tokens, experts),
        activation,
        layout == "interleaved",
        float(alpha),
        float(limit),
    )


def _sum(problem: Problem, rows: DeviceArray, scores: DeviceArray | None) -> DeviceArray:
    """Each token's sum over its pairs."""
    made = problem.plan
    top_k = made.ids.shape[1] if made.token_starts is None else 0
    return gather_sum(rows, made.pair_row, scores, made.token_starts, problem.x.shape[0], top_k)


def _forward(problem: Problem, *, keep: bool) -> tuple[Any, Any]:
    h, a = products.up(problem, keep=keep)
    y = products.down(problem, a)
    return _sum(problem, y, problem.scores).array, None if h is None else h.array


def experts(
    x: Any,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Any:
    """The expert layer; arguments and result as in :func:`tilewise.moe.experts`, the pre-activation is not stored.

    Args:
        x: ``[tokens, d]``, float32, float16 or bfloat16; any strides.
        expert_ids: ``[tokens, slots]``, int32 or int64; ids outside ``0..experts`` are skipped.
        weights: floating, as `expert_ids`; used as float32.
        gate_up: ``[experts, 2n, d]`` (``[experts, n, d]`` without a gate) of the type of `x`. Copied at each call
            unless neighbours along `d` are neighbours in memory.
        down: ``[experts, d, n]``; likewise along `n`.
        token_ids: ``[pairs]``, ascending, which is not checked: sums of other orders are not defined, but nothing is
            read out of bounds.
        activation, layout, gate_up_bias, down_bias, alpha, limit: as there.

    Returns:
        ``[tokens, d]`` of the type and kind of `x`. Accumulated in float32; the activation and each row's output are
        rounded to the type of `x`, the token's sum once. Equal inputs give equal bits.

    Raises:
        ShapeError, DtypeError, ArgumentError: the message names the argument.
        DeviceError: an array that is not on a GPU, or two on different ones.
        UnsupportedError: 2³¹ pairs or more, or a tensor that requires grad (pass through :mod:`tilewise.torch`).
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.

    Example:
        >>> import torch, tilewise.cuda.moe                                     # doctest: +SKIP
        >>> tilewise.cuda.moe.experts(x, ids, weights, gate_up, down)           # doctest: +SKIP

    Source: the algebra and layouts of SonicMoE (arXiv 2512.14080), forward.
    """
    problem = _problem(
        *(x, expert_ids, weights, gate_up, down, token_ids, activation, layout),
        *(gate_up_bias, down_bias, alpha, limit),
    )
    return _forward(problem, keep=False)[0]


def experts_forward(
    x: Any,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[Any, Any]:
    """:func:`experts`, and what :func:`experts_backward` needs beside the inputs.

    Returns:
        ``(out, pre_activation)``, as :func:`tilewise.moe.experts_forward`: the second is ``[pairs, 2n]`` (without a
        gate ``[pairs, n]``) of the type of `x`, rows grouped by expert, all gates then all ups whatever the `layout`,
        zeros in the last rows where ids were skipped. `out` has the bits that :func:`experts` gives.

    Raises:
        as :func:`experts`.

    Example:
        >>> import torch, tilewise.cuda.moe                                     # doctest: +SKIP
        >>> out, pre = tilewise.cuda.moe.experts_forward(x, ids, weights, gate_up, down)  # doctest: +SKIP
    """
    problem = _problem(
        *(x, expert_ids, weights, gate_up, down, token_ids, activation, layout),
        *(gate_up_bias, down_bias, alpha, limit),
    )
    return _forward(problem, keep=True)


def experts_backward(
    grad: Any,
    pre_activation: Any,
    x: Any,
    expert_ids: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    *,
    token_ids: Any = None,
    activation: Activation = "swiglu",
    layout: Layout = "concatenated",
    gate_up_bias: Any = None,
    down_bias: Any = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    wanted: Sequence[str] = ExpertGradients._fields,
) -> ExpertGradients:
    """Gradients of :func:`experts` from its inputs and the pre-activation; as :func:`tilewise.moe.experts_backward`.

    Args:
        grad: gradient of the result, ``[tokens, d]`` of the type of `x`; any strides.
        pre_activation: as :func:`experts_forward` returned it for the same arguments.
        x, expert_ids, weights, gate_up, down, token_ids, activation, layout, gate_up_bias, down_bias, alpha, limit: as
            in :func:`experts`.
        wanted: names of the gradients to compute.

    Returns:
        The gradients, ``None`` where not asked for; `weights` is float32, the others of the type of `x`. Exact zeros
        for the weights of experts that no token went to, and for skipped pairs. Equal inputs give equal bits.

    Raises:
        as :func:`experts`; ArgumentError for an unknown name in `wanted`.

    Example:
        >>> import torch, tilewise.cuda.moe                                     # doctest: +SKIP
        >>> tilewise.cuda.moe.experts_backward(grad, pre, x, ids, weights, gate_up, down).x   # doctest: +SKIP

    Source: SonicMoE (arXiv 2512.14080), section 3.
    """
    unknown = [name for name in wanted if name not in ExpertGradients._fields]
    if unknown:
        raise ArgumentError(f"wanted: expected names among {', '.join(ExpertGradients._fields)}, got {unknown[0]!r}")
    problem = _problem(
        *(x, expert_ids, weights, gate_up, down, token_ids, activation, layout),
        *(gate_up_bias, down_bias, alpha, limit),
    )
    upstream = _array("grad", grad, problem.x)
    if upstream.shape != problem.x.shape:
        raise ShapeError(f"grad: expected {list(problem.x.shape)}, as x, got shape {upstream.shape}")
    upstream = _rows(upstream)
    h = _array("pre_activation", pre_activation, problem.x)
    if h.shape != (problem.plan.pairs, problem.wide):
        raise ShapeError(
            f"pre_activation: expected [pairs, features] = [{problem.plan.pairs}, {problem.wide}], got shape {h.shape}"
        )
    h = h.contiguous()

    asked = {name: name in wanted for name in ExpertGradients._fields}
    asked["gate_up_bias"] &= problem.gate_up_bias is not None
    asked["down_bias"] &= problem.down_bias is not None
    inner = asked["x"] or asked["gate_up"] or asked["gate_up_bias"]
    found: dict[str, DeviceArray] = {}
    if inner or asked["down"] or asked["weights"]:
        dh, scaled, partial = products.down_gradient(
            problem, upstream, h, inner=inner, scaled=asked["down"], scores=asked["weights"]
        )
        if partial is not None:
            found["weights"] = products.score_gradient(problem, upstream, partial)
        if scaled is not None:
            found["down"] = products.down_weight_gradient(problem, upstream, scaled)
        del scaled, partial  # their memory serves the next product
        if dh is not None and asked["x"]:
            found["x"] = _sum(problem, products.input_gradient(problem, dh), None)
        if dh is not None and asked["gate_up"]:
            found["gate_up"] = products.gate_up_gradient(problem, dh)
        if dh is not None and asked["gate_up_bias"]:
            found["gate_up_bias"] = products.bias_gradient(problem, dh, of_down=False)
    if asked["down_bias"]:
        found["down_bias"] = products.bias_gradient(problem, upstream, of_down=True)
    return ExpertGradients(*(found[name].array if name in found else None for name in ExpertGradients._fields))
