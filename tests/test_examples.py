"""The demo's training: its model with tilewise's experts learns what it learns with torch's, step by step."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's threads, which wait for each other in a busy loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The module tiny_model, and train_tiny, which imports it by name."""
    pytest.importorskip("transformers.models.minimax_m3_vl")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import tiny_model
        import train_tiny

        yield tiny_model, train_tiny
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in ("tiny_model", "train_tiny", "tiny_export"):
            sys.modules.pop(name, None)


def curve(modules: Any, experts: str, dtype: Any, steps: int = 12) -> Any:
    tiny_model, _ = modules
    torch.manual_seed(0)
    shape = tiny_model.Shape(hidden_size=48, num_hidden_layers=4, intermediate_size=40, experts=experts)
    model = tiny_model.TinyTarget(shape).to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for step in range(steps):
        random = torch.Generator().manual_seed(step % 2)
        start = torch.randint(0, 256, (4, 1), generator=random)
        tokens = (start * torch.tensor([pow(3, k, 256) for k in range(65)])) % 256
        logits = model(tokens[:, :-1], select=False, index_rows=torch.arange(0, 64, 8))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + model.index_loss()).backward()
        optimiser.step()
        optimiser.zero_grad()
        model.balance(5e-3)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_the_tiny_model_learns_the_same(tiny: Any) -> None:
    """Float32 losses with tilewise's experts: no further from float64 than twice what torch's experts are."""
    truth = curve(tiny, "torch", torch.float64)
    plain = float((curve(tiny, "torch", torch.float32) - truth).abs().max())
    assert plain < 1e-4
    got = curve(tiny, "tilewise", torch.float32)
    assert float((got - truth).abs().max()) <= max(2.0 * plain, 8 * 2.0**-23 * float(truth.max()))
    assert truth[-1] < truth[0] - 0.5


def test_a_state_dict_does_not_know_who_computes(tiny: Any) -> None:
    tiny_model, _ = tiny
    shape = tiny_model.Shape(hidden_size=32, num_hidden_layers=2, intermediate_size=16)
    ours = tiny_model.TinyTarget(shape)
    theirs = tiny_model.TinyTarget(dataclasses.replace(shape, experts="torch"))
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)
    assert ours.export().keys() == theirs.export().keys()


# rms_norm of bfloat16 states by a float32 weight: torch says that it takes the slow way.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_training_step_of_the_example(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_tiny.Run.advance`, as the script calls it, on a smaller batch."""
    _, train_tiny = tiny
    monkeypatch.setattr(train_tiny, "BATCH", 2)
    monkeypatch.setattr(train_tiny, "LENGTH", 64)
    monkeypatch.setattr(train_tiny, "INDEX_ROWS", 4)
    run = train_tiny.Run(seed=0)
    data = (torch.arange(5000) * 7 % 251).to(torch.uint8)
    before = {name: value.clone() for name, value in run.target.state_dict().items()}
    losses = [run.advance(data, 0, 100) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in losses)
    # The rate warms up, so a weight moves by little; all of them do.
    changed = {name for name, value in run.target.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if ".experts." in name} <= changed


def test_fine_tuning_with_a_document_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of the example: the mask keeps documents apart, the tables learn, the picture is written."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune_document_mask as example

    arguments = ["--steps", "3", "--rows", "2", "--length", "160", "--out", str(tmp_path / "out")]
    result = example.main(arguments)
    assert len(result["losses"]) == 3 and all(0.5 < loss < 4.0 for loss in result["losses"])
    assert result["picture"].stat().st_size > 10_000
    assert "bits per byte before" in capsys.readouterr().out
    model = result["model"].eval()
    for layer in model.model.layers:
        assert layer.self_attn.distance_bias.grad is None and layer.self_attn.distance_bias.abs().max() > 1e-4
    # A document's logits do not change with what is packed beside it.
    tokens, numbers, places = next(example.packed([text for text in example.functions() if len(text) < 90], 1, 160, 5))
    last = int(numbers.max())
    other = torch.where(numbers == last, tokens, (tokens + 1) % 256)
    assert last > 0

    def logits(tokens: Any) -> Any:
        import tilewise.torch as twt

        def keep(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (numbers[b, q] == numbers[b, k]) & (q >= k)

        mask = twt.create_block_mask(keep, 1, None, 160, 160, "cpu")
        return model(tokens, position_ids=places, use_cache=False, documents=mask).logits[numbers == last]

    with torch.no_grad():
        assert torch.allclose(logits(tokens), logits(other), atol=1e-5)
    sys.modules.pop("finetune_document_mask", None)
