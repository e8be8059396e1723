"""Rendered programs: what their CUDA functions compute, on an emulator, is what the reference evaluator says."""

from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuda_emulator import Place
from tilewise import _core
from tilewise.cuda.expr import NO_MOD, Mod, capture_argument, parse, render
from tilewise.cuda.kernel import Kernel
from tilewise.cuda.launch import describe, launch
from tilewise.errors import ArgumentError, DtypeError
from tilewise.reference import expr as reference

# What every program of a batch captures, and what lies there.
CLASSES = ["float 2", "int 1", "bool 1", "float 0"]
DTYPES = ("float32", "int32", "bool", "float16")
EXTENTS = {"batch": 2, "heads": 3, "queries": 5, "keys": 7}
SHAPE = tuple(EXTENTS.values())

_KERNEL = """extern "C" __global__ void {name}(float* out, const float* score, const float* grad,
                                  const {first}::Captures captures, int which) {{
    const int k = threadIdx.x % 7, q = threadIdx.x / 7 % 5, h = threadIdx.x / 35 % 3, b = threadIdx.x / 105;
    const float s = score[threadIdx.x], g = grad[threadIdx.x];
    switch (which) {{
{cases}
    }}
}}
"""


def captures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.normal(size=(3, 7)).astype(np.float32),
        generator.integers(-3, 4, 5).astype(np.int32),
        generator.uniform(size=7) < 0.5,
        np.array(1.5, np.float16),
    ]


def run(place: Place, programs: list[tuple[str, str | None]], score: np.ndarray, grad: np.ndarray) -> Any:
    """Values of (score or mask program, gradient program), their gradients, sums of capture 0, and the fault flag."""
    mods: list[Mod] = []
    for text, gradient in programs:
        if parse(text).kind == "mask":
            mods.append(render(None, (), text, DTYPES))
        else:
            mods.append(render(text, DTYPES, None, (), gradient))
    cases = []
    for number, mod in enumerate(mods):
        taken = f"reinterpret_cast<const {mod.name}::Captures&>(captures)"
        kind = parse(programs[number][0]).kind
        value = (
            f"{mod.name}::mask({taken}, b, h, q, k)" if kind == "mask" else f"{mod.name}::score({taken}, s, b, h, q, k)"
        )
        cases.append(f"    case {2 * number}: out[threadIdx.x] = {value}; break;")
        slope = f"{mod.name}::template gradient<true>({taken}, s, g, b, h, q, k)"
        cases.append(f"    case {2 * number + 1}: out[threadIdx.x] = {slope}; break;")
    name = "tilewise_test_" + mods[0].digest
    definitions = "".join({mod.text: None for mod in mods})
    stub = definitions + _KERNEL.format(name=name, first=mods[0].name, cases="\n".join(cases))
    kernel = Kernel(name, "expr.cuh", stub)
    arrays = [place.put(array) for array in captures()]
    fault, out = place.put(np.zeros(1, np.int32)), place.put(np.zeros(SHAPE, np.float32))
    given = [describe("array", place.put(array.astype(np.float32))) for array in (score, grad)]
    results = []
    for number in range(len(programs)):
        values = []
        sums = place.put(np.zeros((3, 7), np.float32))
        for which in (2 * number, 2 * number + 1):
            argument = capture_argument(
                mods[number],
                describe("fault", fault),
                [describe("capture", array) for array in arrays],
                [describe("sums", sums), None, None, None],
            )
            first = describe("out", out)
            launch(kernel, (1, 1, 1), (210, 1, 1), (first, *given, argument, np.int32(which)), first)
            values.append(np.array(place.get(out)))
        results.append((*values, np.array(place.get(sums))))
    return results, int(place.get(fault)[0])


class _Tree:
    """A random program: any operation, on operands of its classes."""

    UNARY = (
        "neg abs sign floor ceil round trunc sqrt rsqrt reciprocal exp exp2 expm1 log log2 log1p sin cos tan tanh "
        "sigmoid erf relu square"
    )
    BINARY = "add sub mul min max div atan2 pow floor_div mod"

    def __init__(self, seed: int, kind: str = "score") -> None:
        self.random, self.kind = random.Random(seed), kind
        self.lines: list[str] = []
        self.kinds: list[str] = []

    def add(self, kind: str, line: str) -> int:
        self.lines.append(line)
        self.kinds.append(kind)
        return len(self.lines) - 1

    def index(self, extent: int, depth: int) -> int:
        """An int node inside [-extent, extent)."""
        size = self.add("int", f"int {extent}")
        return self.add("int", f"mod {self.node('int', depth - 1)} {size}")

    def node(self, kind: str, depth: int) -> int:
        pick = self.random.choice
        if depth <= 0:
            leaf = {
                "float": [
                    *["score"] * (self.kind == "score"),
                    f"float {pick([0.0, -0.0, 0.5, -2.0, 1e30, float('inf'), float('nan')])}",
                ],
                "int": ["batch", "head", "query", "key", f"int {pick([0, 1, -1, 3, -7, 2**31, -(2**63), 2**63 - 1])}"],
                "bool": ["bool 0", "bool 1"],
            }
            return self.add(kind, pick(leaf[kind]))
        if kind == "float":
            choice = pick(["unary", "binary", "binary", "where", "cast", "gather", "scalar"])
            if choice == "unary":
                return self.add(kind, f"{pick(self.UNARY.split())} {self.node('float', depth - 1)}")
            if choice == "binary":
                a, b = self.node("float", depth - 1), self.node("float", depth - 1)
                return self.add(kind, f"{pick(self.BINARY.split())} {a} {b}")
            if choice == "gather":
                i, j = self.index(3, depth), self.index(7, depth)
                return self.add(kind, f"gather 0 {i} {j}")
            if choice == "scalar":
                return self.add(kind, "gather 3")
            if choice == "cast":
                return self.add(kind, f"to_float {self.node(pick(['int', 'bool']), depth - 1)}")
        if kind == "int":
            choice = pick(["unary", "binary", "divide", "shift", "where", "cast", "gather"])
            if choice == "unary":
                return self.add(kind, f"{pick(['neg', 'abs', 'sign'])} {self.node('int', depth - 1)}")
            if choice == "binary":
                a, b = self.node("int", depth - 1), self.node("int", depth - 1)
                return self.add(kind, f"{pick(['add', 'sub', 'mul', 'min', 'max', 'and', 'or', 'xor'])} {a} {b}")
            if choice == "divide":
                a, b = self.node("int", depth - 1), self.add("int", f"int {pick([1, -1, 3, -5, 64])}")
                return self.add(kind, f"{pick(['floor_div', 'mod', 'trunc_div'])} {a} {b}")
            if choice == "shift":
                a, b = self.node("int", depth - 1), self.add("int", f"int {pick([0, 1, 5, 63, 64, -1])}")
                return self.add(kind, f"{pick(['shl', 'shr'])} {a} {b}")
            if choice == "cast":
                return self.add(kind, f"to_int {self.node(pick(['float', 'bool']), depth - 1)}")
            if choice == "gather":
                return self.add(kind, f"gather 1 {self.index(5, depth)}")
        if kind == "bool":
            choice = pick(["compare", "logic", "not", "cast", "gather", "where"])
            if choice == "compare":
                of = pick(["float", "int"])
                a, b = self.node(of, depth - 1), self.node(of, depth - 1)
                return self.add(kind, f"{pick(['lt', 'le', 'gt', 'ge', 'eq', 'ne'])} {a} {b}")
            if choice == "logic":
                a, b = self.node("bool", depth - 1), self.node("bool", depth - 1)
                return self.add(kind, f"{pick(['and', 'or', 'xor'])} {a} {b}")
            if choice == "not":
                return self.add(kind, f"not {self.node('bool', depth - 1)}")
            if choice == "cast":
                return self.add(kind, f"to_bool {self.node(pick(['int', 'float']), depth - 1)}")
            if choice == "gather":
                return self.add(kind, f"gather 2 {self.index(7, depth)}")
        c = self.node("bool", depth - 1)
        a, b = self.node(kind, depth - 1), self.node(kind, depth - 1)
        return self.add(kind, f"where {c} {a} {b}")

    def text(self, depth: int) -> str:
        result = self.node("bool" if self.kind == "mask" else "float", depth)
        head = [f"tilewise-expr 1 {self.kind}", *(f"capture {line}" for line in CLASSES)]
        return "\n".join([*head, *self.lines, f"return {result}"]) + "\n"


def single(name: str, *operands: str) -> str:
    """A score program with one operation on the score and the key."""
    head = ["tilewise-expr 1 score", *(f"capture {line}" for line in CLASSES)]
    return "\n".join([*head, *operands, name, f"return {len(operands)}"]) + "\n"


def near(got: np.ndarray, text: str, score: np.ndarray) -> None:
    """Equal to the reference in float32, or as near to float64 as a few roundings leave it."""
    want = reference.evaluate(text, captures(), score=score, **EXTENTS).astype(np.float64)
    plain = reference.evaluate(text, captures(), score=score, dtype=np.float32, **EXTENTS).astype(np.float64)
    with np.errstate(all="ignore"):
        same = (got == plain) | (np.isnan(got) & np.isnan(plain))
        close = np.abs(got - want) <= 4 * np.abs(plain - want) + 1e-5 * np.maximum(1.0, np.abs(want))
    assert (same | close).all(), text


def scores() -> np.ndarray:
    generator = np.random.default_rng(7)
    values = generator.normal(size=SHAPE) * 3
    values.reshape(-1)[:8] = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 2.0, -3.0]
    return values.astype(np.float32).astype(np.float64)


def test_each_operation(place: Place) -> None:
    score = scores()
    programs = [single(f"{name} 0", "score") for name in _Tree.UNARY.split()]
    for name in _Tree.BINARY.split():
        programs.append(single(f"{name} 0 2", "score", "key", "to_float 1"))  # by 0 too
        programs.append(single(f"{name} 0 1", "score", "float -2.5"))
    results, fault = run(place, [(text, None) for text in programs], score, score)
    for text, (value, *_) in zip(programs, results, strict=True):
        near(value, text, score)
    assert fault == 0


def test_random_trees(place: Place) -> None:
    """Every class and operation, ranges that fit into 32 bits and ranges that do not."""
    score = scores()
    programs: list[str] = []
    seed = 0
    while len(programs) < 150:
        seed += 1
        text = _Tree(seed, "mask" if seed % 3 == 0 else "score").text(1 + seed % 4)
        _core.expr_check(text)
        plain = reference.evaluate(text, captures(), score=score, dtype=np.float32, **EXTENTS)
        wide = reference.evaluate(text, captures(), score=score, **EXTENTS)
        with np.errstate(all="ignore"):
            stable = np.isclose(plain.astype(np.float64), wide, rtol=1e-4, atol=1e-5, equal_nan=True)
        if stable.all() and parse(text).nodes:  # a step that float32 and float64 take apart says nothing
            programs.append(text)
    results, fault = run(place, [(text, None) for text in programs], score, score)
    for text, (value, *_) in zip(programs, results, strict=True):
        near(value, text, score)
    assert fault == 0


def test_gradients_and_scatters(place: Place) -> None:
    score, grad = scores(), np.random.default_rng(8).normal(size=SHAPE)
    programs: list[tuple[str, str | None]] = []
    for name in ("tanh", "sigmoid", "exp", "relu", "abs", "square", "erf", "neg"):
        nodes = ["score", "head", "key", "gather 0 1 2", "mul 0 3", f"{name} 4"]
        text = single("add 5 3", *nodes)
        programs.append((text, _core.expr_gradient(text)))
    results, fault = run(place, programs, score, grad)
    for (_, gradient), (_, slope, sums) in zip(programs, results, strict=True):
        assert gradient is not None
        want, totals = reference.gradients(gradient, captures(), score=score, grad=grad, **EXTENTS)
        np.testing.assert_allclose(slope, want, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(sums, totals[0], rtol=2e-4, atol=1e-4)
    assert fault == 0


def test_an_index_outside_reads_nothing_and_sets_the_flag(place: Place) -> None:
    score = scores()
    for index, expected in (("int 4", 0), ("int -5", 0), ("int 5", 1), ("int -6", 1), (f"int {2**62}", 1)):
        text = single("add 0 3", "score", index, "gather 1 1", "to_float 2")
        results, fault = run(place, [(text, None)], score, score)
        assert fault == expected
        if expected:
            np.testing.assert_array_equal(results[0][0], score.astype(np.float32))
    text = single("add 0 4", "score", "key", "int 0", "floor_div 1 2", "to_float 3")
    results, fault = run(place, [(text, None)], score, score)
    assert fault == 2
    np.testing.assert_array_equal(results[0][0], score.astype(np.float32))


def test_equal_programs_give_equal_text() -> None:
    text = _Tree(5).text(3)
    one, two = render(text, DTYPES, None, ()), render(text + "", tuple(DTYPES), None, ())
    assert one == two and one.text == two.text
    assert render(text, ("bfloat16", *DTYPES[1:]), None, ()).digest != one.digest or "gather 0" not in text
    assert render(None, (), None, ()) is NO_MOD


def test_small_integers_stay_in_32_bits() -> None:
    nodes = ("query", "key", "sub 0 1", "int 128", "floor_div 2 3", "int 4096", "mul 0 5", "mul 6 1", "ge 4 7")
    text = "\n".join(("tilewise-expr 1 mask", *nodes, "return 8")) + "\n"
    lines = [line.strip() for line in render(None, (), text, ()).text.splitlines()]
    assert "const i32 v2 = v0 - v1;" in lines
    assert "const i32 v4 = expr::floor_divide<i32>(v2, v3, captures.fault);" in lines
    assert any(line.startswith("const i64 v6 = expr::multiply(") for line in lines)  # 2^30 * 2^12


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"expected 'tilewise-expr 1 score\|mask\|gradient'"):
        parse("tilewise-expr 2 score\nscore\nreturn 0\n")
    with pytest.raises(ArgumentError, match="expected a line 'return N'"):
        parse("tilewise-expr 1 score\nscore\n")
    text = single("gather 3")
    with pytest.raises(ArgumentError, match="score_mod: the program captures 4 arrays, got 1"):
        render(text, ("float32",), None, ())
    with pytest.raises(DtypeError, match=r"score_mod: capture 1 is int: expected one of int8, .*, got float32"):
        render(text, ("float32", "float32", "bool", "float16"), None, ())
    assert ml_dtypes.bfloat16  # the type that NumPy lacks is among the floats
