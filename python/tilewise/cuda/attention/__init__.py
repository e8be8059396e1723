"""The attention room on NVIDIA GPUs: forward, decode, backward.

* :mod:`tilewise.cuda.attention.kernels`: which tile a problem gets, and the stubs that instantiate it;
* :mod:`tilewise.cuda.attention.problem`: a checked call, and the argument that every kernel takes;
* :mod:`tilewise.cuda.attention.passes`: the launches;
* :mod:`tilewise.cuda.attention.operators`: the same with the arguments of torch's operators.

:func:`forward` and :func:`backward` have the arguments of ``_core.attention_forward`` and ``_core.attention_backward``
and read the same rules (:class:`tilewise.attention.rules.Rules`). Everything runs on the caller's current stream and
nothing waits for the GPU; what a program did wrong is asked for by
:func:`raise_faults`. Programs are compiled at their first use, so launch once before capturing a CUDA graph.
"""

from __future__ import annotations

from tilewise.cuda.attention.kernels import KERNELS
from tilewise.cuda.attention.passes import backward, forward
from tilewise.cuda.attention.problem import MAX_WIDTH, raise_faults

__all__ = ["KERNELS", "MAX_WIDTH", "backward", "forward", "raise_faults"]
