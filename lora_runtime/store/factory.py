"""A store from its address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol

from lora_runtime.store.folder_store import FolderStore
from lora_runtime.store.object_store import ObjectStore
from lora_runtime.store.protocol import Store


def open_store(url: str, scratch: Path, options: Mapping[str, Any] | None = None) -> Store:
    """A folder's path or ``file://`` address, or a bucket's, such as ``s3://bucket/loom``.

    ``scratch``: a folder of this machine; ``options``: the bucket's file system's own. Raises StoreUnavailable.
    """
    folder = local_path(url)
    return FolderStore(folder) if folder is not None else ObjectStore(url.rstrip("/"), scratch, options or {})


def local_path(location: str) -> Path | None:
    """The folder that ``location`` is on a mounted file system; None for a bucket's."""
    protocol, path = split_protocol(location)
    return Path(path).expanduser() if protocol in (None, "file", "local") else None
