"""Counters of a running decoder for Prometheus::

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(StatsCollector(generator))
    start_http_server(9000)

A provider is any object with ``stats() -> dict`` (or a function that returns one). What a value is decides what it
becomes:

* a number: a counter ``tilewise_<name>_total``, or a gauge ``tilewise_<name>`` if it is named in `gauges`; a bool is a
  gauge of 0 or 1;
* a list of counts, ``counts[k]`` of the value k (accepted lengths, say): a histogram with one bucket for each k;
* ``{"bounds": [...], "counts": [...], "sum": x}`` (``counts`` has one more for what is above the last bound): a
  histogram of those bounds;
* any other mapping of text to numbers (waiting by cause, say): one counter or gauge with a label;
* None: nothing yet, left out.

:func:`families` does the translation and needs no library; :class:`StatsCollector` needs prometheus-client::

    pip install 'tilewise[metrics]'
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from itertools import pairwise
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError, MissingExtraError

__all__ = ["Family", "StatsCollector", "families"]

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


@dataclass(frozen=True)
class Family:
    """A metric and its samples.

    Attributes:
        name: without the ``_total`` of counters.
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        samples: ``(label value, number)``; the label value is None for a metric without a label. For histograms
            ``(upper bound as text, cumulative count)``, the last bound ``"+Inf"``.
        total: of histograms, the sum of all values.
    """

    name: str
    kind: str
    samples: tuple[tuple[str | None, float], ...]
    total: float = 0.0


def families(stats: Any, *, prefix: str = "tilewise", gauges: Iterable[str] = ()) -> list[Family]:
    """Statistics as metrics (see the module).

    Args:
        stats: a mapping, or a dataclass.
        prefix: of the names.
        gauges: names of values that may fall.

    Returns:
        A :class:`Family` for each value that is there.

    Raises:
        ArgumentError: a name that Prometheus does not allow, a value that is none of the kinds, a counter that is
            negative or not finite.

    Example:
        >>> for family in families({"rounds": 3, "accepted": [1, 0, 2]}):
        ...     print(family.name, family.kind, family.samples, family.total)
        tilewise_rounds counter ((None, 3.0),) 0.0
        tilewise_accepted histogram (('0', 1.0), ('1', 1.0), ('2', 3.0), ('+Inf', 3.0)) 4.0
    """
    if is_dataclass(stats) and not isinstance(stats, type):
        stats = {field.name: getattr(stats, field.name) for field in dataclass_fields(stats)}
    if not isinstance(stats, Mapping):
        raise ArgumentError(f"stats: expected a mapping or a dataclass, got {type(stats).__name__}")
    falling = frozenset(gauges)
    found = []
    for key, value in stats.items():
        name = f"{prefix}_{key}"
        if not isinstance(key, str) or not _NAME.fullmatch(name):
            raise ArgumentError(f"stats: {key!r} cannot name a metric; use letters, digits and underscores")
        if value is not None:
            found.append(_family(name, value, "gauge" if key in falling else "counter"))
    return found


def _family(name: str, value: Any, kind: str) -> Family:
    if isinstance(value, bool | np.bool_):
        return Family(name, "gauge", ((None, float(value)),))
    if _is_number(value):
        return Family(name, kind, ((None, _number(name, value, kind)),))
    if isinstance(value, Mapping):
        if {"bounds", "counts"} <= value.keys() <= {"bounds", "counts", "sum"}:
            return _histogram(name, value["bounds"], value["counts"], value.get("sum"))
        samples = []
        for label, number in value.items():
            if not _is_number(number):
                raise ArgumentError(f"{name}: expected a number for {label!r}, got {type(number).__name__}")
            samples.append((str(label), _number(name, number, kind)))
        return Family(name, kind, tuple(samples))
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        counts = list(value)
        return _histogram(name, list(range(len(counts))), [*counts, 0], None)
    raise ArgumentError(
        f"{name}: expected a number, a list of counts, a mapping of numbers or a histogram, got {type(value).__name__}"
    )


def _histogram(name: str, bounds: Any, counts: Any, total: float | None) -> Family:
    bounds, counts = [float(bound) for bound in bounds], list(counts)
    if len(counts) != len(bounds) + 1:
        raise ArgumentError(f"{name}: expected one count more than bounds, got {len(counts)} and {len(bounds)}")
    if any(low >= high for low, high in pairwise(bounds)):
        raise ArgumentError(f"{name}: expected rising bounds, got {bounds}")
    numbers = [_number(name, count, "counter") for count in counts]
    if total is None:
        if numbers[-1]:
            raise ArgumentError(f"{name}: values above the last bound are counted, so their sum must be given")
        total = sum(bound * count for bound, count in zip(bounds, numbers, strict=False))
    edges = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    return Family(name, "histogram", tuple(zip(edges, np.cumsum(numbers).tolist(), strict=True)), float(total))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _number(name: str, value: Any, kind: str) -> float:
    number = float(value)
    if kind == "counter" and not (number >= 0 and math.isfinite(number)):
        raise ArgumentError(f"{name}: expected a counter of at least 0, got {value}; name it in gauges if it may fall")
    return number


class StatsCollector:
    """A collector of prometheus-client over a provider of statistics, asked at every scrape.

    Args:
        provider: an object with ``stats()``, or a function.
        prefix: of the names.
        gauges: names of values that may fall.
        label: the name of the label of mappings.

    Raises:
        MissingExtraError: prometheus-client is not installed.
        ArgumentError: a provider that is neither, or statistics that are no metrics (asked once, now).
    """

    def __init__(
        self,
        provider: Any,
        *,
        prefix: str = "tilewise",
        gauges: Iterable[str] = (),
        label: str = "key",
    ) -> None:
        try:
            from prometheus_client import core  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtraError(
                f"metrics need prometheus-client ({error}); install it with: pip install 'tilewise[metrics]'"
            ) from error
        self._core: Any = core
        stats = getattr(provider, "stats", provider)
        if not callable(stats):
            raise ArgumentError(f"provider: expected an object with stats(), or a function, got {type(provider)}")
        self._stats: Callable[[], Any] = stats
        self._prefix, self._gauges, self._label = prefix, frozenset(gauges), label
        families(stats(), prefix=prefix, gauges=self._gauges)

    def collect(self) -> Iterator[Any]:
        """What the registry asks for: a metric family for each statistic."""
        for family in families(self._stats(), prefix=self._prefix, gauges=self._gauges):
            if family.kind == "histogram":
                metric = self._core.HistogramMetricFamily(family.name, _about(family))
                metric.add_metric([], list(family.samples), family.total)
            else:
                kinds = {"counter": self._core.CounterMetricFamily, "gauge": self._core.GaugeMetricFamily}
                labelled = any(label is not None for label, _ in family.samples)
                labels = [self._label] if labelled else []
                metric = kinds[family.kind](family.name, _about(family), labels=labels)
                for label, number in family.samples:
                    metric.add_metric([] if label is None else [label], number)
            yield metric


def _about(family: Family) -> str:
    return f"tilewise: {family.name.partition('_')[2].replace('_', ' ')}"
