"""Routers on the GPU, and the same kernels emulated on a CPU, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_emulator import DTYPES, EPSILON, Place
from tilewise.cuda import moe
from tilewise.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from tilewise.reference import moe as reference


def check_route(place: Place, logits: np.ndarray, top_k: int, bias: np.ndarray | None = None, **options: Any) -> None:
    got = moe.route(place.put(logits), top_k, bias=None if bias is None else place.put(bias), **options)
    ids, weights = (place.get(array) for array in got)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    wide = np.asarray(logits, np.float64)
    expected_ids, expected = reference.route(wide, top_k, bias=bias, **options)
    if bias is None:
        np.testing.assert_array_equal(ids, expected_ids)
    else:
        expected = check_biased(wide, ids, bias, options)
    # A softmax in plain float32 loses a rounding of |logit - top| in its argument, and a few in exp, sum and division.
    budget = (8 + 2 * np.ptp(wide)) * 2.0**-24
    np.testing.assert_array_less(np.abs(weights - expected), budget * np.abs(expected) + 1e-30)


def check_biased(wide: np.ndarray, ids: np.ndarray, bias: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Choices are compared in float32, so two within its rounding may swap. Returns the weights of those taken."""
    scores = 1 / (1 + np.exp(-wide))
    choice, index = scores + bias, ids.astype(np.int64)
    slack = 8 * 2.0**-24 * np.abs(choice).max()
    taken = np.take_along_axis(choice, index, axis=1)
    rest = choice.copy()
    np.put_along_axis(rest, index, -np.inf, axis=1)
    assert (np.diff(taken, axis=1) <= slack).all()
    assert (rest.max(axis=1) <= taken[:, -1] + slack).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    weights = np.take_along_axis(scores, index, axis=1)
    if options.get("renormalise"):
        weights /= weights.sum(axis=1, keepdims=True)
    return weights * options.get("scale", 1.0)


@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (33, 7), (64, 8), (257, 8), (600, 33), (1500, 64)])
def test_route(place: Place, scoring: str, experts: int, top_k: int) -> None:
    generator = np.random.default_rng(experts)
    logits = generator.normal(scale=3.0, size=(5, experts)).astype(np.float32)
    check_route(place, logits, top_k, scoring=scoring)
    check_route(place, logits, top_k, scoring=scoring, renormalise=True, scale=2.5)
    if scoring == "sigmoid":
        bias = generator.normal(scale=0.3, size=experts).astype(np.float32)
        check_route(place, logits, top_k, bias, scoring=scoring)
        check_route(place, logits, top_k, bias, scoring=scoring, renormalise=True, scale=2.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_route_of_narrow_types_with_their_many_ties(place: Place, dtype: str) -> None:
    logits = np.random.default_rng(0).normal(size=(9, 320)).astype(DTYPES[dtype])
    assert len(np.unique(logits[0])) < 320  # ties are there, and the reference breaks them to the lower expert
    check_route(place, logits, 16)
    check_route(place, logits, 16, scoring="softmax")


def test_route_largest(place: Place) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    check_route(place, logits, 64, scoring="softmax")


def test_route_keeps_every_bit_of_a_logit(place: Place) -> None:
    row = np.nextafter(np.float32(1.5), np.float32(2), dtype=np.float32) * np.ones(512, np.float32)
    row[300] = np.nextafter(row[300], np.float32(2))
    row[400] = np.float32(1.5)
    ids, _ = moe.route(place.put(row[None]), 3)
    assert place.get(ids).tolist() == [[300, 0, 1]]


def test_route_ties_zeros_infinities_and_nan(place: Place) -> None:
    nan, infinity = np.nan, np.inf
    negative_nan = np.copysign(np.float32(nan), np.float32(-1))
    logits = np.array(
        [
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-0.0, 0.0, -0.0, 0.0, -1.0, -0.0],
            [nan, -infinity, negative_nan, -1e38, nan, -infinity],
            [nan, nan, nan, negative_nan, nan, nan],
            [1.0, -infinity, 2.0, -infinity, -infinity, -infinity],
            [1e-45, 0.0, 3e-45, -1e-45, 1e-45, 0.0],
            [-infinity] * 6,
            [3.0, infinity, infinity, 0.0, 1.0, 2.0],
        ],
        np.float32,
    )
    ids, weights = (place.get(array) for array in moe.route(place.put(logits), 4))
    assert ids.tolist() == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [3, 1, 5, 0],
        [0, 1, 2, 3],
        [2, 0, 1, 3],
        [2, 0, 4, 1],
        [0, 1, 2, 3],
        [1, 2, 0, 5],
    ]
    np.testing.assert_array_equal(weights[[0, 1, 5, 6]], 0.25)
    assert np.isnan(weights[2:4]).all()
    np.testing.assert_allclose(weights[4], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(weights[7], [0.5, 0.5, 0, 0])
    # A NaN that no formula reads harms nothing: one sigmoid knows only its own logit, a softmax knows the row.
    _, weights = moe.route(place.put(logits), 1, scoring="sigmoid")
    assert np.isnan(place.get(weights)).ravel().tolist() == [row == 3 for row in range(8)]
    _, weights = moe.route(place.put(logits), 1, scoring="softmax")
    assert np.isnan(place.get(weights)).ravel().tolist() == [row in (2, 3) for row in range(8)]
    _, weights = moe.route(place.put(logits[6:7]), 3, scoring="sigmoid", renormalise=True)
    np.testing.assert_array_equal(place.get(weights), 0.0)  # as on the CPU: nothing to renormalise


def test_route_survives_underflow_and_saturation(place: Place) -> None:
    logits = np.array([[-200.0, -201.0, -300.0], [1e4, 1e4 - 1, -1e4]], np.float32)
    for scoring in ("sigmoid", "softmax"):
        check_route(place, logits, 2, scoring=scoring, renormalise=True)
    ids, _ = moe.route(place.put(np.array([[50.0, 60.0, 120.0]], np.float32)), 3, scoring="sigmoid")
    assert place.get(ids).tolist() == [[2, 1, 0]]  # all three round to 1 and still do not tie


def test_route_takes_any_rows(place: Place) -> None:
    wide = np.random.default_rng(3).normal(size=(7, 200)).astype(np.float32)
    expected = [place.get(array) for array in moe.route(place.put(wide[:, 20:80].copy()), 5)]
    whole = place.put(wide)
    for view in (whole[:, 20:80], whole.T[20:80].T):
        for got, want in zip(moe.route(view, 5), expected, strict=True):
            np.testing.assert_array_equal(place.get(got), want)
    transposed = place.put(np.ascontiguousarray(wide[:, 20:80].T)).T  # columns are far apart: copied once
    for got, want in zip(moe.route(transposed, 5), expected, strict=True):
        np.testing.assert_array_equal(place.get(got), want)


def test_route_of_nothing(place: Place) -> None:
    ids, weights = moe.route(place.put(np.zeros((0, 8), np.float32)), 2)
    assert tuple(ids.shape) == tuple(weights.shape) == (0, 2)


def test_route_refuses(place: Place) -> None:
    logits = place.put(np.zeros((4, 8), np.float32))
    with pytest.raises(ArgumentError, match=r"scoring: expected one of softmax_topk, softmax.*got 'max'"):
        moe.route(logits, 2, scoring="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match=r"top_k: expected 1..=8 \(the number of experts\), got 9"):
        moe.route(logits, 9)
    with pytest.raises(ArgumentError, match=r"got 0"):
        moe.route(logits, 0)
    with pytest.raises(ShapeError, match=r"logits: expected rank 2 \[tokens, experts\], got shape \(8,\)"):
        moe.route(logits[0], 2)
    with pytest.raises(ShapeError, match=r"bias: expected \[experts\] = \[8\], got shape \(7,\)"):
        moe.route(logits, 2, scoring="sigmoid", bias=place.put(np.zeros(7, np.float32)))
    with pytest.raises(ArgumentError, match="bias: expected a selection bias with scoring 'sigmoid' only"):
        moe.route(logits, 2, bias=place.put(np.zeros(8, np.float32)))
    with pytest.raises(DtypeError, match="float32, float16, bfloat16, got int32"):
        moe.route(place.put(np.zeros((4, 8), np.int32)), 2)
    with pytest.raises(UnsupportedError, match="at most 4096 experts and top_k 64, got 4097"):
        moe.route(place.put(np.zeros((1, 4097), np.float32)), 2)
    with pytest.raises(UnsupportedError, match="got 100 and 65"):
        moe.route(place.put(np.zeros((1, 100), np.float32)), 65)


def grouped_truth(wide: np.ndarray, top_k: int, groups: int, top_groups: int, bias: np.ndarray | None) -> np.ndarray:
    """The ids of group-limited routing, by sorting; ties to the lower group and the lower expert."""
    choice = 1 / (1 + np.exp(-wide)) + (0 if bias is None else bias)
    size = wide.shape[1] // groups
    ids = []
    for row in choice:
        best = [np.sort(row[group * size : (group + 1) * size])[-2:].sum() for group in range(groups)]
        opened = np.argsort(-np.array(best), kind="stable")[:top_groups]
        closed = ~np.isin(np.arange(len(row)) // size, opened)
        ids.append(np.lexsort((-row, closed))[:top_k])
    return np.array(ids)


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k"),
    [(8, 4, 2, 3), (256, 8, 4, 8), (160, 32, 3, 15), (6, 6, 2, 2), (64, 64, 64, 5), (96, 3, 1, 32)],
)
def test_route_among_open_groups(place: Place, experts: int, groups: int, top_groups: int, top_k: int) -> None:
    generator = np.random.default_rng(experts)
    logits = generator.normal(size=(9, experts)).astype(np.float32)
    for bias in (None, generator.normal(scale=0.3, size=experts).astype(np.float32)):
        given = None if bias is None else place.put(bias)
        options = {"scoring": "sigmoid", "groups": groups, "top_groups": top_groups, "bias": given}
        ids, weights = (place.get(array) for array in moe.route(place.put(logits), top_k, **options))
        expected = grouped_truth(logits.astype(np.float64), top_k, groups, top_groups, bias)
        np.testing.assert_array_equal(ids, expected)
        chosen = np.take_along_axis(logits.astype(np.float64), expected, axis=1)
        np.testing.assert_allclose(weights, 1 / (1 + np.exp(-chosen)), rtol=1e-6)


def test_ties_of_groups_go_to_the_lower(place: Place) -> None:
    ids, _ = moe.route(place.put(np.zeros((2, 12), np.float32)), 4, scoring="sigmoid", groups=4, top_groups=2)
    assert place.get(ids).tolist() == [[0, 1, 2, 3]] * 2
    row = np.array([[5.0, -9.0, 1.0, 1.0, 5.0, -9.0]], np.float32)  # two largest of a group, not its largest
    ids, _ = moe.route(place.put(row), 2, scoring="sigmoid", groups=3, top_groups=1)
    assert place.get(ids).tolist() == [[2, 3]]


def test_groups_that_do_not_fit_are_refused(place: Place) -> None:
    logits = place.put(np.zeros((2, 96), np.float32))
    with pytest.raises(ArgumentError, match="groups: expected them with scoring 'sigmoid' only, got 2 with"):
        moe.route(logits, 2, groups=2)
    with pytest.raises(ArgumentError, match="groups: expected a divisor of the number of experts, 96, got 5"):
        moe.route(logits, 2, scoring="sigmoid", groups=5)
    with pytest.raises(ArgumentError, match=r"top_groups: expected 1..=4 groups .* top_k = 30 experts, got 1"):
        moe.route(logits, 30, scoring="sigmoid", groups=4, top_groups=1)
    with pytest.raises(UnsupportedError, match="closes some of at most 32 groups, got 48"):
        moe.route(logits, 2, scoring="sigmoid", groups=48, top_groups=4)


# --- the router's gradient --------------------------------------------------------------------------------------


def route_truth(logits: np.ndarray, ids: np.ndarray, grad: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Differentiated by torch, from the formula of the weights."""
    torch = pytest.importorskip("torch")
    z = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    index = torch.from_numpy(ids.astype(np.int64))
    scoring = options["scoring"]
    if scoring == "softmax_topk":
        weights = torch.softmax(z.gather(1, index), -1)
    else:
        weights = (torch.sigmoid(z) if scoring == "sigmoid" else torch.softmax(z, -1)).gather(1, index)
    if options.get("renormalise") or scoring == "softmax_renormalised":
        weights = weights / weights.sum(-1, keepdim=True)
    (weights * options.get("scale", 1.0)).backward(torch.from_numpy(grad.astype(np.float64)))
    return z.grad.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (33, 7), (600, 40)])
def test_route_gradient(place: Place, dtype: str, scoring: str, experts: int, top_k: int) -> None:
    generator = np.random.default_rng(experts)
    logits = generator.normal(scale=2.0, size=(6, experts)).astype(DTYPES[dtype])
    grad = generator.normal(size=(6, top_k)).astype(np.float32)
    for options in ({"scoring": scoring}, {"scoring": scoring, "renormalise": True, "scale": 2.5}):
        ids, _ = moe.route(place.put(logits), top_k, **options)
        got = place.get(moe.route_backward(place.put(grad), place.put(logits), ids, **options))
        assert got.dtype == logits.dtype
        want = route_truth(logits, place.get(ids), grad, options)
        # Roundings of the parts of S (g - mean), which may cancel, and one of the result.
        slack = 2.0**-18 * np.abs(grad).max() * options.get("scale", 1.0) + EPSILON[dtype] * np.abs(want)
        np.testing.assert_array_less(np.abs(got.astype(np.float64) - want), slack)
        if scoring != "softmax" or "renormalise" in options:
            untouched = np.ones(want.shape, bool)
            np.put_along_axis(untouched, place.get(ids).astype(np.int64), False, axis=1)
            assert not got[untouched].any()


def test_route_gradient_where_everything_underflows(place: Place) -> None:
    logits = np.array([[-200.0, -201.0, -300.0], [-np.inf, -np.inf, -np.inf]], np.float32)
    ids, grad = place.put(np.array([[0, 1], [0, 5]], np.int32)), place.put(np.array([[1, 0], [1, 1]], np.float32))
    got = place.get(moe.route_backward(grad, place.put(logits), ids, scoring="sigmoid", renormalise=True))
    share = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(got[0], [share * (1 - share), -share * (1 - share), 0], rtol=1e-5)
    np.testing.assert_array_equal(got[1], 0)


def test_route_gradient_refuses(place: Place) -> None:
    logits, ids = place.put(np.zeros((4, 8), np.float32)), place.put(np.zeros((4, 2), np.int32))
    grad = place.put(np.zeros((4, 2), np.float32))
    with pytest.raises(ArgumentError, match="scoring: expected one of"):
        moe.route_backward(grad, logits, ids, scoring="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match=r"grad: expected \[4, 2\], as expert_ids, got shape \(3, 2\)"):
        moe.route_backward(grad[:3], logits, ids)
    with pytest.raises(ShapeError, match=r"got shapes \(4, 8\) and \(3, 2\)"):
        moe.route_backward(grad, logits, ids[:3])
    with pytest.raises(DtypeError, match="expert_ids: expected dtype int32"):
        moe.route_backward(grad, logits, place.put(np.zeros((4, 2), np.int64)))


def test_arrays_on_the_cpu_are_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(DeviceError, match=r"logits: expected a CuPy array or a torch CUDA tensor, got numpy.ndarray"):
        moe.route(np.zeros((4, 8), np.float32), 2)
    with pytest.raises(DeviceError, match="y: expected a tensor on a CUDA device, got one on cpu"):
        moe.aggregate(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32))
