"""What lies in a bucket, as folders of this machine: fetched once, checked, kept while there is room."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.core import url_to_fs

from lora_runtime.errors import AdapterMissing, MalformedAdapter, StoreUnavailable
from lora_runtime.folder import FILES, fingerprint
from lora_runtime.store.factory import local_path
from lora_runtime.store.object_store import translated
from lora_runtime.store.protocol import MANIFEST, checked_version, is_version

IN_USE_S = 900.0
"""A copy asked for within this time is never deleted: a request that waits for its slot may read it yet."""


class LocalCopies:
    """Folders by version, least recently asked for first out beyond ``max_bytes``. Shared by a machine's processes.

    Safe from any thread; calls block.
    """

    def __init__(self, folder: Path, max_bytes: int, options: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._options = dict(options or {})

    def folder_of(self, location: str, version: str) -> Path:
        """A folder with the content of ``version``, whose entry is at ``location``.

        Raises AdapterMissing where the entry is gone, MalformedAdapter for content of another fingerprint,
        StoreUnavailable. A location that is a folder already is returned as it is.
        """
        local = local_path(location)
        if local is not None:
            return local
        place = self._folder / checked_version(version)
        try:
            if not self._is_there(place):
                self._folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self._folder / f"{version}.lock"):
                    if not self._is_there(place):
                        self._fetch(location, version, place)
                        self._evict()
        except OSError as error:
            raise StoreUnavailable(
                f"This machine's folder of copies failed: {error.strerror}.", retry_after_s=5
            ) from error
        return place

    def discard(self, version: str) -> None:
        """Forget a copy, so that it is fetched again; nothing happens where there is none."""
        grave = self._folder / f"{uuid.uuid4().hex}.part"
        with suppress(FileNotFoundError):
            (self._folder / checked_version(version)).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _is_there(self, place: Path) -> bool:
        try:
            os.utime(place)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, location: str, version: str, place: Path) -> None:
        stage = self._folder / f"{uuid.uuid4().hex}.part"
        stage.mkdir()
        try:
            with translated():
                files, root = url_to_fs(location, **self._options)
                # Its manifest is what makes it an entry; its files may be older, or left over.
                files.invalidate_cache()
                files.get_file(f"{root}/{MANIFEST}", str(stage / MANIFEST))
                for name in FILES:
                    with suppress(FileNotFoundError):
                        files.get_file(f"{root}/{name}", str(stage / name))
            if fingerprint(stage) != version:
                raise MalformedAdapter(
                    f"What the store holds as version {version[:12]} has other content: a file was damaged or "
                    "replaced. Register the adapter again.",
                    version=version,
                )
            stage.rename(place)
        except FileNotFoundError as error:
            raise AdapterMissing(f"The store holds no version {version[:12]} any more; register it again.") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _evict(self) -> None:
        copies = [place for place in self._folder.iterdir() if is_version(place.name)]
        sizes = {place: _num_bytes(place) for place in copies}
        excess = sum(sizes.values()) - self._max_bytes
        for place in sorted(copies, key=_asked_at):
            if excess <= 0 or time.time() - _asked_at(place) < IN_USE_S:
                return
            shutil.rmtree(place, ignore_errors=True)
            excess -= sizes[place]


def _asked_at(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except FileNotFoundError:  # another process evicted it
        return 0.0


def _num_bytes(place: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in place.iterdir())
    return 0
