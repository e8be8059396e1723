"""Tracing: a mod's program computes what the function does; what has no program is refused by its text."""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewise import expr
from tilewise.errors import ArgumentError, DtypeError, TilewiseError, UnsupportedError
from tilewise.expr import Mod

_spec = importlib.util.spec_from_file_location("programs", Path(__file__).parent / "programs.py")
assert _spec is not None and _spec.loader is not None
programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(programs)
dense, grid = programs.dense, programs.grid

RANDOM = np.random.default_rng(4)
EXTENTS = (2, 3, 5, 7)
SCORE = RANDOM.normal(size=EXTENTS) * 3
SLOPES = RANDOM.normal(size=3).astype(np.float32)
TABLE = RANDOM.normal(size=(2, 3, 13)).astype(np.float32)
DOCUMENT = np.array([0, 0, 1, 1, 1, 2, 2], np.int32)
slopes, table, document = (
    expr.array(x, name) for x, name in ((SLOPES, "slopes"), (TABLE, "table"), (DOCUMENT, "document"))
)

# One function for every front: symbols, NumPy arrays and torch tensors.
NEUTRAL_SCORES: dict[str, Any] = {
    "identity": lambda s, b, h, q, k: s,
    "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
    "softcap": lambda s, b, h, q, k: 5 * expr.tanh(s / 5),
    "where": lambda s, b, h, q, k: expr.where(q >= k, s, -math.inf),
    "relative": lambda s, b, h, q, k: s + table[b, h, k - q + 5],
    "negative index": lambda s, b, h, q, k: s + table[b, h, -1 - k],
    "nested gather": lambda s, b, h, q, k: s * slopes[document[k]],
    "division": lambda s, b, h, q, k: s + (q - k) / 3 + (q - k) // 3 + (q - k) % 3,
    "float division": lambda s, b, h, q, k: s // 0.7 + s % 0.7,
    "powers": lambda s, b, h, q, k: s**2 + s**3 - s**0 + expr.power(expr.abs(s), 1.5) + (q - k) ** 2 + 2.0**s,
    "casts": lambda s, b, h, q, k: s + expr.to_int(s) + expr.to_float(q > k) + expr.to_int(q > k),
    "rounding": lambda s, b, h, q, k: expr.round(s) + expr.floor(s) + expr.ceil(s) + expr.trunc(s),
    "smooth": lambda s, b, h, q, k: expr.exp(-expr.square(s)) + expr.sigmoid(s) + expr.erf(s) + expr.expm1(s / 9),
    "logs": lambda s, b, h, q, k: (
        expr.log1p(expr.abs(s)) + expr.log(1 + s * s) + expr.log2(2 + expr.abs(s)) + expr.exp2(s / 4)
    ),
    "angles": lambda s, b, h, q, k: expr.sin(s) + expr.cos(s) + expr.tan(s / 9) + expr.atan2(s, expr.to_float(q + 1)),
    "roots": lambda s, b, h, q, k: expr.sqrt(expr.abs(s)) + expr.rsqrt(1 + s * s) + expr.reciprocal(2 + expr.abs(s)),
    "extremes": lambda s, b, h, q, k: expr.minimum(s, 1) + expr.maximum(s, q - k) + expr.clip(s, -1, 1) + expr.relu(s),
    "signs": lambda s, b, h, q, k: expr.sign(s) * abs(s) + expr.sign(q - k) - (-s),
    "nan": lambda s, b, h, q, k: expr.where(expr.isnan(s) | expr.isinf(s), 0.0, s),
    "constant": lambda s, b, h, q, k: 1.5 + 0 * s,
    "reversed": lambda s, b, h, q, k: 1 - s + 2 / (s * s + 1) + 7 // (k + 1) + 7 % (k + 1),
}
NEUTRAL_MASKS: dict[str, Any] = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k <= 2),
    "document": lambda b, h, q, k: document[q] == document[k],
    "logic": lambda b, h, q, k: ((q < k) | ~(h == 1)) ^ (b != 0),
    "bits": lambda b, h, q, k: ((q ^ k) & 1) == ((q >> 1) | (k << 1)) % 2,
    "logical functions": lambda b, h, q, k: expr.logical_and(q > 1, expr.logical_not(expr.logical_xor(k > 2, h > 0))),
    "or": lambda b, h, q, k: expr.logical_or(q > 3, k == 0),
    "chosen": lambda b, h, q, k: expr.where(h == 0, q >= k, q <= k),
}
CASES = [*NEUTRAL_SCORES.items(), *NEUTRAL_MASKS.items()]


def direct(function: Any) -> np.ndarray:
    """The function on NumPy arrays."""
    score = [SCORE] if expr.trace(function).kind == "score" else []
    with np.errstate(all="ignore"):
        return np.broadcast_to(function(*score, *grid(*EXTENTS).values()), EXTENTS)


@pytest.mark.parametrize(("name", "function"), CASES, ids=[name for name, _ in CASES])
def test_the_program_computes_what_the_function_does(name: str, function: Any) -> None:
    mod = expr.trace(function)
    np.testing.assert_allclose(dense(mod, EXTENTS, SCORE), direct(function), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "function"), CASES, ids=[name for name, _ in CASES])
def test_the_torch_tracer_agrees(name: str, function: Any) -> None:
    pytest.importorskip("torch")
    from tilewise.torch.expr import trace

    mod = trace(function)
    assert mod.kind == expr.trace(function).kind
    np.testing.assert_allclose(dense(mod, EXTENTS, SCORE), direct(function), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "function"), CASES, ids=[name for name, _ in CASES])
def test_a_mod_is_a_function(name: str, function: Any) -> None:
    """Called with arrays it computes; traced again it gives the same program."""
    mod = expr.trace(function)
    assert expr.trace(mod) is mod
    again = expr.trace(lambda *arguments: mod(*arguments), kind=mod.kind)
    assert again.program == mod.program
    score = [SCORE] if mod.kind == "score" else []
    with np.errstate(all="ignore"):
        found = np.broadcast_to(mod(*score, *grid(*EXTENTS).values()), EXTENTS)
    np.testing.assert_allclose(found, direct(function), rtol=1e-6, atol=1e-6)


def test_numpy_functions_take_symbols() -> None:
    a = expr.trace(lambda s, b, h, q, k: np.where(q > k, np.tanh(s), np.float32(2) * s) + np.clip(s, -1, 1))
    b = expr.trace(lambda s, b, h, q, k: expr.where(q > k, expr.tanh(s), 2.0 * s) + expr.clip(s, -1, 1))
    assert a.program == b.program
    mask = expr.trace(lambda b, h, q, k: np.logical_and(np.greater_equal(q, k), np.int64(3) > q - k))
    assert np.array_equal(
        dense(mask, EXTENTS), np.broadcast_to([[i >= j and i - j < 3 for j in range(7)] for i in range(5)], EXTENTS)
    )


def test_captures_are_kept_and_shared() -> None:
    mod = expr.trace(lambda s, b, h, q, k: s + slopes[h] + slopes[q % 3] + table[b, h, k])
    assert mod.captures[0] is SLOPES and mod.captures[1] is TABLE and len(mod.captures) == 2
    assert mod.names == ("slopes", "table")
    assert mod.program.startswith("tilewise-expr 1 score\ncapture float 1\ncapture float 3\n")


def test_equal_subexpressions_share_a_line() -> None:
    mod = expr.trace(lambda s, b, h, q, k: expr.exp(s * 2) + expr.exp(s * 2))
    assert mod.program.count("exp") == 2  # the header has one
    deep = expr.trace(lambda s, b, h, q, k: functools.reduce(lambda x, _: x + x, range(200), s))
    assert len(deep.program.splitlines()) == 203
    assert len(str(deep)) < 1000  # and not 2^200


def test_kinds_follow_from_the_parameters() -> None:
    assert expr.trace(lambda s, b, h, q, k, scale=2.0: s * scale).kind == "score"
    assert expr.trace(lambda b, h, q, k, width=2: q - k < width).kind == "mask"
    assert expr.trace(functools.partial(lambda w, b, h, q, k: q - k < w, 3)).kind == "mask"
    assert expr.trace(lambda *a: a[2] >= a[3], kind="mask").kind == "mask"
    assert expr.trace(lambda b, h, q, k: True).program == "tilewise-expr 1 mask\nbool 1\nreturn 0\n"

    class Callable:
        def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return q >= k

    assert expr.trace(Callable()).kind == "mask"


RAW = np.ones((3, 4), np.float32)
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("if", lambda s, b, h, q, k: s if q > k else 0.0, UnsupportedError, r"`q > k` is not known .* where\("),
    ("and", lambda b, h, q, k: q > k and h == 0, UnsupportedError, "Write & for `and`"),
    ("chain", lambda b, h, q, k: 0 < q < k, UnsupportedError, r"\(a < b\) & \(b < c\)"),
    ("max", lambda b, h, q, k: max(q, k) > 1, UnsupportedError, "`k > q`"),
    ("an array not wrapped", lambda b, h, q, k: RAW[h, q] > 0, UnsupportedError, r"tilewise\.expr\.array\(x\)"),
    ("an array as a whole", lambda b, h, q, k: q < RAW, UnsupportedError, r"an array \[3, 4\] .* index it"),
    ("a wrapped array as a whole", lambda s, b, h, q, k: s + table, UnsupportedError, "index it"),
    ("too few indices", lambda b, h, q, k: table[b, h] > 0, ArgumentError, r"table\[b, h\]: .* 3 axes \[2, 3, 13\]"),
    ("too many indices", lambda b, h, q, k: slopes[b, h] > 0, ArgumentError, "1 axes"),
    ("a slice", lambda b, h, q, k: table[b, h, 1:] > 0, UnsupportedError, "axis 2 is indexed by slice"),
    ("a constant outside", lambda b, h, q, k: table[b, h, 13] > 0, ArgumentError, "index 13 is outside axis 2 of 13"),
    ("a float index", lambda b, h, q, k: slopes[q / 2] > 0, UnsupportedError, r"indexed by float\(q\) / 2\.0"),
    ("a bool index", lambda b, h, q, k: slopes[q > k] > 0, UnsupportedError, "indexed by q > k, which is a bool"),
    ("float bits", lambda s, b, h, q, k: s & 1, UnsupportedError, "`?&`? takes bools and integers, and score"),
    ("shifted floats", lambda s, b, h, q, k: s << 1, UnsupportedError, "shift"),
    ("a number as a mask", lambda b, h, q, k: q - k, UnsupportedError, "returns the int `q - k`; compare it"),
    ("a bool as a score", lambda s, b, h, q, k: q > k, UnsupportedError, "a mask_mod without the score"),
    ("text", lambda b, h, q, k: "yes", UnsupportedError, "returned str"),
    ("nothing", lambda b, h, q, k: None, UnsupportedError, "returned NoneType"),
    ("math", lambda s, b, h, q, k: math.exp(s), UnsupportedError, "`score` has no float value"),
    ("range", lambda b, h, q, k: range(q), UnsupportedError, "`q` has no value to index or to count with"),
    ("iteration", lambda b, h, q, k: list(q), UnsupportedError, "cannot be iterated"),
    ("int power", lambda b, h, q, k: 2**k > q, UnsupportedError, "1 << n"),
    ("integer division by 0", lambda b, h, q, k: q // 0 > k, ArgumentError, "divided by the integer 0"),
    ("a large integer", lambda b, h, q, k: q > 2**70, ArgumentError, "does not fit 64 bits"),
    ("a number as a condition", lambda s, b, h, q, k: expr.where(q, s, 0.0), UnsupportedError, "q != 0"),
    ("an unknown function", lambda s, b, h, q, k: np.arctanh(s), UnsupportedError, r"np\.arctanh\(score\) has no"),
    ("a reduction", lambda s, b, h, q, k: np.add.reduce(s), UnsupportedError, r"np\.add\.reduce"),
    ("an array function", lambda s, b, h, q, k: np.concatenate([s, s]), UnsupportedError, "np.concatenate of symbols"),
    ("three parameters", lambda b, h, q: q > 0, ArgumentError, "takes 3 positional arguments"),
    ("any parameters", lambda *a: a[0], ArgumentError, "say kind='score'"),
    ("a keyword", lambda b, h, q, k, *, w: q > w, ArgumentError, r"functools\.partial"),
    ("no function", 3, TypeError, "expected a function"),
]


@pytest.mark.parametrize(("name", "function", "error", "message"), BAD, ids=[case[0] for case in BAD])
def test_what_has_no_program_is_refused(name: str, function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expr.trace(function)


def test_kind_is_checked() -> None:
    causal = expr.trace(lambda b, h, q, k: q >= k)
    with pytest.raises(ArgumentError, match="expected a score mod, got a mask mod: q >= k"):
        expr.trace(causal, "score")
    with pytest.raises(ArgumentError, match="kind: expected"):
        expr.trace(lambda b, h, q, k: q >= k, "both")
    with pytest.raises(ArgumentError, match="a score_mod takes 5"):
        expr.trace(lambda b, h, q, k: q >= k, "score")
    with pytest.raises(ArgumentError, match="a mask mod takes 4"):
        causal(1, 2)
    with pytest.raises(DtypeError, match="complex128"):
        expr.array(np.ones(2, complex), "phases")


def test_expressions_are_shown_as_they_are_written() -> None:
    for text in (
        "score + slopes[h] * float(k - q)",
        "(q >= k) & (q - k < 4)",
        "-score ** 1.5",
        "where((q > k) | ~(h == 1), score, -inf)",
        "float((q - k) // 2 % 3) - (score - 1.0)",
    ):
        source = text.replace("inf", "math.inf").replace("float(", "expr.to_float(").replace("where", "expr.where")
        kind = "score" if "score" in text else "mask"
        arguments = ("score, " if kind == "score" else "") + "b, h, q, k"
        assert str(expr.trace(eval(f"lambda {arguments}: {source}"))) == text


# The torch tracer.


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def trace(torch: Any) -> Any:
    from tilewise.torch.expr import trace

    return trace


def vmapped(torch: Any, function: Any) -> np.ndarray:
    """What torch's own flex_attention makes of a mod: one element at a time by vmap, here in float64."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    score = [torch.from_numpy(SCORE)] if function.__code__.co_argcount == 5 else []
    for axis in range(3, -1, -1):
        places = [0 if place == axis else None for place in range(4)]
        function = torch.vmap(function, in_dims=tuple([0] * len(score) + places), out_dims=0)
    with TransformGetItemToIndex():
        return function(*score, *(torch.arange(extent) for extent in EXTENTS)).detach().numpy()


def divisions(torch: Any, *values: Any) -> Any:
    return sum(torch.div(x, 3, rounding_mode=mode) for x in values for mode in ("trunc", "floor"))


@pytest.fixture(scope="module")
def functions(torch: Any) -> dict[str, Any]:
    """Mods as torch users write them."""
    from torch.nn import functional

    bias = torch.from_numpy(RANDOM.normal(size=(3, 7)))
    wide = torch.from_numpy(RANDOM.normal(size=(2, 3, 7, 4)))
    index = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    flags = torch.tensor([True, False, True, True, False, True, False])
    small = torch.tensor([250, 3, 100, 7, 9, 30, 200], dtype=torch.uint8)
    signed = torch.tensor([100, 3, -100, 7, 127, -128, 0], dtype=torch.int8)
    scalar = torch.tensor(1.5, dtype=torch.float64)
    inf = float("inf")
    return {
        "bias": lambda s, b, h, q, k: s + bias[h, k],
        "bias by rows": lambda s, b, h, q, k: s + bias[h][k],
        "static and symbolic": lambda s, b, h, q, k: s + bias[0, k] + bias[-1][q] + bias[:, 1][h],
        "gather of a gather": lambda s, b, h, q, k: s * bias[h, index[k]],
        "scalar capture": lambda s, b, h, q, k: s * scalar,
        "dot": lambda s, b, h, q, k: s + torch.dot(wide[b, h, q], wide[b, h, k]),
        "sum of products": lambda s, b, h, q, k: s + (wide[b, h, q] * wide[b, h, k, :]).sum(-1),
        "matrix": lambda s, b, h, q, k: s + (wide[b, h] @ wide[b, h, k])[q],
        "mean": lambda s, b, h, q, k: s + wide[b, h, q].mean() + wide[b, h, k].amax() - wide[b, h, k].min(),
        "slice": lambda s, b, h, q, k: s + wide[b, h, q, 1:3].prod() + wide[b, h, q][::2].sum(),
        "ellipsis": lambda s, b, h, q, k: s + wide[..., 2][b, h, q] + wide[b, ..., 1][h, k],
        "new axis": lambda s, b, h, q, k: s + wide[b, None, h, q].squeeze(0)[3],
        "index_select": lambda s, b, h, q, k: s + torch.index_select(bias, 0, h[None])[0][k],
        "take": lambda s, b, h, q, k: s + torch.take(bias, h * 7 + k),
        "embedding": lambda s, b, h, q, k: s + functional.embedding(k, wide[0, 0])[2],
        "choose": lambda s, b, h, q, k: s * torch.stack([q, k, q + k])[h],
        "where inf": lambda s, b, h, q, k: torch.where(q >= k, s, -inf),
        "where tensor": lambda s, b, h, q, k: torch.where(q >= k, s, torch.tensor(-inf, dtype=torch.float64)),
        "masked_fill": lambda s, b, h, q, k: s.masked_fill(q < k, -inf),
        "clamp": lambda s, b, h, q, k: s.clamp(-1, 1) + s.clamp(min=0) + torch.clamp(q - k, max=2) + s.clip(max=0.5),
        "activations": lambda s, b, h, q, k: functional.silu(s) + functional.gelu(s) + functional.softplus(s),
        "more activations": lambda s, b, h, q, k: functional.leaky_relu(s) + functional.elu(s) + functional.hardtanh(s),
        "log sigmoid": lambda s, b, h, q, k: functional.logsigmoid(s),
        "elementary": lambda s, b, h, q, k: torch.log10(s.abs() + 1) + torch.frac(s) + torch.cosh(s),
        "two": lambda s, b, h, q, k: torch.atan2(s, s + 1) + torch.fmin(s, k * 0.5) + torch.fmax(s, q) + s.lerp(s, 0.3),
        "pow": lambda s, b, h, q, k: s.pow(2) + torch.pow(2.0, s) + s.abs() ** 0.5 + (q - k) ** 3 + s**-1,
        "divisions": lambda s, b, h, q, k: divisions(torch, s, q - k),
        "remainders": lambda s, b, h, q, k: torch.fmod(q - k, 3) + torch.remainder(q - k, 3) + s % 0.7,
        "addition with alpha": lambda s, b, h, q, k: torch.add(s, q, alpha=2) - torch.sub(s, k, alpha=0.5),
        "rounding": lambda s, b, h, q, k: s.round() + s.trunc() + s.floor() + (q / 2).ceil() + s.long(),
        "casts": lambda s, b, h, q, k: s + (q > k).to(s.dtype) + q.double() / 3 + (s > 0).int() + s.to(torch.int64),
        "in place": lambda s, b, h, q, k: s.mul(2).add_(bias[h, k]).sub_(1),
        "bytes wrap": lambda s, b, h, q, k: s + (small[q] + small[k]) + (signed[q] * 3) + (-small[k]),
        "byte and index": lambda s, b, h, q, k: s + small[q] * k,
        "bools add": lambda s, b, h, q, k: s + (flags[q] + flags[k]) + flags[q] * 2,
        "constants": lambda s, b, h, q, k: s.new_full((), 2.0) + torch.zeros_like(s) + torch.arange(7)[k],
        "defaults": lambda s, b, h, q, k, cap=5.0: cap * torch.tanh(s / cap),
        "mask": lambda b, h, q, k: (q >= k) & flags[k],
        "mask logic": lambda b, h, q, k: torch.logical_and(q > k, k) | torch.isin(q, torch.tensor([0, 3])) | ~flags[q],
        "mask new ones": lambda b, h, q, k: b.new_ones((), dtype=torch.bool) & (q >= k),
        "mask of vectors": lambda b, h, q, k: (torch.stack([q, k]) < torch.tensor([4, 5])).all(),
        "mask any": lambda b, h, q, k: torch.cat([q[None] > k[None], (q == 0)[None]]).any(),
        "mask bits": lambda b, h, q, k: (torch.bitwise_xor(q, k) & 1 == 0) | ((q << 1) > (k >> 1)),
    }  # fmt: skip


NAMES = [
    "bias", "bias by rows", "static and symbolic", "gather of a gather", "scalar capture", "dot", "sum of products",
    "matrix", "mean", "slice", "ellipsis", "new axis", "index_select", "take", "embedding", "choose", "where inf",
    "where tensor", "masked_fill", "clamp", "activations", "more activations", "log sigmoid", "elementary", "two",
    "pow", "divisions", "remainders", "addition with alpha", "rounding", "casts", "in place", "bytes wrap",
    "byte and index", "bools add", "constants", "defaults", "mask", "mask logic", "mask new ones", "mask of vectors",
    "mask any", "mask bits",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_torch_functions_mean_what_torch_makes_of_them(name: str, torch: Any, trace: Any, functions: Any) -> None:
    assert list(functions) == NAMES
    warnings.filterwarnings("ignore", "There is a performance drop")  # of torch's vmap
    mod = trace(functions[name])
    found = dense(mod, EXTENTS, SCORE)
    bound = functions[name]
    if "defaults" in name:
        bound = lambda s, b, h, q, k: functions[name](s, b, h, q, k)  # noqa: E731
    wanted = vmapped(torch, bound)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_captures_keep_their_identity(torch: Any, trace: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    scale = torch.nn.Parameter(torch.tensor(2.0))
    mod = trace(lambda s, b, h, q, k: (s + weight[h, 0] + weight[h][1]) * scale)
    assert mod.captures[0] is weight and mod.captures[1] is scale
    # What a mod computes of a capture alone is computed once, and gradients flow through it.
    mod = trace(lambda s, b, h, q, k: s + weight.exp()[h, k])
    assert mod.captures[0].grad_fn is not None
    mod.captures[0].sum().backward()
    assert torch.equal(weight.grad, weight.exp())


def test_a_trace_is_used_again_only_where_it_holds(torch: Any, trace: Any) -> None:
    def make(width: int, table: Any) -> Any:
        return lambda b, h, q, k: (q - k < width) & (table[q] == table[k])

    table = torch.zeros(7, dtype=torch.int64)
    first = trace(make(3, table))
    assert trace(make(3, table)).program == first.program and trace(make(3, table)).captures[0] is table
    assert "int 4" in trace(make(4, table)).program
    other = table.clone()
    assert trace(make(3, other)).captures[0] is other
    assert "capture float 1" in trace(make(3, table.double())).program
    # A cell that changes, a global that is bound anew, an object whose attribute changes.
    width = 3

    def late(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < width

    assert "int 3" in trace(late).program
    width = 5
    assert "int 5" in trace(late).program

    class Holder:
        width = 3

        def mask(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return q - k < self.width

    holder = Holder()
    assert "int 3" in trace(holder.mask).program
    holder.width = 6
    assert "int 6" in trace(holder.mask).program
    # A value read while tracing is not kept.
    read = torch.tensor(2)
    reading = lambda b, h, q, k: q - k < int(read)  # noqa: E731
    assert "int 2" in trace(reading).program
    read.fill_(3)
    assert "int 3" in trace(reading).program
    # Nor what was computed of a capture.
    twice = lambda s, b, h, q, k: s + (read * 2)[None][h - h]  # noqa: E731
    assert trace(twice).captures[0].item() == 6
    read.fill_(5)
    assert trace(twice).captures[0].item() == 10
    # Nor a read of an array.
    array = expr.array(np.array([2, 7]))
    reading = lambda b, h, q, k: q - k < int(array[0])  # noqa: E731
    assert "int 2" in trace(reading).program
    array.source[0] = 4
    assert "int 4" in trace(reading).program

    # Nor what classes and functions say of themselves.
    class Settings:
        width = 3

    wide = lambda b, h, q, k: q - k < Settings.width  # noqa: E731
    assert "int 3" in trace(wide).program
    Settings.width = 4
    assert "int 4" in trace(wide).program

    def marked(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < marked.width  # type: ignore[attr-defined]

    marked.width = 3  # type: ignore[attr-defined]
    assert "int 3" in trace(marked).program
    marked.width = 4  # type: ignore[attr-defined]
    assert "int 4" in trace(marked).program
    # And a function that it calls may differ.
    inner = lambda q, k: q >= k  # noqa: E731
    outer = lambda b, h, q, k: inner(q, k)  # noqa: E731
    assert "ge" in trace(outer).program
    inner = lambda q, k: q < k  # noqa: E731
    assert "lt" in trace(outer).program


def test_mods_of_numpy_users_are_torch_mods(torch: Any, trace: Any) -> None:
    mod = expr.trace(lambda s, b, h, q, k: s * slopes[h])
    found = trace(mod, "score")
    assert isinstance(found.captures[0], torch.Tensor) and found.captures[0].data_ptr() == SLOPES.ctypes.data
    assert trace(found) is found
    with pytest.raises(ArgumentError, match="expected a mask mod"):
        trace(mod, "mask")


def test_the_cache_keeps_no_capture_alive(torch: Any, trace: Any) -> None:
    import weakref

    tables = [torch.zeros(1000)]
    (lambda table: trace(lambda s, b, h, q, k: s + table[k]))(tables[0])
    dead = weakref.ref(tables.pop())
    gc.collect()
    assert dead() is None


def test_tracing_is_quick(torch: Any, trace: Any, capsys: Any) -> None:
    """Times are printed; the bounds are ten times what a slow machine needs."""
    slopes, doc = torch.ones(8), torch.zeros(4096, dtype=torch.int32)
    five = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= 256),
        "document": lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k),
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    }
    shown = []
    for name, function in five.items():
        start = time.perf_counter()
        trace(function)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(100):
            trace(function)
        again = (time.perf_counter() - start) / 100
        shown.append(f"{name} {first * 1e3:.2f} ms, again {again * 1e6:.1f} us")
        assert first < 1.0 and again < first
    with capsys.disabled():
        print("\ntrace:", "; ".join(shown), end=" ")


def test_threads_trace_apart(torch: Any, trace: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tables = [torch.full((4,), float(n)) for n in range(16)]

    def one(n: int) -> bool:
        for _ in range(20):
            mod = trace(lambda s, b, h, q, k, n=n: s * n + tables[n][h])
            if mod.captures[0] is not tables[n]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(16)))


@pytest.fixture(scope="module")
def refused(torch: Any) -> dict[str, Any]:
    table, large = torch.ones(3, 4), torch.ones(3, 5000)
    return {
        "if": (lambda s, b, h, q, k: s if q > k else 0 * s, "`q > k` is not known"),
        "while": (lambda b, h, q, k: [1 for _ in range(3) if q > k], "`q > k` is not known"),
        "max": (lambda b, h, q, k: max(q, k) > 1, "minimum and maximum for min and max"),
        "item": (lambda b, h, q, k: q.item() > 1, r"`q` has no value .* item\(\)"),
        "int": (lambda b, h, q, k: int(q) > 1, "`q` has no value"),
        "math": (lambda s, b, h, q, k: math.exp(s), "`score` has no value.*torch.exp for math.exp"),
        "numpy": (lambda b, h, q, k: RAW[h, q] > 0, r"tilewise\.expr\.array"),
        "softmax": (lambda s, b, h, q, k: torch.softmax(s, -1), r"_softmax.*\(score.*applies the softmax itself"),
        "random": (lambda s, b, h, q, k: s + torch.rand_like(s), "rand_like is random, and a mod is a function"),
        "dropout": (lambda s, b, h, q, k: torch.dropout(s, 0.5, True), "dropout probability"),
        "sort": (lambda b, h, q, k: torch.sort(q)[0] > 1, "compute the order before"),
        "assign": (lambda s, b, h, q, k: table.__setitem__((h, q), s), r"torch\.where"),
        "a vector": (lambda s, b, h, q, k: s + table[h], r"returned a tensor \[4\]; expected one number"),
        "too much": (lambda s, b, h, q, k: (s + large).sum(), "15000 elements.*index every axis: large"),
        "a long row": (lambda s, b, h, q, k: s + large[h].sum(), "has 5000 elements"),
        "float index": (lambda s, b, h, q, k: s + table[h / 2, 0], r"table is indexed by the float `float\(h\)"),
        "bool index": (lambda s, b, h, q, k: s + table[q > k], r"choose by torch\.where"),
        "outside": (lambda s, b, h, q, k: s + table[h, 9], "index 9 is outside axis 1 of 4"),
        "too many": (lambda s, b, h, q, k: s + table[b, h, q], "3 indices for a tensor of 2 axes"),
        "complex": (lambda s, b, h, q, k: torch.complex(s, s).abs(), "no program|have no program"),
        "a number": (lambda b, h, q, k: q - k, "returns the int `q - k`"),
        "a bool": (lambda s, b, h, q, k: q > k, "mask_mod without the score"),
        "nothing": (lambda s, b, h, q, k: None, "returned NoneType"),
        "widening in place": (lambda b, h, q, k: q.mul_(0.5) > k, r"cannot be written into torch\.int64"),
    }  # fmt: skip


REFUSED = [
    "if", "while", "max", "item", "int", "math", "numpy", "softmax", "random", "dropout", "sort", "assign", "a vector",
    "too much", "a long row", "float index", "bool index", "outside", "too many", "complex", "a number", "a bool",
    "nothing", "widening in place",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_functions_may_not_do(name: str, trace: Any, refused: Any) -> None:
    assert list(refused) == REFUSED
    function, message = refused[name]
    with pytest.raises(TilewiseError, match=f"(?s){message}") as caught:
        trace(function)
    if name not in ("a vector", "a number", "a bool", "nothing"):
        assert f"in {Path(__file__)}" in str(caught.value), "the user's line is named"
    trace(lambda b, h, q, k: q >= k)  # and the next trace is not disturbed


def test_symbols_die_with_their_trace(trace: Any) -> None:
    kept: list[Any] = []

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        kept.append(q)
        return q >= k

    trace(mask)
    with pytest.raises(UnsupportedError, match="finished trace"):
        kept[0] + 1


def test_other_errors_of_the_function_pass(trace: Any) -> None:
    def broken(b: Any, h: Any, q: Any, k: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trace(broken)


def test_mods_and_functions_mix(torch: Any, trace: Any) -> None:
    doc = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    mod = trace(lambda b, h, q, k: doc[q] == doc[k])
    assert isinstance(mod, Mod)
    both = trace(lambda b, h, q, k: mod(b, h, q, k) & (q >= k))
    assert both.captures[0] is doc and str(both) == "(doc[q] == doc[k]) & (q >= k)"
    # torch's own functions take a mod as a mask_mod.
    from torch.nn.attention.flex_attention import create_mask

    dense_mask = create_mask(lambda b, h, q, k: mod(b, h, q, k), 1, 1, 7, 7, device="cpu")
    assert torch.equal(dense_mask[0, 0], doc[:, None] == doc)


# torch.compile.

HALVES = expr.array(np.array([0.5, 1.5, 2.5], np.float32), "halves")
HALVED = expr.trace(lambda s, b, h, q, k: s * HALVES[h])


@pytest.fixture(scope="module")
def compiled(torch: Any) -> Any:
    """Runs a function that makes mods of a tensor under fullgraph, and gives what the graph computed with them."""
    from tilewise.torch.expr import program_and_captures

    def run(make: Any, kind: str, x: Any) -> tuple[str, list[Any]]:
        texts: list[str] = []

        def step(x: Any) -> Any:
            text, captures = program_and_captures(make(x), kind)
            if not texts or texts[-1] != text:
                texts.append(text)
            return [x + 0, *[capture * 2 for capture in captures]]

        torch._dynamo.reset()
        out = torch.compile(step, fullgraph=True, backend="eager")(x)
        return texts[-1], [one / 2 for one in out[1:]]

    return run


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_mods_are_made_inside_a_compiled_function(torch: Any, trace: Any, compiled: Any) -> None:
    from tilewise import masks, mods
    from tilewise.attention import and_masks

    x = torch.arange(3.0, requires_grad=True)
    small = torch.tensor([1, 2, 3], dtype=torch.uint8)
    mod = trace(lambda s, b, h, q, k: s * 2)
    documents = masks.document(torch.tensor([0, 1, 1]))
    narrow = lambda b, h, q, k: small[q] > k  # noqa: E731
    cases: list[tuple[str, Any]] = [
        ("score", lambda x: lambda s, b, h, q, k: s + x[h] * 3),
        ("score", lambda x: lambda s, b, h, q, k, scale=0.5: s * scale),
        ("score", lambda x: mod),
        ("score", lambda x: lambda s, b, h, q, k: HALVED(s, b, h, q, k) + HALVES[h]),
        ("score", lambda x: functools.partial(lambda y, s, b, h, q, k: s + y[h], x)),
        ("mask", lambda x: narrow),
        ("mask", lambda x: masks.sliding_window(4)),
        ("mask", lambda x: and_masks(documents, masks.causal(), lambda b, h, q, k: x[q] > 1)),
        ("score", lambda x: mods.head_bias(x)),
    ]
    for kind, make in cases:
        eager = trace(make(x), kind)
        text, captures = compiled(make, kind, x)
        assert text == eager.program
        assert len(captures) == len(eager.captures)
        for one, other in zip(captures, map(torch.as_tensor, eager.captures), strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad


class Holder:
    """What a model does that reads its parameter inside the mod."""

    def __init__(self, torch: Any) -> None:
        self.module = torch.nn.Linear(3, 3)

    def make(self, x: Any) -> Any:
        module = self.module
        return lambda s, b, h, q, k: s + module.bias[h]


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_made_inside_a_compiled_function(torch: Any, compiled: Any) -> None:
    holder = Holder(torch)
    for make, message in (
        (lambda x: lambda s, b, h, q, k: s + x.exp()[h], "compute the tensor before and capture it"),
        (holder.make, r"capture the tensor by a local variable"),
        (lambda x: lambda s, b, h, q, k: s if q > k else 0 * s, "truth value of `q > k`"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(make, "score", torch.ones(3))


@pytest.mark.filterwarnings("ignore")
def test_lengths_that_vary_under_compile(torch: Any, trace: Any) -> None:
    """Extents of captures, and numbers made of extents, are part of the program; other lengths trace anew."""
    from tilewise.torch.expr import program_and_captures

    texts: list[str] = []

    def step(x: Any) -> Any:
        width = x.shape[0] - 1
        text, (table,) = program_and_captures(lambda s, b, h, q, k: s + x[(q - k) % x.shape[0]] * width, "score")
        texts.append(text)
        return table * 1

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for length in (3, 5, 3, 7):
        x = torch.arange(float(length))
        assert torch.equal(run(x), x)
        width = length - 1
        eager = trace(lambda s, b, h, q, k, x=x, width=width: s + x[(q - k) % x.shape[0]] * width)
        assert eager.program in texts


@pytest.mark.filterwarnings("ignore")
def test_traces_stand_apart_from_what_runs_around_them(torch: Any, trace: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    scale = torch.nn.Parameter(torch.tensor(2.0))
    cases = [lambda s, b, h, q, k, n=n: torch.where(q - k < n, s, -math.inf) * scale for n in range(6)]
    programs_found = []
    with torch.inference_mode():
        programs_found.append(trace(cases[0]))
    with torch.no_grad():
        programs_found.append(trace(cases[1]))
    with torch.autocast("cpu"):
        programs_found.append(trace(cases[2]))
    with FakeTensorMode():
        programs_found.append(trace(cases[3]))
    make_fx(lambda x: (programs_found.append(trace(cases[4])), x + 1)[1], tracing_mode="fake")(torch.ones(2))
    programs_found.append(trace(cases[5]))
    assert [mod.program.replace("int 0", f"int {n}") for n, mod in enumerate([programs_found[0]] * 6)] == [
        mod.program for mod in programs_found
    ]
    assert all(mod.captures[0] is scale for mod in programs_found)
