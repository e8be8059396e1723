"""Runs tilewise's CUDA kernels on a CPU, for tests on machines without a GPU.

The kernels' own text is compiled as C++ (``emulator.h``) and called through a stand-in for CuPy, so one test covers the
argument checks, the launch geometry, the arguments' types and order, and what every lane does. What it cannot show:
instructions of the GPU (the headers that it replaces), memory ordering, and speed.

Fixtures for the test files that run a case wherever it can run: ``place`` is the emulator, CuPy and torch in turn.
``conftest.py`` loads this package and offers them.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewise.cuda
from tilewise import _core
from tilewise.cuda import launch
from tilewise.cuda.attention import problem
from tilewise.cuda.kernel import Kernel, registered

HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one."""
    return next((found for found in map(shutil.which, ("c++", "g++", "clang++")) if found), None)


def build(source_directory: Path, work: Path, kernels: Iterable[Kernel]) -> Path:
    """Compile kernels for the CPU. ``source_directory`` must be what TILEWISE_CUDA_SOURCE_DIR says."""
    for part in ("common", "ptx"):
        shutil.copytree(HERE / part, source_directory / part, dirs_exist_ok=True)
    kernels = list(kernels)
    stubs = "".join(f"{kernel.stub}EMULATED({kernel.name})\n" for kernel in kernels)
    (entry,) = {kernel.entry for kernel in kernels}
    text, _ = _core.cuda_source(entry, stubs)
    source, library = work / "kernels.cpp", work / "kernels.so"
    source.write_text(f'#include "{HERE / "emulator.h"}"\n{text}')
    command = [compiler() or "c++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
    return library


class Array(np.ndarray):
    """A NumPy array that answers as a CuPy array does."""

    @property
    def data(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return types.SimpleNamespace(id=0)


class _Device:
    compute_capability = "90"

    def __init__(self, index: int) -> None:
        assert index == 0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def fake_cupy() -> types.ModuleType:
    """A module with the part of CuPy that tilewise uses. Fresh arrays are poisoned: NaN, or a large integer."""

    def empty(shape: Any, dtype: Any) -> Array:
        array = np.empty(shape, dtype)
        array.view(np.uint8)[...] = 0xFF if array.dtype.kind != "i" else 0x7F
        return array.view(Array)

    class RawModule:
        def __init__(self, *, path: str) -> None:
            self.library = ctypes.CDLL(path)

        def get_function(self, name: str) -> Any:
            library = self.library

            def call(grid: Any, block: Any, values: tuple[Any, ...], *, shared_mem: int) -> None:
                assert shared_mem <= getattr(call, "max_dynamic_shared_size_bytes", 48 * 1024)
                sizes = (ctypes.c_int * 64)()
                getattr(library, f"sizes_{name}")(sizes)
                held = [np.array(value) for value in values]
                assert [value.itemsize for value in held] == list(sizes)[: len(held)] and sizes[len(held)] == 0
                pointers = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
                extents = [(ctypes.c_uint * 3)(*extent) for extent in (grid, block)]
                library.emulator_shared(ctypes.c_long(shared_mem))
                getattr(library, f"emulate_{name}")(pointers, *extents)
                library.emulator_fault.restype = ctypes.c_char_p
                fault = library.emulator_fault()
                assert fault == b"", fault

            return call

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.RawModule = Array, empty, RawModule  # pyright: ignore[reportAttributeAccessIssue]
    cupy.ascontiguousarray = lambda array: np.ascontiguousarray(array).view(Array)  # pyright: ignore
    cupy.from_dlpack = lambda array: array.inner  # pyright: ignore
    cupy.cuda = types.SimpleNamespace(Device=_Device)  # pyright: ignore[reportAttributeAccessIssue]
    return cupy


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of one rounding to nearest


@dataclass
class Place:
    """Where kernels run: how arrays get there and back."""

    name: str
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]


@functools.cache
def _work() -> Path:
    """A directory for this process, with the sources in it that the emulator compiles."""
    work = Path(tempfile.mkdtemp(prefix="tilewise-emulator-"))
    shutil.copytree(HERE.parent.parent / "cuda", work / "cuda")
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    return work


@functools.cache
def _library(kernel: Kernel | None) -> Path:
    """A kernel of the attention room compiled for the CPU; for ``None`` all of the moe room, which belong together."""
    kernels = [kernel] if kernel else [kernel for kernel in registered() if kernel.entry == "moe.cuh"]
    work = _work() / (kernel.name if kernel else "moe")
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWISE_CUDA_SOURCE_DIR", str(_work() / "cuda"))
        return build(_work() / "cuda", work, kernels)


def _emulated_cubin(kernel: Kernel, _: str) -> Path:
    """What stands for a cubin. The gate compiles the real ones, once."""
    return _library(None if kernel.entry == "moe.cuh" else kernel)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    monkeypatch.setattr(launch, "cubin", _emulated_cubin)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    _forget()
    yield Place("emulated", lambda array: array.view(Array), np.asarray)
    _forget()


def _forget() -> None:
    problem._FAULTS.clear()
    launch._function.cache_clear()
    launch._architecture.cache_clear()


def _cupy_place() -> Place:
    import cupy

    return Place("cupy", cupy.asarray, cupy.asnumpy)


def torch_place() -> Place:
    import torch

    def put(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
        return torch.from_numpy(array).cuda()

    def get(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return tensor.cpu().numpy()

    return Place("torch", put, get)


@pytest.fixture(
    params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu), pytest.param("torch", marks=pytest.mark.gpu)]
)
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if (reason := tilewise.cuda.why_not()) is not None:
        pytest.skip(reason)
    return _cupy_place() if request.param == "cupy" else torch_place()


@pytest.fixture
def torch_cuda() -> Any:
    if (reason := tilewise.cuda.why_not()) is not None:
        pytest.skip(reason)
    return pytest.importorskip("torch")
