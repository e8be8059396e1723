"""The speculation room in PyTorch: operators, torch.compile, gradients, kinds of settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tilewise.errors import DeviceError, UnsupportedError  # noqa: E402
from tilewise.torch import speculation  # noqa: E402


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    rules = (torch.tensor([0.8, 0.0]).double(), torch.tensor([0, 2]), torch.tensor([0.95, 1.0]).double())
    streams = (7, torch.tensor([3, 4]), torch.tensor([10, 20]))
    ops = torch.ops.tilewise
    generator = torch.Generator().manual_seed(21)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    tokens, laws = torch.tensor([[0, 1, 2], [3, 4, 0]]), logits[:, :3].softmax(-1)
    lengths = torch.tensor([3, 2])
    return [
        (ops.speculation_process.default, (logits.bfloat16(), *rules)),
        (ops.speculation_sample.default, (laws[:, 0], *streams, "draft")),
        (ops.speculation_sample_target.default, (logits[:, 0], *rules, *streams)),
        (ops.speculation_draft_token.default, (logits[:, 0], *rules, *streams, "float32")),
        (ops.speculation_verify.default, (tokens, laws, logits, *rules, lengths, *streams, True)),
        (ops.speculation_verify.default, (tokens, None, logits, *rules, None, *streams, False)),
        (ops.speculation_law.default, (tokens, laws, logits, *rules, None, True)),
    ]


@pytest.mark.parametrize("index", range(7))
@pytest.mark.filterwarnings("ignore")  # opcheck traces through parts of torch that warn about themselves
def test_opcheck(index: int) -> None:
    operator, arguments = operator_calls()[index]
    torch.library.opcheck(operator, arguments)


@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph() -> None:
    def step(draft: Any, logits: Any, requests: Any, positions: Any, seed: int) -> tuple[Any, Any, Any]:
        where = {"seed": seed, "requests": requests}
        first = speculation.draft_token(draft, temperature=0.8, positions=positions, **where)
        chain = (first.tokens[:, None], first.laws[:, None], logits)
        result = speculation.verify(*chain, temperature=0.8, top_p=0.95, positions=positions, **where)
        bonus = speculation.sample_target(logits[:, 1], top_k=3, positions=positions + 1, **where)
        return result.accepted + 1, result.tokens, bonus

    rng = np.random.default_rng(22)
    draft, logits = torch.from_numpy(rng.normal(size=(3, 9))), torch.from_numpy(rng.normal(size=(3, 2, 9)))
    where = (torch.arange(3), torch.arange(3) * 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        for found, expected in zip(compiled(draft, logits, *where, seed), step(draft, logits, *where, seed)):
            assert torch.equal(found, expected)


def test_gradients_are_refused_or_not_asked_for() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    where = {"seed": 0, "requests": 0, "positions": 0}
    with pytest.raises(UnsupportedError, match="process: a sampling law has no gradient"):
        speculation.process(logits)
    with pytest.raises(UnsupportedError, match="verification_law"):
        speculation.verification_law(torch.zeros(1, 1, dtype=torch.int64), None, logits)
    with torch.no_grad():
        assert not speculation.process(logits).requires_grad
    assert speculation.verify(torch.zeros(1, 1, dtype=torch.int64), None, logits, **where).tokens.shape == (1,)
    assert not speculation.draft_token(logits[:, 0], **where).laws.requires_grad


def test_settings_may_be_tensors_arrays_lists_or_numbers() -> None:
    logits = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(3, 0, dtype=torch.int64)
    results = [
        speculation.verify(none, None, logits, temperature=t, top_k=k, top_p=p, seed=1, requests=r, positions=s)
        for t, k, p, r, s in [
            (0.5, 4, 0.9, [0, 1, 2], 6),
            (torch.tensor(0.5), torch.full((3,), 4), torch.full((3,), 0.9).double(), torch.arange(3), torch.tensor(6)),
            (np.full(3, 0.5), np.int32(4), [0.9] * 3, np.arange(3, dtype=np.uint32), np.full(3, 6, np.int32)),
            (torch.full((3,), 0.5), 4, 0.9, torch.arange(3, dtype=torch.int32), [6, 6, 6]),
        ]
    ]
    for result in results[1:]:
        assert torch.equal(result.tokens, results[0].tokens)


def test_other_devices_are_refused() -> None:
    where = {"seed": 0, "requests": 0, "positions": 0}
    fake = torch.empty(1, 3, device="meta")
    assert speculation.process(fake).device.type == "meta"  # shapes can be traced

    class Elsewhere:  # what a CUDA tensor looks like to the check, on a machine without one
        device = torch.device("cuda", 0)

    with pytest.raises(DeviceError, match="logits: expected a tensor on the CPU, got cuda:0"):
        speculation.sample_target(Elsewhere(), **where)
    with pytest.raises(DeviceError, match="draft_laws"):
        speculation.verify(torch.zeros(1, 1), Elsewhere(), torch.zeros(1, 2, 3), **where)
