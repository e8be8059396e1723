"""Models as a decoder sees them: a sequence that grows by tokens, shrinks by truncation, and answers with logits.

:class:`ModuleRunner` drives any causal model of transformers through its cache. :class:`LeanLlamaRunner` computes a
Llama itself, for drafts: a step of one token through transformers' modules is mostly Python, and a draft takes
several steps for each step of its target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tilewise import _core
from tilewise.attention.rules import Rules
from tilewise.errors import UnsupportedError

__all__ = ["LeanLlama", "LeanLlamaRunner", "ModuleRunner", "Runner", "runners"]


class Runner(Protocol):
    """One sequence in one model. Tokens are fed once; their keys and values stay until they are truncated."""

    vocab_size: int
    tokens: list[int]
    """Tokens fed and kept."""

    @property
    def length(self) -> int:
        """Their number."""
        ...

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; returns logits ``[len(tokens), V]``, or of the ``last`` of them only."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        ...


def runners(model: PreTrainedModel, *, rollback: bool, lean: bool = False) -> Callable[[], Runner]:
    """How to begin a sequence in a model: call the result once for each.

    Args:
        model: a causal language model on the CPU, in evaluation mode.
        rollback: whether :meth:`Runner.truncate` will be called.
        lean: prefer :class:`LeanLlama` where it computes this model. It copies the weights when this is called.

    Raises:
        UnsupportedError: a model without a cache of keys and values, or ``rollback`` of one with recurrent state, which
            cannot be taken back.
    """
    if lean and LeanLlama.computes(model):
        return LeanLlama(model).sequence
    ModuleRunner(model, rollback=rollback)  # a model that it cannot drive is refused now, not at the first token
    return lambda: ModuleRunner(model, rollback=rollback)


class ModuleRunner:
    """Any causal model of transformers, through its own modules and its own cache."""

    def __init__(self, model: PreTrainedModel, *, rollback: bool):
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UnsupportedError(
                f"{type(model).__name__} takes no past_key_values; only models with such a cache run here"
            )
        self.model = model
        self.vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self.tokens: list[int] = []
        self._cache: Any = DynamicCache(config=model.config)
        if rollback:
            self._allow_rollback()
        self._slides = any(self._cache.is_sliding)
        # Where every layer keeps every key, one lower triangle serves all masks as a view, and transformers need
        # not build one. Sliding layers keep fewer keys than there are tokens and need masks of their own.
        whole = DynamicLayer.get_mask_sizes
        self._plain = (
            model.config._attn_implementation in ("tilewise", "sdpa")  # which take bool masks
            and bool(self._cache.layers)
            and all(getattr(type(layer), "get_mask_sizes", None) is whole for layer in self._cache.layers)
        )
        self._positions = torch.arange(0)
        self._triangle = torch.ones(0, 0, dtype=torch.bool)

    @property
    def length(self) -> int:
        """How many tokens were fed and kept."""
        return len(self.tokens)

    @property
    def layers(self) -> list[Any]:
        """The layers of the cache."""
        return self._cache.layers

    @property
    def plain(self) -> bool:
        """Whether every layer keeps every key and takes a bool mask."""
        return self._plain

    def _allow_rollback(self) -> None:
        layers = self._cache.layers
        fixed = {
            type(layer).__name__ for layer in layers if not (isinstance(layer, DynamicLayer) and layer.is_croppable)
        }
        if fixed or not layers:
            raise UnsupportedError(
                f"{type(self.model).__name__} keeps a state that cannot be rolled back ({', '.join(sorted(fixed))}), "
                "which speculation needs after a refusal; run it without a draft"
            )
        if hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()

    def _grow(self, length: int) -> None:
        if self._positions.numel() < length:
            room = max(256, 2 * length)
            self._positions = torch.arange(room)
            self._triangle = torch.ones(room, room, dtype=torch.bool).tril() if self._plain else self._triangle

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; returns logits ``[len(tokens), V]``, or of the ``last`` of them only."""
        begin, end = self.length, self.length + len(tokens)
        self._grow(end)
        mask = None
        if self._plain and begin > 0 and len(tokens) > 1:
            mask = self._triangle[None, None, begin:end, :end]
        output = self.model(
            input_ids=torch.tensor([tokens]),
            attention_mask=mask,
            position_ids=self._positions[None, begin:end],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if last is None else last,
        )
        self.tokens += tokens
        return output.logits[0]

    def feed_rows(self, tokens: Sequence[int], positions: Sequence[int], mask: NDArray[np.bool_]) -> Tensor:
        """Append tokens at any positions ``[m]`` that see what ``mask [m, keys]`` says; see :mod:`.engine.rows`.

        They are not counted in `tokens` until :meth:`keep` says which keys stay.
        """
        output = self.model(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.from_numpy(mask)[None, None],
            position_ids=torch.tensor([positions]),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[0]

    def keep(self, slots: list[int], tokens: list[int]) -> None:
        """Of the keys, keep those in `slots`, in that order; the sequence is now `tokens`."""
        index = torch.tensor(slots, dtype=torch.long)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys.index_select(-2, index), layer.values.index_select(-2, index)
        self.tokens = tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        surplus = self.length - length
        # Negative is "remove so many" in every transformers 5; sliding layers also want to hear of a zero.
        if surplus > 0 or self._slides:
            self._cache.crop(-surplus)
        del self.tokens[length:]


class LeanLlama:
    """A Llama without the modules: the same mathematics in a dozen operations a layer.

    What differs from ``LlamaForCausalLM`` is bookkeeping and rounding, never the function: projections that share an
    input are one product, rows of the query and key projections are permuted so that a rotation is one complex
    product, and keys and values are written into a buffer instead of being concatenated. Logits agree with the module's
    to rounding (tests/test_generate.py). That is more than a draft needs: speculation is exact for any draft, as
    long as the law that is recorded is the law that was drawn from.

    Weights are arranged once, here; each sequence has its own cache. Later changes of the model are not seen.
    """

    def __init__(self, model: PreTrainedModel):
        if not self.computes(model):
            raise UnsupportedError(f"LeanLlama computes plain Llama models, not {type(model).__name__}")
        config: Any = model.config
        body: Any = model.model
        self.vocab_size = int(config.vocab_size)
        self.eps = float(config.rms_norm_eps)
        self.width = int(body.layers[0].self_attn.head_dim)
        self.heads, self.key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.embedding: Tensor = body.embed_tokens.weight.detach()
        self.hidden = (self.embedding.shape[1],)
        self.norm: Tensor = body.norm.weight.detach()
        head: Any = model.get_output_embeddings()
        self.head: Tensor = head.weight.detach()
        self.layers = [self._arrange(layer) for layer in body.layers]
        self._rotary = body.rotary_emb

    @staticmethod
    def computes(model: PreTrainedModel) -> bool:
        """Whether this is a model that the class computes."""
        config: Any = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            type(model).__name__ == "LlamaForCausalLM"
            and model.dtype in (torch.float32, torch.float64)  # complex numbers come in no other
            and config.hidden_act == "silu"
            and not config.attention_bias
            and not config.mlp_bias
            and rope.get("rope_type", "default") == "default"
            and rope.get("partial_rotary_factor", 1.0) == 1.0
        )

    def sequence(self) -> LeanLlamaRunner:
        """A fresh sequence."""
        return LeanLlamaRunner(self)

    def _arrange(self, layer: Any) -> tuple[Tensor, ...]:
        attention, mlp = layer.self_attn, layer.mlp

        def paired(weight: Tensor) -> Tensor:
            # Channel i turns with channel i + D/2; put the two next to each other, as one complex number.
            return weight.detach().unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)

        value = attention.v_proj.weight.detach()
        return (
            layer.input_layernorm.weight.detach(),
            torch.cat([paired(attention.q_proj.weight), paired(attention.k_proj.weight), value]),
            attention.o_proj.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]),
            mlp.down_proj.weight.detach(),
        )

    def turns(self, length: int) -> Tensor:
        """Rotations of positions 0 to ``length``: complex ``[length, 1, width / 2]``."""
        wide = torch.float64 if self.embedding.dtype == torch.float64 else torch.float32
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._rotary.inv_freq.float()
        scale = float(self._rotary.attention_scaling)
        return torch.complex((angles.cos() * scale).to(wide), (angles.sin() * scale).to(wide))[:, None, :]


class LeanLlamaRunner:
    """One sequence in a :class:`LeanLlama`."""

    def __init__(self, model: LeanLlama):
        self.model = model
        self.vocab_size = model.vocab_size
        self.tokens: list[int] = []
        self._room = 0
        self._turns = torch.empty(0)
        self._caches: list[Tensor] = []

    def _grow(self, length: int) -> None:
        if length <= self._room:
            return
        model = self.model
        self._room = max(256, 2 * length)
        self._turns = model.turns(self._room)
        old, self._caches = self._caches, []
        for index in range(len(model.layers)):
            # [keys and values, key heads, room, width]; attention reads both as they lie.
            cache = model.embedding.new_empty((2, model.key_heads, self._room, model.width))
            if old:
                cache[:, :, : old[index].shape[2]] = old[index]
            self._caches.append(cache)

    @property
    def length(self) -> int:
        """How many tokens were fed and kept."""
        return len(self.tokens)

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens; returns logits ``[len(tokens), V]``, or of the ``last`` of them only."""
        begin = self.length
        self._grow(begin + len(tokens))
        turns = self._turns[begin : begin + len(tokens)]
        logits = self._compute(tokens, turns, begin, None, last)
        self.tokens += tokens
        return logits

    def feed_rows(self, tokens: Sequence[int], positions: Sequence[int], begin: int, mask: NDArray[np.bool_]) -> Tensor:
        """Tokens at any positions ``[m]``, into the slots from `begin` on, that see what ``mask [m, slots]`` says.

        They are not counted in `tokens` until :meth:`move` makes some of them the sequence.
        """
        self._grow(begin + len(tokens))
        return self._compute(tokens, self._turns[list(positions)], begin, mask, None)

    def move(self, slots: list[int], to: int, tokens: list[int]) -> None:
        """Behind the first `to` keys come those in `slots`; the sequence is now `tokens`."""
        index = torch.tensor(slots, dtype=torch.long)
        for cache in self._caches:
            cache[:, :, to : to + len(slots)] = cache.index_select(2, index)
        self.tokens = tokens

    def _compute(
        self, tokens: Sequence[int], turns: Tensor, begin: int, mask: NDArray[np.bool_] | None, last: int | None
    ) -> Tensor:
        count = len(tokens)
        end = begin + count
        model = self.model
        queries, width, hidden, eps = model.heads, model.width, model.hidden, model.eps
        rotated = (queries + model.key_heads) * width
        rules = Rules(
            scale=width**-0.5,
            causal=mask is None and count > 1,
            mask=None if mask is None else np.broadcast_to(mask, (1, queries, count, end)),
        )
        attended = model.embedding.new_empty((1, count, queries, width)).transpose(1, 2)
        lse = model.embedding.new_empty((1, queries, count))
        x = functional.embedding(torch.tensor(tokens), model.embedding)
        product = functional.linear if count < 4 else _product
        for (norm1, qkv, out, norm2, gate_up, down), cache in zip(model.layers, self._caches, strict=True):
            mixed = product(functional.rms_norm(x, hidden, norm1, eps), qkv)
            torch.view_as_complex(mixed[:, :rotated].view(count, -1, width // 2, 2)).mul_(turns)
            heads = mixed.view(count, -1, width).transpose(0, 1)
            cache[:, :, begin:end].copy_(heads[queries:].unflatten(0, (2, -1)))
            # The core itself: what the operator adds (autograd, torch.compile, checks) costs as much as the attention.
            _core.attention_forward(
                heads[None, :queries], cache[0:1, :, :end], cache[1:2, :, :end], attended, lse, rules
            )
            x = product(attended.transpose(1, 2).reshape(count, -1), out).add_(x)
            gate, up = product(functional.rms_norm(x, hidden, norm2, eps), gate_up).chunk(2, dim=-1)
            x = product(functional.silu(gate).mul_(up), down).add_(x)
        if last is not None:
            x = x[-last:]
        return functional.linear(functional.rms_norm(x, hidden, model.norm, eps), model.head)

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        del self.tokens[length:]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: for a few rows and one thread faster than torch's."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _core.matmul(x, weight.t(), None, out)
    return out
