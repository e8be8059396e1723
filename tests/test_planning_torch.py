"""A torch encoder as the predictor's model."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tilewise.agents import SpeculativePlanner, ValuePredictor  # noqa: E402
from tilewise.agents.torch_predictor import TorchValueModel, recent_text  # noqa: E402
from tilewise.errors import ArgumentError, ShapeError  # noqa: E402
from tilewise.scheduler.planning import HashedModel, State, Step, Trajectory  # noqa: E402
from tilewise.scheduler.planning.model import expectile_loss  # noqa: E402

_spec = importlib.util.spec_from_file_location("planning_agents", Path(__file__).parent / "planning_agents.py")
assert _spec is not None and _spec.loader is not None
scripted = sys.modules.setdefault("planning_agents", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(scripted)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's threads, which wait for each other in a busy loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(torch.nn.Module):
    """A bag of words through one layer, as a sequence of one position: the output of a small transformer's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(64, 8)
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, ids: Any) -> Any:
        return torch.tanh(self.layer(self.bag(ids)))[:, None, :]


def ids(state: State) -> Any:
    words = recent_text(state).split()[:12]
    numbers = [HashedModel(buckets=63, hidden=1).encode(State(word))[0][0] + 1 for word in words]
    return torch.tensor(numbers + [0] * (12 - len(numbers)))


def make(rate: float = 0.03) -> TorchValueModel:
    torch.manual_seed(0)
    return TorchValueModel(Tiny(), 8, encode=ids, collate=lambda rows: {"ids": torch.stack(rows)}, rate=rate)


def run_of(kind: str, length: int) -> Trajectory:
    return Trajectory(tuple(State(kind, tuple(Step(i, kind) for i in range(n))) for n in range(length)))


def test_a_torch_encoder_learns_and_two_copies_stay_apart() -> None:
    predictor = ValuePredictor(make(), seed=0)
    served = predictor._serving
    assert predictor.predict(State("easy")) == 1
    for update in range(150):
        predictor.record(run_of("easy", 4) if update % 2 else run_of("hard", 1))
        job = predictor.prepare()
        assert job is not None
        assert predictor.publish(predictor.fit(job))
    assert predictor.predict(State("easy")) == 4 and predictor.predict(State("hard")) == 1
    assert served.values([served.encode(State("easy"))]).tolist() == [1.0]  # the first copy is as it was


def test_loss_and_step_are_the_expectiles() -> None:
    model = make()
    encoded = [model.encode(State("easy")), model.encode(State("hard"))]
    targets = np.array([4.0, 0.0])
    expected, _ = expectile_loss(model.values(encoded), targets, 0.8)
    assert model.fit(encoded, targets, 0.8) == pytest.approx(expected, rel=1e-5)
    assert expectile_loss(model.values(encoded), targets, 0.8)[0] < expected


def test_a_copy_goes_on_where_its_original_was() -> None:
    model = make()
    encoded = [model.encode(State("easy"))]
    model.fit(encoded, np.array([3.0]), 0.5)
    twin = model.copy()
    for one in (model, twin):
        one.fit(encoded, np.array([3.0]), 0.5)
    assert model.values(encoded)[0] == twin.values(encoded)[0] and twin.finite()
    with torch.no_grad():
        twin.head.bias.fill_(float("nan"))
    assert not twin.finite() and model.finite()


def test_planning_with_a_torch_predictor_in_a_thread() -> None:
    pair = scripted.Pair(4, {1: "x"})

    async def target(state: State) -> Any:
        await asyncio.sleep(0.004)
        return pair.truth(state)

    async def approximate(state: State) -> Any:
        return pair.guess(state)

    planner = SpeculativePlanner(approximate, target, ValuePredictor(make(), blocking=True))

    async def main() -> None:
        for _ in range(3):
            result = await planner.run("task")
            assert result.steps == pair.alone("task") and not result.problems

    asyncio.run(main())
    planner.trainer.settle(60)
    assert planner.trainer.updates >= 1
    planner.close()


def test_the_newest_steps_are_in_the_text() -> None:
    state = State("task", tuple(Step(i, f"word{i} " * 20) for i in range(50)))
    text = recent_text(state)
    assert text.startswith("task | step 49: word49") and "word10" not in text and len(text.split()) < 450


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(ArgumentError, match="width"):
        TorchValueModel(Tiny(), 0, collate=torch.stack)
    wrong = TorchValueModel(Tiny(), 5, encode=ids, collate=torch.stack)
    with pytest.raises(ShapeError, match=r"\[1, 5\]"):
        wrong.values([ids(State("easy"))])
    assert wrong.values([]).shape == (0,)
