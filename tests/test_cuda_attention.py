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
    on,
    options_of,
    run_backward,
    run_forward,
)
from tilewise import _core
from tilewise.attention.rules import Rules
from tilewise.cuda import attention
from tilewise.cuda.attention import kernels, operators, passes
from tilewise.cuda.expr import NO_MOD
from tilewise.cuda.kernel import Kernel
from tilewise.cuda.launch import launch
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
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
@pytest.mark.parametrize(
    ("lengths", "dtype"), [((70, 33), "bfloat16"), ((33, 70), "bfloat16"), ((33, 70), "float32")], ids=str
)
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
def test_packed_sequences(place: Place, dtype: str, queries: list[int], keys: list[int], gap: int) -> None:
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


@pytest.mark.parametrize(
    ("dtype", "queries", "keys"), [("float32", 37, 70), ("bfloat16", 37, 70), ("bfloat16", 2, 700)]
)
def test_what_a_mask_hides_stays_hidden(place: Place, dtype: str, queries: int, keys: int) -> None:
    """NaN and infinities in keys and values reach the rows that attend them, and no others."""
    generator = np.random.default_rng(6)
    mask = generator.uniform(size=(1, 4, queries, keys)) < 0.7
    case = make(dtype, (1, 4, 2, queries, keys, 24, 40), mask=mask, sinks=np.zeros(4, np.float32))
    clean, clean_lse = run_forward(case, place)
    case.value[0, 0, 3, 7] = np.nan
    case.value[0, 1, 20] = np.inf
    case.key[0, 0, 30, 0] = np.nan
    out, lse = run_forward(case, place)
    touched = np.zeros((1, 4, queries, 40), bool)
    touched[:, :2, :, 7] |= mask[:, :2, :, 3]
    touched[:, 2:] |= mask[:, 2:, :, 20, None]
    touched[:, :2] |= mask[:, :2, :, 30, None]
    assert not np.isfinite(out[touched].astype(np.float64)).any()
    floor = 1e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(out[~touched].astype(np.float64), clean[~touched].astype(np.float64), atol=floor)
    of_rows = np.zeros((1, 4, queries), bool)
    of_rows[:, :2] = mask[:, :2, :, 30]
    assert np.isnan(lse[of_rows]).all()
    np.testing.assert_allclose(lse[~of_rows], clean_lse[~of_rows], atol=1e-5)


def test_a_program_that_reads_outside_is_reported_when_asked(place: Place) -> None:
    case = make("bfloat16", (1, 2, 1, 20, 70, 24, 24))
    text = "tilewise-expr 1 score\ncapture float 1\nscore\nkey\ngather 0 1\nadd 0 2\nreturn 3\n"
    case.rules |= {"score_mod": text, "score_captures": [np.ones(70, np.float32)]}
    out, _ = run_forward(case, place)
    probe = place.put(np.zeros(1, np.float32))
    attention.raise_faults(probe)
    case.rules["score_captures"] = [np.ones(69, np.float32)]
    case.rules |= {"causal": True, "left": 0, "right": 0}  # row i sees key i + 50: the last row sees key 69
    run_forward(case, place)
    with pytest.raises(ArgumentError, match="an index outside a captured array"):
        attention.raise_faults(probe)
    attention.raise_faults(probe)
    case.rules["left"] = 5
    case.query = case.query[:, :, :19].copy()  # the diagonal ends at key 69 all the same
    case.rules["score_captures"] = [np.ones(70, np.float32)]
    run_forward(case, place)
    attention.raise_faults(probe)
    assert np.isfinite(out.astype(np.float64)).all()


def test_refusals(place: Place) -> None:
    def refuse(error: type[Exception], match: str, case: Case, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            run_forward(replace(case, rules=case.rules | changes), place)

    shape = (1, 4, 2, 5, 7, 8, 8)
    case = make("float32", shape)
    refuse(ArgumentError, "scale: expected a finite number, got nan", case, scale=float("nan"))
    refuse(ArgumentError, "dropout: expected a probability from 0 to 1, got 1.5", case, dropout=1.5)
    refuse(ArgumentError, "left: expected at least 0, or None for no limit, got -1", case, left=-1)
    refuse(ArgumentError, "threshold: expected powers of two from 0 to 64", case, threshold=-1.0)
    refuse(ArgumentError, "splits: expected 0", case, splits=-1)
    refuse(ShapeError, r"mask: expected \[batch, query_heads, queries, keys\]", case, mask=np.ones((1, 4, 5, 6), bool))
    refuse(DtypeError, "mask: expected dtype bool, got float32", case, mask=np.ones((1, 4, 5, 7), np.float32))
    refuse(ShapeError, r"sinks: expected \[query_heads\] = \[4\]", case, sinks=np.zeros(2, np.float32))
    blocks = np.zeros((1, 3, 5, 2), np.int32)
    refuse(
        ShapeError, r"block_indices: expected \[1, a divisor of 4, 5, slots\]", case, block_indices=blocks, block_size=4
    )
    refuse(ArgumentError, "block_size: expected at least 1", case, block_indices=blocks)
    rows = np.zeros((1, 5), np.int64)
    refuse(ShapeError, r"sequences: expected \[n, 6\]", case, sequences=rows)
    rows = np.zeros((1, 6), np.int64)
    refuse(
        ArgumentError, "mask: expected none beside sequences", case, sequences=rows, mask=np.ones((1, 4, 5, 7), bool)
    )
    refuse(ArgumentError, "block_table: expected sequences beside it", case, block_table=np.zeros((1, 2), np.int32))
    refuse(ShapeError, "key: expected a number of heads that divides query's 4", make("float32", (1, 4, 3, 5, 7, 8, 8)))
    refuse(UnsupportedError, "head widths from 1 to 256, got 257", make("float32", (1, 1, 1, 1, 1, 257, 8)))
    wide = replace(case, value=case.value[:, :, :6].copy())
    refuse(ShapeError, r"value: expected \[1, 2, 7\] and a width", wide)
    odd = replace(case, key=case.key.astype(np.float16))
    refuse(DtypeError, "key: expected dtype float32, as query, got float16", odd)
    with pytest.raises(DtypeError, match="query: expected dtype float32, float16, bfloat16, got float64"):
        attention.forward(*[place.put(np.zeros((1, 1, 1, 8)))] * 4, place.put(np.zeros((1, 1, 1))), Rules(scale=1.0))
    bias = [np.zeros((4, 12), np.float32)]
    biased = replace(case, rules=case.rules | {"score_mod": SCORE, "score_captures": bias})
    out, lse = run_forward(biased, place)
    with pytest.raises(UnsupportedError, match="summed by atomics on CUDA, whose order is not fixed"):
        run_backward(biased, place, out, lse, deterministic=True)


@pytest.mark.parametrize("empty", range(5))
def test_empty_extents(place: Place, empty: int) -> None:
    shape = [0 if axis == empty else size for axis, size in enumerate((2, 4, 2, 5, 7))]
    if empty == 1:
        shape[2] = 2
    if empty == 2:
        shape[1] = 0
    case = make("bfloat16", (*shape, 24, 16))
    out, lse = run_forward(case, place)
    assert not out.any() and (lse == -np.inf).all()
    gradients = run_backward(case, place, out, lse)
    for gradient, like in zip(gradients, (case.query, case.key, case.value), strict=False):
        assert gradient is not None and gradient.shape == like.shape and not gradient.any()


@pytest.mark.parametrize("dtype", BOTH)
def test_layout_in_memory_does_not_change_the_bits(place: Place, dtype: str) -> None:
    """Lengths before heads, rows apart, rows that start anywhere, one row for all: both paths of the copies agree."""
    case = make(dtype, (2, 4, 2, 20, 70, 24, 16), causal=True)
    case.grad_out[:] = case.grad_out[:, :, :1]
    out, lse = run_forward(case, place)
    gradients = run_backward(case, place, out, lse)

    def turned(array: np.ndarray) -> Any:
        return place.put(np.ascontiguousarray(array.swapaxes(1, 2))).swapaxes(1, 2)

    def shifted(array: np.ndarray) -> Any:
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 16), array.dtype)
        wide[..., 1 : 1 + array.shape[-1]] = array
        return place.put(wide)[..., 1 : 1 + array.shape[-1]]

    def across(array: np.ndarray) -> Any:
        return place.put(np.ascontiguousarray(array.swapaxes(2, 3))).swapaxes(2, 3)

    rules = on(place, case)
    for change in (turned, shifted, across):
        arrays = [change(array) for array in (case.query, case.key, case.value)]
        to, logs = place.put(np.full(out.shape, np.nan, out.dtype)), place.put(np.full(lse.shape, np.nan, np.float32))
        attention.forward(*arrays, to, logs, rules)
        assert np.array_equal(np.array(place.get(to)), out) and np.array_equal(np.array(place.get(logs)), lse)
        made = [place.put(np.full(array.shape, np.nan, array.dtype)) for array in (case.query, case.key, case.value)]
        upstream = change(case.grad_out)
        attention.backward(*arrays, to, logs, upstream, place.put(case.grad_lse), *made, None, [], rules)
        for got, want in zip(made, gradients, strict=False):
            assert np.array_equal(np.array(place.get(got)), want)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that passes launch."""
    names: list[str] = []

    def spy(kernel: Kernel, *rest: Any) -> None:
        names.append(kernel.name)
        launch(kernel, *rest)

    monkeypatch.setattr(passes, "launch", spy)
    return names


@pytest.mark.parametrize(
    ("dtype", "shape", "rules"),
    [
        ("bfloat16", (1, 4, 2, 40, 150, 64, 64), {"causal": True}),
        ("float16", (1, 1, 1, 70, 140, 120, 72), {"left": 9, "right": 30}),  # no row is aligned
        ("bfloat16", (1, 2, 2, 66, 90, 64, 128), {"score_mod": SCORE, "mask_mod": CAUSAL, "dropout": 0.2, "seed": 3}),
    ],
    ids=str,
)
def test_warpgroups(
    place: Place,
    dtype: str,
    shape: tuple[int, ...],
    rules: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
) -> None:
    """The engine of sm_90a; other GPUs ignore the wish."""
    if "score_mod" in rules:
        rules = rules | {"score_captures": [np.random.default_rng(2).normal(size=(2, 200)).astype(np.float32)]}
    monkeypatch.setenv("TILEWISE_CUDA_WARPGROUPS", "1")
    check(make(dtype, shape, **rules), place, backward=False)
    assert "warpgroups" in launched[-1] or place.name != "emulated"
    monkeypatch.setenv("TILEWISE_CUDA_WARPGROUPS", "yes")
    with pytest.raises(ArgumentError, match="TILEWISE_CUDA_WARPGROUPS must be 0"):
        run_forward(make(dtype, shape), place)


def test_every_shape_fits_into_shared_memory() -> None:
    """99 KiB is what sm_86, sm_89 and sm_120 have; on sm_90a there are 227."""
    widths = (64, 128, 192, 256)
    for dtype in ("float32", "bfloat16"):
        for width, value_width in ((a, b) for a in widths for b in widths):
            shapes: list[Any] = [kernels.backward_shape(dtype, width, value_width)]
            for features in (0, kernels.DROPOUT):
                for spread in (False, True):
                    shapes.append(kernels.forward_shape(dtype, width, value_width, features, NO_MOD, spread=spread))
            assert all(shape.shared <= 99 * 1024 for shape in shapes), (dtype, width, value_width)
    assert all(kernel.shared <= (227 if kernel.only else 99) * 1024 for kernel in kernels.KERNELS)


def test_dropout_drops_what_the_cpu_drops(place: Place) -> None:
    """One-hot values show each weight: both floors lose the same ones, in sequences too."""
    rows = packed_rows([9, 5], [33, 20])
    case = make("float32", (1, 4, 2, 14, 53, 24, 53), dropout=0.4, seed=2**50 + 1, sequences=rows)
    case.value[:] = np.eye(53, dtype=np.float32)
    out, lse = run_forward(case, place)
    cpu, cpu_lse = np.empty_like(out), np.empty_like(lse)
    _core.attention_forward(case.query, case.key, case.value, cpu, cpu_lse, Rules(**case.rules))
    assert np.array_equal(out == 0, cpu == 0) and 0.3 < (out[:, :, :9, :33] == 0).mean() < 0.5
    np.testing.assert_allclose(out, cpu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, cpu_lse, rtol=1e-5, atol=1e-6)
