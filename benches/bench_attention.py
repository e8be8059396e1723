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


class Training:
    """The way back, on the shortest case."""

    params = (["attention training 1x8x2048x128 causal"], DTYPES)
    param_names = ("case", "dtype")
    warmup_time = 0.2
    repeat = (3, 9, 2.0)
    call: Callable[[], Any]

    def setup(self, name: str, dtype: str) -> None:
        from tilewise.attention import attention, attention_backward

        case: Any = by_name(name)
        shape = (case.batch, case.query_heads, case.queries, case.head_dim)
        query, key, value, grad = (normal(shape, dtype) for _ in range(4))
        out, lse = attention(query, key, value, causal=case.causal, return_lse=True)
        self.call = lambda: attention_backward(query, key, value, out, lse, grad, causal=case.causal)

    def time_backward(self, name: str, dtype: str) -> None:
        self.call()


class Programs:
    """A mask and a score function of the catalogue under their block mask; building the block mask."""

    params = (["sliding_window", "softcap"], DTYPES)
    param_names = ("rule", "dtype")
    warmup_time = 0.2
    repeat = (3, 9, 2.0)
    call: Callable[[], Any]
    build: Callable[[], Any]

    def setup(self, rule: str, dtype: str) -> None:
        import numpy as np

        import tilewise as tw

        query, key, value = (normal((1, 8, 4096, 64), dtype) for _ in range(3))
        create = tw.attention.create_block_mask
        ids = np.arange(131072) // 512
        self.build = lambda: create(tw.masks.document(ids, tw.masks.causal()), None, None, 131072, 131072)
        if rule == "softcap":
            self.call = lambda: tw.attention.attention(query, key, value, score_mod=tw.mods.softcap(20.0))
        else:
            blocks = create(tw.masks.sliding_window(256), None, None, 4096, 4096)
            self.call = lambda: tw.attention.attention(query, key, value, block_mask=blocks)

    def time_attention(self, rule: str, dtype: str) -> None:
        self.call()

    def time_block_mask(self, rule: str, dtype: str) -> None:
        self.build()
