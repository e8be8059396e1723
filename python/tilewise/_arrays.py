"""Arrays at the border: any kind in, the caller's kind out.

NumPy arrays, torch CPU tensors and anything with ``__dlpack__`` are taken without a copy. What NumPy cannot say in
DLPack (bfloat16) crosses as its bits; what the core cannot read (unaligned memory, foreign byte order) is copied.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tilewise.errors import DeviceError, DtypeError

__all__ = ["broadcast", "dtype_name", "is_torch", "like", "native", "to_float64"]

_CPU_DEVICES = (1, 3)  # DLPack: CPU, and host memory pinned by CUDA
# What the core reads. Not uint16: to the core that is the bits of bfloat16, to a user it is integers.
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "bool")


def is_torch(array: Any) -> bool:
    """Whether `array` is a torch tensor (without importing torch)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_name(array: Any) -> str:
    """The element type under the name that NumPy and torch share, e.g. ``"float32"``."""
    return str(array.dtype).removeprefix("torch.")


def native(name: str, array: Any, *, int8: bool = False) -> Any:
    """The same memory as something the core reads; `name` is the argument, for messages.

    `int8` lets int8 through, which few operations take.

    Raises:
        TypeError: not an array.
        DeviceError: not in CPU memory.
        DtypeError: an element type that no operation takes, or a NumPy dtype in foreign byte order.
    """
    if isinstance(array, np.ndarray):
        if not array.dtype.isnative:
            raise DtypeError(
                f"{name}: expected native byte order, got {array.dtype.str}; use x.astype(x.dtype.newbyteorder('='))"
            )
        _check_dtype(name, array, int8)
        if array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        return array if array.flags.aligned else array.copy()
    if is_torch(array):
        if array.device.type != "cpu":
            raise DeviceError(
                f"{name}: expected an array on the CPU, got a torch tensor on {array.device}; use x.cpu()"
            )
        _check_dtype(name, array, int8)
        return array.detach() if array.requires_grad else array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name}: expected an array (NumPy, torch, or anything with __dlpack__), got {type(array).__name__}"
        )
    device = array.__dlpack_device__()
    if int(device[0]) not in _CPU_DEVICES:
        raise DeviceError(
            f"{name}: expected an array on the CPU, got {type(array).__name__} on DLPack device {tuple(device)}"
        )
    return array


def _check_dtype(name: str, array: Any, int8: bool) -> None:
    if dtype_name(array) not in _DTYPES and not (int8 and dtype_name(array) == "int8"):
        raise DtypeError(f"{name}: expected dtype {', '.join(_DTYPES)}, got {dtype_name(array)}; use astype or to")


def like(reference: Any, shape: tuple[int, ...], dtype: str | None = None) -> tuple[Any, Any]:
    """A fresh array of `reference`'s kind: ``(what the core writes, what the caller gets)``; `dtype` by name."""
    name = dtype or dtype_name(reference)
    if is_torch(reference):
        torch = sys.modules["torch"]
        tensor = torch.empty(shape, dtype=getattr(torch, name))
        return tensor, tensor
    if name == "bfloat16":
        bits = np.empty(shape, np.uint16)
        return bits, _foreign(reference, bits.view(_ml_bfloat16()))
    try:
        array = np.empty(shape, name)
    except TypeError:
        raise DtypeError(f"expected float32, float64, float16 or bfloat16, got {name}") from None
    return array, _foreign(reference, array)


def to_float64(array: Any) -> np.ndarray:
    """The values of an array or a torch tensor of any numeric type, exactly, as a float64 array."""
    if is_torch(array):
        array = array.detach().cpu().double().numpy()
    return np.asarray(array).astype(np.float64)


def broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    """`array` expanded to `shape` with strides of zero."""
    return array.expand(shape) if is_torch(array) else np.broadcast_to(array, shape)


def _ml_bfloat16() -> Any:
    import ml_dtypes  # only reached when the caller's own array has this type

    return np.dtype(ml_dtypes.bfloat16)


def _foreign(reference: Any, array: np.ndarray) -> Any:
    if isinstance(reference, np.ndarray):
        return array
    home = sys.modules.get(type(reference).__module__.partition(".")[0])
    convert = getattr(home, "from_dlpack", None)
    return array if convert is None else convert(array)
