"""Which threads compute on several cores: in an engine's process only the one that runs the steps.

libgomp keeps a team of workers for every thread that ever computed in parallel, and counts them all together. Once
there are more than cores, workers that wait for each other sleep instead of spinning, and the many small products
of a decode step take ten times as long (libgomp's manual, ``GOMP_SPINCOUNT``).
A team ends with the thread it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Bound here, since vLLM's workers on CPUs replace it in torch by one that does nothing.
from torch import get_num_threads, set_num_threads

T = TypeVar("T")


def compute_with(num_threads: int) -> None:
    """From now on the calling thread computes with ``num_threads``."""
    set_num_threads(num_threads)
    # A thread that has not computed yet would take, at its first product, what any thread set last; asking settles it.
    get_num_threads()


def compute_alone() -> None:
    """From now on the calling thread computes without a team: what every helper thread starts with."""
    compute_with(1)


def available() -> int:
    """How many threads the calling thread computes with: ``OMP_NUM_THREADS``, or torch's own choice."""
    return get_num_threads()


class Sharing:
    """The cores of a thread that computes beside a helper. Used from that thread alone."""

    def __init__(self, num_threads: int) -> None:
        """``num_threads``: what the calling thread computes with."""
        self._all = self._now = num_threads

    def give_one_up(self, is_asked: bool) -> None:
        """Compute with one thread less while asked for, where there are several.

        With a helper on one of its cores a team waits at every barrier until the helper's time is up: on two cores
        a step took ten times as long.
        """
        wanted = self._all - 1 if is_asked and self._all > 1 else self._all
        if wanted != self._now:
            compute_with(wanted)
            self._now = wanted


def with_a_passing_team(work: Callable[[], T]) -> T:
    """What ``work`` returns, computed with every core; its team is gone afterwards."""
    with ThreadPoolExecutor(1, initializer=compute_with, initargs=(available(),)) as passing:
        return passing.submit(work).result()
