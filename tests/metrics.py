"""Samples of a Prometheus text, and waiting for them: replicas export what they counted every second in tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels."""
WAIT_S = 30.0
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


class Scrape:
    """The samples of one text."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.values: dict[Series, float] = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }
        self.growing = {
            series
            for family in families
            for sample in family.samples
            if family.type in ("counter", "histogram") and not sample.name.endswith("_created")
            for series in [(sample.name, tuple(sorted(sample.labels.items())))]
        }

    def total(self, name: str, **labels: str) -> float:
        """Over all replicas, of the samples that have these labels."""
        return sum(self.named(name, **labels).values())

    def named(self, name: str, **labels: str) -> dict[Series, float]:
        wanted = labels.items()
        return {
            series: v for series, v in self.values.items() if series[0] == name and wanted <= dict(series[1]).items()
        }

    def values_of(self, label: str, name: str, **labels: str) -> set[str]:
        """What ``label`` is in the samples."""
        return {dict(found)[label] for _, found in self.named(name, **labels)}


def scrape(url: str) -> Scrape:
    """What the service shows at ``/metrics``."""
    return Scrape(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text)


def eventually(url: str, holds: Callable[[Scrape], bool]) -> Scrape:
    """The first scrape for which ``holds`` does."""
    deadline = time.monotonic() + WAIT_S
    while not holds(found := scrape(url)):
        assert time.monotonic() < deadline, sorted(found.values.items())
        time.sleep(0.2)
    return found
