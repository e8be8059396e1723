"""flash_attn_with_kvcache against the plain functions: append, rotary, rows, left padding, pages, splits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewise.torch as twt
from tilewise.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread
BATCH, HEADS, KEY_HEADS, ROOM, DIM = 3, 4, 2, 24, 16


def rotate(x: Tensor, positions: Tensor, interleaved: bool, width: int) -> Tensor:
    """Rotary embedding by complex multiplication: ``x [S, H, D]`` at `positions`, the first `width` features."""
    angle = positions[:, None].double() * 10.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    part = x[..., :width].double()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)


def tables(width: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(64)[:, None].double() * 10.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64)
    return angle.cos(), angle.sin()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["plain", "rows", "leftpad", "pages"])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (5, 0)}, {"causal": True, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("new", [1, 4])
def test_append_rotate_attend(layout: str, rotary: str | None, options: dict[str, Any], new: int) -> None:
    lengths = [0, 7, 20]
    cache = [draw(BATCH + 2, ROOM, KEY_HEADS, DIM, seed=at) for at in range(2)]
    q, k, v = (draw(BATCH, new, heads, DIM, seed=5 + at) for at, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS)))
    rows, begins = list(range(BATCH)), [0] * BATCH
    given: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    stored = [x.clone() for x in cache]
    if layout in ("rows", "leftpad"):
        rows = [4, 0, 2]
        given["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    else:
        stored = [x[:BATCH] for x in stored]
    if layout == "leftpad":
        begins = [0, 3, 11]
        given["cache_leftpad"] = torch.tensor(begins, dtype=torch.int32)
    if layout == "pages":
        size, order = 5, torch.randperm(15, generator=torch.Generator().manual_seed(0))
        table = order.view(BATCH, 5).int()
        pages = [torch.full((15, size, KEY_HEADS, DIM), torch.nan, dtype=torch.float64) for _ in range(2)]
        for memory, x in zip(pages, cache, strict=True):
            for row in range(BATCH):
                for at in range(lengths[row]):
                    memory[table[row, at // size], at % size] = x[row, at]
        stored, given["block_table"] = pages, table
    if rotary:
        given |= dict(zip(("rotary_cos", "rotary_sin"), tables(8), strict=True))
        given["rotary_interleaved"] = rotary == "interleaved"
    out, lse = twt.flash_attn_with_kvcache(q, *stored, k, v, **given, **options, return_softmax_lse=True)
    assert lse.shape == (BATCH, HEADS, new)
    for at in range(BATCH):
        positions = lengths[at] + torch.arange(new)
        one_q, one_k = q[at], k[at]
        if rotary:
            moving = bool(options)  # without causality and window, all queries stand at the first new position
            one_q = rotate(one_q, positions if moving else positions[:1].expand(new), rotary == "interleaved", 8)
            one_k = rotate(one_k, positions, rotary == "interleaved", 8)
        keys = torch.cat([cache[0][rows[at], begins[at] : lengths[at]], one_k])
        values = torch.cat([cache[1][rows[at], begins[at] : lengths[at]], v[at]])
        want, want_lse, _ = twt.flash_attn_func(
            one_q[None], keys[None], values[None], return_attn_probs=True, **options
        )
        assert torch.allclose(out[at], want[0], rtol=1e-11, atol=1e-13)
        assert torch.allclose(lse[at], want_lse[0], rtol=1e-12)
        for memory, x in zip(stored, (one_k, v[at]), strict=True):
            for step in range(new):
                place = lengths[at] + step
                if layout == "pages":
                    found = memory[given["block_table"][at, place // 5], place % 5]
                else:
                    found = memory[rows[at], place]
                assert torch.allclose(found, x[step], rtol=1e-12, atol=1e-14)
    if layout != "pages":  # nothing else was written
        for memory, x in zip(stored, cache, strict=True):
            changed = (memory != x[: len(memory)]).flatten(2).any(-1)
            want = torch.zeros_like(changed)
            for at in range(BATCH):
                want[rows[at], lengths[at] : lengths[at] + new] = True
            assert torch.equal(changed, want)


@pytest.mark.parametrize("splits", [0, 1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_without_appending(isa: str, splits: int, dtype: torch.dtype) -> None:
    cache = [draw(2, 700, KEY_HEADS, DIM, seed=at).to(dtype) for at in range(2)]
    q = draw(2, 1, HEADS, DIM, seed=4).to(dtype)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
    for lengths in (None, 650, torch.tensor([1, 699])):
        got = twt.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, num_splits=splits, alibi_slopes=slopes)
        counts = [700, 700] if lengths is None else torch.as_tensor(lengths).expand(2).tolist()
        for at, count in enumerate(counts):
            parts = (x[at : at + 1, :count] for x in cache)
            want = twt.flash_attn_func(q[at : at + 1], *parts, alibi_slopes=slopes)
            assert torch.allclose(got[at : at + 1].float(), want.float(), atol=2e-6 if dtype == torch.float32 else 2e-2)


def test_decoding_step_by_step_equals_one_pass() -> None:
    q, k, v = (draw(2, 12, heads, DIM, seed=at) for at, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS)))
    cache = [torch.full((2, 12, KEY_HEADS, DIM), torch.nan, dtype=torch.float64) for _ in range(2)]
    want = twt.flash_attn_func(q, k, v, causal=True)
    start = 0
    for count in (5, 1, 1, 3, 2):
        part = slice(start, start + count)
        got = twt.flash_attn_with_kvcache(q[:, part], *cache, k[:, part], v[:, part], cache_seqlens=start, causal=True)
        assert torch.allclose(got, want[:, part], rtol=1e-12, atol=1e-14)
        start += count


def test_group_26_a_decode_row_does_not_depend_on_its_batch() -> None:
    cache = [draw(3, 3000, KEY_HEADS, DIM, seed=at).float() for at in range(2)]
    q = draw(3, 1, HEADS, DIM, seed=4).float()
    lengths = torch.tensor([3000, 10, 1500])
    together = twt.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths)
    for at in range(3):
        alone = twt.flash_attn_with_kvcache(
            q[at : at + 1], *(x[at : at + 1] for x in cache), cache_seqlens=lengths[at : at + 1]
        )
        assert torch.equal(together[at], alone[0])


def test_errors_name_the_argument() -> None:
    cache = [torch.zeros(2, 8, 2, 16) for _ in range(2)]
    q, k = torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 2, 16)
    call = twt.flash_attn_with_kvcache
    with pytest.raises(ArgumentError, match="k and v: expected both"):
        call(q, *cache, k)
    with pytest.raises(ArgumentError, match="cache_seqlens: expected beside k and v"):
        call(q, *cache, k, k)
    with pytest.raises(ShapeError, match=r"9 keys after the append .* do not fit 8"):
        call(q, *cache, k, k, cache_seqlens=8)
    with pytest.raises(ShapeError, match=r"cache_seqlens: expected \[2\], got \[3\]"):
        call(q, *cache, cache_seqlens=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(DtypeError, match="cache_seqlens: expected int32 or int64"):
        call(q, *cache, cache_seqlens=torch.zeros(2))
    with pytest.raises(ArgumentError, match="rotary_cos and rotary_sin"):
        call(q, *cache, rotary_cos=torch.zeros(8, 4), rotary_sin=torch.zeros(8, 4))
    with pytest.raises(ShapeError, match="rotary_cos: 4 positions, and position 5 is needed"):
        call(q, *cache, k, k, torch.zeros(4, 4), torch.zeros(4, 4), cache_seqlens=5)
    with pytest.raises(ShapeError, match=r"k_cache: expected 2 rows as in q"):
        call(q, *(x[:1] for x in cache))
    with pytest.raises(ShapeError, match="cache_batch_idx: expected rows from 0 to 1"):
        call(q, *cache, k, k, cache_seqlens=1, cache_batch_idx=torch.tensor([0, 2]))
    with pytest.raises(UnsupportedError, match="pages cannot be combined with cache_batch_idx"):
        call(q, *cache, block_table=torch.zeros(2, 1, dtype=torch.int32), cache_batch_idx=torch.tensor([0, 1]))
    with pytest.raises(UnsupportedError, match="q requires a gradient and there is no backward"):
        call(q.requires_grad_(), *cache)
    with torch.no_grad():
        assert call(q, *cache).shape == q.shape
