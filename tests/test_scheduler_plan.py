"""`plan`, sweeps, the published table, their commands and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewise.errors import ArgumentError
from tilewise.scheduler import Measurements, Times, plan, simulate
from tilewise.scheduler.sweeps import SWEEPS, acceptance_for, published, sweep

CURVE = (1 - np.arange(2, 66) ** -1.5).tolist()
GOOD: dict[str, Any] = {
    "target_seconds": {"1": [0.050, 0.051, 0.049], "8": [0.052, 0.053, 0.051]},
    "draft_step_seconds": {"1": [0.003, 0.0031], "24": [0.004, 0.0042]},
    "glue_seconds": 0.004,
    "accepted": [800, 640, 512],
    "tried": [1000, 800, 640],
    "rank_curve": CURVE,
}


def test_ssd_where_drafting_is_hidden() -> None:
    found = plan(GOOD)
    low, high = found.over_plain_interval
    assert found.mode == "ssd" and found.fallback == "neural"
    assert 1 < low <= found.over_plain <= high and high - low < 0.3 * found.over_plain
    assert found.over_speculative > 1 and found.build_over_verify is not None and found.build_over_verify <= 1.05
    assert sum(found.fan_out) == found.budget and len(found.fan_out) == found.draft_length + 1


def test_do_not_speculate_where_verification_grows_with_tokens() -> None:
    slow = GOOD | {
        "target_seconds": {"1": 0.05, "2": 0.1, "8": 0.4},
        "draft_step_seconds": {"1": 0.03},
        "accepted": [300],
        "tried": [1000],
    }
    found = plan(slow)
    assert found.mode == "plain" and found.over_plain == 1.0
    assert found.reason.startswith("do not speculate") and "30%" in found.reason


def test_drafts_that_end_by_themselves_cost_less() -> None:
    """Times by hand: a chain of 4 that gets 1 + 1 + 0.5 + 0.25 places costs as much as one of 2.75."""
    base = GOOD | {"target_seconds": {"1": 0.05, "8": 0.12}, "draft_step_seconds": {"1": 0.01}}
    whole, ending = plan(base, most=4), plan(base | {"reached": [1.0, 1.0, 0.5, 0.25]}, most=4)
    assert plan(base | {"reached": [1.0]}, most=4) == whole
    found = {each["mode"]: each for each in ending.alternatives}["speculative"]
    rates = [(k + 0.5) / (n + 1) for k, n in zip(GOOD["accepted"], GOOD["tried"], strict=True)]
    speeds = []
    for length in range(1, 5):
        tokens = 1 + sum(np.prod([*rates, rates[-1]][: place + 1]) for place in range(length))
        extent = sum([1.0, 1.0, 0.5, 0.25][:length])
        speeds.append(tokens / (0.05 + 0.01 * extent + extent * 0.01))
    assert found["draft_length"] == 1 + int(np.argmax(speeds))
    assert found["tokens_per_second"] == pytest.approx(max(speeds))
    assert ending.tokens_per_second > whole.tokens_per_second


def test_do_not_speculate_on_noise() -> None:
    """Two tries say nothing; the interval includes 1."""
    noisy = GOOD | {"accepted": [1], "tried": [3], "draft_step_seconds": {"1": [0.01, 0.03, 0.05]}}
    noisy |= {"target_seconds": {"1": [0.02, 0.05, 0.09], "8": [0.05, 0.06, 0.12]}}
    found = plan(noisy)
    assert found.mode == "plain" and "noise" in found.reason


def test_serial_where_the_machine_is_shared() -> None:
    """With its device shared, drafting ahead slows the target: better wait for drafts."""
    shared = GOOD | {
        "target_seconds": {"1": 0.1, "8": 0.11},
        "target_seconds_alone": {"1": 0.05, "8": 0.055},
        "draft_step_seconds_alone": {"1": 0.003},
    }
    assert plan(shared).mode == "speculative"


@pytest.mark.parametrize("batch", [1, 4])
def test_the_plan_agrees_with_the_simulator(batch: int) -> None:
    found = plan(GOOD | {"batch": batch})
    times = Times(target=(0.05 - 0.0003, 0.0003 / batch, 0.0), draft=(0.00305, 0.00105 / 23), glue=0.004)
    options: dict[str, Any] = {"times": times, "acceptance": 0.8, "batch": batch, "tokens": 20_000}
    speed = simulate(
        found.fallback or "neural",
        draft_length=found.draft_length,
        budget=found.budget,
        rank_curve=CURVE,
        together=True,
        **options,
    ).speed
    plain = simulate("plain", **options).speed
    assert speed / plain == pytest.approx(found.over_plain, rel=0.08)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"accepted": [5], "tried": [4]},
        {"accepted": [], "tried": []},
        {"reached": [0.5, 0.6]},
        {"rank_curve": [0.9, 0.5]},
        {"rank_curve": []},
        {"target_seconds": {}},
        {"target_seconds": {"one": 1.0}},
        {"target_seconds": {"1": [-1.0]}},
        {"draft_step_seconds": 3},
        {"glue_seconds": float("nan")},
        {"speed": 3},
    ],
)
def test_measurements_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(change)) if "speed" not in change else "unknown: speed"):
        plan(GOOD | change)
    with pytest.raises(ArgumentError, match="missing: tried"):
        Measurements.of({name: value for name, value in GOOD.items() if name != "tried"})


def test_published_table_within_two_percent() -> None:
    rows = published()
    assert len(rows) == 6
    for row in rows:
        assert row.difference < 0.02, row
    average = next(row for row in rows if row.name.startswith("Llama") and "average" in row.name)
    assert average.ours["ssd"] / average.ours["speculative"] == pytest.approx(1.58, rel=0.02)
    assert average.ours["ssd"] / average.ours["plain"] == pytest.approx(4.68, rel=0.02)


@pytest.mark.parametrize("kind", SWEEPS)
def test_sweeps(kind: Any) -> None:
    values = {"batch": [1, 8], "temperature": [0.0, 1.0], "fan-out": [4, 32], "saguaro": [1.0, 0.0]}[kind]
    seen = []
    found = sweep(kind, values=values, modes=["neural", "fast"], seeds=2, tokens=3000, watch=lambda: seen.append(1))
    assert len(found.rows) == 4 and len(seen) == 8
    rows = {(row.value, row.mode): row for row in found.rows}
    low, high = rows[values[0], "fast"], rows[values[1], "fast"]
    if kind == "temperature":
        assert (low.hit_rate or 0) > (high.hit_rate or 0)
    elif kind in ("fan-out", "saguaro"):
        assert (low.hit_rate or 0) < (high.hit_rate or 0)
    assert all(row.interval[0] <= row.over_plain <= row.interval[1] for row in found.rows)
    json.dumps(found.as_dict())


def test_acceptance_for() -> None:
    with pytest.raises(ArgumentError):
        acceptance_for(9.0, 3)
    with pytest.raises(ArgumentError):
        sweep("width")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        published(hit=0.0)


def command(*arguments: str) -> Any:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tilewise.cli.app import app

    return CliRunner().invoke(app, list(arguments))


def test_command_simulate_ssd(tmp_path: Path) -> None:
    done = command("simulate", "ssd", "--tokens", "600", "--seeds", "1", "--hit", "0.8", "--json")
    rows = json.loads(done.output)["rows"]
    assert done.exit_code == 0 and [row["mode"] for row in rows][:2] == ["plain", "speculative"]
    assert command("simulate", "ssd", "--tokens", "600", "--seeds", "1").exit_code == 0
    assert "Llama, HumanEval" in command("simulate", "ssd", "--paper", "--tokens", "500").output
    bad = command("simulate", "ssd", "--sweep", "width")
    assert bad.exit_code == 1 and "temperature" in bad.output
    assert command("simulate", "ssd", "--target", "a").exit_code == 1
    pytest.importorskip("matplotlib")
    for number, extra in enumerate((["--sweep", "saguaro", "--fallback", "neural"], [])):
        picture = tmp_path / f"{number}.png"
        done = command("simulate", "ssd", "--tokens", "500", "--seeds", "1", "--plot", str(picture), *extra)
        assert done.exit_code == 0 and picture.stat().st_size > 5000


def test_command_plan(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(GOOD))
    found = json.loads(command("plan", str(path), "--json").output)
    assert found["mode"] == "ssd"
    flags = [
        "--target",
        "1:0.05,8:0.06",
        "--draft",
        "1:0.004,24:0.006",
        "--acceptance",
        "0.8,0.78",
        "--rank-curve",
        "0.5,0.65",
    ]
    done = command("plan", *flags, "--batch", "2", "--glue", "0.003")
    assert done.exit_code == 0 and "over plain decoding" in done.output
    for bad in (
        ["plan"],
        ["plan", "nowhere.json"],
        ["plan", *flags, "--target", "0.05"],
        ["plan", *flags, "--acceptance", "2"],
    ):
        done = command(*bad)
        assert done.exit_code == 1 and "error" in done.output


def test_command_plan_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import tilewise.hf.engine as engine

    asked: list[Any] = []

    def measure(target: Any, draft: Any, prompts: Any, **options: Any) -> dict[str, Any]:
        options.pop("watch")(1.0)
        asked.append((target, draft, prompts, options))
        return GOOD

    monkeypatch.setattr(engine, "measure", measure)
    texts, saved = tmp_path / "prompts.txt", tmp_path / "measured.json"
    texts.write_text("one\n\ntwo\n\n\nthree")
    done = command("plan", "--measure", "--prompts", str(texts), "--save", str(saved), "--json", "--temperature", "0.5")
    assert done.exit_code == 0, done.output
    assert json.loads(saved.read_text()) == GOOD and json.loads(done.stdout)["mode"] == "ssd"
    [(target, draft, prompts, options)] = asked
    assert target.config.vocab_size == draft.config.vocab_size and options == {"temperature": 0.5}
    assert [bytes(prompt) for prompt in prompts] == [b"one\n\ntwo", b"three"]
    texts.write_text("\n\n\n")
    for bad in (
        ["--measure", str(saved)],
        ["--measure", "--prompts", str(texts)],
        ["--measure", "--prompts", str(tmp_path / "none")],
        ["--model", "here"],
        [str(saved), "--save", str(tmp_path / "no" / "place")],
    ):
        done = command("plan", *bad)
        assert done.exit_code == 1 and "error: " in done.output and "Traceback" not in done.output


def test_pictures_refuse_nothing_to_draw() -> None:
    pytest.importorskip("matplotlib")
    from tilewise.plots import speculation

    for draw, argument in (
        (speculation.timeline, []),
        (speculation.timeline, [(0.0, "magic", 1)]),
        (speculation.rank_curve, {}),
        (speculation.sweep, {"rows": []}),
    ):
        with pytest.raises(ArgumentError):
            draw(argument)  # type: ignore[operator]
    with pytest.raises(ArgumentError):
        speculation.fan_out([1], [0.5, 0.5])
