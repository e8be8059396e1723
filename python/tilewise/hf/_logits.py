"""Logits and prompts of drivers, as the NumPy floor takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewise.errors import ArgumentError, ShapeError
from tilewise.scheduler.confidence import token_confidence

__all__ = ["confidence", "one_prompt", "rows"]


def rows(logits: Tensor) -> NDArray[np.floating]:
    """Logits ``[rows, V]`` in CPU memory; half precisions are widened, which is exact."""
    logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return logits.cpu().numpy()


def confidence(logits: Tensor, top_k: int) -> NDArray[np.float64]:
    """Token confidences of logits ``[rows, V]`` on any device."""
    on_host = logits.detach().cpu()
    return np.asarray(token_confidence(on_host, min(top_k, on_host.shape[-1])))


def one_prompt(prompt: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """A prompt as ``[1, n]`` on the model's device."""
    ids = torch.as_tensor(prompt, dtype=torch.long, device=device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ShapeError(f"expected one prompt, [n] or [1, n], got {tuple(ids.shape)}; think about one at a time")
    if ids.shape[1] == 0:
        raise ArgumentError("the prompt is empty; give at least one token")
    return ids
