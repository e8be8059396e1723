"""The speculation room: against its reference, by enumeration, by counting, and at its edges."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewise import _core, speculation
from tilewise.reference import speculation as reference

torch = pytest.importorskip("torch")

from tilewise.torch import speculation as torch_speculation  # noqa: E402

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def to_torch(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


class Floor:
    """One floor, called with NumPy arrays and answering with them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        if self.name == "numpy":
            return getattr(speculation, function)(*arguments, **keywords)
        arguments = tuple(to_torch(value) for value in arguments)
        keywords = {name: to_torch(value) for name, value in keywords.items()}
        result = getattr(torch_speculation, function)(*arguments, **keywords)
        if isinstance(result, torch.Tensor):
            return result.numpy()
        return type(result)(**{name: getattr(result, name).numpy() for name in result.__dataclass_fields__})


@pytest.fixture(params=["numpy", "torch"])
def floor(request: pytest.FixtureRequest) -> Floor:
    return Floor(request.param)


def random_logits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    """Rows with and without ties, some tokens masked, none wholly."""
    logits = np.where(rng.random(shape) < 0.5, rng.normal(size=shape) * 2, rng.integers(-2, 3, shape))
    masked = rng.random(shape) < 0.15
    masked[..., 0] = False
    return np.where(masked, -np.inf, logits).astype(DTYPES[dtype])


def random_rules(rng: np.random.Generator, rows: int, vocabulary: int) -> dict[str, np.ndarray]:
    return {
        "temperature": rng.choice([0.0, 0.3, 0.8, 1.0, 2.0], rows),
        "top_k": rng.integers(0, vocabulary + 2, rows),
        "top_p": rng.choice([1.0, 0.95, 0.6, 0.2], rows),
    }


def rule(rules: dict[str, np.ndarray], row: int) -> dict[str, Any]:
    return {name: values[row].item() for name, values in rules.items()}


# Laws


@pytest.mark.parametrize("dtype", DTYPES)
def test_process_equals_the_reference(floor: Floor, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for vocabulary in [1, 2, 3, 7, 8, 9, 40, 1000]:
        logits = random_logits(rng, (6, 3, vocabulary), dtype)
        rules = random_rules(rng, 6, vocabulary)
        laws = floor("process", logits, **rules)
        assert laws.dtype == np.float64
        for b, n in np.ndindex(6, 3):
            expected = reference.process(logits[b, n].astype(np.float64), **rule(rules, b))
            # The sums differ in order only: a few roundings of float64.
            np.testing.assert_allclose(laws[b, n], expected, rtol=1e-13, atol=1e-300)


def test_process_takes_rows_and_single_laws(floor: Floor) -> None:
    logits = random_logits(np.random.default_rng(2), (4, 5))
    for row, law in zip(logits, floor("process", logits, 0.7, 3, 0.9)):
        np.testing.assert_array_equal(floor("process", row, 0.7, 3, 0.9), law)
    np.testing.assert_array_equal(floor("process", logits, 0.7, None, 1.0), floor("process", logits, 0.7))


def test_process_keeps_what_transformers_keeps() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(3)
    for _ in range(100):
        vocabulary = int(rng.integers(2, 60))
        logits = (
            rng.permutation(vocabulary) * 0.37 + rng.random(vocabulary) * 0.3
        )  # no ties: theirs are undefined in top-p
        temperature, top_k, top_p = float(rng.choice([0.5, 1.0, 2.0])), int(rng.integers(1, vocabulary + 3)), 0.8
        scores = torch.from_numpy(logits[None])
        for warper in (
            processors.TemperatureLogitsWarper(temperature),
            processors.TopKLogitsWarper(top_k),
            processors.TopPLogitsWarper(top_p),
        ):
            scores = warper(None, scores)
        law = speculation.process(logits, temperature, top_k, top_p)
        np.testing.assert_allclose(law, scores.softmax(-1)[0].numpy(), rtol=1e-12)
    tied = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    kept = processors.TopKLogitsWarper(2)(None, tied).isfinite()[0].numpy()
    np.testing.assert_array_equal(speculation.process(tied[0].numpy(), top_k=2) > 0, kept)


def test_ties_at_the_edge_of_the_nucleus_enter_by_rising_id(floor: Floor) -> None:
    np.testing.assert_array_equal(floor("process", np.zeros(5), top_p=0.4), [0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(floor("process", np.array([-0.0, 0.0, -0.0]), top_p=0.5), [0.5, 0.5, 0])
    np.testing.assert_array_equal(floor("process", np.array([1.0, 5.0, 5.0]), 0.0), [0, 1, 0])


def test_infinite_logits_are_limits(floor: Floor) -> None:
    inf = np.inf
    np.testing.assert_array_equal(floor("process", np.array([inf, 0.0, inf, -inf])), [0.5, 0, 0.5, 0])
    np.testing.assert_array_equal(floor("process", np.array([-inf, 2.0, -inf]), 2.0, 2, 0.5), [0, 1, 0])
    np.testing.assert_array_equal(floor("process", np.array([0.0, inf, inf]), 0.0), [0, 1, 0])


def test_large_vocabulary(floor: Floor) -> None:
    rng = np.random.default_rng(4)
    logits = (rng.normal(size=(2, 50_000)) * np.array([[3.0], [0.01]])).astype(np.float32)
    for rules in ({}, {"top_p": 0.9}, {"top_k": 100}, {"top_k": 30_000, "top_p": 0.5}):
        laws = floor("process", logits, **rules)
        for row, law in zip(logits, laws):
            np.testing.assert_allclose(law, reference.process(row.astype(np.float64), **rules), rtol=1e-12)


# Random numbers and draws


def test_uniform_equals_the_reference() -> None:
    rng = np.random.default_rng(5)
    for purpose in reference.PURPOSES:
        for seed, request, position in zip(*(rng.integers(0, high, 20).tolist() for high in (2**63, 2**32, 2**63))):
            assert _core.uniform(seed, request, position, purpose) == reference.uniform(
                seed, request, position, purpose
            )


def test_sample_draws_what_the_reference_draws(floor: Floor) -> None:
    rng = np.random.default_rng(6)
    for dtype in (np.float64, np.float32):
        laws = np.maximum(rng.random((500, 9)) - 0.5, 0)  # about half of the tokens are impossible
        laws[:, 4] += 0.01
        laws = (laws / laws.sum(1, keepdims=True)).astype(dtype)
        requests, positions = rng.integers(0, 2**32, 500), rng.integers(0, 2**40, 500)
        tokens = floor("sample", laws, seed=3, requests=requests, positions=positions)
        assert tokens.dtype == np.int64
        numbers = [reference.uniform(3, int(r), int(p), "target") for r, p in zip(requests, positions)]
        expected = [reference.draw(law.astype(np.float64), number) for law, number in zip(laws, numbers)]
        np.testing.assert_array_equal(tokens, expected)
        assert (laws[np.arange(500), tokens] > 0).all()


def test_the_recorded_law_is_the_one_that_was_drawn_from(floor: Floor) -> None:
    rng = np.random.default_rng(7)
    logits = random_logits(rng, (400, 12), "float32")
    where = {"seed": 9, "requests": np.arange(400), "positions": 5}
    for laws_dtype in ("float64", "float32"):
        drafted = floor("draft_token", logits, temperature=0.8, top_p=0.95, laws_dtype=laws_dtype, **where)
        assert drafted.laws.dtype == laws_dtype
        np.testing.assert_array_equal(floor("sample", drafted.laws, purpose="draft", **where), drafted.tokens)
        law = floor("process", logits, 0.8, 0, 0.95)
        np.testing.assert_array_equal(drafted.laws, law.astype(laws_dtype))


def test_verifying_nothing_is_plain_sampling(floor: Floor) -> None:
    logits = random_logits(np.random.default_rng(8), (50, 1, 7))
    where = {"seed": 1, "requests": np.arange(50), "positions": np.arange(50) * 3}
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.95}
    result = floor("verify", np.zeros((50, 0), np.int64), None, logits, **settings, **where)
    np.testing.assert_array_equal(result.accepted, np.zeros(50))
    np.testing.assert_array_equal(result.tokens, floor("sample_target", logits[:, 0], **settings, **where))


# Verification


def random_batch(
    rng: np.random.Generator, rows: int, depth: int, vocabulary: int, dtype: str = "float64"
) -> dict[str, Any]:
    """Chains whose drafts are near enough to the target that rounds of every length occur."""
    logits = random_logits(rng, (rows, depth + 1, vocabulary), dtype)
    noisy = logits[:, :depth].astype(np.float64) + rng.normal(size=(rows, depth, vocabulary)) * 0.3
    laws = speculation.process(noisy)
    tokens = np.zeros((rows, depth), np.int64)
    for b, i in np.ndindex(rows, depth):
        tokens[b, i] = reference.draw(laws[b, i], rng.random())
    return {"draft_tokens": tokens, "draft_laws": laws, "logits": logits}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("laws", ["float64", "float32", "points"])
def test_verify_equals_the_reference(floor: Floor, dtype: str, laws: str) -> None:
    rng = np.random.default_rng(10)
    counts = np.zeros(6, int)
    for depth, vocabulary in [(1, 2), (2, 3), (5, 8), (3, 33), (5, 300)]:
        rows = 50
        batch = random_batch(rng, rows, depth, vocabulary, dtype)
        if laws == "points":
            batch |= {"draft_tokens": batch["draft_laws"].argmax(-1), "draft_laws": None}
        else:
            batch["draft_laws"] = batch["draft_laws"].astype(laws)
        rules = random_rules(rng, rows, vocabulary)
        lengths = np.where(rng.random(rows) < 0.7, depth, rng.integers(0, depth + 1, rows)).astype(np.int32)
        tokens = batch["draft_tokens"].astype(np.int32 if depth == 2 else np.int64)
        tokens[np.arange(depth) >= lengths[:, None]] = -1  # beyond the length nothing is read
        requests, positions = rng.integers(0, 2**32, rows), rng.integers(0, 10**6, rows)
        result = floor(
            "verify",
            tokens,
            batch["draft_laws"],
            batch["logits"],
            **rules,
            draft_lengths=lengths,
            seed=2**62,
            requests=requests,
            positions=positions,
        )
        assert (result.accepted.dtype, result.tokens.dtype) == (np.int32, np.int64)
        for b in range(rows):
            length = lengths[b]
            expected = reference.verify(
                tokens[b, :length],
                None if laws == "points" else batch["draft_laws"][b, :length],
                batch["logits"][b].astype(np.float64),
                **rule(rules, b),
                seed=2**62,
                request=int(requests[b]),
                position=int(positions[b]),
            )
            assert (result.accepted[b], result.tokens[b]) == expected
            counts[expected[0]] += 1
    assert (counts > 0).all()


def test_a_row_does_not_see_its_batch(floor: Floor) -> None:
    rng = np.random.default_rng(11)
    batch, rules = random_batch(rng, 60, 4, 11), random_rules(rng, 60, 11)
    names = {"requests": rng.permutation(60) * 7, "positions": rng.integers(0, 99, 60)}
    together = floor("verify", *batch.values(), **rules, **names, seed=4)
    assert set(together.accepted) == {0, 1, 2, 3, 4}
    order = rng.permutation(60)
    everything = {**batch, **rules, **names}
    shuffled = floor("verify", **{name: value[order] for name, value in everything.items()}, seed=4)
    np.testing.assert_array_equal(shuffled.accepted, together.accepted[order])
    np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
    for b in range(0, 60, 7):
        alone = floor("verify", **{name: value[b : b + 1] for name, value in everything.items()}, seed=4)
        assert (alone.accepted[0], alone.tokens[0]) == (together.accepted[b], together.tokens[b])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(12)
    batch, rules = random_batch(rng, 16, 3, 3000), random_rules(rng, 16, 3000)
    results = []
    try:
        for threads in (1, 2, 5):
            _core.set_num_threads(threads)
            results.append(speculation.verify(*batch.values(), **rules, seed=4, requests=np.arange(16), positions=0))
    finally:
        _core.set_num_threads(0)
    for result in results[1:]:
        np.testing.assert_array_equal(result.accepted, results[0].accepted)
        np.testing.assert_array_equal(result.tokens, results[0].tokens)


def test_greedy_rows_accept_the_argmax_and_nothing_else(floor: Floor) -> None:
    rng = np.random.default_rng(13)
    logits = rng.integers(0, 3, (200, 4, 5)).astype(np.float32)  # many ties
    best = logits.argmax(-1)
    tokens = np.where(rng.random((200, 3)) < 0.7, best[:, :3], rng.integers(0, 5, (200, 3)))
    mixed = np.arange(200) % 2 * 0.8  # every other row is sampled
    result = floor("verify", tokens, None, logits, temperature=mixed, seed=0, requests=np.arange(200), positions=0)
    for b in range(0, 200, 2):
        same = tokens[b] == best[b, :3]
        accepted = 3 if same.all() else int(same.argmin())
        assert (result.accepted[b], result.tokens[b]) == (accepted, best[b, accepted])
    odd = floor(
        "verify", tokens[1::2], None, logits[1::2], temperature=0.8, seed=0, requests=np.arange(1, 200, 2), positions=0
    )
    np.testing.assert_array_equal(odd.tokens, result.tokens[1::2])
    np.testing.assert_array_equal(odd.accepted, result.accepted[1::2])


def test_what_replaces_a_refused_token_is_another(floor: Floor) -> None:
    rng = np.random.default_rng(14)
    batch, rules = random_batch(rng, 300, 2, 6), random_rules(rng, 300, 6)
    law = floor("verification_law", *batch.values(), **rules)
    assert ((law.acceptance >= 0) & (law.acceptance <= 1)).all()
    np.testing.assert_allclose(law.corrections.sum(-1), 1, rtol=1e-14)
    rows, places = np.nonzero(law.acceptance < 1)
    assert (law.corrections[rows, places, batch["draft_tokens"][rows, places]] == 0).all()


def test_equal_laws_are_always_accepted(floor: Floor) -> None:
    logits = random_logits(np.random.default_rng(15), (500, 2, 6))
    settings = {"temperature": 0.8, "top_p": 0.95}
    where = {"seed": 3, "requests": np.arange(500), "positions": 8}
    drafted = floor("draft_token", logits[:, 0], **settings, **where)
    chain = (drafted.tokens[:, None], drafted.laws[:, None], logits)
    law = floor("verification_law", *chain, **settings)
    np.testing.assert_allclose(law.acceptance, 1, rtol=1e-15)
    assert np.isfinite(law.corrections).all()
    assert (floor("verify", *chain, **settings, **where).accepted == 1).all()


# Edges


def test_empty_batches(floor: Floor) -> None:
    none = np.zeros(0, np.int64)
    result = floor(
        "verify", np.zeros((0, 3), np.int64), None, np.zeros((0, 4, 5)), seed=0, requests=none, positions=none
    )
    assert (result.accepted.shape, result.tokens.shape) == ((0,), (0,))
    assert floor("process", np.zeros((0, 5))).shape == (0, 5)
    assert floor("process", np.zeros((3, 0, 5))).shape == (3, 0, 5)
    assert floor("sample", np.zeros((0, 5)), seed=0, requests=none, positions=none).shape == (0,)
    law = floor("verification_law", np.zeros((2, 0), np.int64), np.zeros((2, 0, 3)), np.zeros((2, 1, 3)))
    assert law.acceptance.shape == (2, 0)
    np.testing.assert_allclose(law.corrections, 1 / 3)


def test_one_token_vocabulary(floor: Floor) -> None:
    result = floor(
        "verify", np.zeros((2, 3), np.int64), None, np.zeros((2, 4, 1)), seed=0, requests=np.arange(2), positions=0
    )
    assert result.accepted.tolist() == [3, 3]
    assert result.tokens.tolist() == [0, 0]


def test_strided_inputs() -> None:
    rng = np.random.default_rng(20)
    batch, rules = random_batch(rng, 12, 3, 10, "float32"), random_rules(rng, 12, 10)
    where = {"seed": 4, "requests": np.arange(12), "positions": np.arange(24)[::2]}
    expected = speculation.verify(*batch.values(), **rules, **where)

    def views(array: np.ndarray) -> list[np.ndarray]:
        backwards = np.ascontiguousarray(array[::-1])[::-1]
        wide = np.repeat(array, 2, axis=-1)[..., ::2]
        turned = np.ascontiguousarray(array.swapaxes(0, -1)).swapaxes(0, -1)
        return [backwards, wide, turned]

    for tokens, laws, logits in zip(*(views(array) for array in batch.values())):
        assert not logits.flags.c_contiguous
        for result in (
            speculation.verify(tokens, laws, logits, **rules, **where),
            speculation.verify(tokens, laws.astype(np.float32).astype(np.float64), logits, **rules, **where),
        ):
            np.testing.assert_array_equal(result.accepted, expected.accepted)
            np.testing.assert_array_equal(result.tokens, expected.tokens)
    turned = torch.from_numpy(batch["logits"]).transpose(0, 1).contiguous().transpose(0, 1)
    laws = torch.from_numpy(batch["draft_laws"]).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    result = torch_speculation.verify(torch.from_numpy(batch["draft_tokens"]), laws, turned, **rules, **where)
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    shared = np.broadcast_to(batch["logits"][:1], batch["logits"].shape)  # stride 0
    copied = speculation.process(np.ascontiguousarray(shared), 0.8, 0, 0.9)
    np.testing.assert_array_equal(speculation.process(shared, 0.8, 0, 0.9), copied)
    np.testing.assert_array_equal(speculation.process(shared.swapaxes(0, 1), 0.8, 0, 0.9), copied.swapaxes(0, 1))
