"""The native part of tilewise. Private: use the `tilewise` package.

Written by hand and compared with the binary by `make lint` (stubtest). Arrays are anything with ``__dlpack__``; uint16
counts as bfloat16; outputs come from the caller and are filled. Errors are those of `tilewise.errors`.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, final, type_check_only

@type_check_only
class _Array(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

@final
@type_check_only
class _BuildInfo(TypedDict):
    version: str
    commit: str
    rustc: str
    target: str
    profile: str
    isa_compiled: list[str]

__all__: list[str]

# What this build is and how it is set (rust/python/src/config.rs).
def build_info() -> _BuildInfo: ...
def isa_detected() -> list[str]: ...
def isa_chosen() -> str: ...
def force_isa(name: str | None) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...

# gemm
def matmul(a: _Array, b: _Array, rows: _Array | None, out: _Array) -> None: ...

# attention
def attention(
    query: _Array,
    key: _Array,
    value: _Array,
    out: _Array,
    lse: _Array,
    *,
    scale: float,
    causal: bool,
    left: int | None,
    right: int | None,
    mask: _Array | None,
    sinks: _Array | None,
    block_indices: _Array | None,
    block_size: int,
) -> None: ...

# speculation
def uniform(seed: int, request: int, position: int, purpose: str) -> float: ...
def speculation_process(logits: _Array, temperature: _Array, top_k: _Array, top_p: _Array, out: _Array) -> None: ...
def speculation_sample_laws(
    probabilities: _Array, seed: int, requests: _Array, positions: _Array, purpose: str, tokens: _Array
) -> None: ...
def speculation_sample_logits(
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    seed: int,
    requests: _Array,
    positions: _Array,
    purpose: str,
    tokens: _Array,
    laws: _Array | None = None,
) -> None: ...
def speculation_verify(
    draft_tokens: _Array,
    draft_lengths: _Array | None,
    draft_laws: _Array | None,
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    strict: bool,
    seed: int,
    requests: _Array,
    positions: _Array,
    accepted: _Array,
    tokens: _Array,
) -> None: ...
def speculation_law(
    draft_tokens: _Array,
    draft_lengths: _Array | None,
    draft_laws: _Array | None,
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    strict: bool,
    acceptance: _Array,
    corrections: _Array,
) -> None: ...
