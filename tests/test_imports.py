"""What `import tilewise` loads, each time in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilewise

PACKAGE = Path(tilewise.__file__).parent
HEAVY = ("torch", "cupy", "transformers", "matplotlib", "typer", "rich", "ml_dtypes", "safetensors", "cuda")

# In the child: everything but the standard library, NumPy and tilewise does not exist, as after `pip install tilewise`.
NUMPY_ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("numpy", "tilewise") or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"No module named {name!r} (blocked: NumPy alone)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter that sees this source tree."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(run("import json, sys, tilewise; print(json.dumps(sorted(sys.modules)))"))
    assert "tilewise._core" in loaded
    found = sorted({name.partition(".")[0] for name in loaded} & set(HEAVY))
    assert not found, f"import tilewise loaded {found}"


@pytest.mark.parametrize(
    "room",
    [
        "gemm",
        "attention",
        "expr",
        "masks",
        "mods",
        "moe",
        "speculation",
        "testing",
        "errors",
        "reference",
        "plot",
        "plots",
        "plots.confidence",
        "plots.planning",
        "agents",
        "scheduler",
        "scheduler.planning",
        "scheduler.rounds",
        "scheduler.simulation",
        "scheduler.plans",
        "scheduler.confidence",
        "scheduler.confidence_study",
        "scheduler.paths",
        "scheduler.stopping",
        "scheduler.voting",
        "bench",
    ],
)
def test_every_room_needs_numpy_alone(room: str) -> None:
    run(NUMPY_ALONE + f"import tilewise.{room}")


def test_numpy_alone_computes() -> None:
    code = """
import numpy as np
from tilewise.attention import attention
from tilewise.gemm import matmul
assert (matmul(np.eye(2, dtype=np.float32), np.ones((2, 3), np.float32)) == 1).all()
q = np.zeros((1, 1, 2, 4), np.float32)
assert (attention(q, q, q + 1, causal=True) == 1).all()
"""
    run(NUMPY_ALONE + code)


@pytest.mark.parametrize(("module", "extra"), [("tilewise.torch", "tilewise[torch]")])
def test_a_missing_extra_is_named(module: str, extra: str) -> None:
    code = f"""
from tilewise.errors import MissingExtraError
try:
    import {module}
except MissingExtraError as error:
    assert "pip install '{extra}'" in str(error), error
else:
    raise SystemExit("no error")
"""
    run(NUMPY_ALONE + code)


def test_the_reference_imports_nothing_fast() -> None:
    code = """
import sys, importlib, pkgutil, types
package = types.ModuleType("tilewise")  # the package without its __init__, which loads the core
package.__path__ = [sys.argv[1]]
sys.modules["tilewise"] = package
import tilewise.reference
for module in pkgutil.iter_modules(tilewise.reference.__path__):
    importlib.import_module(f"tilewise.reference.{module.name}")
fast = [name for name in sys.modules if name.startswith("tilewise") and "reference" not in name and name != "tilewise"]
print(fast)
"""
    env = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", NUMPY_ALONE + code, str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # The exceptions are plain Python, and a reference may raise them.
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"tilewise.errors"}


def test_a_wrong_level_fails_at_import_and_says_what_there_is() -> None:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "TILEWISE_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", "import tilewise"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "ArgumentError" in done.stderr and "sse9" in done.stderr and "scalar" in done.stderr


def test_a_level_is_taken_from_the_environment() -> None:
    assert run("from tilewise import _core; print(_core.isa_chosen())", TILEWISE_CPU_ISA="scalar") == "scalar\n"


def test_import_time_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the time; asserts only that it is of the right order, since machines are shared."""
    code = """
import sys, time
import numpy
start = time.perf_counter()
import tilewise
print(time.perf_counter() - start)
"""
    whole = "import time; start = time.perf_counter(); import tilewise; print(time.perf_counter() - start)"
    own = min(float(run(code)) for _ in range(3))
    everything = min(float(run(whole)) for _ in range(3))
    with capsys.disabled():
        print(f"\nimport tilewise: {everything * 1e3:.0f} ms, of which {own * 1e3:.0f} ms beyond NumPy", end=" ")
    assert own < 2.0
