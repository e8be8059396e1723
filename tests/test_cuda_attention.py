"""Attention: on the GPU, and the same kernels emulated on a CPU, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuda_emulator import Place
from cuda_emulator.attention_cases import (
    CAUSAL,
    MASK,
    SCORE,
    Case,
    check,
    make,
    options_of,
    run_backward,
    run_forward,
)
from tilewise.cuda.attention import operators
from tilewise.errors import UnsupportedError
from tilewise.reference import attention as reference

BOTH = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 70, 130, 64, 64),  # rows of whole chunks: the path of asynchronous copies
        (2, 6, 2, 9, 21, 17, 9),  # no row is aligned
        (1, 1, 1, 1, 1, 1, 1),
        (1, 3, 3, 65, 33, 24, 40),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_equals_the_reference(place: Place, dtype: str, shape: tuple[int, ...]) -> None:
    check(make(dtype, shape), place)
    check(make(dtype, shape, causal=True), place)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    "rules",
    [
        {"causal": True},  # leading rows see nothing
        {"left": 7, "right": 3},
        {"left": 0, "right": 0},
        {"causal": True, "left": 5},
        {"scale": -0.4},
        {"scale": 0.0},
        {"threshold": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(70, 33), (33, 70)], ids=str)
def test_windows_and_scales(place: Place, dtype: str, rules: dict[str, Any], lengths: tuple[int, int]) -> None:
    out, lse = check(make(dtype, (1, 4, 2, *lengths, 24, 16), **rules), place)
    if rules.get("causal") and lengths == (70, 33):
        assert not out[:, :, : 70 - 33].any() and (lse[:, :, : 70 - 33] == -np.inf).all()


@pytest.mark.parametrize("dtype", BOTH)
def test_a_mask_and_sinks(place: Place, dtype: str) -> None:
    generator = np.random.default_rng(1)
    mask = generator.uniform(size=(2, 1, 37, 70)) < 0.3
    mask[:, :, 5] = False  # a row that sees nothing
    mask[:, :, :, :64] &= generator.uniform(size=(2, 1, 37, 1)) < 0.5  # rows whose first tile is empty
    wide = np.broadcast_to(mask, (2, 6, 37, 70))
    sinks = np.array([0.0, 1.0, -2.0, -np.inf, 40.0, 0.5], np.float32)
    shape = (2, 6, 2, 37, 70, 24, 24)
    out, lse = check(make(dtype, shape, mask=wide), place)
    assert not out[:, :, 5].any() and (lse[:, :, 5] == -np.inf).all()
    out, lse = check(make(dtype, shape, mask=wide, sinks=sinks), place)
    assert not out[:, :, 5].any() and np.array_equal(lse[:, :, 5], np.stack([sinks] * 2))
    check(make(dtype, shape, causal=True, sinks=sinks), place)


@pytest.mark.parametrize("dtype", BOTH)
def test_programs(place: Place, dtype: str) -> None:
    generator = np.random.default_rng(2)
    shape = (2, 4, 2, 37, 70, 24, 24)
    bias = generator.normal(size=(4, 70 + 37)).astype(np.float32)  # negative indices wrap
    documents = np.sort(generator.integers(0, 3, 70)).astype(np.int32)
    score = {"score_mod": SCORE, "score_captures": [bias]}
    mask = {"mask_mod": MASK, "mask_captures": [documents]}
    check(make(dtype, shape, **score), place)
    check(make(dtype, shape, **score, **mask), place)
    check(make(dtype, shape, **score, left=20, right=20), place)


def lists(codes: np.ndarray) -> dict[str, np.ndarray]:
    """Block lists from which blocks are listed (0 no, 1 partial, 2 full): ``[b, h, nq, nk]``; tails are garbage."""
    made: dict[str, np.ndarray] = {}
    for name, code in (("kv", 1), ("full_kv", 2)):
        count = (codes == code).sum(-1).astype(np.int32)
        order = np.argsort(codes != code, axis=-1, kind="stable").astype(np.int32)
        order[np.arange(codes.shape[-1]) >= count[..., None]] = 10**6
        made[f"{name}_num_blocks"], made[f"{name}_indices"] = count, order
    return made


@pytest.mark.parametrize(
    ("blocks", "extent", "dtype"),
    [
        ((16, 32), (1, 1), "bfloat16"),
        ((32, 16), (2, 4), "bfloat16"),
        ((128, 128), (1, 1), "bfloat16"),
        ((24, 40), (2, 1), "bfloat16"),
        ((24, 40), (1, 4), "float32"),
    ],
    ids=str,
)
def test_a_block_mask(place: Place, dtype: str, blocks: tuple[int, int], extent: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    queries, keys = 70, 150
    rows, columns = -(-queries // blocks[0]), -(-keys // blocks[1])
    codes = generator.integers(0, 3, (*extent, rows, columns))
    codes[..., -1][codes[..., -1] == 2] = 1  # the ragged last block is never full
    codes[:, :, -1] = 0  # the last query block sees nothing
    rules = lists(codes) | {"query_block": blocks[0], "key_block": blocks[1]}
    shape = (2, 4, 2, queries, keys, 24, 24)
    out, _ = check(make(dtype, shape, **rules, mask_mod=CAUSAL), place)
    assert not out[:, :, (rows - 1) * blocks[0] :].any()
    check(make(dtype, shape, **rules), place)


@pytest.mark.parametrize(("probability", "dtype"), [(0.3, "bfloat16"), (1.0, "bfloat16"), (0.3, "float32")])
def test_dropout(place: Place, dtype: str, probability: float) -> None:
    out, _ = check(make(dtype, (2, 4, 2, 37, 70, 24, 24), dropout=probability, seed=2**40 + 5), place)
    assert out.any() == (probability < 1)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [((80, 96), "bfloat16"), ((192, 128), "bfloat16"), ((256, 256), "bfloat16"), ((100, 200), "float32")],
    ids=str,
)
def test_wide_heads(place: Place, dtype: str, width: tuple[int, int]) -> None:
    check(make(dtype, (1, 2, 1, 40, 70, *width), causal=True), place)


# --- decode: few rows, parts of the keys ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (3, "bfloat16"), (40, "bfloat16"), (0, "float32")]
)
def test_parts_of_the_keys_equal_the_whole(place: Place, dtype: str, splits: int) -> None:
    sinks = np.array([0.0, 1.0, -2.0, 0.5], np.float32)
    for queries, rules in ((1, {}), (3, {"causal": True, "sinks": sinks}), (9, {"left": 30})):
        check(make(dtype, (2, 4, 2, queries, 1100, 24, 40), splits=splits, **rules), place, backward=False)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_row_does_not_know_its_batch(place: Place, dtype: str) -> None:
    """The same bits alone and in a batch, for a prefill and for a decode."""
    for queries, keys in ((70, 130), (1, 1100)):
        case = make(dtype, (3, 4, 2, queries, keys, 24, 24), causal=True)
        out, lse = run_forward(case, place)
        one = replace(case, query=case.query[1:2].copy(), key=case.key[1:2].copy(), value=case.value[1:2].copy())
        alone, alone_lse = run_forward(one, place)
        assert np.array_equal(out[1:2].view(np.uint8), alone.view(np.uint8))
        assert np.array_equal(lse[1:2], alone_lse)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 8, 2, 19, 150, 24, 24), "bfloat16"),
        ((1, 4, 4, 1, 1200, 64, 64), "bfloat16"),
        ((2, 8, 2, 19, 150, 24, 24), "float32"),
    ],
    ids=str,
)
def test_selected_blocks(place: Place, dtype: str, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(4)
    batch, _, key_heads, queries, keys = shape[:5]
    size = 16
    chosen = np.full((batch, key_heads, queries, 5), -1, np.int32)
    for at in np.ndindex(chosen.shape[:3]):
        count = generator.integers(0, 6)
        chosen[at][:count] = np.sort(generator.choice(-(-keys // size), count, replace=False))
    case = make(dtype, shape, block_indices=chosen, block_size=size, causal=True)
    check(case, place)
    case.rules["block_indices"] = chosen[:, :1].astype(np.int64)  # one choice for all heads
    check(case, place)


# --- sequences and pages ----------------------------------------------------------------------------------------


def packed_rows(queries: list[int], keys: list[int], gap: int = 0) -> np.ndarray:
    """Sequences one after the other in one buffer, `gap` unused rows before each."""
    rows, at, key_at = [], 0, 0
    for count, key_count in zip(queries, keys, strict=True):
        rows.append((0, at + gap, count, 0, key_at + gap, key_count))
        at, key_at = at + gap + count, key_at + gap + key_count
    return np.array(rows, np.int64)


def check_packed(case: Case, place: Place, *, backward: bool = True) -> None:
    """Against the reference of packed sequences; what lies outside of them must not be written."""
    rules = case.rules
    options = options_of(case)
    sequences = rules["sequences"]
    out, lse = run_forward(case, place)
    truth = (case.query, case.key, case.value)
    want, want_lse = reference.packed(*truth, sequences, block_table=rules.get("block_table"), **options)
    written = np.zeros(case.query.shape[:3], bool)
    for row in sequences:
        written[row[0], :, row[1] : row[1] + row[2]] = True
    assert np.isnan(out[~written]).all() and np.isnan(lse[~written]).all()
    floor = 2e-5 if case.dtype == "float32" else 3e-2
    np.testing.assert_allclose(out[written].astype(np.float64), want[written], atol=floor * max(1, np.abs(want).max()))
    np.testing.assert_allclose(lse[written], want_lse[written], atol=1e-4)
    if not backward:
        return
    found = run_backward(case, place, out, lse)
    grads = reference.packed_backward(*truth, case.grad_out, sequences, grad_lse=case.grad_lse, **options)
    of_keys = np.zeros(case.key.shape[:3], bool)
    for row in sequences:
        of_keys[row[3], :, row[4] : row[4] + row[5]] = True
    for got, truth, rows in zip(found, grads[:3], (written, of_keys, of_keys), strict=False):
        assert got is not None and np.isnan(got[~rows]).all()
        scale = max(1.0, float(np.abs(truth).max()))
        np.testing.assert_allclose(got[rows].astype(np.float64), truth[rows], atol=2 * floor * scale)
    if grads.sinks is not None:
        np.testing.assert_allclose(found[3], grads.sinks, atol=floor * max(1.0, float(np.abs(grads.sinks).max())))


@pytest.mark.parametrize(
    ("queries", "keys", "gap", "dtype"),
    [
        ([0, 20, 70, 0, 3, 0], [5, 33, 70, 0, 0, 9], 0, "bfloat16"),
        ([17, 40], [80, 40], 3, "bfloat16"),
        ([0, 0], [0, 0], 2, "bfloat16"),
        ([17, 40], [80, 40], 3, "float32"),
    ],
    ids=str,
)
def test_packed_sequences(
    place: Place, dtype: str, queries: list[int], keys: list[int], gap: int
) -> None:
    rows = packed_rows(queries, keys, gap)
    total, key_total = sum(queries) + gap * len(queries) + 1, sum(keys) + gap * len(keys) + 2
    sinks = np.array([0.0, 1.0, -2.0, 0.5], np.float32)
    shape = (1, 4, 2, total, key_total, 24, 16)
    check_packed(make(dtype, shape, sequences=rows, causal=True, sinks=sinks), place)
    check_packed(make(dtype, shape, sequences=rows, mask_mod=CAUSAL, dropout=0.25, seed=9), place)


@pytest.mark.parametrize(("page_size", "dtype"), [(16, "bfloat16"), (24, "bfloat16"), (24, "float32")])
def test_pages(place: Place, dtype: str, page_size: int) -> None:
    generator = np.random.default_rng(5)
    counts = [700, 0, 37, 1]
    width = -(-max(counts) // page_size)
    case = make(dtype, (4, 4, 2, 2, 1, 24, 16))
    pages = len(counts) * width
    rows = [(n, 0, 2, 0, 0, count) for n, count in enumerate(counts)]
    table = generator.permutation(pages).reshape(len(counts), width).astype(np.int32)
    for n, count in enumerate(counts):
        table[n, -(-count // page_size) :] = 10**8  # never read
    case.key = generator.normal(size=(pages, 2, page_size, 24)).astype(case.key.dtype)
    case.value = generator.normal(size=(pages, 2, page_size, 16)).astype(case.value.dtype)
    case.rules |= {"sequences": np.array(rows, np.int64), "block_table": table, "causal": True}
    for splits in (0, 3):
        case.rules["splits"] = splits
        check_packed(case, place, backward=False)
    with pytest.raises(UnsupportedError, match="keys in pages have no gradient"):
        run_backward(case, place, *run_forward(case, place))


def test_the_operators_read_the_schema_of_torchs() -> None:
    front = pytest.importorskip("tilewise.torch.attention.operators")
    assert operators.FIELDS == front._FIELDS
