"""The hooks inside transformers: equal to eager within what eager itself loses, and loud about what they refuse."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tilewise.hf  # noqa: E402
from tilewise.errors import UnsupportedError  # noqa: E402
from tilewise.hf import experts as hook  # noqa: E402

tilewise.hf.register()

TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2, **TOKENS,
}  # fmt: skip


def build(name: str):
    """A small random model in float64, with every weight that the hooks read away from its trivial value."""
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    if name == "llama":
        config = LlamaConfig(intermediate_size=48, **SIZES)
    elif name == "qwen3":
        config = Qwen3Config(intermediate_size=48, **SIZES)
    elif name == "qwen3_moe":
        config = Qwen3MoeConfig(
            intermediate_size=48, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True,
            **SIZES,
        )  # fmt: skip
    elif name == "mixtral":
        config = MixtralConfig(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    elif name == "gpt_oss":
        config = GptOssConfig(
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            layer_types=["sliding_attention", "full_attention"], **SIZES,
        )  # fmt: skip
    else:
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

        config = MiniMaxM3VLTextConfig(
            dense_intermediate_size=48, intermediate_size=24, shared_intermediate_size=16, num_local_experts=4,
            num_experts_per_tok=2, routed_scaling_factor=1.5, index_n_heads=2, index_head_dim=8, index_block_size=4,
            index_topk_blocks=2, index_local_blocks=1, layer_types=["full_attention"] + ["minimax_m3_sparse"] * 2,
            mlp_layer_types=["dense", "sparse", "sparse"], **(SIZES | {"num_hidden_layers": 3}),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        )  # fmt: skip
        torch.manual_seed(0)
        return MiniMaxM3VLForCausalLM(config).double().eval()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key or "sinks" in key:
                parameter.normal_(std=1.0 if "sinks" in key else 0.1)
    return model


MODELS = ["llama", "qwen3", "qwen3_moe", "mixtral", "gpt_oss"]
if importlib.util.find_spec("transformers.models.minimax_m3_vl"):  # younger than transformers 5.3
    MODELS.append("minimax_m3")


@pytest.fixture(scope="module", params=MODELS)
def trio(request):
    """The same weights three times: eager float64 (the truth), eager float32 (the yardstick), and float64 to switch."""
    truth = build(request.param)
    use(truth, "eager")
    yardstick = copy.deepcopy(truth).float()
    use(yardstick, "eager")
    return truth, yardstick, copy.deepcopy(truth)


def blocky(model) -> bool:
    return hasattr(model.config, "index_block_size")


def choose_all_blocks(model):
    """MiniMax-M3 for left padding: its indexer takes every block it may, and pads are shorter than a block.

    transformers anchors key blocks to slots and scores pad keys like others (a limit its own source notes). So with
    left padding the choice depends on what an implementation leaves in pad rows, where nothing is defined:
    transformers' own eager and sdpa disagree with each other there. Right padding has no such limit.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "topk_blocks"):
            module.topk_blocks = 99
    return model


def use(model, name: str):
    if name == "tilewise":
        tilewise.hf.switch(model)
        return model
    model.set_attn_implementation(name)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(name)
    return model


@contextlib.contextmanager
def float64_softmax():
    """Keep eager's softmax in float64, which transformers narrows to float32 whatever the model's dtype.

    Besides a truth that is one, this is the only way to run eager on padding in float64: its lowest float overflows
    to minus infinity on the way to float32, and a padded row becomes NaN.
    """
    original = torch.nn.functional.softmax

    def softmax(x, dim=None, _stacklevel=3, dtype=None):
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = original


def tilewise_in(model, dtype):
    return use(copy.deepcopy(model).to(dtype), "tilewise")


@torch.no_grad()
def logits(model, ids, mask=None, **kwargs):
    with float64_softmax():
        return model(ids, attention_mask=mask, **kwargs).logits.double()


def check(got, truth, yardstick, keep=None):
    """No worse than twice what eager float32 loses, over the positions that mean something."""
    if keep is not None:
        got, truth, yardstick = got[keep], truth[keep], yardstick[keep]
    budget = 2.0 * (yardstick - truth).abs().max() + 1e-6
    assert budget < 1e-2, "the yardstick itself is broken"
    assert (got - truth).abs().max() <= budget


def sample(rows: int, length: int):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def test_prefill_equals_eager(trio):
    truth, yardstick, model = trio
    ids = sample(2, 19)
    want, ruler = logits(truth, ids), logits(yardstick, ids)
    check(logits(tilewise_in(model, torch.float32), ids), want, ruler)
    # In float64 the hooks lose nothing; what remains are the float32 islands of transformers' own code.
    check(logits(tilewise_in(model, torch.float64), ids), want, ruler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_equal_eager(trio, dtype):
    """No worse than twice what eager loses in the same dtype, at the median position.

    Not at the worst one: where a router's scores nearly tie, rounding chooses another expert, in eager as in tilewise.
    """
    truth, _, model = trio
    ids, mask = sample(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    want = logits(truth, ids, mask)[mask.bool()]
    eager = logits(use(copy.deepcopy(truth).to(dtype), "eager"), ids, mask)[mask.bool()]
    got = logits(tilewise_in(model, dtype), ids, mask)[mask.bool()]
    assert torch.isfinite(got).all()
    assert (got - want).norm(dim=-1).median() <= 2.0 * (eager - want).norm(dim=-1).median()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_eager(trio, side):
    truth, yardstick, model = trio
    ids, mask = sample(3, 17), torch.ones(3, 17, dtype=torch.long)
    pads = (0, 3, 9)
    if blocky(truth) and side == "left":
        truth, yardstick, model = map(choose_all_blocks, (truth, yardstick, model))
        pads = (0, 2, 3)
    for row, pad in enumerate(pads):
        mask[row, slice(0, pad) if side == "left" else slice(17 - pad, 17)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"position_ids": positions} if side == "left" else {}
    got = logits(tilewise_in(model, torch.float32), ids, mask, **arguments)
    assert torch.isfinite(got).all()
    want, ruler = logits(truth, ids, mask, **arguments), logits(yardstick, ids, mask, **arguments)
    check(got, want, ruler, keep=mask.bool())
    unpadded = logits(tilewise_in(model, torch.float32), ids)
    assert (unpadded - got)[1:].abs().max() > 1e-3, "the padding is not masked"


def test_growing_cache_equals_eager(trio):
    """Prefill of 7, then steps of 1, 1, 3, 1 tokens over the cache, against one pass of eager."""
    truth, yardstick, model = trio
    ids = sample(2, 13)
    want, ruler = logits(truth, ids), logits(yardstick, ids)
    model = tilewise_in(model, torch.float32)
    cache, parts, start = transformers.DynamicCache(config=model.config), [], 0
    for size in (7, 1, 1, 3, 1):
        parts.append(logits(model, ids[:, start : start + size], past_key_values=cache, use_cache=True))
        start += size
    check(torch.cat(parts, dim=1), want, ruler)


def test_generate_is_token_identical(trio):
    truth, _, model = trio
    ids, mask = sample(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    if blocky(truth):
        truth, model = choose_all_blocks(truth), choose_all_blocks(model)
    arguments = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with float64_softmax():
        want = truth.generate(ids, **arguments)
        got = tilewise_in(model, torch.float64).generate(ids, **arguments)
    assert torch.equal(got, want)
    assert len(set(got[0, 9:].tolist())) > 3, "a constant continuation proves nothing"


def test_static_cache_prefill_equals_eager():
    """The prefill of an empty static cache has more keys than queries and no mask; its tail must not be seen."""
    truth = use(build("llama"), "eager")
    model = use(copy.deepcopy(truth), "tilewise")
    ids = sample(2, 6)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    got = logits(model, ids, past_key_values=cache, use_cache=True)
    assert torch.allclose(got, logits(truth, ids), atol=1e-5)
    more = sample(2, 1)
    step = logits(model, more, past_key_values=cache, use_cache=True)
    assert torch.allclose(step, logits(truth, torch.cat([ids, more], dim=1))[:, -1:], atol=1e-5)


def test_additive_masks_are_read_as_bool():
    model = use(build("llama"), "tilewise")
    ids = sample(1, 6)
    keep = torch.ones(6, 6, dtype=torch.bool).tril().view(1, 1, 6, 6)
    additive = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)
    assert torch.equal(logits(model, ids, additive), logits(model, ids))
    biased = logits(model, ids, additive + torch.linspace(0, 1, 6))
    assert torch.allclose(
        biased, logits(use(build("llama"), "eager"), ids, additive + torch.linspace(0, 1, 6)), atol=1e-5
    )
    assert not torch.allclose(biased, logits(model, ids), atol=1e-3)
    with pytest.raises(UnsupportedError, match=r"torch\.int64"):
        logits(model, ids, keep.long())


def test_sinks_and_blocks_reach_the_kernel():
    """Guards the comparisons above: without these arguments the results would differ."""
    from tilewise.hf.attention import attention_forward

    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 8, 16, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    plain, _ = attention_forward(module, q, k, v, None)
    module.sinks = torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        sunk, _ = attention_forward(module, q, k, v, None)
    given, _ = attention_forward(torch.nn.Module(), q, k, v, None, s_aux=torch.ones(4))
    assert torch.equal(sunk, given)
    assert not torch.allclose(sunk, plain, atol=1e-3)
    blocks = torch.full((1, 2, 8, 2), -1)
    blocks[..., 0] = torch.arange(8).view(1, 1, 8) // 4
    with pytest.raises(UnsupportedError, match="index_block_size"):
        attention_forward(torch.nn.Module(), q, k, v, None, block_indices=blocks)
    module = torch.nn.Module()
    module.indexer = torch.nn.Module()
    module.indexer.block_size = 4
    local, _ = attention_forward(module, q, k, v, None, block_indices=blocks)
    assert torch.allclose(local[:, :4], plain[:, :4], atol=1e-6)
    assert not torch.allclose(local[:, 4:], plain[:, 4:], atol=1e-3)


def test_window_without_a_mask():
    from tilewise.hf.attention import attention_forward

    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    want, _ = attention_forward(torch.nn.Module(), q, k, v, (distance >= 0) & (distance < 4))
    got, _ = attention_forward(torch.nn.Module(), q, k, v, None, sliding_window=4)
    assert torch.allclose(got, want)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi", torch.zeros(1)), ("head_mask", torch.zeros(1)), ("indices", torch.zeros(1)),
        ("cache", object()), ("output_attentions", True), ("brand_new_thing", 1),
    ],
)  # fmt: skip
def test_attention_refuses_by_name(name, value):
    from tilewise.hf.attention import attention_forward

    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match=name):
        attention_forward(torch.nn.Module(), q, q, q, None, **{name: value})
    # ... and the same names without a value pass, like everything known to be harmless.
    blank = {"output_attentions": False}.get(name)
    attention_forward(torch.nn.Module(), q, q, q, None, **{name: blank, "position_ids": torch.arange(3)})


class Stub(torch.nn.Module):
    """An expert module with any flags, and its own eager meaning."""

    def __init__(self, act="silu", *, gate=True, bias=False, transposed=False, concatenated=True, clamp=None):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        experts, n, d = 3, 6, 5
        wide = 2 * n if gate else n
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        first, second = draw(experts, wide, d), draw(experts, d, n)
        if transposed:
            first, second = (torch.nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (first, second))
        setattr(self, "gate_up_proj" if gate else "up_proj", first)
        self.down_proj = second
        if bias:
            setattr(self, "gate_up_proj_bias" if gate else "up_proj_bias", draw(experts, wide))
            self.down_proj_bias = draw(experts, d)
        self.act_fn = transformers.activations.ACT2FN[act]
        self.num_experts, self.clamp = experts, clamp
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = gate, bias, transposed, concatenated
        self.has_post_expert_norm, self._is_expert_parallel = False, False

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1) if self.is_concatenated else (x[..., ::2], x[..., 1::2])
        if self.clamp is not None:
            gate = gate.clamp(max=self.clamp)
        return self.act_fn(gate) * up

    def eager(self, x, ids, weights):
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(ids.shape[1]):
                e = int(ids[t, k])
                if e >= self.num_experts:
                    continue
                first = self.gate_up_proj[e] if self.has_gate else self.up_proj[e]
                second = self.down_proj[e]
                if self.is_transposed:
                    first, second = first.T, second.T
                h = first @ x[t]
                if self.has_bias:
                    h = h + (self.gate_up_proj_bias[e] if self.has_gate else self.up_proj_bias[e])
                h = second @ (self._apply_gate(h) if self.has_gate else self.act_fn(h))
                if self.has_bias:
                    h = h + self.down_proj_bias[e]
                out[t] += weights[t, k] * h
        return out


# A gated squared relu has no name in the kernels; its refusal is tested below.
@pytest.mark.parametrize(
    ("act", "gate"),
    [(act, gate) for act in ("silu", "gelu", "gelu_pytorch_tanh", "relu") for gate in (True, False)]
    + [("relu2", False)],
)
@pytest.mark.parametrize(("bias", "transposed", "concatenated"), [(0, 0, 1), (1, 1, 0), (1, 0, 0), (0, 1, 1)])
def test_every_flag_of_the_experts_hook(act, gate, bias, transposed, concatenated):
    module = Stub(act, gate=gate, bias=bool(bias), transposed=bool(transposed), concatenated=bool(concatenated))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 4, (7, 2), generator=generator)  # 3 is a sentinel of expert parallelism
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    module._is_expert_parallel = True
    with torch.no_grad():
        assert torch.allclose(hook.experts_forward(module, x, ids, weights), module.eager(x, ids, weights), atol=1e-10)


def test_experts_refuse_by_name():
    arguments = torch.ones(1, 5).double(), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1).double()
    module = Stub()
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="has_post_expert_norm"):
        hook.experts_forward(module, *arguments)
    for module in (Stub("silu", clamp=7.0), Stub("tanh"), Stub("relu2"), Stub("quick_gelu", gate=False)):
        with pytest.raises(UnsupportedError, match=r"Stub: its activation .* computes none of the known ones"):
            hook.experts_forward(module, *arguments)
    module = Stub()
    module.is_concatenated = True
    module._apply_gate = lambda x: module.act_fn(x[..., ::2]) * x[..., 1::2]  # says concatenated, computes interleaved
    with pytest.raises(UnsupportedError, match="concatenated layout"):
        hook.experts_forward(module, *arguments)


def test_the_probe_tells_the_layout_where_no_flag_does():
    for concatenated, layout in ((True, "concatenated"), (False, "interleaved")):
        module = Stub(concatenated=concatenated)
        assert hook.plan(module).layout == layout
        frozen = Stub(concatenated=concatenated)
        frozen._apply_gate = module._apply_gate
        del frozen.is_concatenated
        assert hook.plan(frozen).layout == layout


def test_a_plan_follows_the_module():
    module = Stub("silu")
    assert hook.plan(module).activation == "swiglu"
    assert hook.plan(module) is hook.plan(module)
    module.act_fn = transformers.activations.ACT2FN["gelu"]
    assert hook.plan(module).activation == "geglu"


def test_register_twice_and_no_side_effect_on_import():
    tilewise.hf.register()
    tilewise.hf.register()
    from tilewise.hf.attention import attention_forward

    assert transformers.AttentionInterface()["tilewise"] is attention_forward
    code = (
        "import sys, tilewise.hf; assert 'torch' not in sys.modules;"
        "from transformers import AttentionInterface; assert 'tilewise' not in AttentionInterface();"
        "tilewise.hf.register(); assert 'tilewise' in AttentionInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_generators_are_names_of_the_package():
    import tilewise.hf.engine
    import tilewise.hf.generate

    for name in ("SpeculativeGenerator", "EngineStats", "custom_generate", "serve_draft"):
        assert getattr(tilewise.hf, name) is getattr(tilewise.hf.engine, name)
    assert tilewise.hf.SpeculativeDecoder is tilewise.hf.generate.SpeculativeDecoder
    assert set(tilewise.hf._HOMES) < set(tilewise.hf.__all__)
