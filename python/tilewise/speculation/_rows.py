"""Arguments that are one number for all rows, or one a row, as the core takes them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from tilewise._arrays import is_torch
from tilewise.errors import ArgumentError, DeviceError, DtypeError, ShapeError

__all__ = ["per_row", "rank", "rules_of", "seed_of", "streams_of"]


def rank(name: str, array: Any, axes: tuple[str, ...]) -> tuple[int, ...]:
    if len(array.shape) != len(axes):
        raise ShapeError(f"{name}: expected rank {len(axes)} [{', '.join(axes)}], got shape {tuple(array.shape)}")
    return tuple(array.shape)


def seed_of(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise DtypeError(f"seed: expected an integer in [0, 2^63), got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: expected an integer in [0, 2^63), got {seed}")
    return int(seed)


def per_row(name: str, value: Any, rows: int, dtype: Literal["float64", "int64"]) -> Any:
    """`value` as ``[rows]`` of `dtype`; numbers are repeated."""
    if is_torch(value):
        if value.device.type != "cpu":
            raise DeviceError(f"{name}: expected numbers on the CPU, got a torch tensor on {value.device}; use x.cpu()")
        value = value.detach().numpy()
    array = np.asarray(value)
    kinds = "iuf" if dtype == "float64" else "iu"
    if array.size and array.dtype.kind not in kinds:
        raise DtypeError(f"{name}: expected {'numbers' if 'f' in kinds else 'integers'}, got {array.dtype}")
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != rows):
        raise ShapeError(f"{name}: expected one number, or [B = {rows}], got shape {array.shape}")
    if dtype == "int64" and array.size and array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise ArgumentError(f"{name}: expected integers below 2^63, got {array.max()}")
    if array.ndim == 0:
        return np.full(rows, array, dtype)
    return np.ascontiguousarray(array, dtype)


def rules_of(temperature: Any, top_k: Any, top_p: Any, rows: int) -> tuple[Any, Any, Any]:
    return (
        per_row("temperature", temperature, rows, "float64"),
        per_row("top_k", 0 if top_k is None else top_k, rows, "int64"),
        per_row("top_p", 1.0 if top_p is None else top_p, rows, "float64"),
    )


def streams_of(requests: Any, positions: Any, rows: int) -> tuple[Any, Any]:
    if rows > 1 and np.ndim(requests) == 0:
        raise ArgumentError(
            f"requests: expected [B = {rows}], a name for each row's sequence, got one number for all; "
            "rows of one name would draw the same numbers"
        )
    return per_row("requests", requests, rows, "int64"), per_row("positions", positions, rows, "int64")
