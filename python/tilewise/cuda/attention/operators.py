"""The room's functions with the positional arguments of torch's operators ``tilewise::attention*``.

:mod:`tilewise.torch` registers them for CUDA tensors; nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tilewise.attention.rules import Rules
from tilewise.cuda.attention.passes import backward, forward

__all__ = ["FIELDS", "backward_operator", "forward_operator"]

#: The operators' arguments after query, key and value, in the order of their schema; all are fields of Rules.
FIELDS = (
    "mask", "sinks", "block_indices", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "sequences", "block_table", "seed", "score_captures", "mask_captures", "score_mod", "mask_mod", "scale", "causal",
    "left", "right", "block_size", "query_block", "key_block", "dropout", "splits", "threshold",
)  # fmt: skip


def _rules(arguments: Sequence[Any]) -> Rules:
    fields = dict(zip(FIELDS, arguments, strict=True))
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = [tensor.detach() for tensor in value]
        elif hasattr(value, "detach"):
            fields[name] = value.detach()
    # The seed is a tensor on the host: reading it waits for nothing.
    fields["seed"] = 0 if fields["seed"] is None else int(fields["seed"])
    return Rules(**fields)


def forward_operator(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
    """``tilewise::attention``: the result, ``[batch, queries, heads, dim]`` in memory, and its LSE."""
    torch = sys.modules["torch"]
    rules = _rules(rest)
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if rules.sequences is not None:  # rows between the sequences are nobody's
        out.zero_()
        lse.fill_(-torch.inf)
    forward(query.detach(), key.detach(), value.detach(), out, lse, rules)
    return out, lse


def _like(tensor: Any) -> Any:
    """Memory for a gradient in the order of the tensor's own axes, if that leaves the last one contiguous."""
    made = sys.modules["torch"].empty_like(tensor)
    return made if made.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def backward_operator(
    query: Any, key: Any, value: Any, out: Any, lse: Any, grad_out: Any, grad_lse: Any, *rest: Any
) -> list[Any]:
    """``tilewise::attention_backward``: a tensor for query, key, value, sinks and each capture of the score program.

    Those not wanted are empty. ``rest``: the arguments of the forward operator after value, then ``wanted``, a flag for
    each of those tensors.
    """
    torch = sys.modules["torch"]
    *arguments, wanted = rest
    rules = _rules(arguments)
    made = [
        _like(tensor) if want else tensor.new_empty(0)
        for tensor, want in zip((query, key, value), wanted[:3], strict=True)
    ]
    if rules.sequences is not None:
        for gradient in made:
            gradient.zero_()
    for tensor, want in zip((rules.sinks, *rules.score_captures), wanted[3:], strict=True):
        made.append(query.new_empty(tensor.shape if want else (0,), dtype=torch.float32))
    grad_query, grad_key, grad_value, grad_sinks, *captures = (
        gradient if want else None for gradient, want in zip(made, wanted, strict=True)
    )
    backward(
        query.detach(), key.detach(), value.detach(), out.detach(), lse.detach(), grad_out.detach(),
        None if grad_lse is None else grad_lse.detach(), grad_query, grad_key, grad_value, grad_sinks, captures, rules,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return made
