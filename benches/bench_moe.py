"""asv: routers and the expert layer on the frozen cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import DTYPES, MOE, MOE_TRAINING, by_name
from .inputs import normal


class Experts:
    """A SwiGLU layer on random routing; and the router in front of it."""

    params = ([case.name for case in MOE], DTYPES)
    param_names = ("case", "dtype")
    warmup_time = 0.2
    repeat = (3, 9, 2.0)
    call: Callable[[], Any]
    choose: Callable[[], Any]

    def setup(self, name: str, dtype: str) -> None:
        from tilewise.moe import experts, route

        case: Any = by_name(name)
        x, logits = normal((case.tokens, case.width), dtype), normal((case.tokens, case.experts), "float32")
        gate_up = normal((case.experts, 2 * case.hidden, case.width), dtype, scale=case.width**-0.5)
        down = normal((case.experts, case.width, case.hidden), dtype, scale=case.hidden**-0.5)
        ids, weights = route(logits, case.top_k)
        self.call = lambda: experts(x, ids, weights, gate_up, down)
        self.choose = lambda: route(logits, case.top_k)

    def time_experts(self, name: str, dtype: str) -> None:
        self.call()

    def time_route(self, name: str, dtype: str) -> None:
        self.choose()


class Training:
    """Gradients of the layer; token rounding in front of it."""

    params = ([case.name for case in MOE_TRAINING if not case.zipf], DTYPES)
    param_names = ("case", "dtype")
    warmup_time = 0.2
    repeat = (3, 5, 4.0)
    back: Callable[[], Any]
    round: Callable[[], Any]

    def setup(self, name: str, dtype: str) -> None:
        try:
            from tilewise.moe import experts_backward, experts_forward, round_tokens, route
        except ImportError as error:  # a commit before them
            raise NotImplementedError from error

        case: Any = by_name(name)
        x, logits = normal((case.tokens, case.width), dtype), normal((case.tokens, case.experts), "float32")
        gate_up = normal((case.experts, 2 * case.hidden, case.width), dtype, scale=case.width**-0.5)
        down = normal((case.experts, case.width, case.hidden), dtype, scale=case.hidden**-0.5)
        ids, weights = route(logits, case.top_k)
        _, pre = experts_forward(x, ids, weights, gate_up, down)
        self.back = lambda: experts_backward(x, pre, x, ids, weights, gate_up, down)
        self.round = lambda: round_tokens(logits, ids, tile=32)

    def time_experts_backward(self, name: str, dtype: str) -> None:
        self.back()

    def time_round_tokens(self, name: str, dtype: str) -> None:
        self.round()
