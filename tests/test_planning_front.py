"""What users see of planning: pictures, the command, the example, and what importing it loads."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tilewise
from tilewise.errors import ArgumentError
from tilewise.plots import planning
from tilewise.scheduler.planning import Episode, FixedPredictor, Started
from tilewise.scheduler.planning.scenario import Scenario
from tilewise.scheduler.planning.simulation import Simulator
from tilewise.scheduler.planning.study import dynamic, fixed, run_study

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def call(*arguments: Any) -> Any:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from typer.testing import CliRunner

    from tilewise.cli.app import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_pareto_draws_every_policy_where_it_is() -> None:
    pytest.importorskip("matplotlib")
    found = run_study(Scenario(), [fixed(2), fixed(4), dynamic(0.5, 2)], seeds=range(2), tasks=4).as_dict()
    ax = planning.pareto(found, published=True)
    drawn = {(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    for row in found["rows"]:
        assert (row["seconds_to_base"][0], row["cost_to_base"][0]) in drawn
    assert (0.92, 1.41) in drawn  # published
    assert {text.get_text() for text in ax.texts} == {"k=2", "k=4", "τ 0.5 +2"}
    with pytest.raises(ArgumentError, match="no policies"):
        planning.pareto({"rows": []})


def test_the_timeline_shows_every_call_once_and_bars_of_a_lane_do_not_meet() -> None:
    pytest.importorskip("matplotlib")
    records = Simulator(FixedPredictor(4)).run(Scenario().task(0, 2)).episode.records
    ax = planning.timeline(records)
    bars = [patch for container in ax.containers for patch in container.patches]
    assert len(bars) == len(records)
    lanes: dict[float, list[tuple[float, float]]] = {}
    for bar in bars:
        lanes.setdefault(bar.get_y(), []).append((bar.get_x(), bar.get_x() + bar.get_width()))
    for spans in lanes.values():
        spans.sort()
        assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(spans))
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert [label for label in labels if label] == ["target", "approximate", "predictor"]
    episode = Episode("task")
    episode.handle(Started(0.0))
    assert planning.timeline(episode.records).get_xlabel() == "seconds"  # calls that still run
    with pytest.raises(ArgumentError, match="no calls"):
        planning.timeline([])


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "planning.png"
    short = ("simulate", "planning", "--seeds", 2, "--tasks", 4, "--most", 3)
    result = call(*short, "--plot", place)
    assert result.exit_code == 0, result.output
    assert place.read_bytes()[:4] == b"\x89PNG"
    assert "fixed 3" in result.stdout and "0.95 +2" in result.stdout and "not measured" in result.stdout
    found = json.loads(call(*short, "--json").stdout)
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["fixed 1", "fixed 2", "fixed 3"] and "dynamic tau 0.5" in names
    assert found["seeds"] == 2 and found["tasks"] == 4
    capped = json.loads(call(*short, "--json", "--calls", 1).stdout)
    assert {row["seconds_to_base"][0] for row in capped["rows"]} == {1.0}  # the target alone, whatever k is
    assert all(row["wasted"] == 0 for row in capped["rows"])
    assert call("simulate", "planning", "--seeds", 0).exit_code == 2
    assert "--plot" in call(*short, "--plot", tmp_path / "x.nothing").output


def test_the_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four tasks: the plans and the guard are asserted inside; the ledger and the speed-up are printed."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import speculative_planning as example

    found = example.main(["--tasks", "4", "--scale", "0.001", "--plot", str(tmp_path / "calls.png")])
    assert set(found) == {"alone", "k = 1", "k = 4", "learnt"}
    assert found["k = 4"]["cost"] > found["k = 1"]["cost"] > 0
    assert found["k = 4"]["bookings"] == found["learnt"]["bookings"]
    assert (tmp_path / "calls.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "x the target alone" in shown and "cancelled" in shown
    sys.modules.pop("speculative_planning", None)


def test_planning_needs_numpy_alone_and_loads_no_driver() -> None:
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("numpy", "tilewise") or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"No module named {name!r} (blocked: NumPy alone)", name=name)

sys.meta_path.insert(0, Blocker())
import tilewise.scheduler.planning, tilewise.scheduler.planning.study
assert not {name for name in sys.modules if name.startswith("tilewise.agents")}
assert "asyncio" not in sys.modules
import tilewise.agents, tilewise.plots.planning
from tilewise.errors import MissingExtraError
try:
    import tilewise.agents.torch_predictor
except MissingExtraError as error:
    assert "pip install 'tilewise[torch]'" in str(error)
else:
    raise SystemExit("no error")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(tilewise.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert importlib.util.find_spec("tilewise.agents") is not None
