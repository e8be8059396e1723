"""Statistics as Prometheus metrics, of a provider that is not real."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from tilewise.errors import ArgumentError, MissingExtraError
from tilewise.hf.prometheus import Family, StatsCollector, families


@dataclass
class Fake:
    rounds: int = 12
    accepted: list[int] = field(default_factory=lambda: [3, 0, 5, 4])
    wait: dict[str, float] = field(default_factory=lambda: {"draft": 0.5, "batch": 1.25})
    latency: dict[str, object] = field(default_factory=lambda: {"bounds": [0.1, 0.5], "counts": [2, 1, 1], "sum": 3.0})
    hit_rate: float = 0.75
    speculating: bool = True
    later: float | None = None

    def stats(self) -> dict[str, object]:
        return dict(vars(self))


def test_kinds_of_values() -> None:
    found = {family.name: family for family in families(Fake().stats(), gauges=["hit_rate"])}
    assert found["tilewise_rounds"] == Family("tilewise_rounds", "counter", ((None, 12.0),))
    assert found["tilewise_hit_rate"].kind == found["tilewise_speculating"].kind == "gauge"
    assert found["tilewise_wait"].samples == (("draft", 0.5), ("batch", 1.25))
    accepted = found["tilewise_accepted"]
    assert accepted.samples == (("0", 3.0), ("1", 3.0), ("2", 8.0), ("3", 12.0), ("+Inf", 12.0))
    assert accepted.total == 0 * 3 + 2 * 5 + 3 * 4
    assert found["tilewise_latency"].samples == (("0.1", 2.0), ("0.5", 3.0), ("+Inf", 4.0))
    assert found["tilewise_latency"].total == 3.0
    assert "tilewise_later" not in found
    # A dataclass says the same, and NumPy's numbers count as numbers.
    assert families(Fake(), gauges=["hit_rate"]) == list(found.values())
    assert families({"n": np.int64(3), "k": np.array([1, 2])})[1].samples[-1] == ("+Inf", 3.0)
    assert families({}) == []


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"a b": 1}, "cannot name a metric"),
        ({"text": "x"}, "tilewise_text: expected a number"),
        ({"wait": {"draft": "x"}}, "'draft'"),
        ({"down": -1}, "name it in gauges"),
        ({"odd": float("nan")}, "name it in gauges"),
        ({"h": {"bounds": [1, 1], "counts": [1, 1, 1], "sum": 1}}, "rising"),
        ({"h": {"bounds": [1, 2], "counts": [1, 1]}}, "one count more"),
        ({"h": {"bounds": [1], "counts": [1, 1]}}, "sum must be given"),
        (3, "a mapping or a dataclass"),
    ],
)
def test_what_is_no_metric(stats: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        families(stats)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tilewise\[metrics\]'"):
        StatsCollector(Fake())


def test_a_scrape() -> None:
    client = pytest.importorskip("prometheus_client")
    fake = Fake()
    registry = client.CollectorRegistry()
    registry.register(StatsCollector(fake, gauges=["hit_rate"], label="cause"))
    fake.rounds += 1  # asked at every scrape, not kept
    text = client.generate_latest(registry).decode().splitlines()
    for line in (
        "# TYPE tilewise_rounds_total counter",
        "tilewise_rounds_total 13.0",
        'tilewise_wait_total{cause="batch"} 1.25',
        "tilewise_hit_rate 0.75",
        "# TYPE tilewise_accepted histogram",
        'tilewise_accepted_bucket{le="2"} 8.0',
        'tilewise_accepted_bucket{le="+Inf"} 12.0',
        "tilewise_accepted_count 12.0",
        "tilewise_accepted_sum 22.0",
        'tilewise_latency_bucket{le="0.5"} 3.0',
        "tilewise_speculating 1.0",
    ):
        assert line in text, f"{line} is not in\n" + "\n".join(text)
    with pytest.raises(ArgumentError, match="function"):
        StatsCollector(3)
    with pytest.raises(ArgumentError, match="cannot name"):
        StatsCollector(lambda: {"a b": 1})
