"""Device sources: how they travel, how they are compiled and cached, and the gate that compiles all of them.

Nothing here needs a GPU or a driver.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tilewise import _core
from tilewise.cuda import compile as compiling
from tilewise.cuda import launch
from tilewise.cuda.compile import ARCHITECTURES, Resources, architecture_for, compile_text, cubin, resources
from tilewise.cuda.kernel import Kernel, registered
from tilewise.errors import ArgumentError, KernelError, MissingExtraError, UnsupportedError

ROOT = Path(__file__).parent.parent
SPILLS = ROOT / "tests" / "golden" / "spills.cu"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, and the sources and settings that tilewise comes with."""
    monkeypatch.setenv("TILEWISE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TILEWISE_CUDA_SOURCE_DIR", raising=False)
    monkeypatch.delenv("TILEWISE_CUDA_COMPILE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of cuda/ that a test may edit, in use."""
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    monkeypatch.setenv("TILEWISE_CUDA_SOURCE_DIR", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were really compiled."""
    names: list[str] = []

    def spy(text: str, architecture: str, name: str = "tilewise", **options: Any) -> tuple[bytes, str]:
        names.append(name)
        return compile_text(text, architecture, name, **options)

    monkeypatch.setattr(compiling, "compile_text", spy)
    return names


# --- the gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for(architecture: str) -> None:
    kernels = registered(architecture)
    text, _ = _core.cuda_source("all.cu", "".join(kernel.stub for kernel in kernels))
    code, log = compile_text(text, architecture, "all.cu", verbose=True)
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log, log
    assert "Potential Performance Loss" not in log, log  # products of warpgroups that wait for each other
    report = resources(log)
    assert set(report) == {kernel.name for kernel in kernels}  # a kernel that the log lacks was not looked at
    slow = {name: used for name, used in report.items() if used.uses_local_memory}
    assert not slow, f"local memory on {architecture}: {slow}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gate_sees_spills_and_indexed_registers(architecture: str) -> None:
    _, log = compile_text(SPILLS.read_text(), architecture, verbose=True)
    report = resources(log)
    assert not report["clean"].uses_local_memory
    assert report["spills"].spill_stores > 0 and report["spills"].spill_loads > 0
    assert report["indexed"].stack >= 64 * 4 and report["indexed"].spill_stores == 0
    assert report["spills"].uses_local_memory and report["indexed"].uses_local_memory


def test_all_cu_includes_everything() -> None:
    text, _ = _core.cuda_source("all.cu", "")
    assert sorted(re.findall(r'^#line 1 "(.+)"$', text, re.MULTILINE)) == sorted([*_core.cuda_files(), "stub"])


def test_kernels_have_names_of_their_own_and_a_registered_stub_defines_its_name() -> None:
    kernels = registered()
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    assert all(kernel.name in kernel.stub and kernel.entry in _core.cuda_files() for kernel in kernels)


def test_toolkit_headers_are_found() -> None:
    text = '#include <cuda_fp16.h>\nextern "C" __global__ void twice(__half* x) { *x = __hadd(*x, *x); }\n'
    code, _ = compile_text(text, "sm_90a")
    assert code.startswith(b"\x7fELF")


# --- flattening -------------------------------------------------------------------------------------------------


def test_the_embedded_tree_is_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = _core.cuda_files(), _core.cuda_source("all.cu", "")
    monkeypatch.setenv("TILEWISE_CUDA_SOURCE_DIR", str(ROOT / "cuda"))
    assert (_core.cuda_files(), _core.cuda_source("all.cu", "")) == embedded
    assert embedded[0] == sorted(path.relative_to(ROOT / "cuda").as_posix() for path in (ROOT / "cuda").rglob("*.cu*"))


def test_flattened_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "room.cuh").write_text('#pragma once\n#include "common/a.cuh"\n#include "common/b.cuh"\nint room;\n')
    (tmp_path / "common" / "a.cuh").write_text('#pragma once\n#include "b.cuh"\n#include <cuda_fp16.h>\nint a;\n')
    (tmp_path / "common" / "b.cuh").write_text("#pragma once\nint b;\n")
    monkeypatch.setenv("TILEWISE_CUDA_SOURCE_DIR", str(tmp_path))
    text, digest = _core.cuda_source("room.cuh", "INSTANTIATE(room)\n")
    assert text == (ROOT / "tests" / "golden" / "flattened.cu").read_text()
    assert digest == "2e02eb4c8e16e112f164e9ad42109b67ae5280c7818e71d4f39977b15b82aa13"


def test_a_digest_knows_every_byte(tree: Path) -> None:
    def digest(stub: str = "stub") -> str:
        return _core.cuda_source("all.cu", stub)[1]

    first = digest()
    assert digest() == first
    assert digest("stub ") != first
    assert _core.cuda_source("moe.cuh", "stub")[1] != first
    for header in sorted(tree.rglob("*.cuh")):
        before = header.read_bytes()
        header.write_bytes(before + b"\n")
        assert digest() != first, header
        header.write_bytes(before)
    assert digest() == first


def test_messages_of_the_compiler_name_the_real_file(tree: Path) -> None:
    header = tree / "common" / "index.cuh"
    header.write_text(header.read_text() + "int broken = nothing;\n")
    line = len(header.read_text().splitlines())
    with pytest.raises(KernelError, match=rf"cannot compile room for sm_80: [^$]*common/index.cuh\({line}\): error"):
        compile_text(_core.cuda_source("moe.cuh", "")[0], "sm_80", "room")


def test_a_missing_include_names_the_chain(tree: Path) -> None:
    (tree / "common" / "warp.cuh").unlink()
    with pytest.raises(
        ArgumentError, match=r"moe.cuh -> .* -> ../common/warp.cuh, and there is no file common/warp.cuh"
    ):
        _core.cuda_source("moe.cuh", "")
    with pytest.raises(ArgumentError, match=r"there is no file nothing.cuh; the files are all.cu, attention.cuh"):
        _core.cuda_source("nothing.cuh", "")


def test_a_cycle_names_the_chain(tree: Path) -> None:
    header = tree / "common" / "types.cuh"
    header.write_text('#include "warp.cuh"\n' + header.read_text())
    chain = "common/index.cuh -> common/types.cuh -> common/warp.cuh -> common/types.cuh"
    with pytest.raises(ArgumentError, match=f"includes itself: moe.cuh -> moe/aggregate.cuh -> {chain}"):
        _core.cuda_source("moe.cuh", "")


def test_a_source_directory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWISE_CUDA_SOURCE_DIR", "/nowhere/at/all")
    with pytest.raises(ArgumentError, match=r"TILEWISE_CUDA_SOURCE_DIR: expected a directory.*got /nowhere/at/all"):
        _core.cuda_files()


# --- the cache --------------------------------------------------------------------------------------------------

KERNEL = registered()[0]


def test_a_cached_kernel_is_not_compiled_again(cache: Path, compilations: list[str]) -> None:
    first = cubin(KERNEL, "sm_90a")
    assert first.read_bytes().startswith(b"\x7fELF")
    assert first.parent == cache / "cuda" and first.name.startswith(f"{KERNEL.name}-sm_90a-")
    assert cubin(KERNEL, "sm_90a") == first
    assert compilations == [KERNEL.name]
    assert cubin(KERNEL, "sm_80") != first
    assert cubin(registered()[1], "sm_90a") != first
    assert len(compilations) == 3
    assert sorted(cache.rglob("*")) == sorted([cache / "cuda", *(cache / "cuda").glob("tilewise_*.cubin")])


def test_an_edited_header_is_another_kernel(tree: Path, compilations: list[str]) -> None:
    first = cubin(KERNEL, "sm_90a")
    header = tree / "common" / "warp.cuh"
    header.write_text(header.read_text() + "// an edit\n")
    assert cubin(KERNEL, "sm_90a") != first
    assert len(compilations) == 2


def test_options_and_compiler_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [cubin(KERNEL, "sm_90a")]
    with monkeypatch.context() as patch:
        patch.setitem(compiling.OPTIONS, "ftz", True)
        paths.append(cubin(KERNEL, "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_nvrtc_version", lambda: "99.0")
        paths.append(cubin(KERNEL, "sm_90a"))
    assert len(set(paths)) == 3 and cubin(KERNEL, "sm_90a") == paths[0]


def test_forbidden_compilation_names_the_kernel(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    monkeypatch.setenv("TILEWISE_CUDA_COMPILE", "0")
    with pytest.raises(KernelError, match=f"kernel {KERNEL.name} for sm_90a is not compiled.*COMPILE=0 forbids"):
        cubin(KERNEL, "sm_90a")
    assert compilations == []
    monkeypatch.setenv("TILEWISE_CUDA_COMPILE", "1")
    (made,) = compiling.warm("sm_90a", [KERNEL])
    monkeypatch.setenv("TILEWISE_CUDA_COMPILE", "0")
    assert cubin(KERNEL, "sm_90a") == made
    monkeypatch.setenv("TILEWISE_CUDA_COMPILE", "never")
    with pytest.raises(ArgumentError, match=r"must be 0 .* or 1, got 'never'"):
        cubin(KERNEL, "sm_80")


def test_racing_processes_publish_one_whole_file(cache: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(cubin(KERNEL, "sm_120").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(list((cache / "cuda").iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEWISE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelError, match=r"cannot write the kernel cache .*TILEWISE_CACHE_DIR to a writable"):
        cubin(KERNEL, "sm_90a")


# --- errors and what is imported --------------------------------------------------------------------------------


def test_a_kernel_that_does_not_compile_says_why() -> None:
    broken = Kernel("broken", "moe.cuh", "INSTANTIATE_MOE_ROUTE(broken, tilewise::f8, 1, 4)\n")
    with pytest.raises(KernelError, match=r"NVRTC \d+\.\d+ cannot compile broken for sm_80: [^$]*f8") as caught:
        cubin(broken, "sm_80")
    assert len(str(caught.value).splitlines()) <= 42


def test_architectures() -> None:
    names = [architecture_for(*pair) for pair in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]]
    assert names == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120", "sm_121"]
    with pytest.raises(UnsupportedError, match=r"compute capability 7.5; .* need 8.0"):
        architecture_for(7, 5)


def test_a_log_without_a_report_reports_nothing() -> None:
    assert resources("ptxas info    : 0 bytes gmem\n") == {}
    numbers = "16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    not_inlined = f"ptxas info    : Function properties for f\n    {numbers}\n"
    assert resources(not_inlined) == {"f": Resources(0, 16, 0, 0)}


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings"])
def test_missing_nvidia_packages_name_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tilewise\[cuda13\]', or 'tilewise\[cuda12\]'"):
        cubin(KERNEL, "sm_90a")


def test_missing_cupy_names_the_extra_that_fits_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(MissingExtraError, match=r"pip install 'tilewise\[cuda12\]' \(torch is built for CUDA 12.8\)"):
        launch._cupy()
    assert "tilewise[cuda12]" in (launch.why_not() or "")


def test_importing_the_kernels_imports_no_framework() -> None:
    code = (
        "import sys, tilewise.cuda.attention.operators, tilewise.cuda.moe, tilewise.cuda.compile\n"
        "print([name for name in ('cupy', 'torch', 'cuda') if name in sys.modules])\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.stdout.strip() == "[]"
