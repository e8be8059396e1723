"""The expr room: program texts against their NumPy meaning, on every level, in both orientations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tilewise import _core, reference
from tilewise.errors import ArgumentError, DtypeError, ShapeError
from tilewise.testing import assert_within_budget, force_threads

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
    captures = [np.asarray(c + 1e-3 * rng.random(c.shape)) if c.dtype == np.float64 else c for c in captures]
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


HEAD = "tilewise-expr 1 mask\n"
WINDOW = HEAD + "query\nkey\nge 0 1\nsub 0 1\nint 9\nle 3 4\nand 2 5\nreturn 6\n"
DILATED = HEAD + "query\nkey\nsub 0 1\nabs 2\nint 3\nmod 3 4\nint 0\neq 5 6\nreturn 7\n"
PREFIX = HEAD + "capture int 1\nbatch\ngather 0 0\nquery\nkey\nlt 3 1\nge 2 3\nor 4 5\nreturn 6\n"
BY_BLOCK = HEAD + "head\nquery\nkey\nint 8\nfloor_div 1 3\nfloor_div 2 3\nsub 4 5\neq 6 0\nreturn 7\n"
FLOAT = HEAD + "query\nkey\nto_float 0\nto_float 1\nfloat 0.37\nmul 2 4\nsqrt 3\nlt 6 5\nreturn 7\n"
CAPTURED = HEAD + "capture bool 2\nquery\nkey\ngather 0 0 1\nreturn 2\n"


def dense_lists(mask: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks have some and which have all of their elements; beyond the edge nothing is attended."""
    padded = np.pad(mask, [(0, 0), (0, 0), *((0, -n % b) for n, b in zip(mask.shape[2:], block, strict=True))])
    b, h, q, k = padded.shape
    blocks = padded.reshape(b, h, q // block[0], block[0], k // block[1], block[1])
    return blocks.any((3, 5)), blocks.all((3, 5))


def assert_lists(count: np.ndarray, indices: np.ndarray, expected: np.ndarray) -> None:
    """Ascending numbers of the expected blocks, then -1."""
    assert np.array_equal(count, expected.sum(-1))
    place = np.where(expected, np.arange(expected.shape[-1]), np.iinfo(np.int32).max)
    order = np.sort(place, axis=-1)
    assert np.array_equal(indices, np.where(order == np.iinfo(np.int32).max, -1, order))


def lists_of(text: str, captures: Any, block: tuple[int, int], **extents: int) -> list[np.ndarray]:
    nq, nk = -(-extents["queries"] // block[0]), -(-extents["keys"] // block[1])
    lead = (extents["batch"], extents["heads"], nq)
    out = [np.full(lead + tail, -7, np.int32) for tail in ((), (nk,), (), (nk,))]
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    sizes = {"query_block": block[0], "key_block": block[1]}
    _core.block_mask(text, captures, **extents, **sizes, **dict(zip(names, out, strict=True)))
    return out


@pytest.mark.parametrize("block", [(16, 16), (8, 32), (5, 7), (1, 1), (128, 128)])
@pytest.mark.parametrize(
    ("text", "captures"),
    [
        (CAUSAL_DOCUMENTS, [np.sort(np.random.default_rng(0).integers(0, 6, (2, 70)), axis=1)]),
        (WINDOW, []),
        (DILATED, []),
        (PREFIX, [np.array([11, 40])]),
        (BY_BLOCK, []),
        (FLOAT, []),
        (CAPTURED, [np.random.default_rng(1).random((70, 61)) < 0.02]),
    ],
    ids=["causal documents", "window", "dilated", "prefix", "by block", "float", "captured"],
)
def test_block_masks_are_confirmed_by_enumeration(text: str, captures: Any, block: tuple[int, int]) -> None:
    extents = {"batch": 2, "heads": 2, "queries": 70, "keys": 61}
    mask = reference.expr.evaluate(text, captures, dtype=np.float32, **extents)
    some, every = dense_lists(mask, block)
    count, indices, full_count, full_indices = lists_of(_core.expr_simplify(text), captures, block, **extents)
    assert_lists(full_count, full_indices, every)
    assert_lists(count, indices, some & ~every)
    out = [np.full(shape, -7, np.int32) for shape in (indices.shape[:2] + indices.shape[3:], indices.mT.shape)]
    _core.block_mask_transpose(count, indices, *out)
    assert_lists(out[0], out[1], (some & ~every).mT)


@pytest.mark.parametrize("seed", range(40))
def test_verdicts_of_random_masks_are_confirmed_by_enumeration(seed: int) -> None:
    text = _core.expr_simplify(Trees(seed + 1000, "mask").text(4 + seed % 25))
    captures = captures_of()
    mask = reference.expr.evaluate(text, captures, dtype=np.float32, **EXTENTS)
    for block in ((4, 4), (16, 8), (37, 21)):
        some, every = dense_lists(mask, block)
        count, indices, full_count, full_indices = lists_of(text, captures, block, **EXTENTS)
        assert_lists(full_count, full_indices, every)
        assert_lists(count, indices, some & ~every)


ONE = {"batch": 1, "heads": 1, "queries": 3, "keys": 5}
MALFORMED = [
    ("", 1, "tilewise-expr 1"),
    ("tilewise-expr 2 score\nscore\nreturn 0", 1, "tilewise-expr 1"),
    ("tilewise-expr 1 block\nscore\nreturn 0", 1, "score|mask|gradient"),
    ("tilewise-expr 1 score extra\nscore\nreturn 0", 1, "tilewise-expr 1"),
    ("tilewise-expr 1 score\nscore\n", 3, "return"),
    ("tilewise-expr 1 score\nreturn 0", 2, "first node"),
    ("tilewise-expr 1 score\nscore\nreturn 1", 3, "0 to 0"),
    ("tilewise-expr 1 score\nscore\nreturn -1", 3, "numbers of nodes"),
    ("tilewise-expr 1 score\nscore\nreturn", 3, "return N"),
    ("tilewise-expr 1 score\nscore\nreturn 0\nscore", 4, "after return"),
    ("tilewise-expr 1 score\nquery\nreturn 0", 3, "to_float"),
    ("tilewise-expr 1 mask\nquery\nreturn 0", 3, "to_bool"),
    ("tilewise-expr 1 mask\nscore\nto_bool 0\nreturn 1", 2, "batch, head, query, key"),
    ("tilewise-expr 1 score\ngrad\nreturn 0", 2, "batch, head, query, key"),
    ("tilewise-expr 1 score\nscore\nfrobnicate 0\nreturn 1", 3, "atan2"),
    ("tilewise-expr 1 score\nscore\nexp\nreturn 1", 3, "exp A"),
    ("tilewise-expr 1 score\nscore\nexp 0 0\nreturn 1", 3, "exp A"),
    ("tilewise-expr 1 score\nscore\nquery\nadd 0 1\nreturn 2", 4, "add(float, int)"),
    ("tilewise-expr 1 score\nscore\nnot 0\nreturn 0", 3, "not(bool)"),
    ("tilewise-expr 1 score\nscore\nadd 0 1\nreturn 0", 3, "0 to 0"),
    ("tilewise-expr 1 score\nscore 3\nreturn 0", 2, "score"),
    ("tilewise-expr 1 score\nfloat one\nreturn 0", 2, "decimal"),
    ("tilewise-expr 1 score\nfloat\nreturn 0", 2, "float X"),
    ("tilewise-expr 1 score\nint 1.5\nreturn 0", 2, "64-bit integer"),
    ("tilewise-expr 1 score\nint 9223372036854775808\nreturn 0", 2, "64-bit integer"),
    ("tilewise-expr 1 mask\nbool 2\nreturn 0", 2, "0 or 1"),
    ("tilewise-expr 1 mask\nbool yes\nreturn 0", 2, "0 or 1"),
    ("tilewise-expr 1 score\ncapture text 1\nscore\nreturn 0", 2, "float, int or bool"),
    ("tilewise-expr 1 score\ncapture float\nscore\nreturn 0", 2, "capture CLASS RANK"),
    ("tilewise-expr 1 score\ncapture float 99\nscore\nreturn 0", 2, "rank"),
    ("tilewise-expr 1 score\nscore\ncapture float 1\nreturn 0", 3, "captures before nodes"),
    ("tilewise-expr 1 score\nscore\ngather 0\nreturn 0", 3, "captures"),
    ("tilewise-expr 1 score\ncapture float 1\nscore\ngather 0\nreturn 0", 4, "1 indices"),
    ("tilewise-expr 1 score\ncapture float 1\nscore\ngather\nreturn 0", 4, "gather CAPTURE"),
    ("tilewise-expr 1 score\ncapture float 1\nscore\ngather 0 0\nreturn 0", 4, "int"),
    ("tilewise-expr 1 score\ncapture float 0\nscore\nreturn 0\nscatter 0 0", 5, "gradient programs alone"),
    ("tilewise-expr 1 gradient\ncapture int 0\ngrad\nreturn 0\nscatter 0 0", 5, "float capture"),
    ("tilewise-expr 1 gradient\ncapture float 0\ngrad\nscatter 0 0\nreturn 0", 4, "after 'return'"),
    ("tilewise-expr 1 gradient\ncapture float 1\ngrad\nreturn 0\nscatter 0 0", 5, "1 indices"),
    ("tilewise-expr 1 score\nscore\nadd 0 18446744073709551616\nreturn 0", 3, "numbers of nodes"),
    ("tilewise-expr 1 score\nscor\u00e9\nreturn 0", 2, "operation"),
]


@pytest.mark.parametrize(("text", "line", "what"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_texts_name_their_line(text: str, line: int, what: str) -> None:
    for function in (_core.expr_check, _core.expr_simplify, _core.expr_gradient):
        with pytest.raises(ArgumentError) as error:
            function(text)
        assert f"line {line}:" in str(error.value)
        assert what in str(error.value)


def test_damaged_texts_are_refused_or_read(isa: str) -> None:
    rng = np.random.default_rng(3)
    words = [
        "0",
        "1",
        "-1",
        "999",
        "score",
        "gather",
        "where",
        "nan",
        "capture",
        "return",
        "#",
        "\n",
        "\t",
        "é",
        "1e999",
    ]
    read = 0
    for trial in range(400):
        text = list(Trees(trial % 7, "score").text(6))
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(0, len(text)))
            if rng.random() < 0.5:
                text[place] = str(rng.choice(words))
            else:
                del text[place]
        damaged = "".join(text)
        try:
            _core.expr_check(damaged)
        except ArgumentError:
            continue
        read += 1
        simple = _core.expr_simplify(damaged)
        assert _core.expr_simplify(simple) == simple
        _core.expr_gradient(damaged)
    assert read > 5


def test_texts_survive_comments_and_deep_chains() -> None:
    _core.expr_check("\n# a mask\ntilewise-expr 1 mask # kind\n\n query\nkey\n ge 0 1 # causal\nreturn 2\n\n")
    lines = ["score", *(f"sin {i}" for i in range(20000))]
    deep = "tilewise-expr 1 score\n" + "\n".join(lines) + "\nreturn 20000\n"
    assert _core.expr_simplify(deep) == deep
    _core.expr_gradient(deep)
    with pytest.raises(ArgumentError, match="at most"):
        _core.expr_check("tilewise-expr 1 score\n" + "score\n" * 70000 + "return 0\n")


SIMPLER = [
    ("query\nint 0\nadd 0 1\nkey\nge 2 3\nreturn 4", "key\nquery\nle 0 1\nreturn 2"),
    ("key\nquery\nlt 1 0\nnot 2\nreturn 3", "key\nquery\nle 0 1\nreturn 2"),
    ("query\nkey\nge 0 1\nbool 1\nand 2 3\nnot 4\nnot 5\nreturn 6", "key\nquery\nle 0 1\nreturn 2"),
    ("query\nkey\nge 0 1\nge 0 1\nor 2 3\nreturn 4", "key\nquery\nle 0 1\nreturn 2"),
    ("query\nkey\nle 1 0\nbool 1\nbool 0\nwhere 2 3 4\nreturn 5", "key\nquery\nle 0 1\nreturn 2"),
    ("query\nkey\nge 0 1\nnot 2\nor 2 3\nreturn 4", "bool 1\nreturn 0"),
    ("query\nint 64\nfloor_div 0 1\nint 5\neq 2 3\nreturn 4", "query\nint 6\nshr 0 1\nint 5\neq 2 3\nreturn 4"),
    ("query\nint 64\nmod 0 1\nint 5\nlt 2 3\nreturn 4", "query\nint 63\nand 0 1\nint 5\nlt 2 3\nreturn 4"),
    ("int 3\nint 4\nmul 0 1\nint 12\neq 2 3\nreturn 4", "bool 1\nreturn 0"),
    ("query\nkey\nsub 0 1\nint 1\nsub 2 3\nint 2\nadd 4 5\nint 0\nlt 6 7\nreturn 8", None),
]


@pytest.mark.parametrize(("before", "after"), SIMPLER, ids=range(len(SIMPLER)))
def test_simplified_masks(before: str, after: str | None) -> None:
    simple = _core.expr_simplify(HEAD + before)
    if after is None:
        # The constants of a sum are one.
        assert simple.count("int ") == 2
    else:
        assert simple.split() == (HEAD + after).split()


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("score\nfloat 0.0\nmul 0 1\nreturn 2", "mul"),  # NaN and infinities
        ("score\nscore\nsub 0 1\nreturn 2", "sub"),
        ("score\nfloat 0.0\nadd 0 1\nreturn 2", "add"),  # -0
        ("score\nfloat 3.0\ndiv 0 1\nreturn 2", "div"),  # 1/3 is not exact
        ("score\nscore\neq 0 1\nfloat 1.0\nwhere 2 0 3\nreturn 4", "eq"),  # NaN
        ("score\nfloat 1.0\nlt 0 1\nnot 2\nfloat 2.0\nwhere 3 0 4\nreturn 5", "lt"),
    ],
)
def test_what_floats_forbid_is_not_simplified(before: str, kept: str) -> None:
    text = "tilewise-expr 1 score\n" + before
    simple = _core.expr_simplify(text)
    assert f"\n{kept} " in simple
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e300, -1e-300, 3.5] * 2).reshape(1, 1, 4, 4)
    extents = {"batch": 1, "heads": 1, "queries": 4, "keys": 4}
    truth = reference.expr.evaluate(text, score=odd, **extents)
    got = run(simple, score=odd, **extents)
    assert np.array_equal(got, truth, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(truth)) or np.isnan(truth).any()


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_captures_of_every_float_type_and_layout(isa: str, dtype: Any) -> None:
    text = "tilewise-expr 1 score\ncapture float 2\nscore\nhead\nkey\ngather 0 1 2\nquery\ngather 0 1 4\n"
    text += "add 3 5\nadd 0 6\nreturn 7\n"
    extents = {"batch": 1, "heads": 4, "queries": 9, "keys": 9}
    base = (np.random.default_rng(2).integers(-64, 64, (8, 18)) / 8).astype(dtype)
    views = [base[:4, :9].copy(), base[:4, :9], base[::2, ::2], base[3::-1, 8::-1], base.T[:4, :8:1][:, :8]]
    views = [view for view in views if view.shape == (4, 9)]
    views += [np.broadcast_to(base[0, :9], (4, 9)), np.broadcast_to(base[:4, :1], (4, 9)), base[:4, :9].T.copy().T]
    score = scores_of(np.float32, extents)
    for view in views:
        truth = reference.expr.evaluate(text, [view.astype(np.float64)], score=score, **extents)
        array = torch.from_numpy(view.astype(np.float32)).to(torch.bfloat16) if dtype == ml_dtypes.bfloat16 else view
        for lanes in ("queries", "keys"):
            assert np.array_equal(run(text, [array], dtype=np.float32, score=score, lanes=lanes, **extents), truth)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, np.bool_])
def test_captures_of_every_integer_type_and_layout(isa: str, dtype: Any) -> None:
    cls = "bool" if dtype == np.bool_ else "int"
    text = f"tilewise-expr 1 mask\ncapture {cls} 2\nbatch\nkey\ngather 0 0 1\nquery\ngather 0 0 3\neq 2 4\nreturn 5\n"
    direct = f"tilewise-expr 1 mask\ncapture {cls} 2\nquery\nkey\ngather 0 0 1\nto_bool 2\nreturn 3\n"
    direct = direct.replace("to_bool 2\nreturn 3", "return 2") if cls == "bool" else direct
    base = np.random.default_rng(4).integers(-2, 2, (26, 26)).astype(dtype)
    for view in (base[:13, :13], base[::2, ::2], base[12::-1, 12::-1], np.broadcast_to(base[3, :13], (13, 13))):
        extents = {"batch": 2, "heads": 1, "queries": 13, "keys": 13}
        for program in (text, direct):
            truth = reference.expr.evaluate(program, [view], **extents)
            for lanes in ("queries", "keys"):
                assert np.array_equal(run(program, [view], lanes=lanes, **extents), truth)


def test_large_integers_keep_64_bits(isa: str) -> None:
    big = np.array([1 << 40, (1 << 40) + 1, -(1 << 62), np.iinfo(np.int64).max, np.iinfo(np.int64).min])
    for op in ("add", "sub", "mul", "min", "max", "xor"):
        text = f"{HEAD}capture int 1\nkey\ngather 0 0\nquery\n{op} 1 2\nint 7\nmod 3 4\nint 3\nlt 5 6\nreturn 7\n"
        extents = {**ONE, "queries": 5}
        for program in (text, _core.expr_simplify(text)):
            assert np.array_equal(run(program, [big], **extents), reference.expr.evaluate(text, [big], **extents))


def test_indices_that_leave_their_capture_are_an_error(isa: str) -> None:
    text = "tilewise-expr 1 score\ncapture float 1\nscore\nquery\nkey\nsub 1 2\ngather 0 3\nadd 0 4\nreturn 5\n"
    table = np.arange(9.0)
    # -4 .. 2 wraps once.
    truth = reference.expr.evaluate(text, [table], **ONE)
    assert np.array_equal(run(text, [table], **ONE), truth)
    for lanes in ("queries", "keys"):
        with pytest.raises(ArgumentError, match=r"-4 in capture0\[\(query - key\)\].*clamp"):
            run(text, [table[:3]], lanes=lanes, **ONE)
        # By row, by lane, by both sides, of a matrix.
        for index, rank in (("1", 1), ("2", 1), ("1 2", 2), ("2 1", 2)):
            program = f"tilewise-expr 1 score\ncapture float {rank}\nscore\nquery\nkey\ngather 0 {index}\nreturn 3\n"
            with pytest.raises(ArgumentError, match="indices of capture 0 below 2 on axis 0"):
                run(program, [np.zeros((2, 9)[:rank])], lanes=lanes, **ONE)
            run(program, [np.zeros((5, 5)[:rank])], lanes=lanes, **ONE)
            with pytest.raises(ArgumentError, match="below 0"):
                run(program, [np.zeros((0, 9)[:rank])], lanes=lanes, **ONE)
        gradient = _core.expr_gradient(text)
        with pytest.raises(ArgumentError, match="indices of capture 0"):
            run(gradient, [table[:3]], grad=np.ones((1, 1, 3, 5)), grad_captures=[np.zeros(3)], lanes=lanes, **ONE)
    mask = f"{HEAD}capture int 1\nquery\nkey\ngather 0 0\ngather 0 1\neq 2 3\nreturn 4\n"
    with pytest.raises(ArgumentError, match=r"mask_mod: .*indices of capture 0 below 4"):
        lists_of(mask, [np.arange(4)], (2, 2), **ONE)
    with pytest.raises(ArgumentError, match="divisors other than 0"):
        run(f"{HEAD}query\nkey\nmod 0 1\nint 0\neq 2 3\nreturn 4\n", **ONE)
    with pytest.raises(ArgumentError, match="divisors other than 0"):
        run(f"{HEAD}query\nint 0\nfloor_div 0 1\nint 0\neq 2 3\nreturn 4\n", **ONE)


def test_captures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match="1 arrays"):
        run(ALIBI)
    with pytest.raises(ShapeError, match="program, capture 0: expected rank 1"):
        run(ALIBI, [np.ones((3, 3))])
    with pytest.raises(DtypeError, match="program, capture 0: expected dtype float32"):
        run(ALIBI, [np.ones(3, np.int64)])
    with pytest.raises(DtypeError, match="int64"):
        run(CAUSAL_DOCUMENTS, [np.ones((2, 37))])
    with pytest.raises(ArgumentError, match="lanes"):
        run(SOFTCAP, lanes="both")
    with pytest.raises(ShapeError, match="score"):
        run(SOFTCAP, score=np.zeros((1, 1, 1, 1)))
    with pytest.raises(ArgumentError, match="a score program"):
        _core.expr_gradient(CAUSAL_DOCUMENTS)
    with pytest.raises(ArgumentError, match="query_block"):
        _core.block_mask(
            WINDOW, [], **ONE, query_block=0, key_block=4, **dict.fromkeys(
                ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"), np.zeros(1, np.int32)
            )
        )  # fmt: skip


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty_extents(isa: str, empty: str) -> None:
    extents = {**EXTENTS, empty: 0}
    assert run(SOFTCAP, score=np.zeros(tuple(extents.values())), **extents).size == 0
    assert run(CAUSAL_DOCUMENTS, [np.zeros((2, 37), np.int64)], **extents).size == 0
    count, indices, full, _ = lists_of(CAUSAL_DOCUMENTS, [np.zeros((2, 37), np.int64)], (8, 8), **extents)
    assert count.sum() == 0
    assert full.sum() == 0
    assert (indices == -1).all()


def test_transposing_wrong_lists_is_refused() -> None:
    count, indices = np.array([1, 2], np.int32), np.array([[0, -1, -1], [0, 2, -1]], np.int32)
    out = [np.zeros(3, np.int32), np.zeros((3, 2), np.int32)]
    _core.block_mask_transpose(count, indices, *out)
    assert out[0].tolist() == [2, 0, 1]
    assert out[1].tolist() == [[0, 1], [-1, -1], [1, -1]]
    with pytest.raises(ArgumentError, match="counts of 0 to 3"):
        _core.block_mask_transpose(np.array([1, 4], np.int32), indices, *out)
    with pytest.raises(ArgumentError, match="block numbers of 0 to 2"):
        _core.block_mask_transpose(np.array([2, 2], np.int32), indices, *out)
    with pytest.raises(ShapeError, match="out indices"):
        _core.block_mask_transpose(count, indices, out[0], np.zeros((2, 3), np.int32))


# Functions by name, the torch function they mean, and scores where the conventions of autograd decide.
TORCH: dict[str, Any] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "relu": torch.relu,
    "square": torch.square,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "atan2": torch.atan2,
    "pow": torch.pow,
    "mod": torch.remainder,
    "floor_div": torch.floor_divide,
}
ODD_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 7.25, -7.25, 1e-8, 40.0, -90.0, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_values_and_slopes_are_those_of_torch(isa: str, name: str, dtype: Any) -> None:
    function = TORCH[name]
    binary = name in TORCH and name in ["add", "sub", "mul", "div", "min", "max", "atan2", "pow", "mod", "floor_div"]
    count = len(ODD_FLOATS)
    extents = {"batch": 1, "heads": 1, "queries": count, "keys": count}
    x, y = np.meshgrid(np.array(ODD_FLOATS, dtype), np.array(ODD_FLOATS, dtype), indexing="ij")
    text = "tilewise-expr 1 score\ncapture float 2\nscore\nquery\nkey\ngather 0 1 2\n"
    text += f"{name} 0 3\nreturn 4\n" if binary else f"{name} 0\nreturn 4\n"
    a, b = (torch.from_numpy(v.copy()).requires_grad_() for v in (x, y))
    truth = function(a, b) if binary else function(a)
    eps = float(np.finfo(dtype).eps)
    got = run(text, [y], dtype=dtype, score=x[None, None], **extents)[0, 0]
    # Where torch's sigmoid overflows and says 0, a subnormal number is nearer the truth.
    np.testing.assert_allclose(got, truth.detach().numpy(), rtol=8 * eps, atol=np.finfo(dtype).tiny)
    # -0 is -0 where IEEE says so.
    zero = (got == 0) & (truth.detach().numpy() == 0) & (np.array(name not in ("min", "max", "mod", "floor_div")))
    assert np.array_equal(np.signbit(got)[zero], np.signbit(truth.detach().numpy())[zero])
    if name in ("floor_div",) or not truth.requires_grad:
        return
    truth.sum().backward()
    gradient, total = _core.expr_gradient(text), np.zeros_like(y)
    slope = run(
        gradient,
        [y],
        dtype=dtype,
        score=x[None, None],
        grad=np.ones_like(x)[None, None],
        grad_captures=[total],
        **extents,
    )[0, 0]
    assert a.grad is not None
    # Where torch's value is not finite, its formula for the slope may differ from another equal one.
    fine = np.isfinite(truth.detach().numpy()) & np.isfinite(x) & np.isfinite(y if binary else x)
    # 1 - tanh^2 loses digits where it is small, in torch as here.
    np.testing.assert_allclose(slope[fine], a.grad.numpy()[fine], rtol=64 * eps, atol=8 * eps)
    if binary:
        assert b.grad is not None
        np.testing.assert_allclose(total[fine], b.grad.numpy()[fine], rtol=64 * eps, atol=8 * eps)


def test_nan_goes_where_it_should(isa: str) -> None:
    nan = np.full((1, 1, 3, 5), np.nan)
    for text, expected in [
        ("score\nfloat 1.0\nmax 0 1\nreturn 2", np.nan),
        ("score\nfloat 1.0\nmin 1 0\nreturn 2", np.nan),
        ("score\nrelu 0\nreturn 1", np.nan),
        ("score\nfloat 1.0\nlt 0 1\nto_float 2\nreturn 3", 0.0),
        ("score\nscore\neq 0 1\nto_float 2\nreturn 3", 0.0),
        ("score\nscore\nne 0 1\nto_float 2\nreturn 3", 1.0),
        ("score\nto_bool 0\nto_float 1\nreturn 2", 1.0),
        ("score\nto_int 0\nto_float 1\nreturn 2", 0.0),
        ("score\nfloat 2.0\nbool 1\nwhere 2 1 0\nreturn 3", 2.0),
        ("score\nfloat nan\nadd 0 1\nfloat -inf\nmul 2 3\nreturn 4", np.nan),
    ]:
        program = "tilewise-expr 1 score\n" + text
        for dtype in (np.float32, np.float64):
            for form in (program, _core.expr_simplify(program)):
                got = run(form, dtype=dtype, score=nan.astype(dtype), **ONE)
                assert np.array_equal(got, np.full_like(got, expected), equal_nan=True), text


@pytest.mark.parametrize("queries", [1, 2, 15, 17, 127, 130])
@pytest.mark.parametrize("keys", [1, 3, 16, 131, 257])
def test_odd_sizes_in_single_precision(isa: str, queries: int, keys: int) -> None:
    extents = {"batch": 2, "heads": 3, "queries": queries, "keys": keys}
    score = np.random.default_rng(0).standard_normal((2, 3, queries, keys)).astype(np.float32) * 30
    slopes = np.array([0.5, 0.25, 0.125], np.float32)
    for text, captures in ((ALIBI, [slopes]), (SOFTCAP, [])):
        truth = reference.expr.evaluate(text, captures, score=score, **extents)
        plain = reference.expr.evaluate(text, captures, score=score, dtype=np.float32, **extents)
        for lanes in ("queries", "keys"):
            got = run(_core.expr_simplify(text), captures, dtype=np.float32, score=score, lanes=lanes, **extents)
            assert_within_budget(got, truth, plain)


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_in_single_precision(isa: str, seed: int) -> None:
    text = smooth_text(seed)
    captures = [*captures_of(np.float32), np.array(0.375, np.float32)]
    score = (scores_of(np.float32) / 4).astype(np.float32)
    truth = reference.expr.evaluate(text, captures, score=score, **EXTENTS)
    plain = reference.expr.evaluate(text, captures, score=score, dtype=np.float32, **EXTENTS)
    for lanes in ("queries", "keys"):
        got = run(_core.expr_simplify(text), captures, dtype=np.float32, score=score, lanes=lanes, **EXTENTS)
        assert_within_budget(got, truth, plain, floor=1e-6 * float(np.abs(truth).max()))


def test_threads_do_not_change_gradients() -> None:
    gradient = _core.expr_gradient(ALIBI)
    extents = {"batch": 2, "heads": 3, "queries": 300, "keys": 200}
    score, grad = (np.random.default_rng(i).standard_normal((2, 3, 300, 200)).astype(np.float32) for i in (0, 1))
    results = []
    for threads in (1, 2, 5):
        with force_threads(threads):
            sums = np.empty(3, np.float32)
            by_score = run(
                gradient, [np.ones(3)], dtype=np.float32, score=score, grad=grad, grad_captures=[sums], **extents
            )
            results.append((by_score, sums))
    for by_score, sums in results[1:]:
        assert np.array_equal(by_score, results[0][0])
        assert np.array_equal(sums, results[0][1])
