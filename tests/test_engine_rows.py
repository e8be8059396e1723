"""Branches of a draft: many in one step are what one after the other would be (P17), and what the trunk becomes."""

from dataclasses import asdict

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from tilewise.hf.engine import rows as rows_module  # noqa: E402
from tilewise.hf.engine.builds import OrderedBuild, Worth  # noqa: E402
from tilewise.hf.engine.guesser import Guesser  # noqa: E402
from tilewise.hf.engine.odds import Odds  # noqa: E402
from tilewise.hf.engine.rows import CacheRows, LeanRows, ReplayRows, rows_of  # noqa: E402
from tilewise.hf.engine.rules import Settings, rule_of  # noqa: E402
from tilewise.hf.engine.worker import Worker  # noqa: E402
from tilewise.hf.runners import runners  # noqa: E402
from tilewise.hf.testing import random_draft, random_target  # noqa: E402

TRUNK = [5, 17, 3, 99, 42, 7, 11]
KINDS = {"lean": LeanRows, "cache": CacheRows, "replay": ReplayRows}
ATOL = {"lean": 1e-10, "cache": 1e-10, "replay": 1e-6}  # the target computes parts of itself in float32


def start_of(kind):
    """A way to begin a sequence whose branches are of this kind."""
    if kind == "replay":  # sparse layers keep more than keys, so their cache cannot hold branches
        return runners(random_target(dtype=torch.float64), rollback=True)
    return runners(random_draft(dtype=torch.float64), rollback=True, lean=kind == "lean")


def logits_after(start, tokens):
    with torch.inference_mode():
        return start().feed(tokens, last=1)[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fed", [6, 7])
def test_P17_branches_together_are_branches_alone(kind, fed):
    start = start_of(kind)
    runner = start()
    paths = {0: (7, [1, 2, 3]), 1: (7, [9, 9]), 2: (3, [1, 2, 3]), 3: (4, [250]), 4: (1, [8, 0, 1])}
    with torch.inference_mode():
        runner.feed(TRUNK[:fed])
        rows = rows_of(runner, TRUNK)
        assert type(rows) is KINDS[kind]
        if fed < len(TRUNK):
            last = rows.branch(fed)
            got = rows.feed([last], TRUNK[fed:]).numpy()[0]
            np.testing.assert_allclose(got, logits_after(start, TRUNK), rtol=0, atol=1e-10)
        numbers = {name: rows.branch(extent) for name, (extent, _) in paths.items()}
        for step in range(3):
            now = [name for name in reversed(paths) if len(paths[name][1]) > step]  # any order, any subset
            got = rows.feed([numbers[name] for name in now], [paths[name][1][step] for name in now]).numpy()
            for row, name in zip(got, now, strict=True):
                extent, own = paths[name]
                want = logits_after(start, TRUNK[:extent] + own[: step + 1])
                np.testing.assert_allclose(row, want, rtol=0, atol=ATOL[kind])
        rows.adopt(numbers[2])
        assert runner.tokens == [*TRUNK[:3], 1, 2, 3]
        got = runner.feed([77, 78], last=1)[0].numpy()
        np.testing.assert_allclose(got, logits_after(start, [*TRUNK[:3], 1, 2, 3, 77, 78]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_branches_leave_no_trace(kind):
    start = start_of(kind)
    runner = start()
    with torch.inference_mode():
        runner.feed(TRUNK)
        rows = rows_of(runner, TRUNK)
        rows.feed([rows.branch(2), rows.branch(7)], [1, 2])
        rows.drop()
        assert runner.tokens == TRUNK[: runner.length]
        got = runner.feed([*TRUNK[runner.length :], 50], last=1)[0].numpy()
    np.testing.assert_allclose(got, logits_after(start, [*TRUNK, 50]), rtol=0, atol=1e-10)


def guesser_of(start, rule, request=0, most=8, context=512, worth=None):
    """A guesser for which, if nothing else is said, every token is worth drafting."""
    return Guesser(start(), rule, request, most, context, Odds(), worth or Worth(0.0, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("rule", [Settings(), Settings(temperature=0.9, seed=4), Settings("rejection", 0.9, seed=4)])
@pytest.mark.parametrize("kind", KINDS)
def test_P6_every_entry_is_what_drafting_from_its_outcome_gives(kind, rule):
    start = start_of(kind)
    made = rule_of(rule, 256)

    def fresh(tokens, count):
        other, laws = guesser_of(start, made, 3, 3), []
        other.open(tokens)
        other.draft(count, laws)
        return other, laws

    with torch.inference_mode():
        guesser = guesser_of(start, made, 3, 3)
        guesser.open(TRUNK)
        guesser.draft(3, [])
        for number in range(4):
            guesser.begin(number, [2] * (len(guesser.chain) + 1), 3)
            while not guesser.build.done:
                guesser.step()
            build, chain = guesser.build, guesser.chain
            # Evenly: two guesses each. In turns: all there are, which is one less where one was refused.
            assert len(build.branches) == (2 * (len(chain) + 1) if rule.rule == "rejection" else 3 * len(chain) + 4)
            keys = [(branch.accepted, branch.token) for branch in build.branches]
            assert len(set(keys)) == len(keys)
            for branch in build.branches:
                if branch.accepted < len(chain):
                    assert branch.token != chain[branch.accepted]  # P7: a refused token is never what follows
                before = [*guesser.tokens[: guesser.committed + branch.accepted], branch.token]
                other, laws = fresh(before, 3)
                assert branch.tokens == other.chain
                assert all((a == b).all() for a, b in zip(branch.orders, other.orders, strict=True))
                for mine, theirs in zip(branch.laws, laws, strict=True):
                    assert (mine[0] == theirs[0]).all()
                    np.testing.assert_allclose(mine[1], theirs[1], atol=1e-10)
            taken = build.branches[(5 * number + 2) % len(build.branches)]
            news = [*guesser.chain[: taken.accepted], taken.token]
            guesser.settle(guesser.committed, news, 2 if number % 2 else None)
            assert guesser.chain == taken.tokens[: 2 if number % 2 else None]


@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_that_nobody_guessed_and_builds_cut_short(kind):
    start = start_of(kind)
    rule = rule_of(Settings(), 256)
    with torch.inference_mode():
        guesser = guesser_of(start, rule)
        guesser.open(TRUNK)
        for number, (steps, accepted, token) in enumerate([(0, 2, 201), (1, 0, 202), (2, 3, 203), (9, 1, 204)]):
            guesser.draft(3, [])
            guesser.begin(number, [1] * 4, 3)
            for _ in range(steps):
                if not guesser.build.done:
                    guesser.step()
            start_at, news = guesser.committed, [*guesser.chain[:accepted], token]
            before = guesser.tokens[:start_at]
            guesser.settle(start_at, news, None)
            assert guesser.tokens == before + news and not guesser.chain
        other = guesser_of(start, rule)
        other.open(guesser.tokens)
        other.draft(4, [])
        guesser.draft(4, [])
        assert guesser.chain == other.chain


def test_a_given_chain_and_its_guesses():
    start, rule = start_of("lean"), rule_of(Settings(), 256)
    with torch.inference_mode():
        guesser = guesser_of(start, rule)
        guesser.open(TRUNK)
        guesser.give([1, 2, 3])
        assert len(guesser.orders) == 4
        for accepted in range(4):
            order = guesser.orders[accepted]
            want = logits_after(start, [*TRUNK, *[1, 2, 3][:accepted]])
            assert order[0] == want.argmax()
        guesser.begin(0, [3, 3, 3, 3], 2)
        refused = {(branch.accepted, branch.token) for branch in guesser.build.branches}
        assert not refused & {(0, 1), (1, 2), (2, 3)}


@pytest.mark.parametrize("settled", [None, 2, 4])
def test_looked_up_tokens_behind_the_drafts_own(settled):
    """The guesses after each token are those of the whole chain, whether the draft has fed its last token or not."""
    start, rule = start_of("lean"), rule_of(Settings(), 256)
    with torch.inference_mode():
        guesser = guesser_of(start, rule)
        guesser.open(TRUNK)
        guesser.draft(3, [])
        if settled is not None:
            guesser.begin(0, [2] * 4, 4)
            while not guesser.build.done:
                guesser.step()
            taken = guesser.build.branches[1]
            guesser.settle(guesser.committed, [*guesser.chain[: taken.accepted], taken.token], settled)
        own = guesser.chain
        guesser.extend([7, 8, 9])
        assert guesser.chain == [*own, 7, 8, 9] and len(guesser.orders) == len(own) + 4
        for accepted, order in enumerate(guesser.orders):
            assert order[0] == logits_after(start, guesser.tokens[: guesser.committed + accepted]).argmax()
        guesser.begin(1, [2] * 7, 2)
        while not guesser.build.done:
            guesser.step()
        for branch in guesser.build.branches:
            other = guesser_of(start, rule)
            other.open([*guesser.tokens[: guesser.committed + branch.accepted], branch.token])
            other.draft(2, [])
            assert branch.tokens == other.chain


def test_E17_no_draft_beyond_the_positions_the_model_knows():
    start, rule = start_of("lean"), rule_of(Settings(), 256)
    with torch.inference_mode():
        guesser = guesser_of(start, rule, most=4, context=10)
        guesser.open(TRUNK)
        guesser.draft(50, [])
        assert len(guesser.tokens) == 10
        guesser.begin(0, [2] * 4, 5)
        assert guesser.build.depth == 0
        while not guesser.build.done:
            guesser.step()
        assert all(not branch.tokens for branch in guesser.build.branches)


def test_kinds_follow_the_model(monkeypatch):
    runner = start_of("cache")()
    assert type(rows_of(runner, [])) is CacheRows
    monkeypatch.setattr(rows_module.CacheRows, "computes", staticmethod(lambda _: False))
    assert type(rows_of(runner, [])) is ReplayRows


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_most_valuable_branches_grow(temperature):
    """Every step against a search over all outcomes and branches; sharp odds, so that values differ."""
    start, rule = start_of("lean"), rule_of(Settings(temperature=temperature, seed=2), 256)
    worth = Worth(verified=0.05, drafted=0.0, branch=1e-4, hit=2.5)
    with torch.inference_mode():
        guesser = guesser_of(start, rule, most=5, worth=worth)
        guesser._odds.beta = 4.0
        guesser.open(TRUNK)
        guesser.draft(4, [])
        guesser.begin(0, [1, 1, 1, 0, 0], 6)
        build = guesser.build
        assert isinstance(build, OrderedBuild)
        while not build.done:
            values, reach = {}, 1.0
            taken = {(branch.accepted, branch.token): branch for branch in build.branches}
            for accepted, known in enumerate(guesser.all_odds()):
                tokens, odds, kept = guesser.odds_at(accepted, known)
                for token, odd in zip(tokens, odds, strict=True):
                    if (accepted, token) not in taken and reach * odd * worth.hit >= worth.branch:
                        values[accepted, token] = reach * odd * worth.hit
                reach *= kept
            for key, branch in taken.items():
                if branch.share >= worth.verified and len(branch.tokens) < 6 and branch.reach >= worth.branch:
                    values[key] = branch.reach
            before = {key: len(branch.tokens) for key, branch in taken.items()}
            guesser.step()
            grown = {
                (branch.accepted, branch.token)
                for branch in build.branches
                if len(branch.tokens) > before.get((branch.accepted, branch.token), 0)
            }
            want = sorted(values, key=lambda key: -values[key])[:3]
            assert grown == set(want), (values, grown)
        assert max(len(branch.tokens) for branch in build.branches) > min(
            len(branch.tokens) for branch in build.branches
        )
        for branch in build.branches:  # a branch that ended did so at the first token that was not worth it
            shares = np.cumprod([guesser._odds.of(scores[None])[0, 0] for scores in branch.scores])
            assert (shares[:-1] >= worth.verified).all()
            assert branch.ended == (shares[-1] < worth.verified or len(branch.tokens) == 6)


def test_a_chain_ends_where_it_is_not_worth_going_on():
    start, rule = start_of("lean"), rule_of(Settings(), 256)
    with torch.inference_mode():
        guesser = guesser_of(start, rule, worth=Worth(drafted=0.1))
        guesser._odds.beta = 4.0
        guesser.open(TRUNK)
        guesser.draft(50, [])
        shares = np.cumprod([guesser._odds.of(scores[None])[0, 0] for scores in guesser.scores])
        assert len(guesser.chain) == len(shares) and shares[-1] < 0.1 <= shares[:-1].min(initial=1.0)
        # Under the rejection rule nothing that was drafted may say how long a chain is, or which branches grow.
        other = guesser_of(start, rule_of(Settings("rejection", 1.0), 256), worth=Worth(0.9, 0.9, 0.9, 0.0))
        other.open(TRUNK)
        other.draft(6, [])
        assert len(other.chain) == 6
        other.begin(0, [1, 0, 2, 0, 0, 0, 1], 3)
        while not other.build.done:
            other.step()
        found = [(branch.accepted, len(branch.tokens)) for branch in other.build.branches]
        assert sorted(found) == [(0, 3), (2, 3), (2, 3), (6, 3)]


def test_odds_are_learnt():
    rng, odds, true = np.random.default_rng(0), Odds(), 1.7
    for _ in range(400):
        scores = -np.sort(-rng.normal(0, 2, (6, 9)), axis=1)
        scores[0, 5:] = -np.inf  # a law of fewer tokens
        weights = np.exp(true * (scores - scores[:, :1]))
        weights /= weights.sum(axis=1, keepdims=True)
        ranks = np.array([rng.choice(9, p=row) for row in weights])
        ranks[5] = -1  # none of the guesses
        odds.observe(scores, ranks)
    assert abs(odds.beta / true - 1) < 0.05
    np.testing.assert_allclose(odds.of(scores).sum(axis=1), 1.0)
    odds.observe(scores[:0], ranks[:0])
    for _ in range(2000):  # always wrong, or always right: bounded
        odds.observe(np.array([[0.0, -3.0]]), np.array([1]))
    assert 0.0 < odds.beta < 0.1
    for _ in range(2000):
        odds.observe(np.array([[0.0, -3.0]]), np.array([0]))
    assert 1.0 < odds.beta <= 20.0


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_worker_says_which_chains_ended_by_themselves(rule):
    """As deep as asked is no end: the scheduler would take it for a refusal and never ask for more."""

    class Recorder:
        def __init__(self):
            self.events = []

        def send(self, commands, arrays=()):
            self.events += commands

    link = Recorder()
    worker = Worker(random_draft(dtype=torch.float64), link, 5)
    with torch.inference_mode():
        worker._do_settings(asdict(Settings(rule, 0.0 if rule == "coupled" else 1.0)))
        worker._do_worth(0.2, 0.0, 0.001, 3.0)
        worker._odds.beta = 4.0
        worker._do_open(0, 0, 8, TRUNK)
        worker._do_draft(0, 0, len(TRUNK), [50], 3)
        worker._do_build(0, 1, len(TRUNK) + 1, [], None, [], [2, 1, 1, 2], 4)
        while worker._building:
            worker._advance(0)
        worker._flush()
    [found] = [event[3] for event in link.events if event[0] == "entries"]
    entries = [entry for entry, _ in found]
    contents = {entry[3]: content[0] for entry, content in found}
    assert len(entries) >= 6 and all(handle % 1024 == 5 and len(contents[handle]) == n for *_, n, handle, _ in entries)
    ended = {ended: [length for _, _, length, _, its in entries if its is ended] for ended in (True, False)}
    if rule == "coupled":
        assert ended[True] and max(ended[True]) < 4
    else:
        assert not ended[True] and set(ended[False]) == {4}
