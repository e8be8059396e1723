"""Expert parallelism: two and four processes give the result and the gradients of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import tilewise  # noqa: E402
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError  # noqa: E402
from tilewise.torch.moe import AllToAll, Local  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def together(command: list[list[str]]) -> None:
    """Run the processes of a group; the first failure is the test's."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tilewise.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    environment |= {"TILEWISE_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in command
    ]
    failures = []
    try:
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=200)
            if process.returncode:
                failures.append(f"rank {rank}:\n{errors}")
    finally:
        for process in processes:
            process.kill()
    # The rank that failed first drags the others down with "connection closed": show the assertion.
    assert not failures, "\n".join(sorted(failures, key=lambda text: "AssertionError" not in text))


@pytest.mark.parametrize("layer", ["loop", "tilewise"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_group_equals_one_process(world: int, layer: str, tmp_path: Path) -> None:
    """Output, and gradients of x, weights and every expert: uneven tokens and experts, sentinels, pairs, nothing."""
    worker = str(ROOT / "tests" / "workers" / "parallel.py")
    together([[sys.executable, worker, str(rank), str(world), str(tmp_path / "group"), layer] for rank in range(world)])


@pytest.fixture
def alone(tmp_path: Path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_without_a_group_the_message_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match="init_process_group"):
        AllToAll(4)


@pytest.mark.usefixtures("alone")
def test_bad_shapes_are_named() -> None:
    dispatcher = AllToAll(4)
    x, ids, weights = torch.ones(3, 5), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    for arguments, what in [
        ((x[None], ids, weights), "x: expected"),
        ((x, ids[:2], weights), "expert_ids"),
        ((x, ids.flatten(), weights.flatten()), "token_ids"),
        ((x, ids, weights[:, :1]), "weights"),
        ((x, ids.flatten(), weights.flatten(), torch.zeros(5, dtype=torch.long)), "token_ids"),
    ]:
        with pytest.raises(ShapeError, match=what):
            dispatcher.dispatch(*arguments)
    with pytest.raises(ShapeError, match="scores"):
        dispatcher.dispatch(x, ids, weights, scores=torch.ones(3, 3))
    with pytest.raises(ArgumentError, match="token_ids: expected 0 to 2"):
        dispatcher.dispatch(x, ids.flatten(), weights.flatten(), torch.tensor([0, 0, 1, 1, 2, 3]))
    sent = dispatcher.dispatch(x, ids, weights)
    with pytest.raises(ShapeError, match="a row for each one that dispatch received"):
        dispatcher.combine(sent.x[1:], sent.handle)


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_equals_local() -> None:
    x, ids = torch.randn(5, 3), torch.tensor([[0, 3], [1, 9], [-1, 4], [2, 2], [3, 0]])
    weights = torch.rand(5, 2)
    sent = AllToAll(4).dispatch(x, ids, weights)
    local = Local(4).dispatch(x, ids, weights)
    assert sent.token_ids is not None and local.token_ids is None
    inside = (ids >= 0) & (ids < 4)
    assert torch.equal(sent.expert_ids, ids[inside])
    assert torch.equal(sent.weights, weights[inside])
    assert torch.equal(sent.x[sent.token_ids], x.repeat_interleave(2, 0)[inside.flatten()])
    assert AllToAll(4).local_experts == Local(4).local_experts == range(4)


@pytest.mark.usefixtures("alone")
def test_fewer_experts_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 8)
    with pytest.raises(ArgumentError, match="at least one expert a rank"):
        AllToAll(7)


@pytest.mark.usefixtures("alone")
def test_a_second_derivative_is_refused() -> None:
    """Section 8, group 12: double backward raises instead of giving zeros."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    dispatcher = AllToAll(2)
    sent = dispatcher.dispatch(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    out = dispatcher.combine(sent.x * sent.x, sent.handle)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("options", [[], ["--rounding", "nearest", "--tile", "16"]])
def test_the_example_learns(options: list[str]) -> None:
    """``torchrun`` with two processes, as its first lines say."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "expert_parallel.py"), "--steps", "41", "--tokens", "256", "--experts", "5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tilewise.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *script, *options], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]
    rows = [int(number) for number in lines[-1].split("[")[1].rstrip("]").split(",")]
    if options:
        assert all(number % 16 == 0 for number in rows)
    else:
        assert sum(rows) == 2 * 256 * 2
