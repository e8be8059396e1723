"""Training transformers models with tilewise's experts: eager's losses and gradients, and everything around a step."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tilewise.hf  # noqa: E402
from tilewise.testing import assert_within_budget  # noqa: E402

_spec = importlib.util.spec_from_file_location("hf_models", Path(__file__).parent / "hf_models.py")
assert _spec is not None and _spec.loader is not None
hf_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hf_models)
float64_softmax = hf_models.float64_softmax

tilewise.hf.register()


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's threads, which wait for each other in a busy loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=hf_models.NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    """A small model in float64 with eager experts; tests copy it."""
    return hf_models.build(request.param)


def use(model: Any, dtype: Any, implementation: str) -> Any:
    """A copy in another precision, with other experts."""
    model = copy.deepcopy(model).to(dtype)
    if implementation == "tilewise":
        tilewise.hf.switch(model, attention=False)
    else:
        model.set_experts_implementation(implementation)
    return model


def curve(model: Any, steps: int) -> Any:
    """Losses of some steps. Plain momentum: an adaptive optimiser would forgive gradients of the wrong size."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    with float64_softmax():
        for ids in hf_models.batches(steps):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def gradients(model: Any, ids: Any, **autocast: Any) -> dict[str, Any]:
    """The loss's gradient by every parameter (zeros for one that it does not depend on)."""
    model.zero_grad()
    with float64_softmax(), torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def of_the_layer(name: str) -> bool:
    return ".experts." in name or name.endswith(("gate.weight", "router.weight", "router.bias"))


def test_loss_curves_equal_eager(model: Any) -> None:
    """50 steps in float32: no further from eager float64 than twice what transformers' own float32 experts are."""
    truth = curve(use(model, torch.float64, "eager"), 50)
    plain = [curve(use(model, torch.float32, name), 50) for name in ("eager", "grouped_mm")]
    lost = max(float((other - truth).abs().max()) for other in plain)
    assert lost < 1e-3, "the yardstick itself left the curve: no budget can be made of it"
    got = curve(use(model, torch.float32, "tilewise"), 50)
    # A loss is written in float32: a few of its roundings are always allowed.
    budget = max(2.0 * lost, 8 * 2.0**-23 * float(truth.max()))
    assert float((got - truth).abs().max()) <= budget
    assert truth[-1] < truth[0] - 0.5, "a model that does not learn proves nothing"


def test_gradients_equal_eager(model: Any) -> None:
    ids = hf_models.batches(1)[0]
    truth = gradients(use(model, torch.float64, "eager"), ids)
    plain = gradients(use(model, torch.float32, "eager"), ids)
    got = gradients(use(model, torch.float32, "tilewise"), ids)
    exact = gradients(use(model, torch.float64, "tilewise"), ids)
    assert any(of_the_layer(name) and float(value.abs().max()) > 1e-4 for name, value in truth.items())
    for name, value in truth.items():
        # One more rounding than the plain run may have had luck with.
        floor = 4 * 2.0**-23
        assert_within_budget(got[name], value, plain[name], norm="frobenius", floor=floor)
        # In float64 what remains are the float32 islands of transformers' norms.
        assert_within_budget(exact[name], value, plain[name], norm="frobenius", factor=1.0)


def test_gradient_checkpointing_changes_nothing(model: Any) -> None:
    """Section 8, group 15: the layer computed again in the backward pass gives the same bits."""
    ids = hf_models.batches(1)[0]
    plain = gradients(use(model, torch.float32, "tilewise"), ids)
    checkpointed = use(model, torch.float32, "tilewise")
    # transformers renamed it in 5.23.
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    experts = next(module for module in checkpointed.modules() if hasattr(module, "_apply_gate"))
    experts.register_forward_pre_hook(count)  # the second pass stops inside, once it has what it needs
    got = gradients(checkpointed, ids)
    assert calls == 2, "nothing was computed again"
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_gradient_accumulation_adds_up(model: Any) -> None:
    """Section 8, group 15: a second backward adds to .grad, and equals the sum of the two alone."""
    model = use(model, torch.float32, "tilewise")
    first, second = hf_models.batches(2)
    alone = gradients(model, first), gradients(model, second)
    model.zero_grad()
    for ids in (first, second):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, alone[0][name] + alone[1][name]), name


def test_autocast_equals_eager_autocast(model: Any) -> None:
    """Gradients of float32 parameters under bfloat16 autocast: no worse than twice eager's under it, in the median."""
    ids = hf_models.batches(1)[0]
    truth = gradients(use(model, torch.float64, "eager"), ids)
    plain = gradients(use(model, torch.float32, "eager"), ids, dtype=torch.bfloat16)
    got = gradients(use(model, torch.float32, "tilewise"), ids, dtype=torch.bfloat16)

    def error(found: dict[str, Any], name: str) -> Any:
        return (found[name].double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-30)

    names = [name for name in truth if of_the_layer(name)]
    assert names
    # In the median over parameters: where router scores nearly tie, rounding chooses another expert, in eager too.
    ours, theirs = (torch.stack([error(found, name) for name in names]).median() for found in (got, plain))
    assert torch.isfinite(ours) and ours <= 2.0 * theirs
    assert ours > 1e-4, "float32 arithmetic: autocast did nothing"
    assert all(got[name].dtype == torch.float32 for name in names)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiled_layers_and_models_train_the_same(name: str) -> None:
    """The expert layer in one graph with its first call compiled, and the whole model; gradients bit for bit."""
    model = use(hf_models.build(name), torch.float32, "tilewise")
    ids = hf_models.batches(1)[0]
    plain = gradients(model, ids)
    block = model.model.layers[-1].mlp
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def through(layer: Callable[..., Any]) -> list[Any]:
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]

    want = through(block)
    tilewise.hf.experts._plans.clear()  # the plan is made while the graph is traced
    torch._dynamo.reset()
    got = through(torch.compile(block, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, plain[key], rtol=1e-4, atol=1e-6), key


def test_frozen_parameters_get_no_gradient_and_cost_nothing(model: Any) -> None:
    """Section 8, group 12: with the experts frozen the rest of the model trains as before."""
    ids = hf_models.batches(1)[0]
    free = gradients(use(model, torch.float32, "tilewise"), ids)
    frozen = use(model, torch.float32, "tilewise")
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    got = gradients(frozen, ids)
    for name, parameter in frozen.named_parameters():
        if ".experts." in name:
            assert parameter.grad is None
        else:
            assert torch.equal(got[name], free[name]), name


# Token rounding


TILE = 16


def logits_of(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids).logits


def test_rounding_in_training_and_none_in_eval(model: Any) -> None:
    """Loads are multiples of the tile while the model trains; evaluation and what follows remove() are untouched."""
    ids = hf_models.batches(1, rows=8, length=20)[0]
    model = use(model, torch.float32, "tilewise")
    training, evaluation = logits_of(model.train(), ids), logits_of(model.eval(), ids)
    with tilewise.hf.round_tokens(model, tile=TILE) as rounding:
        assert torch.equal(logits_of(model, ids), evaluation)
        assert not rounding.loads, "rounded in eval"
        rounded = logits_of(model.train(), ids)
        assert rounding.loads
        for name, load in rounding.loads.items():
            slots = model.get_submodule(name).experts.config.num_experts_per_tok
            assert load.before.sum() == ids.numel() * slots
            assert (load.after % TILE == 0).all() and ((load.after - load.before).abs() <= TILE / 2).all()
        assert any((load.before % TILE != 0).any() for load in rounding.loads.values())
        assert not torch.equal(rounded, training)
        assert torch.isfinite(rounded).all()
        assert torch.equal(logits_of(model.eval(), ids), evaluation)
    assert torch.equal(logits_of(model.train(), ids), training)
    rounding.remove()  # harmless


def test_a_tile_of_one_trains_as_without(model: Any) -> None:
    """Every pair of top-k with the router's own weights: the gradients of a rounding that changes nothing."""
    ids = hf_models.batches(1)[0]
    truth = gradients(use(model, torch.float64, "tilewise"), ids)
    model = use(model, torch.float64, "tilewise")
    with tilewise.hf.round_tokens(model, tile=1):
        got = gradients(model, ids)
    for name, value in truth.items():
        assert torch.allclose(got[name], value, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("rule", ["down", "up", "stochastic"])
def test_gradients_of_a_rounded_model(model: Any, rule: Any) -> None:
    """Against autograd through the router's formula, added pairs included: the last block's loss by its router."""
    model = use(model, torch.float64, "tilewise")
    with tilewise.hf.round_tokens(model, rule, tile=TILE) as rounding:
        layer = rounding._layers[-1]
        x = torch.randn(70, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
        logits, _, ids = layer.router(x)
        routing = layer.take(ids)
    assert routing is not None
    experts = logits.shape[1]
    assert (routing.counts(experts) % TILE == 0).all()
    scoring, renormalise, scale = layer.formula
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    if renormalise:
        scores = scores / scores.gather(1, ids).sum(-1, keepdim=True)
    want = scale * scores[routing.token_ids.long(), routing.expert_ids.long()]
    assert torch.allclose(routing.weights, want, rtol=1e-5)  # some routers compute in float32
    answer = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got,) = torch.autograd.grad((routing.weights * answer).sum(), layer.router.weight, retain_graph=True)
    (truth,) = torch.autograd.grad((want * answer).sum(), layer.router.weight)
    assert torch.allclose(got, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    chosen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    added = ~chosen[routing.token_ids.long(), routing.expert_ids.long()]
    assert bool(added.any()) == (rule == "up") or rule == "stochastic"


@pytest.mark.parametrize("rule", ["nearest", "stochastic", "nearest_score", "balance", "up", "down"])
def test_checkpointing_rounds_the_same_way_again(rule: Any) -> None:
    model = use(hf_models.build("qwen3_moe"), torch.float32, "tilewise")
    ids = hf_models.batches(1)[0]
    with tilewise.hf.round_tokens(model, rule, tile=8, seed=7):
        plain = gradients(model, ids)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        got = gradients(model, ids)
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_a_rounded_model_learns_and_autocasts(model: Any) -> None:
    model = use(model, torch.float32, "tilewise")
    with tilewise.hf.round_tokens(model, tile=8):
        losses = curve(model, 40)
        assert losses[-1] < losses[0] - 0.5
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            ids = hf_models.batches(1)[0]
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_rounded_model_can_be_copied() -> None:
    """The copy has hooks of its own; removing the original's leaves it rounding."""
    model = use(hf_models.build("mixtral"), torch.float32, "tilewise")
    ids = hf_models.batches(1)[0]
    with tilewise.hf.round_tokens(model, tile=TILE):
        want = logits_of(model, ids)
        other = copy.deepcopy(model)
    plain = logits_of(model, ids)
    assert torch.equal(logits_of(other, ids), want) and not torch.equal(plain, want)


def test_what_cannot_be_rounded_is_named() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tilewise.errors import ArgumentError, InternalError, UnsupportedError

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no expert modules"):
        tilewise.hf.round_tokens(dense)
    eager = hf_models.build("mixtral").float()
    with pytest.raises(UnsupportedError, match="computed by 'eager'"):
        tilewise.hf.round_tokens(eager)
    model = use(eager, torch.float32, "tilewise")
    for arguments, message in (({"rule": "sideways"}, "sideways"), ({"tile": 0}, "tile")):
        with pytest.raises(ArgumentError, match=message):
            tilewise.hf.round_tokens(model, **arguments)
    assert not any(module._forward_hooks for module in model.modules()), "a refused call left hooks"
    ids = hf_models.batches(1)[0]
    with tilewise.hf.round_tokens(model):
        with pytest.raises(ArgumentError, match="rounded already"):
            tilewise.hf.round_tokens(model)
        model.set_experts_implementation("eager")
        with pytest.raises(UnsupportedError, match="computed by 'eager'"):
            model(ids)
    model = use(model, torch.float32, "tilewise")
    block = model.model.layers[0].mlp
    with tilewise.hf.round_tokens(model), pytest.raises(InternalError, match="without their router"):
        block.experts(torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    with tilewise.hf.round_tokens(model):
        block.gate(torch.ones(4, 32))
        with pytest.raises(UnsupportedError, match=r"chose \[4, 2\] and its experts were called with \[3, 2\]"):
            block.experts(torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


def test_routers_that_cannot_be_hooked_are_named() -> None:
    from tilewise.errors import UnsupportedError

    def replaced(router: Any) -> Any:
        model = use(hf_models.build("mixtral"), torch.float32, "tilewise")
        model.model.layers[1].mlp.gate = router
        return model

    class Router(torch.nn.Module):
        def __init__(self, output: Callable[[Any], Any]):
            super().__init__()
            self.weight, self.output = torch.nn.Parameter(torch.zeros(4, 32)), output

        def forward(self, x: Any) -> Any:
            return self.output(torch.nn.functional.linear(x, self.weight))

    def square(logits: Any) -> Any:
        weights, ids = logits.square().topk(2, -1)
        return logits, weights, ids

    for router, message in (
        (Router(lambda logits: logits), "does not run on a sample"),
        (Router(lambda logits: (logits, logits, logits)), "returns"),
        (Router(square), "another formula"),
        (Router(lambda logits: 1 / 0), "ZeroDivisionError"),
        (torch.nn.Identity(), "has no `weight`"),
    ):
        with pytest.raises(UnsupportedError, match=f"model.layers.1.mlp: the router .*{message}"):
            tilewise.hf.round_tokens(replaced(router))
    model = replaced(Router(square))
    del model.model.layers[1].mlp.gate
    with pytest.raises(UnsupportedError, match="0 modules called gate or router"):
        tilewise.hf.round_tokens(model)
