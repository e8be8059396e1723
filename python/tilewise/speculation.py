"""Exact speculative sampling: drafted tokens are verified so that what leaves is distributed as plain sampling's.

The target model's law at a position is p: its logits after temperature, top-k and top-p. A drafted token x came from
a law q. It is kept with probability ``min(1, p(x) / q(x))``; after the first refusal one token is drawn from
``max(p - q, 0)``, renormalised; after a chain without refusal one is drawn from the next p.

Random numbers are not consumed from a generator. Each is a function of ``(seed, request, position, purpose)``:

* ``seed``: one per run, in [0, 2^63);
* ``requests``: ``[B]``, the name of each row's sequence, in [0, 2^32). Two rows of the same name draw the same numbers;
* ``positions``: ``[B]``, the index in its sequence of the *next* token of each row (of the first drafted one in
  :func:`verify`), counted from 0 at the start of the prompt or of the generation, as long as it is always the same.

So a sequence's tokens depend neither on the row it has in a batch, nor on what else is in the batch. Pass the true
position in every round: a position must never be decided twice for one seed and request.

Per-row settings (`temperature`, `top_k`, `top_p`, `positions`) are numbers, for all rows, or ``[B]`` arrays.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023); Chen et al.,
"Accelerating large language model decoding with speculative sampling" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tilewise import _core
from tilewise._arrays import is_torch, like, native
from tilewise.errors import ArgumentError, DeviceError, DtypeError, ShapeError

__all__ = [
    "Drafted",
    "Verification",
    "VerificationLaw",
    "draft_token",
    "process",
    "sample",
    "sample_target",
    "verification_law",
    "verify",
]


@dataclass(frozen=True)
class Verification:
    """What a round decided.

    Attributes:
        accepted: int32 ``[B]``, how many drafted tokens of each row are kept.
        tokens: int64 ``[B]``, the token that follows them: the row emits ``accepted + 1`` tokens.
    """

    accepted: Any
    tokens: Any


@dataclass(frozen=True)
class VerificationLaw:
    """What a round draws from.

    Attributes:
        acceptance: float64 ``[B, K]``, the probability of accepting token i, given that all before it were accepted.
        corrections: float64 ``[B, K + 1, V]``, the law of the token that follows i accepted ones. Both are 0 beyond a
            row's length.
    """

    acceptance: Any
    corrections: Any


@dataclass(frozen=True)
class Drafted:
    """Drafted tokens and where they came from.

    Attributes:
        tokens: int64 ``[B]``.
        laws: ``[B, V]``, exactly the law each token was drawn from.
    """

    tokens: Any
    laws: Any


def process(logits: Any, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0) -> Any:
    """The law that is sampled from logits: temperature, then top-k, then top-p, then a softmax, in float64.

    Args:
        logits: ``[V]``, ``[B, V]`` or ``[B, N, V]``, float32, float64, float16 or bfloat16; -inf masks a token, tokens
            at +inf share everything.
        temperature: at least 0; 0 puts everything on the largest logit (ties: the lowest id).
        top_k: keep the tokens whose logit is at least the k-th largest (ties with it stay); 0 or None keeps all.
        top_p: in (0, 1]: keep the most probable tokens up to the one that makes their mass reach p (ties: lower ids
            first); 1 keeps all.

    Returns:
        float64 probabilities of the shape and kind of `logits`.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument.
        ArgumentError: a setting outside its range, NaN logits, a row whose tokens are all masked.

    Order and sets are those of transformers' `TemperatureLogitsWarper`, `TopKLogitsWarper` and `TopPLogitsWarper`,
    except that they compute in the logits' own precision and leave ties at the edge of the nucleus to an unstable sort.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import process
        >>> process(np.log([0.5, 0.25, 0.125, 0.125]), top_p=0.75).round(3)
        array([0.667, 0.333, 0.   , 0.   ])
    """
    array = native("logits", logits)
    shape = tuple(array.shape)
    if not 1 <= len(shape) <= 3:
        raise ShapeError(f"logits: expected [V], [B, V] or [B, N, V], got shape {shape}")
    batch = (1, 1, *shape) if len(shape) == 1 else (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    deep = array[None, None] if len(shape) == 1 else array[:, None] if len(shape) == 2 else array
    out, result = like(logits, shape, "float64")
    _core.speculation_process(deep, *_rules(temperature, top_k, top_p, batch[0]), out.reshape(batch))
    return result


def sample(
    probabilities: Any,
    *,
    seed: int,
    requests: Any,
    positions: Any,
    purpose: Literal["draft", "accept", "residual", "target", "other"] = "target",
) -> Any:
    """One token per row of given laws. A token of probability zero is never drawn.

    Args:
        probabilities: ``[B, V]``, float32 or float64; rows add up to 1 within 1e-4 and are divided by their sum.
        seed, requests, positions: the random numbers (see the module).
        purpose: what they are for; numbers of different purposes are independent.

    Returns:
        int64 ``[B]``, of the kind of `probabilities`.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument.
        ArgumentError: rows that are not laws, a seed, request or position outside its range.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import sample
        >>> sample(np.array([[0.0, 1.0], [1.0, 0.0]]), seed=0, requests=[0, 1], positions=0)
        array([1, 0])
    """
    laws = native("probabilities", probabilities)
    rows = _rank("probabilities", laws, ("B", "V"))[0]
    out, result = like(probabilities, (rows,), "int64")
    _core.speculation_sample_laws(laws, _seed(seed), *_streams(requests, positions, rows), purpose, out)
    return result


def sample_target(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: int,
    requests: Any,
    positions: Any,
) -> Any:
    """Plain sampling: one token per row of logits, by the numbers that :func:`verify` uses for a bonus token.

    Args:
        logits: ``[B, V]``.
        temperature, top_k, top_p: as in :func:`process`.
        seed, requests, positions: the random numbers (see the module).

    Returns:
        int64 ``[B]``, of the kind of `logits`.

    Raises:
        As :func:`process` and :func:`sample`.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import sample_target
        >>> sample_target(np.array([[0.0, 3.0, 1.0]]), temperature=0.0, seed=0, requests=0, positions=7)
        array([1])
    """
    array = native("logits", logits)
    rows = _rank("logits", array, ("B", "V"))[0]
    out, result = like(logits, (rows,), "int64")
    rules, streams = _rules(temperature, top_k, top_p, rows), _streams(requests, positions, rows)
    _core.speculation_sample_logits(array, *rules, _seed(seed), *streams, "target", out)
    return result


def draft_token(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: int,
    requests: Any,
    positions: Any,
    laws_dtype: Literal["float64", "float32"] = "float64",
) -> Drafted:
    """One drafted token per row, with the law it was drawn from, to the last bit.

    In float32 the law is rounded first and the token drawn from the rounded law, so :func:`verify` stays exact.

    Args:
        logits: ``[B, V]`` of the draft model.
        temperature, top_k, top_p: as in :func:`process`; they need not be the target's.
        seed, requests, positions: the random numbers (see the module).
        laws_dtype: ``"float64"``, or ``"float32"`` for half the memory.

    Returns:
        :class:`Drafted`, of the kind of `logits`.

    Raises:
        As :func:`process` and :func:`sample`.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import draft_token
        >>> drafted = draft_token(np.zeros((1, 4)), top_k=1, temperature=0.0, seed=0, requests=0, positions=3)
        >>> drafted.tokens, drafted.laws
        (array([0]), array([[1., 0., 0., 0.]]))
    """
    if laws_dtype not in ("float64", "float32"):
        raise ArgumentError(f"laws_dtype: expected 'float64' or 'float32', got {laws_dtype!r}")
    array = native("logits", logits)
    rows, vocabulary = _rank("logits", array, ("B", "V"))
    out, tokens = like(logits, (rows,), "int64")
    laws_out, laws = like(logits, (rows, vocabulary), laws_dtype)
    rules, streams = _rules(temperature, top_k, top_p, rows), _streams(requests, positions, rows)
    _core.speculation_sample_logits(array, *rules, _seed(seed), *streams, "draft", out, laws_out)
    return Drafted(tokens, laws)


def verify(
    draft_tokens: Any,
    draft_laws: Any,
    logits: Any,
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
    """One round of speculative sampling for every row: how many drafted tokens stay, and the token that follows.

    Rows at temperature 0 are greedy: a token is kept iff it is the target's largest logit.

    Args:
        draft_tokens: ``[B, K]``, int32 or int64.
        draft_laws: ``[B, K, V]``, float32 or float64: the law each token was drawn from (:func:`draft_token`); rows add
            up to 1 within 1e-4 and are divided by their sum. None: the drafts are no random draws but a function of the
            prefix (n-grams, a greedy draft), that is, point masses.
        logits: ``[B, K + 1, V]`` of the target: ``logits[:, i]`` is for the place of ``draft_tokens[:, i]``.
        temperature, top_k, top_p: of the target, as in :func:`process`.
        draft_lengths: ``[B]``, how many of a row's K tokens are drafted; what lies beyond is not read. None: all.
        seed, requests, positions: the random numbers (see the module); `positions` are those of ``draft_tokens[:, 0]``.
        strict: check every position (otherwise only those up to the first refusal), and refuse a drafted token that its
            law gives probability zero (otherwise it is kept wherever the target can emit it).

    Returns:
        :class:`Verification`, of the kind of `logits`.

    Raises:
        ShapeError: wrong ranks, or batches, lengths or vocabularies that differ.
        DtypeError, DeviceError: the message names the argument.
        ArgumentError: a setting outside its range; NaN logits; draft ids outside the vocabulary; laws that are none.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import verify
        >>> logits = np.array([[[0.0, 9.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
        >>> verify(np.array([[1, 2]]), None, logits, temperature=0.0, seed=0, requests=0, positions=4)
        Verification(accepted=array([1], dtype=int32), tokens=array([0]))
    """
    drafted, array, rows = _chains(draft_tokens, logits)
    laws = None if draft_laws is None else native("draft_laws", draft_laws)
    accepted_out, accepted = like(logits, (rows,), "int32")
    tokens_out, tokens = like(logits, (rows,), "int64")
    _core.speculation_verify(
        drafted,
        None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        array,
        *_rules(temperature, top_k, top_p, rows),
        bool(strict),
        _seed(seed),
        *_streams(requests, positions, rows),
        accepted_out,
        tokens_out,
    )
    return Verification(accepted, tokens)


def verification_law(
    draft_tokens: Any,
    draft_laws: Any,
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    draft_lengths: Any = None,
    strict: bool = True,
) -> VerificationLaw:
    """The probabilities and laws that :func:`verify` draws from, computed by the same code: for proofs by enumeration.

    Args:
        draft_tokens, draft_laws, logits, temperature, top_k, top_p, draft_lengths, strict: as in :func:`verify`.

    Returns:
        :class:`VerificationLaw`, of the kind of `logits`.

    Raises:
        As :func:`verify`.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import verification_law
        >>> law = verification_law(np.array([[0]]), None, np.log([[[0.25, 0.75], [0.5, 0.5]]]))
        >>> law.acceptance, law.corrections
        (array([[0.25]]), array([[[0. , 1. ],
                [0.5, 0.5]]]))
    """
    drafted, array, rows = _chains(draft_tokens, logits)
    laws = None if draft_laws is None else native("draft_laws", draft_laws)
    acceptance_out, acceptance = like(logits, tuple(drafted.shape), "float64")
    corrections_out, corrections = like(logits, tuple(array.shape), "float64")
    _core.speculation_law(
        drafted,
        None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        array,
        *_rules(temperature, top_k, top_p, rows),
        bool(strict),
        acceptance_out,
        corrections_out,
    )
    return VerificationLaw(acceptance, corrections)


def _rank(name: str, array: Any, axes: tuple[str, ...]) -> tuple[int, ...]:
    if len(array.shape) != len(axes):
        raise ShapeError(f"{name}: expected rank {len(axes)} [{', '.join(axes)}], got shape {tuple(array.shape)}")
    return tuple(array.shape)


def _chains(draft_tokens: Any, logits: Any) -> tuple[Any, Any, int]:
    drafted, array = native("draft_tokens", draft_tokens), native("logits", logits)
    rows, _ = _rank("draft_tokens", drafted, ("B", "K"))
    _rank("logits", array, ("B", "K + 1", "V"))
    return drafted, array, rows


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise DtypeError(f"seed: expected an integer in [0, 2^63), got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: expected an integer in [0, 2^63), got {seed}")
    return int(seed)


def _per_row(name: str, value: Any, rows: int, dtype: Literal["float64", "int64"]) -> Any:
    """`value` as ``[rows]`` of `dtype`; numbers are repeated."""
    if is_torch(value):
        if value.device.type != "cpu":
            raise DeviceError(f"{name}: expected numbers on the CPU, got a torch tensor on {value.device}; use x.cpu()")
        value = value.detach().numpy()
    array = np.asarray(value)
    kinds = "iuf" if dtype == "float64" else "iu"
    if array.size and array.dtype.kind not in kinds:
        raise DtypeError(f"{name}: expected {'numbers' if 'f' in kinds else 'integers'}, got {array.dtype}")
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != rows):
        raise ShapeError(f"{name}: expected one number, or [B = {rows}], got shape {array.shape}")
    if dtype == "int64" and array.size and array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise ArgumentError(f"{name}: expected integers below 2^63, got {array.max()}")
    # A broadcast view would do; but rows are few, and a flat copy is what every reader understands.
    return np.ascontiguousarray(np.broadcast_to(array.astype(dtype), (rows,)))


def _rules(temperature: Any, top_k: Any, top_p: Any, rows: int) -> tuple[Any, Any, Any]:
    return (
        _per_row("temperature", temperature, rows, "float64"),
        _per_row("top_k", 0 if top_k is None else top_k, rows, "int64"),
        _per_row("top_p", 1.0 if top_p is None else top_p, rows, "float64"),
    )


def _streams(requests: Any, positions: Any, rows: int) -> tuple[Any, Any]:
    if rows > 1 and np.ndim(requests) == 0:
        raise ArgumentError(
            f"requests: expected [B = {rows}], a name for each row's sequence, got one number for all; "
            "rows of one name would draw the same numbers"
        )
    return _per_row("requests", requests, rows, "int64"), _per_row("positions", positions, rows, "int64")
