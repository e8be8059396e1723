"""Laws, and draws from them: one token a row, and a record of what it was drawn from.

The random numbers (`seed`, `requests`, `positions`) are those that :mod:`tilewise.speculation` explains. Per-row
settings (`temperature`, `top_k`, `top_p`, `positions`) are numbers, for all rows, or ``[B]`` arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.speculation._rows import per_row, rank, rules_of, seed_of, streams_of

__all__ = ["Drafted", "SparseLaws", "draft_token", "process", "sample", "sample_target"]


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
        >>> verify(np.array([[2]]), laws, np.array([[[0.0, 0.0, 9.0]] * 2]), seed=0, requests=0, positions=3).accepted
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
    _core.speculation_process(array, *rules_of(temperature, top_k, top_p, rows), out)
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
    rows = rank("probabilities", laws, ("B", "V"))[0]
    out, result = like(probabilities, (rows,), "int64")
    _core.speculation_sample_laws(laws, seed_of(seed), *streams_of(requests, positions, rows), purpose, out)
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
    rows = rank("logits", array, ("B", "V"))[0]
    out, result = like(logits, (rows,), "int64")
    rules, streams = rules_of(temperature, top_k, top_p, rows), streams_of(requests, positions, rows)
    _core.speculation_sample_logits(array, *rules, seed_of(seed), *streams, "target", out)
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
    rows, vocabulary = rank("logits", array, ("B", "V"))
    out, tokens = like(logits, (rows,), "int64")
    rules, streams = rules_of(temperature, top_k, top_p, rows), streams_of(requests, positions, rows)
    reweighing = per_row("saguaro", saguaro, rows, "float64"), per_row("fan_out", fan_out, rows, "int64")
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
    _core.speculation_sample_logits(
        array, *rules, seed_of(seed), *streams, "draft", out, laws_out, ids_out, *reweighing
    )
    return Drafted(tokens, laws)
