"""Confidence inside transformers: the recorder, the criterion, and traces end to end."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tilewise.errors import ArgumentError, ShapeError  # noqa: E402
from tilewise.hf.confidence import ConfidenceRecorder, ConfidenceStop, deep_think  # noqa: E402
from tilewise.hf.deep_think import _Thinker  # noqa: E402
from tilewise.hf.models import DEFAULT_TARGET, load_pair  # noqa: E402
from tilewise.reference import confidence as reference  # noqa: E402
from tilewise.scheduler.confidence import token_confidence, trace_confidence  # noqa: E402
from tilewise.speculation import sample_target  # noqa: E402

pytestmark = pytest.mark.skipif(not DEFAULT_TARGET.is_dir(), reason="the default pair is not in this tree")
PROMPT = "def is_prime(n):\n    "


@pytest.fixture(scope="module")
def pair():
    return load_pair()


@pytest.fixture(autouse=True)
def one_thread():
    """Small products: waking threads, and waiting for them on a busy machine, costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate(pair, recorder, stop, rows=4, tokens=24, seed=0, **settings):
    torch.manual_seed(seed)
    prompt = torch.tensor([pair.tokenizer.encode(PROMPT)])
    return pair.target.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, top_k=5, pad_token_id=0,
        num_return_sequences=rows, max_new_tokens=tokens, logits_processor=[recorder], stopping_criteria=[stop],
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip


def test_generate_records_the_raw_logits(pair) -> None:
    recorder = ConfidenceRecorder(window=6)
    out = generate(pair, recorder, ConfidenceStop(recorder))
    logits = torch.stack(out.logits, 1).double().numpy()
    want = [[reference.token_confidence(step) for step in row] for row in logits]
    got = np.stack(recorder.steps, 1)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_array_equal(recorder.monitor.read().lowest, trace_confidence(got, window=6).lowest)


def test_generate_stops_weak_rows_one_by_one(pair) -> None:
    recorder = ConfidenceRecorder(window=6)
    free = ConfidenceStop(recorder)
    generate(pair, recorder, free)
    tokens = np.stack(recorder.steps, 1)
    groups = trace_confidence(tokens, window=6, groups=True).groups
    lowest = np.sort(groups.min(1))
    threshold = (lowest[1] + lowest[2]) / 2  # two of four rows fall below it
    stop = ConfidenceStop(recorder, threshold)
    out = generate(pair, recorder, stop)
    weak = groups < threshold
    want = np.where(weak.any(1), np.argmax(weak, 1) + 6, 0)
    assert (want > 0).sum() == 2
    np.testing.assert_array_equal(stop.stopped_at, want)
    prompt = len(pair.tokenizer.encode(PROMPT))
    for row in np.flatnonzero(want):
        end = prompt + want[row]
        # The token that completes the window stays; from then on generate pads.
        assert (out.sequences[row, end:] == 0).all() and (out.sequences[row, end - 1] != 0)
    vote = stop.add(["a", "b", "c", "d"], [24] * 4)
    assert set(vote.counts) == {"abcd"[row] for row in np.flatnonzero(want == 0)}
    np.testing.assert_array_equal(
        stop.lowest, trace_confidence(tokens, lengths=np.where(want > 0, want, 24), window=6).lowest
    )


def test_warm_up_calibration_and_consensus(pair) -> None:
    recorder = ConfidenceRecorder(window=5)
    stop = ConfidenceStop(recorder, consensus=0.9)
    generate(pair, recorder, stop, tokens=12)
    assert not stop.stopped_at.any() and not stop.decided
    stop.add(["a", "a", "b", None], [12, 12, 12, 3])
    lowest = trace_confidence(np.stack(recorder.steps, 1), lengths=[12, 12, 12, 3], window=5).lowest
    np.testing.assert_array_equal(stop.lowest, lowest)
    assert stop.calibrate(keep=0.5) == np.percentile(lowest, 50)
    assert stop.vote().voters == tuple(np.flatnonzero((lowest >= stop.threshold)[:3]))
    stop.threshold, stop.decided = 0.0, False  # everything votes
    generate(pair, recorder, stop, tokens=12, seed=1)
    vote = stop.add(["a", "a", "a", "a"], [12] * 4)
    assert vote.counts == {"a": 6, "b": 1}
    assert stop.decided == (vote.share >= 0.9)
    stop.consensus = 0.5
    stop.calibrate(keep=1.0)
    assert stop.decided
    out = generate(pair, recorder, stop, tokens=12, seed=2)
    assert len(recorder.steps) == 1, "nothing is left to decide: every row ends at once"
    assert out.sequences.shape[1] == len(pair.tokenizer.encode(PROMPT)) + 1
    stop.decided = False
    with pytest.raises(ShapeError, match="each of 4 rows"):
        stop.add(["a"], [3])


def test_a_criterion_without_its_recorder_says_so(pair) -> None:
    recorder = ConfidenceRecorder(window=5)
    with pytest.raises(ArgumentError, match=r"logits_processor=\[recorder\]"):
        ConfidenceStop(recorder, 1.0)(torch.zeros(1, 3, dtype=torch.long), None)
    with pytest.raises(ArgumentError, match="needs traces"):
        ConfidenceStop(recorder).calibrate()
    with pytest.raises(ArgumentError, match="consensus"):
        ConfidenceStop(recorder, consensus=2.0)


def first_letter(tokens: list[int]) -> str | None:
    text = bytes(tokens).decode(errors="replace")
    return next((character for character in text if character.isalpha()), None)


SETTINGS = {"answer": first_letter, "budget": 10, "warmup": 4, "window": 5, "max_new_tokens": 16, "temperature": 1.0}


def test_deep_think_offline_and_online(pair) -> None:
    prompt = pair.tokenizer.encode(PROMPT)
    offline = deep_think(pair.target, prompt, mode="offline", batch=4, keep=0.5, **SETTINGS)
    assert [trace.number for trace in offline.traces] == list(range(10))
    assert offline.tokens == sum(len(trace.tokens) for trace in offline.traces) == 160
    assert set(offline.votes) == {"majority", "weighted", "filtered"} and offline.threshold is None
    assert offline.answer == offline.votes["filtered"].answer
    # 10 traces in 4 places: the prompt is computed once, and places are refilled.
    for trace in offline.traces:
        assert trace.end == "length" and trace.lowest == trace_confidence(trace.confidence[None], window=5).lowest[0]

    online = deep_think(pair.target, prompt, mode="online", batch=4, keep=0.3, consensus=None, **SETTINGS)
    ends = {trace.number: trace for trace in online.traces}
    full = {trace.number: trace for trace in offline.traces}
    for number in range(4):
        assert ends[number].tokens == full[number].tokens, "a trace does not depend on what else runs"
    assert online.threshold == np.percentile([full[number].lowest for number in range(4)], 70)
    stopped = [trace for trace in online.traces if trace.end == "stopped"]
    assert stopped, "the threshold lets 3 of 10 pass"
    for trace in stopped:
        groups = trace_confidence(full[trace.number].confidence[None], window=5, groups=True).groups[0]
        assert len(trace.tokens) == np.argmax(groups < online.threshold) + 5
        assert trace.tokens == full[trace.number].tokens[: len(trace.tokens)] and trace.answer is None
    voters = {n for n in range(10) if full[n].lowest >= online.threshold and full[n].answer is not None}
    assert set(online.votes["online"].voters) == voters
    assert online.tokens < offline.tokens


def test_a_trace_is_plain_sampling(pair) -> None:
    """Each token again, from the whole sequence without a cache, by the numbers of (seed, trace, position)."""
    prompt = pair.tokenizer.encode(PROMPT)
    settings = SETTINGS | {"budget": 3, "max_new_tokens": 8}
    found = deep_think(pair.target, prompt, mode="offline", batch=2, seed=9, top_p=0.9, top_k=12, **settings)
    for trace in found.traces:
        tokens = [*prompt, *trace.tokens]
        with torch.inference_mode():
            logits = pair.target(input_ids=torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
        drawn = sample_target(
            logits.numpy(), temperature=1.0, top_k=12, top_p=0.9, seed=9,
            requests=np.full(len(logits), trace.number), positions=np.arange(len(prompt), len(tokens)),
        )  # fmt: skip
        assert drawn.tolist() == trace.tokens
        np.testing.assert_allclose(trace.confidence, token_confidence(logits.numpy()), rtol=1e-4)


def test_freed_places_are_refilled(pair, monkeypatch) -> None:
    free = []

    class Watched(_Thinker):
        def _step(self, cohort) -> None:
            free.append((len(self.free), len(self.cohorts), self.machine._started < self.machine.budget))
            super()._step(cohort)

    monkeypatch.setattr("tilewise.hf.deep_think._Thinker", Watched)
    settings = SETTINGS | {"budget": 16, "max_new_tokens": 30, "stop_tokens": [10, 32, 101]}
    deep_think(pair.target, pair.tokenizer.encode(PROMPT), mode="offline", batch=4, **settings)
    assert max(cohorts for _, cohorts, _ in free) > 1, "new traces run beside old ones"


@pytest.mark.parametrize("batch", [1, 10])
def test_deep_think_does_not_depend_on_the_batch(pair, batch: int) -> None:
    prompt = torch.tensor([pair.tokenizer.encode(PROMPT)])
    found = deep_think(pair.target, prompt, batch=batch, keep=0.5, consensus=0.8, seed=3, **SETTINGS)
    alone = deep_think(pair.target, prompt, batch=3, keep=0.5, consensus=0.8, seed=3, **SETTINGS)
    assert found.answer == alone.answer and found.votes["online"].voters == alone.votes["online"].voters
    tokens = {trace.number: trace.tokens for trace in alone.traces if trace.end != "cancelled"}
    for trace in found.traces:
        if trace.end != "cancelled" and trace.number in tokens:
            assert trace.tokens == tokens[trace.number]


def test_consensus_cancels_what_still_runs(pair) -> None:
    prompt = pair.tokenizer.encode(PROMPT)
    settings = SETTINGS | {"answer": lambda tokens: "same", "budget": 12}
    found = deep_think(pair.target, prompt, batch=6, keep=1.0, consensus=1.0, **settings)
    assert found.answer == "same" and found.votes["online"].voters == (0, 1, 2, 3)
    assert len(found.traces) == 4, "unanimous after the warm-up"
    stops = deep_think(
        pair.target, prompt, batch=6, keep=1.0, consensus=None, stop_tokens=[10], **(settings | {"max_new_tokens": 40})
    )
    for trace in stops.traces:
        assert (trace.tokens[-1] == 10) == (trace.end == "stop token") and 10 not in trace.tokens[:-1]
    before = pair.target.generation_config.eos_token_id
    pair.target.generation_config.eos_token_id = [10]
    try:  # the model's own, if none are given
        own = deep_think(pair.target, prompt, batch=6, keep=1.0, consensus=None, **(settings | {"max_new_tokens": 40}))
    finally:
        pair.target.generation_config.eos_token_id = before
    assert [trace.tokens for trace in own.traces] == [trace.tokens for trace in stops.traces]
    assert any(trace.end == "stop token" for trace in own.traces)


def test_boxed_answers_and_bad_arguments(pair) -> None:
    decode = lambda tokens: r"so \boxed{" + str(tokens[0]) + "}"  # noqa: E731
    settings = {name: value for name, value in SETTINGS.items() if name != "answer"}
    found = deep_think(pair.target, [100], decode=decode, mode="offline", **(settings | {"max_new_tokens": 2}))
    assert all(trace.answer == str(trace.tokens[0]) for trace in found.traces)
    none = deep_think(pair.target, [100], answer=lambda tokens: None, **settings)
    assert none.answer is None
    with pytest.raises(ArgumentError, match="one of decode"):
        deep_think(pair.target, [100], **settings)
    with pytest.raises(ArgumentError, match="mode"):
        deep_think(pair.target, [100], mode="both", **SETTINGS)
    with pytest.raises(ArgumentError, match="empty"):
        deep_think(pair.target, [], **SETTINGS)
    with pytest.raises(ShapeError, match="one prompt"):
        deep_think(pair.target, torch.zeros(2, 3), **SETTINGS)
    with pytest.raises(ArgumentError, match="batch"):
        deep_think(pair.target, [1], batch=0, **SETTINGS)
