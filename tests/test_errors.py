"""Every error of tilewise: code that raises it, its class, the built-in that is too, and the words it must say.

One row, one mistake a user makes. A message names the argument, what was passed, and what is allowed.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tilewise
import tilewise.hf
from tilewise import _core, errors, plot
from tilewise import speculation as spec
from tilewise.agents import Caps, FixedPredictor, Reply, SpeculativePlanner, State
from tilewise.attention import attention
from tilewise.bench.moe import Problem, Shape
from tilewise.cuda import moe as cuda_moe
from tilewise.cuda.compile import compile_text
from tilewise.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    InternalError,
    KernelError,
    MissingExtraError,
    ModelNotFoundError,
    ReplyError,
    ShapeError,
    TilewiseError,
    UnsupportedError,
    VocabularyError,
)
from tilewise.gemm import matmul
from tilewise.moe import (
    Routing,
    experts,
    experts_backward,
    experts_forward,
    load_balance_loss,
    quantise_experts,
    round_tokens,
    route,
)
from tilewise.testing import force_isa, force_threads, levels, normal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tokenizers  # noqa: E402  (after the check that there is a torch)

import tilewise.torch as twt  # noqa: E402
from tilewise.hf import models as hf_models  # noqa: E402
from tilewise.hf.compare import Comparison, compare  # noqa: E402

A, B = normal((2, 3)), normal((3, 4))
Q, K = normal((1, 4, 3, 8)), normal((1, 2, 5, 8))
LOGITS = normal((3, 6))
X, IDS, WEIGHTS = normal((3, 8)), np.zeros((3, 2), np.int32), np.ones((3, 2), np.float32)
DISTINCT = np.array([[0, 1], [2, 3], [5, 4]], np.int32)
GATE_UP, DOWN = normal((4, 10, 8)), normal((4, 8, 5))
QUANTISED = quantise_experts(GATE_UP, DOWN)
INT8 = QUANTISED._asdict()


# What `except` of somebody who does not know tilewise would catch.
BUILTINS: dict[type[Exception], type[Exception]] = {
    ArgumentError: ValueError,
    DeviceError: RuntimeError,
    DtypeError: TypeError,
    InternalError: RuntimeError,
    KernelError: RuntimeError,
    MissingExtraError: ImportError,
    ModelNotFoundError: FileNotFoundError,
    ReplyError: RuntimeError,
    ShapeError: ValueError,
    TypeError: TypeError,
    UnsupportedError: NotImplementedError,
    VocabularyError: ValueError,
}


@dataclass(frozen=True)
class Row:
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


class OnGpu:
    """Something that says it lives on a CUDA device (DLPack device type 2)."""

    dtype, shape, ndim = np.dtype(np.float32), (2, 3), 2

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("must not be asked for its memory")


def cuda_capsule() -> Any:
    """A DLPack capsule of a [1] float32 array on CUDA device 0, for the check in the core itself."""

    class Tensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
            ("rank", ctypes.c_int32),
            ("dtype", ctypes.c_uint8 * 4),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("offset", ctypes.c_uint64),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    shape = (ctypes.c_int64 * 2)(1, 1)
    tensor = Tensor(None, (2, 0), 2, (2, 32, 1, 0), shape, None, 0, None, None)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new(ctypes.addressof(tensor), b"dltensor", None)

    class Exporter:
        memory = (shape, tensor)

        def __dlpack__(self, **_: Any) -> Any:
            return capsule

    return Exporter()


def no_action() -> None:
    """A target whose answers cannot be read ends the plan."""

    async def agent(state: State) -> Reply:
        return Reply(None)

    asyncio.run(SpeculativePlanner(agent, agent, 1).run("task"))


def in_process(code: str) -> Callable[[], None]:
    """Runs `code` in a fresh process and raises here what it raised there."""

    def call() -> None:
        wrapped = f"""
import json, sys
try:
{textwrap.indent(textwrap.dedent(code), "    ")}
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
        env = {**os.environ, "PYTHONPATH": str(Path(tilewise.__file__).parent.parent)}
        done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0 and done.stdout, done.stderr
        name, message = json.loads(done.stdout)
        raise getattr(errors, name)(message)

    return call


def wrong_level() -> None:
    with force_isa("sse9"):
        pass


def no_threads() -> None:
    with force_threads(0):
        pass


def twice_differentiated() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    _, weights = twt.moe.route(x, 2)
    (grad,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    grad.sum().backward()


def twice_differentiated_experts() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    out = twt.moe.experts(x, *(torch.from_numpy(a) for a in (IDS[:2], WEIGHTS[:2], GATE_UP, DOWN)))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    grad.sum().backward()


def rounded_llama() -> None:
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    tilewise.hf.round_tokens(transformers.LlamaForCausalLM(config))


def nan_logits() -> np.ndarray:
    logits = LOGITS.copy()
    logits[1, 2] = np.nan
    return logits


def read_only_output() -> None:
    out = np.zeros((2, 4), np.float32)
    out.flags.writeable = False
    _core.matmul(A, B, None, out)


def model_directory(folder: str, vocabulary: int) -> str:
    """A model as far as its vocabulary is looked at: a configuration, and a tokenizer if it does not speak bytes."""
    path = Path(folder) / str(vocabulary)
    transformers.LlamaConfig(vocab_size=vocabulary).save_pretrained(path)
    if vocabulary != 256:
        words = {f"w{index}": index for index in range(vocabulary)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return str(path)


def foreign_draft() -> None:
    with tempfile.TemporaryDirectory() as folder:
        hf_models.load_pair(model_directory(folder, 256), model_directory(folder, 300))


def empty_directory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        hf_models.load_pair(folder)


def paged_gradient() -> None:
    x = torch.ones(1, 1, 2, 4, requires_grad=True)
    rows, table = torch.tensor([[0, 0, 2, 0, 0, 2]]), torch.zeros(1, 1, dtype=torch.int32)
    twt.attention(x, x, x, sequences=rows, block_table=table).sum().backward()


# A panic is not to be had on purpose; a machine that gives no more threads is.
NO_THREADS_LEFT = """
import resource
import numpy as np
from tilewise import _core
from tilewise.gemm import matmul
big = np.ones((500, 500), np.float32)
_core.set_num_threads(1)
matmul(big, big)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_core.set_num_threads(300)
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
matmul(big, big)
"""
NO_TORCH = """
import sys
sys.modules["torch"] = None
import tilewise.torch
"""
NO_MATPLOTLIB = """
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocker())
    from tilewise import plot
    plot.expert_load([1, 2])
"""
NO_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import tilewise.hf
tilewise.hf.register()
"""

SHAPES = [
    Row("matmul: rank", lambda: matmul(A[0], B), ShapeError, ("a:", "rank 2", "(3,)")),
    Row("matmul: depths", lambda: matmul(A, B.T), ShapeError, ("b:", "[3, columns]", "(4, 3)")),
    Row("matmul: rank of rows", lambda: matmul(A, B, rows=IDS), ShapeError, ("rows:", "rank 1", "(3, 2)")),
    Row("attention: rank", lambda: attention(Q[0], K, K), ShapeError, ("query:", "rank 4", "(4, 3, 8)")),
    Row(
        "attention: heads",
        lambda: attention(Q[:, :3], K, K),
        ShapeError,
        ("key:", "heads that divides query's 3", "(1, 2, 5, 8)"),
    ),
    Row(
        "attention: widths",
        lambda: attention(Q, K[..., :4], K),
        ShapeError,
        ("key:", "match query", "5, 4"),
    ),
    Row("attention: lengths", lambda: attention(Q, K, K[:, :, :4]), ShapeError, ("value:", "match key")),
    Row(
        "attention: batches",
        lambda: attention(Q, np.repeat(K, 2, 0), np.repeat(K, 2, 0)),
        ShapeError,
        ("key:", "[1, heads, keys, 8]", "(2, 2, 5, 8)"),
    ),
    Row(
        "attention: head dimension too large",
        lambda: attention(*[normal((1, 1, 1, 513))] * 3),
        ShapeError,
        ("query:", "1..=512", "513"),
    ),
    Row(
        "attention: head dimension of nothing",
        lambda: attention(*[normal((1, 1, 1, 0))] * 3),
        ShapeError,
        ("query:", "1..=512", "(1, 1, 1, 0)"),
    ),
    Row(
        "attention: mask",
        lambda: attention(Q, K, K, mask=np.ones((2, 2), bool)),
        ShapeError,
        ("mask:", "[1, 4, 3, 5]", "(2, 2)"),
    ),
    Row("attention: sinks", lambda: attention(Q, K, K, sinks=np.ones(3)), ShapeError, ("sinks:", "[4]")),
    Row(
        "attention: heads of blocks",
        lambda: attention(Q, K, K, block_indices=np.zeros((1, 3, 3, 1), np.int32), block_size=2),
        ShapeError,
        ("block_indices:", "(1, 3, 3, 1)"),
    ),
    Row(
        "load_balance_loss: rank", lambda: load_balance_loss(LOGITS[0], IDS), ShapeError, ("logits:", "rank 2", "(6,)")
    ),
    Row("round_tokens: rank", lambda: round_tokens(LOGITS[0], IDS, tile=2), ShapeError, ("scores:", "rank 2", "(6,)")),
    Row(
        "round_tokens: other tokens",
        lambda: round_tokens(LOGITS, IDS[:2], tile=2),
        ShapeError,
        ("expert_ids:", "[3, any]", "(2, 2)"),
    ),
    Row(
        "round_tokens: other weights",
        lambda: round_tokens(LOGITS, IDS, WEIGHTS[:, :1], tile=2),
        ShapeError,
        ("weights:", "shape of expert_ids [3, 2]", "(3, 1)"),
    ),
    Row(
        "Routing: shapes of slots",
        lambda: Routing.from_slots(IDS, WEIGHTS[:2]),
        ShapeError,
        ("expert_ids, weights:", "[tokens, slots]", "(3, 2)", "(2, 2)"),
    ),
    Row("route: rank", lambda: route(LOGITS[0], 2), ShapeError, ("logits:", "rank 2", "(6,)")),
    Row(
        "route: bias",
        lambda: route(LOGITS, 2, scoring="sigmoid", bias=np.ones(5)),
        ShapeError,
        ("bias:", "[6]", "5"),
    ),
    Row(
        "experts: rank",
        lambda: experts(X[None], IDS, WEIGHTS, GATE_UP, DOWN),
        ShapeError,
        ("x:", "rank 2", "flatten"),
    ),
    Row(
        "experts: width of gate_up",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP[..., :7], DOWN),
        ShapeError,
        ("gate_up:", "features, 8]", "(4, 10, 7)"),
    ),
    Row(
        "experts: a gate without its up",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP[:, :9], DOWN),
        ShapeError,
        ("gate_up:", "even", "(4, 9, 8)"),
    ),
    Row(
        "experts: down",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, GATE_UP),
        ShapeError,
        ("down:", "[4, 8, 5]", "(4, 10, 8)"),
    ),
    Row(
        "experts: tokens of expert_ids",
        lambda: experts(X, IDS[:2], WEIGHTS[:2], GATE_UP, DOWN),
        ShapeError,
        ("expert_ids:", "[3, slots]", "(2, 2)"),
    ),
    Row(
        "experts: weights",
        lambda: experts(X, IDS, WEIGHTS[:, :1], GATE_UP, DOWN),
        ShapeError,
        ("weights:", "[3, 2]", "(3, 1)"),
    ),
    Row(
        "experts: biases",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, DOWN, down_bias=normal((4, 7))),
        ShapeError,
        ("down_bias:", "[4, 8]", "(4, 7)"),
    ),
    Row(
        "experts: scales",
        lambda: experts(X, IDS, WEIGHTS, **{**INT8, "gate_up_scale": INT8["gate_up_scale"][:, :9]}),
        ShapeError,
        ("gate_up_scale:", "[4, 10]", "(4, 9)"),
    ),
    Row(
        "quantise_experts: rank",
        lambda: quantise_experts(GATE_UP, DOWN[0]),
        ShapeError,
        ("down:", "rank 3", "(8, 5)"),
    ),
    Row("process: rank", lambda: spec.process(np.ones(())), ShapeError, ("logits:", "[B, V]", "()")),
    Row(
        "process: settings per row",
        lambda: spec.process(LOGITS, temperature=np.ones(2)),
        ShapeError,
        ("temperature:", "[B = 3]", "(2,)"),
    ),
    Row("torch attention: rank", lambda: twt.attention(*[torch.ones(2, 3)] * 3), ShapeError, ("rank 4",)),
]

DTYPES = [
    Row("int8", lambda: matmul(A.astype(np.int8), B), DtypeError, ("a:", "float32", "int8")),
    Row("int8 by DLPack", lambda: _core.matmul(A.astype(np.int8), B, None, A), DtypeError, ("b:", "int8, as a")),
    Row(
        "int8 twice by DLPack",
        lambda: _core.matmul(A.astype(np.int8), B.astype(np.int8), None, normal((2, 4))),
        DtypeError,
        ("a:", "bfloat16", "int8"),
    ),
    Row("complex64", lambda: matmul(A.astype(np.complex64), B), DtypeError, ("a:", "bfloat16", "complex64")),
    Row("uint16 is not bfloat16", lambda: matmul(A.astype(np.uint16), B), DtypeError, ("a:", "got uint16")),
    Row("objects", lambda: matmul(A.astype(object), B), DtypeError, ("a:", "object")),
    Row("long double", lambda: matmul(A.astype(np.longdouble), B), DtypeError, ("a:", "got")),
    Row("foreign byte order", lambda: matmul(A.astype(">f4"), B), DtypeError, ("a:", "native", ">f4")),
    Row(
        "float8",
        lambda: matmul(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(3, 2)),
        DtypeError,
        ("a:", "float8_e4m3fn", "bfloat16"),
    ),
    Row(
        "float8 by DLPack",
        lambda: _core.matmul(torch.ones(2, 3).to(torch.float8_e4m3fn), B, None, A),
        DtypeError,
        ("a:", "8-bit floating format"),
    ),
    Row("mixed", lambda: matmul(A, B.astype(np.float64)), DtypeError, ("b:", "float32, as a", "float64")),
    Row("integers", lambda: matmul(IDS, IDS.T), DtypeError, ("a:", "float16", "int32")),
    Row(
        "attention: mixed",
        lambda: attention(Q, K.astype(np.float16), K),
        DtypeError,
        ("key:", "float32, as query", "float16"),
    ),
    Row(
        "attention: additive mask",
        lambda: attention(Q, K, K, mask=np.zeros((3, 5), np.float32)),
        DtypeError,
        ("mask:", "bool", "m == 0"),
    ),
    Row(
        "attention: integer sinks",
        lambda: attention(Q, K, K, sinks=np.ones(4, np.int32)),
        DtypeError,
        ("sinks:", "floating", "int32"),
    ),
    Row(
        "attention: floating blocks",
        lambda: attention(Q, K, K, block_indices=np.zeros((1, 1, 3, 1)), block_size=2),
        DtypeError,
        ("block_indices:", "int32 or int64", "float64"),
    ),
    Row("matmul: rows", lambda: matmul(A, B, rows=np.ones(2)), DtypeError, ("rows:", "int64", "float64")),
    Row(
        "load_balance_loss: integers",
        lambda: load_balance_loss(IDS, IDS),
        DtypeError,
        ("logits:", "float32", "int32"),
    ),
    Row(
        "load_balance_loss: floating ids",
        lambda: load_balance_loss(LOGITS, LOGITS),
        DtypeError,
        ("expert_ids:", "int32 or int64", "float32"),
    ),
    Row(
        "twt.load_balance_loss: integers",
        lambda: twt.moe.load_balance_loss(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)),
        DtypeError,
        ("logits:", "floating", "int32"),
    ),
    Row(
        "round_tokens: integer scores",
        lambda: round_tokens(np.ones((3, 6), np.int32), IDS, tile=2),
        DtypeError,
        ("scores:", "float32", "int32"),
    ),
    Row(
        "round_tokens: floating ids",
        lambda: round_tokens(LOGITS, LOGITS, tile=2),
        DtypeError,
        ("expert_ids:", "int32 or int64", "float32"),
    ),
    Row(
        "round_tokens: integer weights",
        lambda: round_tokens(LOGITS, IDS, IDS, tile=2),
        DtypeError,
        ("weights:", "float32", "int32"),
    ),
    Row("route: integers", lambda: route(IDS, 1), DtypeError, ("logits:", "float32", "int32")),
    Row(
        "experts: floating ids",
        lambda: experts(X, WEIGHTS, WEIGHTS, GATE_UP, DOWN),
        DtypeError,
        ("expert_ids:", "int32 or int64", "float32"),
    ),
    Row(
        "experts: mixed",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP.astype(np.float16), DOWN),
        DtypeError,
        ("gate_up:", "float32, as x", "float16"),
    ),
    Row(
        "experts: int8 x", lambda: experts(INT8["down"][0], IDS, WEIGHTS, **INT8), DtypeError, ("x:", "float32", "int8")
    ),
    Row(
        "experts: int8 without a scale",
        lambda: experts(X, IDS, WEIGHTS, INT8["gate_up"], DOWN),
        DtypeError,
        ("gate_up:", "float32, as x", "got int8", "gate_up_scale that quantise_experts"),
    ),
    Row(
        "experts: a scale without int8",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, DOWN, down_scale=INT8["down_scale"]),
        DtypeError,
        ("down:", "int8, as down_scale was given", "got float32"),
    ),
    Row(
        "experts: scales of another type",
        lambda: experts(X, IDS, WEIGHTS, **{**INT8, "down_scale": INT8["down_scale"].astype(np.float64)}),
        DtypeError,
        ("down_scale:", "float32", "got float64"),
    ),
    Row(
        "experts: int8 bias",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, DOWN, down_bias=INT8["down"][..., 0]),
        DtypeError,
        ("down_bias:", "float32", "int8"),
    ),
    Row(
        "experts: int8 gradients by the core",
        lambda: _core.experts_backward(
            X,
            normal((6, 10)),
            (X, IDS, WEIGHTS, None, INT8["gate_up"], INT8["down"], None, None, *QUANTISED[1::2]),
            ("swiglu", 1.0, 1.0, "concatenated"),
            (None,) * 6,
        ),
        DtypeError,
        ("gate_up:", "int8 weights are for inference", "dequantise for training"),
    ),
    Row("quantise_experts: twice", lambda: quantise_experts(GATE_UP, INT8["down"]), DtypeError, ("down:", "got int8")),
    Row("quantise_experts: integers", lambda: quantise_experts(GATE_UP, IDS[None]), DtypeError, ("down:", "int32")),
    Row(
        "torch: uint16",
        lambda: twt.matmul(torch.ones(2, 2).to(torch.uint16), torch.ones(2, 2)),
        DtypeError,
        ("a:", "uint16", "bfloat16"),
    ),
    Row(
        "seed",
        lambda: spec.sample(LOGITS, seed=1.5, requests=np.arange(3), positions=0),  # type: ignore[arg-type]
        DtypeError,
        ("seed:", "integer", "float"),
    ),
]

VALUES = [
    Row(
        "quantise_experts: NaN",
        lambda: quantise_experts(np.where(GATE_UP[2, 3, 4] == GATE_UP, np.nan, GATE_UP), DOWN),
        ArgumentError,
        ("gate_up:", "finite", "NaN at expert 2, row 3, column 4"),
    ),
    Row("matmul: negative row", lambda: matmul(A, B, rows=np.array([-1])), ArgumentError, ("0..2", "-1")),
    Row("matmul: large row", lambda: matmul(A, B, rows=np.array([0, 2])), ArgumentError, ("position 1",)),
    Row("scale", lambda: attention(Q, K, K, scale=np.inf), ArgumentError, ("scale:", "finite", "inf")),
    Row("window", lambda: attention(Q, K, K, window=(-2, 0)), ArgumentError, ("window:", "-1", "(-2, 0)")),
    Row(
        "window: one number",
        lambda: attention(Q, K, K, window=4),  # type: ignore[arg-type]
        ArgumentError,
        ("window:", "(left, right)", "4"),
    ),
    Row(
        "blocks without a size",
        lambda: attention(Q, K, K, block_indices=np.zeros((1, 1, 3, 1), np.int32)),
        ArgumentError,
        ("block_indices", "block_size", "both"),
    ),
    Row(
        "blocks of negative size",
        lambda: attention(Q, K, K, block_indices=np.zeros((1, 1, 3, 1), np.int32), block_size=-4),
        ArgumentError,
        ("block_size:", "at least 1", "-4"),
    ),
    Row(
        "a block outside the keys",
        lambda: attention(Q, K, K, block_indices=np.full((1, 1, 3, 1), 7, np.int32), block_size=2),
        ArgumentError,
        ("block_indices:", "below 3", "got 7", "[0, 0, 0, 0]"),
    ),
    Row("top_k of nothing", lambda: route(LOGITS, 0), ArgumentError, ("top_k:", "1..=6", "got 0")),
    Row("negative top_k", lambda: route(LOGITS, -1), ArgumentError, ("top_k:", "1..=6", "got -1")),
    Row("top_k too large", lambda: route(LOGITS, 7), ArgumentError, ("top_k:", "experts", "got 7")),
    Row(
        "groups that do not divide the experts",
        lambda: route(LOGITS, 2, scoring="sigmoid", groups=4),
        ArgumentError,
        ("groups:", "divisor of 6", "got 4"),
    ),
    Row("no groups", lambda: route(LOGITS, 2, scoring="sigmoid", groups=0), ArgumentError, ("groups:", "got 0")),
    Row(
        "too many top groups",
        lambda: route(LOGITS, 2, scoring="sigmoid", groups=2, top_groups=3),
        ArgumentError,
        ("top_groups:", "1..=2", "got 3"),
    ),
    Row(
        "top_k beyond the open groups",
        lambda: route(LOGITS, 3, scoring="sigmoid", groups=3, top_groups=1),
        ArgumentError,
        ("top_k:", "1..=2", "1 groups of 2", "got 3", "keep more groups"),
    ),
    Row(
        "groups with a softmax",
        lambda: route(LOGITS, 2, groups=2),
        ArgumentError,
        ("groups:", "'sigmoid'", "softmax"),
    ),
    Row(
        "NaN bias",
        lambda: route(LOGITS, 2, scoring="sigmoid", bias=np.array([0, 0, np.nan, 0, 0, 0])),
        ArgumentError,
        ("bias:", "finite", "NaN at expert 2"),
    ),
    Row(
        "a tile of nothing",
        lambda: round_tokens(LOGITS, DISTINCT, tile=0),
        ArgumentError,
        ("tile:", "at least 1", "got 0"),
    ),
    Row(
        "padding to nothing",
        lambda: Routing.from_slots(IDS, WEIGHTS).padded_rows(4, 0),
        ArgumentError,
        ("tile:", "at least 1", "got 0"),
    ),
    Row(
        "unknown rounding rule",
        lambda: round_tokens(LOGITS, DISTINCT, tile=2, rule="ceil"),  # type: ignore[arg-type]
        ArgumentError,
        ("rule:", "nearest_score", "'ceil'"),
    ),
    Row(
        "a rule that draws, without a seed",
        lambda: round_tokens(LOGITS, DISTINCT, tile=2, rule="stochastic"),
        ArgumentError,
        ("seed:", "0 to 2^63 - 1", "'stochastic'", "got None"),
    ),
    Row(
        "negative seed",
        lambda: round_tokens(LOGITS, DISTINCT, tile=2, seed=-1),
        ArgumentError,
        ("seed:", "0 to 2^63 - 1", "got -1"),
    ),
    Row(
        "an expert twice",
        lambda: round_tokens(LOGITS, IDS, tile=2),
        ArgumentError,
        ("expert_ids:", "expert 0 twice at token 0"),
    ),
    Row(
        "NaN scores",
        lambda: round_tokens(nan_logits(), DISTINCT, tile=2),
        ArgumentError,
        ("scores:", "token 1, expert 2"),
    ),
    Row(
        "second derivative of a router",
        lambda: twice_differentiated(),
        UnsupportedError,
        ("moe_route:", "double backward"),
    ),
    Row("NaN logits", lambda: route(nan_logits(), 2), ArgumentError, ("logits:", "token 1, expert 2")),
    Row(
        "scoring",
        lambda: route(LOGITS, 2, scoring="argmax"),  # type: ignore[arg-type]
        ArgumentError,
        ("scoring:", "softmax_topk", "'argmax'"),
    ),
    Row(
        "a bias with a softmax",
        lambda: route(LOGITS, 2, bias=np.ones(6)),
        ArgumentError,
        ("bias:", "sigmoid", "softmax"),
    ),
    Row(
        "activation",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, DOWN, activation="mish"),  # type: ignore[arg-type]
        ArgumentError,
        ("activation:", "swiglu", "relu2", "'mish'"),
    ),
    Row(
        "layout",
        lambda: experts(X, IDS, WEIGHTS, GATE_UP, DOWN, layout="rows"),  # type: ignore[arg-type]
        ArgumentError,
        ("layout:", "interleaved", "'rows'"),
    ),
    Row("sparse tensors", lambda: matmul(torch.eye(2).to_sparse(), B), ArgumentError, ("a:", "dense")),
    Row("read-only output", read_only_output, ArgumentError, ("out:", "writable", "read-only")),
    Row("instruction set", wrong_level, ArgumentError, ("TILEWISE_CPU_ISA", "'sse9'", *levels())),
    Row("threads", no_threads, ArgumentError, ("count:", "at least 1", "got 0")),
    Row(
        "temperature",
        lambda: spec.process(LOGITS, temperature=-1),
        ArgumentError,
        ("temperature[0]", ">= 0", "-1"),
    ),
    Row("top_k", lambda: spec.process(LOGITS, top_k=-1), ArgumentError, ("top_k[0]", ">= 0", "-1")),
    Row("top_p", lambda: spec.process(LOGITS, top_p=1.5), ArgumentError, ("top_p[0]", "(0, 1]", "1.5")),
    Row("NaN scores", lambda: spec.process(nan_logits()), ArgumentError, ("logits[1", "NaN at token 2")),
    Row(
        "all tokens masked",
        lambda: spec.process(np.full((1, 4), -np.inf)),
        ArgumentError,
        ("logits[0", "above -inf"),
    ),
    Row(
        "negative seed",
        lambda: spec.sample(LOGITS, seed=-1, requests=np.arange(3), positions=0),
        ArgumentError,
        ("seed:", "[0, 2^63)", "-1"),
    ),
    Row(
        "one name for several rows",
        lambda: spec.sample(LOGITS, seed=1, requests=0, positions=0),
        ArgumentError,
        ("requests:", "[B = 3]", "same numbers"),
    ),
]

OTHERS = [
    Row("a GPU array", lambda: matmul(OnGpu(), B), DeviceError, ("a:", "CPU", "OnGpu", "(2, 0)")),
    Row(
        "a GPU capsule in the core",
        lambda: _core.matmul(cuda_capsule(), B, None, A),
        DeviceError,
        ("a:", "CPU", "device type 2"),
    ),
    Row(
        "a meta tensor",
        lambda: matmul(torch.ones(2, 3, device="meta"), B),
        DeviceError,
        ("a:", "CPU", "meta", "x.cpu()"),
    ),
    Row(
        "experts_forward: int8",
        lambda: experts_forward(X, IDS, WEIGHTS, INT8["gate_up"], DOWN),
        UnsupportedError,
        ("experts_forward:", "gate_up", "inference only", "gate_up_scale[..., None]"),
    ),
    Row(
        "experts_backward: int8",
        lambda: experts_backward(X, normal((6, 10)), X, IDS, WEIGHTS, GATE_UP, INT8["down"]),
        UnsupportedError,
        ("experts_backward:", "down", "dequantise for training"),
    ),
    Row(
        "torch experts: a gradient through int8",
        lambda: twt.moe.experts(
            torch.ones(3, 8, requires_grad=True),
            torch.zeros(3, 2, dtype=torch.int32),
            torch.ones(3, 2),
            **{name: torch.from_numpy(array) for name, array in INT8.items()},
        ),
        UnsupportedError,
        ("requires a gradient", "int8", "dequantise for training", "no_grad"),
    ),
    Row("keys in pages", paged_gradient, UnsupportedError, ("pages have no gradient", "no_grad")),
    Row("a list", lambda: matmul([[1.0]], B), TypeError, ("a:", "array", "list")),
    Row("None", lambda: attention(None, K, K), TypeError, ("query:", "array", "NoneType")),
    Row("without torch", in_process(NO_TORCH), MissingExtraError, ("pip install 'tilewise[torch]'",)),
    Row(
        "without transformers",
        in_process(NO_TRANSFORMERS),
        MissingExtraError,
        ("pip install 'tilewise[hf]'",),
    ),
    Row(
        "no such model",
        lambda: hf_models.load_pair("/no/such/model"),
        ModelNotFoundError,
        ("target", "'/no/such/model'", "does not exist"),
    ),
    Row("a CPU array on the GPU's floor", lambda: cuda_moe.route(LOGITS, 2), DeviceError, ("logits:", "numpy", "CuPy")),
    Row(
        "a kernel that does not compile",
        lambda: compile_text("broken", "sm_90a", "name"),
        KernelError if sys.platform == "linux" else MissingExtraError,
        ("name", "sm_90a", "error") if sys.platform == "linux" else ("tilewise[cuda13]",),
    ),
    Row("no model in it", empty_directory, ModelNotFoundError, ("config.json", "directory")),
    Row("another vocabulary", foreign_draft, VocabularyError, ("300 tokens", "256", "same model family")),
]
if sys.platform == "linux":
    OTHERS.append(Row("no threads left", in_process(NO_THREADS_LEFT), InternalError, ("300 threads", "report")))

# Modules and tools on top of the rooms.
FRONTS = [
    Row("MoE: top_k", lambda: twt.moe.MoE(4, 5, 8, 8), ArgumentError, ("top_k:", "1..=4", "got 5")),
    Row("MoE: no experts", lambda: twt.moe.MoE(0, 1, 8, 8), ArgumentError, ("num_experts:", "at least 1", "got 0")),
    Row(
        "MoE: activation",
        lambda: twt.moe.MoE(4, 1, 8, 8, activation="swish"),  # type: ignore[arg-type]
        ArgumentError,
        ("activation:", "swiglu", "'swish'"),
    ),
    Row(
        "MoE: width",
        lambda: twt.moe.MoE(4, 1, 8, 8)(torch.ones(2, 7)),
        ShapeError,
        ("x:", "[..., 8]", "[2, 7]"),
    ),
    Row(
        "MoE: a dispatcher of other experts",
        lambda: twt.moe.MoE(4, 1, 8, 8, dispatcher=twt.moe.Local(3)),
        ArgumentError,
        ("dispatcher:", "4 experts", "got 3"),
    ),
    Row(
        "MoE: balance without a bias",
        lambda: twt.moe.MoE(4, 1, 8, 8).balance(0.1),
        ArgumentError,
        ("selection_bias=True",),
    ),
    Row("AllToAll: no group", lambda: twt.moe.AllToAll(4), UnsupportedError, ("init_process_group", "Local")),
    Row(
        "experts: second derivative",
        twice_differentiated_experts,
        UnsupportedError,
        ("experts", "double backward"),
    ),
    Row("hf.round_tokens: no experts", rounded_llama, UnsupportedError, ("LlamaForCausalLM", "no expert modules")),
    Row(
        "hf.compare: no draft",
        lambda: compare(SimpleNamespace(draft=None), [1], 8),  # type: ignore[arg-type]
        ArgumentError,
        ("nothing to compare", "no draft", "name one"),
    ),
    Row(
        "hf.compare: no tokens",
        lambda: compare(SimpleNamespace(draft=0), [1], 0),  # type: ignore[arg-type]
        ArgumentError,
        ("max_new_tokens", "at least 1", "got 0"),
    ),
    Row(
        "hf.compare: no runs",
        lambda: compare(SimpleNamespace(draft=0), [1], 8, repeat=0),  # type: ignore[arg-type]
        ArgumentError,
        ("repeat", "at least 1", "got 0"),
    ),
    Row(
        "hf.compare: a way that did not run",
        lambda: Comparison({"plain": [], "speculative": []}, greedy=True).median("ssd"),
        ArgumentError,
        ("mode:", "'plain', 'speculative'", "'ssd'"),
    ),
    Row("plot: counts", lambda: plot.padded_share([[1]], 4), ShapeError, ("load:", "[experts]", "[1, 1]")),
    Row("plot: tile", lambda: plot.padded_share([1], 0), ArgumentError, ("tile:", "at least 1", "got 0")),
    Row("plot: no matplotlib", in_process(NO_MATPLOTLIB), MissingExtraError, ("pip install 'tilewise[viz]'",)),
    Row(
        "bench: sizes",
        lambda: Shape(tokens=1, width=1, hidden=1, experts=2, top_k=3),
        ArgumentError,
        ("top_k:", "1..=2", "got 3"),
    ),
    Row("planning: no action", no_action, ReplyError, ("holds no action", "Reply.action is None")),
    Row("planning: cap", lambda: Caps(total=0), ArgumentError, ("Caps: total", "1 or more", "got 0")),
    Row("planning: k", lambda: FixedPredictor(0), ArgumentError, ("k is a number of steps", "1 or more", "got 0")),
    Row("bench: dtype", lambda: Problem.make(Shape(1, 1, 1, 1, 1), "int8"), ArgumentError, ("float32", "'int8'")),
]

ROWS = SHAPES + DTYPES + VALUES + OTHERS + FRONTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_error(row: Row) -> None:
    with pytest.raises(row.error) as caught:
        row.call()
    assert type(caught.value) is row.error
    assert isinstance(caught.value, BUILTINS[row.error])
    for word in row.words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


def test_every_class_has_a_row() -> None:
    covered = {row.error.__name__ for row in ROWS} | {"TilewiseError"}
    missing = set(errors.__all__) - covered
    assert sys.platform != "linux" or not missing, f"no row raises {sorted(missing)}"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_class_is_a_tilewise_error_and_a_builtin(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, TilewiseError) and kind.__doc__
    assert kind is TilewiseError or issubclass(kind, BUILTINS[kind])


def test_no_class_is_forgotten_in_all() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found == set(errors.__all__)
