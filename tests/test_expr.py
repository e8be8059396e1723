"""The expr room: program texts against their NumPy meaning, on every level, in both orientations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tilewise import _core, reference
from tilewise.errors import ArgumentError, DtypeError, ShapeError

EXTENTS = {"batch": 2, "heads": 3, "queries": 37, "keys": 21}
ALIBI = """tilewise-expr 1 score
capture float 1
score
query
key
sub 2 1
to_float 3
head
gather 0 5
mul 4 6
add 0 7
return 8
"""
SOFTCAP = "tilewise-expr 1 score\nscore\nfloat 20.0\ndiv 0 1\ntanh 2\nmul 3 1\nreturn 4\n"
CAUSAL_DOCUMENTS = """tilewise-expr 1 mask
capture int 2
batch
query
key
ge 1 2
gather 0 0 1
gather 0 0 2
eq 4 5
and 3 6
return 7
"""


def run(
    text: str,
    captures: Any = (),
    *,
    dtype: Any = np.float64,
    score: Any = None,
    grad: Any = None,
    lanes: str = "queries",
    grad_captures: Any = None,
    **extents: int,
) -> np.ndarray:
    """The tile interpreter over all elements."""
    extents = extents or EXTENTS
    kind = text.split()[2]
    shape = tuple(extents[name] for name in ("batch", "heads", "queries", "keys"))
    out = np.empty(shape, np.bool_ if kind == "mask" else dtype)
    _core.expr_evaluate(
        text, list(captures), out, score=score, grad=grad, lanes=lanes, grad_captures=grad_captures, **extents
    )
    return out


class Trees:
    """Random programs. Steps (floor, comparisons, ...) are taken of exactly computed floats alone: elsewhere the last
    bit of a transcendental function would decide."""

    LEAVES = ("batch", "head", "query", "key")
    SMOOTH = ("exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan", "tanh", "sigmoid", "erf")
    ALGEBRAIC = ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "relu", "square")
    STEPS = ("sign", "floor", "ceil", "round", "trunc")

    def __init__(self, seed: int, kind: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind = kind
        self.lines: list[str] = []
        self.nodes: list[tuple[str, bool]] = []  # class, whether it is exact

    def add(self, line: str, cls: str, exact: bool = True) -> int:
        self.lines.append(line)
        self.nodes.append((cls, exact))
        return len(self.nodes) - 1

    def pick(self, cls: str, exact: bool = False) -> int:
        found = [i for i, (c, e) in enumerate(self.nodes) if c == cls and (e or not exact)]
        # Late nodes more often, so that trees grow deep.
        return int(found[int(len(found) * self.rng.random() ** 0.5)])

    def step(self) -> None:
        rng = self.rng
        choice = rng.integers(0, 14)
        if choice == 0:
            name = rng.choice(["add", "sub", "mul", "min", "max"])
            a, b = self.pick("float"), self.pick("float")
            # A product of products would leave what floats hold exactly.
            self.add(f"{name} {a} {b}", "float", name in ("min", "max") and self.nodes[a][1] and self.nodes[b][1])
        elif choice == 1:
            self.add(f"{rng.choice(self.SMOOTH)} {self.pick('float')}", "float", False)
        elif choice == 2:
            self.add(f"{rng.choice(self.ALGEBRAIC)} {self.pick('float')}", "float", False)
        elif choice == 3:
            self.add(f"{rng.choice(self.STEPS)} {self.pick('float', exact=True)}", "float")
        elif choice == 4:
            name = rng.choice(["div", "atan2", "pow"])
            self.add(f"{name} {self.pick('float')} {self.pick('float')}", "float", False)
        elif choice == 5:
            name = rng.choice(["floor_div", "mod"])
            self.add(f"{name} {self.pick('float', exact=True)} {self.pick('float', exact=True)}", "float", False)
        elif choice in (6, 7):
            name = rng.choice(["add", "sub", "mul", "min", "max", "and", "or", "xor", "shl", "shr"])
            self.add(f"{name} {self.pick('int')} {self.pick('int')}", "int")
        elif choice == 8:
            divisor = self.add(f"int {rng.choice([-7, -4, -1, 1, 2, 3, 5, 8, 64, 1 << 40])}", "int")
            name = rng.choice(["floor_div", "mod", "trunc_div"])
            self.add(f"{name} {self.pick('int')} {divisor}", "int")
        elif choice == 9:
            name = rng.choice(["neg", "abs", "sign"])
            self.add(f"{name} {self.pick('int')}", "int")
        elif choice == 10:
            name = rng.choice(["lt", "le", "gt", "ge", "eq", "ne"])
            cls = rng.choice(["int", "float"])
            self.add(f"{name} {self.pick(cls, exact=True)} {self.pick(cls, exact=True)}", "bool")
        elif choice == 11:
            name = rng.choice(["and", "or", "xor", "not", "eq", "ne"])
            operands = [self.pick("bool") for _ in range(1 if name == "not" else 2)]
            self.add(f"{name} {' '.join(map(str, operands))}", "bool")
        elif choice == 12:
            cls = rng.choice(["int", "float", "bool"])
            a, b = self.pick(cls), self.pick(cls)
            self.add(f"where {self.pick('bool')} {a} {b}", cls, self.nodes[a][1] and self.nodes[b][1])
        else:
            line, cls = [
                (f"to_float {self.pick('int')}", "float"),
                (f"to_float {self.pick('bool')}", "float"),
                (f"to_int {self.pick('float', exact=True)}", "int"),
                (f"to_int {self.pick('bool')}", "int"),
                (f"to_bool {self.pick('int')}", "bool"),
                (f"to_bool {self.pick('float', exact=True)}", "bool"),
            ][rng.integers(0, 6)]
            self.add(line, cls)

    def text(self, size: int) -> str:
        rng = self.rng
        if self.kind != "mask":
            self.add("score", "float")
        for name in self.LEAVES:
            self.add(name, "int")
        self.add(f"float {rng.choice([0.0, 1.0, -1.0, 0.5, 2.0, -3.25, 1e-3])}", "float")
        self.add(f"int {rng.choice([0, 1, -1, 2, 7, 255, -(1 << 40)])}", "int")
        self.add(f"bool {rng.integers(0, 2)}", "bool")
        # Captures: indices by remainders, so that they stay inside.
        for number, (cls, leaf, extent) in enumerate(
            [("float", "head", 3), ("int", "query", 37), ("bool", "key", 21), ("float", "both", 57)]
        ):
            if leaf == "both":
                index = self.add(f"sub {self.nodes_named('query')} {self.nodes_named('key')}", "int")
                bound = self.add(f"int {extent}", "int")
                index = self.add(f"mod {index} {bound}", "int")
            else:
                index = self.nodes_named(leaf)
            self.add(f"gather {number} {index}", cls)
        for _ in range(size):
            self.step()
        result = self.pick("bool" if self.kind == "mask" else "float")
        head = f"tilewise-expr 1 {self.kind}\ncapture float 1\ncapture int 1\ncapture bool 1\ncapture float 1\n"
        return head + "\n".join(self.lines) + f"\nreturn {result}\n"

    def nodes_named(self, name: str) -> int:
        return self.lines.index(name)


def captures_of(dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [
        (rng.integers(-16, 16, 3) / 8).astype(dtype),
        rng.integers(-5, 50, 37),
        rng.integers(0, 2, 21).astype(bool),
        (rng.integers(-16, 16, 57) / 8).astype(dtype),
    ]


def scores_of(dtype: Any = np.float64, extents: dict[str, int] = EXTENTS) -> np.ndarray:
    shape = tuple(extents[name] for name in ("batch", "heads", "queries", "keys"))
    return (np.random.default_rng(6).integers(-64, 64, shape) / 8).astype(dtype)


def assert_same(got: np.ndarray, truth: np.ndarray, rtol: float) -> None:
    if got.dtype == np.bool_:
        assert np.array_equal(got, truth)
    else:
        np.testing.assert_allclose(got, truth, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", ["score", "mask"])
def test_random_programs_mean_what_the_reference_says(isa: str, kind: str, seed: int) -> None:
    text = Trees(seed, kind).text(4 + seed % 30)
    # Masks compute in single precision.
    captures, score = captures_of(), None if kind == "mask" else scores_of()
    dtype = np.float32 if kind == "mask" else np.float64
    truth = reference.expr.evaluate(text, captures, score=score, dtype=dtype, **EXTENTS)
    simple = _core.expr_simplify(text)
    assert _core.expr_simplify(simple) == simple
    for program in (text, simple):
        for lanes in ("queries", "keys"):
            assert_same(run(program, captures, score=score, lanes=lanes), truth, 1e-9)


def smooth_text(seed: int) -> str:
    """A random score program that is differentiable almost everywhere, near scores where nothing is huge."""
    rng = np.random.default_rng(seed)
    lines = ["score", "batch", "head", "query", "key", "to_float 4", "float 0.01", "mul 5 6"]
    lines += ["gather 0 2", "sub 3 4", "int 57", "mod 9 10", "gather 3 11", "gather 0", "bool 1", "lt 3 4"]
    lines[13] = "gather 4"
    floats = [0, 7, 8, 12, 13]
    for _ in range(3 + seed % 12):
        choice = rng.integers(0, 5)
        a, b = (int(floats[int(len(floats) * rng.random() ** 0.6)]) for _ in range(2))
        if choice == 0:
            lines.append(f"{rng.choice(['sin', 'cos', 'tanh', 'sigmoid', 'erf', 'relu', 'abs', 'neg', 'square'])} {a}")
        elif choice == 1:
            # Functions of positive numbers.
            lines += [f"square {a}", "float 0.5", f"add {len(lines)} {len(lines) + 1}"]
            name = rng.choice(["log", "log2", "sqrt", "rsqrt", "reciprocal", "log1p"])
            lines.append(f"{name} {len(lines) - 1}")
        elif choice == 2:
            lines.append(f"tanh {a}")
            lines.append(f"{rng.choice(['exp', 'exp2', 'expm1', 'tan'])} {len(lines) - 1}")
        elif choice == 3:
            lines.append(f"{rng.choice(['add', 'sub', 'mul', 'min', 'max', 'atan2'])} {a} {b}")
        else:
            lines.append(f"where {rng.choice([14, 15])} {a} {b}")
        floats.append(len(lines) - 1)
    head = "tilewise-expr 1 score\ncapture float 1\ncapture int 1\ncapture bool 1\ncapture float 1\ncapture float 0\n"
    return head + "\n".join(lines) + f"\nreturn {floats[-1]}\n"


@pytest.mark.parametrize("seed", range(40))
def test_gradients_are_finite_differences(isa: str, seed: int) -> None:
    text = smooth_text(seed)
    rng = np.random.default_rng(seed)
    extents = {"batch": 1, "heads": 3, "queries": 9, "keys": 6}
    captures = [*captures_of(), np.array(0.375)]
    captures = [c + 1e-3 * rng.random(c.shape) if c.dtype == np.float64 else c for c in captures]
    score, grad = rng.standard_normal((1, 3, 9, 6)), rng.standard_normal((1, 3, 9, 6))

    def loss(captures: list[Any], score: np.ndarray) -> float:
        return float((grad * reference.expr.evaluate(text, captures, score=score, **extents)).sum())

    gradient = _core.expr_gradient(text)
    assert _core.expr_simplify(gradient) == gradient
    sums = [np.full(c.shape, np.nan) if c.dtype == np.float64 else None for c in captures]
    lanes = ("queries", "keys")[seed % 2]
    by_score = run(gradient, captures, score=score, grad=grad, grad_captures=sums, lanes=lanes, **extents)
    truth, totals = reference.expr.gradients(gradient, captures, score=score, grad=grad, **extents)
    np.testing.assert_allclose(by_score, truth, rtol=1e-9, atol=1e-9)
    step = 1e-6
    for place in [(0, 0, 0, 0), (0, 1, 4, 5), (0, 2, 8, 3)]:
        ahead, behind = score.copy(), score.copy()
        ahead[place] += step
        behind[place] -= step
        slope = (loss(captures, ahead) - loss(captures, behind)) / (2 * step)
        np.testing.assert_allclose(by_score[place], slope, rtol=1e-4, atol=1e-6)
    for number, (capture, total) in enumerate(zip(captures, sums, strict=True)):
        if total is None:
            continue
        np.testing.assert_allclose(total, 0 if totals[number] is None else totals[number], rtol=1e-8, atol=1e-8)
        for place in list(np.ndindex(capture.shape))[:4]:
            ends = []
            for sign in (1, -1):
                moved = [c.copy() for c in captures]
                moved[number][place] += sign * step
                ends.append(loss(moved, score))
            np.testing.assert_allclose(total[place], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-5)
