"""Fixtures of every test: instruction-set levels, poisoned outputs, how hard Hypothesis searches."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from tilewise.testing import force_isa, levels, poisoned

# The tests are no package, and the CUDA emulator beside them is one: loaded by its place, so that test files and the
# fixtures below share one module.
_spec = importlib.util.spec_from_file_location("cuda_emulator", Path(__file__).parent / "cuda_emulator" / "__init__.py")
assert _spec is not None and _spec.loader is not None
sys.modules["cuda_emulator"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["cuda_emulator"])
emulated, place, torch_cuda = (
    getattr(sys.modules["cuda_emulator"], name) for name in ("emulated", "place", "torch_cuda")
)

# Deadlines off: the machine is shared, and a slow example is no failure.
_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_CHECKS
)
hypothesis.settings.register_profile(
    "explore", max_examples=400, deadline=None, print_blob=True, suppress_health_check=_CHECKS
)
# The same examples at every run, unless HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level of this machine, in turn."""
    with force_isa(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers are full of NaN, so that an output element that no kernel wrote fails its test.

    The fronts allocate with ``np.empty`` and with torch's ``empty`` family. torch fills them itself when it is told
    to be deterministic, under torch.compile too.
    """

    def empty(shape: Any, dtype: Any = float, *args: Any, **kwargs: Any) -> np.ndarray:
        return poisoned(shape, dtype) if not args and not kwargs else real(shape, dtype, *args, **kwargs)

    real = np.empty
    monkeypatch.setattr(np, "empty", empty)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
