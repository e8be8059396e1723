"""What a kernel is to the host: a name, the file that holds its template, and the line that instantiates it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

__all__ = ["ITEMSIZES", "ROOMS", "TYPES", "Kernel", "registered"]

#: Element types of device code, by the name that NumPy and torch give them.
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

#: Bytes of an element.
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: Rooms with device code; each module has a tuple ``KERNELS``.
ROOMS = ("moe", "attention")


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a template under ``cuda/``.

    Attributes:
        name: the ``extern "C"`` symbol, and the name in messages and of the cubin's file.
        entry: the file under ``cuda/`` that holds the template.
        stub: the text that instantiates it, appended to the entry.
        shared: bytes of shared memory that a block gets at launch, beside what the text declares.
        only: the one architecture that has its instructions; ``None``: all.

    Example:
        >>> Kernel("tilewise_moe_route_f32_1", "moe.cuh", "INSTANTIATE_MOE_ROUTE(...)").entry
        'moe.cuh'
    """

    name: str
    entry: str
    stub: str
    shared: int = 0
    only: str | None = None


def registered(architecture: str | None = None) -> tuple[Kernel, ...]:
    """Every kernel that tilewise can launch (on `architecture`), in the order of :data:`ROOMS`.

    Example:
        >>> all(kernel.name.startswith("tilewise_") for kernel in registered())
        True
    """
    rooms = (importlib.import_module(f"tilewise.cuda.{room}") for room in ROOMS)
    kernels = (kernel for room in rooms for kernel in room.KERNELS)
    return tuple(kernel for kernel in kernels if architecture is None or kernel.only in (None, architecture))
