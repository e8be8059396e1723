"""Block masks: against torch's own, against the dense mask, and what may not be asked of them."""

from __future__ import annotations

import importlib.util
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewise import expr
from tilewise.attention import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError

_spec = importlib.util.spec_from_file_location("programs", Path(__file__).parent / "programs.py")
assert _spec is not None and _spec.loader is not None
programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(programs)

DOCUMENT = np.repeat(np.arange(9), [3, 40, 1, 77, 128, 5, 60, 100, 30]).astype(np.int32)  # 444 tokens
FLAGS = np.random.default_rng(0).random((2, 444)) < 0.3
document, flags = expr.array(DOCUMENT, "document"), expr.array(FLAGS, "flags")

MASKS: dict[str, Any] = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k <= 40),
    "documents": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
    "by batch": lambda b, h, q, k: flags[b, k],
    "by head": lambda b, h, q, k: q - k <= h * 64,
    "by both": lambda b, h, q, k: flags[b, q] & (k >= h * 16),
    "all": lambda b, h, q, k: q == q,
    "none": lambda b, h, q, k: q < 0,
    "modular": lambda b, h, q, k: (q + k) % 3 == 0,
}
SIZES = [(100, 100, 32), (128, 256, 64), (33, 444, (16, 48)), (1, 7, 128), (444, 1, 16), (129, 127, 128)]


def kinds_of(dense: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """0, 1 or 2 for each block, by looking at every element; a ragged block is never full."""
    batch, heads, queries, keys = dense.shape
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    padded = np.zeros((batch, heads, rows * size[0], columns * size[1]), bool)
    padded[:, :, :queries, :keys] = dense
    blocks = padded.reshape(batch, heads, rows, size[0], columns, size[1])
    return blocks.any((3, 5)).astype(np.int8) + blocks.all((3, 5))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("queries", "keys", "block"), SIZES)
def test_blocks_are_what_the_elements_say(name: str, queries: int, keys: int, block: Any) -> None:
    mask_mod = MASKS[name]
    extents = (2, 3, queries, keys)
    dense = np.broadcast_to(mask_mod(*programs.grid(*extents).values()), extents)
    size = (block, block) if isinstance(block, int) else block
    mask = create_block_mask(mask_mod, *extents, block)
    assert np.array_equal(mask.kinds(), kinds_of(dense, size))
    assert mask.shape == extents and mask.numel() == dense.size and size == mask.BLOCK_SIZE
    assert mask.sparsity() == pytest.approx(100 * (kinds_of(dense, size) == 0).mean())
    assert np.array_equal(create_mask(mask_mod, *extents), dense)
    # Rows are ascending, without repetition, with a tail of -1.
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts.dtype == indices.dtype == np.int32
        for row in np.ndindex(*counts.shape):
            listed = indices[row]
            assert (np.diff(listed[: counts[row]]) > 0).all() and (listed[counts[row] :] == -1).all()
    # The transposes list the same blocks.
    back = BlockMask(mask.seq_lengths, mask.q_num_blocks, mask.q_indices).to_dense()
    assert np.array_equal(back.swapaxes(-1, -2), mask.kinds() == 1)
    together = create_block_mask(mask_mod, *extents, block, separate_full_blocks=False)
    assert together.full_kv_num_blocks is None
    assert np.array_equal(together.kinds() == 1, mask.kinds() > 0)


def test_axes_that_do_not_matter_are_shared() -> None:
    mask = create_block_mask(MASKS["causal"], 5, 7, 64, 64, 16)
    assert mask.kv_indices.shape == (5, 7, 4, 4) and mask.kv_indices.strides[:2] == (0, 0)
    assert mask.q_indices.shape == (5, 7, 4, 4) and mask.q_indices.strides[:2] == (0, 0)
    mask = create_block_mask(MASKS["by head"], 5, 7, 64, 64, 16)
    assert mask.kv_indices.strides[0] == 0 != mask.kv_indices.strides[1]
    assert mask.q_indices.strides[0] == 0 != mask.q_indices.strides[1] and mask.q_indices.shape == (5, 7, 4, 4)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(queries: int, keys: int) -> None:
    mask = create_block_mask(MASKS["causal"], None, None, queries, keys, 4)
    assert mask.shape == (1, 1, queries, keys) and mask.sparsity() == 0.0 and mask.numel() == 0
    assert create_mask(MASKS["causal"], None, None, queries, keys).shape == (1, 1, queries, keys)


def test_masks_combine() -> None:
    causal, window = MASKS["causal"], MASKS["window"]
    near = lambda b, h, q, k: abs(q - k) < 3  # noqa: E731
    extents = (1, 1, 20, 20)
    dense = {name: create_mask(m, *extents) for name, m in {"causal": causal, "near": near, "window": window}.items()}
    assert np.array_equal(create_mask(and_masks(causal, near), *extents), dense["causal"] & dense["near"])
    assert np.array_equal(create_mask(or_masks(causal, near), *extents), dense["causal"] | dense["near"])
    nested = and_masks(or_masks(causal, near), expr.trace(window))
    assert np.array_equal(create_mask(nested, *extents), (dense["causal"] | dense["near"]) & dense["window"])
    assert create_mask(and_masks(), *extents).all() and create_mask(noop_mask, *extents).all()
    assert not create_mask(or_masks(), *extents).any()
    with pytest.raises(TypeError, match=r"mask_mods\[1\]: expected a function"):
        and_masks(causal, 3)  # type: ignore[arg-type]


def test_a_score_mod_shows_what_it_drops() -> None:
    dropped = create_mask(lambda s, b, h, q, k: expr.where(q >= k, s, -np.inf), None, None, 5, 6)
    assert np.array_equal(dropped, create_mask(MASKS["causal"], None, None, 5, 6))


def test_a_mask_is_traced_once_and_again_when_set() -> None:
    mask = create_block_mask(MASKS["causal"], None, None, 64, 64, 16)
    assert str(mask.mod) == "q >= k" and mask.mod is mask.mod
    mask.mask_mod = lambda b, h, q, k: q + 16 >= k
    assert str(mask.mod) == "q + 16 >= k"
    part = mask[:, :, 1:]
    with pytest.raises(ArgumentError, match="this BlockMask was sliced"):
        _ = part.mod
    part.mask_mod = lambda b, h, q, k: q + 32 >= k
    assert part.shape == (1, 1, 48, 64) and str(part.mod) == "q + 32 >= k"


def arrays(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("a score mod", lambda: create_block_mask(lambda s, b, h, q, k: s, 1, 1, 4, 4), ArgumentError, "mask_mod takes 4"),
    ("no trace", lambda: create_block_mask(lambda b, h, q, k: q and k, 1, 1, 4, 4), UnsupportedError, "truth value"),
    ("lengths", lambda: create_block_mask(noop_mask, 1, 1, -1, 4), ArgumentError, "Q_LEN: expected a whole number"),
    ("fractions", lambda: create_block_mask(noop_mask, 1, 1, 4, 4.5), ArgumentError, "KV_LEN"),  # type: ignore
    ("batch", lambda: create_block_mask(noop_mask, 0, 1, 4, 4), ArgumentError, "B: expected .* at least 1, got 0"),
    ("block", lambda: create_block_mask(noop_mask, 1, 1, 4, 4, 0), ArgumentError, "BLOCK_SIZE: expected one positive"),
    ("triple", lambda: create_block_mask(noop_mask, 1, 1, 4, 4, (1, 2, 3)), ArgumentError, "BLOCK_SIZE"),  # type: ignore
    ("a list", lambda: BlockMask.from_kv_blocks([[1]], [[[1]]]), ShapeError, "at least 2 axes"),
    ("shapes", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3), arrays(1, 1, 2, 3)), ShapeError, r"\[1, 1, 3\]"),
    ("floats", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3) * 0.5, arrays(1, 1, 3, 3)), DtypeError, "int32"),
    (
        "half", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3), arrays(1, 1, 3, 3), arrays(1, 1, 3)),
        ArgumentError, "give both or neither",
    ),
    (
        "full of another shape",
        lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3), arrays(1, 1, 3, 3), arrays(2, 1, 3), arrays(2, 1, 3, 3)),
        ShapeError, "the shape of kv_num_blocks",
    ),
    (
        "counts", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3) + 4, arrays(1, 1, 3, 3)),
        ArgumentError, "kv_num_blocks: expected counts from 0 to 3, got 4 to 4",
    ),
    (
        "columns", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3) + 1, arrays(1, 1, 3, 3) + 9),
        ArgumentError, "kv_indices: expected columns from 0 to 2, got 9 to 9",
    ),
    (
        "negative lengths", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3), arrays(1, 1, 3, 3), seq_lengths=(-1, 3)),
        ArgumentError, "seq_lengths",
    ),
    (
        "no function", lambda: BlockMask.from_kv_blocks(arrays(1, 1, 3), arrays(1, 1, 3, 3), mask_mod=3),  # type: ignore
        TypeError, "mask_mod: expected a function",
    ),
    ("four indices", lambda: create_block_mask(noop_mask, 1, 1, 4, 4)[0, 0, 0, 0], IndexError, "got 4 indices"),
    ("outside", lambda: create_block_mask(noop_mask, 1, 1, 4, 4)[0, 1], IndexError, "index 1 is outside an axis of 1"),
    ("without batch", lambda: BlockMask((4, 4), arrays(1), arrays(1, 1))[0], IndexError, "indexing needs"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_arguments_are_named(name: str, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_short_capture_is_refused_though_bounds_decide_alone() -> None:
    ids = expr.array(np.zeros(60, np.int64))  # one document, so that no element needs to be looked at
    with pytest.raises(ArgumentError, match="60"):
        create_block_mask(lambda b, h, q, k: ids[q] == ids[k], None, None, 64, 64, 16)


def test_drawings() -> None:
    mask = create_block_mask(MASKS["window"], 1, 2, 444, 444, 64)
    drawn = mask.to_string()
    assert drawn.startswith("(0, 0)\n██") and drawn.count("(0,") == 2
    assert "set limit" in mask.to_string(limit=1)
    coarse = mask.to_string(grid_size=2)
    assert "░" in coarse and len(coarse.splitlines()[1]) == 4
    assert len(mask.to_string(-1).splitlines()[1]) == len(mask.to_string((20, 20)).splitlines()[1]) == 14
    assert str(mask).startswith("BlockMask(shape=(1, 2, 444, 444), sparsity=")
    assert "mask_mod=<lambda>" in repr(mask) and "BLOCK_SIZE=(64, 64)" in repr(mask)


# Torch.


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def theirs(torch: Any) -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


@pytest.fixture(scope="module")
def twt(torch: Any) -> Any:
    import tilewise.torch

    return tilewise.torch


def same(torch: Any, mine: Any, other: Any) -> None:
    assert mine.shape == other.shape and mine.BLOCK_SIZE == other.BLOCK_SIZE
    assert mine.sparsity() == other.sparsity() and mine.numel() == other.numel()
    assert torch.equal(mine.to_dense(), other.to_dense()) and mine.to_dense().dtype == other.to_dense().dtype
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, theirs = getattr(mine, f"{name}_num_blocks"), getattr(other, f"{name}_num_blocks")
        assert (counts is None) == (theirs is None)
        if counts is not None:
            assert counts.dtype == theirs.dtype and torch.equal(counts, theirs)
            indices, others = getattr(mine, f"{name}_indices"), getattr(other, f"{name}_indices")
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert indices.shape == others.shape and torch.equal(indices[used], others[used])
    limit = 10**6
    assert mine.to_string((4, 5), limit) == other.to_string((4, 5), limit)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("queries", "keys", "block"), SIZES[:3])
def test_torch_makes_the_same_blocks(
    name: str, queries: int, keys: int, block: Any, torch: Any, theirs: Any, twt: Any
) -> None:
    mine = twt.create_block_mask(MASKS[name], 2, 3, queries, keys, "cpu", block)
    other = theirs.create_block_mask(MASKS[name], 2, 3, queries, keys, "cpu", block)
    same(torch, mine, other)
    assert len(mine.as_tuple()) == len(other.as_tuple())
    assert mine.as_tuple(False)[0] == other.as_tuple(False)[0] == (queries, keys)
    assert mine.as_tuple()[-3:-1] == other.as_tuple()[-3:-1] and callable(mine.as_tuple()[-1])
    assert torch.equal(twt.create_mask(MASKS[name], 2, 3, queries, keys, "cpu"),
                       theirs.create_mask(MASKS[name], 2, 3, queries, keys, "cpu"))  # fmt: skip
    for index in (0, -1, (1, 2), (slice(None), slice(None), 0), (slice(None), slice(1, 3)),
                  (slice(None), slice(None), slice(0, None, 2)),
                  (slice(None), slice(None), torch.tensor([1, 0])), (slice(None), [0, 2])):  # fmt: skip
        same(torch, mine[index], other[index])
    same(torch, mine._adjust(queries // 2, keys // 2), other._adjust(queries // 2, keys // 2))
    same(torch, mine.to("cpu"), other.to("cpu"))


def test_no_rows_are_a_mask_too(twt: Any) -> None:
    mask = twt.create_block_mask(MASKS["causal"], 1, 1, 100, 100, "cpu", 32)[:, :, 2:2]
    assert mask.shape == (1, 1, 0, 100) and mask.sparsity() == 0.0 and mask.to_dense().shape == (1, 1, 0, 4)


def test_torchs_own_masks_are_taken_as_they_are(torch: Any, theirs: Any, twt: Any) -> None:
    from tilewise.torch.attention.blocks import coerce

    ids = torch.from_numpy(DOCUMENT)
    other = theirs.create_block_mask(lambda b, h, q, k: ids[q] == ids[k], 1, 1, 444, 444, "cpu", 64)
    mine = coerce(other)
    assert mine.kv_indices is other.kv_indices and mine.q_indices is other.q_indices
    assert mine.mod.captures[0] is ids and str(mine.mod) == "ids[q] == ids[k]"
    same(torch, mine, other)
    assert coerce(None) is None and coerce(mine) is mine
    # Without a mask_mod, without transposes, and sliced.
    assert (
        str(coerce(theirs.BlockMask.from_kv_blocks(other.kv_num_blocks, other.kv_indices, BLOCK_SIZE=64)).mod) == "True"
    )
    bare = theirs.BlockMask.from_kv_blocks(other.kv_num_blocks, other.kv_indices, compute_q_blocks=False)
    assert coerce(bare).kv_num_blocks is other.kv_num_blocks
    with pytest.raises(ArgumentError, match="sliced BlockMask is gone"):
        _ = coerce(other[0]).mod
    # The NumPy floor's.
    numpy_mask = create_block_mask(MASKS["documents"], None, None, 444, 444, 64)
    assert torch.equal(coerce(numpy_mask).kv_indices, torch.from_numpy(numpy_mask.kv_indices.copy()))
    assert coerce(numpy_mask).mod.program == numpy_mask.mod.program
    assert all(isinstance(one, torch.Tensor) for one in coerce(numpy_mask).mod.captures)
    with pytest.raises(ArgumentError, match="make the mask once by create_block_mask"):
        coerce(MASKS["causal"])
    with pytest.raises(TypeError, match="expected a BlockMask"):
        coerce(torch.ones(3))


def test_lists_of_blocks_from_torch(torch: Any, theirs: Any, twt: Any) -> None:
    counts = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[2, 9, 9], [0, 2, 9], [9, 9, 9]]]], dtype=torch.int32)  # 9: never looked at
    mine = twt.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(4, 8))
    clean = torch.where(indices == 9, 0, indices)
    other = theirs.BlockMask.from_kv_blocks(counts, clean, BLOCK_SIZE=(4, 8))
    assert mine.seq_lengths == other.seq_lengths == (12, 24)
    same(torch, mine, theirs.BlockMask.from_kv_blocks(counts, clean, BLOCK_SIZE=(4, 8)))
    without = twt.BlockMask.from_kv_blocks(counts, clean, BLOCK_SIZE=4, compute_q_blocks=False)
    assert without.q_indices is None and without.q_num_blocks is None
    assert without[0].q_indices is None and without.to("cpu").q_indices is None
    with pytest.raises(ArgumentError, match="expected columns from 0 to 2, got 0 to 7"):
        twt.BlockMask.from_kv_blocks(counts, torch.where(clean == 2, 7, clean))
    with pytest.raises(TypeError, match="expected an array of this floor"):
        twt.BlockMask.from_kv_blocks(counts.numpy(), indices.numpy())


def test_mods_stand_for_mask_mods(torch: Any, twt: Any) -> None:
    mod = expr.trace(MASKS["documents"])
    mine = twt.create_block_mask(mod, 1, 1, 444, 444, "cpu", 64)
    same(torch, mine, twt.create_block_mask(MASKS["documents"], 1, 1, 444, 444, "cpu", 64))
    assert mine.mod.program == mod.program and torch.is_tensor(mine.mod.captures[0])
    assert torch.equal(
        twt.create_mask(mod, 1, 1, 444, 444, "cpu"), twt.create_mask(MASKS["documents"], 1, 1, 444, 444, "cpu")
    )


def test_captures_may_change_between_masks(torch: Any, twt: Any) -> None:
    ids = torch.zeros(64, dtype=torch.int32)
    mask_mod = lambda b, h, q, k: ids[q] == ids[k]  # noqa: E731
    assert twt.create_block_mask(mask_mod, 1, 1, 64, 64, "cpu", 16).sparsity() == 0
    ids[32:] = 1
    assert twt.create_block_mask(mask_mod, 1, 1, 64, 64, "cpu", 16).sparsity() == 50


def test_short_captures_are_refused(torch: Any, twt: Any) -> None:
    ids = torch.arange(60, dtype=torch.int32) // 7
    for make in (twt.create_block_mask, twt.create_mask):
        with pytest.raises(ArgumentError, match=r"indices of ids below 60 on axis 0, got 60 in ids\[query\]"):
            make(lambda b, h, q, k: ids[q] == ids[k], 1, 1, 64, 64, "cpu")


def test_memory_and_time_grow_with_blocks(torch: Any, twt: Any, capsys: Any) -> None:
    """Causal documents at 131072 tokens: torch would build 17 GB. Times are printed, bounds are generous."""
    length = 131072
    ids = torch.arange(length, dtype=torch.int32) // 512
    mask_mod = lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)  # noqa: E731
    twt.create_block_mask(mask_mod, None, None, 1024, 1024, "cpu")
    tracemalloc.start()
    start = time.perf_counter()
    mask = twt.create_block_mask(mask_mod, None, None, length, length, "cpu")
    took = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mask.kv_num_blocks.sum() == 1024 and mask.full_kv_num_blocks.sum() == 256 * 6
    assert peak < 100e6
    assert took < 5
    with capsys.disabled():
        print(f"\ncreate_block_mask at {length}: {took * 1e3:.1f} ms, {peak / 1e6:.0f} MB", end=" ")
