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


def with_a_passing_team(work: Callable[[], T]) -> T:
    """What ``work`` returns, computed with every core; its team is gone afterwards."""
    with ThreadPoolExecutor(1, initializer=compute_with, initargs=(available(),)) as passing:
        return passing.submit(work).result()
