"""The documentation is true: examples run, and every environment variable has its line."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tilewise

ROOT = Path(__file__).resolve().parent.parent
# Prose with Python in it. (CHANGELOG.md has none.)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [("python/tilewise", "*.py"), ("rust", "*.rs"), ("scripts", "*"), ("benches", "*.py"), ("examples", "*.py")]
SETTINGS = ["Makefile", ".ci/run", "tests/conftest.py"]


def public_modules() -> list[str]:
    """Every importable module of the package without a leading underscore in its name."""
    names = ["tilewise"]
    for module in pkgutil.walk_packages(tilewise.__path__, "tilewise.", onerror=lambda _: None):
        if not any(part.startswith("_") for part in module.name.split(".")):
            names.append(module.name)
    return names


def load(name: str) -> ModuleType:
    if name.startswith(("tilewise.torch", "tilewise.hf", "tilewise.cli", "tilewise.agents.torch_predictor")):
        pytest.importorskip("torch")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", public_modules())
def test_docstring_examples(name: str) -> None:
    # Spelt as NumPy 2 prints, whatever a user's settings are.
    with np.printoptions(legacy=False):
        result = doctest.testmod(load(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert not result.failed, f"{result.failed} of {result.attempted} examples of {name} failed (printed above)"


@pytest.mark.parametrize("name", public_modules())
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = load(name)
    assert module.__doc__, f"{name} has no docstring"
    for exported in getattr(module, "__all__", ()):
        value = getattr(module, exported)
        if callable(value) and getattr(value, "__module__", "").startswith("tilewise"):
            assert value.__doc__, f"{name}.{exported} has no docstring"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page run in order in one namespace; ``print(...)  # text`` must print that text."""
    found = blocks(page)
    if any(name in block for block in found for name in ("torch", "tilewise.hf")):
        pytest.importorskip("transformers")
    namespace: dict[str, object] = {}
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), namespace)
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == expected
    assert found or page.name != "README.md"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_make_targets_in_prose_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
            assert name in targets, f"{page.name} speaks of `make {name}`, which is not in the Makefile"


def variables_read() -> dict[str, str]:
    """Names of environment variables that the code reads, each with a file that does."""
    found: dict[str, str] = {}
    files = [path for folder, pattern in SOURCES for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    read = re.compile(
        r"""environ(?:\.get\(|\.pop\(|\[)\s*["'](\w+)["']|getenv\(["'](\w+)["']|env::var(?:_os)?\("(\w+)"\)"""
    )
    for path in files + [ROOT / name for name in SETTINGS]:
        if path.suffix in (".so", ".pyd") or "__pycache__" in path.parts or path.name == "build.rs":
            continue  # a build script reads what cargo tells it
        text = path.read_text()
        names = [name for groups in read.findall(text) for name in groups if name]
        # A name of ours may also be read through a constant or by a shell.
        names += re.findall(r"""["'{]\$?((?:TILEWISE|OMP)_[A-Z][A-Z_]*)""", text)
        for name in names:
            found.setdefault(name, str(path.relative_to(ROOT)))
    return found


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", page))
    read = variables_read()
    assert {"TILEWISE_CPU_ISA", "TILEWISE_NUM_THREADS", "OMP_NUM_THREADS"} <= set(read)  # the search finds something
    missing = {name: where for name, where in read.items() if name not in documented}
    assert not missing, f"not in docs/environment.md: {missing}"
    ours = {name for name in documented if name.startswith("TILEWISE_")}
    assert ours <= set(read), f"documented, but read nowhere: {sorted(ours - set(read))}"
