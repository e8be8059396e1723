"""A mixture-of-experts layer as a module: router, experts, token rounding, expert parallelism."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from tilewise.errors import ArgumentError, ShapeError
from tilewise.moe import ACTIVATIONS, Activation, Layout, Scoring
from tilewise.moe.rounding import Rule
from tilewise.torch.moe.fills import round_routing, weight_table
from tilewise.torch.moe.layer import experts
from tilewise.torch.moe.parallel import Dispatcher, Local
from tilewise.torch.moe.routers import load_balance_loss, route

__all__ = ["MoE"]


class MoE(nn.Module):
    """Router and experts: ``out[t] = sum over the chosen e of weight[t, e] * down[e] @ act(gate_up[e] @ x[t])``.

    Parameters, by their names in ``state_dict()``:

    =====================  =====================  ======================================================
    ``router.weight``      ``[E, width]``         logits are computed in float32 (float64 for float64)
    ``gate_up``            ``[E, 2 * hidden,``    ``[E, hidden, width]`` without a gate; rows in `layout`
                           ``width]``
    ``down``               ``[E, width, hidden]``
    ``gate_up_bias``       ``[E, 2 * hidden]``    with ``bias=True``
    ``down_bias``          ``[E, width]``         with ``bias=True``
    ``selection_bias``     ``[E]``                a buffer, with ``selection_bias=True``; see :meth:`balance`
    =====================  =====================  ======================================================

    With a dispatcher over several processes E is the number of experts here (``dispatcher.local_experts``) for all but
    ``router.weight`` and ``selection_bias``, which every process has whole.

    Args:
        num_experts: experts of the layer, E.
        top_k: experts of a token.
        width: of the tokens, d.
        hidden: of an expert, n.
        activation, layout, alpha, limit: of :func:`tilewise.moe.experts`.
        bias: give both projections of every expert a bias.
        scoring, renormalise, scale, groups, top_groups: of :func:`tilewise.moe.route`.
        selection_bias: choose experts by score + a bias that :meth:`balance` moves towards even load (with
            ``scoring="sigmoid"``).
        rounding: a rule of :func:`tilewise.moe.round_tokens`, or ``None``. Rounds in training mode only; in ``eval()``
            every token has exactly its `top_k`.
        tile: rows of a tile for `rounding`.
        seed: of the rules that draw (see :func:`tilewise.torch.moe.fills.round_routing`).
        dispatcher: a :class:`~tilewise.torch.moe.Dispatcher` for expert parallelism; by default all experts are here.
            Rounding then happens on the ranks that received tokens, where the fills come from tokens that are there.
        device, dtype: of the parameters.

    Attributes:
        last_load: int64 ``[experts here]``, rows of each expert in the last forward pass (``None`` before).

    Weights begin as those of ``torch.nn.Linear`` do.

    Raises:
        ArgumentError: sizes below 1, `top_k` above `num_experts`, an unknown activation, a dispatcher of another
            number of experts, or a selection bias without sigmoid scores.

    Example:
        >>> import torch
        >>> from tilewise.torch.moe import MoE
        >>> layer = MoE(8, 2, 16, 32)
        >>> x = torch.randn(4, 10, 16)
        >>> out, aux_loss = layer(x, return_aux_loss=True)
        >>> (out.square().mean() + 0.01 * aux_loss).backward()
        >>> out.shape, int(layer.last_load.sum())
        (torch.Size([4, 10, 16]), 80)

    Source: the router variants of Mixtral, Qwen3-MoE and DeepSeek-V3; rounding and memory of SonicMoE (2512.14080).
    """

    selection_bias: Tensor | None
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = "swiglu",
        layout: Layout = "concatenated",
        bias: bool = False,
        scoring: Scoring = "softmax_topk",
        renormalise: bool = False,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int | None = None,
        selection_bias: bool = False,
        rounding: Rule | None = None,
        tile: int = 128,
        seed: int = 0,
        dispatcher: Dispatcher | None = None,
        alpha: float = 1.702,
        limit: float = 7.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, number in (("num_experts", num_experts), ("width", width), ("hidden", hidden), ("tile", tile)):
            if number < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {number}")
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k: expected 1..={num_experts} (the number of experts), got {top_k}")
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if selection_bias and scoring != "sigmoid":
            raise ArgumentError(f"selection_bias needs scoring='sigmoid', got {scoring!r}")
        if dispatcher is not None and dispatcher.num_experts != num_experts:
            raise ArgumentError(f"dispatcher: expected one of {num_experts} experts, got {dispatcher.num_experts}")
        self.num_experts, self.top_k, self.width, self.hidden = num_experts, top_k, width, hidden
        self.activation: Activation = activation
        self.layout: Layout = layout
        self.scoring: Scoring = scoring
        self.renormalise, self.scale, self.groups, self.top_groups = renormalise, scale, groups, top_groups
        self.rounding: Rule | None = rounding
        self.tile, self.seed, self.alpha, self.limit = tile, seed, alpha, limit
        self.dispatcher: Dispatcher = Local(num_experts) if dispatcher is None else dispatcher
        self.last_load: Tensor | None = None
        self._routed: Tensor | None = None

        here, features = len(self.dispatcher.local_experts), 2 * hidden if ACTIVATIONS[activation] else hidden
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(width, num_experts, bias=False, **options)
        self.gate_up = nn.Parameter(torch.empty(here, features, width, **options))
        self.down = nn.Parameter(torch.empty(here, width, hidden, **options))
        self.gate_up_bias = nn.Parameter(torch.empty(here, features, **options)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(here, width, **options)) if bias else None
        floats = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer(
            "selection_bias", torch.zeros(num_experts, device=device, dtype=floats) if selection_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``torch.nn.Linear`` does: uniform within 1 / sqrt(inputs)."""
        self.router.reset_parameters()
        for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)):
            bound = 1.0 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    @overload
    def forward(self, x: Tensor, *, return_aux_loss: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, return_aux_loss: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, *, return_aux_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Route and compute.

        Args:
            x: ``[..., width]``.
            return_aux_loss: also return the load-balance loss of this call (:func:`tilewise.moe.load_balance_loss`;
                with sigmoid scores, of the scores), which is 1 for a perfectly even router. It is about what the router
                chose, before rounding, and about this process's tokens.

        Returns:
            ``[..., width]`` in the type of x (under autocast, in its type), and the loss if asked for.

        Raises:
            ShapeError: x does not end in `width`.
        """
        if x.shape[-1] != self.width:
            raise ShapeError(f"x: expected [..., {self.width}], got {list(x.shape)}")
        tokens = x.reshape(-1, self.width)
        logits = self._logits(tokens)
        ids, weights = route(
            logits, self.top_k, scoring=self.scoring, bias=self.selection_bias, renormalise=self.renormalise,
            scale=self.scale, groups=self.groups, top_groups=self.top_groups,
        )  # fmt: skip
        rounding = self.rounding if self.training else None
        table = None if rounding is None else self._table(logits, ids)
        sent = self.dispatcher.dispatch(tokens, ids, weights, scores=table)
        routing = sent.expert_ids, sent.weights, sent.token_ids
        if rounding is not None:
            assert sent.scores is not None
            routing = round_routing(sent.scores, *routing, tile=self.tile, rule=rounding, seed=self.seed)
        y = experts(
            sent.x, routing[0], routing[1], self.gate_up, self.down, token_ids=routing[2], activation=self.activation,
            layout=self.layout, gate_up_bias=self.gate_up_bias, down_bias=self.down_bias, alpha=self.alpha,
            limit=self.limit,
        )  # fmt: skip
        out = self.dispatcher.combine(y, sent.handle).view(x.shape)
        here = len(self.dispatcher.local_experts)
        self.last_load = _count(routing[0], here)
        self._routed = (
            self.last_load if rounding is None and here == self.num_experts else _count(ids, self.num_experts)
        )
        if not return_aux_loss:
            return out
        if self.scoring == "sigmoid":
            return out, load_balance_loss(torch.sigmoid(logits), ids, probabilities=True)
        return out, load_balance_loss(logits, ids)

    def _logits(self, tokens: Tensor) -> Tensor:
        # A router in half precision makes ties and flips choices; its product is a small part of the layer's work.
        wide = torch.float64 if self.router.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.to(wide), self.router.weight.to(wide))

    def _table(self, logits: Tensor, ids: Tensor) -> Tensor:
        divided = self.renormalise or self.scoring in ("softmax_topk", "softmax_renormalised")
        scoring: Literal["softmax", "sigmoid"] = "sigmoid" if self.scoring == "sigmoid" else "softmax"
        return weight_table(logits, ids, scoring=scoring, renormalise=divided, scale=self.scale)

    @torch.no_grad()
    def balance(self, rate: float, load: Tensor | None = None) -> None:
        """Move the selection bias by `rate`: up for experts with less than the mean load, down for those with more.

        Call it once a step, after the optimiser (the balancing without an auxiliary loss of DeepSeek-V3).

        Args:
            rate: the step, say 1e-3.
            load: ``[num_experts]``, tokens that chose each expert. By default those of this process's last forward;
                with several processes give the sum over all, so that the biases stay equal.

        Raises:
            ArgumentError: the module has no selection bias, or has not run yet.
        """
        if self.selection_bias is None:
            raise ArgumentError("balance moves the selection bias, and this module has none: give selection_bias=True")
        load = self._routed if load is None else load
        if load is None:
            raise ArgumentError("balance needs a load, and the module has not run yet; call forward first, or give one")
        wide = load.to(self.selection_bias.dtype)
        self.selection_bias += rate * torch.sign(wide.mean() - wide)

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the default."""
        parts = [
            f"{self.num_experts} experts, top_k={self.top_k}, width={self.width}, hidden={self.hidden}",
            f"activation={self.activation!r}, scoring={self.scoring!r}",
        ]
        if self.layout != "concatenated":
            parts.append(f"layout={self.layout!r}")
        if self.gate_up_bias is not None:
            parts.append("bias=True")
        if self.rounding is not None:
            parts.append(f"rounding={self.rounding!r}, tile={self.tile}")
        if len(self.dispatcher.local_experts) != self.num_experts:
            held = self.dispatcher.local_experts
            parts.append(f"experts here: {held.start} to {held.stop - 1}")
        return ", ".join(parts)


def _count(ids: Tensor, experts: int) -> Tensor:
    """Rows of each expert; ids outside are not counted. No data-dependent shape, so that it compiles."""
    flat = ids.detach().reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    return flat.new_zeros(experts + 1).scatter_add(0, flat, torch.ones_like(flat))[:experts]
