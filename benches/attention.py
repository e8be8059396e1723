"""Comparisons of attention: with torch's scaled_dot_product_attention, and with its compiled flex_attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from . import cases
from .comparison import OURS, Comparison

__all__ = ["attention", "attention_training", "decode", "flex", "rules"]


def attention(dtype: str) -> Iterator[Comparison]:
    """Ours and torch's scaled_dot_product_attention."""
    import torch

    import tilewise.torch as twt

    for case in cases.ATTENTION:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        query = torch.randn(case.batch, case.query_heads, case.queries, case.head_dim).to(kind)
        key = torch.randn(case.batch, case.key_heads, case.keys, case.head_dim).to(kind)
        value = torch.randn(case.batch, case.key_heads, case.keys, case.head_dim).to(kind)
        mask, causal = None, case.causal
        if case.queries != case.keys:
            # torch aligns causal to the top left corner; a decode step needs the other one, said by a mask.
            causal = False
            if case.queries > 1:
                first = case.keys - case.queries
                mask = torch.arange(case.keys) <= torch.arange(case.queries)[:, None] + first

        def sdpa(q: Any = query, k: Any = key, v: Any = value, m: Any = mask, c: bool = causal) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, m, is_causal=c, enable_gqa=True)

        def ours(q: Any = query, k: Any = key, v: Any = value, c: bool = case.causal) -> Any:
            return twt.attention(q, k, v, causal=c)

        decode = case.bytes_read(query.element_size()) if case.queries < 8 else None
        yield Comparison("attention", case, dtype, {OURS: ours, "torch SDPA": sdpa}, decode)


def _tensors(case: cases.Attention, dtype: str) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    query = torch.randn(case.batch, case.query_heads, case.queries, case.head_dim).to(kind)
    key, value = (torch.randn(case.batch, case.key_heads, case.keys, case.head_dim).to(kind) for _ in range(2))
    return query, key, value


def attention_training(dtype: str) -> Iterator[Comparison]:
    """Forward and backward: gradients of query, key and value."""
    import torch

    import tilewise.torch as twt

    for case in cases.ATTENTION_TRAINING:
        leaves = [tensor.requires_grad_() for tensor in _tensors(case, dtype)]
        grad = torch.randn(leaves[0].shape).to(leaves[0].dtype)

        def step(function: Any, leaves: Any = leaves, grad: Any = grad) -> Any:
            with torch.enable_grad():
                out = function(*leaves)
                return torch.cat([g.flatten()[:4096].float() for g in torch.autograd.grad(out, leaves, grad)])

        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=case.causal)
        ours = functools.partial(twt.attention, causal=case.causal)
        functions = {OURS: functools.partial(step, ours), "torch SDPA": functools.partial(step, sdpa)}
        yield Comparison("attention_training", case, dtype, functions)


def decode(dtype: str) -> Iterator[Comparison]:
    """One token over a long cache, as a share of the memory read in the same rounds."""
    import torch

    import tilewise.torch as twt

    for case in cases.DECODE:
        query, key, value = _tensors(case, dtype)
        functions: dict[str, Callable[[], Any]] = {}
        if case.page:
            count = case.keys // case.page
            place = torch.randperm(count)
            paged = []
            for tensor in (key, value):
                pages = torch.empty(count, case.page, case.key_heads, case.head_dim, dtype=query.dtype)
                pages[place] = tensor[0].transpose(0, 1).reshape(count, case.page, case.key_heads, case.head_dim)
                paged.append(pages)
            q, lengths, table = query.transpose(1, 2), torch.tensor([case.keys], dtype=torch.int32), place.int()[None]

            def ours(q: Any = q, p: Any = paged, n: Any = lengths, t: Any = table) -> Any:
                return twt.flash_attn_with_kvcache(q, *p, cache_seqlens=n, block_table=t).transpose(1, 2)
        else:

            def ours(q: Any = query, k: Any = key, v: Any = value) -> Any:
                return twt.attention(q, k, v)

        def sdpa(q: Any = query, k: Any = key, v: Any = value) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        functions[OURS] = ours
        functions["torch SDPA, contiguous"] = sdpa
        yield Comparison("decode", case, dtype, functions, case.bytes_read(query.element_size()))


def rules(rule: str, heads: int, length: int) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """The mask and the score function of a :class:`benches.cases.Flex`."""
    import torch

    document = torch.arange(length) // 512
    slopes = 2.0 ** (-8.0 * (torch.arange(heads) + 1.0) / heads)
    masks: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= 256),
        "documents": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
    }
    scores: dict[str, Callable[..., Any]] = {
        "alibi": lambda score, b, h, q, k: score + slopes[h] * (k - q),
        "softcap": lambda score, b, h, q, k: 20 * torch.tanh(score / 20),
    }
    return masks.get(rule), scores.get(rule)


def flex(dtype: str) -> Iterator[Comparison]:
    """Ours and torch's flex_attention, compiled, forward (on a CPU it has no backward)."""
    import torch
    from torch.nn.attention import flex_attention as peer

    import tilewise.torch as twt

    for case in cases.FLEX:
        torch._dynamo.reset()  # a new function is a new compilation, of which dynamo allows eight
        torch.manual_seed(0)
        shape = (1, case.heads, case.length, case.head_dim)
        query, key, value = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(3))
        mask, score = rules(case.rule, case.heads, case.length)
        blocks = peer_blocks = None
        if mask is not None:
            blocks = twt.create_block_mask(mask, None, None, case.length, case.length, device="cpu")
            peer_blocks = peer.create_block_mask(mask, None, None, case.length, case.length, device="cpu")
        compiled = torch.compile(peer.flex_attention, dynamic=False)

        def ours(q: Any = query, k: Any = key, v: Any = value, s: Any = score, b: Any = blocks) -> Any:
            return twt.flex_attention(q, k, v, score_mod=s, block_mask=b)

        def theirs(
            q: Any = query, k: Any = key, v: Any = value, s: Any = score, b: Any = peer_blocks, f: Any = compiled
        ) -> Any:
            return f(q, k, v, score_mod=s, block_mask=b)

        yield Comparison("flex", case, dtype, {OURS: ours, "flex_attention, compiled": theirs})
