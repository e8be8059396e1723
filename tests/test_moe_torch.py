"""`twt.moe.experts` under everything that autograd does to an operator: groups 12, 14 and 15 of the adversarial list.

Group 12: which gradients are asked for, and how the incoming one lies in memory. Group 14: mixed types, autocast, odd
memory, threads. Group 15: checkpointing, accumulation, shared weights, updates in place.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tilewise.torch as twt  # noqa: E402
from tilewise import _core, reference  # noqa: E402
from tilewise.errors import DtypeError, TilewiseError, UnsupportedError  # noqa: E402
from tilewise.testing import assert_within_budget, force_threads  # noqa: E402

LEAVES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
TOKENS, WIDTH, HIDDEN, EXPERTS, SLOTS = 37, 10, 6, 5, 3


def leaves(dtype: Any = torch.float32, seed: int = 0, wants: Any = LEAVES) -> dict[str, Any]:
    """Tensors of order one, those of `wants` with gradients."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * scale).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "x": draw(TOKENS, WIDTH),
        "weights": torch.rand(TOKENS, SLOTS, generator=random, dtype=torch.float64).to(wide),
        "gate_up": draw(EXPERTS, 2 * HIDDEN, WIDTH, scale=WIDTH**-0.5),
        "down": draw(EXPERTS, WIDTH, HIDDEN, scale=HIDDEN**-0.5),
        "gate_up_bias": draw(EXPERTS, 2 * HIDDEN),
        "down_bias": draw(EXPERTS, WIDTH),
    }
    return {name: tensor.requires_grad_(name in wants) for name, tensor in made.items()}


def ids(seed: int = 7) -> Any:
    random = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS, generator=random)[:SLOTS] for _ in range(TOKENS)])


def layer(t: dict[str, Any], which: Any = None, **options: Any) -> Any:
    which = ids() if which is None else which
    biases = {name: t[name] for name in ("gate_up_bias", "down_bias")}
    return twt.moe.experts(t["x"], which, t["weights"], t["gate_up"], t["down"], **biases, **options)


def loop(t: dict[str, Any], which: Any = None) -> Any:
    """The same by torch's own operations, in the type of x."""
    which = ids() if which is None else which
    out = torch.zeros_like(t["x"])
    for expert in range(EXPERTS):
        token, slot = torch.where(which == expert)
        hidden = t["x"][token] @ t["gate_up"][expert].T + t["gate_up_bias"][expert]
        gate, up = hidden.chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ t["down"][expert].T + t["down_bias"][expert]
        out = out.index_add(0, token, (rows * t["weights"][token, slot, None]).to(out.dtype))
    return out


def answer(seed: int = 3, dtype: Any = torch.float32) -> Any:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grads(out: Any, t: dict[str, Any], gradient: Any) -> dict[str, Any]:
    names = [name for name in LEAVES if t[name].requires_grad]
    return dict(zip(names, torch.autograd.grad(out, [t[name] for name in names], gradient), strict=True))


def test_group_12_an_expanded_gradient() -> None:
    """`.sum().backward()` hands down a gradient with stride 0."""
    t = leaves()
    dense = grads(layer(t), t, torch.ones(TOKENS, WIDTH))
    expanded = grads(layer(t), t, torch.ones(()).expand(TOKENS, WIDTH))
    for row in (torch.ones(1, WIDTH).expand(TOKENS, WIDTH), torch.ones(TOKENS, 1).expand(TOKENS, WIDTH)):
        assert all(torch.equal(a, dense[n]) for n, a in grads(layer(t), t, row).items())
    assert all(torch.equal(expanded[name], dense[name]) for name in LEAVES)
    for name in LEAVES:
        t[name].grad = None
    layer(t).sum().backward()
    assert all(torch.equal(t[name].grad, dense[name]) for name in LEAVES)


def test_group_12_a_gradient_that_is_not_contiguous() -> None:
    t, gradient = leaves(), answer()
    want = grads(layer(t), t, gradient)
    padded = torch.full((TOKENS, WIDTH + 3), float("nan"))
    padded[:, :WIDTH] = gradient
    flipped = gradient.flip(0)
    for other in (gradient.t().contiguous().t(), padded[:, :WIDTH], flipped.flip(0)):
        assert all(torch.equal(a, want[name]) for name, a in grads(layer(t), t, other).items())


@pytest.mark.parametrize("wants", list(itertools.combinations(LEAVES, 1)) + list(itertools.combinations(LEAVES, 5)))
def test_group_12_only_some_gradients(wants: tuple[str, ...]) -> None:
    """Exactly what is asked for comes back, and equals what comes back when everything is."""
    everything = leaves()
    want = grads(layer(everything), everything, answer())
    some = leaves(wants=wants)
    out = layer(some)
    out.backward(answer())
    for name in LEAVES:
        if name in wants:
            assert torch.equal(some[name].grad, want[name]), name
        else:
            assert some[name].grad is None


def test_group_12_no_gradient_keeps_nothing() -> None:
    """Without a gradient to give, or under no_grad, the result has no history and the same bits."""
    t = leaves()
    want = layer(t)
    assert want.requires_grad
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        plain = layer(leaves(wants=()))
        with torch.no_grad():
            quiet = layer(t)
    assert not saved
    assert not plain.requires_grad and not quiet.requires_grad
    assert torch.equal(plain, want) and torch.equal(quiet, want)


def test_group_12_a_result_that_is_not_used() -> None:
    t = leaves()
    unused = layer(t)
    (t["x"] * 2).sum().backward()
    assert t["gate_up"].grad is None
    del unused


def test_group_12_double_backward_is_refused() -> None:
    """A second derivative raises by name; it is never silently zero."""
    t = leaves(torch.float64)
    (first,) = torch.autograd.grad(layer(t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_group_12_forward_mode_is_refused() -> None:
    """Forward-mode derivatives do not exist here and must not look like zeros."""
    t = leaves(torch.float64)
    with torch.autograd.forward_ad.dual_level():
        t["x"] = torch.autograd.forward_ad.make_dual(t["x"].detach(), torch.ones(TOKENS, WIDTH, dtype=torch.float64))
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.autograd.forward_ad.unpack_dual(layer(t)).tangent.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_14_routing_weights_of_any_type(dtype: Any) -> None:
    """x in half precision with weights in float32, as routers give them, or in float64, or in its own type."""
    t = leaves(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    truth = grads(loop(exact), exact, answer(dtype=torch.float64))
    for kind in (torch.float32, torch.float64, dtype):
        mixed = dict(t) | {"weights": t["weights"].detach().to(kind).requires_grad_()}
        got = grads(layer(mixed), mixed, answer(dtype=dtype))
        assert got["weights"].dtype == kind and got["x"].dtype == dtype and got["down"].dtype == dtype
        error = float((got["weights"].double() - truth["weights"]).norm() / truth["weights"].norm())
        assert error < 4 * torch.finfo(dtype).eps


def test_group_14_mixed_expert_types_are_refused_by_name() -> None:
    t = leaves()
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        mixed = dict(t) | {name: t[name].detach().bfloat16().requires_grad_()}
        with pytest.raises(DtypeError, match=name):
            layer(mixed)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_group_14_autocast(narrow: Any) -> None:
    """Inputs of any floating type; the result in autocast's type; gradients in the leaves' own."""
    t = leaves()
    narrowed = {name: leaf if name == "weights" else leaf.detach().to(narrow) for name, leaf in leaves().items()}
    want = layer(narrowed)
    for kind in (torch.float32, narrow):
        t["x"] = leaves()["x"].detach().to(kind).requires_grad_()
        with torch.autocast("cpu", narrow):
            out = layer(t)
        assert out.dtype == narrow
        assert torch.equal(out, want)
        got = grads(out, t, answer(dtype=narrow))
        assert all(got[name].dtype == t[name].dtype for name in LEAVES)
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
        truth = grads(loop(exact), exact, answer(dtype=narrow).double())
        plain_leaves = {n: v.detach().to(narrow).requires_grad_() for n, v in t.items()}
        plain = grads(loop(plain_leaves), plain_leaves, answer(dtype=narrow))
        for name in LEAVES:
            assert_within_budget(got[name].to(plain[name].dtype), truth[name], plain[name], norm="frobenius")
    with torch.autocast("cpu", narrow, enabled=False):
        assert layer(leaves()).dtype == torch.float32


def test_group_14_gradients_do_not_depend_on_threads() -> None:
    results = []
    for count in (1, 2, 5):
        with force_threads(count):
            t = leaves()
            results.append(grads(layer(t), t, answer()))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in LEAVES)


def test_group_14_unaligned_memory() -> None:
    """Views that begin one element after an allocation: no vector of theirs is aligned."""
    t, want = leaves(), {}
    want = grads(layer(t), t, answer())
    moved = {}
    for name, tensor in t.items():
        memory = torch.full((tensor.numel() + 1,), float("nan"))
        memory[1:] = tensor.detach().flatten()
        moved[name] = memory[1:].view(tensor.shape).requires_grad_()
        assert moved[name].data_ptr() % 64 != 0
    got = grads(layer(moved), moved, answer())
    assert all(torch.equal(got[name], want[name]) for name in LEAVES)


def test_group_14_views_as_leaves() -> None:
    """Transposed weights, a strided x: gradients reach the memory they are views of."""
    t = leaves()
    want = grads(layer(t), t, answer())
    up = t["gate_up"].detach().transpose(1, 2).contiguous().requires_grad_()
    down = t["down"].detach().transpose(1, 2).contiguous().requires_grad_()
    x = torch.zeros(TOKENS, 2 * WIDTH)
    x[:, ::2] = t["x"].detach()
    x.requires_grad_()
    views = dict(t) | {"gate_up": up.transpose(1, 2), "down": down.transpose(1, 2), "x": x[:, ::2]}
    layer(views).backward(answer())
    assert torch.allclose(up.grad.transpose(1, 2), want["gate_up"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(down.grad.transpose(1, 2), want["down"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad[:, ::2], want["x"], rtol=1e-5, atol=1e-6)
    assert (x.grad[:, 1::2] == 0).all()


def test_group_14_subnormals() -> None:
    """Subnormal results are numbers, whatever torch's switch says: it is the calling thread's alone."""
    t = leaves()
    with torch.no_grad():
        for name, factor in (("down", 1e-39), ("gate_up_bias", 0.0), ("down_bias", 0.0)):
            t[name].mul_(factor)
    want = layer(t).detach()
    tiny = torch.finfo(torch.float32).tiny
    assert ((want != 0) & (want.abs() < tiny)).any()
    assert_within_budget(want, loop({n: v.detach().double() for n, v in t.items()}), loop(t), floor=2.0**-149 * HIDDEN)
    normal = leaves()
    plain = grads(layer(normal), normal, answer())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no switch")
    try:
        got = layer(t).detach()
        flushed = grads(layer(normal), normal, answer())
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)
    for name in LEAVES:
        assert torch.equal(flushed[name], plain[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_group_15_checkpointing(reentrant: bool) -> None:
    t = leaves()
    want = grads(layer(t), t, answer())
    order = list(LEAVES)

    def again(*tensors: Any) -> Any:
        return layer(dict(zip(order, tensors, strict=True)))

    out = torch.utils.checkpoint.checkpoint(again, *[t[name] for name in order], use_reentrant=reentrant)
    out.backward(answer())
    assert all(torch.equal(t[name].grad, want[name]) for name in LEAVES)


def test_group_15_accumulation_into_grad() -> None:
    t = leaves()
    one, two = grads(layer(t), t, answer(3)), grads(layer(t, ids(8)), t, answer(4))
    for name in LEAVES:
        t[name].grad = torch.ones_like(t[name])
    layer(t).backward(answer(3))
    kept = {name: t[name].grad for name in LEAVES}
    layer(t, ids(8)).backward(answer(4))
    for name in LEAVES:
        assert t[name].grad is kept[name], "accumulation is in place"
        assert torch.equal(t[name].grad, (1.0 + one[name]) + two[name])


def test_group_15_retained_graphs_and_two_backwards() -> None:
    t = leaves()
    out = layer(t)
    first = torch.autograd.grad(out, t["gate_up"], answer(), retain_graph=True)[0]
    second = torch.autograd.grad(out, t["gate_up"], answer())[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, t["gate_up"], answer())


def test_group_15_weights_shared_by_two_layers() -> None:
    """One set of experts used twice in a row: its gradient is the sum of both uses."""
    t = leaves(torch.float64)

    def twice(function: Any) -> Any:
        middle = function(t)
        return function(dict(t) | {"x": middle}, ids(8))

    got, want = grads(twice(layer), t, answer(dtype=torch.float64)), grads(twice(loop), t, answer(dtype=torch.float64))
    for name in LEAVES:
        assert torch.allclose(got[name], want[name], rtol=1e-10, atol=1e-12), name


def test_group_15_two_layers_of_different_sizes_in_turns() -> None:
    """Section 8, invariant 22: nothing of one layer's sizes stays behind for the next."""
    small, large = leaves(), leaves()
    large["gate_up"] = torch.randn(EXPERTS, 4 * HIDDEN, WIDTH, generator=torch.Generator().manual_seed(1))
    large["down"] = torch.randn(EXPERTS, WIDTH, 2 * HIDDEN, generator=torch.Generator().manual_seed(2))
    large["gate_up_bias"] = torch.zeros(EXPERTS, 4 * HIDDEN)
    for t in (small, large):
        for name in LEAVES:
            t[name] = t[name].detach().requires_grad_()
    want = [grads(layer(t), t, answer()) for t in (small, large)]
    outs = [layer(t) for t in (small, large, small, large)]
    for out, t, expected in zip(outs, (small, large) * 2, want * 2, strict=True):
        assert all(torch.equal(g, expected[name]) for name, g in grads(out, t, answer()).items())


@pytest.mark.parametrize("name", LEAVES)
def test_group_15_an_update_in_place_is_noticed(name: str) -> None:
    """A saved tensor that changed before the backward pass: autograd's error, not a wrong gradient."""
    t = leaves()
    out = layer(t)
    with torch.no_grad():
        t[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(answer())


def test_group_15_changed_ids_are_noticed() -> None:
    t, which = leaves(), ids()
    out = layer(t, which)
    which.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(answer())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_group_15_hooks_and_anomaly_mode() -> None:
    t, seen = leaves(), []
    t["gate_up"].register_hook(lambda gradient: seen.append(gradient.shape))
    with torch.autograd.set_detect_anomaly(True):
        layer(t).backward(answer())
    assert seen == [t["gate_up"].shape]


def test_what_is_saved_for_the_backward_pass() -> None:
    """Section 8, invariants 4 and 5: 2 T d + 4 T K n bytes in bfloat16 beside weights and integers, for (n, K) as for
    (n / 2, 2 K); and nothing that grows with T K d."""

    def saved(tokens: int, d: int, n: int, slots: int, experts: int = 8) -> tuple[int, int]:
        x = torch.randn(tokens, d).bfloat16().requires_grad_()
        up, down = (torch.randn(*s).bfloat16().requires_grad_() for s in ((experts, 2 * n, d), (experts, d, n)))
        which = torch.stack([torch.randperm(experts)[:slots] for _ in range(tokens)]).int()
        weights = torch.rand(tokens, slots).requires_grad_()
        floats, integers, parameters = {}, {}, {up.data_ptr(), down.data_ptr()}

        def pack(tensor: Any) -> Any:
            if tensor.data_ptr() not in parameters:
                kind = floats if tensor.dtype == torch.bfloat16 else integers
                kind[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = twt.moe.experts(x, which, weights, up, down)
        assert out.shape == x.shape
        return sum(floats.values()), sum(integers.values())

    for tokens, d, n, slots in ((64, 32, 16, 2), (100, 48, 24, 4), (33, 64, 8, 1), (256, 16, 40, 3)):
        floats, rest = saved(tokens, d, n, slots)
        assert floats == 2 * tokens * d + 4 * tokens * slots * n
        assert rest <= 16 * tokens * slots + 64
    assert saved(64, 32, 16, 2)[0] == saved(64, 32, 8, 4)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, but not from a filter that raises
def test_operators_are_what_torch_expects_of_them() -> None:
    """torch's own check of schema, fake kernel, autograd and tracing, static and dynamic."""
    t = leaves()
    arguments = (
        t["x"], ids(), t["weights"], None, t["gate_up"], t["down"], t["gate_up_bias"], t["down_bias"], "swiglu",
        "concatenated", 1.702, 7.0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tilewise.moe_experts.default, arguments)


def test_the_reference_agrees_with_the_loop_here() -> None:
    """Guards the comparisons above."""
    t = leaves(torch.float64)
    arrays = {name: tensor.detach().numpy() for name, tensor in t.items()}
    want = reference.moe.experts(arrays.pop("x"), ids().numpy(), arrays.pop("weights"), **arrays)
    assert np.allclose(loop(t).detach().numpy(), want, rtol=1e-12)
    assert issubclass(UnsupportedError, TilewiseError) and _core.num_threads() >= 1
