"""Only the thread that was told to computes on several cores, and passing teams end."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_runtime.engine import threads

COUNTS = """
import os, time, torch
from lora_runtime.engine import threads
num_tasks = lambda: len(os.listdir("/proc/self/task"))
work = lambda: (torch.randn(512, 512) @ torch.randn(512, 512), num_tasks())[1]
threads.compute_with(4)
before = num_tasks()
during = threads.with_a_passing_team(work)
end = time.monotonic() + 30
while num_tasks() > before and time.monotonic() < end:
    time.sleep(0.01)  # workers go by themselves once their thread has gone
print(before, during, num_tasks())
"""


def test_what_a_helper_sets_is_its_own() -> None:
    with (
        ThreadPoolExecutor(1, initializer=threads.compute_with, initargs=(3,)) as steps,
        ThreadPoolExecutor(1, initializer=threads.compute_alone) as helper,
    ):
        steps.submit(int).result()
        assert helper.submit(threads.available).result() == 1
        # Its first question comes after the helper's setting, which torch keeps for threads that have not asked yet.
        assert steps.submit(threads.available).result() == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_a_passing_team_is_gone_afterwards() -> None:
    out = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, out.split())
    assert during >= before + 4
    assert after == before


def test_a_passing_team_hands_on_what_was_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        threads.with_a_passing_team(lambda: 1 / 0)


def test_a_thread_gives_one_core_up_while_it_is_asked_to() -> None:
    with ThreadPoolExecutor(1, initializer=threads.compute_with, initargs=(3,)) as steps:

        def counts() -> list[int]:
            sharing = threads.Sharing(threads.available())
            found = []
            for is_asked in (False, True, True, False):
                sharing.give_one_up(is_asked)
                found.append(threads.available())
            return found

        assert steps.submit(counts).result() == [3, 2, 2, 3]
    with ThreadPoolExecutor(1, initializer=threads.compute_alone) as alone:

        def count() -> int:
            threads.Sharing(1).give_one_up(True)
            return threads.available()

        assert alone.submit(count).result() == 1
