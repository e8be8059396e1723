"""Pairs sorted by expert: on the GPU, and the same kernels emulated on a CPU, against NumPy's stable sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_emulator import Place
from tilewise.cuda import moe
from tilewise.cuda.launch import describe
from tilewise.cuda.moe import sorting
from tilewise.cuda.moe.sorting import TILE, plan
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError


def check(place: Place, ids: np.ndarray, experts: int, token_ids: np.ndarray | None = None, tokens: int = 0) -> None:
    """Every array of the plan, against a stable sort; what is padding is checked as well."""
    flat = ids.reshape(-1).astype(np.int64)
    owner = np.arange(ids.size) // ids.shape[1] if token_ids is None else token_ids.astype(np.int64)
    count = ids.shape[0] if token_ids is None else tokens
    valid = (flat >= 0) & (flat < experts) & (owner >= 0) & (owner < count)
    pairs = np.flatnonzero(valid)
    pairs = pairs[np.argsort(flat[pairs], kind="stable")]
    counts = np.bincount(flat[pairs], minlength=experts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    padding = [-1] * (ids.size - pairs.size)
    rows = np.full(ids.size, -1)
    rows[pairs] = np.arange(pairs.size)

    given = None if token_ids is None else place.put(token_ids)
    got = moe.metadata(place.put(ids), experts, token_ids=given, tokens=None if given is None else tokens)
    for array in got[:4]:
        assert place.get(array).dtype == np.int32
    np.testing.assert_array_equal(place.get(got.expert_offsets), offsets)
    np.testing.assert_array_equal(place.get(got.row_pair), [*pairs, *padding])
    np.testing.assert_array_equal(place.get(got.row_token), [*owner[pairs], *padding])
    np.testing.assert_array_equal(place.get(got.pair_row), rows.reshape(ids.shape))
    if token_ids is None:
        assert got.token_starts is None
    else:
        np.testing.assert_array_equal(place.get(got.token_starts), np.searchsorted(owner, np.arange(tokens + 1)))

    made = plan(
        describe("ids", place.put(ids)), None if given is None else describe("token_ids", given), count, experts
    )
    groups = [*counts, ids.size - pairs.size]
    tiles = [(group, tile) for group, size in enumerate(groups) for tile in range(-(-size // TILE))]
    assert made.slots <= ids.size // TILE + min(experts + 1, ids.size)
    schedule = place.get(made.schedule.array).tolist()
    assert len(schedule) == made.slots >= len(tiles)
    assert schedule == [list(tile) for tile in tiles] + [[-1, 0]] * (made.slots - len(tiles))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("tokens", "slots", "experts"),
    [(1, 1, 1), (3, 2, 3), (97, 7, 5), (600, 2, 7), (300, 8, 384), (50, 3, 1000), (300, 1, 5000), (700, 3, 64)],
)
def test_pairs_are_sorted_stably(place: Place, dtype: Any, tokens: int, slots: int, experts: int) -> None:
    generator = np.random.default_rng(tokens)
    check(place, generator.integers(0, experts, size=(tokens, slots)).astype(dtype), experts)
    skewed = np.minimum(generator.zipf(1.2, size=(tokens, slots)) - 1, experts + 2)  # some past the end
    check(place, (skewed - 1).astype(dtype), experts)


def test_one_expert_gets_everything(place: Place) -> None:
    for tokens in (TILE - 1, TILE, TILE + 1, 5 * TILE):
        check(place, np.full((tokens, 1), 2, np.int32), 4)


@pytest.mark.parametrize("experts", [0, 1, 6])
def test_sentinels_and_nothing(place: Place, experts: int) -> None:
    check(place, np.array([[-1, 7], [6, -(2**31)], [2**31 - 1, 9]], np.int32), experts)
    check(place, np.array([[2**32, 2**32 + 1], [-(2**63), 0], [1, 2**63 - 1]], np.int64), experts)
    check(place, np.zeros((0, 3), np.int32), experts)
    check(place, np.zeros((3, 0), np.int32), experts)
    check(place, np.zeros(0, np.int64), experts, np.zeros(0, np.int32), 4)


def test_general_pairs(place: Place) -> None:
    generator = np.random.default_rng(5)
    for tokens, pairs, experts in [(1, 9, 3), (40, 500, 6), (300, 200, 384)]:
        token_ids = np.sort(generator.integers(0, tokens, size=pairs)).astype(np.int32)
        ids = generator.integers(-1, experts + 1, size=pairs)
        for dtype in (np.int32, np.int64):
            check(place, ids.astype(dtype), experts, token_ids, tokens)
    outside = np.array([-5, -1, 0, 0, 3, 4, 2**40], np.int64)  # tokens that are not there: sentinels
    check(place, np.zeros(7, np.int32), 2, outside, 4)


def test_chunks_of_many_steps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_COUNTERS", 64)  # few counters: long chunks
    check(place, np.random.default_rng(0).integers(0, 9, size=(500, 3)).astype(np.int32), 9)


def test_metadata_refuses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = place.put(np.zeros((4, 2), np.int32))
    with pytest.raises(DtypeError, match="expert_ids: expected dtype int32, int64, got float32"):
        moe.metadata(place.put(np.zeros((4, 2), np.float32)), 2)
    with pytest.raises(ShapeError, match=r"expert_ids: expected \[4, slots\], to match x, got shape \(4,\)"):
        moe.metadata(place.put(np.zeros(4, np.int32)), 2)
    with pytest.raises(ShapeError, match=r"token_ids: expected \[pairs\] beside .* got shapes \(3,\) and \(4,\)"):
        moe.metadata(place.put(np.zeros(4, np.int32)), 2, token_ids=place.put(np.zeros(3, np.int32)), tokens=2)
    with pytest.raises(ArgumentError, match="tokens: expected the number of tokens with token_ids"):
        moe.metadata(place.put(np.zeros(4, np.int32)), 2, token_ids=place.put(np.zeros(4, np.int32)))
    with pytest.raises(ArgumentError, match="experts: expected 0 or more, got -1"):
        moe.metadata(ids, -1)
    with pytest.raises(UnsupportedError, match="counted in int32, got 8 pairs of 4 tokens and 2147483647 experts"):
        moe.metadata(ids, 2**31 - 1)


@pytest.mark.gpu
def test_a_large_sort_on_a_gpu(torch_cuda: Any) -> None:
    torch = torch_cuda
    ids = torch.randint(-1, 129, (40960, 8), device="cuda")
    first, second = moe.metadata(ids, 128), moe.metadata(ids, 128)
    valid = (ids >= 0) & (ids < 128)
    order = torch.argsort(torch.where(valid, ids, 128).flatten(), stable=True)[: int(valid.sum())]
    assert torch.equal(first.row_pair[: len(order)].long(), order)
    assert all(torch.equal(one, two) for one, two in zip(first[:4], second[:4], strict=True))
