"""Parallel paths: the state machine, and a transformers model driven by it against a dense recomputation."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise import masks
from tilewise.attention import create_mask
from tilewise.errors import ArgumentError
from tilewise.scheduler.paths import ParallelPaths, PathTokens

MOST = 8
TOKENS = PathTokens(
    opens=range(40, 40 + MOST), closes=range(50, 50 + MOST), summary=60, summary_end=61, stops=frozenset({0}),
    template=(7, 8, 9),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the machine


def drive(machine: ParallelPaths, sample) -> list:
    """Runs a machine; `sample(path, length)` is the token of a path, path -1 the summary. Returns all commands."""
    pending, log = machine.begin(), []
    while pending:
        log += pending
        command, *arguments = pending[-1]
        if command == "feed":
            wanted = [path for path, _, sampled in arguments[0] if sampled]
            pending = machine.sampled({path: sample(path, len(machine.paths[path])) for path in wanted})
        elif command == "summary":
            pending = machine.summarised(sample(-1, len(machine.summary)))
        else:
            pending = []
    return log


def fed(log: list, paths: int) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in range(paths)]
    for command, *arguments in log:
        if command == "feed":
            for path, token, _ in arguments[0]:
                got[path].append(token)
    return got


@given(
    st.integers(1, MOST),
    st.sampled_from(["first", "half", "last"]),
    st.integers(2, 9),
    st.integers(1, 5),
    st.lists(st.sampled_from([1, 2, 3, 0, 43, 51, 60, 61]), min_size=1, max_size=60),
)
def test_any_samples(paths: int, finish: str, limit: int, most: int, stream: list[int]) -> None:
    calls = iter(range(10**6))
    machine = ParallelPaths(paths, TOKENS, path_limit=limit, summary_limit=most, finish=finish)
    log = drive(machine, lambda path, length: stream[next(calls) % len(stream)])
    assert machine.phase == "done" and log[-1] == ("finish", machine.end)
    assert fed(log, paths) == machine.paths, "every token of every path is fed once"
    needed = {"first": 1, "half": -(-paths // 2), "last": paths}[finish]
    ended = [end for end in machine.ends if end in ("closed", "limit")]
    assert len(ended) >= needed and set(machine.ends) <= {"closed", "limit", "cut"}
    for index, (path, end) in enumerate(zip(machine.paths, machine.ends, strict=True)):
        assert path[0] == TOKENS.opens[index] and len(path) <= limit
        assert (path[-1] == TOKENS.closes[index]) == (end != "cut")
        foreign = {*TOKENS.opens, *TOKENS.closes, 60, 61, 0} - {TOKENS.opens[index], TOKENS.closes[index]}
        assert not foreign & set(path)
        assert TOKENS.closes[index] not in path[:-1]
    lengths = {len(p) for p, end in zip(machine.paths, machine.ends, strict=True) if end == "cut"}
    assert not lengths or lengths == {max(len(path) for path in machine.paths)}, "lockstep"
    assert log[[entry[0] for entry in log].index("merge")] == ("merge", tuple(len(p) for p in machine.paths))
    assert machine.summary[:4] == [60, 7, 8, 9] and len(machine.summary) <= 4 + most
    assert (machine.summary[-1] == 61) == (machine.end == "stopped")
    assert len(machine.answer()) == len(machine.summary) - 4 - (machine.end == "stopped")


def test_first_finish_after_one_token_and_all_together() -> None:
    machine = ParallelPaths(3, TOKENS)
    drive(machine, lambda path, length: 0 if path in (1, -1) else 5)
    assert machine.paths == [[40, 5], [41, 51], [42, 5]] and machine.ends == ["cut", "closed", "cut"]
    assert machine.summary == [60, 7, 8, 9, 61] and machine.answer() == []
    together = ParallelPaths(3, TOKENS, finish="last")
    drive(together, lambda path, length: 0 if length == 4 else 5)
    assert together.ends == ["closed"] * 3 and {len(path) for path in together.paths} == {5}


def test_a_path_that_never_stops_and_a_capped_summary() -> None:
    machine = ParallelPaths(2, TOKENS, path_limit=6, summary_limit=3, finish="last")
    drive(machine, lambda path, length: 0 if path == 0 and length == 2 else 5)
    assert machine.ends == ["closed", "limit"] and [len(path) for path in machine.paths] == [3, 6]
    assert machine.end == "limit" and machine.answer() == [5, 5, 5]
    assert machine.summary_start(10) == 16


def test_half_waits_for_half() -> None:
    machine = ParallelPaths(5, TOKENS, finish="half")
    drive(machine, lambda path, length: 0 if length == path + 2 or path == -1 else 5)
    assert [len(path) for path in machine.paths] == [3, 4, 5, 5, 5]
    assert machine.ends == ["closed", "closed", "closed", "cut", "cut"]


def test_bad_settings_and_events() -> None:
    with pytest.raises(ArgumentError, match="paths: expected 1 to 8"):
        ParallelPaths(9, TOKENS)
    with pytest.raises(ArgumentError, match="finish"):
        ParallelPaths(2, TOKENS, finish="second")
    with pytest.raises(ArgumentError, match="finish"):
        ParallelPaths(2, TOKENS, finish=3)
    with pytest.raises(ArgumentError, match="path_limit"):
        ParallelPaths(2, TOKENS, path_limit=1)
    with pytest.raises(ArgumentError, match="summary_limit"):
        ParallelPaths(2, TOKENS, summary_limit=0)
    with pytest.raises(ArgumentError, match="token 1 has two meanings"):
        PathTokens([1, 2], [3, 1], 4, 5)
    with pytest.raises(ArgumentError, match="one open and one close"):
        PathTokens([1, 2], [3], 4, 5)
    with pytest.raises(ArgumentError, match="stop token"):
        PathTokens([1], [3], 4, 5, stops=frozenset({1}))
    machine = ParallelPaths(2, TOKENS)
    with pytest.raises(ArgumentError, match="phase 'paths'"):
        machine.sampled({0: 1})
    machine.begin()
    with pytest.raises(ArgumentError, match=r"each of the paths \[0, 1\], got \[0\]"):
        machine.sampled({0: 1})
    with pytest.raises(ArgumentError, match="phase 'summary'"):
        machine.summarised(1)


# ------------------------------------------------------------------------------------------------ a model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tilewise.errors import ShapeError, UnsupportedError  # noqa: E402
from tilewise.hf.models import DEFAULT_DRAFT, DEFAULT_TARGET, load_model  # noqa: E402
from tilewise.hf.parallel_paths import ThoughtEmbedding, parallel_think  # noqa: E402
from tilewise.speculation import sample_target  # noqa: E402

PROMPT = [3, 14, 15, 9, 26]
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def model():
    """A Llama that computes in double precision throughout (transformers' norms and eager softmax are single)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=256, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.4,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for module in made.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(
                torch.nn.functional.rms_norm, normalized_shape=(48,), weight=module.weight, eps=1e-6
            )
    return made


@pytest.fixture(autouse=True)
def one_thread():
    """Small products: waking threads on a busy machine costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def thoughts():
    torch.manual_seed(1)
    return ThoughtEmbedding(3, 12, rows=9, std=0.5).double().requires_grad_(False)


def think(model, prompt=PROMPT, tokens=TOKENS, **settings):
    settings = {"path_limit": 9, "summary_limit": 6, "temperature": 1.0, "keep_logits": True} | settings
    return parallel_think(model, prompt, tokens, **settings)


def dense(model, found, thoughts=None):
    """The logits of the packed sequence in one pass, under the mask of the catalogue."""
    packed = found.packed
    count = len(packed.tokens)
    seen = create_mask(masks.parallel_paths(packed.segments.astype(np.int32)), 1, 1, count, count)
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~torch.from_numpy(np.array(seen)), -torch.inf)
    ids, places, segments = (torch.from_numpy(a)[None] for a in (packed.tokens, packed.positions, packed.segments))

    def call():
        return model(input_ids=ids, position_ids=places, attention_mask=additive, use_cache=False).logits[0]

    with torch.inference_mode():
        if thoughts is None:
            return call()
        with thoughts.attached(model), thoughts.at(segments):
            return call()


def draws(logits, request: int, position: int, seed: int) -> list[int]:
    places = np.arange(position, position + len(logits))
    return sample_target(
        logits.numpy(), temperature=1.0, seed=seed, requests=np.full(len(logits), request), positions=places
    ).tolist()


def check(model, found, thoughts=None, seed: int = 0) -> None:
    """Every logit that was sampled from, and every token, against the dense recomputation."""
    logits = dense(model, found, thoughts)
    special = {*TOKENS.opens, *TOKENS.closes, *TOKENS.stops, TOKENS.summary, TOKENS.summary_end}
    at = len(PROMPT)
    for number, (path, own) in enumerate(zip(found.paths, found.path_logits, strict=True)):
        close(own, logits[at : at + len(own)])
        assert len(own) == len(path) - 1
        for drawn, token in zip(draws(own, number, len(PROMPT) + 1, seed), path[1:], strict=True):
            assert drawn == token or drawn in special or token == TOKENS.closes[number]
        at += len(path)
    start = len(PROMPT) + max(map(len, found.paths)) + 1 + len(TOKENS.template)
    drawn = draws(found.summary_logits, len(found.paths), start, seed)
    assert drawn[: len(found.answer)] == found.answer and (found.end == "limit" or drawn[-1] in special)
    forced = 1 + len(TOKENS.template)
    first = at + forced - 1
    close(found.summary_logits, logits[first : first + len(found.summary_logits)])


@pytest.mark.parametrize("finish", ["first", "half", "last"])
@pytest.mark.parametrize("paths", [1, 2, 5])
@pytest.mark.parametrize("with_thoughts", [False, True])
def test_merged_cache_equals_the_dense_mask(model, thoughts, paths: int, finish: str, with_thoughts: bool) -> None:
    lengths = set()
    for seed in range(3):
        table = thoughts if with_thoughts else None
        found = think(model, paths=paths, finish=finish, seed=seed, thoughts=table)
        check(model, found, table, seed)
        lengths |= {len(path) for path in found.paths}
        assert found.tokens == sum(map(len, found.paths)) + len(found.summary) - (1 if found.end else 0)
    assert paths == 1 or finish == "first" or len(lengths) > 1, "paths of different lengths were merged"


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Ordinary decoding without a cache."""
    for _ in range(count):
        tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens


def test_one_path_is_ordinary_decoding(model) -> None:
    never = PathTokens(opens=[40], closes=[50], summary=60, summary_end=61, template=(7, 8))
    with torch.inference_mode():
        for zero in (None, ThoughtEmbedding(3, 12, std=0.0).double().requires_grad_(False)):
            found = think(model, tokens=never, paths=1, temperature=0.0, thoughts=zero)
            # The machine forces the ends; between them the model decodes.
            free = greedy(model, [*PROMPT, 40], 8)
            special = {50, 60, 61}  # its own open token may come again
            assert not special & set(free[len(PROMPT) + 1 :]), "this model's greedy path has no special token"
            assert found.paths[0] == [*free[len(PROMPT) :][:8], 50]
            after = greedy(model, [*PROMPT, *found.paths[0], 60, 7, 8], 6)
            assert found.summary == after[len(PROMPT) + 9 :]
            assert found.packed.positions.tolist() == list(range(len(after)))


def test_paths_do_not_depend_on_one_another(model, thoughts) -> None:
    many = think(model, paths=6, finish="last", seed=4, thoughts=thoughts)
    for count in (1, 2, 3):
        few = think(model, paths=count, finish="last", seed=4, thoughts=thoughts)
        assert few.paths == many.paths[:count]
        for one, other in zip(few.path_logits, many.path_logits, strict=False):
            close(one, other)


def test_permuted_paths_leave_the_summary(model, thoughts) -> None:
    """The dense recomputation with the paths in another order, their labels with them."""
    found = think(model, paths=4, finish="last", seed=2, thoughts=thoughts)
    want = dense(model, found, thoughts)[-len(found.summary) :]
    packed = found.packed
    order = np.concatenate([np.flatnonzero(packed.segments == s) for s in (1, 4, 2, 5, 3, -1)])
    moved = type(packed)(packed.tokens[order], packed.positions[order], packed.segments[order])
    got = dense(model, dataclasses.replace(found, packed=moved), thoughts)[-len(found.summary) :]
    close(got, want)
    # With labels exchanged instead of moved along, the thought embeddings do make a difference.
    swapped = np.where(packed.segments == 2, 3, np.where(packed.segments == 3, 2, packed.segments))
    relabelled = dataclasses.replace(found, packed=type(packed)(packed.tokens, packed.positions, swapped))
    other = dense(model, relabelled, thoughts)[-len(found.summary) :]
    assert float((other - want).abs().max()) > 1e-6


def test_thought_embeddings(model, thoughts) -> None:
    plain = think(model, paths=3, seed=5)
    zero = ThoughtEmbedding(3, 12).double().requires_grad_(False)
    zero.weight.zero_()
    same = think(model, paths=3, seed=5, thoughts=zero)
    assert same.paths == plain.paths and same.summary == plain.summary
    for one, other in zip(same.path_logits, plain.path_logits, strict=True):
        assert torch.equal(one, other), "zero rows leave keys and values as they are"
    # Row 0 belongs to prompt and summary, row 2 to the second path, and only there.
    only = ThoughtEmbedding(3, 12).double().requires_grad_(False)
    only.weight.zero_()
    only.weight[:, 2] = 1.0
    second = think(model, paths=3, seed=5, thoughts=only)
    assert second.path_logits[0][0].equal(plain.path_logits[0][0])
    assert second.path_logits[2][0].equal(plain.path_logits[2][0])
    assert not second.path_logits[1][0].equal(plain.path_logits[1][0])
    # By hand: keys and values of a layer, before the rotation; queries stay.
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    key, value, query = layer.k_proj(x), layer.v_proj(x), layer.q_proj(x)
    with thoughts.attached(model), thoughts.at(torch.tensor([[1, 2, 3, -1]])):
        bias = thoughts.weight[0, [0, 1, 2, 0]].repeat(1, 2)
        assert torch.equal(layer.k_proj(x), key + bias) and torch.equal(layer.v_proj(x), value + bias)
        assert torch.equal(layer.q_proj(x), query)
    assert torch.equal(layer.k_proj(x), key), "the hooks are gone"


def test_refusals(model, thoughts) -> None:
    with pytest.raises(ShapeError, match="layers"), ThoughtEmbedding(2, 12).attached(model):
        pass
    with pytest.raises(ShapeError, match="wide"), ThoughtEmbedding(3, 8).attached(model):
        pass
    with thoughts.attached(model):
        with pytest.raises(ArgumentError, match="no row"), thoughts.at(torch.tensor([[12]])):
            pass
        with pytest.raises(ArgumentError, match="outside"):
            model(input_ids=torch.tensor([PROMPT]))
    with pytest.raises(ArgumentError, match="empty"):
        think(model, prompt=[])
    with pytest.raises(ArgumentError, match="training"):
        think(model.train())
    model.eval()
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with (
        pytest.raises(UnsupportedError, match="rotation follows"),
        ThoughtEmbedding(1, 8).attached(transformers.Qwen3ForCausalLM(config)),
    ):
        pass


def test_on_the_shipped_models() -> None:
    if not DEFAULT_DRAFT.is_dir():
        pytest.skip("the default pair is not in this tree")
    draft = load_model(DEFAULT_DRAFT)
    tokens = PathTokens(opens=[1, 3, 5], closes=[2, 4, 6], summary=7, summary_end=8, template=tuple(b"# "))
    found = parallel_think(
        draft, list(b"def add(a, b):\n"), tokens, paths=3, path_limit=12, summary_limit=8, temperature=0.7
    )
    assert [path[0] for path in found.paths] == [1, 3, 5] and len(found.answer) in range(9)
    assert found.summary[:3] == [7, *b"# "] and found.path_logits is None
    with pytest.raises(UnsupportedError, match="MiniMaxM3"):
        parallel_think(load_model(DEFAULT_TARGET), [1], tokens, paths=2)
