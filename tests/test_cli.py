"""The command line, in process: what it prints, how it exits, and what it does not import."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import tilewise
from tilewise.cli import doctor
from tilewise.cli.app import app


def call(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys; from tilewise.cli.app import app; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0;"
        "assert 'generate' in result.output and 'doctor' in result.output;"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0;"
        "heavy = {'torch', 'transformers', 'cupy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert call("--version").output.strip() == f"tilewise {tilewise.__version__}"


def test_module_is_the_entry_point():
    command = [sys.executable, "-m", "tilewise.cli", "--version"]
    shown = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert shown.stdout.strip() == f"tilewise {tilewise.__version__}"


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for part in ("tilewise", "instruction sets", "compiled", "detected", "threads", "torch", "CUDA", "problems"):
        assert f"\n{part}" in f"\n{result.stdout}" or f"\n  {part}" in result.stdout, part
    assert "\x1b" not in result.stdout, "colours do not paste"
    found = json.loads(call("doctor", "--json").stdout)
    assert found["tilewise"]["version"] == tilewise.__version__
    sets = found["instruction_sets"]
    assert sets["chosen"] in sets["detected"]
    assert set(sets["detected"]) <= set(sets["compiled"])
    assert found["threads"]["tilewise"] >= 1
    assert {part["state"] for part in found["parts"]} <= {"ready", "missing", "broken"}


def test_doctor_without_torch(monkeypatch):
    """As on a machine that has NumPy alone: reported, not raised, and not a problem."""
    real = importlib.import_module

    def absent(name, *arguments):
        if name.split(".")[0] in ("torch", "transformers", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", absent)
    found = doctor.collect()
    states = {part["name"]: part["state"] for part in found["parts"]}
    assert states["torch"] == states["transformers"] == states["tilewise.hf"] == "missing"
    assert not [problem for problem in found["problems"] if "torch" in problem or "transformers" in problem]
    assert "pip install 'tilewise[torch]'" in doctor.render(found)
    assert found["threads"]["torch"] is None


def test_doctor_strict_fails_on_what_is_broken(monkeypatch):
    real = importlib.import_module

    def broken(name, *arguments):
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert call("doctor").exit_code == 0
    strict = call("doctor", "--strict")
    assert strict.exit_code == 1
    assert "cannot open shared object file" in strict.stdout
    assert json.loads(call("doctor", "--json", "--strict").stdout)["problems"]


def test_doctor_names_what_is_too_old(monkeypatch):
    class Old:
        __version__ = "2.9.1+cpu"

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: Old if name == "torch" else real(name, *rest))
    assert any("2.9.1+cpu is too old: 2.10" in problem for problem in doctor.collect()["problems"])


SMALL = ("--tokens", 48, "--width", 16, "--hidden", 8, "--experts", 4, "--top-k", 2, "--rounds", 2)


@pytest.mark.parametrize("train", [(), ("--train",)])
def test_bench_moe_measures_and_compares(train):
    pytest.importorskip("torch")
    result = call("bench", "moe", *SMALL, *train, "--skew", 1.2, "--tile", 16, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["tilewise", "loop", "grouped_mm"]
    flops = (18 if train else 6) * 48 * 2 * 16 * 8
    for name, row in rows.items():
        assert row["milliseconds"] > 0
        assert row["gflops"] == pytest.approx(flops / row["milliseconds"] / 1e6)
        assert (row["speedup"] is None) == (name == "tilewise")
    load = found["load"]
    assert sum(load["before"]) == 96
    assert all(count % 16 == 0 for count in load["after"]) and load["padded_after"] == 0.0
    assert found["settings"]["train"] == bool(train)


def test_bench_moe_prints_a_table_and_writes_a_picture(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "moe.svg"
    result = call("bench", "moe", *SMALL, "--dtype", "bfloat16", "--plot", picture)
    assert result.exit_code == 0, result.output
    for part in ("tilewise", "loop", "grouped_mm", "GF/s", "the busiest expert", "tiles of 128 rows pad"):
        assert part in " ".join(result.stdout.split()), part
    assert picture.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--top-k", 5), 1, "top_k: expected 1..=4"),
        (("--dtype", "int8"), 1, "dtype: expected one of"),
        (("--rule", "sideways"), 1, "sideways"),
        (("--plot", "picture.docx"), 1, "--plot: expected a name that ends in one of"),
        (("--plot", "no/such/place/picture.png"), 1, "does not exist"),
        (("--tokens", 0), 1, "tokens: expected at least 1"),
        (("--rounds", 0), 2, "rounds"),
    ],
)
def test_bench_errors_are_messages_and_exit_codes(arguments, code, message):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    result = call("bench", "moe", *SMALL, *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_bench_refuses_to_time_a_wrong_answer(monkeypatch):
    pytest.importorskip("torch")
    from tilewise.bench import moe

    real = moe.loop
    monkeypatch.setattr(moe, "loop", lambda *arguments: real(*arguments) * 1.01)
    result = call("bench", "moe", *SMALL)
    assert result.exit_code == 1
    assert "tilewise and loop differ" in result.stderr


def test_bench_help_loads_nothing_heavy():
    code = (
        "import sys; from tilewise.cli.app import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['bench', 'moe', '--help']).exit_code == 0;"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_mask_list_names_the_catalogue():
    from tilewise import masks, mods

    rows = json.loads(call("mask", "list", "--json").stdout)
    assert {row["name"] for row in rows} == set(masks.EXAMPLES) | set(mods.EXAMPLES)
    assert all(row["about"] and row["call"].startswith(row["name"]) for row in rows)
    shown = call("mask", "list").stdout
    assert all(name in shown for name in masks.EXAMPLES)


def test_mask_show_draws():
    result = call("mask", "show", "causal", "--queries", 8, "--keys", 8, "--block", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = lines.index("▓▓······")
    assert lines[start : start + 8] == [
        "▓▓······", "▓▓▓▓····", "▓▓▓▓▓▓··", "▓▓▓▓▓▓▓▓",
        "████████▓▓······", "████████▓▓▓▓····", "████████▓▓▓▓▓▓··", "████████▓▓▓▓▓▓▓▓",
    ]  # fmt: skip
    assert "q >= k" in lines
    assert "36 of 64 elements kept; blocks of 4 x 4: 1 full, 2 partial, 1 empty" in " ".join(result.stdout.split())
    wide = call("mask", "show", "causal", "--queries", 1000, "--keys", 1000, "--block", 100).stdout
    assert max(map(len, wide.splitlines())) <= 128


def test_mask_show_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    place = tmp_path / "mask.png"
    result = call("mask", "show", "sliding_window", "--json", "--plot", place)
    found = json.loads(result.stdout)
    assert place.read_bytes()[:4] == b"\x89PNG"
    assert found["blocks"] == {"empty": 43, "partial": 21, "full": 0}
    assert found["expression"] == "(q >= k) & (q - k <= 12)"
    assert sum(row.count(0) for row in found["schedule"]) == found["blocks"]["empty"]
    assert found["sparsity"] == pytest.approx(100 * found["blocks"]["empty"] / 64)
    assert found["kept"] == sum(min(q, 12) + 1 for q in range(64))
    mod = call("mask", "show", "alibi", "--queries", 4, "--keys", 6, "--head", 1, "--plot", tmp_path / "mod.svg")
    assert mod.exit_code == 0 and "become -0.1875 to 0.3125" in mod.stdout
    assert json.loads(call("mask", "show", "rel", "--json").stdout)["range"] == [-63.0, 63.0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("casual",), 1, "no mask or mod 'casual'"),
        (("natten", "--queries", 5), 1, "the example's grid has 144"),
        (("causal", "--queries", 0), 2, "--queries"),
        (("causal", "--plot", "picture.nothing"), 1, "--plot: expected a name that ends in"),
        (("causal", "--plot", "/no/such/place/a.png"), 1, "does not exist"),
    ],
)
def test_mask_show_says_what_is_wrong(arguments, code, message):
    pytest.importorskip("matplotlib")
    result = call("mask", "show", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


def test_masks_load_no_torch():
    code = (
        "import sys; from tilewise.cli.app import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['mask', 'show', 'natten']).exit_code == 0;"
        "heavy = {'torch', 'transformers', 'cupy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
