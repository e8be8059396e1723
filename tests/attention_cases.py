"""What the attention tests share: cases, and the dense meaning of `Rules` by torch autograd. Loaded by path.

``dense`` forms every score in float64 and lets autograd differentiate, programs included (``run``, a node a line), so
it shares nothing with the kernels and nothing with tilewise.reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilewise import _core
from tilewise.attention.rules import Rules
from tilewise.torch.attention.operators import attend


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's threads, which wait for each other in a busy loop. Files take it over by
    name, and with it its being used everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_DROP = 6  # the purpose in the generator's counter (docs/numerics.md)

_UNARY: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil,
    "round": torch.round, "trunc": torch.trunc, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log,
    "log2": torch.log2, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "erf": torch.erf, "relu": torch.relu, "square": torch.square, "not": torch.logical_not,
    "to_int": lambda x: x.long(), "to_bool": lambda x: x != 0,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "min": torch.minimum, "max": torch.maximum, "div": torch.div,
    "atan2": torch.atan2, "pow": torch.pow, "floor_div": torch.floor_divide, "mod": torch.remainder,
    "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "and": torch.bitwise_and, "or": torch.bitwise_or,
    "xor": torch.bitwise_xor, "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip


def run(
    text: str,
    captures: Sequence[Tensor],
    shape: Sequence[int],
    first_batch: int,
    score: Tensor | None,
    wide: torch.dtype = torch.float64,
) -> Tensor:
    """A program's value for every pair of ``shape = (batch, heads, queries, keys)``, by torch operations."""
    leaves: dict[str, Tensor] = {}
    for axis, name in enumerate(("batch", "head", "query", "key")):
        view = [1, 1, 1, 1]
        view[axis] = shape[axis]
        leaves[name] = (torch.arange(shape[axis]) + (first_batch if axis == 0 else 0)).view(view)
    if score is not None:
        leaves["score"] = score
    nodes: list[Tensor] = []
    for line in text.splitlines()[1:]:
        name, *words = line.split()
        if name == "capture":
            continue
        if name == "return":
            return nodes[int(words[0])].expand(*shape)
        if name in leaves:
            nodes.append(leaves[name])
        elif name in ("float", "int", "bool"):
            value = {"float": float, "int": int, "bool": lambda word: word == "1"}[name](words[0])
            nodes.append(torch.tensor(value, dtype={"float": wide, "int": torch.int64}.get(name, torch.bool)))
        elif name == "gather":
            capture, *indices = (int(word) for word in words)
            array = captures[capture]
            array = array.to(wide) if array.is_floating_point() else array
            array = array.long() if not array.is_floating_point() and array.dtype != torch.bool else array
            nodes.append(array[tuple(nodes[i] for i in indices)])
        elif name == "to_float":
            nodes.append(nodes[int(words[0])].to(wide))
        elif name == "where":
            nodes.append(torch.where(*(nodes[int(word)] for word in words)))
        else:
            operands = [nodes[int(word)] for word in words]
            nodes.append((_UNARY if len(operands) == 1 else _BINARY)[name](*operands))
    raise AssertionError("no return")


def blocks_of(rules: Rules, shape: Sequence[int], decided: Tensor) -> Tensor:
    """Pairs that a block mask keeps: `decided` in its partial blocks, everything in its full ones."""

    def pairs(count: Any, indices: Any) -> Tensor:
        rows, columns = indices.shape[-2:]
        grid = torch.zeros(*indices.shape[:2], rows, columns, dtype=torch.bool)
        for at in np.ndindex(*indices.shape[:3]):
            grid[at][indices[at][: int(count[at])].long()] = True
        grid = grid.repeat_interleave(rules.query_block, 2).repeat_interleave(rules.key_block, 3)
        return grid[..., : shape[2], : shape[3]].expand(*shape)

    kept = pairs(rules.kv_num_blocks, rules.kv_indices) & decided
    if rules.full_kv_num_blocks is not None:
        kept = kept | pairs(rules.full_kv_num_blocks, rules.full_kv_indices)
    return kept


def kept(rules: Rules, shape: Sequence[int], first_batch: int = 0) -> Tensor:
    """Who attends whom: bool ``[batch, heads, queries, keys]``."""
    _, heads, queries, keys = shape
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    keep = torch.ones(*shape, dtype=torch.bool)
    if rules.causal:
        keep = keep & (key <= place)
    if rules.left is not None:
        keep = keep & (key >= place - rules.left)
    if rules.right is not None:
        keep = keep & (key <= place + rules.right)
    if rules.mask is not None:
        keep = keep & rules.mask
    if rules.block_indices is not None:
        listed = (rules.block_indices[..., None] == torch.arange(keys) // rules.block_size).any(-2)
        keep = keep & listed.repeat_interleave(heads // listed.shape[1], 1)
    decided = torch.ones(*shape, dtype=torch.bool)
    if rules.mask_mod is not None:
        decided = run(rules.mask_mod, rules.mask_captures, shape, first_batch, None)
    if rules.kv_num_blocks is not None:
        decided = blocks_of(rules, shape, decided)
    return keep & decided


def _one(q: Tensor, k: Tensor, v: Tensor, rules: Rules, first_batch: int, drop: Tensor | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * rules.scale
    if rules.score_mod is not None:
        scores = run(rules.score_mod, rules.score_captures, scores.shape, first_batch, scores, q.dtype)
    scores = scores.masked_fill(~kept(rules, scores.shape, first_batch), -torch.inf)
    logits = scores
    if rules.sinks is not None:
        logits = torch.cat([scores, rules.sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    if logits.shape[-1] == 0:
        return (scores @ v), torch.full(scores.shape[:3], -torch.inf, dtype=q.dtype)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if drop is not None:
        weights = weights * (drop.to(q.dtype) / (1 - rules.dropout) if rules.dropout < 1 else 0.0)
    return weights @ v, lse


def dense(
    query: Tensor, key: Tensor, value: Tensor, rules: Rules, drop: Any = None, wide: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention under `rules` by plain torch operations in the type `wide`, differentiable.

    `drop` is the dropout's keep mask ``[batch, heads, queries, keys]`` (a list of them, one a sequence). Returns the
    result, its LSE, and which rows ``[batch, queries]`` belong to a sequence; the others are 0 and -inf.
    """
    q, k, v = (x.to(wide) for x in (query, key, value))
    if rules.sequences is None:
        out, lse = _one(q, k, v, rules, 0, drop)
        return out, lse, torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
    written = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    for number, row in enumerate(rules.sequences.tolist()):
        query_batch, query_start, query_count, key_batch, key_start, key_count = row
        if rules.block_table is None:
            of_keys = (slice(key_batch, key_batch + 1), slice(None), slice(key_start, key_start + key_count))
            one_k, one_v = k[of_keys], v[of_keys]
        else:
            pages = rules.block_table[number, : -(-key_count // k.shape[2])].long()
            one_k, one_v = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :key_count] for x in (k, v))
        rows = slice(query_start, query_start + query_count)
        of_one = None if drop is None else drop[number]
        result = _one(q[query_batch : query_batch + 1, :, rows], one_k, one_v, rules, number, of_one)
        place = (torch.tensor([query_batch]), slice(None), rows)
        out, lse = out.index_put(_indices(place, out), result[0]), lse.index_put(_indices(place, lse), result[1])
        written[query_batch, rows] = True
    return out, lse, written


def _indices(place: Any, tensor: Tensor) -> tuple[Tensor, ...]:
    batch, _, rows = place
    heads = torch.arange(tensor.shape[1])
    return batch[:, None, None], heads[None, :, None], torch.arange(rows.start, rows.stop)[None, None]


def as_torch(rules: Rules) -> Rules:
    """A copy whose arrays are tensors."""
    rules = copy.copy(rules)
    for name in Rules.__dataclass_fields__:
        field = getattr(rules, name)
        if isinstance(field, list):
            setattr(rules, name, [torch.as_tensor(np.array(x)) if not isinstance(x, Tensor) else x for x in field])
        elif isinstance(field, np.ndarray):
            setattr(rules, name, torch.as_tensor(np.array(field)))
    return rules


def gradients(
    outputs: tuple[Tensor, Tensor], leaves: Sequence[Tensor], grad_out: Tensor | None, grad_lse: Tensor | None
) -> list[Tensor]:
    """Gradients of ``<out, grad_out> + <lse, grad_lse>`` (finite LSE only) by `leaves`; zeros for one not used."""
    out, lse = outputs[:2]
    loss = out.new_zeros((), dtype=torch.float64)
    if grad_out is not None:
        loss = loss + (out.double() * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (torch.where(torch.isfinite(lse), lse, 0.0).double() * grad_lse.double()).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def draw(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, head_dim),
        (batch, key_heads, keys, head_dim),
        (batch, key_heads, keys, head_dim if value_dim is None else value_dim),
    )
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes
    )
    return query, key, value


def dropped(seed: int, dropout: float, heads: int, queries: int, keys: int, sequence: int = 0) -> Tensor:
    """The dropout's keep mask ``[1, heads, queries, keys]`` of one sequence, from the formula of docs/numerics.md."""
    keep = torch.ones(1, heads, queries, keys, dtype=torch.bool)
    limit = round(dropout * 2**32)
    for head, query, group in np.ndindex(heads, queries, -(-keys // 4)):
        counter = (sequence * heads + head, query, group, _DROP)
        words = _core.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        for lane, word in enumerate(words[: keys - 4 * group]):
            keep[0, head, query, 4 * group + lane] = word >= limit
    return keep


def rules_of(query: Tensor, **fields: Any) -> Rules:
    """The Rules of a call of ``attend``."""
    score, keep = fields.pop("score", None), fields.pop("keep", None)
    scale, seed = fields.pop("scale", None), fields.pop("seed", None)
    return Rules(
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        seed=0 if seed is None else int(seed),
        score_mod=score and score.text,
        score_captures=list(score.captures) if score else [],
        mask_mod=keep and keep.text,
        mask_captures=list(keep.captures) if keep else [],
        **fields,
    )


def flash_rule(got: Tensor, truth: Tensor, plain: Tensor, *, factor: float = 2.0, extra: float = 0.0) -> None:
    """flash_attn's own tolerance: `factor` times what a plain run in the same type loses, and two roundings at 0.3."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    infinite = torch.isinf(truth)
    assert torch.equal(got.double()[infinite], truth.double()[infinite])
    kind = got.dtype
    got, truth, plain = (torch.where(infinite, 0.0, x.detach().double()) for x in (got, truth, plain))
    if not got.numel():
        return
    small = torch.finfo(kind).eps
    narrow = truth.to(kind)
    # In 32 and 64 bits another order of a sum costs a few roundings (of operands of size 1, also where the truth is
    # 0); the plain run may have had luck.
    few = 16 * max(1.0, float(truth.abs().max())) if small < 1e-6 else float(truth.abs().max())
    rounding = max(float(((narrow + 0.3 - 0.3) - narrow).abs().max()), few * small)
    lost = torch.nan_to_num(plain - truth, 0.0, 0.0, 0.0).abs().max()
    error = float((got - truth).abs().max())
    allowed = factor * float(lost) + 2 * rounding + extra
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (plain run {float(lost):.3e})"


def check(
    operands: tuple[Tensor, Tensor, Tensor],
    *,
    more: Sequence[Tensor] = (),
    drop: Any = None,
    factor: float = 2.0,
    extra: float = 0.0,
    lse_gradient: bool = True,
    **fields: Any,
) -> tuple[Tensor, Tensor]:
    """The operator's result, LSE and gradients against the dense meaning, by flash_attn's rule.

    Gradients are taken by the operands, `more`, the sinks and the float captures of the score program that require
    one; `fields` are those of ``attend``.
    """
    rules = rules_of(operands[0], **fields)
    captures = [x for x in rules.score_captures if x.is_floating_point() and x.requires_grad]
    sinks = [] if rules.sinks is None or not rules.sinks.requires_grad else [rules.sinks]
    leaves = [*operands, *more, *sinks, *captures]
    got = attend(*operands, **fields)
    truth = dense(*operands, rules, drop)
    plain = dense(*operands, rules, drop, wide=operands[0].dtype)
    generator = torch.Generator().manual_seed(99)
    grad_out = torch.randn(got[0].shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(got[1].shape, generator=generator, dtype=torch.float64) if lse_gradient else None
    found = [gradients(outputs, leaves, grad_out, grad_lse) for outputs in (got, truth, plain)]
    for values in ((got[0], truth[0], plain[0]), (got[1], truth[1], plain[1])):
        flash_rule(*values, factor=factor, extra=extra)
    for values in zip(*found, strict=True):
        assert values[0].dtype == values[1].dtype
        flash_rule(*values, factor=factor, extra=extra)
    return got
