"""Runs tilewise's CUDA kernels on a CPU, for tests on machines without a GPU.

The kernels' own text is compiled as C++ (``emulator.h``) and called through a stand-in for CuPy, so one test covers the
argument checks, the launch geometry, the arguments' types and order, and what every lane does. What it cannot show:
instructions of the GPU (the three headers that it replaces), memory ordering, and speed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tilewise import _core
from tilewise.cuda.kernel import Kernel

HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one."""
    return next((found for found in map(shutil.which, ("c++", "g++", "clang++")) if found), None)


def build(source_directory: Path, work: Path, kernels: Iterable[Kernel]) -> ctypes.CDLL:
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
    return ctypes.CDLL(str(library))


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


def fake_cupy(library: ctypes.CDLL) -> types.ModuleType:
    """A module with the part of CuPy that tilewise uses. Fresh arrays are poisoned: NaN, or a large integer."""

    def empty(shape: Any, dtype: Any) -> Array:
        array = np.empty(shape, dtype)
        array.view(np.uint8)[...] = 0xFF if array.dtype.kind != "i" else 0x7F
        return array.view(Array)

    class RawModule:
        def __init__(self, *, path: str) -> None:
            assert Path(path).read_bytes().startswith(b"\x7fELF")

        def get_function(self, name: str) -> Any:
            def call(grid: tuple[int, ...], block: tuple[int, ...], values: tuple[Any, ...]) -> None:
                sizes = (ctypes.c_int * 64)()
                getattr(library, f"sizes_{name}")(sizes)
                held = [np.array(value) for value in values]
                assert [value.itemsize for value in held] == list(sizes)[: len(held)] and sizes[len(held)] == 0
                pointers = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
                extents = [(ctypes.c_uint * 3)(*extent) for extent in (grid, block)]
                getattr(library, f"emulate_{name}")(pointers, *extents)
                library.emulator_fault.restype = ctypes.c_char_p
                assert library.emulator_fault() == b""

            return call

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.RawModule = Array, empty, RawModule  # pyright: ignore[reportAttributeAccessIssue]
    cupy.ascontiguousarray = lambda array: np.ascontiguousarray(array).view(Array)  # pyright: ignore
    cupy.cuda = types.SimpleNamespace(Device=_Device)  # pyright: ignore[reportAttributeAccessIssue]
    return cupy
