"""Attention as two torch operators, forward and backward, which every front of this package calls.

Between the passes autograd keeps query, key, value, the result and its LSE, and what the rules read (masks, sinks,
captured arrays): memory is linear in the sequence lengths. The probabilities are computed again.

``attend`` is the one call; its keywords are the fields of :class:`tilewise.attention.rules.Rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise import _core
from tilewise.attention.programs import Program
from tilewise.attention.rules import Rules
from tilewise.errors import ArgumentError, DeviceError, ShapeError, UnsupportedError
from tilewise.torch._library import autocast_dtype, define, differentiate, refuse_device

__all__ = ["attend", "random_seed", "rules_of"]

# What an operator takes after query, key and value: optional tensors, tensor lists, then the rest; all are fields of
# Rules but the seed, which is a tensor so that drawing one does not break a graph.
_TENSORS = (
    "mask", "sinks", "block_indices", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "sequences", "block_table", "seed",
)  # fmt: skip
_LISTS = ("score_captures", "mask_captures")
_OPTIONS = {
    "score_mod": "str?", "mask_mod": "str?", "scale": "float", "causal": "bool", "left": "SymInt?", "right": "SymInt?",
    "block_size": "int", "query_block": "int", "key_block": "int", "dropout": "float", "splits": "int",
    "threshold": "float",
}  # fmt: skip
_FIELDS = (*_TENSORS, *_LISTS, *_OPTIONS)
_ARGUMENTS = ", ".join(
    (
        *(f"Tensor? {name}" for name in _TENSORS),
        *(f"Tensor[] {name}" for name in _LISTS),
        *(f"{kind} {name}" for name, kind in _OPTIONS.items()),
    )
)


def rules_of(arguments: Sequence[Any]) -> Rules:
    """The rules in an operator's arguments after query, key and value; tensors detached."""
    fields = dict(zip(_FIELDS, arguments, strict=True))
    for name in _TENSORS:
        if fields[name] is not None:
            fields[name] = fields[name].detach()
    for name in _LISTS:
        fields[name] = [capture.detach() for capture in fields[name]]
    seed = fields["seed"]
    fields["seed"] = 0 if seed is None else int(seed) % 2**64  # the bits of an int64
    return Rules(**fields)


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # [batch, queries, heads, dim] in memory: what the output projection of a model reads without a copy.
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((batch, heads, queries), dtype=_accumulator(query))


def _covers(rules: Rules, column: int, rows: Tensor) -> bool:
    """Whether sequences (which share nothing) hold every row: a fill would be lost, and keeps OpenMP's threads spinning
    beside ours."""
    return rules.sequences is None or int(rules.sequences[:, column].sum()) == rows.shape[0] * rows.shape[2]


def _kernel(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rules = rules_of(rest)
    out, lse = _outputs(query, value)
    if not _covers(rules, 2, query):  # rows between the sequences are nobody's
        out.zero_()
        lse.fill_(-torch.inf)
    _core.attention_forward(query.detach(), key.detach(), value.detach(), out, lse, rules)
    return out, lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query, value)


_forward = define(
    "attention",
    f"(Tensor query, Tensor key, Tensor value, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    cuda=("tilewise.cuda.attention.operators", "forward_operator"),
)


def _like(tensor: Tensor) -> Tensor:
    """Memory for a gradient in the order of the tensor's own axes, if that leaves the last one contiguous."""
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def _gradients(query: Tensor, key: Tensor, value: Tensor, rest: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor]:
    """One tensor for query, key, value, sinks and each capture of the score program; empty where not wanted."""
    fields = dict(zip(_FIELDS, rest, strict=True))
    made = [_like(tensor) if want else tensor.new_empty(0) for tensor, want in zip((query, key, value), wanted)]
    for tensor, want in zip((fields["sinks"], *fields["score_captures"]), wanted[3:], strict=True):
        made.append(query.new_empty(tensor.shape if want else (0,), dtype=_accumulator(query)))
    return made


def _backward_kernel(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    *arguments, wanted = rest
    rules = rules_of(arguments)
    made = _gradients(query, key, value, arguments, wanted)
    for gradient, rows, column in zip(made[:3], (query, key, value), (2, 5, 5), strict=True):
        if not _covers(rules, column, rows):
            gradient.zero_()
    grad_query, grad_key, grad_value, grad_sinks, *captures = (
        gradient if want else None for gradient, want in zip(made, wanted, strict=True)
    )
    _core.attention_backward(
        query.detach(), key.detach(), value.detach(), out.detach(), lse.detach(), grad_out.detach(),
        None if grad_lse is None else grad_lse.detach(), grad_query, grad_key, grad_value, grad_sinks, captures, rules,
    )  # fmt: skip
    return made


def _backward_fake(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    *arguments, wanted = rest
    return _gradients(query, key, value, arguments, wanted)


_backward = define(
    "attention_backward",
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    f"{_ARGUMENTS}, bool[] wanted) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    cuda=("tilewise.cuda.attention.operators", "backward_operator"),
)

_FIRST_LIST = 3 + len(_TENSORS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors, lists = inputs[:_FIRST_LIST], inputs[_FIRST_LIST : _FIRST_LIST + len(_LISTS)]
    ctx.options = inputs[_FIRST_LIST + len(_LISTS) :]
    ctx.counts = [len(captures) for captures in lists]
    ctx.save_for_backward(*tensors, *(capture for captures in lists for capture in captures), *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, out, lse = saved[:_FIRST_LIST], saved[-2], saved[-1]
    query, key, value, *optional = tensors
    fields = dict(zip(_TENSORS, optional, strict=True))
    scores, masks = ctx.counts
    captures = saved[_FIRST_LIST : _FIRST_LIST + scores]
    of_masks = saved[_FIRST_LIST + scores : _FIRST_LIST + scores + masks]
    needs = ctx.needs_input_grad
    of_captures = needs[_FIRST_LIST] if scores else []
    wanted = [*needs[:3], needs[3 + _TENSORS.index("sinks")], *of_captures]
    results: list[Any] = [None] * _FIRST_LIST + [[None] * scores, [None] * masks] + [None] * len(_OPTIONS)
    if (grad_out is None and grad_lse is None) or not any(wanted):
        return tuple(results)
    if fields["block_table"] is not None:
        raise UnsupportedError(
            "attention: keys in pages have no gradient; gather them (key[block_table]) to differentiate, or use "
            "torch.no_grad()"
        )
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    made = _backward(
        query, key, value, out, lse, grad_out, grad_lse, *optional, list(captures), list(of_masks), *ctx.options, wanted
    )
    for at in range(3):
        results[at] = made[at] if wanted[at] else None
    if wanted[3]:
        results[3 + _TENSORS.index("sinks")] = made[3].to(fields["sinks"].dtype)
    results[_FIRST_LIST] = [
        gradient.to(capture.dtype) if want else None
        for gradient, capture, want in zip(made[4:], captures, of_captures, strict=True)
    ]
    return tuple(results)


differentiate("attention", _setup, _differentiate, operator="attention_backward")


def random_seed(dropout: float) -> Tensor | None:
    """A fresh seed from torch's default generator (so ``torch.manual_seed`` and checkpointing fix it), if it is needed.

    Raises:
        ArgumentError: a probability outside 0 to 1.
    """
    if not 0.0 <= dropout <= 1.0:
        raise ArgumentError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64) if dropout > 0 else None


def _captured(program: Program) -> list[Tensor]:
    """Captures as the core reads them: small integers, which programs may capture too, become int64."""
    small = (torch.int8, torch.int16, torch.uint8)
    return [x.long() if x.dtype in small else x for x in program.captures]


def _check_together(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise DeviceError(
                f"{name}: expected a tensor on {device} as query, got {tensor.device}; use x.to(query.device)"
            )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    score: Program | None = None,
    keep: Program | None = None,
    threshold: float = 8.0,
    **fields: Any,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of one call of the operator.

    Args:
        query, key, value: ``[batch, heads, length, dim]`` (pages: ``[pages, heads, page_size, dim]``).
        scale: ``head_dim ** -0.5`` if None.
        score, keep: the score and the mask program, with what they captured.
        threshold: see Rules.
        fields: other fields of :class:`~tilewise.attention.rules.Rules`; the seed as a tensor.

    Raises:
        ShapeError: not of rank 4. DeviceError: on a device that no kernel of this build takes, or on several.
        UnsupportedError: a captured tensor of the mask program that requires a gradient.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name}: expected rank 4 [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
    score, keep = score or Program("", ()), keep or Program("", ())
    for number, capture in enumerate(keep.captures):
        if capture.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"mask_mod: captured tensor {number} requires a gradient, and a mask has none; detach it, or write the "
                "rule as a score_mod"
            )
    optional: dict[str, Any] = {name: fields.get(name) for name in _TENSORS[:-1]}
    refuse_device(cuda=True, query=query, key=key, value=value, **optional)
    _check_together(query.device, key=key, value=value, **optional)
    for kind, program in (("score_mod", score), ("mask_mod", keep)):
        _check_together(query.device, **{f"{kind} capture {at}": x for at, x in enumerate(program.captures)})
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:  # as torch does, double precision is left alone
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    defaults: dict[str, Any] = {
        "causal": False,
        "block_size": 0,
        "query_block": 0,
        "key_block": 0,
        "dropout": 0.0,
        "splits": 0,
    }
    fields = defaults | fields
    fields |= {"score_mod": score.text or None, "mask_mod": keep.text or None, "threshold": threshold}
    fields |= {"score_captures": _captured(score), "mask_captures": _captured(keep)}
    head_dim = query.shape[3]
    fields["scale"] = float(scale) if scale is not None else head_dim**-0.5 if head_dim else 0.0
    unknown = fields.keys() - set(_FIELDS)
    if unknown:
        raise TypeError(f"attend: no such field of Rules: {', '.join(sorted(unknown))}")
    return _forward(query, key, value, *(fields.get(name) for name in _FIELDS))
