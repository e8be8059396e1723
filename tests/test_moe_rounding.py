"""Token rounding: every rule against plain loops, its invariants, its edge cases, and its gradients.

The numbers of invariants and adversarial groups are those of the project's list for mixtures of experts.
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise.torch as twt
from tilewise import _core, reference
from tilewise.errors import ArgumentError, UnsupportedError
from tilewise.moe import Routing, round_tokens, route
from tilewise.testing import force_isa, force_threads, layouts, levels, normal

RULES: list[Any] = list(reference.moe.RULES)


def coins(seed: int, step: int, experts: int) -> list[float]:
    return [_core.uniform(seed, expert, step, "round") for expert in range(experts)]


def problem(tokens: int, experts: int, k: int, dtype: Any = np.float32, *, seed: int = 0, skew: float = 0.0) -> Any:
    """Softmax scores (all in (0, 1)) and the k chosen experts of each token; `skew` makes low experts popular."""
    logits = normal((tokens, experts), np.float64, seed=seed) - skew * np.log1p(np.arange(experts))
    p = np.exp(logits)
    scores = (p / p.sum(axis=1, keepdims=True)).astype(dtype)
    return scores, route(scores, k)[0] if tokens else np.zeros((0, k), np.int32)


def check(scores: Any, ids: Any, weights: Any = None, *, tile: int, rule: Any, seed: int = 3, step: int = 5) -> Routing:
    """The routing, after comparing it with the plain loops."""
    got = round_tokens(scores, ids, weights, tile=tile, rule=rule, seed=seed, step=step)
    wide = None if weights is None else weights.astype(np.float64)
    options: dict[str, Any] = {"tile": tile, "rule": rule, "coins": coins(seed, step, scores.shape[1])}
    want = reference.moe.round_tokens(scores.astype(np.float64), ids, wide, **options)
    assert np.array_equal(got.expert_ids, want[0])
    assert np.array_equal(got.token_ids, want[2])
    assert np.array_equal(got.weights, want[1].astype(got.weights.dtype))
    return got


def pairs_of(routing: Routing) -> set[tuple[int, int]]:
    pairs = list(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def chosen_of(ids: np.ndarray, experts: int) -> set[tuple[int, int]]:
    return {(t, int(e)) for t, row in enumerate(ids) for e in row if 0 <= e < experts}


def counts_of(pairs: set[tuple[int, int]], experts: int) -> np.ndarray:
    return np.bincount([e for _, e in pairs] + [experts], minlength=experts + 1)[:experts]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "tile"),
    [(1, 1, 1, 1), (40, 5, 2, 8), (37, 8, 8, 7), (90, 3, 1, 16), (20, 64, 4, 4), (7, 1000, 20, 3), (700, 17, 3, 64)],
)
def test_equals_plain_loops(isa: str, rule: Any, tokens: int, experts: int, k: int, tile: int) -> None:
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):  # in the low ones scores tie
        scores, ids = problem(tokens, experts, k, dtype, seed=tokens, skew=0.5)
        routing = check(scores, ids, tile=tile, rule=rule)
        assert routing.weights.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert routing.expert_ids.dtype == routing.token_ids.dtype == np.int32
        weights = normal(ids.shape, dtype, seed=2)  # of any sign, unrelated to the scores
        check(scores, ids.astype(np.int64), weights, tile=tile, rule=rule)


def test_every_small_case_equals_plain_loops() -> None:
    """All routings of 4 tokens to 1 of 2 experts or neither, all rules and tiles 1 to 5, with tied scores."""
    scores = np.array([[0.5, 0.25], [0.5, 1.0], [0.0, 0.25], [1.0, 0.25]], np.float32)
    for row in itertools.product((-1, 0, 1), repeat=4):
        ids = np.array(row, np.int32)[:, None]
        for rule, tile in itertools.product(RULES, range(1, 6)):
            check(scores, ids, tile=tile, rule=rule)


@settings(max_examples=60)
@given(st.data())
def test_any_case_equals_plain_loops(data: Any) -> None:
    """Few distinct scores, of any sign and infinite, so that ties are everywhere; sentinels among the ids."""
    tokens, experts = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 6))
    k = data.draw(st.integers(0, experts))
    values = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, np.inf])
    scores = np.array(
        data.draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens)),
        np.float32,
    ).reshape(tokens, experts)
    rows = [data.draw(st.permutations(range(-2, experts + 1)))[:k] for _ in range(tokens)]
    ids = np.array(rows, np.int64).reshape(tokens, k)
    rule, tile = data.draw(st.sampled_from(RULES)), data.draw(st.integers(1, 12))
    if rule == "nearest_score":
        scores = np.nan_to_num(scores, posinf=2.0, neginf=-2.0)
    level = data.draw(st.sampled_from(levels()))
    with force_isa(level):
        check(scores, ids, tile=tile, rule=rule, seed=data.draw(st.integers(0, 2**63 - 1)))


@pytest.mark.parametrize("rule", RULES)
def test_invariant_13_counts_are_multiples_of_the_tile(rule: Any) -> None:
    """Each count is a multiple of M within M - 1 of f (M/2 for the nearest); M = 1 changes nothing."""
    scores, ids = problem(1500, 12, 3, skew=1.0)
    before = counts_of(chosen_of(ids, 12), 12)
    for tile in (2, 7, 16, 128):
        counts = round_tokens(scores, ids, tile=tile, rule=rule, seed=1).counts(12)
        assert np.array_equal(counts % tile, np.zeros(12))
        assert np.abs(counts - before).max() <= (tile // 2 if rule == "nearest" else tile - 1)
    same = round_tokens(scores, ids, tile=1, rule=rule, seed=1)
    assert pairs_of(same) == chosen_of(ids, 12)
    even = np.arange(1500 * 2).reshape(1500, 2).astype(np.int32) % 12  # 250 each
    assert pairs_of(round_tokens(scores, even, tile=125, rule=rule, seed=1)) == chosen_of(even, 12)


def test_half_a_tile_goes_down() -> None:
    """Invariant 13, the tie: the paper's rule is strict (a peer's code rounds half to even)."""
    scores = np.ones((400, 2), np.float32)
    for count, want in ((64, 0), (65, 128), (192, 128), (193, 256), (320, 256)):
        ids = np.full((400, 1), -1, np.int32)
        ids[:count] = 0
        assert round_tokens(scores, ids, tile=128).counts(2).tolist() == [want, 0]


@pytest.mark.parametrize("tile", [4, 32, 100])
def test_invariant_14_down_is_a_subset_and_up_a_superset(tile: int) -> None:
    """Dropped pairs score at most what kept ones do, fills at least what tokens that were left out do."""
    scores, ids = problem(600, 10, 2, skew=1.0)
    chosen = chosen_of(ids, 10)
    down, up = (pairs_of(round_tokens(scores, ids, tile=tile, rule=rule)) for rule in ("down", "up"))
    assert down < chosen < up
    for expert in range(10):
        score = scores[:, expert]
        kept = [score[t] for t, e in down if e == expert]
        lost = [score[t] for t, e in chosen - down if e == expert]
        if kept and lost:
            assert max(lost) <= min(kept)
        filled = {t for t, e in up - chosen if e == expert}
        others = [score[t] for t in range(600) if (t, expert) not in up]
        if filled and others:
            assert min(score[t] for t in filled) >= max(others)


def test_invariant_15_stochastic_counts_have_the_right_mean() -> None:
    scores, ids = problem(90, 6, 2, skew=0.5)
    before = counts_of(chosen_of(ids, 6), 6)
    steps = 2000
    counts = np.array(
        [round_tokens(scores, ids, tile=32, rule="stochastic", seed=7, step=s).counts(6) for s in range(steps)]
    )
    # Six standard errors of a Bernoulli variable of the tile's size, at most half a tile each.
    assert np.abs(counts.mean(axis=0) - before).max() < 6 * 16 / np.sqrt(steps)


@pytest.mark.parametrize("tile", [8, 50, 128])
def test_invariant_15_balance_keeps_the_number_of_pairs(tile: int) -> None:
    """Total drift at most M/2, and 0 if M divides T K. An expert alone may move by more than M/2, never by M."""
    worst = 0
    for seed in range(20):
        scores, ids = problem(800, 30, 4, seed=seed)
        before = counts_of(chosen_of(ids, 30), 30)
        counts = round_tokens(scores, ids, tile=tile, rule="balance").counts(30)
        drift = counts.sum() - 3200
        assert abs(drift) <= tile / 2
        if 3200 % tile == 0:
            assert drift == 0
        worst = max(worst, int(np.abs(counts - before).max()))
    assert tile / 2 < worst < tile


@pytest.mark.parametrize("rule", ["stochastic", "nearest_score"])
def test_invariant_15_a_seed_is_reproducible(rule: Any) -> None:
    scores, ids = problem(200, 16, 2)
    draws = {}
    for seed, step in itertools.product(range(3), range(3)):
        first, again = (round_tokens(scores, ids, tile=16, rule=rule, seed=seed, step=step) for _ in range(2))
        assert pairs_of(first) == pairs_of(again)
        draws[seed, step] = frozenset(pairs_of(first))
    assert len(set(draws.values())) > 6  # seeds and steps differ; few experts may agree by chance


@pytest.mark.parametrize("rule", RULES)
def test_invariant_16_no_expert_drops_and_fills(rule: Any) -> None:
    """Each pair occurs once, token ids ascend, and within a token the experts do."""
    scores, ids = problem(500, 9, 3, skew=0.7)
    routing = round_tokens(scores, ids, tile=64, rule=rule, seed=11)
    pairs, chosen = pairs_of(routing), chosen_of(ids, 9)
    for expert in range(9):
        assert not ({t for t, e in chosen - pairs if e == expert} and {t for t, e in pairs - chosen if e == expert})
    assert (np.diff(routing.token_ids) >= 0).all()
    key = routing.token_ids.astype(np.int64) * 9 + routing.expert_ids
    assert (np.diff(key) > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_invariant_7_bits_do_not_depend_on_threads_or_layout(isa: str, rule: Any) -> None:
    scores, ids = problem(3000, 40, 4, ml_dtypes.bfloat16)  # bfloat16: many ties
    weights = normal(ids.shape, seed=4)
    want = round_tokens(scores, ids, weights, tile=32, rule=rule, seed=5)
    for threads in (1, 2, 5):
        with force_threads(threads):
            got = round_tokens(scores, ids, weights, tile=32, rule=rule, seed=5)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    for (name, a), (_, b), (_, c) in zip(layouts(scores), layouts(ids), layouts(weights)):
        got = round_tokens(a, b, c, tile=32, rule=rule, seed=5)
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True)), name


def test_invariant_6_counts_add_up() -> None:
    """Counts of a routing, from slots and from pairs, with sentinels left out; padded rows."""
    ids = np.array([[0, 2], [2, -1], [5, 2]], np.int32)
    for kind in (np.asarray, torch.from_numpy):
        routing = Routing.from_slots(kind(ids), kind(np.ones((3, 2), np.float32)))
        assert routing.token_ids.tolist() == [0, 0, 1, 1, 2, 2]
        assert routing.counts(4).tolist() == [1, 0, 3, 0]
        assert routing.counts(6).sum() == 5
        assert [routing.padded_rows(4, tile) for tile in (1, 2, 3, 4)] == [0, 2, 2, 4]
        assert type(routing.counts(4)) is type(routing.expert_ids)


def test_ranking_is_chosen_first_then_score_then_token(isa: str) -> None:
    """Adversarial groups 5 and 6: saturated sigmoids; a chosen score of 0 ranks before a score of 1 not chosen."""
    scores = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], np.float32)
    ids = np.array([[0], [1], [1], [1]], np.int32)
    up = round_tokens(scores, ids, tile=2, rule="up")  # expert 0: its own token 0, then the first of score 1
    assert up.token_ids[up.expert_ids == 0].tolist() == [0, 1]
    assert up.token_ids[up.expert_ids == 1].tolist() == [0, 1, 2, 3]
    down = round_tokens(scores, ids, tile=2, rule="down")
    assert pairs_of(down) == {(1, 1), (2, 1)}  # of equal scores the last token goes
    logits = np.full((64, 2), 40.0, np.float32)  # every sigmoid is 1.0
    chosen, weights = route(logits, 1, scoring="sigmoid")
    full = round_tokens(1 / (1 + np.exp(-logits)), chosen, weights, tile=48, rule="nearest")
    assert full.token_ids.tolist() == list(range(48))
    for value in (0.0, -3.0, 7.5):
        check(np.full((50, 3), value, np.float32), np.arange(50)[:, None] % 2, tile=16, rule="nearest")


@pytest.mark.parametrize("rule", RULES)
def test_adversarial_13_small_batches(rule: Any) -> None:
    """T < M, M > T with UP, T not a multiple of M, T K / E < M / 2."""
    scores, ids = problem(10, 4, 2)
    before = counts_of(chosen_of(ids, 4), 4)
    counts = check(scores, ids, tile=128, rule=rule).counts(4)
    if rule in ("nearest", "down"):
        assert counts.tolist() == [0, 0, 0, 0]  # every expert is emptied
    if rule == "up":
        assert np.array_equal(counts, np.where(before > 0, 10, 0))  # clipped to T; empty experts stay empty
    assert set(counts.tolist()) <= {0, 10}
    ids = np.full((10, 1), 2, np.int32)  # f = T = 10
    counts = check(scores, ids, tile=8, rule=rule).counts(4)
    assert counts[2] in (8, 10) and counts.sum() == counts[2]
    empty = check(np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int32), tile=4, rule=rule)
    assert len(empty.expert_ids) == len(empty.weights) == len(empty.token_ids) == 0
    check(scores, np.zeros((10, 0), np.int32), tile=4, rule=rule)  # no slots
    check(scores, np.full((10, 2), [-1, 9], np.int32), tile=4, rule=rule)  # sentinels only
    check(np.zeros((3, 0), np.float32), np.full((3, 1), -1, np.int32), tile=4, rule=rule)  # no experts


def test_adversarial_2_around_one_tile() -> None:
    scores = normal((600, 3), seed=1)
    for count in (1, 127, 128, 129, 600):
        ids = np.full((600, 1), -1, np.int32)
        ids[:count] = 1
        for rule in RULES:
            check(scores, ids, tile=128, rule=rule)


def test_a_token_may_end_with_no_expert_or_with_all() -> None:
    """Adversarial group 8."""
    scores = np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]], np.float32)
    ids = np.array([[-1], [0]], np.int32)
    assert round_tokens(scores, ids, tile=2, rule="down").token_ids.tolist() == []
    all_of_them = round_tokens(scores, np.array([[0, 1], [2, -1]], np.int32), tile=2, rule="up")
    assert all_of_them.token_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_weighing_conventions(isa: str) -> None:
    """Raw scores, the router's weights for chosen pairs, and weights that add up to 1 for every token."""
    logits = normal((300, 10), seed=8)
    ids, weights = route(logits, 3)
    p = np.exp(logits)
    scores = p / p.sum(axis=1, keepdims=True)
    raw = round_tokens(scores, ids, tile=32, rule="up")
    assert np.array_equal(raw.weights, scores[raw.token_ids, raw.expert_ids])
    mixed = round_tokens(scores, ids, weights, tile=32, rule="up")
    slot = {(t, int(e)): w for t in range(300) for e, w in zip(ids[t], weights[t], strict=True)}
    want = [
        slot.get((t, e), scores[t, e]) for t, e in zip(mixed.token_ids.tolist(), mixed.expert_ids.tolist(), strict=True)
    ]
    assert np.array_equal(mixed.weights, np.array(want, np.float32))
    for given_weights in (None, weights):
        even = round_tokens(scores, ids, given_weights, tile=32, renormalise=True)
        total = np.bincount(even.token_ids, even.weights.astype(np.float64))
        assert np.allclose(total[total > 0], 1, rtol=1e-6)
        plain = round_tokens(scores, ids, given_weights, tile=32)
        sums = np.bincount(plain.token_ids, plain.weights.astype(np.float64))
        assert np.allclose(even.weights, plain.weights / sums[plain.token_ids], rtol=1e-6)
    zero = round_tokens(np.zeros((4, 1), np.float32), np.zeros((4, 1), np.int32), tile=4, renormalise=True)
    assert zero.weights.tolist() == [0, 0, 0, 0]  # nothing to share out


def test_padding_falls_from_an_eighth_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A uniform router with 512 rows an expert on average, tiles of 128: the padded rows a grouped product adds."""
    tokens, experts, k, tile = 16384, 256, 8, 128
    ids, weights = route(normal((tokens, experts), seed=1), k)
    scores = normal((tokens, experts), seed=1)
    before = Routing.from_slots(ids, weights)
    after = round_tokens(scores, ids, tile=tile)
    rows = tokens * k
    waste = before.padded_rows(experts, tile) / rows, after.padded_rows(experts, tile) / len(after.expert_ids)
    drift = len(after.expert_ids) / rows - 1
    with capsys.disabled():
        print(f"\npadded rows: {waste[0]:.1%}, after token rounding {waste[1]:.1%} (pairs {drift:+.2%})")
    assert 0.11 < waste[0] < 0.14 and waste[1] == 0
    assert abs(drift) < 0.02


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rule", ["up", "down", "nearest"])
def test_gradcheck(rule: Any, weighed: bool, renormalise: bool) -> None:
    """dW flows to every kept pair's own number, fills included; dropped pairs get exactly 0."""
    torch.manual_seed(1)
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"tile": 5, "rule": rule, "renormalise": renormalise}

    def through_the_router(logits: torch.Tensor) -> torch.Tensor:
        ids, weights = twt.moe.route(logits, 2)
        return twt.moe.round_tokens(logits.softmax(-1), ids, weights if weighed else None, **options).weights

    assert torch.autograd.gradcheck(through_the_router, logits)
    ids, _ = twt.moe.route(logits, 2)
    scores, weights = torch.rand(12, 4).double().requires_grad_(), torch.rand(12, 2).double().requires_grad_()
    inputs = (scores, ids, weights if weighed else None)
    assert torch.autograd.gradcheck(lambda s, i, w: twt.moe.round_tokens(s, i, w, **options).weights, inputs)  # type: ignore[arg-type]
    routing = twt.moe.round_tokens(*inputs, **options)
    (routing.weights * torch.randn(len(routing.weights))).sum().backward()
    kept = torch.zeros(12, 4).bool()
    kept[routing.token_ids.long(), routing.expert_ids.long()] = True
    assert scores.grad is not None and torch.equal(scores.grad[~kept], torch.zeros_like(scores.grad[~kept]))
    if weighed:
        assert weights.grad is not None
        dropped = ~kept.gather(1, ids.long())
        assert torch.equal(weights.grad[dropped], torch.zeros_like(weights.grad[dropped]))
        assert torch.equal(scores.grad.gather(1, ids.long()), torch.zeros(12, 2).double())  # weights stand in for them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_in_low_precision_are_rounded_once(dtype: torch.dtype) -> None:
    scores, weights = torch.rand(40, 6).to(dtype), torch.rand(40, 2).to(dtype)
    ids, _ = twt.moe.route(scores, 2)
    grads = []
    for kind in (dtype, torch.float64):
        s, w = scores.to(kind, copy=True).requires_grad_(), weights.to(kind, copy=True).requires_grad_()
        routing = twt.moe.round_tokens(s, ids, w, tile=8, renormalise=True)
        torch.manual_seed(0)
        routing.weights.backward(torch.randn(len(routing.weights)).to(routing.weights.dtype))
        grads.append((s.grad, w.grad))
    for low, high in zip(*grads, strict=True):
        assert low.dtype == dtype and torch.equal(low, high.to(dtype))


def test_a_second_derivative_is_refused_by_name() -> None:
    scores = torch.rand(20, 4, requires_grad=True)
    ids, _ = twt.moe.route(scores.detach(), 2)
    weights = twt.moe.round_tokens(scores, ids, tile=4, renormalise=True).weights
    (grad,) = torch.autograd.grad(weights.square().sum(), scores, create_graph=True)
    with pytest.raises(UnsupportedError, match="moe_round_tokens: its gradient"):
        grad.sum().backward()


def test_torch_equals_numpy_and_traces(isa: str) -> None:
    scores, ids = problem(200, 8, 2)
    weights = normal(ids.shape, seed=1)
    s, i, w = (torch.from_numpy(a) for a in (scores, ids, weights))
    for rule in RULES:
        want = round_tokens(scores, ids, weights, tile=16, rule=rule, renormalise=True, seed=2, step=9)
        got = twt.moe.round_tokens(s, i, w, tile=16, rule=rule, renormalise=True, seed=2, step=9)
        assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
    op = torch.ops.tilewise.moe_round_tokens.default
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    for given_weights in (None, w):
        torch.library.opcheck(op, (s, i, given_weights, 16, "nearest", True, 0, 0), test_utils=kinds)
        args = (s.clone().requires_grad_(), i, given_weights, 16, "nearest", False, 0, 0)
        torch.library.opcheck(op, args, test_utils=kinds)
        outputs = op(s, i, given_weights, 16, "nearest", True, 0, 0)
        args = (torch.ones_like(outputs[1]), s, given_weights, outputs[0], outputs[2], outputs[3], True)
        torch.library.opcheck(torch.ops.tilewise.moe_round_tokens_backward.default, args)


def test_compiled_with_gradients() -> None:
    def loss(logits: torch.Tensor, step: int) -> torch.Tensor:
        ids, weights = twt.moe.route(logits, 2)
        routing = twt.moe.round_tokens(logits.softmax(-1), ids, weights, tile=16, rule="stochastic", seed=1, step=step)
        return (routing.weights * (1 + routing.expert_ids)).sum() + routing.token_ids.sum()

    torch._dynamo.reset()
    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # type: ignore[attr-defined]
        for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            for step in (0, 1, 2):
                torch.manual_seed(step)
                logits = torch.randn(100, 6, requires_grad=True)
                value = run(logits, step)
                value.backward()
                assert logits.grad is not None
                results.append((value.detach(), logits.grad))
    for eager, compiled in zip(results[:3], results[3:], strict=True):
        assert torch.allclose(eager[0], compiled[0]) and torch.allclose(eager[1], compiled[1], atol=1e-6)


def test_bad_places_are_named() -> None:
    """Adversarial groups 7 and 16: an expert twice, NaN in either array."""
    scores, ids = problem(3000, 30, 2)
    twice = ids.copy()
    twice[[2999, 7]] = 4
    with pytest.raises(ArgumentError, match="expert 4 twice at token 7"):
        round_tokens(scores, twice, tile=4)
    for rule in RULES:
        bad = scores.copy()
        bad[[2500, 1700], 29] = np.nan
        with pytest.raises(ArgumentError, match="scores: expected numbers, got NaN at token 1700, expert 29"):
            round_tokens(bad, ids, tile=4, rule=rule, seed=1)
        weights = np.ones(ids.shape)
        weights[[2500, 1700], 1] = np.nan
        with pytest.raises(ArgumentError, match="weights: expected numbers, got NaN at token 1700, slot 1"):
            round_tokens(scores, ids, weights, tile=4, rule=rule, seed=1)
    masked = np.where(ids == ids[0, 0], -1, ids).astype(np.int32)
    weights = np.where(masked < 0, np.nan, 1.0)
    round_tokens(scores, masked, weights, tile=4)  # the weight of a sentinel is not read
