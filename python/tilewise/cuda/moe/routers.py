"""Routers on NVIDIA GPUs (see :mod:`tilewise.moe.routers`).

NaN logits are not an error here, because looking for them would wait for the GPU: they rank last, and they make the
weights of their own token NaN where the formula reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise.cuda.kernel import TYPES, Kernel
from tilewise.cuda.launch import describe, empty, launch, same_place
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError
from tilewise.moe import Scoring

__all__ = ["KERNELS", "MAX_EXPERTS", "MAX_TOP_K", "route", "route_backward"]

MAX_TOP_K = 64
MAX_EXPERTS = 4096
MAX_GROUPS = 32

# Groups of 256 experts in the router's shared memory -> warps of a block (a warp a row, 32 KiB a block at most).
_ROUTE_WARPS = {1: 4, 2: 4, 4: 4, 16: 2}
_GRADIENT_WARPS = 4

# (kernel's Scoring, renormalise): enum Scoring in cuda/moe/route.cuh
_SCORINGS = {
    "softmax_topk": (0, False),
    "softmax": (1, False),
    "softmax_renormalised": (1, True),
    "sigmoid": (2, False),
}


def _route_kernel(dtype: str, groups: int) -> Kernel:
    name = f"tilewise_moe_route_{TYPES[dtype]}_{groups}"
    stub = f"INSTANTIATE_MOE_ROUTE({name}, tilewise::{TYPES[dtype]}, {groups}, {_ROUTE_WARPS[groups]})\n"
    return Kernel(name, "moe.cuh", stub)


def _gradient_kernel(dtype: str) -> Kernel:
    name = f"tilewise_moe_route_gradient_{TYPES[dtype]}"
    stub = f"INSTANTIATE_MOE_ROUTE_GRADIENT({name}, tilewise::{TYPES[dtype]}, {_GRADIENT_WARPS})\n"
    return Kernel(name, "moe.cuh", stub)


#: Every instantiation of the router.
KERNELS: tuple[Kernel, ...] = (
    *(_route_kernel(dtype, groups) for dtype in TYPES for groups in _ROUTE_WARPS),
    *(_gradient_kernel(dtype) for dtype in TYPES),
)


def route(
    logits: Any,
    top_k: int,
    *,
    scoring: Scoring = "softmax_topk",
    bias: Any | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
) -> tuple[Any, Any]:
    """Choose ``top_k`` experts for each token and weigh them, in one kernel.

    Args:
        logits: ``[T, E]``, float32, float16 or bfloat16; any stride between rows. ``E`` is at most 4096. NaN ranks
            below every number.
        top_k: experts a token, from 1 to ``min(E, 64)``.
        scoring: ``softmax_topk``, ``softmax``, ``softmax_renormalised`` or ``sigmoid``, as in
            :func:`tilewise.moe.route`.
        bias: ``[E]`` of a floating type, with ``sigmoid`` alone: added to the scores for the choice, not to the
            weights. That sum is float32: choices that lie within its rounding may swap.
        renormalise: divide the weights of a token by their sum.
        scale: factor on the final weights.
        groups: with ``sigmoid`` alone: experts stand in this many groups of neighbours, 32 at most if some are closed.
        top_groups: only experts of this many groups may be chosen: those whose two largest scores, bias included, have
            the largest sum, in float32. All of them by default.

    Returns:
        ``(expert_ids, weights)``: int32 and float32, both ``[T, top_k]``, by falling score; equal scores rank by
        ascending expert. Without a bias experts are chosen by their logits, so scores that round to the same value
        do not tie.

    Raises:
        ShapeError: ``logits`` is not a matrix, or ``bias`` does not fit.
        ArgumentError: an unknown scoring, ``top_k`` out of range, or a bias without ``sigmoid``.
        UnsupportedError: more experts or a larger ``top_k`` than the kernel takes, or a tensor that requires grad.
        DtypeError: another element type.
        DeviceError: an array that is not on a GPU, or two on different ones.
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.

    Example:
        >>> import cupy, tilewise.cuda.moe                                      # doctest: +SKIP
        >>> ids, weights = tilewise.cuda.moe.route(cupy.asarray([[0.0, 2.0, 2.0]], "f4"), 2)  # doctest: +SKIP
    """
    if scoring not in _SCORINGS:
        raise ArgumentError(f"scoring: expected one of {', '.join(_SCORINGS)}, got {scoring!r}")
    if bias is not None and scoring != "sigmoid":
        raise ArgumentError(f"bias: expected a selection bias with scoring 'sigmoid' only, got one with {scoring!r}")
    x = describe("logits", logits, tuple(TYPES))
    if len(x.shape) != 2:
        raise ShapeError(f"logits: expected rank 2 [tokens, experts], got shape {x.shape}")
    tokens, experts = x.shape
    if not 1 <= top_k <= experts:
        raise ArgumentError(f"top_k: expected 1..={experts} (the number of experts), got {top_k}")
    kept = groups if top_groups is None else top_groups
    if groups != 1 and scoring != "sigmoid":
        raise ArgumentError(f"groups: expected them with scoring 'sigmoid' only, got {groups} with {scoring!r}")
    if groups < 1 or experts % groups:
        raise ArgumentError(f"groups: expected a divisor of the number of experts, {experts}, got {groups}")
    if not 1 <= kept <= groups or top_k > kept * (experts // groups):
        raise ArgumentError(
            f"top_groups: expected 1..={groups} groups that hold at least top_k = {top_k} experts, got {top_groups}"
        )
    if groups > MAX_GROUPS and kept < groups:
        raise UnsupportedError(
            f"the CUDA router closes some of at most {MAX_GROUPS} groups, got {groups}; tilewise.moe.route has no such "
            "limit"
        )
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise UnsupportedError(
            f"the CUDA router takes at most {MAX_EXPERTS} experts and top_k {MAX_TOP_K}, got {experts} and {top_k}; "
            "tilewise.moe.route has no such limit"
        )
    b = None
    if bias is not None:
        b = describe("bias", bias, (*TYPES, "float64"))
        if b.shape != (experts,):
            raise ShapeError(f"bias: expected [experts] = [{experts}], got shape {b.shape}")
        same_place("logits", x, "bias", b)
        b = b.cast("float32").contiguous()
    x = x.contiguous(last_axis_only=True)
    ids, weights = empty(x, (tokens, top_k), "int32"), empty(x, (tokens, top_k), "float32")
    capacity = min(capacity for capacity in _ROUTE_WARPS if capacity * 256 >= experts)
    warps = _ROUTE_WARPS[capacity]
    code, always = _SCORINGS[scoring]
    arguments = (
        *(ids, weights, x, np.int64(x.strides[0]), b, np.int64(tokens), np.int32(experts), np.int32(top_k)),
        *(np.int32(code), np.int32(renormalise or always), np.float32(scale), np.int32(groups), np.int32(kept)),
    )
    launch(_route_kernel(x.dtype, capacity), (-(-tokens // warps), 1, 1), (32 * warps, 1, 1), arguments, x)
    return ids.array, weights.array


def route_backward(
    grad: Any,
    logits: Any,
    expert_ids: Any,
    *,
    scoring: Scoring = "softmax_topk",
    renormalise: bool = False,
    scale: float = 1.0,
) -> Any:
    """Gradient of the logits of :func:`route`: through the weights alone, the choice is a constant.

    Args:
        grad: float32 ``[T, top_k]``, gradient of the weights.
        logits: as :func:`route` got them.
        expert_ids: as :func:`route` returned them; an id outside the row is passed over.
        scoring, renormalise, scale: as :func:`route` got them.

    Returns:
        ``[T, E]`` of the type of `logits`, computed in float32 and rounded once.

    Raises:
        ShapeError: shapes do not fit.
        ArgumentError: an unknown scoring.
        UnsupportedError: a larger ``top_k`` than 64, or a tensor that requires grad.
        DtypeError: another element type.
        DeviceError: an array that is not on a GPU, or two on different ones.
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.

    Example:
        >>> import cupy, tilewise.cuda.moe                                      # doctest: +SKIP
        >>> logits = cupy.asarray([[0.0, 2.0, 2.0]], "f4")                      # doctest: +SKIP
        >>> ids, weights = tilewise.cuda.moe.route(logits, 2)                   # doctest: +SKIP
        >>> tilewise.cuda.moe.route_backward(cupy.eye(1, 2, dtype="f4"), logits, ids)   # doctest: +SKIP
        array([[ 0.  ,  0.25, -0.25]], dtype=float32)
    """
    if scoring not in _SCORINGS:
        raise ArgumentError(f"scoring: expected one of {', '.join(_SCORINGS)}, got {scoring!r}")
    x = describe("logits", logits, tuple(TYPES))
    ids = describe("expert_ids", expert_ids, ("int32",))
    upstream = describe("grad", grad, ("float32",))
    if len(x.shape) != 2 or len(ids.shape) != 2 or ids.shape[0] != x.shape[0]:
        raise ShapeError(f"expected logits [T, E] and expert_ids [T, top_k], got shapes {x.shape} and {ids.shape}")
    if upstream.shape != ids.shape:
        raise ShapeError(f"grad: expected {list(ids.shape)}, as expert_ids, got shape {upstream.shape}")
    same_place("logits", x, "expert_ids", ids)
    same_place("logits", x, "grad", upstream)
    (tokens, experts), top_k = x.shape, ids.shape[1]
    if top_k > MAX_TOP_K:
        raise UnsupportedError(f"expert_ids: the CUDA router takes at most {MAX_TOP_K} experts a token, got {top_k}")
    x = x.contiguous(last_axis_only=True)
    out = empty(x, (tokens, experts), x.dtype)
    code, always = _SCORINGS[scoring]
    arguments = (
        *(out, x, np.int64(x.strides[0]), ids.contiguous(), upstream.contiguous(), np.int64(tokens)),
        *(np.int32(experts), np.int32(top_k), np.int32(code), np.int32(renormalise or always), np.float32(scale)),
    )
    launch(_gradient_kernel(x.dtype), (-(-tokens // _GRADIENT_WARPS), 1, 1), (32 * _GRADIENT_WARPS, 1, 1), arguments, x)
    return out.array
