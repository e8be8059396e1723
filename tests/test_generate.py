"""Generation with a draft: the same tokens when greedy, the same law when not, and caches that roll back."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tilewise import speculation  # noqa: E402
from tilewise.errors import ArgumentError, DeviceError, ShapeError, UnsupportedError, VocabularyError  # noqa: E402
from tilewise.hf.generate import SpeculativeDecoder, Stats  # noqa: E402
from tilewise.hf.runners import LeanLlama, LeanLlamaRunner, ModuleRunner, runners  # noqa: E402
from tilewise.hf.testing import random_draft, random_target  # noqa: E402

WIDE = torch.float64  # greedy comparisons in float64, where a tie of random weights cannot happen


@pytest.fixture(scope="module")
def pair():
    return random_target(dtype=WIDE), random_draft(dtype=WIDE)


def sliding_model():
    """gpt-oss: sinks, and sliding layers whose cache forgets keys that a rollback needs."""
    config = transformers.GptOssConfig(
        vocab_size=256, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        max_position_embeddings=512, layer_types=["sliding_attention", "full_attention"], initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(config).to(WIDE).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            parameter.normal_(std=0.1)
    model.set_attn_implementation("tilewise")
    model.set_experts_implementation("tilewise")
    return model


def near(model, amount: float):
    """A draft that is often right: the model, with its weights shaken."""
    shaken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in shaken.parameters():
        parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator, dtype=WIDE)
    return shaken


def prompts(count: int, length: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, length), generator=generator).tolist()


def test_lean_llama_is_llama():
    """Against float64 of the modules, no worse than twice what their own float32 loses."""
    truth, single = random_draft(dtype=WIDE), random_draft()
    ids = prompts(1, 40)[0]
    with torch.inference_mode():
        want = truth(torch.tensor([ids])).logits[0]
        budget = 2.0 * (single(torch.tensor([ids])).logits[0].double() - want).abs().max() + 1e-6
        assert budget < 1e-3
        for model in (truth, single):
            assert LeanLlama.computes(model)
            sequence = LeanLlama(model).sequence()
            got = torch.cat([sequence.feed(ids[:17]), sequence.feed(ids[17:19]), sequence.feed(ids[19:])])
            assert (got.double() - want).abs().max() <= budget


def test_lean_llama_refuses_what_it_does_not_compute(pair):
    scaled = random_draft(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    for model in (pair[0], scaled, random_draft(attention_bias=True), random_draft(hidden_act="gelu")):
        assert not LeanLlama.computes(model)
        with pytest.raises(UnsupportedError, match="plain Llama"):
            LeanLlama(model)
        assert isinstance(runners(model, rollback=True, lean=True)(), ModuleRunner)


@pytest.mark.parametrize("kind", ["sparse target", "lean draft", "module draft", "sliding"])
def test_feeding_in_pieces_and_rolling_back_changes_nothing(pair, kind):
    model = {"sparse target": pair[0], "sliding": sliding_model()}.get(kind, pair[1])
    begin = runners(model, rollback=True, lean=kind == "lean draft")
    ids = prompts(1, 40)[0]
    with torch.inference_mode():
        sequence = begin()
        assert isinstance(sequence, LeanLlamaRunner) == (kind == "lean draft")
        want = begin().feed(ids)
        got = [sequence.feed(ids[:10])]
        for start in range(10, 40, 3):
            sequence.feed([(token + 1) % 256 for token in ids[start : start + 3]] + [7, 7])
            sequence.truncate(start)
            assert sequence.length == start
            got.append(sequence.feed(ids[start : start + 3]))
            sequence.truncate(min(start + 3, 40))
        assert torch.allclose(torch.cat(got), want, atol=1e-4)
        assert torch.equal(begin().feed(ids, last=1), want[-1:]) or torch.allclose(begin().feed(ids, last=1), want[-1:])


def test_lean_cache_grows():
    sequence = LeanLlama(random_draft(dtype=WIDE)).sequence()
    whole = LeanLlama(random_draft(dtype=WIDE)).sequence()
    ids = prompts(1, 300)[0]
    with torch.inference_mode():
        want = whole.feed(ids)
        got = torch.cat([sequence.feed(ids[:200]), *(sequence.feed([token]) for token in ids[200:])])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"draft_length": 1}, {"draft_length": 7}, {"draft_length": 7, "confidence": 0.3}]
)
def test_greedy_output_is_plain_greedy_output(pair, settings):
    target, draft = pair
    plain, fast = SpeculativeDecoder(target), SpeculativeDecoder(target, draft, **settings)
    for prompt in prompts(4):
        want = list(plain.generate(prompt, 40))
        assert list(fast.generate(prompt, 40)) == want
        assert len(want) == 40
        assert plain.stats.rounds == 39
        assert plain.stats.drafted == 0


def test_plain_greedy_is_what_transformers_generates(pair):
    for prompt in prompts(2):
        want = pair[0].generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, 12:].tolist()
        assert list(SpeculativeDecoder(pair[0]).generate(torch.tensor([prompt]), 30)) == want


def test_a_perfect_draft_is_always_accepted(pair):
    _, draft = pair
    fast = SpeculativeDecoder(draft, draft, draft_length=4)
    tokens = list(fast.generate(prompts(1)[0], 41))
    assert tokens == list(SpeculativeDecoder(draft).generate(prompts(1)[0], 41))
    stats = fast.stats
    assert (stats.rounds, stats.drafted, stats.accepted) == (8, 32, 32)
    assert stats.tokens_per_round == 5.0
    assert stats.acceptance_by_position == [1.0] * 4
    assert stats.tokens == len(tokens) == 41


def test_half_right_drafts_roll_back():
    """Some drafts stay, some do not, on every layer kind."""
    for target in (random_target(dtype=WIDE), sliding_model()):
        fast = SpeculativeDecoder(target, near(target, 0.02), draft_length=3)
        for prompt in prompts(3):
            assert list(fast.generate(prompt, 60)) == list(SpeculativeDecoder(target).generate(prompt, 60))
        assert 0 < fast.stats.accepted < fast.stats.drafted


SMALL = {"vocab_size": 5, "num_hidden_layers": 1, "initializer_range": 0.3}
RULES = {"temperature": 0.8, "top_p": 0.95}
PROMPT = [1, 4, 2]


def exact_law(model, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, from the model's logits alone."""
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        ids = torch.tensor([PROMPT + list(tokens) for tokens in laws])
        with torch.inference_mode():
            rows = speculation.process(model(ids).logits[:, -1].numpy(), RULES["temperature"], 0, RULES["top_p"])
        laws = {
            (*tokens, token): mass * float(row[token])
            for (tokens, mass), row in zip(laws.items(), rows, strict=True)
            for token in range(5)
        }
    return laws


def chi_square(counts: dict, law: dict, total: int) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells that expect fewer than 8 are pooled."""
    rare = [key for key, mass in law.items() if mass * total < 8.0]
    cells = [(counts.get(key, 0), mass * total) for key, mass in law.items() if mass * total >= 8.0]
    cells.append((sum(counts.get(key, 0) for key in rare), sum(law[key] for key in rare) * total))
    cells = [(seen, expected) for seen, expected in cells if expected > 0]
    return sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1


@pytest.mark.parametrize("kind", ["plain", "chain", "confident chain"])
def test_sampled_output_has_the_targets_law(kind):
    target = random_draft(seed=11, dtype=WIDE, **SMALL)
    draft = near(target, 0.35)
    settings = {"plain": {}, "chain": {"draft_length": 3}, "confident chain": {"draft_length": 3, "confidence": 0.25}}
    decoder = SpeculativeDecoder(target, None if kind == "plain" else draft, **settings[kind], **RULES, seed=2026)
    total, length = 1200, 4
    counts: dict[tuple[int, ...], int] = {}
    drafted = accepted = 0
    for request in range(total):
        tokens = tuple(decoder.generate(PROMPT, length, request=request))
        counts[tokens] = counts.get(tokens, 0) + 1
        drafted, accepted = drafted + decoder.stats.drafted, accepted + decoder.stats.accepted
    law = exact_law(target, length)
    assert math.isclose(sum(law.values()), 1.0)
    assert not set(counts) - {tokens for tokens, mass in law.items() if mass > 0}, "a token outside the nucleus"
    statistic, freedom = chi_square(counts, law, total)
    bound = freedom + 3.5 * math.sqrt(2.0 * freedom)
    assert freedom > 30
    assert statistic < bound
    wrong, wrong_freedom = chi_square(counts, exact_law(draft, length), total)
    assert wrong > 2 * (wrong_freedom + 3.5 * math.sqrt(2.0 * wrong_freedom)), "the test could not fail"
    if kind != "plain":
        assert 0.2 < accepted / drafted < 0.95


def test_sampling_is_a_function_of_seed_and_request(pair):
    def run(seed, request):
        decoder = SpeculativeDecoder(*pair, temperature=1.0, top_k=50, seed=seed)
        return list(decoder.generate(prompts(1)[0], 20, request=request))

    assert run(1, 0) == run(1, 0)
    assert len({tuple(run(seed, request)) for seed, request in itertools.product((1, 2), (0, 1))}) == 4


def test_stop_tokens_and_lengths(pair):
    plain = SpeculativeDecoder(pair[0])
    whole = list(plain.generate(prompts(1)[0], 30))
    stop = whole[11]
    for decoder in (plain, SpeculativeDecoder(pair[0], pair[0], draft_length=5)):
        cut = list(decoder.generate(prompts(1)[0], 30, stop_tokens={stop}))
        assert cut == whole[: whole.index(stop) + 1]
        assert decoder.stats.tokens == len(cut)
        for length in (0, 1, 2, 6):
            assert list(decoder.generate(prompts(1)[0], length)) == whole[:length]
    assert list(plain.generate([3], 5)) == list(SpeculativeDecoder(*pair).generate([3], 5))


def test_the_consumer_does_not_inherit_inference_mode(pair):
    for index, _ in enumerate(SpeculativeDecoder(*pair).generate(prompts(1)[0], 8)):
        assert not torch.is_inference_mode_enabled()
        torch.zeros(1, requires_grad=True).sum().backward()
        if index == 5:
            break
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(("given", "used"), [(None, 1), (2, 2)])
def test_threads_during_a_step_alone(pair, monkeypatch, given, used):
    seen = []
    feed = ModuleRunner.feed

    def watched(self, *arguments, **named):
        seen.append(torch.get_num_threads())
        return feed(self, *arguments, **named)

    monkeypatch.setattr(ModuleRunner, "feed", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in SpeculativeDecoder(*pair, threads=given).generate(prompts(1)[0], 4):
            assert torch.get_num_threads() == 3
        assert set(seen) == {used}
    finally:
        torch.set_num_threads(before)


def test_two_generations_of_one_decoder_do_not_mix(pair):
    decoder = SpeculativeDecoder(*pair)
    one, other = prompts(2)
    want = list(decoder.generate(one, 15)), list(decoder.generate(other, 15))
    both = list(zip(decoder.generate(one, 15), decoder.generate(other, 15), strict=True))
    assert tuple(map(list, zip(*both, strict=True))) == want


def test_stats():
    stats = Stats(tokens=8, seconds=2.0)
    stats.count(3, 2)
    stats.count(3, 0)
    stats.count(1, 1)
    assert (stats.drafted_at, stats.accepted_at) == ([3, 2, 2], [2, 1, 0])
    assert (stats.drafted, stats.accepted, stats.rounds) == (7, 3, 3)
    assert stats.acceptance_by_position == [2 / 3, 1 / 2, 0.0]
    assert stats.tokens_per_round == 2.0
    assert stats.tokens_per_second == 4.0
    assert (Stats().tokens_per_second, Stats().tokens_per_round) == (0.0, 0.0)


def test_bfloat16_logits_are_read_exactly():
    model = random_draft(dtype=torch.bfloat16)
    tokens = list(SpeculativeDecoder(model, model).generate(prompts(1)[0], 10))
    assert len(tokens) == 10
    assert np.isin(tokens, np.arange(256)).all()


def test_errors(pair):
    target, draft = pair
    for settings, message in (
        ({"draft_length": 0}, "draft_length"), ({"confidence": 1.5}, "confidence"),
        ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"threads": 0}, "threads"), ({"seed": -1}, "seed"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            SpeculativeDecoder(target, draft, **settings)
    with pytest.raises(VocabularyError, match="the draft knows 97 tokens and the target 256"):
        SpeculativeDecoder(target, random_draft(vocab_size=97))
    with pytest.raises(ArgumentError, match=r"the draft is in training mode"):
        SpeculativeDecoder(target, random_draft().train())
    with pytest.raises(DeviceError, match="the target is on meta"):
        SpeculativeDecoder(random_target().to("meta"))
    decoder = SpeculativeDecoder(target, draft)
    for prompt, message in (([], "empty"), ([256], "token 256"), ([-1], "token -1"), ([1] * 500, "512 positions")):
        with pytest.raises(ArgumentError, match=message):
            decoder.generate(prompt, 20)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        decoder.generate([1], -1)
    with pytest.raises(ShapeError, match="one prompt"):
        decoder.generate(torch.ones(2, 3, dtype=torch.long), 20)


def test_models_without_a_cache_that_rolls_back_are_refused():
    small = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": None, "eos_token_id": None}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(state_size=4, **small)).eval()
    with pytest.raises(UnsupportedError, match="takes no past_key_values"):
        SpeculativeDecoder(mamba)
    config = transformers.Qwen3NextConfig(
        intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        moe_intermediate_size=8, num_experts_per_tok=1,
        shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
        **small,
    )  # fmt: skip
    hybrid = transformers.Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedError, match="cannot be rolled back"):
        SpeculativeDecoder(hybrid, random_draft())
    assert len(list(SpeculativeDecoder(hybrid).generate([1, 2, 3], 4))) == 4
