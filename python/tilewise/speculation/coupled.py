"""Coupled sampling: target and draft read the same random numbers, so where their laws agree, their tokens do.

Every token x of every position n has a number E(n, x), exponentially distributed with mean 1. What is drawn from a law
w is the winner of a race, the x with the least E(n, x) / w(x): that is x with probability w(x) (the Gumbel-max trick).
If target and draft race over the same numbers,

* a draft is kept iff it is what the target draws anyway, so the output *is* plain coupled sampling's, token for token;
* no law of the draft is needed to judge it;
* two laws at total variation d draw the same token with probability at least (1 - d) / (1 + d);
* the runner-up of the draft's race is the best guess of what the target draws where it refuses the winner.

Source: Gumbel-max coupling; Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding" (2024).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise import _core
from tilewise._arrays import like, native
from tilewise.errors import ArgumentError, ShapeError
from tilewise.speculation._rows import rank, rules_of, seed_of, streams_of

__all__ = ["Races"]


class Races:
    """The random numbers of a run of coupled sampling, and the races over them.

    Args:
        seed: of the run, in [0, 2^63).
        vocabulary: number of tokens. A larger one has the same numbers for the tokens they share.

    Numbers of the positions used last are kept (32 MB at most), since branches and both sides of a round race at the
    same ones.

    Raises:
        DtypeError, ArgumentError: a seed or vocabulary outside its range.

    Example:
        >>> import numpy as np
        >>> from tilewise.speculation import Races
        >>> races = Races(seed=5, vocabulary=4)
        >>> target, draft = np.log([[0.5, 0.3, 0.1, 0.1]]), np.log([[0.4, 0.4, 0.1, 0.1]])
        >>> drawn = races.rank(target, requests=0, positions=3)
        >>> drafted = races.rank(draft, requests=0, positions=3, count=4)
        >>> bool((drawn == drafted[:, :1]).all()), sorted(drafted[0].tolist())
        (True, [0, 1, 2, 3])
    """

    def __init__(self, seed: int, vocabulary: int):
        if isinstance(vocabulary, bool) or not 1 <= int(vocabulary) < 2**32:
            raise ArgumentError(f"vocabulary: expected a number of tokens in [1, 2^32), got {vocabulary!r}")
        self.vocabulary = int(vocabulary)
        self._core = _core.Races(seed_of(seed), self.vocabulary)

    def rank(
        self,
        logits: Any,
        *,
        temperature: Any = 1.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        requests: Any,
        positions: Any,
        count: int = 1,
        return_scores: bool = False,
    ) -> Any:
        """The first of each row's race, in order; column 0 is the token drawn.

        Args:
            logits: ``[B, V]``.
            temperature, top_k, top_p: the law, as in :func:`process`. At temperature 0 the order is that of the logits.
            requests, positions: the random numbers (see :mod:`tilewise.speculation`).
            count: how many.
            return_scores: also return how far ahead they are.

        Returns:
            int64 ``[B, count]``, of the kind of `logits`; -1 where a law has fewer tokens. With `return_scores` a pair:
            those, and float64 ``[B, count]``, -ln of each token's time (at temperature 0 its logit), -inf where there
            is no token. The further the first is ahead of the second, the surer it is that a similar law draws it too.

        Raises:
            ShapeError, DtypeError, DeviceError: the message names the argument.
            ArgumentError: a setting outside its range, NaN logits, a row whose tokens are all masked.
        """
        array = native("logits", logits)
        rows, vocabulary = rank("logits", array, ("B", "V"))
        if vocabulary != self.vocabulary:
            raise ShapeError(
                f"logits: expected [B, V = {self.vocabulary}], the vocabulary of these races, got V {vocabulary}"
            )
        if isinstance(count, (bool, np.bool_)) or count < 1:
            raise ArgumentError(f"count: expected at least 1, got {count!r}")
        out, result = like(logits, (rows, int(count)), "int64")
        scores, scored = like(logits, (rows, int(count)), "float64") if return_scores else (None, None)
        rules, streams = rules_of(temperature, top_k, top_p, rows), streams_of(requests, positions, rows)
        self._core.rank(array, *rules, *streams, out, scores)
        return (result, scored) if return_scores else result
