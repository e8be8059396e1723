"""The expert layer beside what torch offers: a loop over experts, and ``grouped_mm``. Forward, or forward and backward.

All three get the same tensors and the same routing, and :meth:`Problem.check` compares their results before anybody
times them. torch is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewise.errors import ArgumentError, InternalError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OURS", "Problem", "Shape", "grouped_mm", "loop", "matmul", "skewed_logits"]

OURS = "tilewise"
# Closeness of two implementations of one thing, in parts of the largest value: generous, the tests are the proof.
_CLOSE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 6e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Shape:
    """One SwiGLU layer: `tokens` of `width` through `top_k` of `experts` with hidden size `hidden`.

    Example:
        >>> Shape(tokens=10, width=4, hidden=2, experts=3, top_k=1).flops(train=True)
        1440.0
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "hidden", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.top_k > self.experts:
            raise ArgumentError(f"top_k: expected 1..={self.experts} (the number of experts), got {self.top_k}")

    def flops(self, train: bool) -> float:
        """Multiplications and additions of the three matrices of every pair; a backward pass is twice a forward."""
        return (18.0 if train else 6.0) * self.tokens * self.top_k * self.width * self.hidden


def skewed_logits(shape: Shape, skew: float, seed: int = 0) -> Tensor:
    """Router logits ``[tokens, experts]`` whose top-k draws experts by Zipf's law.

    Args:
        shape: how many.
        skew: exponent of the law: expert i has probability ``(i + 1) ** -skew`` up to a factor; 0 is uniform.
        seed: of the draws.

    Example:
        >>> logits = skewed_logits(Shape(1000, 1, 1, 8, 2), 1.2)
        >>> counts = logits.topk(2).indices.flatten().bincount()
        >>> bool(counts[0] > 3 * counts[7])
        True
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    # The largest of log p + Gumbel noise are draws from p without replacement.
    uniform = torch.rand(shape.tokens, shape.experts, generator=random).clamp_(1e-20, 1 - 1e-7)
    return -skew * torch.log(torch.arange(1.0, shape.experts + 1)) - torch.log(-torch.log(uniform))


def loop(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts one after the other, as most model code has it."""
    import torch

    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    out = torch.zeros_like(x)
    for expert in torch.unique(expert_ids).tolist():
        token, slot = torch.where(expert_ids == expert)
        gate, up = linear(x[token], gate_up[expert]).chunk(2, -1)
        rows = linear(silu(gate) * up, down[expert]) * weights[token, slot, None].to(x.dtype)
        out.index_add_(0, token, rows)
    return out


def grouped_mm(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts as two ``torch.nn.functional.grouped_mm``."""
    import torch

    flat = expert_ids.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).to(torch.int32)
    token = order // expert_ids.shape[1]
    hidden = torch.nn.functional.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, -1)
    rows = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, rows)


@dataclass(frozen=True)
class Problem:
    """Tensors of one layer, and functions over them; made by :meth:`make`."""

    shape: Shape
    dtype: str
    train: bool
    logits: Any
    expert_ids: Any
    weights: Any
    x: Any
    gate_up: Any
    down: Any
    d_out: Any

    @classmethod
    def make(cls, shape: Shape, dtype: str = "float32", *, skew: float = 0.0, train: bool = False) -> Problem:
        """Draw everything.

        Args:
            shape: sizes.
            dtype: of x and the weights.
            skew: see :func:`skewed_logits`.
            train: time forward and backward, with gradients of x, the routing weights and both matrices.

        Raises:
            ArgumentError: an unknown dtype.

        Example:
            >>> problem = Problem.make(Shape(5, 8, 4, 3, 2), train=False)
            >>> problem.check()
            >>> problem.functions()["loop"]()[0].shape
            torch.Size([5, 8])
        """
        import torch

        import tilewise.torch as twt

        if dtype not in _CLOSE:
            raise ArgumentError(f"dtype: expected one of {', '.join(_CLOSE)}, got {dtype!r}")
        kind, random = getattr(torch, dtype), torch.Generator().manual_seed(1)

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(*sizes, generator=random) * scale).to(kind)
            return values.requires_grad_(train)

        logits = skewed_logits(shape, skew)
        expert_ids, weights = twt.moe.route(logits, shape.top_k)
        return cls(
            shape, dtype, train, logits, expert_ids, weights.requires_grad_(train), draw(shape.tokens, shape.width),
            draw(shape.experts, 2 * shape.hidden, shape.width, scale=shape.width**-0.5),
            draw(shape.experts, shape.width, shape.hidden, scale=shape.hidden**-0.5),
            draw(shape.tokens, shape.width).detach(),
        )  # fmt: skip

    @property
    def counts(self) -> Any:
        """Rows of each expert ``[E]``."""
        return self.expert_ids.flatten().bincount(minlength=self.shape.experts)

    def functions(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """What is timed, by name: each returns the output, and with ``train`` the four gradients."""
        import torch

        import tilewise.torch as twt

        def bind(layer: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
            def run() -> tuple[Tensor, ...]:
                out = layer(self.x, self.expert_ids, self.weights, self.gate_up, self.down)
                if not self.train:
                    return (out,)
                leaves = (self.x, self.weights, self.gate_up, self.down)
                return (out, *torch.autograd.grad(out, leaves, self.d_out))

            return run

        layers = {OURS: twt.moe.experts, "loop": loop, "grouped_mm": grouped_mm}
        return {name: bind(layer) for name, layer in layers.items()}

    def check(self) -> None:
        """Compare the functions' results.

        Raises:
            InternalError: two of them do not agree.
        """
        functions = self.functions()
        ours = functions.pop(OURS)()
        for name, function in functions.items():
            parts = ("output", "gradient of x", "of weights", "of gate_up", "of down")
            for part, mine, theirs in zip(parts, ours, function(), strict=False):
                mine, theirs = mine.detach().double(), theirs.detach().double()
                error = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
                if not error <= _CLOSE[self.dtype]:
                    raise InternalError(
                        f"{part}: {OURS} and {name} differ by {error:.1e} of the largest value in {self.dtype}"
                    )


def matmul(dtype: str, size: int = 2048) -> Callable[[], Tensor]:
    """torch's own square product, ``2 * size**3`` operations: what this machine can do, to be timed beside the rest.

    Example:
        >>> matmul("float32", size=64)().shape
        torch.Size([64, 64])
    """
    import torch

    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: torch.matmul(a, b)
