"""Token rounding in a transformers model: on in training, off in eval, undone by one call.

transformers calls an expert module with what its router chose. Rounding also needs the scores of experts that were not
chosen, and those leave the router as its first result, the logits. So each router gets a forward hook that rounds while
the router is in training mode and leaves the outcome for the expert module beside it, and ``experts_forward`` computes
that instead of the fixed slots it was called with.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import tilewise.hf
from tilewise.errors import ArgumentError, InternalError, UnsupportedError
from tilewise.hf.experts import ROUNDING
from tilewise.moe import Routing
from tilewise.moe.rounding import Rule
from tilewise.torch.moe.fills import round_routing, weight_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Load", "TokenRounding", "round_tokens"]

_ROUTER_NAMES = ("gate", "router")


class Load(NamedTuple):
    """Rows of each expert ``[E]`` in a layer's last training forward: as routed, and as rounded."""

    before: Tensor
    after: Tensor


class _Formula(NamedTuple):
    """How a router makes weights of logits."""

    scoring: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float


def round_tokens(model: PreTrainedModel, rule: Rule = "nearest", tile: int = 128, *, seed: int = 0) -> TokenRounding:
    """Round the number of tokens of every expert to a multiple of `tile` whenever the model trains.

    In ``model.eval()`` nothing changes: the model is evaluated with its plain top-k, as the method intends. Chosen
    pairs keep the router's own weights and gradients; added ones get the weight that the same formula gives them.

    Args:
        model: a model whose experts tilewise computes (``experts_implementation="tilewise"``), with routers that return
            logits, weights and ids: Qwen3-MoE, Mixtral, gpt-oss, DeepSeek-V3, MiniMax-M3 and their like.
        rule: of :func:`tilewise.moe.round_tokens`.
        tile: rows of a tile.
        seed: of the rules that draw. What is drawn follows from the seed, the layer and its loads, so a
            layer that gradient checkpointing computes again rounds in the same way.

    Returns:
        A handle: ``remove()`` undoes everything, and so does leaving a ``with`` block.

    Raises:
        UnsupportedError: no experts, experts that another implementation computes, or a router that cannot be hooked;
            the message names the module.
        ArgumentError: the model is rounded already, or the rule or the tile is none.

    Example:
        >>> import torch, tilewise.hf
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, num_local_experts=4,
        ... )).train()
        >>> tilewise.hf.switch(model, attention=False)
        >>> with tilewise.hf.round_tokens(model, tile=8) as rounding:
        ...     _ = model(torch.arange(16)[None])
        >>> [count % 8 for count in rounding.loads["model.layers.0.mlp"].after.tolist()]
        [0, 0, 0, 0]
    """
    return TokenRounding(model, rule, tile, seed)


class TokenRounding:
    """The handle of :func:`round_tokens`."""

    #: Loads of each layer's last training forward, by the name of the module that holds router and experts.
    loads: dict[str, Load]

    def __init__(self, model: nn.Module, rule: Rule, tile: int, seed: int):
        self.rule: Rule = rule
        self.tile, self.seed, self.loads = tile, seed, {}
        self._hooks: list[Any] = []
        # Everything is checked before anything is changed.
        layers = [
            _Layer(self, index, name, router, experts) for index, (name, router, experts) in enumerate(_layers(model))
        ]
        self._layers = layers
        for layer in layers:
            setattr(layer.experts, ROUNDING, layer)
            self._hooks.append(layer.router.register_forward_hook(layer.round))

    def remove(self) -> None:
        """Undo: the model routes as it did before. Calling it again is harmless."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if getattr(layer.experts, ROUNDING, None) is layer:
                delattr(layer.experts, ROUNDING)
        self._hooks, self._layers = [], []

    def __enter__(self) -> TokenRounding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Name, router and experts of each layer."""
    found = []
    for name, parent in model.named_modules():
        for experts in parent.children():
            # What transformers' decorator leaves on every class of experts.
            if not (hasattr(experts, "_apply_gate") and hasattr(experts, "down_proj") and hasattr(experts, "config")):
                continue
            routers = [getattr(parent, called) for called in _ROUTER_NAMES if hasattr(parent, called)]
            if len(routers) != 1:
                raise UnsupportedError(
                    f"{name} ({type(parent).__name__}) holds experts and {len(routers)} modules called "
                    f"{' or '.join(_ROUTER_NAMES)}; token rounding needs exactly one, the router"
                )
            found.append((name, routers[0], experts))
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no expert modules of transformers' experts interface: there is nothing to "
            "round"
        )
    return found


class _Layer:
    """One router and its experts; the experts' attribute ``ROUNDING``, whose ``take`` ``experts_forward`` calls."""

    def __init__(self, handle: TokenRounding, index: int, name: str, router: nn.Module, experts: nn.Module):
        self.handle, self.index, self.name, self.router, self.experts = handle, index, name, router, experts
        self._outcome: tuple[torch.Size, Routing] | None = None
        if getattr(experts, ROUNDING, None) is not None:
            raise ArgumentError(f"{name} is rounded already; call remove() on the handle of that first")
        self._check_implementation()
        self.formula, sample = _recognise(name, router)
        self._round(*sample)  # a rule or a tile that does not exist shows here
        handle.loads.clear()

    def _check_implementation(self) -> None:
        config: Any = self.experts.config
        if config._experts_implementation != tilewise.hf.NAME:
            raise UnsupportedError(
                f"{self.name}: its experts are computed by {config._experts_implementation!r}, which cannot take a "
                "rounded routing; load the model with experts_implementation='tilewise' or call "
                "tilewise.hf.switch(model)"
            )

    def round(self, router: nn.Module, arguments: Any, output: Any) -> None:
        """The forward hook."""
        self._outcome = None
        if not router.training:
            return
        self._check_implementation()
        logits, weights, ids = output
        self._outcome = ids.shape, self._round(logits, weights, ids)

    @torch.compiler.disable()
    def _round(self, logits: Tensor, weights: Tensor, ids: Tensor) -> Routing:
        handle, experts = self.handle, logits.shape[1]
        # Where autocast or a half-precision model narrowed the logits, the fills' weights are made of what is left.
        with torch.autocast(logits.device.type, enabled=False):
            table = weight_table(logits, ids, **self.formula._asdict())
            routing = round_routing(
                table, ids, weights, tile=handle.tile, rule=handle.rule, seed=handle.seed, layer=self.index
            )
        before = ids.detach().flatten().bincount(minlength=experts)
        handle.loads[self.name] = Load(before, routing.counts(experts))
        return routing

    def take(self, ids: Tensor) -> Routing | None:
        """The rounded routing for what the router has just chosen, or None in eval."""
        if self._outcome is None:
            if self.router.training:
                raise InternalError(f"{self.name}: the experts ran in training without their router before them")
            return None
        (shape, routing), self._outcome = self._outcome, None
        if shape != ids.shape:
            raise UnsupportedError(
                f"{self.name}: the router chose {list(shape)} and its experts were called with {list(ids.shape)}; this "
                "model changes the routing in between, which token rounding cannot follow"
            )
        return routing


def _recognise(name: str, router: nn.Module) -> tuple[_Formula, tuple[Tensor, Tensor, Tensor]]:
    """How a router makes its weights, by what it computes; and a sample of its results.

    It runs on random tokens with random weights in the place of its own, which may be all zeros.
    """

    def refuse(what: str, cause: Exception | None = None) -> UnsupportedError:
        error = UnsupportedError(
            f"{name}: the router {type(router).__name__} {what}; token rounding needs a router that returns (logits, "
            "weights, ids) with weights that are a softmax or sigmoid of the logits"
        )
        error.__cause__ = cause
        return error

    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise refuse("has no `weight` [experts, width]")
    random = torch.Generator().manual_seed(0)

    def draw(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(*(shape or like.shape), generator=random).to(like.device)

    drawn = {key: draw(parameter) for key, parameter in router.named_parameters()}
    tokens = draw(weight, 64, weight.shape[1]) / weight.shape[1] ** 0.5
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            logits, weights, ids = torch.func.functional_call(router, drawn, (tokens,))
            shapes = [list(part.shape) for part in (logits, weights, ids)]
        except Exception as error:
            raise refuse(f"does not run on a sample ({type(error).__name__}: {error})", error) from error
        experts, slots = weight.shape[0], shapes[2][-1]
        if shapes != [[64, experts], [64, slots], [64, slots]] or ids.dtype not in (torch.int32, torch.int64):
            raise refuse(f"returns {shapes} for 64 tokens and {experts} experts")
        values = logits.double()
        tables: dict[Literal["softmax", "sigmoid"], Tensor] = {
            "softmax": values.softmax(-1), "sigmoid": values.sigmoid()
        }  # fmt: skip
        for scoring, table in tables.items():
            plain = table.gather(1, ids.long())
            for renormalise, guess in ((False, plain), (True, plain / plain.sum(-1, keepdim=True))):
                ratio = weights.double() / guess
                scale = float(ratio.median())
                if torch.allclose(ratio, torch.full_like(ratio, scale), rtol=1e-3, atol=0.0):
                    return _Formula(scoring, renormalise, scale), (logits, weights, ids)
    raise refuse("weighs experts by another formula")
