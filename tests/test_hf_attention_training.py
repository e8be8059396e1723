"""Training transformers models with attn_implementation="tilewise": eager's losses and gradients, dropout, autocast."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
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

# Grouped queries; soft caps and windows; sinks; selected blocks; value dims that differ.
NAMES = [*hf_models.DENSE, "gpt_oss", *(name for name in hf_models.NAMES if name in ("minimax_m3", "deepseek_v3"))]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's threads, which wait for each other in a busy loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    """A small model in float64 with eager attention; tests copy it."""
    return hf_models.build(request.param)


def use(model: Any, dtype: Any, attention: str) -> Any:
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    return model


def gradients(model: Any, ids: Any, mask: Any = None, **autocast: Any) -> dict[str, Any]:
    """The loss's gradient by every parameter (zeros for one that it does not depend on)."""
    model.zero_grad()
    with float64_softmax(), torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext():
        # What a pad predicts is nobody's: a pad outside every window attends nothing, and eager makes a mean of that.
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


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


def test_loss_curves_equal_eager(model: Any) -> None:
    truth = curve(use(model, torch.float64, "eager"), 30)
    lost = float((curve(use(model, torch.float32, "eager"), 30) - truth).abs().max())
    assert lost < 1e-3, "the yardstick itself left the curve: no budget can be made of it"
    got = curve(use(model, torch.float32, "tilewise"), 30)
    assert float((got - truth).abs().max()) <= max(2.0 * lost, 8 * 2.0**-23 * float(truth.max()))
    assert truth[-1] < truth[0] - 0.3, "a model that does not learn proves nothing"


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_equal_eager(model: Any, padded: bool) -> None:
    """Every parameter, sinks included; with and without padding on the right."""
    ids = hf_models.batches(1)[0]
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        mask[2, 5:] = 0
    truth = gradients(use(model, torch.float64, "eager"), ids, mask)
    plain = gradients(use(model, torch.float32, "eager"), ids, mask)
    got = gradients(use(model, torch.float32, "tilewise"), ids, mask)
    exact = gradients(use(model, torch.float64, "tilewise"), ids, mask)
    names = [name for name in truth if "attn" in name]
    assert any(float(truth[name].abs().max()) > 1e-4 for name in names)
    assert any("sinks" in name for name in names) == (model.config.model_type == "gpt_oss")
    for name, value in truth.items():
        assert_within_budget(got[name], value, plain[name], norm="frobenius", floor=16 * 2.0**-23)
        # In float64 what remains are the float32 islands of transformers' norms.
        assert_within_budget(exact[name], value, plain[name], norm="frobenius", factor=1.0)


def test_autocast_equals_eager_autocast(model: Any) -> None:
    ids = hf_models.batches(1)[0]
    truth = gradients(use(model, torch.float64, "eager"), ids)
    plain = gradients(use(model, torch.float32, "eager"), ids, dtype=torch.bfloat16)
    got = gradients(use(model, torch.float32, "tilewise"), ids, dtype=torch.bfloat16)

    def error(found: dict[str, Any], name: str) -> Any:
        return (found[name].double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-30)

    names = [name for name in truth if "attn" in name and float(truth[name].norm()) > 1e-6]
    # In the median: where router scores nearly tie, rounding chooses another expert, in eager too.
    ours, theirs = (torch.stack([error(found, name) for name in names]).median() for found in (got, plain))
    assert torch.isfinite(ours) and 1e-4 < ours <= 2.0 * theirs


def test_dropout_in_training_alone(model: Any) -> None:
    """Weights drop in training, by torch's seed; evaluation does not; checkpointing drops the same ones again."""
    model = use(model, torch.float32, "tilewise")
    plain = gradients(model, hf_models.batches(1)[0])
    if not hasattr(model.config, "attention_dropout"):
        pytest.skip(f"{model.config.model_type} has no attention dropout")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    ids = hf_models.batches(1)[0]

    def run() -> dict[str, Any]:
        torch.manual_seed(3)
        return gradients(model, ids)

    one, other = run(), run()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.allclose(one[name], plain[name], rtol=1e-2) for name in one)
    torch.manual_seed(4)
    assert any(not torch.equal(value, one[name]) for name, value in gradients(model, ids).items())
    # transformers renamed it in 5.23.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = run()
    assert all(torch.equal(one[name], again[name]) for name in one)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
