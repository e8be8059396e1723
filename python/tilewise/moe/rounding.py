"""Token rounding: a routing changed so that every expert gets whole tiles of rows.

A grouped matrix product computes each expert's rows in tiles and pads the last one. With 512 rows an expert and tiles
of 128 that is an eighth of the work. Token rounding moves each expert's number of rows to a multiple of the tile
instead: down, and the expert loses the tokens that want it least, or up, and it gets the tokens that want it most of
those that did not choose it. Only an expert's last tile changes.

It is a method for *training*. Which pairs a token keeps depends on the other tokens of the batch, later ones too, so
use the router's own choice for evaluation and decoding. It pays where padding costs: on GPUs, with tiles of 64 to 256
rows.

Source: Guo et al., SonicMoE (arXiv 2512.14080), section 5 and algorithms 4 and 6.
"""

from __future__ import annotations

import operator
import sys
from typing import Any, Literal, NamedTuple

import numpy as np

from tilewise import _core
from tilewise._arrays import is_torch, like, native
from tilewise.errors import ArgumentError, ShapeError
from tilewise.moe.routers import weights_dtype

__all__ = ["Routing", "Rule", "round_tokens"]

Rule = Literal["nearest", "stochastic", "nearest_score", "balance", "up", "down"]

_DRAWS = ("stochastic", "nearest_score")


class Routing(NamedTuple):
    """A routing in general spelling: pairs of a token and an expert, by ascending token; NumPy arrays or torch tensors.

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import Routing
        >>> routing = Routing.from_slots(np.array([[2, 0], [2, 1]]), np.ones((2, 2), np.float32))
        >>> routing.token_ids.tolist(), routing.counts(3).tolist(), routing.padded_rows(3, tile=4)
        ([0, 0, 1, 1], [1, 1, 2], 8)
    """

    #: Integers ``[pairs]``: the expert of each pair; ids outside ``0..experts`` are skipped by every operation.
    expert_ids: Any
    #: Floating ``[pairs]``: the weight of each pair.
    weights: Any
    #: int32 ``[pairs]``, ascending: the token of each pair.
    token_ids: Any

    @classmethod
    def from_slots(cls, expert_ids: Any, weights: Any) -> Routing:
        """The same pairs as ``[tokens, slots]`` arrays, as routers return them.

        Raises:
            ShapeError: not two matrices of one shape.
        """
        if expert_ids.ndim != 2 or tuple(expert_ids.shape) != tuple(weights.shape):
            raise ShapeError(
                "expert_ids, weights: expected one shape [tokens, slots], "
                f"got {tuple(expert_ids.shape)} and {tuple(weights.shape)}"
            )
        tokens, slots = expert_ids.shape
        if is_torch(expert_ids):
            torch = sys.modules["torch"]
            of_slot = torch.arange(tokens, dtype=torch.int32, device=expert_ids.device)[:, None].expand(tokens, slots)
        else:
            of_slot = np.broadcast_to(np.arange(tokens, dtype=np.int32)[:, None], (tokens, slots))
        return cls(expert_ids.reshape(-1), weights.reshape(-1), of_slot.reshape(-1))

    def counts(self, experts: int) -> Any:
        """Rows of each expert: int64 ``[experts]``. Ids outside ``0..experts`` are not counted."""
        valid = self.expert_ids[(self.expert_ids >= 0) & (self.expert_ids < experts)]
        if is_torch(valid):
            return valid.bincount(minlength=experts)
        return np.bincount(np.asarray(valid), minlength=experts)

    def padded_rows(self, experts: int, tile: int) -> int:
        """Rows that are added when every expert's rows are padded to a multiple of `tile`."""
        if tile < 1:
            raise ArgumentError(f"tile: expected at least 1, got {tile}")
        return int((-self.counts(experts) % tile).sum())


def round_tokens(
    scores: Any,
    expert_ids: Any,
    weights: Any = None,
    *,
    tile: int,
    rule: Rule = "nearest",
    renormalise: bool = False,
    seed: int | None = None,
    step: int = 0,
) -> Routing:
    """Rounds a routing so that every expert's number of rows is a multiple of `tile`.

    With f the number of tokens that chose an expert, it keeps the first c of all tokens in the order (chose it first,
    score descending, token ascending). c is one of the two multiples of `tile` around f (f itself if it is one):

    =====================  ===================================================================================
    ``"nearest"``          the nearer one; half a tile goes down (NR-f)
    ``"stochastic"``       up with probability (f mod tile) / tile, so that c is f on average (SR-f)
    ``"nearest_score"``    up with probability a / (a + b): a the scores of the chosen tokens of the last tile, b
                           those of the tokens that would fill it; down where that is no number (NR-s)
    ``"balance"``          by ascending expert, whichever keeps the sum of all changes so far nearer to 0; ties go
                           down: the number of pairs changes by at most half a tile (Balance-f). One expert may
                           move by up to tile - 1, not only by half a tile as the paper says.
    ``"up"``               the upper one: no chosen pair is lost
    ``"down"``             the lower one: no pair is added (token dropping)
    =====================  ===================================================================================

    What follows from that: an expert with fewer than `tile` tokens may lose all of them, and with ``"nearest"`` and few
    tokens (top_k * tokens / experts < tile / 2) every expert may; a token may end with no expert (its output is 0) or
    with more than it chose; an expert cannot get more than all tokens, so rounding up is clipped there, and the count
    is then a multiple of `tile` only if the number of tokens is. ``tile=1`` changes nothing. Quality holds while
    experts have two tiles or more on average (the paper's finding).

    Args:
        scores: ``[tokens, experts]``, floating, no NaN: the router's score of every expert, in the unit of the weights:
            ``softmax(logits)`` or ``sigmoid(logits)``, times the router's scale.
        expert_ids: ``[tokens, slots]``, int32 or int64, different for each token: what the router chose. Ids outside
            ``0..experts`` are left out.
        weights: ``[tokens, slots]``, floating: the weights of the chosen pairs, which also rank them. By default their
            `scores`.
        tile: rows of a tile, at least 1.
        rule: see above.
        renormalise: divide each token's weights by their sum over its kept pairs.
        seed: for ``"stochastic"`` and ``"nearest_score"``: 0 to 2^63 - 1, one for each layer, say. The draw of an
            expert is a function of (seed, step, expert).
        step: which rounding with that seed this is, one for each batch.

    Returns:
        ``Routing(expert_ids, weights, token_ids)``: int32, float32 (float64 for float64 scores), int32, ``[pairs]``, by
        ascending token, then expert; of the kind of `scores`.

    The paper and its code weigh pairs in different ways; all of them can be had. Raw scores for all pairs (the later
    code): leave `weights` out. The router's renormalised weights for chosen pairs and raw scores for fills (the paper,
    the first code): pass the router's `weights`. Weights that add up to 1 for every token: ``renormalise=True``.

    Raises:
        ShapeError, DtypeError: see the message.
        ArgumentError: a tile below 1, an unknown rule, a rule that draws without a seed, an expert twice for one token,
            or NaN among scores or weights (its place is named).

    Example:
        >>> import numpy as np
        >>> from tilewise.moe import round_tokens
        >>> scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], np.float32)
        >>> chosen = scores.argmax(axis=1)[:, None]  # three tokens for expert 0, one for expert 1
        >>> round_tokens(scores, chosen, tile=2, rule="down").token_ids.tolist()
        [0, 2]
        >>> up = round_tokens(scores, chosen, tile=2, rule="up")
        >>> up.token_ids.tolist(), up.expert_ids.tolist()
        ([0, 1, 1, 2, 3, 3], [0, 0, 1, 0, 0, 1])
    """
    pairs = rounded(scores, expert_ids, weights, tile, rule, renormalise, *draws(rule, seed, step))
    return Routing(*pairs[:3])


def draws(rule: str, seed: int | None, step: int) -> tuple[int, int]:
    """Seed and step as the core takes them: checked, and 0 for rules that draw nothing.

    Raises:
        ArgumentError: out of range, or no seed where one is needed.
    """
    if seed is None:
        if rule in _DRAWS:
            raise ArgumentError(f"seed: expected an integer from 0 to 2^63 - 1 with rule {rule!r}, got None")
        seed = 0
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 1 << 63:
            raise ArgumentError(f"{name}: expected 0 to 2^63 - 1, got {value}")
    return seed, step


def rounded(
    scores: Any, expert_ids: Any, weights: Any, tile: int, rule: str, renormalise: bool, seed: int, step: int
) -> tuple[Any, Any, Any, Any]:
    """``(expert_ids, weights, token_ids, slots)``: as :func:`round_tokens`, and each pair's slot, -1 for a fill."""
    if not 1 <= operator.index(tile) < 1 << 62:
        raise ArgumentError(f"tile: expected at least 1, got {tile}")
    held = native("scores", scores)
    if held.ndim != 2:
        raise ShapeError(f"scores: expected rank 2 [tokens, experts], got shape {tuple(held.shape)}")
    rounding = _core.round_tokens(
        held,
        native("expert_ids", expert_ids),
        None if weights is None else native("weights", weights),
        tile=operator.index(tile),
        rule=rule,
        seed=operator.index(seed),
        step=operator.index(step),
        renormalise=bool(renormalise),
    )
    length = (len(rounding),)
    ids, tokens, slots = (like(scores, length, "int32") for _ in range(3))
    values = like(scores, length, weights_dtype(scores))
    rounding.write(ids[0], tokens[0], slots[0], values[0])
    return ids[1], values[1], tokens[1], slots[1]
