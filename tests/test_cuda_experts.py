"""The expert layer and its gradients: on the GPU, and the same kernels emulated on a CPU, against a float64 loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuda_emulator import DTYPES, Array, Place
from cuda_emulator.cases import Case, check, make, run, same_bits
from tilewise.cuda import moe
from tilewise.cuda.kernel import Kernel
from tilewise.cuda.launch import launch
from tilewise.cuda.moe import operators, products
from tilewise.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from tilewise.moe import ACTIVATIONS, ExpertGradients

LAYOUTS = ("concatenated", "interleaved")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (5, 40, 24, 3, 2),  # rows of whole chunks: the path of asynchronous copies
        (7, 37, 17, 3, 2),  # no row is aligned
        (150, 72, 136, 2, 2),  # several tiles of rows, of units, and a last one that is not full
        (4, 72, 8, 40, 3),  # most experts empty
        (3, 8, 129, 1, 3),  # every slot the same expert
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_layer_equals_the_loop(place: Place, dtype: str, shape: tuple[int, ...]) -> None:
    check(make(dtype, *shape), place)
    check(make(dtype, *shape, layout="interleaved", biases=False, activation="geglu_tanh"), place)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 136, 136, 3, 2), (140, 200, 264, 1, 1)])
def test_warpgroups_give_what_warps_give(
    place: Place, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of sm_90a (others ignore the wish), on products with more than 128 columns."""
    launched: list[str] = []

    def spy(kernel: Kernel, *rest: Any) -> None:
        launched.append(kernel.name)
        launch(kernel, *rest)

    monkeypatch.setattr(products, "launch", spy)
    for options in ({}, {"layout": "interleaved", "biases": False, "activation": "gelu"}):
        case = make(dtype, *shape, **options)
        expected = run(case, place)
        monkeypatch.setenv("TILEWISE_CUDA_WARPGROUPS", "1")
        launched.clear()
        out, pre, gradients = check(case, place)
        if place.name == "emulated":
            assert sum(name.endswith("_warpgroups") for name in launched) >= 5
            same_bits([pre], expected[1:2])  # here products add up in one order in both
        assert gradients.x.shape == expected[2].x.shape and out.shape == expected[0].shape
        monkeypatch.setenv("TILEWISE_CUDA_WARPGROUPS", "0")
    monkeypatch.setenv("TILEWISE_CUDA_WARPGROUPS", "yes")
    with pytest.raises(ArgumentError, match=r"TILEWISE_CUDA_WARPGROUPS must be 0 .* or 1, got 'yes'"):
        run(case, place)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations(place: Place, activation: str, layout: str, dtype: str) -> None:
    check(make(dtype, 6, 16, 24, 2, 2, activation=activation, layout=layout, alpha=1.3, limit=0.8), place)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_gates_stay_finite(place: Place, activation: str) -> None:
    """Gates of 0, of +-100 and of sizes whose squares overflow: no product of 0 and infinity on the way."""
    case = make("bfloat16", 6, 8, 8, 1, 1, activation=activation, biases=False)
    for size in (0.0, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30):
        case.x[:] = 0
        case.x[:, 0] = 1
        case.gate_up[:, :8, 0], case.gate_up[:, 8:, 0] = size, 0.5
        case.down[:] = 0.0
        case.expert_ids[:] = 0
        _, pre, gradients = run(case, place)
        assert np.isfinite(pre.astype(np.float32)).all()
        overflows = activation == "relu2" and abs(size) > 1e19
        assert overflows or all(np.isfinite(array.astype(np.float32)).all() for array in gradients if array is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_experts_and_sentinels_give_exact_zeros(place: Place, dtype: str) -> None:
    case = make(dtype, 6, 24, 16, 4, 3)
    case.expert_ids[:] = [[2, -1, 4]] * 5 + [[-7, 2**30, 4]]
    out, _, gradients = check(case, place)
    assert not out[5].any() and not gradients.x[5].any()
    for array in gradients[2:]:
        assert not array[[0, 1, 3]].any() and array[2].any()
    assert not gradients.weights[:, 1:].any()
    case.expert_ids[:] = -1
    out, pre, gradients = run(case, place)
    assert not any(array.any() for array in (out, pre, *gradients))


@pytest.mark.parametrize("empty", range(5))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_extents(place: Place, empty: int, dtype: str) -> None:
    shape = [0 if axis == empty else size for axis, size in enumerate((4, 24, 16, 3, 2))]
    case = make(dtype, *shape)
    out, _, gradients = run(case, place)
    assert out.shape == case.x.shape
    for name, array in zip(ExpertGradients._fields, gradients, strict=True):
        assert array.shape == getattr(case, "expert_ids" if name == "weights" else name).shape
    if empty in (1, 2):
        check(case, place)  # without units the biases still count
    else:
        assert not out.any() and not any(array.any() for array in gradients)


def pairs_of(case: Case) -> Case:
    """The same routing in the general spelling."""
    tokens, slots = case.expert_ids.shape
    token_ids = np.repeat(np.arange(tokens, dtype=np.int32), slots)
    return replace(case, expert_ids=case.expert_ids.reshape(-1), weights=case.weights.reshape(-1), token_ids=token_ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_slots(place: Place, dtype: str) -> None:
    case = make(dtype, 9, 40, 24, 3, 2)
    one, other = run(case, place), run(pairs_of(case), place)
    same_bits(one[:2], other[:2])
    same_bits(one[2], other[2]._replace(weights=other[2].weights.reshape(case.expert_ids.shape)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_pairs_a_token(place: Place, dtype: str) -> None:
    case = pairs_of(make(dtype, 6, 24, 16, 3, 4))
    case.token_ids = np.sort(np.random.default_rng(1).choice([0, 2, 2, 3, 5], size=24)).astype(np.int64)
    out, _, gradients = check(case, place)
    assert not out[[1, 4]].any() and not gradients.x[[1, 4]].any()
    assert np.unique(np.stack([case.token_ids, case.expert_ids]), axis=1).shape[1] < 24  # a pair stands twice


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_and_single_gradients_have_the_same_bits(place: Place, dtype: str) -> None:
    case = make(dtype, 7, 40, 24, 3, 2)
    out, pre, gradients = run(case, place)
    same_bits(run(case, place)[2], gradients)
    same_bits([place.get(moe.experts(**case.on(place)))], [out])
    for name, expected in zip(ExpertGradients._fields, gradients, strict=True):
        alone = moe.experts_backward(place.put(case.grad), place.put(pre.copy()), **case.on(place), wanted=(name,))
        assert [key for key, array in alone._asdict().items() if array is not None] == [name]
        same_bits([place.get(getattr(alone, name))], [expected])
    nothing = moe.experts_backward(place.put(case.grad), place.put(pre.copy()), **case.on(place), wanted=())
    assert nothing == ExpertGradients(*[None] * 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree_bit_for_bit(place: Place, dtype: str) -> None:
    case = make(dtype, 5, 24, 24, 2, 2)
    order = np.arange(48).reshape(2, 24).T.reshape(-1)  # gate 0, up 0, gate 1, ...
    other = replace(
        case,
        gate_up=np.ascontiguousarray(case.gate_up[:, order]),
        gate_up_bias=np.ascontiguousarray(case.gate_up_bias[:, order]),
        options=case.options | {"layout": "interleaved"},
    )
    one, two = run(case, place), run(other, place)
    same_bits(one[:2], two[:2])
    relaid = one[2]._replace(gate_up=one[2].gate_up[:, order], gate_up_bias=one[2].gate_up_bias[:, order])
    same_bits(relaid, two[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_in_memory_does_not_change_the_bits(place: Place, dtype: str) -> None:
    """Rows apart, rows that start anywhere, columns apart, one row for all: both paths of the copies agree."""
    case = make(dtype, 6, 40, 24, 3, 2)
    case.grad[:] = case.grad[0]
    expected = run(case, place)
    arguments = case.on(place)

    def shifted(array: np.ndarray, by: int) -> Any:
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 16), array.dtype)
        wide[..., by : by + array.shape[-1]] = array
        return place.put(wide)[..., by : by + array.shape[-1]]

    def turned(array: np.ndarray) -> Any:
        return place.put(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)

    for change in (lambda a: shifted(a, 8), lambda a: shifted(a, 1), turned):
        changed = arguments | {name: change(getattr(case, name)) for name in ("x", "gate_up", "down")}
        out, pre = moe.experts_forward(**changed)
        same_bits([place.get(out), place.get(pre)], expected[:2])
        gradients = moe.experts_backward(change(case.grad), pre, **changed)
        same_bits([place.get(array) for array in gradients], expected[2])
    row = place.put(case.grad)[:1]
    expanded = row.expand(6, 40) if hasattr(row, "expand") else np.broadcast_to(row, (6, 40), subok=True)
    if place.name != "cupy":  # CuPy has its own broadcast_to; the strides are the same
        gradients = moe.experts_backward(expanded, place.put(expected[1].copy()), **arguments)
        same_bits([place.get(array) for array in gradients], expected[2])


def test_powers_of_two_pass_through(place: Place) -> None:
    case = make("bfloat16", 5, 24, 16, 2, 2)
    twice = replace(case, grad=(case.grad.astype(np.float32) * 2).astype(case.grad.dtype))
    one, two = run(case, place)[2], run(twice, place)[2]
    same_bits([(array.astype(np.float32) * 2).astype(array.dtype) for array in one], two)


def test_a_corrupted_stripe_is_noticed(place: Place) -> None:
    case = make("bfloat16", 20, 64, 32, 2, 2)
    damaged = replace(case, gate_up=case.gate_up.copy())
    damaged.gate_up[:, 16:32] = 0
    out = run(damaged, place)[0]

    def get(array: Any) -> np.ndarray:
        host = place.get(array)
        return out if host.shape == out.shape else host

    with pytest.raises(AssertionError, match="out: frobenius error"):
        check(case, replace(place, get=get))


def test_offsets_past_two_to_the_31_elements(emulated: Place) -> None:
    """Rows and experts that lie 2^31 elements apart, in address space of which a few pages are touched."""
    case = make("float16", 3, 16, 8, 2, 2)
    far = 2**31 + 64
    try:
        space = np.zeros(3 * far, np.float16)
    except MemoryError:
        pytest.skip("no address space")

    def spread(array: np.ndarray) -> Any:
        rows = array.reshape(len(array), -1)
        for index, row in enumerate(rows):
            space[index * far : index * far + row.size] = row
        strides = (2 * far, *(2 * step // array.itemsize for step in array.strides[1:]))
        return np.lib.stride_tricks.as_strided(space, array.shape, strides).view(Array)

    expected = run(case, emulated)
    for name in ("x", "gate_up", "down"):
        arguments = case.on(emulated) | {name: spread(getattr(case, name))}
        out, pre = moe.experts_forward(**arguments)
        same_bits([out, pre], expected[:2])
        same_bits(moe.experts_backward(emulated.put(case.grad), pre, **arguments), expected[2])


def test_a_foreign_array_crosses_by_dlpack(emulated: Place) -> None:
    class Foreign:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("the stand-in for CuPy takes the inner array")

    case = make("float32", 4, 8, 8, 2, 2)
    arguments = case.on(emulated)
    foreign = {name: value if isinstance(value, str) else Foreign(value) for name, value in arguments.items()}
    same_bits([moe.experts(**foreign)], [moe.experts(**arguments)])


def test_operators_have_the_arguments_of_torchs(place: Place) -> None:
    """What tilewise.torch registers for CUDA tensors: the schema's order, and empty arrays for what is not there."""
    case = make("bfloat16", 5, 24, 16, 3, 2)
    out, pre, gradients = run(case, place)
    on = case.on(place)
    routed = [on["x"], on["expert_ids"], on["weights"], None]
    rest = [on[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias", "activation", "layout")]
    arguments = [*routed, *rest, 1.702, 7.0]
    same_bits([place.get(array) for array in operators.experts(*arguments, True)], [out, pre])
    inferred, nothing = operators.experts(*arguments, False)
    same_bits([place.get(inferred)], [out])
    assert tuple(nothing.shape) == (0,)
    wanted = [True, False, True, False, True, False]
    got = operators.experts_backward(place.put(case.grad), place.put(pre), *arguments, wanted)
    for want, array, expected in zip(wanted, got, gradients, strict=True):
        assert tuple(array.shape) == (expected.shape if want else (0,))
        if want:
            same_bits([place.get(array)], [expected])
    logits = place.put(np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32))
    ids, weights = operators.route(logits, 2, "sigmoid", None, True, 2.0, 1, 1)
    one = moe.route(logits, 2, scoring="sigmoid", renormalise=True, scale=2.0)
    same_bits([place.get(ids), place.get(weights)], [place.get(array) for array in one])
    gradient = operators.route_backward(weights, logits, ids, "sigmoid", True, 2.0)
    assert tuple(gradient.shape) == (5, 8)
    ids, _ = operators.route(logits, 2, "sigmoid", None, True, 2.0, 4, 1)
    same_bits([place.get(ids)], [place.get(moe.route(logits, 2, scoring="sigmoid", groups=4, top_groups=1)[0])])


def test_refusals(place: Place) -> None:
    arguments = make("float32", 4, 8, 6, 3, 2).on(place)
    out, pre = moe.experts_forward(**arguments)

    def refuse(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            moe.experts(**{**arguments, **changes})

    def zeros(*shape: int, dtype: Any = np.float32) -> Any:
        return place.put(np.zeros(shape, dtype))

    refuse(ArgumentError, "activation: expected one of swiglu, geglu.*got 'tanh'", activation="tanh")
    refuse(ArgumentError, "layout: expected one of concatenated or interleaved, got 'rows'", layout="rows")
    refuse(ShapeError, r"x: expected rank 2 \[tokens, d\], got shape \(4,\)", x=zeros(4))
    refuse(ShapeError, r"expert_ids: expected \[4, slots\]", expert_ids=zeros(3, 2, dtype=np.int32))
    refuse(ShapeError, r"weights: expected \[4, 2\], as expert_ids, got shape \(4, 3\)", weights=zeros(4, 3))
    refuse(ShapeError, r"gate_up: expected \[experts, features, 8\]", gate_up=zeros(3, 12, 7))
    refuse(ShapeError, "gate_up: expected an even number of features", gate_up=zeros(3, 11, 8))
    refuse(ShapeError, r"down: expected .* = \[3, 8, 6\], got shape \(3, 6, 8\)", down=zeros(3, 6, 8))
    refuse(ShapeError, r"gate_up_bias: expected \[3, 12\]", gate_up_bias=zeros(3, 6))
    refuse(ShapeError, r"down_bias: expected \[3, 8\]", down_bias=zeros(8))
    refuse(ShapeError, r"token_ids: expected \[pairs\] beside expert_ids", token_ids=zeros(8, dtype=np.int32))
    refuse(DtypeError, "x: .*got float64", x=zeros(4, 8, dtype=np.float64))
    refuse(DtypeError, "down: expected dtype float32, as x, got float16", down=zeros(3, 8, 6, dtype=np.float16))
    refuse(DtypeError, "expert_ids: expected dtype int32, int64, got float32", expert_ids=zeros(4, 2))
    refuse(DtypeError, "weights: .*got int32", weights=zeros(4, 2, dtype=np.int32))
    refuse(DeviceError, "x: expected a CuPy array", x=np.zeros((4, 8), np.float32))
    for changes, error, match in (
        ({"wanted": ("x", "score")}, ArgumentError, "wanted: expected names among x, weights.*got 'score'"),
        ({"pre_activation": zeros(8, 6)}, ShapeError, r"pre_activation: expected .* = \[8, 12\], got shape \(8, 6\)"),
        ({"grad": zeros(4, 7)}, ShapeError, r"grad: expected \[4, 8\], as x, got shape \(4, 7\)"),
        ({"grad": zeros(4, 8, dtype=np.float16)}, DtypeError, "grad: expected dtype float32, as x, got float16"),
    ):
        with pytest.raises(error, match=match):
            moe.experts_backward(**{"grad": out, "pre_activation": pre, **arguments, **changes})
