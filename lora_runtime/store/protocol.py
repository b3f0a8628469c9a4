"""The contract of a store: versions that are there as a whole or not at all, and never change.

Order of a life: what a client uploads is *received* under an id; an adapter is assembled and examined in *staging*,
a folder of this machine; *publish* makes it an entry under its version; *remove* takes the entry away.

Calls block. Safe for several processes on several machines at once: writers of one version meet in one entry.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lora_runtime.errors import NotFound
from lora_runtime.folder import FILES

MANIFEST = "manifest.json"
VERSIONS, INCOMING, STAGING = "versions", "incoming", "staging"
CHUNK_BYTES = 4 << 20
_VERSION = re.compile(r"[0-9a-f]{64}")
_RECEIPT = re.compile(r"[0-9a-f]{32}")


class Store(Protocol):
    """Every method raises StoreUnavailable where the medium fails."""

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder on this machine to assemble an adapter in; what is left there at the end is deleted."""

    def publish(self, folder: Path, version: str) -> str:
        """Make the adapter in ``folder``, a staging folder, the entry ``version``; returns its location.

        Where a sound entry is there, only the time of its publication changes; a damaged one is repaired. The caller
        has checked that ``version`` is the content's fingerprint.
        """

    def renew(self, version: str) -> None:
        """Change the time of the entry's publication to now; nothing happens where there is none."""

    def location(self, version: str) -> str:
        """Where the entry ``version`` lies, or would lie: a folder's path, or a URI."""

    def holds(self, version: str) -> bool: ...

    def versions(self) -> Iterable[str]: ...

    def published_at(self, version: str) -> datetime | None:
        """When the entry was last published; None where there is none, or its manifest cannot be read."""

    def remove(self, version: str) -> None:
        """Take the entry away; nothing happens where there is none."""

    def receive(self, receipt: str, name: str, content: BinaryIO) -> None:
        """Keep one file of what is being uploaded, to be taken by :meth:`take`, on whatever machine."""

    def take(self, receipt: str, into: Path) -> None:
        """Bring what was received to the folder ``into``. Raises NotFound."""

    def discard(self, receipt: str) -> None:
        """Delete what was received; nothing happens where there is nothing."""

    def sweep(self, older_than_s: float) -> None:
        """Delete what was received or staged longer ago than that: whoever wanted it is gone."""


def new_receipt() -> str:
    return uuid.uuid4().hex


def is_version(text: str) -> bool:
    return _VERSION.fullmatch(text) is not None


def checked_version(version: str) -> str:
    """Raises NotFound for what cannot be one, so that no path is ever made of it."""
    if not is_version(version):
        raise NotFound("A version is 64 hexadecimal digits.", near=[])
    return version


def checked_receipt(receipt: str) -> str:
    """Raises NotFound."""
    if not _RECEIPT.fullmatch(receipt):
        raise NotFound("Nothing was received under that id.", near=[])
    return receipt


def checked_name(name: str) -> str:
    """Raises NotFound for a file that no adapter is read from."""
    if name not in FILES:
        raise NotFound(f"An adapter has no file '{name[:64]}'.", near=list(FILES))
    return name


def manifest(version: str) -> bytes:
    """What an entry says of itself. Its files' own checksum is the version."""
    return json.dumps({"version": version, "published_at": datetime.now(UTC).isoformat()}).encode()


def said_at(content: bytes) -> datetime | None:
    """When a manifest was written; None for one that cannot be read."""
    try:
        found: dict[str, Any] = json.loads(content)
        return datetime.fromisoformat(found["published_at"])
    except (ValueError, KeyError, TypeError):
        return None
