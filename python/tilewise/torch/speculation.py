"""Speculative sampling of torch tensors (see :mod:`tilewise.speculation`, whose names and meanings these are).

Drawing a token is not differentiable: the functions that return tokens detach their inputs, those that return laws
refuse inputs that require a gradient.

`accept`, `correct`, `predict_outcomes`, `token_probabilities` and `token_rank` are the functions of
:mod:`tilewise.speculation` themselves, which take and return tensors. They, and calls with :class:`SparseLaws` or with
`saguaro` or `support`, are no custom operators: `torch.compile` runs them outside its graphs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from tilewise import speculation
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tilewise.speculation import (
    Drafted,
    SparseLaws,
    Verification,
    VerificationLaw,
    accept,
    correct,
    predict_outcomes,
    token_probabilities,
    token_rank,
)
from tilewise.speculation._rows import per_row, seed_of
from tilewise.torch._library import define, refuse_device

__all__ = [
    "Drafted",
    "SparseLaws",
    "Verification",
    "VerificationLaw",
    "accept",
    "correct",
    "draft_token",
    "predict_outcomes",
    "process",
    "sample",
    "sample_target",
    "token_probabilities",
    "token_rank",
    "verification_law",
    "verify",
]

_RULES = "Tensor temperature, Tensor top_k, Tensor top_p"
_STREAMS = "int seed, Tensor requests, Tensor positions"
_LAWS = {"float64": torch.float64, "float32": torch.float32}


def _process_kernel(logits: Any, temperature: Any, top_k: Any, top_p: Any) -> torch.Tensor:
    return speculation.process(logits, temperature, top_k, top_p)


def _process_fake(logits: Any, temperature: Any, top_k: Any, top_p: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float64)


def _sample_kernel(probabilities: Any, seed: int, requests: Any, positions: Any, purpose: Any) -> torch.Tensor:
    return speculation.sample(probabilities, seed=seed, requests=requests, positions=positions, purpose=purpose)


def _sample_fake(probabilities: Any, seed: int, requests: Any, positions: Any, purpose: str) -> torch.Tensor:
    return probabilities.new_empty(probabilities.shape[:1], dtype=torch.int64)


def _sample_target_kernel(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: int, requests: Any, positions: Any
) -> torch.Tensor:
    rules = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return speculation.sample_target(logits, **rules, seed=seed, requests=requests, positions=positions)


def _sample_target_fake(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: int, requests: Any, positions: Any
) -> torch.Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _draft_token_kernel(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: int, requests: Any, positions: Any, laws_dtype: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rules = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    streams = {"seed": seed, "requests": requests, "positions": positions}
    drafted = speculation.draft_token(logits, **rules, **streams, laws_dtype=laws_dtype)
    return drafted.tokens, drafted.laws


def _draft_token_fake(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: int, requests: Any, positions: Any, laws_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    return tokens, logits.new_empty(logits.shape, dtype=_LAWS[laws_dtype])


def _verify_kernel(
    draft_tokens: Any,
    draft_laws: Any,
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    draft_lengths: Any,
    seed: int,
    requests: Any,
    positions: Any,
    strict: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = speculation.verify(
        draft_tokens,
        draft_laws,
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        draft_lengths=draft_lengths,
        seed=seed,
        requests=requests,
        positions=positions,
        strict=strict,
    )
    return result.accepted, result.tokens


def _verify_fake(draft_tokens: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = draft_tokens.shape[:1]
    return draft_tokens.new_empty(rows, dtype=torch.int32), draft_tokens.new_empty(rows, dtype=torch.int64)


def _law_kernel(
    draft_tokens: Any,
    draft_laws: Any,
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    draft_lengths: Any,
    strict: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = speculation.verification_law(
        draft_tokens,
        draft_laws,
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        draft_lengths=draft_lengths,
        strict=strict,
    )
    return result.acceptance, result.corrections


def _law_fake(draft_tokens: Any, draft_laws: Any, logits: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    acceptance = draft_tokens.new_empty(draft_tokens.shape, dtype=torch.float64)
    return acceptance, logits.new_empty(logits.shape, dtype=torch.float64)


_process = define("speculation_process", f"(Tensor logits, {_RULES}) -> Tensor", _process_kernel, _process_fake)
_sample = define(
    "speculation_sample", f"(Tensor probabilities, {_STREAMS}, str purpose) -> Tensor", _sample_kernel, _sample_fake
)
_sample_target = define(
    "speculation_sample_target",
    f"(Tensor logits, {_RULES}, {_STREAMS}) -> Tensor",
    _sample_target_kernel,
    _sample_target_fake,
)
_draft_token = define(
    "speculation_draft_token",
    f"(Tensor logits, {_RULES}, {_STREAMS}, str laws_dtype) -> (Tensor, Tensor)",
    _draft_token_kernel,
    _draft_token_fake,
)
_verify = define(
    "speculation_verify",
    f"(Tensor draft_tokens, Tensor? draft_laws, Tensor logits, {_RULES}, Tensor? draft_lengths, {_STREAMS}, "
    "bool strict) -> (Tensor, Tensor)",
    _verify_kernel,
    _verify_fake,
)
_law = define(
    "speculation_law",
    f"(Tensor draft_tokens, Tensor? draft_laws, Tensor logits, {_RULES}, Tensor? draft_lengths, bool strict)"
    " -> (Tensor, Tensor)",
    _law_kernel,
    _law_fake,
)


def process(logits: torch.Tensor, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0) -> torch.Tensor:
    """The law that is sampled from logits, float64; as :func:`tilewise.speculation.process`.

    Raises:
        UnsupportedError: logits that require a gradient.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import process
        >>> process(torch.zeros(2), top_k=1)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    refuse_device(logits=logits)
    _refuse_gradient("process", logits)
    if not 1 <= logits.dim() <= 3:
        raise ShapeError(f"logits: expected [V], [B, V] or [B, N, V], got shape {tuple(logits.shape)}")
    return _process(logits, *_rules(temperature, top_k, top_p, 1 if logits.dim() == 1 else logits.shape[0]))


def sample(
    probabilities: torch.Tensor,
    *,
    seed: int,
    requests: Any,
    positions: Any,
    purpose: Literal["draft", "accept", "residual", "target", "other"] = "target",
) -> torch.Tensor:
    """One token per row of given laws, int64 ``[B]``; as :func:`tilewise.speculation.sample`.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import sample
        >>> sample(torch.tensor([[0.0, 1.0]]), seed=0, requests=0, positions=0)
        tensor([1])
    """
    refuse_device(probabilities=probabilities)
    _rank("probabilities", probabilities, 2, "[B, V]")
    return _sample(
        probabilities.detach(), seed_of(seed), *_streams(requests, positions, probabilities.shape[0]), purpose
    )


def sample_target(
    logits: torch.Tensor,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: int,
    requests: Any,
    positions: Any,
) -> torch.Tensor:
    """Plain sampling, int64 ``[B]``; as :func:`tilewise.speculation.sample_target`.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import sample_target
        >>> sample_target(torch.tensor([[0.0, 3.0]]), temperature=0.0, seed=0, requests=0, positions=7)
        tensor([1])
    """
    refuse_device(logits=logits)
    _rank("logits", logits, 2, "[B, V]")
    rules = _rules(temperature, top_k, top_p, logits.shape[0])
    return _sample_target(logits.detach(), *rules, seed_of(seed), *_streams(requests, positions, logits.shape[0]))


def draft_token(
    logits: torch.Tensor,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: int,
    requests: Any,
    positions: Any,
    laws_dtype: Literal["float64", "float32"] = "float64",
    saguaro: Any = 1.0,
    fan_out: Any = 0,
    support: int | None = None,
) -> Drafted:
    """One drafted token per row with the law it was drawn from; as :func:`tilewise.speculation.draft_token`.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import draft_token
        >>> draft_token(torch.zeros(1, 2), temperature=0.0, seed=0, requests=0, positions=3).tokens
        tensor([0])
    """
    refuse_device(logits=logits)
    _rank("logits", logits, 2, "[B, V]")
    if support is not None or not (isinstance(saguaro, (int, float)) and saguaro == 1.0):
        rules = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "laws_dtype": laws_dtype}
        streams = {"seed": seed, "requests": requests, "positions": positions}
        return speculation.draft_token(logits, **rules, **streams, saguaro=saguaro, fan_out=fan_out, support=support)
    if laws_dtype not in _LAWS:
        raise ArgumentError(f"laws_dtype: expected 'float64' or 'float32', got {laws_dtype!r}")
    rules, streams = _rules(temperature, top_k, top_p, logits.shape[0]), _streams(requests, positions, logits.shape[0])
    return Drafted(*_draft_token(logits.detach(), *rules, seed_of(seed), *streams, laws_dtype))


def verify(
    draft_tokens: torch.Tensor,
    draft_laws: torch.Tensor | SparseLaws | None,
    logits: torch.Tensor,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    draft_lengths: Any = None,
    seed: int,
    requests: Any,
    positions: Any,
    strict: bool = True,
) -> Verification:
    """One round of speculative sampling for every row; as :func:`tilewise.speculation.verify`.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import verify
        >>> logits = torch.tensor([[[0.0, 9.0], [5.0, 0.0]]])
        >>> verify(torch.tensor([[1]]), None, logits, temperature=0.0, seed=0, requests=0, positions=4)
        Verification(accepted=tensor([1], dtype=torch.int32), tokens=tensor([0]))
    """
    if isinstance(draft_laws, SparseLaws):
        return speculation.verify(
            draft_tokens, draft_laws, logits, temperature=temperature, top_k=top_k, top_p=top_p,
            draft_lengths=draft_lengths, seed=seed, requests=requests, positions=positions, strict=strict,
        )  # fmt: skip
    refuse_device(draft_tokens=draft_tokens, draft_laws=draft_laws, logits=logits)
    rows = _chains(draft_tokens, logits)
    return Verification(
        *_verify(
            draft_tokens,
            None if draft_laws is None else draft_laws.detach(),
            logits.detach(),
            *_rules(temperature, top_k, top_p, rows),
            None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, torch.int64),
            seed_of(seed),
            *_streams(requests, positions, rows),
            strict,
        )
    )


def verification_law(
    draft_tokens: torch.Tensor,
    draft_laws: torch.Tensor | SparseLaws | None,
    logits: torch.Tensor,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    draft_lengths: Any = None,
    strict: bool = True,
) -> VerificationLaw:
    """The probabilities and laws that :func:`verify` draws from; as :func:`tilewise.speculation.verification_law`.

    Raises:
        UnsupportedError: logits or laws that require a gradient.

    Example:
        >>> import torch
        >>> from tilewise.torch.speculation import verification_law
        >>> verification_law(torch.tensor([[0]]), None, torch.zeros(1, 2, 4)).acceptance
        tensor([[0.2500]], dtype=torch.float64)
    """
    if isinstance(draft_laws, SparseLaws):
        _refuse_gradient("verification_law", logits, draft_laws.probabilities)
        return speculation.verification_law(
            draft_tokens, draft_laws, logits, temperature=temperature, top_k=top_k, top_p=top_p,
            draft_lengths=draft_lengths, strict=strict,
        )  # fmt: skip
    refuse_device(draft_tokens=draft_tokens, draft_laws=draft_laws, logits=logits)
    _refuse_gradient("verification_law", logits, draft_laws)
    rows = _chains(draft_tokens, logits)
    lengths = None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, torch.int64)
    return VerificationLaw(
        *_law(draft_tokens, draft_laws, logits, *_rules(temperature, top_k, top_p, rows), lengths, strict)
    )


def _rank(name: str, tensor: torch.Tensor, rank: int, axes: str) -> None:
    if tensor.dim() != rank:
        raise ShapeError(f"{name}: expected rank {rank} {axes}, got shape {tuple(tensor.shape)}")


def _chains(draft_tokens: torch.Tensor, logits: torch.Tensor) -> int:
    _rank("draft_tokens", draft_tokens, 2, "[B, K]")
    _rank("logits", logits, 3, "[B, K + 1, V]")
    return draft_tokens.shape[0]


def _refuse_gradient(name: str, *tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(f"{name}: a sampling law has no gradient here; pass x.detach() or use torch.no_grad()")


def _per_row(name: str, value: Any, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """`value` as ``[rows]`` of `dtype`; numbers are repeated."""
    integral = dtype == torch.int64
    if isinstance(value, torch.Tensor):
        refuse_device(cuda=False, **{name: value})
        if value.dtype == torch.bool or value.is_complex() or (integral and value.is_floating_point()):
            raise DtypeError(f"{name}: expected {'integers' if integral else 'numbers'}, got {value.dtype}")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
            raise ShapeError(f"{name}: expected one number, or [B = {rows}], got shape {tuple(value.shape)}")
        return value.detach().to(dtype).expand(rows)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not (integral and isinstance(value, float)):
        return torch.full((rows,), value, dtype=dtype)
    array = per_row(name, value, rows, "int64" if integral else "float64")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _rules(temperature: Any, top_k: Any, top_p: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _per_row("temperature", temperature, rows, torch.float64),
        _per_row("top_k", 0 if top_k is None else top_k, rows, torch.int64),
        _per_row("top_p", 1.0 if top_p is None else top_p, rows, torch.float64),
    )


def _streams(requests: Any, positions: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    one = requests.dim() == 0 if isinstance(requests, torch.Tensor) else isinstance(requests, (int, float))
    if one and rows > 1:
        raise ArgumentError(
            f"requests: expected [B = {rows}], a name for each row's sequence, got one number for all; "
            "rows of one name would draw the same numbers"
        )
    return _per_row("requests", requests, rows, torch.int64), _per_row("positions", positions, rows, torch.int64)
