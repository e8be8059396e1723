"""The catalogue of masks and mods, entry by entry: against rules written out with plain numbers, by both tracers, by
torch's own flex_attention, and through the core."""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewise import expr, masks, mods
from tilewise.attention import create_mask
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.masks import EXAMPLES, example

_spec = importlib.util.spec_from_file_location("programs", Path(__file__).parent / "programs.py")
assert _spec is not None and _spec.loader is not None
programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(programs)

# Rules of the examples, one element at a time, with plain Python numbers.


def documents(tokens: int) -> list[int]:
    step = max(tokens // 16, 1)
    found: list[int] = []
    while len(found) < tokens:
        document = found[-1] + 1 if found else 0
        found += [document] * ((document + 1) * step)
    return found[:tokens]


def same_document(q: int, k: int) -> bool:
    ids = documents(64)
    return ids[q] == ids[k]


def diffusion(q: int, k: int) -> bool:
    noisy_q, noisy_k = q < 32, k < 32
    block_q, block_k = (q % 32) // 8, (k % 32) // 8
    if noisy_q and noisy_k:
        return block_q == block_k
    if noisy_q:
        return block_k < block_q
    return not noisy_k and block_k <= block_q


def near(canvas: tuple[int, int], kernel: tuple[int, int], q: tuple[int, int], k: tuple[int, int]) -> bool:
    """A window of `kernel` around q, pushed inside: its first pixel lies between 0 and extent - size."""
    for extent, size, mine, other in zip(canvas, kernel, q, k, strict=True):
        first = min(max(mine - size // 2, 0), extent - size)
        if not first <= other < first + size:
            return False
    return True


def tiled(index: int) -> tuple[int, int]:
    """Pixel (y, x) of a 12 x 12 image in tiles of 4 x 4."""
    order = [(ty * 4 + y, tx * 4 + x) for ty in range(3) for tx in range(3) for y in range(4) for x in range(4)]
    return order[index]


def morton(index: int) -> tuple[int, int]:
    bits = format(index, "08b")
    return int(bits[0::2], 2), int(bits[1::2], 2)


def tile_of(index: int) -> tuple[int, int, int]:
    """Tile (t, y, x) of a 4 x 8 x 8 video in tiles of 2 x 2 x 2: 2 x 4 x 4 tiles."""
    return index // 8 // 16, index // 8 // 4 % 4, index // 8 % 4


def sliding_tile(q: int, k: int) -> bool:
    if q >= 256 or k >= 256:
        return True
    return all(
        min(max(mine - wide // 2, 0), extent - wide) <= other < min(max(mine - wide // 2, 0), extent - wide) + wide
        for mine, other, extent, wide in zip(tile_of(q), tile_of(k), (2, 4, 4), (1, 2, 2), strict=True)
    )


def ancestor(q: int, k: int) -> bool:
    if k < 33:
        return True
    node = q
    while node > 0 and node != k - 33:
        node = (node - 1) // 2
    return node == k - 33


def span(index: int) -> int:
    return 0 if 8 <= index < 24 else 1 if 32 <= index < 48 else -1


def prefixed(q: int, k: int) -> bool:
    mine, other = q // 8, k // 8
    prompt = mine // 4 * 4
    return (mine == other and k <= q) or (mine != prompt and other == prompt)


def chosen(q: int, k: int) -> bool:
    row = q // 8
    return k // 8 in (row, (row * 5 + 2) % 8)


def frames(q: int, k: int) -> bool:
    return k < 4 or q < 4 or abs((q - 4) % 20 - (k - 4) % 20) < 1 * 20 // 4


def part(index: int) -> int:
    """Prompt, three paths, padding, summary."""
    return next(label for label, end in ((1, 4), (2, 20), (3, 28), (4, 44), (0, 48), (-1, 64)) if index < end)


def packed_paths(q: int, k: int) -> bool:
    if k > q or 0 in (part(q), part(k)):
        return False
    return part(q) == -1 or part(k) in (1, part(q))


RULES: dict[str, Any] = {
    "batchify": lambda q, k: q // 16 == k // 16 and k <= q,
    "block_diffusion": diffusion,
    "causal": lambda q, k: k <= q,
    "dilated_window": lambda q, k: q - k in range(-12, 13, 4),
    "document": lambda q, k: same_document(q, k) and k <= q,
    "flamingo": lambda q, k: (0, 21, 42, 64)[k // 16] <= q < (0, 21, 42, 64)[k // 16 + 1],
    "global_window": lambda q, k: abs(q - k) <= 6 or q in (0, 32) or k in (0, 32),
    "jetspec_training": lambda q, k: k < 16 or (q // 8 == (k - 16) // 8 and k - 16 <= q),
    "jetspec_tree": ancestor,
    "merged_attention": lambda q, k: k >= 48 or (k <= q and q - k <= 24),
    "natten": lambda q, k: near((12, 12), (5, 5), divmod(q, 12), divmod(k, 12)),
    "natten_morton": lambda q, k: near((16, 16), (5, 5), morton(q), morton(k)),
    "natten_tiled": lambda q, k: near((12, 12), (5, 5), tiled(q), tiled(k)),
    "packed_causal_document": lambda q, k: same_document(q, k) and k <= q,
    "parallel_paths": packed_paths,
    "prefix_lm": lambda q, k: k < 16 or k <= q,
    "shared_prefix": prefixed,
    "sliding_tile": sliding_tile,
    "sliding_window": lambda q, k: 0 <= q - k <= 12,
    "stand_alone": lambda q, k: max(abs(q // 12 - k // 12), abs(q % 12 - k % 12)) <= 2,
    "svg_spatial": lambda q, k: k < 24 or q < 4 or abs(q - k) < 20,
    "svg_temporal": frames,
    "transfusion": lambda q, k: k <= q or (span(q) == span(k) != -1),
    "video_sparse": chosen,
}


def wanted(name: str) -> np.ndarray:
    _, queries, keys, _ = example(name)
    rule = RULES[name]
    return np.array([[bool(rule(q, k)) for k in range(keys)] for q in range(queries)])[None, None]


def test_every_mask_has_an_example_and_a_rule() -> None:
    makers = {
        name for name in masks.__all__ if inspect.isfunction(getattr(masks, name)) and name not in (
            "example", "document_starts"
        )
    }  # fmt: skip
    assert makers == set(EXAMPLES) == set(RULES)
    assert {name for name in mods.__all__ if name not in ("EXAMPLES", "ScoreMod", "undo_activation")} == set(
        mods.EXAMPLES
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mask_keeps_what_its_rule_says(name: str) -> None:
    mask_mod, queries, keys, _ = example(name)
    expected = wanted(name)
    assert expected.any() and not expected.all(), "a picture of it shows something"
    extents = (1, 1, queries, keys)
    assert np.array_equal(programs.dense(expr.trace(mask_mod), extents), expected)
    arrays = np.broadcast_to(mask_mod(*programs.grid(*extents).values()), extents)
    assert np.array_equal(arrays, expected), "on NumPy arrays"
    assert np.array_equal(create_mask(mask_mod, None, None, queries, keys), expected), "through the core"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mask_in_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention import flex_attention

    import tilewise.torch as twt
    from tilewise.torch.expr import trace

    mask_mod, queries, keys, block = example(name)
    expected = wanted(name)
    assert np.array_equal(programs.dense(trace(mask_mod), (1, 1, queries, keys)), expected)
    theirs = flex_attention.create_mask(mask_mod, 1, 1, queries, keys, device="cpu")
    assert np.array_equal(theirs.numpy(), expected), "torch's own vmap"
    assert torch.equal(twt.create_mask(mask_mod, 1, 1, queries, keys, "cpu"), theirs)
    blocks = twt.create_block_mask(mask_mod, 1, 1, queries, keys, "cpu", block)
    other = flex_attention.create_block_mask(mask_mod, 1, 1, queries, keys, "cpu", block)
    assert torch.equal(blocks.to_dense(), other.to_dense())
    assert torch.equal(blocks.kv_num_blocks, other.kv_num_blocks)
    assert torch.equal(blocks.full_kv_num_blocks, other.full_kv_num_blocks)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 33), (33, 7)])
def test_examples_at_other_lengths(name: str, queries: int, keys: int) -> None:
    if EXAMPLES[name].fixed:
        with pytest.raises(ArgumentError, match="the example's grid has"):
            example(name, queries, keys)
        return
    mask_mod, *_ = example(name, queries, keys)
    extents = (1, 1, queries, keys)
    arrays = np.broadcast_to(mask_mod(*programs.grid(*extents).values()), extents)
    assert np.array_equal(create_mask(mask_mod, 1, 1, queries, keys), arrays)


def test_captures_of_torch_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    from tilewise.torch.expr import trace

    ids = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    mod = trace(masks.document(ids))
    assert mod.captures[0] is ids
    assert trace(masks.document(ids)).captures[0] is ids
    slopes = torch.nn.Parameter(torch.ones(2))
    assert trace(mods.alibi(2, slopes)).captures[0] is slopes
    # NumPy symbols read torch tensors too.
    assert programs.dense(expr.trace(masks.document(ids)), (1, 1, 4, 4)).sum() == 8


def test_batched_captures() -> None:
    ids = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    q, k = np.ogrid[:4, :4]
    assert np.array_equal(create_mask(masks.document(ids), 2, 1, 4, 4), same)
    assert np.array_equal(create_mask(masks.document(ids, masks.causal()), 2, 1, 4, 4), same & (q >= k))
    starts = masks.document_starts(ids)
    assert starts.tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]
    assert np.array_equal(create_mask(masks.packed_causal_document(starts), 2, 1, 4, 4), same & (q >= k))
    lengths = np.array([1, 3])
    expected = (k < lengths[:, None, None, None]) | (q >= k)
    assert np.array_equal(create_mask(masks.prefix_lm(lengths), 2, 1, 4, 4), expected)
    spans = np.array([[-1, 0, 0, -1], [0, 0, -1, -1]])
    pictures = (spans[:, None, :, None] == spans[:, None, None, :]) & (spans >= 0)[:, None, :, None]
    assert np.array_equal(create_mask(masks.transfusion(spans), 2, 1, 4, 4), pictures | (q >= k))
    k = np.arange(6)
    expected = ((k < 4) & (q >= k)) | ((k >= 4) & (k - 4 < np.array([2, 1])[:, None, None, None]))
    assert np.array_equal(create_mask(masks.merged_attention(4, [2, 1]), 2, 1, 4, 6), expected)
    assert np.array_equal(create_mask(masks.merged_attention(4, 1), 1, 1, 4, 6), expected[1:])


def test_inner_masks_count_from_the_start_of_a_document() -> None:
    ids = [0, 0, 0, 1, 1, 1, 1]
    prefixed = create_mask(masks.document(ids, masks.prefix_lm(2)), 1, 1, 7, 7)[0, 0]
    for start, end in ((0, 3), (3, 7)):
        inner = prefixed[start:end, start:end]
        q, k = np.ogrid[: end - start, : end - start]
        assert np.array_equal(inner, (k < 2) | (q >= k))
    assert prefixed.sum() == prefixed[:3, :3].sum() + prefixed[3:, 3:].sum()


# Mods.

B, H, Q, K = 1, 4, 9, 9
SCORE = np.random.default_rng(0).normal(size=(B, H, Q, K)) * 2
q, k = np.ogrid[:Q, :K]
head = np.arange(H)[:, None, None]


def table(*shape: int) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * 0.7).reshape(shape).astype(np.float32).astype(float)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def graph(score: np.ndarray) -> np.ndarray:
    around = np.minimum(abs(q - k), 9 - abs(q - k))
    weights = table(4, 2, 3)
    out = score + table(4, 9)[:, around]
    for i, j in np.ndindex(Q, K):
        steps = min(around[i, j], 2)
        if steps:
            out[:, :, i, j] += sum(weights[:, n, n] for n in range(steps)) / steps
    return out


def rope(score: np.ndarray) -> np.ndarray:
    keys = table(1, 2, 9, 4).repeat(2, axis=1)
    return score + 0.5 * table(1, 4, 9, 4) @ keys.swapaxes(-1, -2)


def cosines(score: np.ndarray) -> np.ndarray:
    frequencies = 10000.0 ** (-2 * np.arange(64) / 128)
    return score + 4 / (8.0 * (head + 1)) * np.cos((q - k)[..., None] * frequencies).sum(-1)


FORMULAS: dict[str, Any] = {
    "activation": lambda s: np.log(gelu(s) + 1),
    "alibi": lambda s: s + 2.0 ** (-8 * (head + 1) / 4) * (k - q),
    "graphormer": graph,
    "head_bias": lambda s: s + table(4)[:, None, None],
    "mla_rope": rope,
    "rel": lambda s: s + q - k,
    "relative_bias": lambda s: s + table(4, 17)[:, np.clip(q - k, -8, 8) + 8],
    "sandwich": cosines,
    "softcap": lambda s: 20 * np.tanh(s / 20),
}


@pytest.mark.parametrize("name", mods.EXAMPLES)
def test_a_mod_computes_its_formula(name: str) -> None:
    mod = mods.EXAMPLES[name](Q, K)
    expected = FORMULAS[name](SCORE.copy())
    assert abs(expected - SCORE).max() > 1e-3
    found = programs.dense(expr.trace(mod), (B, H, Q, K), SCORE)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # tables hold float32
    arrays = mod(SCORE, *programs.grid(B, H, Q, K).values())
    np.testing.assert_allclose(np.broadcast_to(arrays, expected.shape), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", mods.EXAMPLES)
def test_a_mod_in_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    from tilewise.torch.expr import trace

    mod = mods.EXAMPLES[name](Q, K)
    expected = FORMULAS[name](SCORE.copy())
    found = programs.dense(trace(mod), (B, H, Q, K), SCORE)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # As torch's uncompiled flex_attention calls it.
    function: Any = mod
    for axis in range(3, -1, -1):
        function = torch.vmap(function, in_dims=(0, *(0 if place == axis else None for place in range(4))))
    with TransformGetItemToIndex():
        theirs = function(torch.from_numpy(SCORE), *map(torch.arange, (B, H, Q, K)))
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "squared_relu", "sigmoid", "silu", "gelu"])
def test_activations_are_recovered_from_the_log_sum_exp(name: str) -> None:
    functions = {
        "relu": lambda x: np.maximum(x, 0), "squared_relu": lambda x: np.maximum(x, 0) ** 2,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "silu": lambda x: x / (1 + np.exp(-x)), "gelu": gelu,
    }  # fmt: skip
    value = np.random.default_rng(1).normal(size=(B, H, K, 3))
    logits = programs.dense(expr.trace(mods.activation(name, 1.5)), (B, H, Q, K), SCORE)
    lse = np.log(np.exp(logits).sum(-1))
    out = np.exp(logits - lse[..., None]) @ value
    found = mods.undo_activation(out, lse, value.sum(-2, keepdims=True), 1.5)
    np.testing.assert_allclose(found, functions[name](SCORE) @ value, rtol=1e-9, atol=1e-9)
    own = mods.activation(lambda x: expr.exp(-x * x), 0.0)
    np.testing.assert_allclose(programs.dense(expr.trace(own), (B, H, Q, K), SCORE), -(SCORE**2), rtol=1e-9)


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: masks.sliding_window(-1), ArgumentError, "window: expected a whole number of at least 0, got -1"),
    (lambda: masks.sliding_window(2.5), ArgumentError, "window"),
    (lambda: masks.dilated_window(4, 0), ArgumentError, "dilation: expected a whole number of at least 1"),
    (lambda: masks.global_window(4, [0, 1]), DtypeError, "is_global: expected bool"),
    (lambda: masks.prefix_lm([[1]]), ShapeError, "lengths: expected 1 axes, got 2"),
    (lambda: masks.document([0.5]), DtypeError, "ids: expected int elements, got float64"),
    (lambda: masks.document(np.zeros((1, 2, 3), int)), ShapeError, "ids: expected 1 or 2 axes, got 3"),
    (lambda: masks.shared_prefix([0, 2], [0, 0]), ShapeError, "one offset more than documents"),
    (lambda: masks.shared_prefix([0, 2, 4], [0, 2]), ArgumentError, "expected documents from 0 to 1"),
    (lambda: masks.batchify(masks.causal(), 0), ArgumentError, "length"),
    (lambda: masks.block_diffusion(8, 0), ArgumentError, "block"),
    (lambda: masks.flamingo([[1, 2, 3]], 4), ShapeError, r"intervals: expected \[media, 2\], got \[1, 3\]"),
    (lambda: masks.jetspec_tree([-1, 1], 0), ArgumentError, "an earlier node"),
    (lambda: masks.jetspec_tree(np.zeros(0, int), 0), ArgumentError, "at least one node"),
    (lambda: masks.natten((4, 4), (2, 3)), ArgumentError, "odd sizes that fit the canvas"),
    (lambda: masks.natten((4, 4), (5, 3)), ArgumentError, "odd sizes that fit the canvas"),
    (lambda: masks.natten(4, (3, 3)), ArgumentError, "canvas: expected 2 whole numbers, got 4"),
    (lambda: masks.natten_tiled((8, 8), (3, 3), (3, 4)), ArgumentError, "tile: expected sizes that divide"),
    (lambda: masks.natten_morton((8, 4), (3, 3)), ArgumentError, "equal powers of two"),
    (lambda: masks.sliding_tile((4, 4), (3, 2), (2, 2)), ArgumentError, "kernel: expected whole tiles"),
    (lambda: masks.sliding_tile((4, 4), (8, 2), (2, 2)), ArgumentError, "up to the canvas"),
    (lambda: masks.sliding_tile((4, 4), (2, 2, 2), (2, 2)), ArgumentError, "kernel: expected 2 whole numbers"),
    (lambda: masks.video_sparse([[[[5]]]], 2, 4), ArgumentError, "expected key tiles below 4, got 5"),
    (lambda: masks.video_sparse(np.zeros((1, 1, 0, 2), int), 2, 4), ShapeError, "at least one tile"),
    (lambda: masks.example("casual"), ArgumentError, "there is no mask 'casual'; there are batchify"),
    (lambda: masks.example("causal", 0, 4), ArgumentError, "at least one query"),
    (lambda: mods.alibi(4, [1.0]), ShapeError, r"slopes: expected \[4\], got \[1\]"),
    (lambda: mods.softcap(0.0), ArgumentError, "cap: expected a number above 0"),
    (lambda: mods.relative_bias(np.ones((2, 4))), ShapeError, "odd number of distances"),
    (lambda: mods.activation("gellu"), ArgumentError, "expected one of relu"),
    (lambda: mods.activation(3), TypeError, "a name or a function"),
    (lambda: mods.graphormer(np.ones((2, 3)), np.ones((1, 2, 2))), DtypeError, "distances: expected int"),
    (lambda: mods.graphormer(np.ones((2, 3)), np.ones((1, 2, 2), int), np.ones((2, 1, 1))), ArgumentError, "paths"),
    (lambda: mods.mla_rope(np.ones((1, 3, 2, 4)), np.ones((1, 2, 2, 4))), ShapeError, "divide the heads"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
