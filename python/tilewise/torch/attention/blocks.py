"""Block masks of torch tensors: what torch.nn.attention.flex_attention has, built in O(blocks).

* :class:`BlockMask`: torch's layout and methods, on this package's own traced mask;
* :func:`create_block_mask`, :func:`create_mask`, :func:`and_masks`, :func:`or_masks`, :func:`noop_mask`;
* :func:`coerce`: torch's own BlockMask objects, as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tilewise.attention import blocks as numpy_blocks
from tilewise.attention.block_lists import block_size, check_lengths, dense_mask, fill_blocks
from tilewise.attention.blocks import and_masks, noop_mask, or_masks
from tilewise.errors import ArgumentError
from tilewise.expr import Mod
from tilewise.torch.expr import trace

__all__ = ["BlockMask", "and_masks", "coerce", "create_block_mask", "create_mask", "noop_mask", "or_masks"]


class BlockMask(numpy_blocks.BlockMask):
    """A block-sparse mask of torch tensors; the layout and the methods are those of torch's BlockMask.

    See :class:`tilewise.attention.blocks.BlockMask` for the attributes. ``mod`` is the traced mask_mod.

    Example:
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
        >>> mask.shape, mask.sparsity()
        ((1, 1, 256, 256), 25.0)
    """

    @staticmethod
    def _to_numpy(array: Any) -> np.ndarray:
        return array.detach().cpu().numpy()

    @staticmethod
    def _from_numpy(array: np.ndarray, like: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)

    @staticmethod
    def _strides(array: Any) -> tuple[int, ...]:
        return array.stride()

    @staticmethod
    def _expand(array: Any, shape: tuple[int, ...]) -> Any:
        return array.expand(shape)

    @staticmethod
    def _trace(mask_mod: Any) -> Mod:
        return trace(mask_mod, "mask")

    @staticmethod
    def _is_array(value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def _check_values(self) -> None:
        # Values of other devices would be waited for, and those of fake tensors do not exist.
        if type(self.kv_indices) is torch.Tensor and self.kv_indices.device.type == "cpu":
            super()._check_values()

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask with its tensors on a device; what the mask_mod captures is not moved."""
        moved = [None if array is None else array.to(device) for array in self._kept()]
        mask = BlockMask(
            self.seq_lengths, *moved, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=self.mask_mod,
            compute_q_blocks=self._compute_q_blocks,
        )  # fmt: skip
        mask._mod = self._mod
        return mask

    def _kept(self) -> list[Any]:
        """The tensors that exist; transposes that nobody asked for yet are not made for a copy."""
        return [getattr(self, name) for name in self._FIELDS[:4]] + self._transposed


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _on_cpu(mod: Mod) -> Mod:
    """The mod with its captures in CPU memory, where blocks are computed."""
    if all(capture.device.type == "cpu" for capture in mod.captures):
        return mod
    return Mod(mod.kind, mod.program, tuple(capture.detach().cpu() for capture in mod.captures), mod.names)


def create_block_mask(
    mask_mod: Callable[..., Any] | Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
) -> BlockMask:
    """The block mask of a mask_mod, without ever making the dense mask.

    As torch's function of this name, in time and memory of the number of blocks: the traced function is bounded over
    each block by interval arithmetic, and elements are computed only where bounds cannot decide.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, True keeps.
        B, H: batches and query heads; None is 1 (shared by all).
        Q_LEN, KV_LEN: lengths.
        device: of the result; the accelerator in use, or the CPU, if not given.
        BLOCK_SIZE: ``(queries, keys)`` of a block, or one number for both.
        _compile: ignored: there is nothing to compile.
        separate_full_blocks: list full blocks apart, so that the mask_mod is not asked there.

    Returns:
        :class:`BlockMask`. Where the mask depends on neither batch nor head, those axes are expanded views.

    Raises:
        ArgumentError: lengths or sizes out of range, or a score_mod.
        UnsupportedError: a function that cannot be traced.

    Example:
        >>> import torch
        >>> doc = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> mask = create_block_mask(lambda b, h, q, k: doc[q] == doc[k], 1, 1, 6, 6, "cpu", BLOCK_SIZE=3)
        >>> mask.kv_num_blocks.tolist(), mask.full_kv_indices[0, 0, :, 0].tolist()
        ([[[0, 0]]], [0, 1])
    """
    B, H, Q_LEN, KV_LEN = check_lengths(B, H, Q_LEN, KV_LEN)
    size = block_size(BLOCK_SIZE)
    where = _default_device() if device is None else torch.device(device)
    mod = trace(mask_mod, "mask", device=where)
    arrays = fill_blocks(_on_cpu(mod), B, H, Q_LEN, KV_LEN, size, separate_full_blocks)
    tensors = [torch.from_numpy(array).to(where).expand(B, H, *array.shape[2:]) for array in arrays]
    mask = BlockMask((Q_LEN, KV_LEN), *tensors, BLOCK_SIZE=size, mask_mod=mask_mod)
    mask._mod = mod
    return mask


def create_mask(
    mod_fn: Callable[..., Any] | Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The dense mask of a mask_mod, or of a score_mod (False where it returns -inf for a score of 0).

    Args:
        mod_fn: a function of 4 (mask) or 5 (score) arguments.
        B, H: batches and query heads; None is 1.
        Q_LEN, KV_LEN: lengths.
        device: of the result; the accelerator in use, or the CPU, if not given.

    Returns:
        bool ``[B, H, Q_LEN, KV_LEN]``.

    Raises:
        ArgumentError: lengths out of range.
        UnsupportedError: a function that cannot be traced.

    Example:
        >>> create_mask(lambda b, h, q, k: q >= k, None, None, 2, 3, "cpu").int().tolist()
        [[[[1, 0, 0], [1, 1, 0]]]]
    """
    extents = check_lengths(B, H, Q_LEN, KV_LEN)
    where = _default_device() if device is None else torch.device(device)
    found = dense_mask(_on_cpu(trace(mod_fn, device=where)), *extents)
    return torch.from_numpy(found.copy()).to(where)


def coerce(mask: Any) -> BlockMask | None:
    """A BlockMask of this package for what a user may pass: this one, torch's, the NumPy floor's, or None.

    torch's object is taken as it is: its tensors are shared, and its mask_mod is traced when it is first needed.

    Raises:
        TypeError: something else.

    Example:
        >>> from torch.nn.attention import flex_attention
        >>> theirs = flex_attention.create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
        >>> str(coerce(theirs).mod)
        'q >= k'
    """
    if mask is None or isinstance(mask, BlockMask):
        return mask
    if isinstance(mask, numpy_blocks.BlockMask):
        fields = [getattr(mask, name) for name in mask._FIELDS[:4]]
        tensors = [None if array is None else torch.from_numpy(np.array(array)) for array in fields]
        result = BlockMask(mask.seq_lengths, *tensors, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod)
        mod = mask.mod
        result._mod = Mod("mask", mod.program, tuple(torch.as_tensor(one) for one in mod.captures), mod.names)
        return result
    theirs = sys.modules.get("torch.nn.attention.flex_attention")
    if theirs is not None and isinstance(mask, theirs.BlockMask):
        fields = [getattr(mask, name) for name in BlockMask._FIELDS]
        return BlockMask(mask.seq_lengths, *fields, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod)
    if callable(mask):
        raise ArgumentError("block_mask: got a function; make the mask once by create_block_mask(mask_mod, ...)")
    raise TypeError(f"block_mask: expected a BlockMask (of tilewise or of torch), got {type(mask).__name__}")
