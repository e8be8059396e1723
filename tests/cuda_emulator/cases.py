"""Cases of the expert layer, and what they should give: one plain loop over experts, differentiated by torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from cuda_emulator import DTYPES, EPSILON, Place
from tilewise.cuda import moe
from tilewise.moe import ACTIVATIONS, ExpertGradients
from tilewise.testing import assert_within_budget

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# What is always near enough: for 16 bits, two roundings of everything (a plain loop may be exact by luck).
_FLOORS = {"float32": 1e-6, "float16": 2 * EPSILON["float16"], "bfloat16": 2 * EPSILON["bfloat16"]}


@dataclass
class Case:
    """Arguments of the layer as NumPy arrays, and the upstream gradient."""

    x: np.ndarray
    expert_ids: np.ndarray
    weights: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    gate_up_bias: np.ndarray | None
    down_bias: np.ndarray | None
    grad: np.ndarray
    token_ids: np.ndarray | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        names = ("x", "expert_ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias", "token_ids")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def on(self, place: Place) -> dict[str, Any]:
        return {name: place.put(array) for name, array in self.arrays.items()} | self.options


def make(
    dtype: str,
    tokens: int,
    d: int,
    n: int,
    experts: int,
    slots: int,
    *,
    activation: str = "swiglu",
    layout: str = "concatenated",
    biases: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Data of order 1 everywhere. Some ids are sentinels, and the first score is 0."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (generator.normal(size=shape) * scale).astype(DTYPES[dtype])

    wide = 2 * n if ACTIVATIONS[activation] else n
    ids = generator.integers(0, max(experts, 1), size=(tokens, slots)).astype(np.int32)
    ids[generator.uniform(size=ids.shape) < 0.1] = experts
    weights = generator.normal(size=(tokens, slots)).astype(np.float32)
    weights.reshape(-1)[:1] = 0.0
    return Case(
        normal(tokens, d),
        ids,
        weights,
        normal(experts, wide, d, scale=max(d, 1) ** -0.5),
        normal(experts, d, n, scale=max(n, 1) ** -0.5),
        normal(experts, wide) if biases else None,
        normal(experts, d) if biases else None,
        normal(tokens, d),
        options={"activation": activation, "layout": layout, **options},
    )


def _activate(h: torch.Tensor, activation: str, layout: str, alpha: float, limit: float) -> torch.Tensor:
    if ACTIVATIONS[activation]:
        gate, up = h.chunk(2, -1) if layout == "concatenated" else (h[..., ::2], h[..., 1::2])
    else:
        gate, up = h, torch.ones_like(h)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        return gate * torch.sigmoid(alpha * gate) * up
    curves = {
        "swiglu": functional.silu,
        "silu": functional.silu,
        "geglu": functional.gelu,
        "gelu": functional.gelu,
        "reglu": functional.relu,
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x) ** 2,
    }
    curve = curves.get(activation, lambda x: functional.gelu(x, approximate="tanh"))
    return curve(gate) * up


def loop(case: Case, dtype: str, device: str = "cpu") -> tuple[torch.Tensor, ExpertGradients]:
    """The layer and its gradients in one precision; sums of a token in float32 (float64 in float64)."""
    wide = torch.float64 if dtype == "float64" else torch.float32

    def leaf(array: np.ndarray | None, kind: torch.dtype) -> torch.Tensor | None:
        if array is None:
            return None
        values = torch.from_numpy(array.astype(np.float64 if dtype == "float64" else np.float32))
        return values.to(device, kind).requires_grad_()

    x, gate_up, down, first, second = (
        leaf(array, _TORCH[dtype]) for array in (case.x, case.gate_up, case.down, case.gate_up_bias, case.down_bias)
    )
    weights = leaf(case.weights, wide)
    assert x is not None and gate_up is not None and down is not None and weights is not None
    ids = torch.from_numpy(case.expert_ids.astype(np.int64)).to(device).reshape(-1)
    if case.token_ids is None:
        tokens = torch.arange(len(case.x), device=device).repeat_interleave(case.expert_ids.shape[1])
    else:
        tokens = torch.from_numpy(case.token_ids.astype(np.int64)).to(device)
    options = {"alpha": 1.702, "limit": 7.0, **case.options}
    out = torch.zeros(case.x.shape, dtype=wide, device=device)
    nothing = [None] * len(case.gate_up)
    parts = zip(
        gate_up.unbind(),
        down.unbind(),
        nothing if first is None else first.unbind(),
        nothing if second is None else second.unbind(),
        strict=True,
    )
    for expert, (w1, w2, b1, b2) in enumerate(parts):
        pairs = torch.nonzero(ids == expert)[:, 0]
        h = x[tokens[pairs]] @ w1.T
        h = h if b1 is None else h + b1
        y = _activate(h, **options) @ w2.T
        y = y if b2 is None else y + b2
        out = out.index_add(0, tokens[pairs], y.to(wide) * weights.reshape(-1)[pairs, None])
    out = out.to(_TORCH[dtype])
    leaves = [leaf for leaf in (x, weights, gate_up, down, first, second) if leaf is not None]
    upstream = torch.from_numpy(case.grad.astype(np.float32)).to(device, out.dtype)
    grads = list(torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True))
    named = [None if leaf is None else grads.pop(0) for leaf in (x, weights, gate_up, down, first, second)]
    return out.detach(), ExpertGradients(*named)


def run(case: Case, place: Place) -> tuple[np.ndarray, np.ndarray, ExpertGradients]:
    """Forward and backward on a place; the results as NumPy arrays."""
    arguments = case.on(place)
    out, pre = moe.experts_forward(**arguments)
    gradients = moe.experts_backward(place.put(case.grad), pre, **arguments)
    found = ExpertGradients(*(None if array is None else place.get(array) for array in gradients))
    return place.get(out), place.get(pre), found


def check(case: Case, place: Place, device: str = "cpu") -> tuple[np.ndarray, np.ndarray, ExpertGradients]:
    """Everything within budget: twice what a plain loop in the same type loses, or the floor."""
    out, pre, gradients = run(case, place)
    dtype = str(case.x.dtype)
    truth, plain = loop(case, "float64", device), loop(case, dtype, device)
    floor = _FLOORS[dtype]

    def compare(name: str, got: np.ndarray, want: torch.Tensor, other: torch.Tensor) -> None:
        assert got.dtype == (np.float32 if name == "weights" else case.x.dtype), name
        try:
            assert_within_budget(got, want.cpu(), other.float().cpu(), norm="frobenius", floor=floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

    compare("out", out, truth[0], plain[0])
    for name, got, want, other in zip(ExpertGradients._fields, gradients, truth[1], plain[1], strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            compare(name, got, want, other)
    check_pre_activation(case, pre)
    return out, pre, gradients


def check_pre_activation(case: Case, pre: np.ndarray) -> None:
    """Rows by expert, then by pair; all gates, then all ups; zeros behind the last."""
    experts, wide, _ = case.gate_up.shape
    ids = case.expert_ids.reshape(-1)
    pairs = np.flatnonzero((ids >= 0) & (ids < experts))
    pairs = pairs[np.argsort(ids[pairs], kind="stable")]
    tokens = pairs // case.expert_ids.shape[-1] if case.token_ids is None else case.token_ids[pairs]
    columns = np.arange(wide)
    if ACTIVATIONS[case.options["activation"]] and case.options["layout"] == "interleaved":
        columns = np.concatenate([columns[::2], columns[1::2]])
    assert pre.shape == (ids.size, wide)
    assert not pre[len(pairs) :].any()
    x, weight = case.x.astype(np.float64)[tokens], case.gate_up.astype(np.float64)[ids[pairs]][:, columns]
    expected = np.einsum("rd,rcd->rc", x, weight)
    if case.gate_up_bias is not None:
        expected += case.gate_up_bias.astype(np.float64)[ids[pairs]][:, columns]
    error = np.linalg.norm(pre[: len(pairs)].astype(np.float64) - expected)
    assert error <= _FLOORS[str(case.x.dtype)] * np.linalg.norm(expected) + 1e-30


def same_bits(one: Any, other: Any) -> None:
    """Equal bit for bit, NaN included."""
    for got, want in zip(one, other, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


__all__ = ["Case", "check", "loop", "make", "run", "same_bits"]
