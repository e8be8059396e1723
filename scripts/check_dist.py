"""Checks what a wheel and a source distribution hold: everything they need and nothing that is not theirs.

python scripts/check_dist.py dist
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files of the source tree that must be in both.
PACKAGE = ROOT / "python" / "tilewise"
# Only a source distribution needs these: the workspace does not build without them.
SOURCES = ["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "pyproject.toml"]


def package_files() -> list[str]:
    """Every file of the package but build outputs, as paths from python/."""
    files = [path.relative_to(ROOT / "python") for path in PACKAGE.rglob("*") if path.is_file()]
    outputs = {".so", ".pyd", ".pyc"}
    return [path.as_posix() for path in files if path.suffix not in outputs and not path.name.startswith(".")]


def check_wheel(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    faults = [f"{path.name}: missing {name}" for name in package_files() if name not in names]
    if not any(name.startswith("tilewise/_core.") and name.endswith((".so", ".pyd")) for name in names):
        faults.append(f"{path.name}: missing the extension tilewise/_core")
    for name in names:
        top = name.split("/")[0]
        # A top-level `cuda/` in particular would land in NVIDIA's namespace package.
        if top != "tilewise" and not top.endswith((".dist-info", ".libs")):
            faults.append(f"{path.name}: {name} would be installed beside the package")
    if "abi3" not in path.name:
        faults.append(f"{path.name}: not an abi3 wheel")
    return faults


def check_sdist(path: Path) -> list[str]:
    # Without the leading tilewise-<version>/.
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = SOURCES + [f"python/{name}" for name in package_files()]
    for folder, pattern in [("cuda", "*.cu*"), ("rust", "*.rs"), ("rust", "Cargo.toml")]:
        wanted += [found.relative_to(ROOT).as_posix() for found in (ROOT / folder).rglob(pattern)]
    faults = [f"{path.name}: missing {name}" for name in wanted if name not in names]
    faults += [f"{path.name}: build output {name}" for name in names if name.endswith((".so", ".pyd", ".pyc"))]
    return faults


def main(folder: Path) -> None:
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    faults = [] if wheels and sdists else [f"{folder}: expected a wheel and a source distribution"]
    for wheel in wheels:
        faults += check_wheel(wheel)
    for sdist in sdists:
        faults += check_sdist(sdist)
    for path in wheels + sdists:
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
