"""asv: forward attention, prefill and decode, on the frozen cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import ATTENTION, DTYPES, by_name
from .inputs import normal


class Attention:
    """Grouped queries over contiguous keys."""

    params = ([case.name for case in ATTENTION], DTYPES)
    param_names = ("case", "dtype")
    warmup_time = 0.2
    repeat = (3, 9, 2.0)
    call: Callable[[], Any]

    def setup(self, name: str, dtype: str) -> None:
        from tilewise.attention import attention

        case: Any = by_name(name)
        query = normal((case.batch, case.query_heads, case.queries, case.head_dim), dtype)
        key = normal((case.batch, case.key_heads, case.keys, case.head_dim), dtype)
        value = normal((case.batch, case.key_heads, case.keys, case.head_dim), dtype)
        self.call = lambda: attention(query, key, value, causal=case.causal)

    def time_attention(self, name: str, dtype: str) -> None:
        self.call()
