"""How probable a draft's guesses are: what the order in which branches grow is made of.

A draft ranks its guesses of the next token by scores s_1 >= s_2 >= ... (logits at temperature 0, otherwise -ln of each
token's time in the race). The target's scores are the draft's plus an error, so

    P(the target draws guess r) = exp(beta s_r) / sum over guesses exp(beta s)

where beta says how much the draft may be believed: 1 is what it believes of itself, a small error gives more. beta
follows what the target draws, by Newton steps on the logarithm of the likelihood over a fading past::

    beta += (s_r - E s) / sum of Var s        E, Var: under the probabilities above
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Odds"]

_PRIOR = 64.0
"""Curvature at the start: as much as some ten undecided guesses bring."""
_MEMORY = 0.998
_LEAST, _MOST = 0.05, 20.0


class Odds:
    """The probabilities of a draft's guesses, learnt from what the target draws.

    Example:
        >>> import numpy as np
        >>> odds = Odds()
        >>> scores = np.log([[0.6, 0.3, 0.1]])
        >>> odds.of(scores).round(3).tolist()
        [[0.6, 0.3, 0.1]]
        >>> for _ in range(1000):  # the first guess is always right: the draft is better than it thinks
        ...     odds.observe(scores, np.array([0]))
        >>> bool(odds.of(scores)[0, 0] > 0.9)
        True
    """

    def __init__(self) -> None:
        self.beta = 1.0
        self._curvature = _PRIOR

    def of(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities ``[m, count]`` of guesses with these scores ``[m, count]``, the first of a row the largest."""
        weights = np.exp(self.beta * (scores - scores[:, :1]))
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    def observe(self, scores: NDArray[np.float64], ranks: NDArray[np.int64]) -> None:
        """The target drew guess ``ranks [m]`` of each row; rows where it drew none of them say nothing."""
        rows = np.flatnonzero(ranks >= 0)
        if not rows.size:
            return
        scores = np.maximum(scores[rows] - scores[rows, :1], -1e3)  # -inf: no more tokens
        p = self.of(scores)
        mean = (p * scores).sum(axis=1)
        variance = (p * scores * scores).sum(axis=1) - mean * mean
        self._curvature = self._curvature * _MEMORY**rows.size + float(variance.sum())
        step = float((scores[np.arange(rows.size), ranks[rows]] - mean).sum()) / max(self._curvature, 1.0)
        self.beta = min(max(self.beta + step, _LEAST), _MOST)
