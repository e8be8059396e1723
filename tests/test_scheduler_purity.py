"""Schedulers do no I/O: the room is scanned for clocks, threads, sleeping, files and processes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "python/tilewise/scheduler").rglob("*.py"))
RUST = sorted((ROOT / "rust/core/src/scheduler").rglob("*.rs"))
ALLOWED = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "json", "math", "typing"}
ALLOWED |= {
    "zlib",
    "heapq",
    "bisect",
    "numbers",
    "numpy",
    "tilewise",
    "abc",
    "copy",
    "string",
    "re",
    "statistics",
    "types",
    "operator",
}
IMPURE = re.compile(
    r"std::(thread|time|fs|net|io|process|env)\b|\b(Instant|SystemTime|thread_rng|Mutex|Atomic\w+|rayon|unsafe)\b"
)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_python_room_has_no_clock_no_thread_no_file(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in imported(tree):
        assert name.split(".")[0] in ALLOWED, f"{path.name} imports {name}"
        assert not name.startswith(("tilewise.torch", "tilewise.hf", "tilewise.cli", "tilewise.agents")), name
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.AsyncFunctionDef, ast.Await))]


@pytest.mark.parametrize("path", RUST, ids=lambda path: str(path.relative_to(ROOT / "rust/core/src/scheduler")))
def test_rust_room_has_no_clock_no_thread_no_file(path: Path) -> None:
    code = "\n".join(line.split("//")[0] for line in path.read_text().splitlines())
    found = IMPURE.search(code)
    assert found is None, f"{path.name}: {found.group() if found else ''}"


def test_the_scan_finds_what_it_is_for() -> None:
    assert IMPURE.search("use std::time::Instant;") and IMPURE.search("std::thread::sleep(d)")
    assert imported(ast.parse("import asyncio\nfrom time import sleep")) == {"asyncio", "time"}
    assert len(PYTHON) >= 4 and len(RUST) >= 15
