"""Counters, gauges and histograms of Ray's metrics. Made in a Ray Serve replica, each sample carries its deployment,
replica and application; outside Ray, what is measured goes nowhere.

Ray exports them on the metrics port of the node, every 10 s (``RAY_metrics_report_interval_ms``), with ``ray_`` before
each name and ``_total`` behind a counter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)


def counter(name: str, description: str, labels: Sequence[str] = (), fixed: Mapping[str, str] | None = None) -> Counter:
    """``fixed`` labels have these values in every sample, ``labels`` are given with each."""
    return _fixed(Counter(name, description, _keys(labels, fixed)), fixed)


def gauge(name: str, description: str, labels: Sequence[str] = (), fixed: Mapping[str, str] | None = None) -> Gauge:
    """As :func:`counter`. Ray drops a gauge that was not set for two of its export intervals."""
    return _fixed(Gauge(name, description, _keys(labels, fixed)), fixed)


def histogram(
    name: str,
    description: str,
    boundaries: Sequence[float],
    labels: Sequence[str] = (),
    fixed: Mapping[str, str] | None = None,
) -> Histogram:
    """As :func:`counter`. Buckets and count are exact; Ray estimates ``_sum`` from the middles of the buckets."""
    return _fixed(Histogram(name, description, list(boundaries), _keys(labels, fixed)), fixed)


def _keys(labels: Sequence[str], fixed: Mapping[str, str] | None) -> Any:
    return (*labels, *(fixed or ()))  # Ray declares tuple[str], and takes any number


def _fixed(instrument: Instrument, fixed: Mapping[str, str] | None) -> Instrument:
    if fixed:
        instrument.set_default_tags(dict(fixed))
    return instrument
