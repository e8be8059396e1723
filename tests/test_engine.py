"""The engine: the output is plain decoding's whatever the drafts do, and nothing is left when a process dies."""

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tilewise.errors import ArgumentError, UnsupportedError, VocabularyError  # noqa: E402
from tilewise.hf.engine import EngineStats, SpeculativeGenerator, custom_generate, serve_draft  # noqa: E402
from tilewise.hf.generate import SpeculativeDecoder  # noqa: E402
from tilewise.hf.testing import random_draft  # noqa: E402
from tilewise.hf.tokenizers import ByteTokenizer  # noqa: E402
from tilewise.speculation import Proposal  # noqa: E402

pytestmark = pytest.mark.timeout(180)
PROMPTS = [[10, 20, 30, 40], [7], [200, 3, 77, 77, 77, 5, 1], [10, 20, 30, 40]]


@pytest.fixture(scope="module")
def pair():
    target = random_draft(seed=3, num_hidden_layers=3)
    draft = random_draft(seed=3, num_hidden_layers=3)
    with torch.no_grad():  # a draft that is right most of the time
        noise = torch.Generator().manual_seed(1)
        for parameter in draft.parameters():
            parameter.add_(0.005 * torch.randn(parameter.shape, generator=noise))
    return target, draft


@pytest.fixture(scope="module")
def greedy(pair):
    fixed = {"draft_length": 4, "budget": 8, "adaptive": False, "fallback": "neural"}
    with SpeculativeGenerator(*pair, **fixed, tokenizer=ByteTokenizer()) as generator:
        assert generator.wait_until_ready()
        yield generator


@pytest.fixture
def slow(greedy, monkeypatch):
    """The same with a target that takes its time, so that drafts are made ahead."""
    start = greedy._start_target

    def slowed():
        runner = start()
        feed = runner.feed
        runner.feed = lambda *args, **options: (time.sleep(0.03), feed(*args, **options))[1]
        return runner

    monkeypatch.setattr(greedy, "_start_target", slowed)
    monkeypatch.setattr(greedy, "stats", EngineStats())
    return greedy


def plain(pair, prompt, count, **settings):
    return list(SpeculativeDecoder(pair[0], **settings).generate(prompt, count))


def test_P2_greedy_is_plain_greedy(pair, slow):
    found = slow.generate(PROMPTS, 60)
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result.tokens == plain(pair, prompt, 60) and result.reason == "limit"
        assert result.text == ByteTokenizer().decode(result.tokens)
    assert slow.stats.hit_rate > 0.3  # drafts made ahead were used
    assert slow.stats.machine["hits"]["first"] > 0  # also those made while the prompt was read
    assert slow.stats.tokens == 240 == sum(each.accepted + 1 for each in slow.stats.records) + len(PROMPTS)  # P4


def test_E16_ties_go_to_the_lower_token_whoever_looks():
    """Every token has a twin with the same logits: in every row at least two are the largest."""
    model = random_draft(seed=8)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[128:] = weight[:128]
    want = list(SpeculativeDecoder(model).generate([3, 1, 4], 60))
    assert max(want) < 128
    with SpeculativeGenerator(model, model, draft_length=5, adaptive=False, fallback="neural") as generator:
        assert generator.wait_until_ready()
        assert generator.generate([[3, 1, 4]], 60)[0].tokens == want
        assert sum(generator.stats.accepted.get("drafted", [])[1:]) + sum(
            generator.stats.accepted.get("cached", [])[1:]
        )


def test_E16_near_ties_in_float64():
    """Every token has a twin closer than float32 can tell; a step over many tokens decides as a step over one."""
    model = random_draft(seed=8, dtype=torch.float64)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        noise = torch.randn(weight[:128].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        weight[128:] = weight[:128] * (1.0 + 1e-9 * noise)
    want = list(SpeculativeDecoder(model).generate([3, 1, 4], 80))
    assert min(want) < 128 <= max(want)
    with SpeculativeGenerator(model, model, draft_length=5, adaptive=False, fallback="neural") as generator:
        assert generator.wait_until_ready()
        assert generator.generate([[3, 1, 4]], 80)[0].tokens == want
        assert generator.stats.tokens_per_round > 2.0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_E15_a_draft_whose_tokens_mean_something_else_changes_nothing_but_the_speed(pair, temperature):
    """As many tokens, of another tokenizer: the sizes agree, and nobody can tell."""
    draft = copy.deepcopy(pair[0])
    order = torch.randperm(256, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(pair[0].get_input_embeddings().weight[order])
        draft.get_output_embeddings().weight.copy_(pair[0].get_output_embeddings().weight[order])
    rules = {"temperature": temperature, "seed": 4}
    with SpeculativeGenerator(pair[0], draft_length=0, lookup=False, **rules) as alone:
        want = alone.generate([PROMPTS[0]], 60)[0].tokens
    with SpeculativeGenerator(pair[0], draft, draft_length=4, fallback="neural", adaptive=False, **rules) as generator:
        assert generator.wait_until_ready()
        assert generator.generate([PROMPTS[0]], 60)[0].tokens == want
        assert generator.stats.tokens_per_round < 2.5


@pytest.mark.parametrize(
    "settings",
    [
        {"fallback": "fast", "budget": 12, "draft_length": 3},
        {"fallback": "neural", "budget": 0, "draft_length": 5, "adaptive": False},
        {"fallback": "neural", "budget": 3, "draft_length": 6, "adaptive": False, "lookup": False, "max_batch": 2},
        {"workers": 2, "budget": 9, "draft_length": 3, "max_batch": 3},
        {"draft_length": 1, "budget": 2, "adaptive": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_coupled_output_is_plain_output_in_every_mode(pair, settings, temperature):
    rules = {"temperature": temperature, "top_p": 0.95 if temperature else 1.0, "seed": 11}
    with SpeculativeGenerator(pair[0], draft_length=0, lookup=False, **rules) as alone:
        want = [each.tokens for each in alone.generate(PROMPTS, 40)]
        assert alone.stats.tokens_per_round == 1.0
    if temperature:
        assert want[0] != want[3]  # E8: two requests with one prompt have numbers of their own
    with SpeculativeGenerator(*pair, **settings, **rules) as generator:
        generator.wait_until_ready()
        for _ in range(2):
            assert [each.tokens for each in generator.generate(PROMPTS, 40)] == want
        assert generator.stats.tokens == 2 * 4 * 40


@pytest.mark.parametrize("saguaro", [1.0, 0.3])
def test_rejection_output_is_a_function_of_the_target_at_temperature_0(pair, saguaro):
    with SpeculativeGenerator(*pair, rule="rejection", saguaro=saguaro, draft_length=4, budget=8) as generator:
        generator.wait_until_ready()
        for prompt, result in zip(PROMPTS, generator.generate(PROMPTS, 40), strict=True):
            assert result.tokens == plain(pair, prompt, 40)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_P3_the_law_of_sampled_output(rule):
    """Sequences of four tokens over a vocabulary of three, from a running engine, against the enumerated law."""
    target = random_draft(seed=5, vocab_size=3)
    draft = random_draft(seed=6, vocab_size=3)
    count, prompt = 1500, [1, 2]
    law = {}
    with torch.inference_mode():
        for tokens in itertools.product(range(3), repeat=4):
            logits = target(torch.tensor([[*prompt, *tokens]])).logits[0].double()
            rows = torch.log_softmax(logits / 0.8, dim=-1)
            law[tokens] = float(sum(rows[1 + i, token] for i, token in enumerate(tokens)).exp())
    assert abs(sum(law.values()) - 1) < 1e-6
    seen = dict.fromkeys(law, 0)
    rules = {"rule": rule, "temperature": 0.8, "seed": 2, "saguaro": 0.5, "draft_length": 2, "budget": 4}
    with SpeculativeGenerator(target, draft, adaptive=False, fallback="neural", support=3, **rules) as generator:
        generator.wait_until_ready()
        for begin in range(0, count, 50):
            for result in generator.generate([prompt] * 50, 4, request=begin):
                seen[tuple(result.tokens)] += 1
        assert {"cached", "drafted"} <= set(generator.stats.accepted)
    expected = np.array([law[key] * count for key in law])
    observed = np.array([seen[key] for key in law])
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), expected.size - 1
    # Wilson and Hilferty's cube root: good to three digits at these degrees of freedom.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert math.erfc(z / math.sqrt(2)) / 2 > 1e-3


def test_E6_stops(pair, greedy):
    whole = plain(pair, PROMPTS[0], 50)
    for index in (0, 1, 5, 17):
        stop = whole[index]
        first = whole.index(stop)
        [result] = greedy.generate([PROMPTS[0]], 50, stop_tokens=[stop])
        assert (result.tokens, result.reason) == (whole[: first + 1], "stopped")
    for count in (0, 1, 2, 3, 49):
        [result] = greedy.generate([PROMPTS[0]], count)
        assert (result.tokens, result.reason) == (whole[:count], "limit")


class _Latin:
    """A character for every byte: any tokens are a text."""

    vocab_size = 256

    def decode(self, tokens):
        return bytes(tokens).decode("latin-1")

    def stream(self):
        return self

    def feed(self, token):
        return chr(token)


def test_E6_stop_strings_span_rounds(pair, greedy, monkeypatch):
    tokenizer = _Latin()
    monkeypatch.setattr(greedy, "_tokenizer", tokenizer)
    whole = plain(pair, PROMPTS[2], 60)
    text = tokenizer.decode(whole)
    for begin, length in ((3, 1), (10, 4), (20, 9)):
        string = text[begin : begin + length]
        [result] = greedy.generate([PROMPTS[2]], 60, stop_strings=["never in it", string])
        assert result.reason == "stopped"
        assert result.tokens == whole[: len(result.tokens)]
        assert string in result.text and string not in tokenizer.decode(result.tokens[:-1])


def test_streaming_and_what_is_given_up(pair, greedy):
    got = {0: [], 1: []}
    for index, tokens in greedy.stream(PROMPTS[:2], 30):
        assert tokens
        got[index] += tokens
    assert [got[0], got[1]] == [plain(pair, prompt, 30) for prompt in PROMPTS[:2]]
    iterator = greedy.stream(PROMPTS[:3], 200)
    for _ in range(4):
        next(iterator)
    iterator.close()  # E9: drafts of these may still come
    assert [each.tokens for each in greedy.generate(PROMPTS, 25)] == [plain(pair, each, 25) for each in PROMPTS]
    assert not greedy._requests and not greedy._contents  # nothing is kept of what is over


def test_without_a_draft_look_ups_are_drafts(pair):
    prompt = [1, 2, 3, 4, 5, 6] * 6
    with SpeculativeGenerator(pair[0], draft_length=4) as generator:
        [result] = generator.generate([prompt], 80)
        assert result.tokens == plain(pair, prompt, 80)
        assert set(generator.stats.accepted) <= {"fast", "none"}


def test_look_ups_go_on_behind_the_drafts_own_tokens(pair, monkeypatch):
    prompt, count = [1, 2, 3, 4, 5, 6], 120
    whole = prompt + plain(pair, prompt, count)

    class Knows:
        """Looks up what will come."""

        def __init__(self):
            self.length = 0

        def extend(self, tokens):
            self.length += len(tokens)

        def guess(self, count, after=()):
            at = self.length + len(after)
            return Proposal(whole[at : at + count], 8)

        def __len__(self):
            return self.length

    monkeypatch.setattr("tilewise.hf.engine.generator.SuffixDraft", Knows)
    monkeypatch.setattr("tilewise.hf.engine.loop.Loop._least", 0.001)  # however long a verification takes
    with SpeculativeGenerator(*pair, draft_length=9, depth=2, fallback="neural") as generator:
        assert generator.wait_until_ready()
        for _ in range(2):
            [result] = generator.generate([prompt], count)
            assert prompt + result.tokens == whole
        chains = [each for each in generator.stats.records if each.source in ("cached", "drafted")]
        assert 2 < max(each.accepted for each in chains) <= max(each.length for each in chains) <= 9


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.08])
def test_P15_killing_the_draft_changes_nothing(pair, after):
    with SpeculativeGenerator(*pair, draft_length=4, budget=8, adaptive=False, fallback="neural") as generator:
        assert generator.wait_until_ready()
        process = generator._drafts.processes[0].process
        iterator = generator.stream(PROMPTS, 120)
        got = [[] for _ in PROMPTS]
        for count, (index, tokens) in enumerate(iterator):
            got[index] += tokens
            if count == 3:
                time.sleep(after)
                os.kill(process.pid, signal.SIGKILL)
        assert got == [plain(pair, prompt, 120) for prompt in PROMPTS]
        assert generator.stats.lost_workers == 1
        generator.generate([PROMPTS[0]], 5)  # a new process is started, and joins when it is ready
        assert generator.wait_until_ready()
        [result] = generator.generate([PROMPTS[0]], 60)
        assert result.tokens == got[0][:60] and generator.stats.accepted["drafted"]


def test_P15_a_draft_that_hangs_is_given_up_on(pair):
    with SpeculativeGenerator(*pair, draft_length=4, budget=8, patience=0.1) as generator:
        assert generator.wait_until_ready()
        process = generator._drafts.processes[0].process
        os.kill(process.pid, signal.SIGSTOP)
        try:
            [result] = generator.generate([PROMPTS[0]], 80)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert result.tokens == plain(pair, PROMPTS[0], 80)


_VICTIM = """
    import sys, time
    from tilewise.hf.engine import SpeculativeGenerator
    from tilewise.hf.testing import random_draft
    with SpeculativeGenerator(random_draft(seed=1), random_draft(seed=2)) as generator:
        generator.wait_until_ready()
        print(generator._drafts.processes[0].process.pid, flush=True)
        while True:
            generator.generate([[1, 2, 3]], 100)
"""


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_target_leaves_nothing(how):
    before = set(os.listdir("/dev/shm"))
    program = [sys.executable, "-c", textwrap.dedent(_VICTIM)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as victim:
        draft = int(victim.stdout.readline())
        sockets = [os.readlink(f"/proc/{draft}/fd/{fd}") for fd in os.listdir(f"/proc/{draft}/fd")]
        assert any(each.startswith("socket:") for each in sockets)
        time.sleep(0.2)
        victim.send_signal(how)
        victim.wait()
    deadline = time.monotonic() + 10
    while _alive(draft) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(draft)
    assert set(os.listdir("/dev/shm")) <= before


def test_a_draft_that_cannot_start_is_no_hindrance(pair, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with SpeculativeGenerator(*pair, draft_length=3) as generator:
        [result] = generator.generate([PROMPTS[0]], 40)
        assert result.tokens == plain(pair, PROMPTS[0], 40)
        assert not generator.wait_until_ready(5)


def test_custom_generate(pair, greedy):
    target = pair[0]
    function = custom_generate(greedy)
    ids = torch.tensor([[0, 0, 1, 2], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    out = target.generate(ids, attention_mask=mask, custom_generate=function, max_new_tokens=12, do_sample=False)
    assert out.shape == (2, 16) and (out[:, :4] == ids).all()
    assert out[0, 4:].tolist() == plain(pair, [1, 2], 12)
    assert out[1, 4:].tolist() == plain(pair, [5, 6, 7, 8], 12)
    stop = plain(pair, [5, 6, 7, 8], 12)[4]
    out = target.generate(
        ids[1:], custom_generate=function, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=9
    )
    assert out.shape[1] == 4 + plain(pair, [5, 6, 7, 8], 12).index(stop) + 1
    with pytest.raises(ArgumentError, match="temperature"):
        target.generate(ids, custom_generate=function, max_new_tokens=2, do_sample=True, temperature=0.5)
    with pytest.raises(UnsupportedError, match="Repetition"):
        target.generate(ids, custom_generate=function, max_new_tokens=2, do_sample=False, repetition_penalty=1.5)
    with pytest.raises(ArgumentError, match="another model"):
        pair[1].generate(ids, custom_generate=function, max_new_tokens=2, do_sample=False)


def test_bad_input(pair, greedy):
    target, draft = pair
    with pytest.raises(VocabularyError, match=r"256.*7|7.*256"):
        SpeculativeGenerator(target, random_draft(vocab_size=7))
    with pytest.raises(ArgumentError, match="rule"):
        SpeculativeGenerator(target, rule="lossy")
    with pytest.raises(ArgumentError, match="saguaro"):
        SpeculativeGenerator(target, draft, saguaro=1.5)
    with pytest.raises(ArgumentError, match="support"):
        SpeculativeGenerator(target, draft, support=0)
    with pytest.raises(ArgumentError, match="draft_threads"):
        SpeculativeGenerator(target, draft, draft_threads=0)
    with pytest.raises(ArgumentError, match="fallback"):
        SpeculativeGenerator(target, draft, fallback="slow")
    with pytest.raises(ArgumentError, match="temperature"):
        SpeculativeGenerator(target, temperature=-1.0)
    with pytest.raises(ArgumentError, match="empty"):
        greedy.generate([[]], 3)
    with pytest.raises(ArgumentError, match="positions"):
        greedy.generate([[1]], 600)
    with pytest.raises(ArgumentError, match="vocabulary"):
        greedy.generate([[1, 999]], 6)
    with pytest.raises(ArgumentError, match="at least 0"):
        greedy.generate([[1]], -1)
    with pytest.raises(ArgumentError, match="tokenizer"), SpeculativeGenerator(target) as alone:
        alone.generate([[1]], 3, stop_strings=["x"])
    with pytest.raises(ArgumentError, match="empty string"):
        greedy.generate([[1]], 3, stop_strings=[""])
    with pytest.raises(ArgumentError, match="torchrun"):
        serve_draft(draft)
    with pytest.raises(VocabularyError, match=r"255.*256"):  # E15: a draft on another machine says what it knows
        greedy._heard(0, ["ready", 255], [])
    assert greedy.generate([], 3) == []


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun")
def test_started_by_torchrun(tmp_path):
    program = tmp_path / "run.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, time
            from tilewise.hf.engine import SpeculativeGenerator, serve_draft
            from tilewise.hf.testing import random_draft
            if os.environ["RANK"] == "0":
                with SpeculativeGenerator(random_draft(seed=1), workers="torchrun", draft_length=3,
                                          adaptive=False, fallback="neural") as generator:
                    start = generator._start_target
                    def slowed():  # drafts need time to be made ahead
                        runner = start()
                        feed = runner.feed
                        runner.feed = lambda *args, **options: (time.sleep(0.03), feed(*args, **options))[1]
                        return runner
                    generator._start_target = slowed
                    assert generator.wait_until_ready()
                    [result] = generator.generate([[1, 2, 3]], 40)
                    print("made", result.tokens, generator.stats.accepted, flush=True)
            else:
                serve_draft(random_draft(seed=1))
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(program)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    want = list(SpeculativeDecoder(random_draft(seed=1)).generate([1, 2, 3], 40))
    assert f"made {want}" in done.stdout and "cached" in done.stdout
