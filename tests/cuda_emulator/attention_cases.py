"""Cases of attention on a device, what they should give (tilewise.reference), and what a plain run loses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cuda_emulator import DTYPES, Place
from tilewise import _core
from tilewise.attention.rules import Rules
from tilewise.cuda import attention
from tilewise.reference import attention as reference
from tilewise.reference import expr
from tilewise.reference.attention.visible import visible
from tilewise.testing import assert_within_budget

# tanh(cap) of the score plus a bias of (head, query - key).
SCORE = """tilewise-expr 1 score
capture float 2
score
head
query
key
sub 2 3
gather 0 1 4
add 0 5
float 3.0
div 6 7
tanh 8
mul 9 7
return 10
"""
# Documents, causal within each.
MASK = """tilewise-expr 1 mask
capture int 1
query
key
gather 0 0
gather 0 1
eq 2 3
ge 0 1
and 4 5
return 6
"""
CAUSAL = "tilewise-expr 1 mask\nquery\nkey\nge 0 1\nreturn 2\n"


def words(counter: tuple[Any, Any, Any, int], seed: int) -> np.ndarray:
    """Philox4x32-10 over arrays of counters: uint32 ``[4, ...]``."""
    c = [np.asarray(part, np.uint64) & 0xFFFFFFFF for part in np.broadcast_arrays(*counter)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        wide = [np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]]
        high, low = [w >> np.uint64(32) for w in wide], [w & np.uint64(0xFFFFFFFF) for w in wide]
        c = [high[1] ^ c[1] ^ np.uint64(k[0]), low[1], high[0] ^ c[3] ^ np.uint64(k[1]), low[0]]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


def kept_weights(seed: int, probability: float, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which weights dropout keeps: bool ``[batch, heads, queries, keys]``; `first`: number of the first sequence."""
    batch, heads, queries, keys = shape
    stream = (np.arange(batch)[:, None] + first) * heads + np.arange(heads)
    key = np.arange(keys)
    counter = (stream[:, :, None, None], np.arange(queries)[:, None], key // 4, 6)
    drawn = np.take_along_axis(words(counter, seed), np.broadcast_to(key % 4, shape)[None], 0)[0]
    return drawn >= round(probability * 2**32)


@dataclass
class Case:
    """Arguments as NumPy arrays; ``rules`` are fields of Rules."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    grad_out: np.ndarray
    grad_lse: np.ndarray
    rules: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if self.query.dtype == dtype)


def make(dtype: str, shape: tuple[int, ...], **rules: Any) -> Case:
    """``shape``: batch, query heads, key heads, queries, keys, width, value width."""
    batch, query_heads, key_heads, queries, keys, width, value_width = shape
    generator = np.random.default_rng(0)

    def normal(*extents: int) -> np.ndarray:
        return generator.normal(size=extents).astype(DTYPES[dtype])

    return Case(
        normal(batch, query_heads, queries, width),
        normal(batch, key_heads, keys, width),
        normal(batch, key_heads, keys, value_width),
        normal(batch, query_heads, queries, value_width),
        generator.normal(size=(batch, query_heads, queries)).astype(np.float32),
        {"scale": width**-0.5} | rules,
    )


def on(place: Place, case: Case, **changes: Any) -> Rules:
    """The rules with their arrays on a place."""

    def put(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return place.put(value)
        return [put(part) for part in value] if isinstance(value, list) else value

    return Rules(**{name: put(value) for name, value in (case.rules | changes).items()})


def run_forward(case: Case, place: Place, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Result and lse; fresh outputs are NaN."""
    shape = (*case.query.shape[:3], case.value.shape[3])
    out = place.put(np.full(shape, np.nan, case.query.dtype))
    lse = place.put(np.full(shape[:3], np.nan, np.float32))
    arrays = [place.put(array) for array in (case.query, case.key, case.value)]
    attention.forward(*arrays, out, lse, on(place, case, **changes))
    return np.array(place.get(out)), np.array(place.get(lse))


def run_backward(
    case: Case, place: Place, out: np.ndarray, lse: np.ndarray, *, deterministic: bool = False, **changes: Any
) -> list[np.ndarray | None]:
    """Gradients of query, key, value, the sinks or None, and each capture of the score program."""
    rules = on(place, case, **changes)
    arrays = [place.put(array) for array in (case.query, case.key, case.value)]
    made = [place.put(np.full(array.shape, np.nan, array.dtype)) for array in (case.query, case.key, case.value)]
    sinks = None if rules.sinks is None else place.put(np.full(case.query.shape[1], np.nan, np.float32))
    captures = [
        place.put(np.full(array.shape, np.nan, np.float32)) if array.dtype.kind not in "ib" else None
        for array in case.rules.get("score_captures", [])
    ]
    given = [place.put(array.copy()) for array in (out, lse, case.grad_out, case.grad_lse)]
    attention.backward(*arrays, *given, *made, sinks, captures, rules, deterministic=deterministic)
    return [None if array is None else np.array(place.get(array)) for array in (*made, sinks, *captures)]


def options_of(case: Case) -> dict[str, Any]:
    """The rules as the reference takes them."""
    rules = Rules(**case.rules)
    options: dict[str, Any] = {"scale": rules.scale, "causal": rules.causal, "mask": rules.mask, "sinks": rules.sinks}
    options["window"] = tuple(-1 if x is None else x for x in (rules.left, rules.right))
    options |= {"block_indices": rules.block_indices, "block_size": rules.block_size}
    options |= {name: getattr(rules, name) for name in ("score_mod", "score_captures", "mask_mod", "mask_captures")}
    if rules.kv_indices is not None or rules.full_kv_indices is not None:
        empty = (np.zeros((1, 1, 1), int), np.zeros((1, 1, 1, 1), int))
        partial = (rules.kv_num_blocks, rules.kv_indices) if rules.kv_indices is not None else empty
        full = (rules.full_kv_num_blocks, rules.full_kv_indices)
        options["blocks"] = (*partial, *full, (rules.query_block, rules.key_block))
    if rules.dropout > 0:
        options["dropout"] = rules.dropout
        shape = (*case.query.shape[:3], case.key.shape[2])
        if rules.sequences is None:
            options["dropout_keep"] = kept_weights(rules.seed, rules.dropout, 0, shape)
        else:
            heads = shape[1]
            options["dropout_keep"] = [
                kept_weights(rules.seed, rules.dropout, number, (1, heads, int(row[2]), int(row[5])))
                for number, row in enumerate(rules.sequences)
            ]
    return options


def gradient_of(case: Case) -> str:
    """The derivative of the score program."""
    return _core.expr_gradient(case.rules["score_mod"])


def _plain(case: Case) -> tuple[np.ndarray, ...]:
    """Forward and backward with every intermediate result rounded to the type: what a plain run loses."""
    options, dtype = options_of(case), case.query.dtype
    rules = Rules(**case.rules)

    def r(x: Any) -> np.ndarray:
        return np.asarray(x).astype(dtype).astype(np.float64)

    q, k, v, g = (array.astype(np.float64) for array in (case.query, case.key, case.value, case.grad_out))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    batch, heads, queries, keys = (*q.shape[:3], k.shape[2])
    names = ("causal", "window", "mask", "block_indices", "block_size", "mask_mod", "mask_captures", "blocks")
    keep = visible(batch, heads, queries, keys, **{name: options[name] for name in names if name in options})
    plain = r(rules.scale * np.einsum("bhid,bhjd->bhij", q, k))
    extents = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    score = plain
    if rules.score_mod is not None:
        score = r(expr.evaluate(rules.score_mod, rules.score_captures, score=plain, **extents))
    score = np.where(keep, score, -np.inf)
    peak = score.max(-1, initial=-np.inf)
    sink = -np.inf if rules.sinks is None else np.asarray(rules.sinks, np.float64)[:, None]
    peak = np.maximum(peak, sink)
    safe = np.where(peak == -np.inf, 0, peak)
    with np.errstate(all="ignore"):
        weight = np.exp(score - safe[..., None])
        total = weight.sum(-1) + np.exp(sink - safe)
        p = r(np.where(total[..., None] > 0, weight / total[..., None], 0))
        lse = (safe + np.log(total)).astype(np.float32)
    z = options["dropout_keep"] / (1 - rules.dropout) if 0 < rules.dropout < 1 else 1.0 - rules.dropout
    out = r(r(p * z) @ v)
    delta = (out * g).sum(-1) - case.grad_lse
    grad_v = np.einsum("bhij,bhid->bhjd", r(p * z), g)
    slope = r(p * (z * r(np.einsum("bhid,bhjd->bhij", g, v)) - delta[..., None]))
    sums: list[Any] = []
    if rules.score_mod is not None:
        slope, sums = expr.gradients(
            _core.expr_gradient(rules.score_mod), rules.score_captures, score=plain, grad=slope, **extents
        )
        slope = r(slope)
    grad_q, grad_k = r(rules.scale * (slope @ k)), np.einsum("bhij,bhid->bhjd", slope, q) * rules.scale

    def pooled(x: np.ndarray) -> np.ndarray:
        return r(x.reshape(batch, -1, group, *x.shape[2:]).sum(2))

    sinks = (
        -(np.exp(sink - np.where(lse == -np.inf, np.inf, lse)) * delta).sum((0, 2)) if rules.sinks is not None else None
    )
    return out.astype(dtype), lse, grad_q, pooled(grad_k), pooled(grad_v), sinks, *sums


_FLOOR = {"float32": 2e-6, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def check(case: Case, place: Place, *, backward: bool = True, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Run a case on a place and compare everything with the reference."""
    out, lse = run_forward(case, place, **changes)
    options = options_of(case)
    q, k, v = case.query, case.key, case.value
    want, want_lse = reference.attention(q, k, v, return_lse=True, **options)
    plain = _plain(case)
    floor = _FLOOR[case.dtype]
    assert_within_budget(out, want, plain[0], floor=floor * max(1.0, np.abs(want).max(initial=0)))
    assert_within_budget(lse, want_lse, plain[1], floor=1e-5)
    if backward:
        found = run_backward(case, place, out, lse, **changes)
        with np.errstate(all="ignore"):
            slopes = {} if case.rules.get("score_mod") is None else {"score_gradient": gradient_of(case)}
            grads = reference.attention_backward(q, k, v, case.grad_out, grad_lse=case.grad_lse, **slopes, **options)
        wanted = [grads.query, grads.key, grads.value, grads.sinks, *grads.captures]
        for got, truth, lossy in zip(found, wanted, plain[2:], strict=True):
            if got is None:
                continue
            assert truth is not None and lossy is not None
            lossy = np.asarray(lossy, np.float64)
            assert_within_budget(got, truth, lossy, floor=2 * floor * max(1.0, np.abs(truth).max(initial=0)))
    return out, lse
