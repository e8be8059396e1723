"""Programs (score_mod, mask_mod) as CUDA functions: the renderer of the room ``expr``.

A program is text, one node a line (:mod:`tilewise.expr`). :func:`render` writes the struct that kernels take as their
mod (``cuda/expr.cuh``): a function per program, each node one constant, and the captured arrays as a kernel argument.
Equal programs over captures of equal types give equal text, so the cache of cubins finds them.

Integers are 64 bits wide. A node whose value provably fits into 32 bits, from the ranges of indices and of its
operands, is computed there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewise.cuda.launch import DeviceArray
from tilewise.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["Capture", "Mod", "Program", "capture_argument", "parse", "render"]

# What a capture's elements are in C, and the range of its integers.
_ELEMENTS = {
    "float": {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "double"},
    "int": {
        "int8": "signed char",
        "uint8": "unsigned char",
        "int16": "short",
        "int32": "int",
        "int64": "long long",
    },
    "bool": {"bool": "unsigned char"},
}
_SMALL, _WIDE = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)
_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1), "int32": _SMALL, "int64": _WIDE}
# Indices are positions within a sequence, or numbers of heads and sequences: the host refuses larger ones.
_INDEX_RANGES = {"batch": (0, 2**31 - 1), "head": (0, 2**31 - 1), "query": (0, 2**30), "key": (0, 2**30)}


@dataclass(frozen=True)
class Capture:
    """One line ``capture CLASS RANK``."""

    kind: str
    rank: int


@dataclass(frozen=True)
class Program:
    """A parsed program. A node is its operation and its words, as in the text."""

    kind: str
    captures: tuple[Capture, ...]
    nodes: tuple[tuple[str, tuple[str, ...]], ...]
    result: int
    scatters: tuple[tuple[int, int, tuple[int, ...]], ...]


def parse(text: str) -> Program:
    """Take a program's text apart.

    The text is the core's own output or has passed ``_core.expr_check``; this only reads it.

    Raises:
        ArgumentError: a line that is none.

    Example:
        >>> parse("tilewise-expr 1 mask\\nquery\\nkey\\nge 0 1\\nreturn 2\\n").nodes
        (('query', ()), ('key', ()), ('ge', ('0', '1')))
    """
    stripped = (line.split("#")[0].strip() for line in text.splitlines())
    first, *lines = [line for line in stripped if line]
    head = first.split()
    if len(head) != 3 or head[:2] != ["tilewise-expr", "1"] or head[2] not in ("score", "mask", "gradient"):
        raise ArgumentError(f"program: expected 'tilewise-expr 1 score|mask|gradient', got {first!r}")
    captures, nodes, scatters, result = [], [], [], None
    for line in lines:
        word, *rest = line.split()
        if word == "capture":
            captures.append(Capture(rest[0], int(rest[1])))
        elif word == "return":
            result = int(rest[0])
        elif word == "scatter":
            scatters.append((int(rest[0]), int(rest[1]), tuple(map(int, rest[2:]))))
        else:
            nodes.append((word, tuple(rest)))
    if result is None:
        raise ArgumentError("program: expected a line 'return N', got none")
    return Program(head[2], tuple(captures), tuple(nodes), result, tuple(scatters))


@dataclass(frozen=True)
class _Value:
    """A node in C: its name, its class, and the range of an integer."""

    name: str
    kind: str
    low: int = 0
    high: int = 0

    @property
    def type(self) -> str:
        if self.kind == "int":
            return "i32" if self.small else "i64"
        return "f32" if self.kind == "float" else "bool"

    @property
    def small(self) -> bool:
        return _SMALL[0] <= self.low and self.high <= _SMALL[1]

    @property
    def wide(self) -> str:
        """Spelt as an i64."""
        return f"static_cast<i64>({self.name})" if self.small else self.name


_FLOAT_UNARY = {
    "neg": "-{0}", "abs": "fabsf({0})", "sign": "expr::sign({0})", "floor": "floorf({0})", "ceil": "ceilf({0})",
    "round": "rintf({0})", "trunc": "truncf({0})", "sqrt": "sqrtf({0})", "rsqrt": "1.0f / sqrtf({0})",
    "reciprocal": "1.0f / {0}", "exp": "expf({0})", "exp2": "exp2f({0})", "expm1": "expm1f({0})", "log": "logf({0})",
    "log2": "log2f({0})", "log1p": "log1pf({0})", "sin": "sinf({0})", "cos": "cosf({0})", "tan": "tanf({0})",
    "tanh": "tanhf({0})", "sigmoid": "expr::sigmoid({0})", "erf": "erff({0})", "relu": "expr::relu({0})",
    "square": "{0} * {0}",
}  # fmt: skip
_FLOAT_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "min": "expr::smaller({0}, {1})",
    "max": "expr::larger({0}, {1})", "atan2": "atan2f({0}, {1})", "pow": "powf({0}, {1})",
    "floor_div": "expr::floor_divide({0}, {1})", "mod": "expr::modulo({0}, {1})",
}  # fmt: skip
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_BOOL_BINARY = {"and": "&&", "or": "||", "xor": "!="}
_BITS = {"and": "&", "or": "|", "xor": "^"}
_WRAPPING = {"add": "expr::add", "sub": "expr::subtract", "mul": "expr::multiply"}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}
_DIVISIONS = {"floor_div": "expr::floor_divide", "mod": "expr::modulo", "trunc_div": "expr::truncating_divide"}


def _corners(operation: Callable[[int, int], int], a: _Value, b: _Value) -> tuple[int, int]:
    found = [operation(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(found), max(found)


def _fits(low: int, high: int) -> tuple[int, int]:
    """A range, or all of 64 bits where the operation may wrap."""
    return (low, high) if _WIDE[0] <= low and high <= _WIDE[1] else _WIDE


class _Writer:
    """Statements of one function."""

    def __init__(self, captures: str, dtypes: Sequence[str]) -> None:
        self.captures, self.dtypes = captures, dtypes
        self.lines: list[str] = []
        self.values: list[_Value] = []

    def node(self, program: Program, operation: str, words: tuple[str, ...]) -> None:
        name = f"v{len(self.values)}"
        value, text = self._meaning(name, program, operation, words)
        if text is not None:
            self.lines.append(f"const {value.type} {name} = {text};")
        self.values.append(value)

    def _meaning(
        self, name: str, program: Program, operation: str, words: tuple[str, ...]
    ) -> tuple[_Value, str | None]:
        if operation in ("score", "grad"):
            return _Value(operation, "float"), None
        if operation in _INDEX_RANGES:
            value = _Value(name, "int", *_INDEX_RANGES[operation])
            return value, f"static_cast<i32>({operation})"
        if operation == "float":
            bits = int(np.float32(float(words[0])).view(np.uint32))
            return _Value(name, "float"), f"__uint_as_float(0x{bits:08x}u)"
        if operation == "int":
            number = int(words[0])
            if number == _WIDE[0]:  # C has no such literal
                return _Value(name, "int", number, number), "-9223372036854775807LL - 1"
            return _Value(name, "int", number, number), f"{number}{'' if abs(number) < 2**31 else 'LL'}"
        if operation == "bool":
            return _Value(name, "bool"), "true" if words[0] == "1" else "false"
        if operation == "gather":
            return self._gather(name, program, words)
        operands = [self.values[int(word)] for word in words]
        kinds = {operand.kind for operand in operands[-1:]}
        if operation == "where":
            c, a, b = operands
            return _Value(name, a.kind, min(a.low, b.low), max(a.high, b.high)), f"{c.name} ? {a.name} : {b.name}"
        if operation in _COMPARE:
            return _Value(name, "bool"), f"{operands[0].name} {_COMPARE[operation]} {operands[1].name}"
        if operation in ("to_float", "to_int", "to_bool"):
            return self._cast(name, operation, operands[0])
        if operation == "not":
            return _Value(name, "bool"), f"!{operands[0].name}"
        if "float" in kinds:
            table = _FLOAT_UNARY if len(operands) == 1 else _FLOAT_BINARY
            return _Value(name, "float"), table[operation].format(*(operand.name for operand in operands))
        if "bool" in kinds:
            return _Value(name, "bool"), f"{operands[0].name} {_BOOL_BINARY[operation]} {operands[1].name}"
        return self._integer(name, operation, operands)

    def _gather(self, name: str, program: Program, words: tuple[str, ...]) -> tuple[_Value, str]:
        number, *indices = map(int, words)
        kind, dtype = program.captures[number].kind, self.dtypes[number]
        low, high = _RANGES[dtype] if kind == "int" else (0, 0)
        arguments = ", ".join(
            (f"captures.{self.captures}{number}", "captures.fault", *(self.values[index].name for index in indices))
        )
        fetched = f"expr::gather<{_ELEMENTS[kind][dtype]}>({arguments})"
        value = _Value(name, kind, low, high)
        if value.type == "i32":
            return value, f"static_cast<i32>({fetched})"
        return value, f"expr::as_{kind}({fetched})"

    def _cast(self, name: str, operation: str, operand: _Value) -> tuple[_Value, str]:
        if operation == "to_float":
            if operand.kind == "bool":
                return _Value(name, "float"), f"{operand.name} ? 1.0f : 0.0f"
            return _Value(name, "float"), f"static_cast<f32>({operand.name})"
        if operation == "to_bool":
            if operand.kind == "bool":
                return _Value(name, "bool"), operand.name
            return _Value(name, "bool"), f"{operand.name} != 0"
        if operand.kind == "bool":
            return _Value(name, "int", 0, 1), f"{operand.name} ? 1 : 0"
        if operand.kind == "int":
            return _Value(name, "int", operand.low, operand.high), operand.name
        return _Value(name, "int", *_WIDE), f"expr::to_int({operand.name})"

    def _integer(self, name: str, operation: str, operands: list[_Value]) -> tuple[_Value, str]:
        a = operands[0]
        if len(operands) == 1:
            if operation == "sign":
                return _Value(name, "int", -1, 1), f"static_cast<i32>(expr::sign({a.wide}))"
            extremes = (a.low, a.high, -a.low, -a.high)
            low, high = (-a.high, -a.low) if operation == "neg" else (max(0, a.low, -a.high), max(extremes))
            if operation == "abs" and low > high:
                low = 0
            value = _Value(name, "int", *_fits(low, high))
            text = f"{'expr::negate' if operation == 'neg' else 'expr::absolute'}({a.wide})"
            if value.small and a.small:
                text = f"-{a.name}" if operation == "neg" else f"{a.name} < 0 ? -{a.name} : {a.name}"
            elif value.small:
                text = f"static_cast<i32>({text})"
            return value, text
        b = operands[1]
        both_small = a.small and b.small
        if operation in _WRAPPING:
            rule = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}[operation]
            value = _Value(name, "int", *_fits(*_corners(rule, a, b)))
            if both_small and value.small:
                return value, f"{a.name} {_SYMBOLS[operation]} {b.name}"
            text = f"{_WRAPPING[operation]}({a.wide}, {b.wide})"
            return value, f"static_cast<i32>({text})" if value.small else text
        if operation in ("min", "max"):
            pick = min if operation == "min" else max
            value = _Value(name, "int", pick(a.low, b.low), pick(a.high, b.high))
            sign = "<" if operation == "min" else ">"
            text = f"{a.name} {sign} {b.name} ? {a.name} : {b.name}"
            return value, f"static_cast<i32>({text})" if value.small and not both_small else text
        if operation in _DIVISIONS:
            size = max(abs(a.low), abs(a.high))
            if operation == "mod":
                bound = max(abs(b.low), abs(b.high), 1) - 1
                low, high = (0 if b.low >= 0 else -bound), (0 if b.high <= 0 else bound)
                value = _Value(name, "int", *_fits(low, high))
            else:
                value = _Value(name, "int", *_fits(0 if a.low >= 0 and b.low >= 0 else -size - 1, size))
            number = "i32" if both_small and value.small else "i64"
            x, y = (a.name, b.name) if number == "i32" else (a.wide, b.wide)
            text = f"{_DIVISIONS[operation]}<{number}>({x}, {y}, captures.fault)"
            return value, f"static_cast<i32>({text})" if value.small and number == "i64" else text
        if operation in _BITS:
            if both_small:
                return _Value(name, "int", *_SMALL), f"{a.name} {_BITS[operation]} {b.name}"
            return _Value(name, "int", *_WIDE), f"{a.wide} {_BITS[operation]} {b.wide}"
        if operation == "shl":
            return _Value(name, "int", *_WIDE), f"expr::shift_left({a.wide}, {b.wide})"
        if operation == "shr":
            value = _Value(
                name, "int", min(a.low, 0 if a.low >= 0 else a.low), max(a.high, -1 if a.high < 0 else a.high)
            )
            text = f"expr::shift_right({a.wide}, {b.wide})"
            return value, f"static_cast<i32>({text})" if value.small else text
        raise ArgumentError(f"program: {operation!r} is no operation of integers")


def _body(program: Program, captures: str, dtypes: Sequence[str]) -> list[str]:
    writer = _Writer(captures, dtypes)
    for operation, words in program.nodes:
        writer.node(program, operation, words)
    lines = writer.lines
    if program.scatters:
        lines.append("if (SCATTER) {")
        for number, value, indices in program.scatters:
            arguments = ", ".join(
                (
                    *(f"captures.{captures}{number}", "captures.fault", writer.values[value].name),
                    *(writer.values[index].name for index in indices),
                )
            )
            lines.append(f"    expr::scatter({arguments});")
        lines.append("}")
    return [*lines, f"return {writer.values[program.result].name};"]


_INDICES = "i64 batch, i64 head, i64 query, i64 key"


def _function(result: str, name: str, more: str, body: list[str], template: str = "") -> list[str]:
    parameters = f"const Captures& captures, {more}{_INDICES}"
    head = f"    {template}static __device__ __forceinline__ {result} {name}({parameters}) {{"
    return [head, *(f"        {line}" for line in body), "    }"]


@dataclass(frozen=True)
class Mod:
    """A rendered mod.

    Attributes:
        name: of the struct, qualified, as stubs name it.
        text: its definition; goes before a stub's macro. Empty for no program.
        digest: eight characters that stand for it in kernel names; empty for no program.
        captures: the captures of the score program, then those of the mask program.
    """

    name: str
    text: str
    digest: str
    captures: tuple[Capture, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The kernel argument ``Captures`` as NumPy lays it out."""
        fields: list[Any] = [("fault", np.uint64)]
        for number, capture in enumerate(self.captures):
            rank = max(capture.rank, 1)
            array = [
                ("data", np.uint64),
                ("sums", np.uint64),
                ("extent", np.int64, (rank,)),
                ("stride", np.int64, (rank,)),
            ]
            fields.append((f"array{number}", array))
        return np.dtype(fields, align=True)


NO_MOD = Mod("tilewise::NoMod", "", "", ())


def _check(program: Program, dtypes: Sequence[str], name: str) -> None:
    if len(dtypes) != len(program.captures):
        raise ArgumentError(f"{name}: the program captures {len(program.captures)} arrays, got {len(dtypes)}")
    for number, (capture, dtype) in enumerate(zip(program.captures, dtypes, strict=True)):
        if dtype not in _ELEMENTS[capture.kind]:
            allowed = ", ".join(_ELEMENTS[capture.kind])
            raise DtypeError(f"{name}: capture {number} is {capture.kind}: expected one of {allowed}, got {dtype}")


@functools.lru_cache(maxsize=256)
def render(
    score: str | None,
    score_dtypes: tuple[str, ...],
    mask: str | None,
    mask_dtypes: tuple[str, ...],
    gradient: str | None = None,
) -> Mod:
    """The struct for a score program, a mask program, or both.

    Args:
        score, mask: program texts.
        score_dtypes, mask_dtypes: element types of their captures.
        gradient: the gradient program of `score`, for backward passes.

    Raises:
        ArgumentError: the number of captures differs from the program's.
        DtypeError: a capture's type is not of the class that its program says.

    Example:
        >>> mod = render(None, (), "tilewise-expr 1 mask\\nquery\\nkey\\nge 0 1\\nreturn 2\\n", ())
        >>> print(mod.text.splitlines()[-5].strip())
        return v2;
    """
    if score is None and mask is None:
        return NO_MOD
    captures: list[Capture] = []
    fields = ["    struct Captures {", "        i32* fault;"]
    lines: list[str] = []
    score_body, gradient_body, mask_body = ["return score;"], ["return grad;"], ["return true;"]
    if score is not None:
        program = parse(score)
        _check(program, score_dtypes, "score_mod")
        captures += program.captures
        fields += [f"        expr::Array<{capture.rank}> s{i};" for i, capture in enumerate(program.captures)]
        score_body = _body(program, "s", score_dtypes)
        if gradient is not None:
            gradient_body = _body(parse(gradient), "s", score_dtypes)
    if mask is not None:
        program = parse(mask)
        _check(program, mask_dtypes, "mask_mod")
        captures += program.captures
        fields += [f"        expr::Array<{capture.rank}> m{i};" for i, capture in enumerate(program.captures)]
        mask_body = _body(program, "m", mask_dtypes)
    flags = f"SCORE = {str(score is not None).lower()}, MASK = {str(mask is not None).lower()}"
    lines += [f"    static constexpr bool {flags};", *fields, "    };"]
    lines += _function("f32", "score", "f32 score, ", score_body)
    lines += _function("f32", "gradient", "f32 score, f32 grad, ", gradient_body, "template <bool SCATTER> ")
    lines += _function("bool", "mask", "", mask_body)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    # A text with several kernels defines it once.
    guard = f"MOD_{digest}_IS_DEFINED"
    head = f"#ifndef {guard}\n#define {guard}\nnamespace tilewise {{\nstruct Mod_{digest} {{"
    text = "\n".join((head, *lines, "};\n}  // namespace tilewise\n#endif\n"))
    return Mod(f"tilewise::Mod_{digest}", text, digest, tuple(captures))


def capture_argument(
    mod: Mod, fault: DeviceArray, captures: Sequence[DeviceArray], sums: Sequence[DeviceArray | None]
) -> np.ndarray:
    """The kernel argument with the captured arrays.

    Args:
        mod: what will read them.
        fault: int32 ``[1]``, set to 1 by an index outside its array and to 2 by an integer division by 0.
        captures: of the score program, then of the mask program.
        sums: for each a contiguous float32 array of its shape to which gradients are added, or ``None``.

    Raises:
        ShapeError: an array's rank is not what the program says.
    """
    argument = np.zeros((), mod.dtype)
    argument["fault"] = fault.pointer
    for number, (capture, array, total) in enumerate(zip(mod.captures, captures, sums, strict=True)):
        if len(array.shape) != capture.rank:
            raise ShapeError(f"capture {number}: expected rank {capture.rank}, got shape {array.shape}")
        field = argument[f"array{number}"]
        field["data"], field["sums"] = array.pointer, 0 if total is None else total.pointer
        field["extent"][: capture.rank] = array.shape
        field["stride"][: capture.rank] = array.strides
    return argument
