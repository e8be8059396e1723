"""Score mods by name: functions that make a score_mod ``(score, b, h, q, k) -> score``.

* :func:`alibi`, :func:`rel`, :func:`head_bias`, :func:`relative_bias`, :func:`sandwich`: biases by distance and head;
* :func:`softcap`; :func:`activation` with :func:`undo_activation`: other functions than the softmax;
* :func:`graphormer`, :func:`mla_rope`: scores of other data.

Every mod runs on every front: with torch tensors, NumPy arrays and the symbols of :mod:`tilewise.expr`. Arrays that a
mod captures may be NumPy arrays or torch tensors; gradients flow to torch tensors that require them. The score comes
already multiplied by the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewise import expr
from tilewise._arrays import is_torch
from tilewise.errors import ArgumentError, ShapeError
from tilewise.masks._check import integers, named, numbers, whole

__all__ = [
    "EXAMPLES", "ScoreMod", "activation", "alibi", "graphormer", "head_bias", "mla_rope", "rel", "relative_bias",
    "sandwich", "softcap", "undo_activation",
]  # fmt: skip

ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]


def alibi(heads: int, slopes: Any = None) -> ScoreMod:
    """A penalty that grows with distance: ``score + slopes[h] * (k - q)``.

    Signed, so it is meant for causal masks; the slopes are ``2^(-8 (h + 1) / heads)``.

    Args:
        heads: query heads.
        slopes: ``[heads]``, instead of those.

    Source: Press et al. 2022 (ALiBi), arXiv 2108.12409.

    Example:
        >>> print(expr.trace(alibi(8)))
        score + slopes[h] * float(k - q)
    """
    heads = whole("heads", heads, 1)
    if slopes is None:
        slopes = np.exp2(-8.0 * np.arange(1, heads + 1) / heads).astype(np.float32)
    table = numbers("slopes", slopes, 1)
    if table.shape != (heads,):
        raise ShapeError(f"slopes: expected [{heads}], got {list(table.shape)}")
    return named(lambda score, b, h, q, k: score + table[h] * (k - q), f"alibi({heads})")


def softcap(cap: float) -> ScoreMod:
    """Scores bent into ``(-cap, cap)``: ``cap * tanh(score / cap)``.

    Args:
        cap: above 0.

    Source: Gemma 2, arXiv 2408.00118; Bello et al. 2017, arXiv 1611.09940.

    Example:
        >>> print(expr.trace(softcap(20.0)))
        20.0 * tanh(score / 20.0)
    """
    if not cap > 0:
        raise ArgumentError(f"cap: expected a number above 0, got {cap!r}")
    cap = float(cap)
    return named(lambda score, b, h, q, k: cap * expr.tanh(score / cap), f"softcap({cap:g})")


def rel() -> ScoreMod:
    """The signed distance as a bias: ``score + (q - k)``.

    Source: attention-gym, the smallest position bias.

    Example:
        >>> print(expr.trace(rel()))
        score + float(q - k)
    """
    return named(lambda score, b, h, q, k: score + (q - k), "rel")


def head_bias(bias: Any) -> ScoreMod:
    """A bias for each head: ``score + bias[h]``.

    Args:
        bias: ``[heads]``.

    Source: attention-gym.

    Example:
        >>> print(expr.trace(head_bias([0.5, 1.0])))
        score + bias[h]
    """
    table = numbers("bias", bias, 1)
    return named(lambda score, b, h, q, k: score + table[h], "head_bias")


def relative_bias(table: Any) -> ScoreMod:
    """A bias for each head and clipped distance: ``score + table[h, clip(q - k, -reach, reach) + reach]``.

    Args:
        table: ``[heads, 2 * reach + 1]``, learnable where it requires a gradient.

    Source: Shaw et al. 2018, arXiv 1803.02155 (clipped relative positions); Raffel et al. 2020, arXiv 1910.10683
        (as a scalar bias).

    Example:
        >>> print(expr.trace(relative_bias([[0.0, 1.0, 2.0]])))
        score + table[h, min(max(q - k, -1), 1) + 1]
    """
    of = numbers("table", table, 2)
    if of.shape[1] % 2 == 0:
        raise ShapeError(f"table: expected [heads, 2 * reach + 1], an odd number of distances, got {list(of.shape)}")
    reach = of.shape[1] // 2
    return named(
        lambda score, b, h, q, k: score + of[h, expr.clip(q - k, -reach, reach) + reach], f"relative_bias({reach})"
    )


def sandwich(heads: int, length: int, width: int = 128) -> ScoreMod:
    """The inner product of sinusoidal positions: ``score + heads / (8 (h + 1)) * sum_i cos((q - k) w_i)``.

    ``w_i = 10000^(-2 i / width)`` for ``i < width / 2``. The sum is a table over distances.

    Args:
        heads: query heads.
        length: the largest distance plus 1.
        width: of the sinusoidal embedding; the paper has 128.

    Source: Chi et al. 2023 (Sandwich), arXiv 2212.10356.

    Example:
        >>> print(expr.trace(sandwich(8, 64)))
        score + distances[abs(q - k)] * ratios[h]
    """
    heads, length, width = whole("heads", heads, 1), whole("length", length, 1), whole("width", width, 2)
    frequencies = 10000.0 ** (-2.0 * np.arange(width // 2) / width)
    by_distance = np.cos(np.arange(length)[:, None] * frequencies).sum(-1).astype(np.float32)
    distances = expr.array(by_distance, "distances")
    ratios = expr.array((heads / (8.0 * np.arange(1, heads + 1))).astype(np.float32), "ratios")
    return named(
        lambda score, b, h, q, k: score + distances[expr.abs(q - k)] * ratios[h], f"sandwich({heads}, {length})"
    )


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": expr.relu,
    "squared_relu": lambda x: expr.square(expr.relu(x)),
    "sigmoid": expr.sigmoid,
    "silu": lambda x: x * expr.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + expr.erf(x * 0.5**0.5)),
}


def activation(function: str | Callable[[Any], Any] = "gelu", offset: float = 1.0) -> ScoreMod:
    """Attention by another function than the softmax: ``log(f(score) + offset)``.

    The softmax of that is ``(f(S) + N) / l`` with ``l = sum (f(s) + N)`` and ``N = offset``, so the output is
    ``(f(S) + N) V / l`` and the log-sum-exp is ``log l``. Hence ``f(S) V = out * exp(lse) - N * sum of the attended
    values``, which :func:`undo_activation` computes; training needs the gradient through the log-sum-exp.

    Args:
        function: ``"relu"``, ``"squared_relu"``, ``"sigmoid"``, ``"silu"``, ``"gelu"``, or a function of symbols.
        offset: ``N``; ``f(s) + N`` must be above 0 for every score.

    Source: attention-gym, activation.

    Example:
        >>> print(expr.trace(activation("relu")))
        log(relu(score) + 1.0)
    """
    if isinstance(function, str):
        if function not in _ACTIVATIONS:
            raise ArgumentError(f"function: expected one of {', '.join(_ACTIVATIONS)}, or a function, got {function!r}")
        name, function = function, _ACTIVATIONS[function]
    else:
        name = getattr(function, "__name__", "function")
    if not callable(function):
        raise TypeError(f"function: expected a name or a function, got {type(function).__name__}")
    offset = float(offset)
    return named(lambda score, b, h, q, k: expr.log(function(score) + offset), f"activation({name}, {offset:g})")


def undo_activation(out: Any, lse: Any, value_sum: Any, offset: float = 1.0) -> Any:
    """``f(S) V`` from the output and the log-sum-exp of attention with :func:`activation`.

    Args:
        out: ``[.., queries, value dim]``, NumPy or torch.
        lse: ``[.., queries]``.
        value_sum: the sum of the values that each query attends, broadcast to ``out``: ``value.sum(-2, keepdims)``
            without a mask, a cumulative sum with a causal one.
        offset: of the mod.

    Example:
        >>> import numpy as np
        >>> undo_activation(np.array([[2.0]]), np.log([3.0]), np.array([[4.0]]))
        array([[2.]])
    """
    return out * (lse.exp() if is_torch(lse) else np.exp(lse))[..., None] - offset * value_sum


def graphormer(spatial: Any, distances: Any, edges: Any = None, paths: Any = None, lengths: Any = None) -> ScoreMod:
    """Biases by the shortest path between graph nodes: ``score + spatial[h, distances[b, q, k]]``.

    With edges, also the mean over the path of a learnt weight for each position and edge type:
    ``sum_n edges[h, n, paths[b, q, k, n]] / lengths[b, q, k]`` over ``n < lengths[b, q, k]``.

    Args:
        spatial: ``[heads, distances]``, learnable.
        distances: integers ``[batch, nodes, nodes]``.
        edges: ``[heads, positions, edge types]``, learnable; with it:
        paths: integers ``[batch, nodes, nodes, positions]``, the edge types along the path.
        lengths: integers ``[batch, nodes, nodes]``, how many of them there are; 0 adds nothing.

    Source: Ying et al. 2021 (Graphormer), arXiv 2106.05234, section 3.1.

    Example:
        >>> import numpy as np
        >>> print(expr.trace(graphormer(np.zeros((2, 4)), np.zeros((1, 5, 5), int))))
        score + spatial[h, distances[b, q, k]]
    """
    bias, apart = numbers("spatial", spatial, 2), integers("distances", distances, 3)
    if edges is None:
        return named(lambda score, b, h, q, k: score + bias[h, apart[b, q, k]], "graphormer")
    if paths is None or lengths is None:
        raise ArgumentError("edges: give paths and lengths too")
    weight, types, count = numbers("edges", edges, 3), integers("paths", paths, 4), integers("lengths", lengths, 3)
    positions = types.shape[3]
    if weight.shape[1] < positions:
        raise ShapeError(f"edges {list(weight.shape)}: expected a weight for each of {positions} positions")

    def mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        steps = count[b, q, k]
        total = 0.0
        for n in range(positions):
            total = total + expr.where(steps > n, weight[h, n, types[b, q, k, n]], 0.0)
        return score + bias[h, apart[b, q, k]] + total / expr.maximum(steps, 1)

    return named(mod, "graphormer with edges")


def mla_rope(query_rope: Any, key_rope: Any, scale: float = 1.0) -> ScoreMod:
    """The rotary part of latent attention: ``score + scale * sum_r query_rope[b, h, q, r] * key_rope[b, g, k, r]``.

    ``g`` is the key head of query head ``h``. The sum is written out, so small widths are what it is for.

    Args:
        query_rope: ``[batch, heads, queries, width]``.
        key_rope: ``[batch, key heads, keys, width]``; the key heads divide the heads.
        scale: of the product; the score has been scaled already.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.3.

    Example:
        >>> import numpy as np
        >>> print(expr.trace(mla_rope(np.ones((1, 2, 4, 1)), np.ones((1, 1, 4, 1)), 0.5)))
        score + 0.5 * (query_rope[b, h, q, 0] * key_rope[b, 0, k, 0])
    """
    mine, other = numbers("query_rope", query_rope, 4), numbers("key_rope", key_rope, 4)
    heads, key_heads, width = mine.shape[1], other.shape[1], mine.shape[3]
    if other.shape[3] != width or not width or not key_heads or heads % key_heads:
        raise ShapeError(
            f"query_rope {list(mine.shape)} and key_rope {list(other.shape)}: expected one width, and key heads that "
            "divide the heads"
        )
    group, scale = heads // key_heads, float(scale)

    def mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        head = 0 if key_heads == 1 else h // group
        total = mine[b, h, q, 0] * other[b, head, k, 0]
        for r in range(1, width):
            total = total + mine[b, h, q, r] * other[b, head, k, r]
        return score + scale * total

    return named(mod, f"mla_rope({width})")


def _table(*shape: int) -> np.ndarray:
    """Numbers for examples, the same at each call."""
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * 0.7).reshape(shape).astype(np.float32)


def _ring(nodes: int) -> np.ndarray:
    """Distances on a ring of nodes."""
    apart = np.abs(np.subtract.outer(np.arange(nodes), np.arange(nodes)))
    return np.minimum(apart, nodes - apart)[None]


#: By name: what makes an example for some number of (queries, keys), with 4 heads and 1 batch.
EXAMPLES: dict[str, Callable[[int, int], ScoreMod]] = {
    "activation": lambda queries, keys: activation("gelu"),
    "alibi": lambda queries, keys: alibi(4),
    "graphormer": lambda queries, keys: graphormer(
        _table(4, max(queries, keys)), _ring(max(queries, keys)), _table(4, 2, 3),
        np.broadcast_to(np.arange(2), (1, max(queries, keys), max(queries, keys), 2)).copy(),
        np.minimum(_ring(max(queries, keys)), 2),
    ),
    "head_bias": lambda queries, keys: head_bias(_table(4)),
    "mla_rope": lambda queries, keys: mla_rope(_table(1, 4, queries, 4), _table(1, 2, keys, 4), 0.5),
    "rel": lambda queries, keys: rel(),
    "relative_bias": lambda queries, keys: relative_bias(_table(4, 17)),
    "sandwich": lambda queries, keys: sandwich(4, max(queries, keys)),
    "softcap": lambda queries, keys: softcap(20.0),
}  # fmt: skip
