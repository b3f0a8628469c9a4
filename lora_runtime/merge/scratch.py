"""Folders of a machine that last as long as the process which works in them. Imports no torch."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, LOCK, FILES = "work-", "lock", "files"
SETTLE_S = 60.0
"""Age at which a folder without a lock file counts as abandoned. A new folder has none for a moment either."""


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """An empty folder under ``root`` while the block lasts. Those of processes that were killed are removed first.

    Its owner holds a lock, which the kernel releases however the process ends. ``root`` is on the machine's own disk.
    """
    root.mkdir(parents=True, exist_ok=True)
    sweep_scratch(root)
    with tempfile.TemporaryDirectory(dir=root, prefix=PREFIX) as folder, open(Path(folder, LOCK), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(folder, FILES).mkdir()
        yield Path(folder, FILES)


def sweep_scratch(root: Path) -> int:
    """Remove the folders under ``root`` whose processes are gone; how many they were."""
    removed = 0
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_left(folder):
                shutil.rmtree(folder)
                removed += 1
    return removed


def _is_left(folder: Path) -> bool:
    """Raises OSError where its owner holds the lock, or has just removed the folder."""
    try:
        lock = open(folder / LOCK)  # noqa: SIM115  # closed below
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > SETTLE_S
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
