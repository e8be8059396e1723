"""Verification in two steps and with sparse laws gives the tokens of the one-step, dense verification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tilewise import _core, speculation
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.reference import speculation as reference
from tilewise.speculation import SparseLaws
from tilewise.testing import force_isa, levels


def random_chains(rng: np.random.Generator, rows: int, depth: int, vocabulary: int, support: int) -> dict[str, Any]:
    """Sparse drafts near the target, so that rounds of every length occur; and the same laws, dense."""
    logits = (rng.normal(size=(rows, depth + 1, vocabulary)) * 2).astype(np.float32)
    logits[:, :, 0] = -np.inf
    noisy = logits[:, :depth] + rng.normal(size=(rows, depth, vocabulary)).astype(np.float32) * 0.3
    requests, positions = rng.permutation(rows) + 3, rng.integers(0, 1000, rows)
    tokens, ids, weights = [], [], []
    for i in range(depth):
        drafted = speculation.draft_token(
            noisy[:, i], support=support, seed=9, requests=requests, positions=positions + i, laws_dtype="float32"
        )
        tokens.append(drafted.tokens)
        ids.append(drafted.laws.ids)
        weights.append(drafted.laws.probabilities)
    sparse = SparseLaws(np.stack(ids, 1), np.stack(weights, 1))
    dense = np.zeros((rows, depth, vocabulary), np.float32)
    for b, i in np.ndindex(rows, depth):
        used = sparse.ids[b, i] >= 0
        dense[b, i, sparse.ids[b, i][used]] = sparse.probabilities[b, i][used]
    return {
        "tokens": np.stack(tokens, 1),
        "sparse": sparse,
        "dense": dense,
        "logits": logits,
        "where": {"seed": 9, "requests": requests, "positions": positions},
        "rule": {
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.4], rows),
            "top_k": rng.choice([0, 0, 0, 9], rows),
            "top_p": rng.choice([1.0, 1.0, 0.9], rows),
        },
    }


def at_refusal(chains: dict[str, Any], accepted: np.ndarray, lengths: np.ndarray) -> tuple[Any, ...]:
    """The refused token (-1: none), the place of its law, and the target's logits there."""
    every, depth = np.arange(len(accepted)), chains["tokens"].shape[1]
    place = np.minimum(accepted, depth - 1)
    refused = np.where(accepted < lengths, chains["tokens"][every, place], -1)
    return refused, (every, place), chains["logits"][every, accepted]


@pytest.mark.parametrize("size", [(300, 4, 20, 6), (60, 3, 3000, 16), (24, 5, 1100, 1100)])
def test_two_steps_give_the_tokens_of_one(size: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    chains = random_chains(rng, *size)
    rows, depth = chains["tokens"].shape
    lengths = np.where(rng.random(rows) < 0.8, depth, rng.integers(0, depth + 1, rows))
    tokens, logits, where, rule = chains["tokens"], chains["logits"], chains["where"], chains["rule"]
    kinds: dict[str, Any] = {"sparse": chains["sparse"], "dense": chains["dense"], "points": None}
    for kind, laws in kinds.items():
        result = speculation.verify(tokens, laws, logits, **rule, draft_lengths=lengths, **where)
        if kind == "dense":
            q = np.take_along_axis(laws, tokens[..., None], -1)[..., 0] / laws.astype(np.float64).sum(-1)
            one = lambda place: chains["dense"][place]  # noqa: E731
        elif kind == "sparse":
            total = laws.probabilities.astype(np.float64).sum(-1)
            q = (laws.probabilities * (laws.ids == tokens[..., None])).sum(-1) / total
            one = lambda place: SparseLaws(chains["sparse"].ids[place], chains["sparse"].probabilities[place])  # noqa: E731
        else:
            q = np.ones((rows, depth))
            one = lambda place: None  # noqa: E731
        p = speculation.token_probabilities(tokens, logits, **rule, draft_lengths=lengths)
        accepted = speculation.accept(q, p, draft_lengths=lengths, **where)
        np.testing.assert_array_equal(accepted, result.accepted)
        assert accepted.dtype == np.int32
        refused, place, row = at_refusal(chains, accepted, lengths)
        # Given the logits, the same laws to the last bit; given their law, the same to rounding.
        following = speculation.correct(accepted, refused, one(place), logits=row, **rule, **where)
        np.testing.assert_array_equal(following, result.tokens)
        law = speculation.process(row, **rule)
        for given in (law, np.repeat(law, 2, axis=1)[:, ::2]):
            following = speculation.correct(accepted, refused, one(place), probabilities=given, **where)
            np.testing.assert_array_equal(following, result.tokens)
    np.testing.assert_array_equal(
        speculation.verify(tokens, chains["sparse"], logits, **rule, **where).tokens,
        speculation.verify(tokens, chains["dense"], logits, **rule, **where).tokens,
    )


def test_rounds_of_all_lengths_equal_the_reference() -> None:
    """The rough sum that decides most coins never changes a decision."""
    rng = np.random.default_rng(1)
    chains = random_chains(rng, 120, 3, 700, 40)
    result = speculation.verify(
        chains["tokens"], chains["sparse"], chains["logits"], **chains["rule"], **chains["where"]
    )
    assert set(result.accepted) == {0, 1, 2, 3}
    for b in range(120):
        expected = reference.verify(
            chains["tokens"][b],
            chains["dense"][b],
            chains["logits"][b],
            **{name: values[b].item() for name, values in chains["rule"].items()},
            seed=9,
            request=int(chains["where"]["requests"][b]),
            position=int(chains["where"]["positions"][b]),
        )
        assert (result.accepted[b], result.tokens[b]) == expected


def test_coins_at_the_threshold_are_decided_exactly() -> None:
    """Probabilities a hair around the coin, nearer than the rough sum can tell."""
    count, vocabulary = 400, 4000
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(count, 2, vocabulary)) * 2).astype(np.float32)
    tokens = rng.integers(0, vocabulary, (count, 1))
    where = {"seed": 4, "requests": np.arange(count), "positions": 11}
    p = speculation.token_probabilities(tokens, logits)[:, 0]
    coins = np.array([_core.uniform(4, b, 11, "accept") for b in range(count)])
    hair = rng.choice([1 - 1e-5, 1 - 1e-9, 1 + 1e-9, 1 + 1e-5], count)
    q = p / coins * hair  # accepted iff the coin is below p / q = coin / hair
    usable = q < 1
    other = np.where(tokens[:, 0] == 0, 1, 0)
    ids = np.sort(np.stack([tokens[:, 0], other], 1), axis=1)
    weights = np.where(ids == tokens, q[:, None], 1 - q[:, None])
    usable &= (weights > 0).all(1)
    assert usable.sum() > 100
    laws = SparseLaws(ids[usable, None], weights[usable, None])
    where = {**where, "requests": np.arange(count)[usable]}
    result = speculation.verify(tokens[usable], laws, logits[usable], **where)
    np.testing.assert_array_equal(result.accepted, (hair < 1)[usable])


@pytest.mark.parametrize("level", levels())
def test_every_instruction_set_gives_the_same_tokens_and_laws(level: str) -> None:
    rng = np.random.default_rng(3)
    chains = random_chains(rng, 40, 3, 1500, 30)
    arguments = (chains["tokens"], chains["sparse"], chains["logits"])
    with force_isa("scalar"):
        expected = speculation.verify(*arguments, **chains["rule"], **chains["where"])
        laws = speculation.process(chains["logits"], **chains["rule"])
        guesses = speculation.predict_outcomes(chains["logits"][:, 0], 7)
    with force_isa(level):
        again = random_chains(np.random.default_rng(3), 40, 3, 1500, 30)
        np.testing.assert_array_equal(again["tokens"], chains["tokens"])
        np.testing.assert_array_equal(again["dense"], chains["dense"])
        result = speculation.verify(*arguments, **chains["rule"], **chains["where"])
        np.testing.assert_array_equal(result.accepted, expected.accepted)
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        np.testing.assert_array_equal(speculation.process(chains["logits"], **chains["rule"]), laws)
        np.testing.assert_array_equal(speculation.predict_outcomes(chains["logits"][:, 0], 7), guesses)


def test_torch_tensors_stay_tensors() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(4, 3, 50)
    where = {"seed": 0, "requests": np.arange(4), "positions": 0}
    drafted = speculation.draft_token(logits[:, 0], support=5, saguaro=0.5, fan_out=2, **where)
    assert drafted.laws.ids.dtype == torch.int32
    assert speculation.predict_outcomes(logits[:, 0], 3).dtype == torch.int32
    tokens = torch.stack([drafted.tokens] * 2, 1)
    p = speculation.token_probabilities(tokens, logits)
    accepted = speculation.accept(torch.ones(4, 2), p, **where)
    following = speculation.correct(accepted, [-1] * 4, logits=logits[:, 2], **where)
    assert (p.shape, accepted.dtype, following.dtype) == ((4, 2), torch.int32, torch.int64)
    laws = SparseLaws(torch.stack([drafted.laws.ids] * 2, 1), torch.stack([drafted.laws.probabilities] * 2, 1))
    result = speculation.verify(tokens, laws, logits, **where)
    assert isinstance(result.tokens, torch.Tensor)

    from tilewise.torch import speculation as floor  # the same names there

    again = floor.draft_token(logits[:, 0], support=5, saguaro=0.5, fan_out=2, **where)
    assert torch.equal(again.tokens, drafted.tokens) and torch.equal(again.laws.ids, drafted.laws.ids)
    assert torch.equal(floor.verify(tokens, laws, logits, **where).tokens, result.tokens)
    assert floor.verification_law(tokens, laws, logits).acceptance.shape == (4, 2)
    assert floor.accept is speculation.accept


GOOD: dict[str, Any] = {
    "draft_tokens": np.array([[0, 1]]),
    "ids": np.array([[[0, 2], [1, -1]]]),
    "probabilities": np.array([[[0.5, 0.5], [1.0, 0.0]]]),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": np.array([[[0, 3], [1, -1]]])}, ArgumentError, r"draft_laws.ids\[0, 0, 1\]: .*\[0, V = 3\).*got 3"),
        ({"ids": np.array([[[0, -2], [1, -1]]])}, ArgumentError, r"draft_laws.ids\[0, 0, 1\]: .*got -2"),
        ({"ids": np.array([[[2, 0], [1, -1]]])}, ArgumentError, r"ids that ascend, then -1, got 0 after 2"),
        ({"ids": np.array([[[0, 0], [1, -1]]])}, ArgumentError, r"got 0 after 0; sort a row's ids"),
        ({"ids": np.zeros((1, 2, 2))}, DtypeError, "draft_laws.ids: expected dtype int32 or int64"),
        ({"ids": np.zeros((1, 2, 3), int)}, ShapeError, "draft_laws.probabilities: expected the shape of the ids"),
        (
            {"ids": np.zeros((2, 2), int), "probabilities": np.ones((2, 2))},
            ShapeError,
            r"draft_laws.ids: expected \[1, 2, m\]",
        ),
        (
            {"probabilities": np.array([[[0.5, 0.4], [1.0, 0.0]]])},
            ArgumentError,
            r"draft_laws.probabilities\[0, 0\]: .*sum of 0.9",
        ),
        ({"probabilities": np.array([[[1.5, -0.5], [1.0, 0.0]]])}, ArgumentError, "a negative entry"),
        ({"probabilities": np.array([[[0.5, np.nan], [1.0, 0.0]]])}, ArgumentError, "a sum of NaN"),
        ({"probabilities": np.ones((1, 2, 2), np.float16)}, DtypeError, "draft_laws.probabilities"),
        ({"draft_tokens": np.array([[1, 1]])}, ArgumentError, r"draft_laws\[0, 0\]: expected a positive .* token 1"),
        ({"draft_tokens": np.array([[0, 7]])}, ArgumentError, r"draft_tokens\[0, 1\]: .*\[0, V = 3\), got 7"),
    ],
)
def test_sparse_laws_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """E15 among them: ids outside of the target's vocabulary are named."""
    given = {**GOOD, **change}
    laws = SparseLaws(given["ids"], given["probabilities"])
    with pytest.raises(error, match=message):
        speculation.verify(given["draft_tokens"], laws, np.zeros((1, 3, 3)), seed=0, requests=0, positions=0)


def test_the_steps_refuse_bad_input() -> None:
    where = {"seed": 0, "requests": 0, "positions": 0}
    half, law = np.array([[0.5]]), np.array([[0.25, 0.75]])
    for call, error, message in [
        (
            lambda: speculation.accept(half * 0, half, **where),
            ArgumentError,
            r"draft_probabilities\[0, 0\]: .*\(0, 1\], got 0",
        ),
        (
            lambda: speculation.accept(half, half * 3, **where),
            ArgumentError,
            r"target_probabilities\[0, 0\]: .*got 1.5",
        ),
        (
            lambda: speculation.accept(half, half * np.nan, **where),
            ArgumentError,
            r"target_probabilities\[0, 0\]: .*got NaN",
        ),
        (lambda: speculation.accept(half, half[0], **where), ShapeError, "target_probabilities"),
        (lambda: speculation.accept(half.astype(np.float16), half, **where), DtypeError, "draft_probabilities"),
        (lambda: speculation.accept(half, half, draft_lengths=[2], **where), ArgumentError, r"draft_lengths\[0\]"),
        (lambda: speculation.correct([0], [0], **where), ArgumentError, "expected one of them, got neither"),
        (lambda: speculation.correct([0], [0], probabilities=law, logits=law, **where), ArgumentError, "got both"),
        (
            lambda: speculation.correct([0], [2], probabilities=law, **where),
            ArgumentError,
            r"refused\[0\]: .*\[0, V = 2\)",
        ),
        (lambda: speculation.correct([-1], [0], probabilities=law, **where), ArgumentError, r"accepted\[0\]"),
        (
            lambda: speculation.correct([0], [0], law * 2, probabilities=law, **where),
            ArgumentError,
            r"draft_laws\[0\]: .*sum of 2",
        ),
        (
            lambda: speculation.correct([0], [0], probabilities=law * 2, **where),
            ArgumentError,
            r"target\[0\]: .*sum of 2",
        ),
        (lambda: speculation.correct([0], [0], law[:, :1], probabilities=law, **where), ShapeError, "draft_laws"),
        (
            lambda: speculation.draft_token(law, support=0, **where),
            ArgumentError,
            "support: expected an integer >= 1, got 0",
        ),
        (lambda: speculation.draft_token(law, support=1.5, **where), DtypeError, "support"),
        (
            lambda: speculation.draft_token(law, saguaro=1.5, **where),
            ArgumentError,
            r"saguaro\[0\]: expected a number in \[0, 1\]",
        ),
        (lambda: speculation.draft_token(law, saguaro=np.nan, **where), ArgumentError, r"saguaro\[0\]"),
        (lambda: speculation.draft_token(law, saguaro=0.5, fan_out=-1, **where), ArgumentError, r"fan_out\[0\]"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_empty_batches_and_chains() -> None:
    none = np.zeros(0, np.int64)
    where = {"seed": 0, "requests": none, "positions": none}
    assert speculation.accept(np.ones((0, 3)), np.ones((0, 3)), **where).shape == (0,)
    assert speculation.correct(none, none, probabilities=np.ones((0, 5)), **where).shape == (0,)
    assert speculation.token_probabilities(np.zeros((0, 3), int), np.zeros((0, 4, 5))).shape == (0, 3)
    assert speculation.draft_token(np.zeros((0, 5)), support=2, **where).laws.ids.shape == (0, 2)
    where = {"seed": 0, "requests": np.arange(2), "positions": 0}
    assert speculation.accept(np.ones((2, 0)), np.ones((2, 0)), **where).tolist() == [0, 0]
    assert speculation.token_probabilities(np.zeros((2, 0), int), np.zeros((2, 1, 5))).shape == (2, 0)
