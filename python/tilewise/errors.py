"""Exceptions of tilewise.

Every one derives from :class:`TilewiseError` and from the built-in that Python users would expect, so
``except ValueError`` keeps working. Messages say what was passed, what is allowed, and the nearest fix.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "DeviceError",
    "DtypeError",
    "InternalError",
    "KernelError",
    "MissingExtraError",
    "ModelNotFoundError",
    "ReplyError",
    "ShapeError",
    "TilewiseError",
    "UnsupportedError",
    "VocabularyError",
]


class TilewiseError(Exception):
    """Base of everything tilewise raises on purpose."""


class ShapeError(TilewiseError, ValueError):
    """An array has the wrong rank or extents."""


class ArgumentError(TilewiseError, ValueError):
    """A value lies outside what is meaningful."""


class DtypeError(TilewiseError, TypeError):
    """An array has an element type that the operation does not take, or types are mixed."""


class DeviceError(TilewiseError, RuntimeError):
    """An array lives on a device that the operation cannot use."""


class UnsupportedError(TilewiseError, NotImplementedError):
    """A feature that exists elsewhere and that this operation refuses by name."""


class VocabularyError(TilewiseError, ValueError):
    """A draft and a target model do not speak the same tokens."""


class ModelNotFoundError(TilewiseError, FileNotFoundError):
    """A model directory does not exist or holds no model."""


class ReplyError(TilewiseError, RuntimeError):
    """An agent's call ended without an answer that can be used."""


class MissingExtraError(TilewiseError, ImportError):
    """An optional dependency is needed and not installed."""


class KernelError(TilewiseError, RuntimeError):
    """A CUDA kernel cannot be built, or may not be built now."""


class InternalError(TilewiseError, RuntimeError):
    """A bug of tilewise. Please report it."""
