"""The moe room on NVIDIA GPUs: choose experts, run them, add their outputs up; and the way back.

* :mod:`tilewise.cuda.moe.routers`: logits to expert ids and weights;
* :mod:`tilewise.cuda.moe.sorting`: expert ids to rows grouped by expert;
* :mod:`tilewise.cuda.moe.products`: the launches of the layer's matrix products and sums;
* :mod:`tilewise.cuda.moe.layer`: the expert layer and its gradients;
* :mod:`tilewise.cuda.moe.aggregation`: each token sums the rows of its experts;
* :mod:`tilewise.cuda.moe.operators`: all of it with the arguments of torch's operators.

Takes CuPy arrays, torch CUDA tensors, or anything else with ``__dlpack__`` on a CUDA device; returns torch tensors for
torch tensors and CuPy arrays otherwise. Everything runs on the caller's current stream, without atomics and without
waiting for the GPU, so it can be captured in a CUDA graph. Names, arguments and meaning are those of
:mod:`tilewise.moe`; what only a look at values could find (ids that do not ascend, NaN logits) is no error here.
"""

from __future__ import annotations

from tilewise.cuda.kernel import Kernel
from tilewise.cuda.moe import aggregation, products, routers, sorting
from tilewise.cuda.moe.aggregation import aggregate
from tilewise.cuda.moe.layer import experts, experts_backward, experts_forward
from tilewise.cuda.moe.routers import MAX_EXPERTS, MAX_TOP_K, route, route_backward
from tilewise.cuda.moe.sorting import Metadata, metadata

__all__ = [
    "KERNELS",
    "MAX_EXPERTS",
    "MAX_TOP_K",
    "Metadata",
    "aggregate",
    "experts",
    "experts_backward",
    "experts_forward",
    "metadata",
    "route",
    "route_backward",
]

#: Every instantiation of this room.
KERNELS: tuple[Kernel, ...] = routers.KERNELS + sorting.KERNELS + products.KERNELS + aggregation.KERNELS
