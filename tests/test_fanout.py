"""What is guessed and how it is kept: fan-out, rank curves, the outcome cache, outcome prediction."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.reference import speculation as reference
from tilewise.speculation import (
    Outcome,
    OutcomeCache,
    RankCurve,
    fan_out_limits,
    geometric_fan_out,
    geometric_miss,
    predict_outcomes,
    token_rank,
    water_filling,
)

# Fan-out


def test_the_closed_form_is_the_papers() -> None:
    """P9, and the worked values of the fact sheet."""
    for a, r, length, budget in itertools.product([0.1, 0.6, 0.8, 0.97], [0.2, 1.0, 3.0], [0, 1, 7], [1.0, 24.0]):
        found = geometric_fan_out(a, r, length, budget)
        np.testing.assert_allclose(found, reference.geometric_fan_out(a, r, length, budget), rtol=0, atol=1e-9)
        uniform = np.full(length + 1, budget / (length + 1))
        assert geometric_miss(a, r, found) <= geometric_miss(a, r, uniform) * (1 + 1e-12)
        weights = reference.capped_geometric(a, length)
        least = (weights ** (1 / (1 + r))).sum() ** (1 + r) / budget**r
        assert math.isclose(geometric_miss(a, r, found), least, rel_tol=1e-12)
    assert round(geometric_miss(0.8, 1.0, geometric_fan_out(0.8, 1.0, 7, 24)), 3) == 0.316
    assert round(geometric_miss(0.6, 1.0, geometric_fan_out(0.6, 1.0, 7, 24)), 3) == 0.261


def test_certain_acceptance_and_certain_refusal_are_limits() -> None:
    """E11: the printed formula divides by zero at a = 1."""
    np.testing.assert_array_equal(geometric_fan_out(1.0, 1.0, 3, 8), [0, 0, 0, 8])
    np.testing.assert_array_equal(geometric_fan_out(0.0, 1.0, 3, 8), [8, 0, 0, 0])
    np.testing.assert_allclose(geometric_fan_out(1 - 1e-14, 1.0, 3, 8), [0, 0, 0, 8], atol=1e-5)
    assert geometric_miss(1.0, 1.0, [0, 0, 0, 8]) == 0.125


def curve_of(ranks: list[int | None], exponent: float = 1.0) -> RankCurve:
    curve = RankCurve(exponent)
    for rank in ranks:
        curve.observe(rank)
    return curve


RANKS = st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=12)
PLACES = st.lists(st.tuples(st.floats(0, 1), RANKS, st.integers(0, 4)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(PLACES)
def test_water_filling_is_the_best_of_all_allocations(places: list[tuple[float, list[int | None], int]]) -> None:
    """P8: integers, exactly the budget, nested, optimal."""
    weights, most = [place[0] for place in places], [place[2] for place in places]
    curves = [curve_of(place[1]) for place in places]
    before = [0] * len(places)
    allocations = list(itertools.product(*(range(count + 1) for count in most)))
    for budget in range(sum(most) + 2):
        found = water_filling(weights, curves, budget, most)
        assert sum(found) == min(budget, sum(most))
        assert all(a <= b for a, b in zip(before, found))
        worth = [
            sum(w * c.hit(f) for w, c, f in zip(weights, curves, allocation))
            for allocation in allocations
            if sum(allocation) == sum(found)
        ]
        assert sum(w * c.hit(f) for w, c, f in zip(weights, curves, found)) > max(worth) - 1e-12
        before = found


def test_hits_never_fall_with_the_budget() -> None:
    """P10, on a fixed trace of logits: the guesses of a smaller budget are among those of a larger."""
    rng = np.random.default_rng(0)
    length, vocabulary = 3, 30
    weights = reference.capped_geometric(0.7, length)
    curves = [curve_of(rng.integers(0, 8, 40).tolist()) for _ in range(length + 1)]
    trace = []
    for _ in range(200):
        logits = rng.normal(size=(length + 1, vocabulary)).round(1)  # with ties
        drafted = np.append(rng.integers(0, vocabulary, length), -1)
        k = int(rng.choice(length + 1, p=weights))
        token = int(rng.choice([t for t in range(vocabulary) if t != drafted[k]]))
        trace.append((logits, drafted, k, token))
    hits = []
    for budget in range(0, 60, 3):
        fan_out = water_filling(weights, curves, budget, fan_out_limits(vocabulary, length))
        hits.append(0)
        for logits, drafted, k, token in trace:
            hit = token in predict_outcomes(logits, fan_out, exclude=drafted)[k]
            assert hit == (0 <= token_rank(logits, token, drafted)[k] < fan_out[k])
            hits[-1] += hit
    assert hits == sorted(hits) and hits[-1] > 3 * max(hits[0], 20)


def test_odd_sizes() -> None:
    """E10: fewer guesses than places, more than tokens, no chain at all."""
    curve = RankCurve(1.0)
    few = water_filling(reference.capped_geometric(0.8, 7), [curve] * 8, 3, fan_out_limits(100, 7))
    assert sum(few) == 3 and few.count(0) == 5
    assert water_filling(reference.capped_geometric(0.5, 2), [curve] * 3, 99, fan_out_limits(2, 2)) == [1, 1, 2]
    assert water_filling([1.0], [curve], 2, fan_out_limits(5, 0)) == [2]
    assert water_filling([], [], 4, []) == []
    assert fan_out_limits(1, 1) == [0, 1]


def test_a_curve_learns_and_forgets() -> None:
    curve = RankCurve(1.0, memory=100)
    assert [curve.hit(f) for f in (0, 1, 3)] == [0.0, 0.5, 0.75]
    for _ in range(1000):
        curve.observe(0)
    assert curve.hit(1) > 0.9 and 95 < curve.observations < 105
    for _ in range(1000):
        curve.observe(-1)
    assert curve.hit(1) < 0.1
    gains = [curve_of([0, 3, 3, 3, 7, None]).gain(f) for f in range(20)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: geometric_fan_out(1.1, 1, 3, 4), ArgumentError, r"acceptance: expected a number in \[0, 1\], got 1.1"),
        (lambda: geometric_fan_out(math.nan, 1, 3, 4), ArgumentError, "acceptance"),
        (lambda: geometric_fan_out(0.5, -1, 3, 4), ArgumentError, "exponent"),
        (lambda: geometric_fan_out(0.5, 1, -3, 4), ArgumentError, "length"),
        (lambda: geometric_fan_out(0.5, 1, 3, math.inf), ArgumentError, "budget"),
        (lambda: geometric_fan_out("a", 1, 3, 4), DtypeError, "acceptance: expected a number, got str"),
        (lambda: geometric_miss(0.5, 1, [-1]), ArgumentError, "fan_out"),
        (lambda: RankCurve(-1), ArgumentError, "exponent"),
        (lambda: RankCurve(memory=0), ArgumentError, "memory"),
        (lambda: RankCurve(prior_weight=math.nan), ArgumentError, "prior_weight"),
        (lambda: RankCurve().observe(-2), ArgumentError, r"rank: expected an integer in \[-1, 2\^63\), got -2"),
        (lambda: RankCurve().hit(1.5), DtypeError, "guesses: expected an integer, got float"),
        (lambda: water_filling([1], [], 3, [2]), ArgumentError, "curves: expected 1, one a weight, got 0"),
        (lambda: water_filling([1], [RankCurve()], 3, []), ArgumentError, "most: expected 1"),
        (lambda: water_filling([1], [None], 3, [1]), DtypeError, "curves: expected RankCurve, got NoneType"),
        (lambda: water_filling([1], [RankCurve()], -3, [1]), ArgumentError, "budget"),
    ],
)
def test_bad_numbers_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Outcome prediction


def test_prediction_and_rank_are_the_references() -> None:
    rng = np.random.default_rng(1)
    for dtype in (np.float64, np.float32, np.float16):
        for vocabulary in (1, 2, 9, 80, 700, 3000):
            logits = rng.integers(-4, 5, (40, vocabulary)).astype(dtype)  # many ties
            logits[rng.random(logits.shape) < 0.1] = -np.inf
            logits[:3] = np.inf
            exclude = rng.integers(-1, vocabulary, 40)
            count = rng.integers(0, min(vocabulary + 3, 99), 40)
            tokens = rng.integers(0, vocabulary, 40)
            found = predict_outcomes(logits, count, exclude)
            ranks = token_rank(logits, tokens, exclude)
            for b in range(40):
                expected = reference.predict_outcomes(logits[b], int(count[b]), int(exclude[b]))
                assert found[b].tolist() == expected + [-1] * (found.shape[1] - len(expected))
                assert ranks[b] == reference.token_rank(logits[b], int(tokens[b]), int(exclude[b]))
    wide = np.repeat(logits, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(predict_outcomes(wide, count, exclude), found)
    assert predict_outcomes(np.zeros((0, 4)), 3).shape == (0, 3)
    everything = predict_outcomes(np.arange(6.0)[None], 6)
    assert everything.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert predict_outcomes(np.zeros((2, 4)), 0).shape == (2, 0)


def test_predictions_refuse_bad_input() -> None:
    logits = np.zeros((2, 3))
    for call, error, message in [
        (lambda: predict_outcomes(np.zeros(3), 1), ShapeError, "logits: expected rank 2"),
        (lambda: predict_outcomes(logits, -1), ArgumentError, "count: expected integers >= 0, got -1"),
        (
            lambda: predict_outcomes(logits, 1, [0, 3]),
            ArgumentError,
            r"exclude\[1\]: expected a token id in \[0, V = 3",
        ),
        (lambda: predict_outcomes(logits, 1, [0, -2]), ArgumentError, r"exclude\[1\]"),
        (lambda: predict_outcomes(logits * np.nan, 1), ArgumentError, r"logits\[0\]: expected numbers, got NaN"),
        (lambda: token_rank(logits, 3), ArgumentError, r"tokens\[0\]: expected a token id in \[0, V = 3\), got 3"),
        (lambda: token_rank(logits, [0.5, 1]), DtypeError, "tokens: expected integers"),
    ]:
        with pytest.raises(error, match=message):
            call()


# The cache


def test_a_hit_is_the_whole_outcome_and_happens_once() -> None:
    """E7, E8 and P6's bookkeeping: any other number is another key; a retired round stays retired."""
    cache: OutcomeCache[str] = OutcomeCache()
    cache.insert(Outcome(1, 5, 2, 9), "entry")
    for other in [(2, 5, 2, 9), (1, 4, 2, 9), (1, 5, 3, 9), (1, 5, 2, 8)]:
        assert cache.take(Outcome(*other)) is None
    assert cache.insert(Outcome(1, 5, 2, 9), "longer") == "entry"
    assert cache.get(Outcome(1, 5, 2, 9)) == "longer" and len(cache) == 1
    assert cache.take(Outcome(1, 5, 2, 9)) == "longer" and cache.take(Outcome(1, 5, 2, 9)) is None
    cache.insert(Outcome(1, 5, 0, 0), "rest")
    assert cache.retire(1, 5) == ["rest"]
    assert cache.insert(Outcome(1, 5, 0, 0), "late") == "late"
    cache.insert(Outcome(1, 6, 0, 0), "next")
    assert cache.forget(1) == ["next"] and len(cache) == 0
    assert cache.insert(Outcome(1, 0, 0, 0), "another stream of that number") is None


def test_the_cache_refuses_bad_numbers() -> None:
    cache: OutcomeCache[int] = OutcomeCache()
    for call, error, message in [
        (
            lambda: cache.take(Outcome(-1, 0, 0, 0)),
            ArgumentError,
            r"stream: expected an integer in \[0, 2\^32\), got -1",
        ),
        (lambda: cache.insert(Outcome(0, 2**64, 0, 0), 1), ArgumentError, r"round: .* got 18446744073709551616"),
        (lambda: cache.get(Outcome(0, 0, 0.5, 0)), DtypeError, "accepted: expected an integer, got float"),
        (lambda: cache.get(Outcome(0, 0, 0, 2**32)), ArgumentError, "token"),
        (lambda: cache.get((1, 2)), ArgumentError, r"outcome: expected \(stream, round, accepted, token\)"),
        (lambda: cache.insert(Outcome(0, 0, 0, 0), None), ArgumentError, "entry: expected anything but None"),
        (lambda: cache.retire(2**32, 0), ArgumentError, "stream"),
        (lambda: cache.forget("a"), DtypeError, "stream"),
    ]:
        with pytest.raises(error, match=message):
            call()
