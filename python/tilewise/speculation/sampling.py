"""Laws, draws, and the exact verification of drafted chains: one round at a time, all rows of a batch at once.

The random numbers (`seed`, `requests`, `positions`) are those that :mod:`tilewise.speculation` explains. Per-row
settings (`temperature`, `top_k`, `top_p`, `positions`) are numbers, for all rows, or ``[B]`` arrays.
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
    "SparseLaws",
    "Verification",
    "VerificationLaw",
    "accept",
    "correct",
    "draft_token",
    "process",
    "sample",
    "sample_target",
    "token_probabilities",
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
class SparseLaws:
    """Laws of a few tokens each, which is all that needs to cross from a draft to its target.

    Attributes:
        ids: ``[..., m]``, int32 or int64: ascending, without duplicates, -1 where a law has fewer than m tokens.
        probabilities: ``[..., m]``, float32 or float64, 0 beside -1. Rows add up to 1 within 1e-4 and are divided by
            their sum. All other tokens have probability 0.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import SparseLaws, verify
        >>> laws = SparseLaws(np.array([[[0, 2]]]), np.array([[[0.25, 0.75]]]))
        >>> verify(np.array([[2]]), laws, np.zeros((1, 2, 3)), seed=0, requests=0, positions=3).accepted
        array([1], dtype=int32)
    """

    ids: Any
    probabilities: Any


@dataclass(frozen=True)
class Drafted:
    """Drafted tokens and where they came from.

    Attributes:
        tokens: int64 ``[B]``.
        laws: ``[B, V]``, or :class:`SparseLaws` ``[B, m]``: exactly the law each token was drawn from.
    """

    tokens: Any
    laws: Any


def process(logits: Any, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0) -> Any:
    """The law that is sampled from logits: temperature, then top-k, then top-p, then a softmax, in float64.

    Args:
        logits: ``[V]``, ``[B, V]`` or ``[B, N, V]``, float32, float64, float16 or bfloat16; -inf masks a token,
            tokens at +inf share everything.
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
    except that those compute in the logits' own precision and leave ties at the edge of the nucleus to an unstable
    sort.

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
    out, result = like(logits, shape, "float64")
    if len(shape) == 1:
        array, out, rows = array[None], out[None], 1
    else:
        rows = shape[0]
    _core.speculation_process(array, *_rules(temperature, top_k, top_p, rows), out)
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
    saguaro: Any = 1.0,
    fan_out: Any = 0,
    support: int | None = None,
) -> Drafted:
    """One drafted token per row, with the law it was drawn from, to the last bit.

    The law is what is left of the logits after temperature, top-k and top-p, then reweighed (`saguaro`), then cut
    (`support`), then rounded to `laws_dtype`; only then is the token drawn. So whatever was done to it, the returned
    law is the one that the token has, and :func:`verify` stays exact. (It stays so only with this law: one that is
    rounded later, say to bfloat16 on the way to another process, is not what was sampled.)

    Args:
        logits: ``[B, V]`` of the draft model.
        temperature, top_k, top_p: as in :func:`process`; they need not be the target's.
        seed, requests, positions: the random numbers (see the module).
        laws_dtype: ``"float64"``, or ``"float32"`` for half the memory.
        saguaro: a number in [0, 1], or ``[B]``: the `fan_out` most probable tokens (ties: lower ids) are drawn with
            this times their weight, so that corrections fall on them, where an outcome cache expects them. 1: no
            change. Rows at temperature 0 are left alone, and so are laws of which nothing would be left.
        fan_out: how many tokens `saguaro` applies to, a number or ``[B]``.
        support: keep the `support` most probable tokens (ties: lower ids) and return :class:`SparseLaws`. None: all.

    Returns:
        :class:`Drafted`, of the kind of `logits`.

    Raises:
        As :func:`process` and :func:`sample`; ArgumentError: `saguaro` outside [0, 1], `support` below 1.

    Source of `saguaro`: Kumar, Dao, May, "Speculative Speculative Decoding" (2026), Definition 14.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import draft_token
        >>> drafted = draft_token(np.zeros((1, 4)), top_k=1, temperature=0.0, seed=0, requests=0, positions=3)
        >>> drafted.tokens, drafted.laws
        (array([0]), array([[1., 0., 0., 0.]]))
        >>> logits = np.log([[0.5, 0.25, 0.125, 0.125]])
        >>> draft_token(logits, saguaro=0.5, fan_out=1, seed=0, requests=0, positions=3).laws.round(3)
        array([[0.333, 0.333, 0.167, 0.167]])
        >>> draft_token(logits, support=2, seed=0, requests=0, positions=3).laws
        SparseLaws(ids=array([[0, 1]], dtype=int32), probabilities=array([[0.66666667, 0.33333333]]))
    """
    if laws_dtype not in ("float64", "float32"):
        raise ArgumentError(f"laws_dtype: expected 'float64' or 'float32', got {laws_dtype!r}")
    array = native("logits", logits)
    rows, vocabulary = _rank("logits", array, ("B", "V"))
    out, tokens = like(logits, (rows,), "int64")
    rules, streams = _rules(temperature, top_k, top_p, rows), _streams(requests, positions, rows)
    reweighing = _per_row("saguaro", saguaro, rows, "float64"), _per_row("fan_out", fan_out, rows, "int64")
    ids_out = None
    if support is None:
        laws_out, laws = like(logits, (rows, vocabulary), laws_dtype)
    else:
        if isinstance(support, bool) or not isinstance(support, (int, np.integer)):
            raise DtypeError(f"support: expected an integer >= 1 or None, got {type(support).__name__}")
        if support < 1:
            raise ArgumentError(f"support: expected an integer >= 1, got {support}; None keeps all tokens")
        shape = (rows, min(int(support), max(vocabulary, 1)))
        ids_out, ids = like(logits, shape, "int32")
        laws_out, probabilities = like(logits, shape, laws_dtype)
        laws = SparseLaws(ids, probabilities)
    _core.speculation_sample_logits(array, *rules, _seed(seed), *streams, "draft", out, laws_out, ids_out, *reweighing)
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
            up to 1 within 1e-4 and are divided by their sum. Or :class:`SparseLaws` ``[B, K, m]``. None: the drafts are
            no random draws but a function of the prefix (n-grams, a greedy draft), that is, point masses.
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
    laws, ids = _laws(draft_laws)
    accepted_out, accepted = like(logits, (rows,), "int32")
    tokens_out, tokens = like(logits, (rows,), "int64")
    _core.speculation_verify(
        drafted,
        None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        ids,
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
    laws, ids = _laws(draft_laws)
    acceptance_out, acceptance = like(logits, tuple(drafted.shape), "float64")
    corrections_out, corrections = like(logits, tuple(array.shape), "float64")
    _core.speculation_law(
        drafted,
        None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        ids,
        array,
        *_rules(temperature, top_k, top_p, rows),
        bool(strict),
        acceptance_out,
        corrections_out,
    )
    return VerificationLaw(acceptance, corrections)


def token_probabilities(
    draft_tokens: Any,
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    draft_lengths: Any = None,
) -> Any:
    """The target's probability of every drafted token: what :func:`accept` needs to know of the target's laws.

    Args:
        draft_tokens, logits, temperature, top_k, top_p, draft_lengths: as in :func:`verify`. (The last row of logits,
            for the token after a whole chain, is not looked at.)

    Returns:
        float64 ``[B, K]``, of the kind of `logits`; 0 beyond a row's length.

    Raises:
        As :func:`verify`.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import token_probabilities
        >>> token_probabilities(np.array([[1]]), np.log([[[0.25, 0.75], [0.5, 0.5]]]))
        array([[0.75]])
    """
    drafted, array, rows = _chains(draft_tokens, logits)
    out, result = like(logits, tuple(drafted.shape), "float64")
    lengths = None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64")
    _core.speculation_token_probabilities(drafted, lengths, array, *_rules(temperature, top_k, top_p, rows), out)
    return result


def accept(
    draft_probabilities: Any,
    target_probabilities: Any,
    *,
    draft_lengths: Any = None,
    seed: int,
    requests: Any,
    positions: Any,
) -> Any:
    """The first step of a round in two: how many drafted tokens are kept, from two numbers for each of them.

    With :func:`correct` it does what :func:`verify` does, with the same random numbers; but no law needs to be where
    the other is, except at the one place where a token is refused.

    Args:
        draft_probabilities: ``[B, K]``, float32 or float64: q of each drafted token, in the law it was drawn from; 1
            for drafts that are no random draws (n-grams).
        target_probabilities: ``[B, K]``, float32 or float64: p of each drafted token (:func:`token_probabilities`).
        draft_lengths: ``[B]``, how many of a row's K tokens are drafted; what lies beyond is not read. None: all.
        seed, requests, positions: the random numbers (see the module); `positions` are those of the first drafted
            token.

    Returns:
        int32 ``[B]``, of the kind of `target_probabilities`.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument.
        ArgumentError: numbers that are no probabilities; a drafted token of probability 0; lengths out of range.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import accept
        >>> accept(np.array([[0.5, 0.5]]), np.array([[0.9, 0.0]]), seed=0, requests=0, positions=4)
        array([1], dtype=int32)
    """
    draft = native("draft_probabilities", draft_probabilities)
    target = native("target_probabilities", target_probabilities)
    rows, _ = _rank("draft_probabilities", draft, ("B", "K"))
    out, accepted = like(target_probabilities, (rows,), "int32")
    lengths = None if draft_lengths is None else _per_row("draft_lengths", draft_lengths, rows, "int64")
    _core.speculation_accept(draft, target, lengths, _seed(seed), *_streams(requests, positions, rows), out)
    return accepted


def correct(
    accepted: Any,
    refused: Any,
    draft_laws: Any = None,
    *,
    probabilities: Any = None,
    logits: Any = None,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: int,
    requests: Any,
    positions: Any,
) -> Any:
    """The second step: the token that follows the accepted ones, from one law of each side.

    Args:
        accepted: ``[B]``, what :func:`accept` returned.
        refused: ``[B]``, the drafted token at that place, which was refused; -1 where the whole chain was kept.
        draft_laws: the law that the refused token was drawn from: ``[B, V]``, or :class:`SparseLaws` ``[B, m]``. None:
            point masses. Rows without a refusal are not read.
        probabilities: ``[B, V]``, float32 or float64: the target's law at that place; rows add up to 1 within 1e-4. Or
        logits: ``[B, V]``, from which `temperature`, `top_k` and `top_p` make it (see :func:`process`).
        seed, requests, positions: the same as for :func:`accept`.

    Returns:
        int64 ``[B]``, of the kind of `probabilities` or `logits`.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument (`target` is `probabilities` or `logits`).
        ArgumentError: both or neither of `probabilities` and `logits`; rows that are not laws; ids out of range.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import correct
        >>> correct([1], [2], probabilities=np.array([[0.0, 0.5, 0.5]]), seed=0, requests=0, positions=4)
        array([1])
    """
    if (probabilities is None) == (logits is None):
        raise ArgumentError(
            f"probabilities, logits: expected one of them, got {'neither' if logits is None else 'both'}"
        )
    given = logits if probabilities is None else probabilities
    target = native("target", given)
    rows, _ = _rank("target", target, ("B", "V"))
    laws, ids = _laws(draft_laws)
    out, tokens = like(given, (rows,), "int64")
    _core.speculation_correct(
        target,
        None if logits is None else _rules(temperature, top_k, top_p, rows),
        _per_row("accepted", accepted, rows, "int64"),
        _per_row("refused", refused, rows, "int64"),
        laws,
        ids,
        _seed(seed),
        *_streams(requests, positions, rows),
        out,
    )
    return tokens


def _laws(draft_laws: Any) -> tuple[Any, Any]:
    """What the core takes for laws: weights, and ids if they are sparse."""
    if draft_laws is None:
        return None, None
    if isinstance(draft_laws, SparseLaws):
        ids = native("draft_laws.ids", draft_laws.ids)
        return native("draft_laws.probabilities", draft_laws.probabilities), ids
    return native("draft_laws", draft_laws), None


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
    if array.ndim == 0:
        return np.full(rows, array, dtype)
    return np.ascontiguousarray(array, dtype)


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
