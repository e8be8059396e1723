"""The speculation room refuses bad input by name, on both floors, and says what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tilewise import speculation
from tilewise.errors import ArgumentError, DtypeError, ShapeError

torch = pytest.importorskip("torch")

from tilewise.torch import speculation as torch_speculation  # noqa: E402


def to_torch(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    return torch.from_numpy(array.copy())


class Floor:
    """One floor, called with NumPy arrays and answering with them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        if self.name == "numpy":
            return getattr(speculation, function)(*arguments, **keywords)
        arguments = tuple(to_torch(value) for value in arguments)
        keywords = {name: to_torch(value) for name, value in keywords.items()}
        result = getattr(torch_speculation, function)(*arguments, **keywords)
        if isinstance(result, torch.Tensor):
            return result.numpy()
        return type(result)(**{name: getattr(result, name).numpy() for name in result.__dataclass_fields__})


@pytest.fixture(params=["numpy", "torch"])
def floor(request: pytest.FixtureRequest) -> Floor:
    return Floor(request.param)


GOOD = {
    "draft_tokens": np.array([[0, 1], [2, 0]]),
    "draft_laws": np.full((2, 2, 3), 1 / 3),
    "logits": np.zeros((2, 3, 3)),
    "seed": 0,
    "requests": np.arange(2),
    "positions": 0,
}


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, Any]:
    array = GOOD[name].copy()
    array[index] = value
    return {name: array}


ERRORS = [
    ({"draft_tokens": np.zeros(2, np.int64)}, ShapeError, r"draft_tokens: expected rank 2"),
    ({"draft_tokens": np.zeros((2, 2))}, DtypeError, r"draft_tokens: expected dtype int32 or int64, got float64"),
    ({"logits": np.zeros((2, 3))}, ShapeError, r"logits: expected rank 3"),
    (
        {"logits": np.zeros((2, 2, 3))},
        ShapeError,
        r"logits: expected \[B = 2, K \+ 1 = 3, V >= 1\].*got shape \(2, 2, 3\)",
    ),
    ({"logits": np.zeros((1, 3, 3))}, ShapeError, r"logits: expected \[B = 2"),
    ({"logits": np.zeros((2, 3, 0))}, ShapeError, r"V >= 1"),
    ({"logits": np.zeros((2, 3, 3), np.int64)}, DtypeError, r"logits: expected dtype float32, float64, float16"),
    (
        {"draft_laws": np.full((2, 2, 4), 0.25)},
        ShapeError,
        r"draft_laws: expected .*V = 3.*another vocabulary must be mapped",
    ),
    ({"draft_laws": np.full((2, 3), 1 / 3)}, ShapeError, r"draft_laws"),
    (
        {"draft_laws": np.full((2, 2, 3), 1 / 3, np.float16)},
        DtypeError,
        r"draft_laws: expected dtype float32 or float64",
    ),
    (
        {"draft_laws": np.zeros((2, 2, 3))},
        ArgumentError,
        r"draft_laws\[0, 0\]: .*add up to 1 within 0.0001, got a sum of 0",
    ),
    (changed("draft_laws", (1, 1, 2), 0.4), ArgumentError, r"draft_laws\[1, 1\]: .*a sum of 1\.06"),
    (changed("draft_laws", (1, 0, 1), np.nan), ArgumentError, r"draft_laws\[1, 0\]: .*a sum of NaN"),
    (
        {"draft_laws": np.tile([2 / 3, 2 / 3, -1 / 3], (2, 2, 1))},
        ArgumentError,
        r"draft_laws\[0, 0\]: .*a negative entry",
    ),
    (
        {"draft_laws": np.tile([0.5, 0.5, 0], (2, 2, 1))},
        ArgumentError,
        r"draft_laws\[1, 0\]: expected a positive .* token 2",
    ),
    (
        changed("draft_tokens", (1, 0), 3),
        ArgumentError,
        r"draft_tokens\[1, 0\]: expected a token id in \[0, V = 3\), got 3",
    ),
    (changed("draft_tokens", (0, 1), -1), ArgumentError, r"draft_tokens\[0, 1\]: .*got -1; say with draft_lengths"),
    ({"draft_laws": None, **changed("draft_tokens", (0, 1), 9)}, ArgumentError, r"draft_tokens\[0, 1\]"),
    (changed("logits", (1, 2, 1), np.nan), ArgumentError, r"logits\[1, 2\]: expected numbers, got NaN at token 1"),
    ({"logits": np.full((2, 3, 3), -np.inf)}, ArgumentError, r"logits\[0, 0\]: expected at least one token above -inf"),
    ({"temperature": -0.5}, ArgumentError, r"temperature\[0\]: expected a finite number >= 0, got -0.5"),
    ({"temperature": np.array([1.0, np.nan])}, ArgumentError, r"temperature\[1\]: .*got NaN"),
    ({"temperature": np.inf}, ArgumentError, r"temperature\[0\]"),
    ({"temperature": np.ones(3)}, ShapeError, r"temperature: expected one number, or \[B = 2\]"),
    ({"temperature": "hot"}, DtypeError, r"temperature: expected numbers"),
    ({"top_k": -1}, ArgumentError, r"top_k\[0\]: expected an integer >= 0, got -1"),
    ({"top_k": 2.5}, DtypeError, r"top_k: expected integers"),
    ({"top_p": 0.0}, ArgumentError, r"top_p\[0\]: expected a number in \(0, 1\], got 0"),
    ({"top_p": np.array([1.0, 1.01])}, ArgumentError, r"top_p\[1\]: expected a number in \(0, 1\], got 1.01"),
    (
        {"draft_lengths": np.array([0, 3])},
        ArgumentError,
        r"draft_lengths\[1\]: expected an integer in \[0, K = 2\], got 3",
    ),
    ({"draft_lengths": np.array([-1, 0])}, ArgumentError, r"draft_lengths\[0\]"),
    ({"requests": 0}, ArgumentError, r"requests: expected \[B = 2\].*would draw the same numbers"),
    (
        {"requests": np.array([0, 2**32])},
        ArgumentError,
        r"requests\[1\]: expected an integer in \[0, 2\^32\), got 4294967296",
    ),
    ({"positions": -1}, ArgumentError, r"positions\[0\]: expected an integer >= 0, got -1"),
    ({"seed": -1}, ArgumentError, r"seed: expected an integer in \[0, 2\^63\), got -1"),
    ({"seed": 0.5}, DtypeError, r"seed: expected an integer"),
]


def test_the_error_cases_start_from_a_good_call(floor: Floor) -> None:
    assert floor("verify", **GOOD).tokens.shape == (2,)


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_say_what_is_wrong(floor: Floor, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        floor("verify", **{**GOOD, **change})


def test_other_errors(floor: Floor) -> None:
    with pytest.raises(ShapeError, match=r"\[V\], \[B, V\] or \[B, N, V\]"):
        floor("process", np.zeros((1, 1, 1, 1)))
    with pytest.raises(ArgumentError, match=r"logits\[1\]: expected numbers, got NaN at token 2"):
        floor("process", np.array([[0.0, 0, 0], [0, 0, np.nan]]))
    with pytest.raises(ArgumentError, match=r"probabilities\[1\]: .*a sum of 2"):
        floor("sample", np.array([[1.0], [2.0]]), seed=0, requests=np.arange(2), positions=0)
    with pytest.raises(ArgumentError, match="purpose: expected 'draft'"):
        floor("sample", np.ones((1, 1)), seed=0, requests=0, positions=0, purpose="fun")
    with pytest.raises(ArgumentError, match="laws_dtype: expected 'float64' or 'float32', got 'float16'"):
        floor("draft_token", np.ones((1, 1)), seed=0, requests=0, positions=0, laws_dtype="float16")


def test_outside_strict_only_what_is_looked_at_matters(floor: Floor) -> None:
    logits = np.zeros((1, 3, 3))
    logits[0, 0] = [9, 0, 0]
    logits[0, 2] = np.nan  # never reached: the first draft is refused
    laws = np.full((1, 2, 3), 1 / 3)
    keywords = {"temperature": 0.0, "seed": 0, "requests": 0, "positions": 0}
    result = floor("verify", np.array([[1, 1]]), laws, logits, **keywords, strict=False)
    assert (result.accepted[0], result.tokens[0]) == (0, 0)
    with pytest.raises(ArgumentError, match=r"logits\[0, 2\]: expected numbers, got NaN at token 0"):
        floor("verify", np.array([[1, 1]]), laws, logits, **keywords)
    zero = np.array([[[0.0, 0.5, 0.5]]])
    chain = (np.array([[0]]), zero, logits[:, :2])
    assert floor("verify", *chain, **keywords, strict=False).accepted[0] == 1
    with pytest.raises(
        ArgumentError, match=r"draft_laws\[0, 0\]: expected a positive probability for the drafted token 0"
    ):
        floor("verify", *chain, **keywords)
