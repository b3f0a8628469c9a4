"""A store in a folder: of this machine, or of a file system that all nodes mount."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from lora_runtime.errors import LoomError, NotFound, StoreUnavailable
from lora_runtime.folder import FILES, fingerprint
from lora_runtime.store.protocol import (
    CHUNK_BYTES,
    INCOMING,
    MANIFEST,
    STAGING,
    VERSIONS,
    checked_name,
    checked_receipt,
    checked_version,
    is_version,
    manifest,
    said_at,
)


class FolderStore:
    """Implements :class:`lora_runtime.store.protocol.Store`: entries are staged beside and renamed into place."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def staging(self) -> Iterator[Path]:
        folder = self._root / STAGING / uuid.uuid4().hex
        with _translated():
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, version: str) -> str:
        place = self._place(version)
        with _translated():
            if place.is_dir():
                if _is_sound(place, version):
                    self.renew(version)
                    return str(place)
                self.remove(version)
            (folder / MANIFEST).write_bytes(manifest(version))
            for file in folder.iterdir():
                flush(file)
            flush(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Renaming onto a folder that holds something fails, which is how writers of one version meet.
            try:
                folder.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
                self.renew(version)
            flush(place.parent)
        return str(place)

    def renew(self, version: str) -> None:
        place = self._place(version)
        with _translated(), suppress(FileNotFoundError):
            fresh = place / f".{uuid.uuid4().hex}"
            fresh.write_bytes(manifest(version))
            fresh.replace(place / MANIFEST)

    def location(self, version: str) -> str:
        return str(self._place(version))

    def holds(self, version: str) -> bool:
        with _translated():
            return self._place(version).is_dir()

    def versions(self) -> list[str]:
        folder = self._root / VERSIONS
        with _translated():
            return sorted(name for name in os.listdir(folder) if is_version(name)) if folder.is_dir() else []

    def published_at(self, version: str) -> datetime | None:
        with _translated(), suppress(FileNotFoundError):
            return said_at((self._place(version) / MANIFEST).read_bytes())
        return None

    def remove(self, version: str) -> None:
        grave = self._root / STAGING / uuid.uuid4().hex
        with _translated():
            grave.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._place(version).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def receive(self, receipt: str, name: str, content: BinaryIO) -> None:
        folder = self._incoming(receipt)
        with _translated():
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / checked_name(name), "xb") as file:
                shutil.copyfileobj(content, file, CHUNK_BYTES)

    def take(self, receipt: str, into: Path) -> None:
        folder = self._incoming(receipt)
        if not folder.is_dir():
            raise NotFound("Nothing was received under that id.", near=[])
        with _translated():
            for name in FILES:
                with suppress(FileNotFoundError):
                    (folder / name).rename(into / name)
        self.discard(receipt)

    def discard(self, receipt: str) -> None:
        shutil.rmtree(self._incoming(receipt), ignore_errors=True)

    def sweep(self, older_than_s: float) -> None:
        for parent in (self._root / INCOMING, self._root / STAGING):
            for folder in parent.glob("*"):
                with suppress(FileNotFoundError):
                    if time.time() - folder.stat().st_mtime > older_than_s:
                        shutil.rmtree(folder, ignore_errors=True)

    def _place(self, version: str) -> Path:
        return self._root / VERSIONS / checked_version(version)

    def _incoming(self, receipt: str) -> Path:
        return self._root / INCOMING / checked_receipt(receipt)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"The store's folder failed: {error.strerror}.", retry_after_s=5) from error


def _is_sound(place: Path, version: str) -> bool:
    """Whether an entry still is what it was published as; a disk may lose bits, and a person may edit files."""
    try:
        return fingerprint(place) == version
    except LoomError:
        return False


def flush(path: Path) -> None:
    """To the disk, so that a renamed entry holds its bytes even after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
