"""How an operation becomes a torch operator: one schema, one CPU kernel, one fake kernel, for some a CUDA one.

The low-level ``torch.library.Library`` form is used because a call costs 3 us, a third of ``custom_op``'s, and these
operations run once per layer and token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tilewise.errors import DeviceError, DtypeError, UnsupportedError

__all__ = ["autocast_dtype", "define", "differentiate", "refuse_device"]

_LIBRARY = torch.library.Library("tilewise", "FRAGMENT")


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cuda: tuple[str, str] | None = None,
) -> Any:
    """Registers ``tilewise::<name>`` and returns its overload packet's default overload.

    `cuda` names a module and a function in it, for tensors on a GPU; it is imported at the first call.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, kernel, "CPU")
    if cuda is not None:
        module, function = cuda

        def on_device(*arguments: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*arguments)

        _LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(f"tilewise::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.tilewise, name).default


def differentiate(name: str, setup: Callable[..., None], backward: Callable[..., Any], *, operator: str) -> None:
    """Gives ``tilewise::<name>`` a gradient, computed by ``tilewise::<operator>``, which itself has none.

    Differentiating twice raises :class:`~tilewise.errors.UnsupportedError` when the second gradient is asked for.
    """

    def refuse(_: Any, *__: Any) -> Any:
        raise UnsupportedError(f"{name}: its gradient cannot be differentiated again (double backward)")

    torch.library.register_autograd(f"tilewise::{name}", backward, setup_context=setup, lib=_LIBRARY)
    torch.library.register_autograd(f"tilewise::{operator}", refuse, lib=_LIBRARY)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast asks for on a device type; none where it is off or unknown (meta tensors)."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def refuse_device(*, cuda: bool = False, **tensors: torch.Tensor | None) -> None:
    """Names the first tensor that no kernel of this build can take; `cuda`: there is one for GPUs.

    Raises:
        DeviceError: a tensor on another device (fake and meta tensors under tracing are let through).
        DtypeError: 16-bit unsigned integers, which the core would read as the bits of bfloat16.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type not in (("cpu", "meta", "cuda") if cuda else ("cpu", "meta")):
            raise DeviceError(f"{name}: expected a tensor on the CPU, got {tensor.device}; use x.cpu()")
        if tensor is not None and tensor.dtype == torch.uint16:
            raise DtypeError(f"{name}: expected a floating type, got uint16; use x.view(torch.bfloat16) on bits")
