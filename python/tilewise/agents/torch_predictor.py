"""Any torch encoder as the model of a :class:`~tilewise.agents.ValuePredictor`: a linear head on its output.

Needs torch (``pip install 'tilewise[torch]'``); nothing else in :mod:`tilewise.agents` imports it. With a transformer::

    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    model = TorchValueModel(
        encoder, width=encoder.config.hidden_size,
        encode=recent_text,  # keeps the newest steps
        collate=lambda texts: dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt")),
    )
    planner = SpeculativePlanner(approximate, target, ValuePredictor(model, blocking=True))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError, MissingExtraError, ShapeError
from tilewise.scheduler.planning.model import recent_words
from tilewise.scheduler.planning.trajectory import State

try:
    import torch
except ImportError as error:
    raise MissingExtraError(
        f"tilewise.agents.torch_predictor needs torch ({error}); install it with: pip install 'tilewise[torch]'"
    ) from error

__all__ = ["TorchValueModel", "recent_text"]


def recent_text(state: State, most_words: int = 380) -> str:
    """A state as text: the task, then steps from the newest to the oldest, at most so many words in all.

    Example:
        >>> from tilewise.scheduler.planning import Step
        >>> recent_text(State("plan a trip", (Step(0, "search(flights)"), Step(1, "book(7)"))))
        'plan a trip | step 1: book 7 | step 0: search flights'
    """
    task, history = recent_words(state, most_words)
    steps = [f"step {state.index - 1 - age}: {' '.join(words)}" for age, words in enumerate(history)]
    return " | ".join([" ".join(task), *steps])


class TorchValueModel:
    """An encoder, a linear head that begins at the value 1, AdamW, the expectile loss.

    Args:
        encoder: any module. Its output is ``[n, width]``, ``[n, length, width]`` (the first position is taken), or has
            a ``last_hidden_state`` of that shape.
        width: of its output.
        encode: what is kept of a state (token ids, a text); cheap, called on the event loop.
        collate: a list of what ``encode`` gave -> the encoder's input (a mapping is passed by name).
        rate: of AdamW.
        weight_decay: of AdamW.

    Raises:
        ArgumentError: a width below 1 or a rate that is not positive.
        ShapeError: an encoder whose output is none of the above.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
        >>> size = lambda state: torch.tensor([1.0, state.index])
        >>> model = TorchValueModel(encoder, 8, encode=size, collate=torch.stack)
        >>> model.values([model.encode(State("task"))]).tolist()
        [1.0]
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        width: int,
        *,
        encode: Callable[[State], Any] = recent_text,
        collate: Callable[[list[Any]], Any],
        rate: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        if width < 1 or not rate > 0:
            raise ArgumentError(f"TorchValueModel: expected width >= 1 and rate > 0, got {width} and {rate}")
        self.encoder, self.width = encoder, width
        self._encode, self._collate = encode, collate
        self._rate, self._decay = rate, weight_decay
        some = next(encoder.parameters(), torch.zeros(0))
        self.head = torch.nn.Linear(width, 1).to(device=some.device, dtype=some.dtype)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.fill_(1.0)
        self._optimiser = self._new_optimiser()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.encoder.parameters(), *self.head.parameters()]

    def _new_optimiser(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._parameters(), lr=self._rate, weight_decay=self._decay)

    def encode(self, state: State) -> Any:
        """What is kept of a state."""
        return self._encode(state)

    def _forward(self, encoded: Sequence[Any]) -> torch.Tensor:
        batch = self._collate(list(encoded))
        output = self.encoder(**batch) if isinstance(batch, Mapping) else self.encoder(batch)
        output = getattr(output, "last_hidden_state", output)
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            output = output[:, 0]
        if not isinstance(output, torch.Tensor) or output.shape != (len(encoded), self.width):
            found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ShapeError(f"TorchValueModel: expected [{len(encoded)}, {self.width}] of the encoder, got {found}")
        return self.head(output)[:, 0]

    def values(self, encoded: Sequence[Any]) -> np.ndarray:
        """Values, float64 ``[n]``."""
        if not len(encoded):
            return np.zeros(0)
        self.encoder.eval()
        with torch.no_grad():
            return self._forward(encoded).double().cpu().numpy()

    def fit(self, encoded: Sequence[Any], targets: np.ndarray, tau: float) -> float:
        """One step of AdamW; returns the loss before it."""
        self.encoder.train()
        values = self._forward(encoded)
        error = torch.as_tensor(targets, dtype=values.dtype, device=values.device) - values
        loss = (torch.where(error > 0, tau, 1.0 - tau) * error**2).mean()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return float(loss.detach())

    def copy(self) -> TorchValueModel:
        """An independent model with the same weights and the same state of AdamW."""
        other = copy.copy(self)
        other.encoder, other.head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        other._optimiser = other._new_optimiser()
        other._optimiser.load_state_dict(copy.deepcopy(self._optimiser.state_dict()))
        return other

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(torch.isfinite(weight).all()) for weight in self._parameters())
