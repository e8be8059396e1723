"""The pictures: what is drawn are the numbers, files come out equal, and a missing matplotlib is named."""

from __future__ import annotations

import builtins
import io
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tilewise import plot
from tilewise.errors import ArgumentError, MissingExtraError, ShapeError

BEFORE, AFTER = [130, 0, 250, 131], [128, 0, 256, 128]


class Pairs(NamedTuple):
    expert_ids: Any
    weights: Any = None
    token_ids: Any = None


def heights(ax: Any) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


def picture(ax: Any) -> bytes:
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def test_expert_load_draws_the_counts_busiest_first() -> None:
    ax = plot.expert_load(BEFORE, AFTER, tile=128)
    assert heights(ax) == [250, 131, 130, 0, 256, 128, 128, 0]
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"mean 127.8", "before rounding", "after rounding"}
    assert list(ax.lines[0].get_ydata()) == [127.75, 127.75]
    assert all(tick % 128 == 0 for tick in ax.get_yticks())
    assert heights(plot.expert_load(BEFORE)) == [250, 131, 130, 0]
    assert picture(ax)[:4] == b"\x89PNG"


def test_a_routing_and_a_tensor_are_counted() -> None:
    torch = pytest.importorskip("torch")
    ids = torch.tensor([[0, 2], [2, 3], [7, -1]])  # the last two are sentinels
    assert heights(plot.expert_load(Pairs(ids), num_experts=4)) == [2, 1, 1, 0]
    assert heights(plot.expert_load(torch.tensor([1, 2]))) == [2, 1]
    assert plot.padded_share(Pairs(ids.numpy()), 2, num_experts=4) == 2 / 4


def test_padding_draws_shares() -> None:
    ax = plot.padding(BEFORE, AFTER, tiles=(1, 64, 128, 256))
    before, after = ([float(y) for y in line.get_ydata()] for line in ax.lines)
    counts = np.array(BEFORE)
    for tile, share in zip((1, 64, 128, 256), before, strict=True):
        computed = np.ceil(counts / tile).sum() * tile
        assert share == pytest.approx(100 * (computed / counts.sum() - 1))
    assert after[:3] == [0.0, 0.0, 0.0]
    assert after[3] == pytest.approx(100 * (768 / 512 - 1))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "64", "128", "256"]


def test_padding_of_a_uniform_router_is_what_the_paper_counts() -> None:
    """Section 3: M = 128 with a mean of 512 rows an expert pads about 12 % of them; multiples of 128 pad none."""
    random = np.random.default_rng(0)
    counts = random.multinomial(512 * 256, np.full(256, 1 / 256))
    assert plot.padded_share(counts, 128) == pytest.approx(0.122, abs=0.01)
    assert plot.padded_share(np.round(counts / 128) * 128, 128) == 0.0


def test_bars_of_a_benchmark() -> None:
    ax = plot.benchmark({"forward": {"a": 1.0, "b": 3.0}, "both": {"a": 2.0, "b": 5.0}})
    assert [bar.get_width() for bar in ax.patches] == [1.0, 2.0, 3.0, 5.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["forward", "both"]
    assert {text.get_text() for text in ax.texts} >= {"1", "2", "3", "5"}


def test_the_same_numbers_give_the_same_file() -> None:
    assert picture(plot.expert_load(BEFORE, AFTER)) == picture(plot.expert_load(BEFORE, AFTER))
    assert picture(plot.padding(BEFORE)) == picture(plot.padding(BEFORE))


def test_given_axes_are_used_and_nothing_global_changes() -> None:
    import matplotlib
    from matplotlib.figure import Figure

    before = dict(matplotlib.rcParams)
    axes = Figure().subplots(1, 3)
    assert plot.expert_load(BEFORE, ax=axes[0]) is axes[0]
    assert plot.padding(BEFORE, ax=axes[1]) is axes[1]
    assert plot.benchmark({"x": {"a": 1.0}}, ax=axes[2]) is axes[2]
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_drawn_as_nothing() -> None:
    assert heights(plot.expert_load([])) == []
    assert heights(plot.expert_load([0, 0])) == [0, 0]
    assert plot.padded_share([], 8) == plot.padded_share([0], 8) == 0.0


def image(ax: Any) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def test_a_mask_is_drawn_over_its_schedule() -> None:
    ax = plot.mask("causal", 32, 24, 8)
    q, k = np.ogrid[:32, :24]
    full = k // 8 < q // 8
    expected = np.where(full, 3, np.where(q >= k, 2, np.where(k // 8 == q // 8, 1, 0)))
    assert np.array_equal(image(ax), expected)
    assert ax.get_title() == "causal: 9 of 12 blocks, 6 full, 25 % empty"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert picture(ax)[:4] == b"\x89PNG" and picture(ax) == picture(plot.mask("causal", 32, 24, 8))


def test_masks_of_every_kind_are_drawn() -> None:
    from tilewise.attention import create_block_mask
    from tilewise.masks import sliding_window

    causal = image(plot.mask(lambda b, h, q, k: q >= k, 40, 40, 16))
    assert np.array_equal(causal, image(plot.mask(create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 40, 40, 16))))
    by_head = create_block_mask(lambda b, h, q, k: q >= k + h * 16, 1, 3, 64, 64, 16)
    assert not np.array_equal(image(plot.mask(by_head, head=2)), image(plot.mask(by_head)))
    assert plot.mask(sliding_window(3), 9, 9, 4).get_title().startswith("sliding_window(3): ")
    # Many elements: the blocks alone.
    large = plot.mask("causal", 4096, 4096, 128)
    assert image(large).shape == (32, 32) and set(np.unique(image(large))) == {0, 2, 3}
    # What a schedule leaves out is not drawn as kept.
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 32, 32, 8)[:, :, 2:3]
    mask.mask_mod = lambda b, h, q, k: k >= 0
    assert image(plot.mask(mask)).max(0).tolist() == [3] * 16 + [2] * 8 + [0] * 8


def test_torchs_masks_are_drawn() -> None:
    pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    theirs = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 40, 40, "cpu", 16)
    assert np.array_equal(image(plot.mask(theirs)), image(plot.mask("causal", 40, 40, 16)))


def test_every_entry_of_the_catalogue_is_drawn() -> None:
    from tilewise import masks, mods

    for name in masks.EXAMPLES:
        assert image(plot.mask(name)).max() >= 2 > image(plot.mask(name)).min(), name
    for name in mods.EXAMPLES:
        assert image(plot.mod(name, 12, 16)).shape == (12, 16)
    assert image(plot.mod("alibi", 3, 3))[2, 0] == pytest.approx(-0.5)
    assert image(plot.mod(lambda s, b, h, q, k: s * 2 + h, 2, 2, score=1.0, head=3)).tolist() == [[5, 5], [5, 5]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.mask("casual"), ArgumentError, "there is no mask 'casual'"),
        (lambda: plot.mask(lambda b, h, q, k: q >= k), ArgumentError, "give queries and keys"),
        (lambda: plot.mask("natten", 5, 5), ArgumentError, "the example's grid"),
        (lambda: plot.mask("causal", head=-1), ArgumentError, "at least 0"),
        (lambda: plot.mod("alibis"), ArgumentError, "there is no mod 'alibis'"),
        (lambda: plot.mod("alibi", 0, 3), ArgumentError, "at least one query"),
        (lambda: plot.expert_load([[1, 2]]), ShapeError, "expected counts"),
        (lambda: plot.expert_load([1, 2], [1]), ShapeError, "2 experts and after 1"),
        (lambda: plot.expert_load([-1, 2]), ArgumentError, "numbers of rows"),
        (lambda: plot.expert_load([0.5]), ArgumentError, "numbers of rows"),
        (lambda: plot.expert_load(Pairs(np.zeros(2, int))), ArgumentError, "give num_experts"),
        (lambda: plot.padding([1], tiles=()), ArgumentError, "at least one height"),
        (lambda: plot.padding([1], tiles=(0,)), ArgumentError, "at least 1 row"),
        (lambda: plot.benchmark({}), ArgumentError, "at least one case"),
        (lambda: plot.benchmark({"x": {"a": 1.0}, "y": {"b": 1.0}}), ArgumentError, "case 'y'"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'tilewise\[viz\]'"):
        plot.expert_load(BEFORE)
