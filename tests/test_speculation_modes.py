"""P1 in every mode: the law of what leaves is plain sampling's, by enumeration of every draft, refusal and correction.

Context-dependent laws p and q over V = 3..5 tokens, chains of K = 1..3; what runs here are `verification_law`,
`accept`'s probabilities and `correct`'s laws, that is, the code of the real rounds.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from tilewise import speculation
from tilewise.reference import speculation as reference
from tilewise.speculation import SparseLaws

Prefix = tuple[int, ...]


def texts(vocabulary: int, length: int) -> list[Prefix]:
    return list(itertools.product(range(vocabulary), repeat=length))


class Toy:
    """Logits of a target and a draft for every prefix, and the rules both sample by."""

    def __init__(self, rng: np.random.Generator, vocabulary: int, depth: int, rule: dict, draft_rule: dict) -> None:
        self.vocabulary, self.depth, self.rule, self.draft_rule = vocabulary, depth, rule, draft_rule
        prefixes = [prefix for length in range(depth + 1) for prefix in texts(vocabulary, length)]
        shape = (len(prefixes), vocabulary)
        target = np.where(rng.random(shape) < 0.5, rng.normal(size=shape) * 1.5, rng.integers(-1, 2, shape))
        draft = target + rng.normal(size=shape)
        for logits in (target, draft):
            masked = rng.random(shape) < 0.15
            masked[np.arange(len(prefixes)), rng.integers(0, vocabulary, len(prefixes))] = False
            logits[masked] = -np.inf
        self.target, self.draft = dict(zip(prefixes, target)), dict(zip(prefixes, draft))
        self.p = {prefix: speculation.process(row, **rule) for prefix, row in self.target.items()}

    def q(self, prefix: Prefix, **how: Any) -> Any:
        """The law that draft_token records."""
        where = {"seed": 0, "requests": 0, "positions": len(prefix)}
        laws = speculation.draft_token(self.draft[prefix][None], **self.draft_rule, **how, **where).laws
        if not isinstance(laws, SparseLaws):
            return laws[0]
        return laws.ids[0], laws.probabilities[0]

    def plain(self, text: Prefix, start: int = 0) -> float:
        return math.prod(self.p[text[:j]][text[j]] for j in range(start, len(text)))


def dense(law: Any, vocabulary: int) -> np.ndarray:
    if not isinstance(law, tuple):
        return np.asarray(law, np.float64)
    full = np.zeros(vocabulary)
    for token, probability in zip(*law):
        if token >= 0:
            full[token] = probability
    return full


def distance(toy: Toy, mode: str, length: int | None = None, stop: float = 0.0, **how: Any) -> float:
    """Total variation of depth + 1 tokens between rounds and plain sampling. Chains have `length` tokens, or fewer:
    none is drafted after one with which the probability of the chain, by the draft, falls below `stop`."""
    depth, vocabulary = toy.depth, toy.vocabulary
    length = depth if length is None else length
    laws = {} if mode == "points" else {x: toy.q(x, **how) for n in range(depth) for x in texts(vocabulary, n)}
    chains: list[tuple[Prefix, float]] = []

    def grow(chain: Prefix, mass: float) -> None:
        if len(chain) == length or mass < stop:
            chains.append((chain, mass))
            return
        law = np.eye(vocabulary)[np.argmax(toy.draft[chain])] if mode == "points" else dense(laws[chain], vocabulary)
        for token in np.flatnonzero(law):
            grow((*chain, int(token)), mass * law[token] / law.sum())

    grow((), 1.0)
    pad = lambda chain: (*chain, *[0] * (depth - len(chain)))  # noqa: E731
    proposals: Any = None
    if mode != "points":
        rows = [[laws[pad(chain)[:i]] for i in range(depth)] for chain, _ in chains]
        if how.get("support"):
            ids = np.array([[law[0] for law in row] for row in rows])
            proposals = SparseLaws(ids, np.array([[law[1] for law in row] for row in rows]))
        else:
            proposals = np.array(rows)
    tokens = np.array([pad(chain) for chain, _ in chains], np.int64).reshape(len(chains), depth)
    logits = np.array([[toy.target[pad(chain)[:i]] for i in range(depth + 1)] for chain, _ in chains])
    lengths = np.array([len(chain) for chain, _ in chains])
    # A law may give a padding token nothing; it is not read, being beyond the length.
    law = speculation.verification_law(tokens, proposals, logits, **toy.rule, draft_lengths=lengths)
    found = dict.fromkeys(texts(vocabulary, depth + 1), 0.0)
    for row, (chain, mass) in enumerate(chains):
        for i in range(len(chain) + 1):
            accept = law.acceptance[row, i] if i < len(chain) else 0.0
            assert 0 <= accept <= 1
            for token in range(vocabulary):
                share = mass * (1 - accept) * law.corrections[row, i, token]
                if share == 0:
                    continue
                prefix = (*chain[:i], token)
                for rest in texts(vocabulary, depth - i):
                    found[prefix + rest] += share * toy.plain(prefix + rest, i + 1)
            mass *= accept
    return sum(abs(found[text] - toy.plain(text)) for text in found) / 2


SIZES = [(3, 1), (3, 2), (4, 2), (5, 1), (3, 3)]
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 2},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.0},
]


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("sampled", {}),
        ("sampled", {"laws_dtype": "float32"}),
        ("sampled", {"saguaro": 0.0, "fan_out": 1}),
        ("sampled", {"saguaro": 0.3, "fan_out": 2}),
        ("sampled", {"saguaro": 1.0, "fan_out": 2}),
        ("sampled", {"support": 1}),
        ("sampled", {"support": 2, "laws_dtype": "float32"}),
        ("sampled", {"support": 2, "saguaro": 0.3, "fan_out": 1}),
        ("points", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items()),
)
def test_the_law_that_leaves_is_plain_samplings(mode: str, how: dict[str, Any]) -> None:
    """P1: plain, Saguaro, sparse, single precision, point masses; mixed temperatures, top-k, top-p on either side."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for (vocabulary, depth), rule, draft_rule in itertools.product(SIZES, RULES, RULES):
        toy = Toy(rng, vocabulary, depth, rule, draft_rule)
        worst = max(worst, distance(toy, mode, **how))
    print(f"total variation at most {worst:.1e}")
    assert worst < 1e-12


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_and_empty_chains_are_exact(length: int) -> None:
    """A miss with a fast fallback, or with none: fewer tokens than K, or no chain."""
    rng = np.random.default_rng(1)
    for rule, mode in itertools.product(RULES, ["sampled", "points"]):
        toy = Toy(rng, 3, 2, rule, {"temperature": 1.2})
        assert distance(toy, mode, length) < 1e-12


def test_a_record_that_is_not_what_was_drawn_is_seen() -> None:
    """E1: the law recorded in bfloat16 is another law, and that is seen; what draft_token returns is drawn."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(2)
    toy = Toy(rng, 4, 1, {}, {})
    assert distance(toy, "sampled") < 1e-12
    honest = toy.q(())
    rounded = honest.astype(ml_dtypes.bfloat16).astype(np.float64)
    emitted = np.zeros(4)
    for token in np.flatnonzero(honest):
        law = speculation.verification_law(
            np.array([[token]]),
            (rounded / rounded.sum())[None, None],
            np.stack([toy.target[()], toy.target[(int(token),)]])[None],
        )
        emitted[token] += honest[token] * law.acceptance[0, 0]
        emitted += honest[token] * (1 - law.acceptance[0, 0]) * law.corrections[0, 0]
    assert np.abs(emitted - toy.p[()]).sum() > 1e-6
    where = {"seed": 3, "requests": np.arange(2000), "positions": 0}
    for how in ({"laws_dtype": "float32"}, {"support": 3}, {"saguaro": 0.3, "fan_out": 2, "laws_dtype": "float32"}):
        drafted = speculation.draft_token(np.tile(toy.draft[()], (2000, 1)), **how, **where)
        laws = drafted.laws
        if isinstance(laws, SparseLaws):
            count = (laws.ids[0] >= 0).sum()
            redrawn = speculation.sample(laws.probabilities[:, :count], purpose="draft", **where)
            redrawn = laws.ids[np.arange(2000), redrawn]
        else:
            redrawn = speculation.sample(laws, purpose="draft", **where)
        np.testing.assert_array_equal(drafted.tokens, redrawn)


def test_cutting_a_sampled_draft_by_its_own_probability_needs_another_residual() -> None:
    """E2: to drop a drawn token because its own probability is low, and then to sample p, is biased. To cut the law
    before drawing (`support`) is not, nor to stop drafting after a token that stays, which is the decoder's rule."""
    p, q, bar = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), 0.25
    naive, fixed = np.zeros(3), np.zeros(3)
    kept = np.where(q >= bar, q, 0.0)
    rest = p - np.minimum(p, kept)
    for token in range(3):
        accept = min(1.0, p[token] / q[token]) if kept[token] else 0.0
        for law, out in ((p if not kept[token] else reference.residual(p, q), naive), (rest / rest.sum(), fixed)):
            out[token] += q[token] * accept
            out += q[token] * (1 - accept) * law
    assert np.abs(naive - p).sum() > 0.05
    np.testing.assert_allclose(fixed, p, atol=1e-15)
    toy = Toy(np.random.default_rng(3), 4, 2, {}, {})
    assert distance(toy, "sampled", support=1) < 1e-12
    toy = Toy(np.random.default_rng(3), 3, 3, {}, {})
    assert all(distance(toy, "sampled", stop=stop) < 1e-12 for stop in (0.1, 0.3, 0.6))


# Saguaro


def test_saguaro_is_the_definition() -> None:
    rng = np.random.default_rng(4)
    logits = rng.integers(-3, 4, (60, 20)).astype(np.float64)
    constants, fan_out = rng.choice([0.0, 0.3, 1.0], 60), rng.integers(0, 22, 60)
    temperature = rng.choice([0.0, 0.7, 1.0], 60)
    where = {"seed": 0, "requests": np.arange(60), "positions": 0}
    laws = speculation.draft_token(logits, temperature=temperature, saguaro=constants, fan_out=fan_out, **where).laws
    for b in range(60):
        law = reference.process(logits[b], float(temperature[b]))
        if temperature[b] > 0:
            law = reference.saguaro(law, float(constants[b]), int(fan_out[b]))
        np.testing.assert_allclose(laws[b], law, rtol=1e-13)
    untouched = speculation.draft_token(logits, temperature=temperature, saguaro=1.0, fan_out=5, **where).laws
    np.testing.assert_array_equal(untouched, speculation.draft_token(logits, temperature=temperature, **where).laws)


def test_saguaro_moves_residual_mass_onto_the_guesses() -> None:
    """P11: the residual's mass on the draft's favourites never falls as C falls; acceptance may rise first."""
    rng = np.random.default_rng(5)
    rises = 0
    for _ in range(200):
        z = rng.normal(size=12) * 2
        p = reference.process(z + rng.normal(size=12))
        fan_out = int(rng.integers(1, 5))
        favourites = speculation.predict_outcomes(z[None], fan_out)[0]
        masses, acceptances = [], []
        for constant in (1.0, 0.7, 0.4, 0.2, 0.05, 0.0):
            where = {"seed": 0, "requests": 0, "positions": 0}
            q = speculation.draft_token(z[None], saguaro=constant, fan_out=fan_out, **where).laws[0]
            assert math.isclose(q.sum(), 1.0, rel_tol=1e-14)
            acceptances.append(np.minimum(p, q).sum())
            # Not renormalised: the probability that a refusal is followed by one of the guesses.
            masses.append(np.maximum(p - q, 0)[favourites].sum())
        assert all(b >= a - 1e-14 for a, b in itertools.pairwise(masses))
        rises += max(acceptances) > acceptances[0] + 1e-9
        assert acceptances[-1] < 1
    assert 0 < rises < 200  # a trade-off, not a rule


def test_sparse_laws_are_the_cut_law() -> None:
    rng = np.random.default_rng(6)
    for dtype, vocabulary in itertools.product((np.float32, np.float64, np.float16), (3, 90, 2000)):
        logits = (rng.normal(size=(20, vocabulary)) * 2).round(1).astype(dtype)
        logits[:, 0] = -np.inf
        for support, rule in itertools.product((1, 5, 200), ({}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 0.0})):
            where = {"seed": 1, "requests": np.arange(20), "positions": 9}
            drafted = speculation.draft_token(logits, support=support, **rule, **where)
            ids, weights = drafted.laws.ids, drafted.laws.probabilities
            assert ids.dtype == np.int32 and ids.shape == (20, min(support, vocabulary))
            for b in range(20):
                law = reference.cut(reference.process(logits[b].astype(np.float64), **rule), support)
                count = int((law > 0).sum())
                assert (ids[b, count:] == -1).all() and (weights[b, count:] == 0).all()
                np.testing.assert_array_equal(ids[b, :count], np.flatnonzero(law))
                np.testing.assert_allclose(weights[b, :count], law[law > 0], rtol=1e-12)
                assert drafted.tokens[b] in ids[b, :count]


# Residuals


def test_residuals_at_the_edges() -> None:
    """P5, P7, E4, E5: a law again, nothing on what is accepted for certain, p where the two are one."""
    p = np.array([0.0, 0.5, 0.5, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(np.stack([p, p]))[None]
    cases = {
        "q all where p has nothing": ([1.0, 0, 0, 0], 0, [0, 0.5, 0.5, 0]),
        "q = p": (p, 1, [0, 0.5, 0.5, 0]),
        "q above p at one": ([0, 1.0, 0, 0], 1, [0, 0, 1.0, 0]),
        "q spread": ([0.25] * 4, 0, [0, 0.5, 0.5, 0]),
    }
    for name, (q, token, wanted) in cases.items():
        law = speculation.verification_law(np.array([[token]]), np.array([[q]], np.float64), logits)
        np.testing.assert_allclose(law.corrections[0, 0], wanted, atol=1e-15, err_msg=name)
        assert law.acceptance[0, 0] == (min(1, p[token] / q[token]))
    rng = np.random.default_rng(7)
    z = rng.normal(size=(300, 2, 40))
    q = speculation.process(z[:, 0] + rng.normal(size=(300, 40)) * 1e-9)  # equal to rounding and a little more
    tokens = np.array([reference.draw(law, rng.random()) for law in q])[:, None]
    law = speculation.verification_law(tokens, q[:, None], z)
    assert np.isfinite(law.corrections).all() and (law.corrections >= 0).all()
    np.testing.assert_allclose(law.corrections.sum(-1), 1, rtol=1e-12)
    refused = law.acceptance[:, 0] < 1
    assert refused.any() and (law.corrections[refused, 0, tokens[refused, 0]] == 0).all()


def test_the_streams_of_purposes_are_independent() -> None:
    """E18: drafts, coins, residuals and targets of one place share nothing: chi-square over pairs of purposes."""
    from tilewise import _core

    count, cells = 20_000, 8
    for one, other in itertools.combinations(["draft", "accept", "residual", "target"], 2):
        table = np.zeros((cells, cells))
        for position in range(count):
            a = _core.uniform(5, position % 7, position, one)
            b = _core.uniform(5, position % 7, position, other)
            table[int(a * cells), int(b * cells)] += 1
        statistic = ((table - count / cells**2) ** 2 / (count / cells**2)).sum()
        freedom = cells**2 - 1
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        assert abs(z) < 4, (one, other, statistic)
