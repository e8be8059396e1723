"""Source text to cubin, without a GPU or a driver; and the cache of cubins.

NVRTC compiles one flattened text (``_core.cuda_source``) for one architecture, named in full (``sm_90a``). The cubin
goes to ``TILEWISE_CACHE_DIR`` (default ``~/.cache/tilewise``) under a key made of every byte of the text's files, the
options, the compiler's version and, where a text includes toolkit headers, their versions. It is published by an
atomic rename, so processes may race. ``TILEWISE_CUDA_COMPILE=0`` forbids compiling: a kernel that is not in the cache
is then an error that names it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewise import _core
from tilewise.cuda.kernel import Kernel, registered
from tilewise.errors import ArgumentError, KernelError, MissingExtraError, UnsupportedError

__all__ = [
    "ARCHITECTURES",
    "OPTIONS",
    "Resources",
    "architecture_for",
    "cache_directory",
    "check_compiler",
    "compile_text",
    "cubin",
    "resources",
    "warm",
]

#: What the compile gate covers: one of each generation from Ampere on.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")

#: Options of NVRTC, as ``cuda.core.ProgramOptions`` takes them. Arithmetic is IEEE: subnormals are kept (CuPy's own
#: compiler flushes them), division and square root round correctly, and products may fuse into additions.
OPTIONS: dict[str, Any] = {"std": "c++17", "ftz": False, "prec_div": True, "prec_sqrt": True, "fma": True}

# Headers whose bytes name the release of the directory they lie in.
_VERSION_HEADERS = ("cuda_runtime_api.h", "cuda/std/__cccl/version.h")


def architecture_for(major: int, minor: int) -> str:
    """The architecture to compile for, from a device's compute capability.

    From Hopper to data-centre Blackwell that is the one with the suffix ``a``, which alone has the tensor-core and
    bulk-copy instructions of its generation.

    Raises:
        UnsupportedError: older than Ampere (8.0).

    Example:
        >>> architecture_for(9, 0), architecture_for(8, 6)
        ('sm_90a', 'sm_86')
    """
    if major < 8:
        raise UnsupportedError(
            f"the GPU has compute capability {major}.{minor}; tilewise's kernels need 8.0 (Ampere) or newer. "
            "Move the arrays to the CPU and call the function of the same name there"
        )
    return f"sm_{major}{minor}{'a' if 9 <= major < 12 else ''}"


def cache_directory() -> Path:
    """Where cubins are kept: ``TILEWISE_CACHE_DIR`` or ``~/.cache/tilewise``, and ``cuda`` below it."""
    chosen = os.environ.get("TILEWISE_CACHE_DIR")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "tilewise") / "cuda"


def _need(package: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(
        f"CUDA kernels need {package} ({error}): pip install 'tilewise[cuda13]', or 'tilewise[cuda12]' if the "
        "driver or torch is built for CUDA 12"
    )


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the bindings are there, the library is not
        raise _need("NVRTC and cuda-bindings", ImportError(str(error))) from error
    if int(status) != 0:
        raise KernelError(f"NVRTC does not say its version: {status}")
    return f"{major}.{minor}"


def check_compiler() -> str:
    """The version of NVRTC, once everything that compiling needs has been found.

    Raises:
        MissingExtraError: cuda-core, cuda-bindings or NVRTC is not installed.
    """
    _options("sm_80", "check", [], verbose=False)
    return _nvrtc_version()


def _toolkit_headers(text: str) -> list[str]:
    """Directories for the ``#include <...>`` of a text; none for a text without."""
    if not re.search(r"^[ \t]*#[ \t]*include[ \t]*<", text, re.MULTILINE):
        return []
    try:
        from cuda import pathfinder  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _need("cuda-pathfinder", error) from error
    found = [pathfinder.find_nvidia_header_directory(part) for part in ("cudart", "cccl")]
    if not found[0]:
        raise _need("the CUDA runtime headers (nvidia-cuda-runtime)", ImportError("not found"))
    return [directory for directory in found if directory]


def _options(architecture: str, name: str, include: list[str], verbose: bool) -> Any:
    try:
        from cuda.core import ProgramOptions  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError as error:
        raise _need("cuda-core", error) from error
    extra: dict[str, Any] = {"ptxas_options": ["-v"]} if verbose else {}
    if include:
        extra["include_path"] = include
    return ProgramOptions(name=name, arch=architecture, **OPTIONS, **extra)


def compile_text(text: str, architecture: str, name: str = "tilewise", *, verbose: bool = False) -> tuple[bytes, str]:
    """Compile one text. Needs NVRTC; needs neither a GPU nor a driver, and touches no cache.

    Args:
        text: CUDA C++, usually from ``_core.cuda_source``.
        architecture: in full, e.g. ``sm_90a``.
        name: stands for the text in messages.
        verbose: let the assembler report registers, stack and spills of each kernel into the log.

    Returns:
        ``(cubin, log)``.

    Raises:
        KernelError: the compiler refuses; the message holds the first lines of its log.
        MissingExtraError: cuda-core, NVRTC or the toolkit's headers are not installed.
    """
    options = _options(architecture, name, _toolkit_headers(text), verbose)
    from cuda.core import Program  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    log = io.StringIO()
    try:
        code = Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:  # cuda.core has no one base class for what NVRTC reports
        lines = str(error).splitlines()
        shown = "\n".join(lines[:40] + ([f"... and {len(lines) - 40} more lines"] if len(lines) > 40 else []))
        raise KernelError(f"NVRTC {_nvrtc_version()} cannot compile {name} for {architecture}: {shown}") from error
    return bytes(code.code), log.getvalue()


def cubin(kernel: Kernel, architecture: str) -> Path:
    """The compiled kernel, from the cache or made now.

    Args:
        kernel: one of :func:`tilewise.cuda.kernel.registered`.
        architecture: in full, e.g. ``sm_90a``.

    Returns:
        Path of the cubin.

    Raises:
        KernelError: it is not in the cache and ``TILEWISE_CUDA_COMPILE=0``; or the compiler refuses; or the cache
            cannot be written.
        MissingExtraError: cuda-core, NVRTC or the toolkit's headers are not installed.
    """
    text, digest = _core.cuda_source(kernel.entry, kernel.stub)
    include = _toolkit_headers(text)
    versions = [Path(where, name) for where in include for name in _VERSION_HEADERS]
    parts = [digest, architecture, repr(sorted(OPTIONS.items())), _nvrtc_version()]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in versions if path.is_file()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    path = cache_directory() / f"{kernel.name}-{architecture}-{key}.cubin"
    if path.is_file():
        return path
    if not _may_compile():
        raise KernelError(
            f"kernel {kernel.name} for {architecture} is not compiled, and TILEWISE_CUDA_COMPILE=0 forbids compiling; "
            f"looked for {path}. Unset the variable, or fill the cache on a machine that may compile "
            f"(tilewise.cuda.compile.warm({architecture!r})) and set TILEWISE_CACHE_DIR to it"
        )
    code, _ = compile_text(text, architecture, kernel.name)
    _publish(path, code)
    return path


def _may_compile() -> bool:
    value = os.environ.get("TILEWISE_CUDA_COMPILE", "1")
    if value not in ("0", "1"):
        raise ArgumentError(f"TILEWISE_CUDA_COMPILE must be 0 (never compile) or 1, got {value!r}")
    return value == "1"


def _publish(path: Path, content: bytes) -> None:
    """Write a file that readers see complete or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise KernelError(
            f"cannot write the kernel cache {path.parent}: {error}; set TILEWISE_CACHE_DIR to a writable directory"
        ) from error


def warm(architecture: str, kernels: Iterable[Kernel] | None = None) -> list[Path]:
    """Fill the cache, so that a machine with ``TILEWISE_CUDA_COMPILE=0`` can use it. Needs no GPU.

    Args:
        architecture: in full, e.g. ``sm_90a``; see :func:`architecture_for`.
        kernels: which ones; all registered by default.

    Returns:
        The cubins' paths.
    """
    return [cubin(kernel, architecture) for kernel in (registered(architecture) if kernels is None else kernels)]


@dataclass(frozen=True)
class Resources:
    """What the assembler gave a kernel; bytes and registers are per thread.

    ``stack`` is local memory, which lies in device memory: register arrays that were indexed, and spilled registers.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether any access that the source means for a register goes to memory."""
        return (self.stack, self.spill_stores, self.spill_loads) != (0, 0, 0)


_REPORT = re.compile(
    r"Function properties for (?P<name>\w+)\s*\n"
    r"[^\n]*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\s*\n[^\n]*?Used (?P<registers>\d+) registers)?"
)


def resources(log: str) -> dict[str, Resources]:
    """Registers, stack and spills of each function in the log of ``compile_text(..., verbose=True)``.

    A device function that was not inlined has its own entry, without registers (0).

    Example:
        >>> resources("ptxas info    : Function properties for f\\n"
        ...           "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\\n"
        ...           "ptxas info    : Used 40 registers, used 0 barriers\\n")
        {'f': Resources(registers=40, stack=8, spill_stores=4, spill_loads=4)}
    """
    return {
        match["name"]: Resources(
            int(match["registers"] or 0), int(match["stack"]), int(match["stores"]), int(match["loads"])
        )
        for match in _REPORT.finditer(log)
    }
