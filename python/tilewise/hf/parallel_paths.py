"""Parallel reasoning paths in a transformers model, and a summary over their keys and values.

:func:`parallel_think` drives :class:`~tilewise.scheduler.paths.ParallelPaths`: the prompt is computed once, paths are
rows of one batch whose positions all restart after the prompt, and the summary reads the paths' keys and values as they
are, one after the other: no token is computed twice.

:class:`ThoughtEmbedding` adds what ParaThinker trains beside the weights: a vector of each path, for each layer, on
keys and values before the rotation.

Source: ParaThinker (Wen et al. 2025), arXiv 2509.04475.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tilewise import speculation
from tilewise.errors import ArgumentError, ShapeError, UnsupportedError
from tilewise.hf import _logits
from tilewise.scheduler.paths import PROMPT, SUMMARY, Packed, ParallelPaths, PathTokens

__all__ = ["ParallelThought", "ThoughtEmbedding", "parallel_think"]


class ThoughtEmbedding(nn.Module):
    """A vector of each path, for each layer, added to keys and values before the rotation, the same for all key heads.

    ``k~ = RoPE(k + T[layer, j])`` and ``v~ = v + T[layer, j]``, with j = 0 for the prompt and the summary, and j = i
    for path i counted from 1; queries stay. Row 0 is added too, as it is trained too.

    Args:
        layers: of the model.
        head_dim: of its keys.
        rows: paths that have a vector, plus one.
        std: of the normal law of the initial values.

    Raises:
        ArgumentError: a size below 1.
    """

    def __init__(self, layers: int, head_dim: int, rows: int = 32, std: float = 0.02) -> None:
        super().__init__()
        if min(layers, head_dim, rows) < 1:
            raise ArgumentError(f"expected sizes of at least 1, got {layers} layers, {head_dim} wide, {rows} rows")
        self.weight = nn.Parameter(torch.empty(layers, rows, head_dim))
        """``[layers, rows, head_dim]``."""
        nn.init.normal_(self.weight, std=std)
        self._segments: Tensor | None = None

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[ThoughtEmbedding]:
        """While this is open, the model's keys and values get the vectors of the segments that :meth:`at` names.

        Raises:
            UnsupportedError: attention without separate ``k_proj`` and ``v_proj``, or with a normalisation of the keys
                between projection and rotation.
            ShapeError: another number of layers, or another width.
        """
        found = _projections(model)
        if len(found) != self.weight.shape[0]:
            raise ShapeError(f"the table has {self.weight.shape[0]} layers and the model {len(found)}")
        for width, _, _ in found:
            if width != self.weight.shape[2]:
                raise ShapeError(f"the table is {self.weight.shape[2]} wide and the model's keys {width}")
        handles = []
        try:
            for layer, (_, key, value) in enumerate(found):
                for projection in (key, value):
                    handles.append(projection.register_forward_hook(self._hook(layer)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._segments = None

    @contextmanager
    def at(self, segments: Tensor) -> Iterator[None]:
        """The segment of each token of the forward pass inside: ints ``[B, T]`` as in
        :func:`tilewise.masks.parallel_paths` (1 the prompt, 2 and up the paths, -1 the summary).

        Raises:
            ArgumentError: a path without a row.
        """
        paths = (segments - 1).clamp(min=0)
        if int(paths.max()) >= self.weight.shape[1]:
            raise ArgumentError(f"path {int(paths.max())} has no row: the table has {self.weight.shape[1] - 1} paths")
        self._segments = paths
        try:
            yield
        finally:
            self._segments = None

    def _hook(self, layer: int) -> Any:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if self._segments is None:
                raise ArgumentError("a model with thought embeddings ran outside of ThoughtEmbedding.at(segments)")
            bias = self.weight[layer, self._segments.to(self.weight.device)].to(output)
            return (output.unflatten(-1, (-1, bias.shape[-1])) + bias[:, :, None, :]).flatten(-2)

        return add


def _projections(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """Width of a key head, key and value projection of each layer, in order."""
    found: dict[int, tuple[int, nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "layer_idx") or not hasattr(module, "head_dim"):
            continue
        key, value = getattr(module, "k_proj", None), getattr(module, "v_proj", None)
        if key is None or value is None or getattr(module, "k_norm", None) is not None:
            raise UnsupportedError(
                f"{name} of {type(model).__name__} has no k_proj and v_proj that the rotation follows directly; "
                "thought embeddings need both"
            )
        found[int(module.layer_idx)] = (int(module.head_dim), key, value)  # type: ignore[arg-type]
    if not found:
        raise UnsupportedError(f"no attention layers found in {type(model).__name__}; thought embeddings need them")
    return [found[index] for index in sorted(found)]


@dataclass(frozen=True)
class ParallelThought:
    """What paths and summary wrote.

    Attributes:
        answer: sampled tokens of the summary, without the one that ends it.
        paths: tokens of each path, forced ones included.
        ends: how each path ended: ``"closed"``, ``"limit"`` or ``"cut"`` (the summary began).
        summary: its tokens, forced ones included.
        end: ``"stopped"`` or ``"limit"``.
        packed: everything as one sequence, for a dense recomputation.
        tokens: computed after the prompt.
        steps: forward passes after the prompt's.
        path_logits: of each path, ``[sampled tokens, V]``, if asked for.
        summary_logits: ``[sampled tokens, V]``, if asked for.
    """

    answer: list[int]
    paths: list[list[int]]
    ends: list[str]
    summary: list[int]
    end: str
    packed: Packed
    tokens: int
    steps: int
    path_logits: list[Tensor] | None = None
    summary_logits: Tensor | None = None


def parallel_think(
    model: PreTrainedModel,
    prompt: Tensor | Sequence[int],
    tokens: PathTokens,
    *,
    paths: int = 4,
    path_limit: int = 16384,
    summary_limit: int = 1024,
    finish: str | int = "first",
    thoughts: ThoughtEmbedding | None = None,
    temperature: float = 0.5,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    keep_logits: bool = False,
) -> ParallelThought:
    """Write P independent paths after a prompt, and a summary that reads all of them.

    The random numbers of path i are those of the request i, and the summary's of the request P, by position: a path's
    tokens depend neither on P nor on the other paths (but for the rounding of the model's products).

    Args:
        model: a causal language model whose cache keeps every key of every layer, in evaluation mode. The method
            supposes one that was trained for it.
        prompt: token ids, ``[n]`` or ``[1, n]``.
        tokens: the special tokens.
        paths: P.
        path_limit, summary_limit, finish: see :class:`~tilewise.scheduler.paths.ParallelPaths`.
        thoughts: the table of a model that has one.
        temperature, top_k, top_p: of the sampling; temperature 0 is greedy.
        seed: of the random numbers.
        keep_logits: return them, of paths and summary.

    Returns:
        :class:`ParallelThought`.

    Raises:
        ArgumentError: an empty prompt, a model in training mode, a setting outside its range.
        ShapeError: several prompts.
        UnsupportedError: a cache with windows, an index or recurrent state, which cannot be concatenated.
    """
    machine = ParallelPaths(paths, tokens, path_limit=path_limit, summary_limit=summary_limit, finish=finish)
    if model.training:
        raise ArgumentError("the model is in training mode; call model.eval()")
    driver = _Driver(
        model, _logits.one_prompt(prompt, model.device), machine, thoughts,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}, keep_logits,
    )  # fmt: skip
    with torch.inference_mode():
        if thoughts is None:
            driver.run()
        else:
            with thoughts.attached(model):
                driver.run()
    kept = driver.logits
    return ParallelThought(
        machine.answer(), machine.paths, machine.ends, machine.summary, machine.end,
        machine.packed(driver.prompt[0].tolist()), driver.computed, driver.steps,
        [torch.stack(kept[path]) for path in range(paths)] if keep_logits else None,
        torch.stack(kept[SUMMARY]) if keep_logits else None,
    )  # fmt: skip


class _Driver:
    """Executes the commands: it owns keys and values, and decides nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Tensor,
        machine: ParallelPaths,
        thoughts: ThoughtEmbedding | None,
        rules: dict[str, Any],
        keep_logits: bool,
    ) -> None:
        self.model, self.prompt, self.machine, self.thoughts, self.rules = model, prompt, machine, thoughts, rules
        self.keep_logits = keep_logits
        self.logits: dict[int, list[Tensor]] = {path: [] for path in (*range(machine.count), SUMMARY)}
        self.steps = self.computed = 0
        self.cache: Any = DynamicCache(config=model.config)
        odd = {type(layer).__name__ for layer in self.cache.layers if type(layer) is not DynamicLayer}
        if odd or not self.cache.layers:
            raise UnsupportedError(
                f"{type(model).__name__} keeps {', '.join(sorted(odd)) or 'no cache'}; paths can only be concatenated "
                "where every layer keeps every key"
            )
        self.rows: list[int] = []
        """The path of each row of the batch."""
        self.done: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """Keys and values of paths that are over, by layer."""

    def run(self) -> None:
        self._forward(self.prompt, 0, torch.full_like(self.prompt, PROMPT))
        pending = self.machine.begin()
        while pending:
            command, *arguments = pending.pop(0)
            # The machine waits for an answer to its last command alone.
            answer = getattr(self, f"_{command}")(*arguments)
            if answer is not None:
                pending = answer

    def _forward(self, tokens: Tensor, position: int, segments: Tensor) -> Tensor:
        """Append tokens ``[B, T]`` at a position; the logits of the last, ``[B, V]``."""
        places = torch.arange(position, position + tokens.shape[1], device=tokens.device).expand(tokens.shape)

        def call() -> Tensor:
            output = self.model(
                input_ids=tokens, position_ids=places, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            return output.logits[:, -1]

        if self.thoughts is None:
            return call()
        with self.thoughts.at(segments):
            return call()

    def _sample(self, logits: Tensor, requests: list[int], position: int) -> list[int]:
        if self.keep_logits:
            for row, request in enumerate(requests):
                self.logits[SUMMARY if request == self.machine.count else request].append(logits[row].clone())
        drawn = speculation.sample_target(
            _logits.rows(logits), requests=np.array(requests), positions=position, **self.rules
        )
        return [int(token) for token in drawn]

    def _fork(self, count: int) -> None:
        self.cache.batch_repeat_interleave(count)
        self.rows = list(range(count))

    def _feed(self, entries: tuple[tuple[int, int, bool], ...]) -> list[Any] | None:
        self._drop([path for path, _, _ in entries])
        place = self.prompt.shape[1] + len(self.machine.paths[entries[0][0]]) - 1
        tokens = torch.tensor([[token] for _, token, _ in entries], device=self.prompt.device)
        segments = torch.tensor([[2 + path] for path, _, _ in entries], device=self.prompt.device)
        logits = self._forward(tokens, place, segments)
        self.steps += 1
        self.computed += len(entries)
        wanted = [row for row, (_, _, sample) in enumerate(entries) if sample]
        if not wanted:
            return None
        requests = [entries[row][0] for row in wanted]
        drawn = self._sample(logits[wanted], requests, place + 1)
        return self.machine.sampled(dict(zip(requests, drawn, strict=True)))

    def _drop(self, going: list[int]) -> None:
        """Put aside the keys and values of paths that are over."""
        if self.rows == going:
            return
        for row, path in enumerate(self.rows):
            if path not in going:
                self.done[path] = self._own(row)
        keep = [row for row, path in enumerate(self.rows) if path in going]
        self.cache.batch_select_indices(torch.tensor(keep, device=self.prompt.device))
        self.rows = going

    def _own(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A path's keys and values without the prompt's: ``[1, heads, length, width]`` of each layer."""
        start = self.prompt.shape[1]
        return [
            (layer.keys[row : row + 1, :, start:].clone(), layer.values[row : row + 1, :, start:].clone())
            for layer in self.cache.layers
        ]

    def _merge(self, lengths: tuple[int, ...]) -> None:
        start = self.prompt.shape[1]
        for row, path in enumerate(self.rows):
            self.done[path] = self._own(row)
        assert [self.done[path][0][0].shape[2] for path in range(len(lengths))] == list(lengths)
        merged = DynamicCache(config=self.model.config)
        for index, layer in enumerate(self.cache.layers):
            parts = [self.done[path][index] for path in range(len(lengths))]
            keys = torch.cat([layer.keys[:1, :, :start], *(key for key, _ in parts)], 2)
            values = torch.cat([layer.values[:1, :, :start], *(value for _, value in parts)], 2)
            merged.update(keys, values, index)
        self.cache, self.rows = merged, []
        self.done.clear()

    def _summary(self, tokens: tuple[int, ...]) -> list[Any]:
        place = self.machine.summary_start(self.prompt.shape[1]) + len(self.machine.summary) - len(tokens)
        fed = torch.tensor([tokens], device=self.prompt.device)
        logits = self._forward(fed, place, torch.full_like(fed, SUMMARY))
        self.steps += 1
        self.computed += len(tokens)
        (token,) = self._sample(logits, [self.machine.count], place + len(tokens))
        return self.machine.summarised(token)

    def _finish(self, reason: str) -> None:
        self.cache = None
