"""The native part of tilewise. Private: use the `tilewise` package.

Written by hand and compared with the binary by `make lint` (stubtest). Arrays are anything with ``__dlpack__``; uint16
counts as bfloat16; outputs come from the caller and are filled. Errors are those of `tilewise.errors`.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypedDict, final, type_check_only

__all__ = [
    "ConfidenceWindows",
    "NGramIndex",
    "OutcomeCache",
    "Races",
    "RankCurve",
    "Rounding",
    "Rounds",
    "SuffixIndex",
    "attention_backward",
    "attention_forward",
    "block_mask",
    "block_mask_transpose",
    "build_info",
    "confidence_tokens",
    "confidence_traces",
    "cuda_files",
    "cuda_source",
    "experts",
    "experts_backward",
    "expr_check",
    "expr_evaluate",
    "expr_gradient",
    "expr_simplify",
    "force_isa",
    "isa_chosen",
    "isa_detected",
    "matmul",
    "num_threads",
    "philox4x32",
    "quantise",
    "round_tokens",
    "round_tokens_backward",
    "route",
    "route_backward",
    "scheduler_critical_batch",
    "scheduler_simulate",
    "set_num_threads",
    "speculation_accept",
    "speculation_correct",
    "speculation_geometric",
    "speculation_geometric_miss",
    "speculation_law",
    "speculation_predict",
    "speculation_process",
    "speculation_rank",
    "speculation_sample_laws",
    "speculation_sample_logits",
    "speculation_token_probabilities",
    "speculation_verify",
    "speculation_water_fill",
    "uniform",
]

_Purpose = Literal["draft", "accept", "residual", "target", "other", "round"]

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

# What this build is and how it is set (rust/python/src/config.rs).
def build_info() -> _BuildInfo: ...
def isa_detected() -> list[str]: ...
def isa_chosen() -> str: ...
def force_isa(name: str | None) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...

# Device sources (rust/python/src/cuda.rs).
def cuda_source(entry: str, stub: str) -> tuple[str, str]: ...
def cuda_files() -> list[str]: ...

# gemm
def matmul(a: _Array, b: _Array, rows: _Array | None, out: _Array) -> None: ...

# expr
def expr_check(text: str) -> None: ...
def expr_simplify(text: str) -> str: ...
def expr_gradient(text: str) -> str: ...
def expr_evaluate(
    text: str,
    captures: Sequence[_Array],
    out: _Array,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    score: _Array | None = None,
    grad: _Array | None = None,
    grad_captures: Sequence[_Array | None] | None = None,
    lanes: str = "queries",
) -> None: ...
def block_mask(
    text: str,
    captures: Sequence[_Array],
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    query_block: int,
    key_block: int,
    kv_num_blocks: _Array,
    kv_indices: _Array,
    full_kv_num_blocks: _Array,
    full_kv_indices: _Array,
) -> None: ...
def block_mask_transpose(num_blocks: _Array, indices: _Array, out_num_blocks: _Array, out_indices: _Array) -> None: ...

# attention
def attention_forward(query: _Array, key: _Array, value: _Array, out: _Array, lse: _Array, rules: object) -> None: ...
def attention_backward(
    query: _Array,
    key: _Array,
    value: _Array,
    out: _Array,
    lse: _Array,
    grad_out: _Array,
    grad_lse: _Array | None,
    grad_query: _Array | None,
    grad_key: _Array | None,
    grad_value: _Array | None,
    grad_sinks: _Array | None,
    grad_captures: Sequence[_Array | None],
    rules: object,
) -> None: ...

# moe
def route(
    logits: _Array,
    ids: _Array,
    weights: _Array,
    *,
    top_k: int,
    scoring: str,
    bias: Sequence[float] | None,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> None: ...
def route_backward(
    logits: _Array,
    ids: _Array,
    grad: _Array,
    out: _Array,
    *,
    scoring: str,
    renormalise: bool,
    scale: float,
) -> None: ...

@final
class Rounding:
    def __len__(self) -> int: ...
    def write(self, expert_ids: _Array, token_ids: _Array, slots: _Array, weights: _Array) -> None: ...

def round_tokens(
    scores: _Array,
    expert_ids: _Array,
    weights: _Array | None,
    *,
    tile: int,
    rule: str,
    seed: int,
    step: int,
    renormalise: bool,
) -> Rounding: ...
def round_tokens_backward(
    grad: _Array,
    scores: _Array,
    weights: _Array | None,
    expert_ids: _Array,
    token_ids: _Array,
    slots: _Array,
    score_grad: _Array,
    weight_grad: _Array | None,
    *,
    renormalise: bool,
) -> None: ...
def experts(
    arrays: Sequence[_Array | None],
    options: tuple[str, float, float, str],
    out: _Array,
    pre_activation: _Array | None,
) -> None: ...
def experts_backward(
    grad: _Array,
    pre_activation: _Array,
    arrays: Sequence[_Array | None],
    options: tuple[str, float, float, str],
    outputs: Sequence[_Array | None],
) -> None: ...
def quantise(name: str, weight: _Array, bytes: _Array, scale: _Array) -> None: ...

# speculation
def uniform(seed: int, request: int, position: int, purpose: _Purpose) -> float: ...
def speculation_process(logits: _Array, temperature: _Array, top_k: _Array, top_p: _Array, out: _Array) -> None: ...
def speculation_sample_laws(
    probabilities: _Array, seed: int, requests: _Array, positions: _Array, purpose: _Purpose, tokens: _Array
) -> None: ...
def speculation_sample_logits(
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    seed: int,
    requests: _Array,
    positions: _Array,
    purpose: _Purpose,
    tokens: _Array,
    laws: _Array | None = None,
    ids: _Array | None = None,
    saguaro: _Array | None = None,
    fan_out: _Array | None = None,
) -> None: ...
def speculation_verify(
    draft_tokens: _Array,
    draft_lengths: _Array | None,
    draft_laws: _Array | None,
    draft_ids: _Array | None,
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
    draft_ids: _Array | None,
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    strict: bool,
    acceptance: _Array,
    corrections: _Array,
) -> None: ...
def speculation_token_probabilities(
    draft_tokens: _Array,
    draft_lengths: _Array | None,
    logits: _Array,
    temperature: _Array,
    top_k: _Array,
    top_p: _Array,
    out: _Array,
) -> None: ...
def speculation_accept(
    draft: _Array,
    target: _Array,
    draft_lengths: _Array | None,
    seed: int,
    requests: _Array,
    positions: _Array,
    accepted: _Array,
) -> None: ...
def speculation_correct(
    target: _Array,
    rules: tuple[_Array, _Array, _Array] | None,
    accepted: _Array,
    refused: _Array,
    draft_laws: _Array | None,
    draft_ids: _Array | None,
    seed: int,
    requests: _Array,
    positions: _Array,
    tokens: _Array,
) -> None: ...
def speculation_predict(logits: _Array, exclude: _Array | None, counts: _Array, ids: _Array) -> None: ...
def speculation_rank(logits: _Array, tokens: _Array, exclude: _Array | None, ranks: _Array) -> None: ...
def speculation_geometric(acceptance: float, exponent: float, length: int, budget: float) -> list[float]: ...
def speculation_geometric_miss(acceptance: float, exponent: float, fan_out: Sequence[float]) -> float: ...
def speculation_water_fill(
    outcome_weights: Sequence[float], curves: Sequence[RankCurve], budget: int, most: Sequence[int]
) -> list[int]: ...

@final
class OutcomeCache:
    def __new__(cls) -> OutcomeCache: ...
    def insert(self, stream: int, round: int, accepted: int, token: int, entry: Any) -> Any: ...
    def take(self, stream: int, round: int, accepted: int, token: int) -> Any: ...
    def get(self, stream: int, round: int, accepted: int, token: int) -> Any: ...
    def retire(self, stream: int, round: int) -> list[Any]: ...
    def forget(self, stream: int) -> list[Any]: ...
    def __len__(self) -> int: ...

@final
class RankCurve:
    def __new__(cls, exponent: float, prior_weight: float, memory: float) -> RankCurve: ...
    def observe(self, rank: int | None) -> None: ...
    def hit(self, guesses: int) -> float: ...
    def gain(self, guesses: int) -> float: ...
    def observations(self) -> float: ...

@final
class NGramIndex:
    def __new__(cls, longest: int, shortest: int) -> NGramIndex: ...
    def extend(self, tokens: Sequence[int]) -> None: ...
    def truncate(self, length: int) -> None: ...
    def propose(self, count: int, after: list[int]) -> tuple[list[int], int]: ...
    def __len__(self) -> int: ...

@final
class SuffixIndex:
    def __new__(cls, longest: int, shortest: int) -> SuffixIndex: ...
    def extend(self, tokens: Sequence[int]) -> None: ...
    def truncate(self, length: int) -> None: ...
    def propose(self, count: int, after: list[int]) -> tuple[list[int], int]: ...
    def __len__(self) -> int: ...

# scheduler
@final
class Rounds:
    def __new__(
        cls,
        *,
        draft_length: int,
        budget: int,
        depth: int | None,
        fallback: str,
        max_batch: int,
        patience: float | None,
        adaptive: bool,
        workers: int,
        vocabulary: int,
        seed: int,
        together: bool = False,
        ordered: bool = False,
        guess_first: bool = False,
    ) -> Rounds: ...
    def handle(self, now: float, event: tuple[Any, ...]) -> list[tuple[Any, ...]]: ...
    def next_deadline(self) -> float | None: ...
    def copy(self) -> Rounds: ...
    def stats(self) -> dict[str, Any]: ...

def scheduler_critical_batch(hit: float, on_hit: float, neural: float, fast: float, time: float) -> float: ...
def scheduler_simulate(
    *,
    draft_length: int,
    budget: int,
    depth: int,
    fallback: str,
    max_batch: int,
    adaptive: bool,
    vocabulary: int,
    seed: int,
    targets: int,
    drafts: int,
    streams: int,
    tokens: int,
    target: Sequence[float],
    draft: Sequence[float],
    glue: float,
    link: Sequence[float],
    process: tuple[Any, ...],
    whole_only: bool,
    together: bool,
    log: bool,
) -> dict[str, Any]: ...

@final
class Races:
    def __new__(cls, seed: int, vocabulary: int) -> Races: ...
    def rank(
        self,
        logits: _Array,
        temperature: _Array,
        top_k: _Array,
        top_p: _Array,
        requests: _Array,
        positions: _Array,
        out: _Array,
        scores: _Array | None,
    ) -> None: ...

# confidence of reasoning traces
def confidence_tokens(logits: _Array, top_k: int, out: _Array) -> None: ...
def confidence_traces(
    values: _Array,
    lengths: _Array | None,
    window: int,
    tail: int,
    fraction: float,
    metrics: _Array,
    tokens: _Array | None = None,
    groups: _Array | None = None,
) -> None: ...

@final
class ConfidenceWindows:
    def __new__(cls, rows: int, window: int) -> ConfidenceWindows: ...
    def update(self, rows: _Array, values: _Array | None, out: _Array) -> None: ...
    def reset(self, rows: _Array) -> None: ...
