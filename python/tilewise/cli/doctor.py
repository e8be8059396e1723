"""``tilewise doctor``: what is installed, what works, and why the rest does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import tilewise
from tilewise import _core

__all__ = ["collect", "render", "run"]

_PACKAGES = (
    "numpy", "ml_dtypes", "torch", "transformers", "safetensors", "typer", "rich", "matplotlib",
    "cupy-cuda12x", "cupy-cuda13x", "cuda-core", "cuda-bindings",
)  # fmt: skip
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")
_READY, _MISSING, _BROKEN = "ready", "missing", "broken"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    digits = (part for part in version.split("+")[0].split(".")[:2])
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in digits)


def _part(name: str, module: str, extra: str, floor: str | None = None) -> dict[str, str]:
    """Whether an optional module imports, and is new enough."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == module.split(".")[0]:
            return {"name": name, "state": _MISSING, "detail": f"not installed: pip install 'tilewise[{extra}]'"}
        return {"name": name, "state": _BROKEN, "detail": f"does not import: {error}"}
    except Exception as error:  # an installed package may fail in any way, and the report must not
        return {"name": name, "state": _BROKEN, "detail": f"does not import: {type(error).__name__}: {error}"}
    version = str(getattr(found, "__version__", "unknown"))
    if floor is not None and _numbers(version) < _numbers(floor):
        return {"name": name, "state": _BROKEN, "detail": f"{version} is too old: {floor} or later is needed"}
    return {"name": name, "state": _READY, "detail": version}


def _hooks(parts: list[dict[str, str]]) -> dict[str, str]:
    """Whether transformers takes the hooks of tilewise."""
    lacking = [part["name"] for part in parts if part["name"] in ("torch", "transformers") and part["state"] != _READY]
    if lacking:
        return {"name": "tilewise.hf", "state": _MISSING, "detail": f"needs {' and '.join(lacking)} (see above)"}
    try:
        import tilewise.hf

        tilewise.hf.register()
    except Exception as error:
        return {"name": "tilewise.hf", "state": _BROKEN, "detail": f"{type(error).__name__}: {error}"}
    return {"name": "tilewise.hf", "state": _READY, "detail": "attention, masks and experts are registered"}


def _models() -> dict[str, str]:
    places = [Path(tilewise.__file__).parent / "models" / role for role in ("target", "draft")]
    lacking = [str(place) for place in places if not (place / "model.safetensors").is_file()]
    if lacking:
        return {"name": "default pair", "state": _MISSING, "detail": f"not there: {', '.join(lacking)}"}
    size = sum((place / "model.safetensors").stat().st_size for place in places)
    return {"name": "default pair", "state": _READY, "detail": f"{size / 1e6:.1f} MB in {places[0].parent}"}


def _cuda() -> tuple[dict[str, str], dict[str, Any] | None]:
    """The CUDA part, and where compiled kernels are kept."""
    try:
        from tilewise.cuda import why_not
        from tilewise.cuda.compile import cache_directory
    except ImportError as error:
        return {"name": "CUDA", "state": _MISSING, "detail": f"not in this build: {error}"}, None
    cache: dict[str, Any] = {"path": None, "files": 0, "bytes": 0}
    try:
        path = cache_directory()
        files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else []
        cache = {"path": str(path), "files": len(files), "bytes": sum(entry.stat().st_size for entry in files)}
        reason = why_not()
    except Exception as error:  # drivers fail in ways of their own; a report of that is what the user came for
        return {"name": "CUDA", "state": _BROKEN, "detail": f"{type(error).__name__}: {error}"}, cache
    state = _READY if reason is None else _MISSING
    return {"name": "CUDA", "state": state, "detail": reason or "kernels compile and launch"}, cache


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def collect() -> dict[str, Any]:
    """Everything the report says, as JSON can hold it. Never raises because of what is missing."""
    parts = [
        _part("torch", "torch", "torch", "2.10"),
        _part("transformers", "transformers", "hf", "5.3"),
    ]
    parts.append(_hooks(parts))
    parts.append(_models())
    parts.append(_part("matplotlib", "matplotlib", "viz"))
    cuda, cache = _cuda()
    parts.append(cuda)
    torch = sys.modules.get("torch") if parts[0]["state"] == _READY else None
    build: dict[str, Any] = dict(_core.build_info())
    names = sorted(name for name in os.environ if name.startswith("TILEWISE_") or name in _ENVIRONMENT)
    return {
        "tilewise": {"version": tilewise.__version__, "path": str(Path(tilewise.__file__).parent), "build": build},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        "packages": {name: _installed(name) for name in _PACKAGES},
        "instruction_sets": {
            "compiled": list(build["isa_compiled"]),
            "detected": list(_core.isa_detected()),
            "chosen": _core.isa_chosen(),
        },
        "threads": {
            "tilewise": _core.num_threads(),
            "torch": None if torch is None else torch.get_num_threads(),
            "affinity": _affinity(),
            "logical": os.cpu_count(),
        },
        "parts": parts,
        "kernel_cache": cache,
        "environment": {name: os.environ[name] for name in names},
        "problems": [f"{part['name']}: {part['detail']}" for part in parts if part["state"] == _BROKEN],
    }


def render(found: dict[str, Any]) -> str:
    """The report as plain text: no colours, no boxes, nothing that a mail or an issue would spoil."""
    build, sets, threads, cache = (
        found["tilewise"]["build"],
        found["instruction_sets"],
        found["threads"],
        found["kernel_cache"],
    )
    python = found["python"]
    lines = [
        ("tilewise", f"{found['tilewise']['version']} ({build['commit']}, {build['profile']}, {build['rustc']})"),
        ("installed in", found["tilewise"]["path"]),
        ("python", f"{python['implementation']} {python['version']} on {python['platform']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)),
        ("instruction sets", f"{sets['chosen']} chosen"),
        ("  compiled", ", ".join(sets["compiled"])),
        ("  detected", ", ".join(sets["detected"])),
        (
            "threads",
            f"{threads['tilewise']} for tilewise, {threads['torch'] or '-'} for torch; "
            f"{threads['affinity'] or '-'} allowed, {threads['logical']} in the machine",
        ),
        *((f"{part['name']}", f"{part['state']}: {part['detail']}") for part in found["parts"]),
        (
            "kernel cache",
            "-" if cache is None else f"{cache['path']} ({cache['files']} files, {cache['bytes'] / 1e6:.1f} MB)",
        ),
        ("environment", ", ".join(f"{name}={value}" for name, value in found["environment"].items()) or "-"),
        ("problems", "; ".join(found["problems"]) or "none"),
    ]
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def run(*, as_json: bool, strict: bool) -> int:
    """Print the report. The exit code is 0, or 1 with ``strict`` if something installed does not work."""
    found = collect()
    print(json.dumps(found, indent=2) if as_json else render(found))
    return 1 if strict and found["problems"] else 0
