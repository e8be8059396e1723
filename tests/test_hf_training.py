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

tilewise.hf.register()


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


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    """Keep softmax in float64 where a model is, which transformers narrows to float32 whatever the model's dtype."""
    original = torch.nn.functional.softmax

    def softmax(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = original


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
