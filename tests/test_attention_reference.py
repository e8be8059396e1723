"""The readable meaning of attention: against torch's autograd on the dense formula, and against finite differences."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tilewise import _core
from tilewise.attention.programs import Program, added_bias
from tilewise.reference import attention as meaning

_spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).parent / "attention_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
one_torch_thread = cases.one_torch_thread
WINDOW = Program("tilewise-expr 1 mask\nquery\nkey\nsub 0 1\nabs 2\nint 2\nle 3 4\nreturn 5\n")


def table_program(table: torch.Tensor) -> Program:
    """score * 0.9 + table[head, key mod 3]"""
    nodes = ["score", "float 0.9", "mul 0 1", "head", "key", "int 3", "mod 4 5", "gather 0 3 6", "add 2 7"]
    text = "\n".join(["tilewise-expr 1 score", "capture float 2", *nodes, "return 8"]) + "\n"
    return Program(text, (table,))


def arrays(captures: Any) -> list[np.ndarray]:
    return [capture.detach().numpy() for capture in captures]


@pytest.mark.parametrize("name", ["plain", "causal", "masked", "blocks", "program", "dropout", "everything"])
def test_dense_and_gradients(name: str) -> None:
    operands = cases.draw(2, 4, 2, 7, 9, 5, 3)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    drop = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(4)) < 0.7
    lists = torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 2], [2, 0, -1]], dtype=torch.int32).view(1, 1, 4, 3)
    counts = torch.tensor([2, 1, 3, 1], dtype=torch.int32).view(1, 1, 4)
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if name in ("causal", "everything"):
        fields |= {"causal": True, "left": 5}
        options |= {"causal": True, "window": (5, -1)}
    if name in ("masked", "everything"):
        fields["mask"], options["mask"] = mask.expand(2, 4, 7, 9), mask.numpy()
    if name in ("blocks", "everything"):
        fields |= {"kv_num_blocks": counts, "kv_indices": lists, "query_block": 2, "key_block": 3, "keep": WINDOW}
        options |= {"blocks": (counts.numpy(), lists.numpy(), None, None, (2, 3)), "mask_mod": WINDOW.text}
    if name in ("program", "everything"):
        program = table_program(table)
        fields["score"] = program
        options |= {"score_mod": program.text, "score_captures": arrays(program.captures)}
    if name in ("dropout", "everything"):
        fields["dropout"] = 0.3
        options |= {"dropout": 0.3, "dropout_keep": drop.numpy()}
    truth = cases.dense(
        *operands, cases.rules_of(operands[0], sinks=sinks, **fields), drop if "dropout" in fields else None
    )
    wide = arrays(operands)
    out, lse = meaning.attention(*wide, sinks=arrays([sinks])[0], return_lse=True, **options)
    assert np.allclose(out, truth[0].detach(), rtol=1e-12, atol=1e-14)
    assert np.allclose(lse, truth[1].detach(), rtol=1e-13)
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for x in truth[:2]]
    leaves = [*operands, sinks, table]
    want = cases.gradients(truth, leaves, *grads)
    if "score_mod" in options:
        options["score_gradient"] = _core.expr_gradient(options["score_mod"])
    got = meaning.attention_backward(
        *wide, grads[0].numpy(), grad_lse=grads[1].numpy(), sinks=arrays([sinks])[0], **options
    )
    found = [*got[:4], got.captures[0] if got.captures else np.zeros((4, 3))]
    for one, other in zip(found, want, strict=True):
        assert one is not None and np.allclose(one, other, rtol=1e-11, atol=1e-13)


def test_gradients_are_finite_differences() -> None:
    """The bias, the cap and the LSE, without torch."""
    random = np.random.default_rng(0)
    q, k, v = (
        random.standard_normal((1, 2, 3, 2)),
        random.standard_normal((1, 1, 4, 2)),
        random.standard_normal((1, 1, 4, 2)),
    )
    bias, sinks = random.standard_normal((1, 1, 3, 4)), random.standard_normal(2)
    grad_out, grad_lse = random.standard_normal((1, 2, 3, 2)), random.standard_normal((1, 2, 3))

    def loss(*arguments: np.ndarray) -> float:
        q, k, v, bias, sinks = arguments
        out, lse = meaning.attention(q, k, v, bias=bias, sinks=sinks, softcap=0.8, causal=True, return_lse=True)
        return float((out * grad_out).sum() + (lse * grad_lse).sum())

    arguments = [q, k, v, bias, sinks]
    got = meaning.attention_backward(
        q, k, v, grad_out, grad_lse=grad_lse, bias=bias, sinks=sinks, softcap=0.8, causal=True
    )
    for number, gradient in enumerate((got.query, got.key, got.value, got.bias, got.sinks)):
        assert gradient is not None
        for at in np.ndindex(gradient.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arguments]
                moved[number][at] += step
                values.append(loss(*moved))
            assert abs(gradient[at] - (values[0] - values[1]) / 2e-5) < 1e-8


def test_sequences_pages_and_masked_nan() -> None:
    query, key, value = arrays(cases.draw(1, 2, 1, 7, 12, 4))
    rows = np.array([[0, 0, 3, 0, 2, 5], [0, 3, 0, 0, 0, 4], [0, 4, 3, 0, 7, 2]])
    grad = np.ones((1, 2, 7, 4))
    out, lse = meaning.packed(query, key, value, rows, causal=True)
    whole = meaning.packed_backward(query, key, value, grad, rows, causal=True)
    total = np.zeros_like(key)
    for _, start, count, _, first, keys in rows:
        part = slice(start, start + count), slice(first, first + keys)
        alone = meaning.attention(query[:, :, part[0]], key[:, :, part[1]], value[:, :, part[1]], causal=True)
        assert np.array_equal(alone, out[:, :, part[0]])
        one = meaning.attention_backward(
            query[:, :, part[0]], key[:, :, part[1]], value[:, :, part[1]], grad[:, :, part[0]], causal=True
        )
        total[:, :, part[1]] += one.key
    assert np.allclose(whole.key, total, rtol=1e-13, atol=1e-15) and np.all(lse[:, :, 3] == -np.inf)
    pages = np.full((6, 1, 4, 4), np.nan)
    table = np.array([[4, 1], [5, -1], [0, -1]])
    for number, (_, _, _, _, first, keys) in enumerate(rows):
        for at in range(keys):
            pages[table[number, at // 4], :, at % 4] = key[0, :, first + at]
    rows[:, 3:5] = 0
    paged, _ = meaning.packed(query, pages, pages, rows, block_table=table, causal=True)
    same, _ = meaning.packed(
        query, key, key, np.array([[0, 0, 3, 0, 2, 5], [0, 3, 0, 0, 0, 4], [0, 4, 3, 0, 7, 2]]), causal=True
    )
    assert np.array_equal(paged, same)


def test_merge_is_attention_over_the_union() -> None:
    query, key, value = arrays(cases.draw(1, 2, 2, 3, 20, 4))
    parts = [slice(0, 0), slice(0, 13), slice(13, 20)]
    results = [meaning.attention(query, key[:, :, x], value[:, :, x], return_lse=True) for x in parts]
    out, lse = meaning.merge(np.stack([x[0] for x in results]), np.stack([x[1] for x in results]))
    whole = meaning.attention(query, key, value, return_lse=True)
    assert np.allclose(out, whole[0], rtol=1e-13) and np.allclose(lse, whole[1], rtol=1e-14)


def test_an_added_bias_is_the_bias() -> None:
    query, key, value = arrays(cases.draw(1, 2, 2, 3, 5, 4))
    bias = np.random.default_rng(0).standard_normal((1, 2, 1, 5))
    program = added_bias(bias)
    one = meaning.attention(query, key, value, bias=bias)
    other = meaning.attention(query, key, value, score_mod=program.text, score_captures=program.captures)
    assert np.allclose(one, other, rtol=1e-14)
