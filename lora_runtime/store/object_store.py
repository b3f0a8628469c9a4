"""A store in a bucket, through fsspec: objects appear whole, and an entry is there when its manifest is."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from lora_runtime.errors import LoomError, NotFound, StoreUnavailable
from lora_runtime.folder import FILES
from lora_runtime.store.protocol import (
    CHUNK_BYTES,
    INCOMING,
    MANIFEST,
    VERSIONS,
    checked_name,
    checked_receipt,
    checked_version,
    is_version,
    manifest,
    said_at,
)


class ObjectStore:
    """Implements :class:`lora_runtime.store.protocol.Store`. ``options`` are the file system's own (endpoint, keys).

    The manifest is written last and deleted first. Two writers of one version write the same tensors; should their
    JSON be laid out differently, its meaning is the same, and so is the fingerprint that readers check.
    """

    def __init__(self, url: str, scratch: Path, options: Mapping[str, Any]) -> None:
        """``scratch``: a folder of this machine for staging."""
        with translated():
            self._fs, self._root = url_to_fs(url, **options)
        self._scratch = scratch

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with translated():
            self._scratch.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self._scratch)
        with folder as name:
            yield Path(name)

    def publish(self, folder: Path, version: str) -> str:
        # Also where the entry is there: whoever registers it again may do so because an object was damaged.
        with translated():
            for name in FILES:
                if (folder / name).is_file():
                    self._fs.put_file(str(folder / name), f"{self._place(version)}/{name}")
        self._write_manifest(version)
        return self.location(version)

    def renew(self, version: str) -> None:
        if self.holds(version):
            self._write_manifest(version)

    def location(self, version: str) -> str:
        return str(self._fs.unstrip_protocol(self._place(version)))

    def holds(self, version: str) -> bool:
        with translated():
            self._fs.invalidate_cache()
            return bool(self._fs.exists(f"{self._place(version)}/{MANIFEST}"))

    def versions(self) -> list[str]:
        found = (item["name"].rstrip("/").rpartition("/")[2] for item in self._listed(f"{self._root}/{VERSIONS}"))
        return sorted(name for name in found if is_version(name))

    def published_at(self, version: str) -> datetime | None:
        with translated(), suppress(FileNotFoundError):
            return said_at(self._fs.cat_file(f"{self._place(version)}/{MANIFEST}"))
        return None

    def remove(self, version: str) -> None:
        self._delete(self._place(version), (MANIFEST, *FILES))

    def receive(self, receipt: str, name: str, content: BinaryIO) -> None:
        with translated(), self._fs.open(f"{self._incoming(receipt)}/{checked_name(name)}", "wb") as file:
            shutil.copyfileobj(content, file, CHUNK_BYTES)

    def take(self, receipt: str, into: Path) -> None:
        found = {item["name"].rpartition("/")[2] for item in self._listed(self._incoming(receipt))}
        if not found:
            raise NotFound("Nothing was received under that id.", near=[])
        with translated():
            for name in found & set(FILES):
                self._fs.get_file(f"{self._incoming(receipt)}/{name}", str(into / name))
        self.discard(receipt)

    def discard(self, receipt: str) -> None:
        self._delete(self._incoming(receipt), FILES)

    def sweep(self, older_than_s: float) -> None:
        for folder in self._listed(f"{self._root}/{INCOMING}"):
            for file in self._listed(folder["name"]):
                with suppress(FileNotFoundError), translated():
                    if _age_s(self._fs.modified(file["name"])) > older_than_s:
                        self._fs.rm_file(file["name"])

    def _write_manifest(self, version: str) -> None:
        with translated():
            self._fs.pipe_file(f"{self._place(version)}/{MANIFEST}", manifest(version))

    def _delete(self, folder: str, names: Iterable[str]) -> None:
        """In this order; what is not there is passed over."""
        for name in names:
            with suppress(FileNotFoundError), translated():
                self._fs.rm_file(f"{folder}/{name}")

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        with translated():
            self._fs.invalidate_cache()
            try:
                return [item for item in self._fs.ls(folder, detail=True) if item["name"].rstrip("/") != folder]
            except FileNotFoundError:
                return []

    def _place(self, version: str) -> str:
        return f"{self._root}/{VERSIONS}/{checked_version(version)}"

    def _incoming(self, receipt: str) -> str:
        return f"{self._root}/{INCOMING}/{checked_receipt(receipt)}"


@contextmanager
def translated() -> Iterator[None]:
    """The one door for what fsspec's backends raise; only FileNotFoundError, which all of them share, passes."""
    try:
        yield
    except (LoomError, FileNotFoundError):
        raise
    except Exception as error:  # each backend raises whatever its client library does
        message = f"The object store failed ({type(error).__name__}); try again shortly."
        raise StoreUnavailable(message, retry_after_s=5) from error


def _age_s(modified: datetime) -> float:
    return time.time() - (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()
