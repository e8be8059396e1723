"""What a draft expects to follow, and where a token stands in its order: the guesses of an outcome cache.

A verification of K drafted tokens comes out as (accepted k, follow-up token t*). The draft guesses t* for each k from
its own logits at that place. After k < K accepted tokens the (k + 1)-th drafted token was refused, and what replaces a
refused
token is another one: it is excluded. After a whole chain nothing is.

Source: Kumar, Dao, May, "Speculative Speculative Decoding" (2026), section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ArgumentError
from tilewise.speculation._rows import per_row, rank

__all__ = ["predict_outcomes", "token_rank"]


def predict_outcomes(logits: Any, count: Any, exclude: Any = None) -> Any:
    """The most probable tokens of each row, in order: falling logits, ties by rising id.

    The tokens for a smaller count are the first ones for a larger, so a larger budget of guesses never loses a hit.

    Args:
        logits: ``[B, V]``, float32, float64, float16 or bfloat16; -inf masks a token, which is then never predicted.
        count: how many, a number or ``[B]``; more than there are is allowed.
        exclude: ``[B]``, a token that is left out (the drafted one); -1 or None: none.

    Returns:
        int32 ``[B, max(count)]``, of the kind of `logits`; -1 where a row has fewer.

    Raises:
        ShapeError, DtypeError, DeviceError: the message names the argument.
        ArgumentError: NaN logits, a negative count, ids outside the vocabulary.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import predict_outcomes
        >>> predict_outcomes(np.array([[3.0, 1.0, 2.0, 2.0]] * 2), [2, 3], exclude=[0, -1])
        array([[ 2,  3, -1],
               [ 0,  2,  3]], dtype=int32)
    """
    array = native("logits", logits)
    rows, _ = rank("logits", array, ("B", "V"))
    counts = per_row("count", count, rows, "int64")
    if counts.min(initial=0) < 0:
        raise ArgumentError(f"count: expected integers >= 0, got {counts.min()}")
    width = int(counts.max(initial=0)) if np.ndim(count) else int(count)
    out, ids = like(logits, (rows, width), "int32")
    _core.speculation_predict(array, _excluded(exclude, rows), counts, out)
    return ids


def token_rank(logits: Any, tokens: Any, exclude: Any = None) -> Any:
    """Where a token stands in the order of :func:`predict_outcomes`: it is among the first F iff its rank is below F.

    Args:
        logits: ``[B, V]``.
        tokens: ``[B]``, or one for all rows.
        exclude: ``[B]``, a token that is left out; -1 or None: none.

    Returns:
        int64 ``[B]``, of the kind of `logits`; -1 for the excluded token itself. A masked token (-inf) ranks behind all
        that are not, although it is never predicted.

    Raises:
        As :func:`predict_outcomes`.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import token_rank
        >>> token_rank(np.array([[3.0, 1.0, 2.0, 2.0]] * 3), [3, 1, 0], exclude=[0, -1, 0])
        array([ 1,  3, -1])
    """
    array = native("logits", logits)
    rows, _ = rank("logits", array, ("B", "V"))
    out, ranks = like(logits, (rows,), "int64")
    _core.speculation_rank(array, per_row("tokens", tokens, rows, "int64"), _excluded(exclude, rows), out)
    return ranks


def _excluded(exclude: Any, rows: int) -> np.ndarray | None:
    return None if exclude is None else per_row("exclude", exclude, rows, "int64")
