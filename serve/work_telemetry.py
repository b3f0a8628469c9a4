"""What the intake and the owner of merge jobs measure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from serve.instruments import counter, gauge, histogram
from serve.registry.merges import MergeState

SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)


class IntakeMetrics:
    """Of one intake replica."""

    def __init__(self) -> None:
        self._admissions = counter(
            "loom_admissions", "Adapters taken in, or the kind of error that kept them out", ("outcome",)
        )
        self._duration = histogram("loom_admission_seconds", "Time to fetch, examine and store an adapter", SECONDS)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Count one adapter when the context ends, however it ends."""
        begun, outcome = time.monotonic(), "admitted"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self._admissions.inc(1, {"outcome": outcome})
            self._duration.observe(time.monotonic() - begun)


class MergeMetrics:
    """Of one owner of merge jobs."""

    def __init__(self) -> None:
        self._running = gauge("loom_merges_running", "Merge jobs under way here")
        self._ended = counter("loom_merges", "Merge jobs that ended here, by state", ("state",))

    def running(self, count: int) -> None:
        """So many jobs are under way; to be said every second."""
        self._running.set(count)

    def ended(self, state: MergeState) -> None:
        """One job came to its end."""
        self._ended.inc(1, {"state": state.value})
