"""The exact verification of drafted chains, all rows of a batch at once: in one step, or in two for which few numbers
cross from one process to another.

Arguments are those of :mod:`tilewise.speculation.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ArgumentError
from tilewise.speculation._rows import per_row, rank, rules_of, seed_of, streams_of
from tilewise.speculation.sampling import SparseLaws

__all__ = [
    "Verification",
    "VerificationLaw",
    "accept",
    "correct",
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
        None if draft_lengths is None else per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        ids,
        array,
        *rules_of(temperature, top_k, top_p, rows),
        bool(strict),
        seed_of(seed),
        *streams_of(requests, positions, rows),
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
        None if draft_lengths is None else per_row("draft_lengths", draft_lengths, rows, "int64"),
        laws,
        ids,
        array,
        *rules_of(temperature, top_k, top_p, rows),
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
    lengths = None if draft_lengths is None else per_row("draft_lengths", draft_lengths, rows, "int64")
    _core.speculation_token_probabilities(drafted, lengths, array, *rules_of(temperature, top_k, top_p, rows), out)
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
    rows, _ = rank("draft_probabilities", draft, ("B", "K"))
    out, accepted = like(target_probabilities, (rows,), "int32")
    lengths = None if draft_lengths is None else per_row("draft_lengths", draft_lengths, rows, "int64")
    _core.speculation_accept(draft, target, lengths, seed_of(seed), *streams_of(requests, positions, rows), out)
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
    rows, _ = rank("target", target, ("B", "V"))
    laws, ids = _laws(draft_laws)
    out, tokens = like(given, (rows,), "int64")
    _core.speculation_correct(
        target,
        None if logits is None else rules_of(temperature, top_k, top_p, rows),
        per_row("accepted", accepted, rows, "int64"),
        per_row("refused", refused, rows, "int64"),
        laws,
        ids,
        seed_of(seed),
        *streams_of(requests, positions, rows),
        out,
    )
    return tokens


def _chains(draft_tokens: Any, logits: Any) -> tuple[Any, Any, int]:
    drafted, array = native("draft_tokens", draft_tokens), native("logits", logits)
    rows, _ = rank("draft_tokens", drafted, ("B", "K"))
    rank("logits", array, ("B", "K + 1", "V"))
    return drafted, array, rows


def _laws(draft_laws: Any) -> tuple[Any, Any]:
    """What the core takes for laws: weights, and ids if they are sparse."""
    if draft_laws is None:
        return None, None
    if isinstance(draft_laws, SparseLaws):
        ids = native("draft_laws.ids", draft_laws.ids)
        return native("draft_laws.probabilities", draft_laws.probabilities), ids
    return native("draft_laws", draft_laws), None
