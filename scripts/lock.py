"""Writes requirements/dev.lock: exact versions of everything development needs. Run with Python 3.11.

    python3.11 scripts/lock.py

Installs the newest versions that pyproject.toml admits (its dependencies, the extras of `all` and the group `dev`)
into a temporary environment and records what came.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "dev.lock"
HEADER = """\
# Exact versions of everything that `make` installs, resolved for Python 3.11.
# Written by `python3.11 scripts/lock.py`; do not edit. A changed lock is a new environment (scripts/environment.sh).
"""
# They come with PyTorch's Linux builds and exist on no other system.
LINUX_ONLY = re.compile(r"^(nvidia-|cuda-|triton\b)")


def wanted(project: dict) -> list[str]:
    """Requirements of the package, of its extra `all` and of the dependency group `dev`, flattened."""
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    names = re.search(r"\[(.*)\]", extras["all"][0])
    assert names, "the extra `all` must be tilewise[...]"
    found = list(project["project"]["dependencies"])
    for name in names[1].split(","):
        found += extras[name.strip()]

    def group(name: str) -> list[str]:
        lines = []
        for line in groups[name]:
            lines += group(line["include-group"]) if isinstance(line, dict) else [line]
        return lines

    return list(dict.fromkeys(found + group("dev")))


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"the lock is for Python 3.11, this is {sys.version.split()[0]}: run it with python3.11")
    requirements = wanted(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        # What venv itself brought is not part of the lock, unless something asks for it.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools", "wheel"], check=True)
        subprocess.run([*pip, "install", *requirements], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all", "--exclude", "pip"], check=True, capture_output=True, text=True
        )
    lines = sorted(frozen.stdout.splitlines(), key=str.lower)
    bad = [line for line in lines if "==" not in line]
    if bad:
        sys.exit(f"not installed from an index by version: {bad}")
    lines = [f"{line} ; sys_platform == 'linux'" if LINUX_ONLY.match(line) else line for line in lines]
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK}: {len(lines)} packages")


if __name__ == "__main__":
    main()
