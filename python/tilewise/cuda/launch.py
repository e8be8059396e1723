"""Device arrays in, a launch on the caller's stream out.

CuPy arrays and torch CUDA tensors are described by pointer, shape and strides. Outputs are allocated by the framework
of the inputs, so its allocator, its streams and its graph pools see them. torch is never imported here: whoever passes
a tensor has imported it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewise._arrays import dtype_name, is_torch
from tilewise.cuda.compile import architecture_for, check_compiler, cubin
from tilewise.cuda.kernel import Kernel
from tilewise.errors import ArgumentError, DeviceError, DtypeError, MissingExtraError, UnsupportedError

__all__ = ["DeviceArray", "architecture", "describe", "empty", "launch", "warpgroups_wanted", "why_not"]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_SHARED_BY_DEFAULT = 48 * 1024  # bytes a block may have without asking
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclass(frozen=True)
class DeviceArray:
    """A CuPy array or a torch CUDA tensor as kernels see it.

    Attributes:
        array: the framework's array.
        pointer: address of the first element.
        shape: extents.
        strides: in elements.
        dtype: the element type's name, e.g. ``bfloat16``.
        device: ordinal of the GPU.
    """

    array: Any
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int

    @property
    def is_torch(self) -> bool:
        return is_torch(self.array)

    def cast(self, dtype: str) -> DeviceArray:
        """The same values as another type; the array itself if it has that type."""
        if dtype == self.dtype:
            return self
        if self.is_torch:
            return describe("array", self.array.to(getattr(sys.modules["torch"], dtype)))
        return describe("array", self.array.astype(dtype))

    def contiguous(self, *, last_axis_only: bool = False) -> DeviceArray:
        """The same values in row-major order; a copy only if needed.

        ``last_axis_only`` accepts any stride between rows, the array being a matrix.
        """
        wanted, step = [], 1
        for extent in reversed(self.shape):
            wanted.append(step)
            step *= extent
        pairs = list(zip(self.shape, self.strides, reversed(wanted), strict=True))
        if last_axis_only:
            pairs = pairs[-1:]
        if 0 in self.shape or all(extent <= 1 or stride == right for extent, stride, right in pairs):
            return self
        copy = self.array.contiguous() if self.is_torch else _cupy().ascontiguousarray(self.array)
        return describe("array", copy)


def _cupy() -> Any:
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        torch = sys.modules.get("torch")
        version = getattr(getattr(torch, "version", None), "cuda", None)
        if version:
            extra = f"'tilewise[cuda{version.split('.')[0]}]' (torch is built for CUDA {version})"
        else:
            extra = "'tilewise[cuda13]', or 'tilewise[cuda12]' for a driver of CUDA 12"
        raise MissingExtraError(f"CUDA kernels are launched through CuPy ({error}): pip install {extra}") from error
    return cupy


def describe(name: str, array: Any, dtypes: Sequence[str] | None = None) -> DeviceArray:
    """Take a caller's array.

    Args:
        name: the argument's name, for messages.
        array: a CuPy array, a torch CUDA tensor, or anything else with ``__dlpack__`` on a CUDA device, which CuPy
            then describes (results are CuPy arrays).
        dtypes: names of accepted element types; ``None`` for any.

    Raises:
        DeviceError: it is not on a GPU.
        DtypeError: its element type is not among ``dtypes``.
        UnsupportedError: a torch tensor that wants a gradient, which these kernels do not record.
    """
    if is_torch(array):
        torch = sys.modules["torch"]
        if array.device.type != "cuda":
            raise DeviceError(f"{name}: expected a tensor on a CUDA device, got one on {array.device}; {_ELSEWHERE}")
        if array.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"{name} requires grad, and this kernel has no backward; pass {name}.detach()")
        described = DeviceArray(
            array,
            array.data_ptr(),
            tuple(array.shape),
            tuple(array.stride()),
            dtype_name(array),
            array.device.index,
        )
    elif _cupy_array(array) is not None:
        array = _cupy_array(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        described = DeviceArray(array, array.data.ptr, tuple(array.shape), strides, dtype_name(array), array.device.id)
    else:
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise DeviceError(f"{name}: expected a CuPy array or a torch CUDA tensor, got {kind}; {_ELSEWHERE}")
    if dtypes is not None and described.dtype not in dtypes:
        raise DtypeError(f"{name}: expected dtype {', '.join(dtypes)}, got {described.dtype}")
    return described


def _cupy_array(array: Any) -> Any:
    """`array` as CuPy has it, or ``None``. A foreign array crosses without a copy."""
    if isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ())):
        return array
    if hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in _DLPACK_CUDA:
        return _cupy().from_dlpack(array)
    return None


_ELSEWHERE = "on a CPU call the function of the same name in tilewise, or tilewise.torch for tensors"


def same_place(first_name: str, first: DeviceArray, name: str, other: DeviceArray) -> None:
    """Refuse arrays of two frameworks or on two GPUs.

    Raises:
        DeviceError: they are not together.
    """
    if first.is_torch != other.is_torch:
        kinds = ["a torch tensor" if array.is_torch else "a CuPy array" for array in (first, other)]
        raise DeviceError(f"{first_name} is {kinds[0]} and {name} is {kinds[1]}; pass both from one framework")
    if first.device != other.device:
        raise DeviceError(f"{first_name} is on GPU {first.device} and {name} on GPU {other.device}; move one of them")


def empty(like: DeviceArray, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """An uninitialised array of the framework and on the GPU of ``like``."""
    if like.is_torch:
        torch = sys.modules["torch"]
        return describe("output", torch.empty(shape, dtype=getattr(torch, dtype), device=like.array.device))
    cupy = _cupy()
    with cupy.cuda.Device(like.device):
        return describe("output", cupy.empty(shape, like.array.dtype if dtype == like.dtype else dtype))


@functools.cache
def _architecture(device: int) -> str:
    capability = _cupy().cuda.Device(device).compute_capability  # "90", "120"
    return architecture_for(int(capability[:-1]), int(capability[-1]))


def architecture(like: DeviceArray) -> str:
    """What kernels for the GPU of `like` are compiled for, e.g. ``sm_90a``."""
    return _architecture(like.device)


def warpgroups_wanted() -> bool:
    """Whether ``TILEWISE_CUDA_WARPGROUPS=1`` asks for the engines of warpgroups, where a GPU has them (sm_90a).

    Raises:
        ArgumentError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("TILEWISE_CUDA_WARPGROUPS", "0")
    if value not in ("0", "1"):
        raise ArgumentError(f"TILEWISE_CUDA_WARPGROUPS must be 0 (mma.sync everywhere) or 1, got {value!r}")
    return value == "1"


@functools.cache
def _function(kernel: Kernel, device: int) -> Any:
    """The kernel, loaded on a GPU, which is the current one: CuPy's attributes belong to one device."""
    function = _cupy().RawModule(path=str(cubin(kernel, _architecture(device)))).get_function(kernel.name)
    if kernel.shared > _SHARED_BY_DEFAULT:
        function.max_dynamic_shared_size_bytes = kernel.shared
    return function


def launch(
    kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Any], like: DeviceArray
) -> None:
    """Launch on the current stream of the framework and the GPU of ``like``. Returns at once.

    Args:
        kernel: what to run; compiled and loaded at its first launch. Launch once before capturing a CUDA graph.
        grid: blocks along x, y, z; a zero launches nothing.
        block: threads along x, y, z.
        arguments: in the kernel's order: arrays as :class:`DeviceArray`, ``None`` for a null pointer, and NumPy
            scalars of the parameter's exact type.
        like: an input.

    Raises:
        ArgumentError: the grid is larger than hardware takes.
        KernelError: see :func:`tilewise.cuda.compile.cubin`.
        MissingExtraError: CuPy, cuda-core or NVRTC is not installed.
    """
    import numpy as np

    if 0 in grid:
        return
    if any(blocks > limit for blocks, limit in zip(grid, _GRID_LIMITS, strict=True)):
        raise ArgumentError(f"{kernel.name}: a grid of {grid} blocks is larger than {_GRID_LIMITS}; split the input")
    values = tuple(
        np.uint64(0) if value is None else np.uint64(value.pointer) if isinstance(value, DeviceArray) else value
        for value in arguments
    )
    cupy = _cupy()
    with cupy.cuda.Device(like.device):
        function = _function(kernel, like.device)
        if like.is_torch:
            current = sys.modules["torch"].cuda.current_stream(like.array.device)
            with cupy.cuda.Stream.from_external(current):
                function(grid, block, values, shared_mem=kernel.shared)
        else:
            function(grid, block, values, shared_mem=kernel.shared)


def why_not() -> str | None:
    """Why kernels cannot run here, in one line; ``None`` if they can.

    Example:
        >>> import tilewise.cuda
        >>> reason = tilewise.cuda.why_not()
        >>> reason is None or isinstance(reason, str)
        True
    """
    try:
        cupy = _cupy()
        check_compiler()
    except ImportError as error:
        return str(error)
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "no CUDA device is visible"
        _architecture(cupy.cuda.runtime.getDevice())
    except UnsupportedError as error:
        return str(error)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable CUDA driver: {error}"
    return None
