"""Where adapters may be taken from, and the copying of a stranger's files: confined, bounded, only the ones we read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fsspec.core import split_protocol, url_to_fs

from lora_runtime.errors import AdapterMissing, AdapterTooLarge, InvalidRequest, MalformedAdapter, StoreUnavailable
from lora_runtime.folder import FILES, PICKLE_NAME, TENSORS_NAME, config_file, fingerprint, tensors_file
from lora_runtime.store.factory import local_path
from lora_runtime.store.object_store import translated
from lora_runtime.store.protocol import CHUNK_BYTES

SCHEMES = frozenset({"s3", "gs", "gcs", "az", "abfs", "hf", "memory"})
"""Of URIs that may be allowed. Not http: a server may redirect to anywhere."""
MAX_LISTED = 8


class Sources:
    """Folders below ``roots``, and URIs below ``prefixes``; at most ``max_bytes`` of each adapter.

    ``preloaded``: further folders that the configuration itself registers; errors do not list them. ``options``: of
    the file systems, by scheme. Calls block; safe from any thread.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        prefixes: Sequence[str] = (),
        *,
        max_bytes: int,
        preloaded: Sequence[Path] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._roots = tuple(root.expanduser().resolve() for root in roots)
        self._preloaded = tuple(folder.expanduser().resolve() for folder in preloaded)
        self._prefixes = tuple(prefix.rstrip("/") for prefix in prefixes)
        self._max_bytes = max_bytes
        self._options = options or {}

    def folder(self, source: str) -> Path | None:
        """The folder that ``source`` names; None for an allowed URI. Raises InvalidRequest for what is not allowed."""
        if "\0" in source or "::" in source:
            raise InvalidRequest("The path holds what no path may hold.", param="path")
        local = local_path(source)
        if local is None:
            self._check_uri(source)
            return None
        try:
            found = local.resolve()
        except (OSError, RuntimeError) as error:
            raise InvalidRequest("The path cannot be resolved.", param="path") from error
        self._check_inside(found)
        return found

    def version_in_place(self, source: str) -> str | None:
        """The fingerprint of an allowed folder, which is cheaper than copying it; None for a URI.

        Raises as :meth:`fetch`, and MalformedAdapter.
        """
        folder = self.folder(source)
        if folder is None:
            return None
        for name in present(folder):
            self._opened(folder / name).close()
        return fingerprint(folder)

    def fetch(self, source: str, into: Path) -> None:
        """Copy the adapter at ``source`` into an empty folder.

        Raises InvalidRequest for a place that is not allowed, AdapterMissing, AdapterTooLarge, StoreUnavailable, or
        what :func:`lora_runtime.folder.tensors_file` raises where the tensors are not there.
        """
        folder = self.folder(source)
        if folder is None:
            self._fetch_uri(source, into)
            return
        remaining = self._max_bytes
        for name in present(folder):
            remaining -= self._copy_file(folder / name, into / name, remaining)

    def _copy_file(self, file: Path, to: Path, limit: int) -> int:
        with self._opened(file) as opened:
            return copy_bounded(opened, to, limit, self._max_bytes)

    def _opened(self, file: Path) -> BinaryIO:
        """``file``, which may be a link to a regular file inside the allowed folders."""
        try:
            found = file.resolve(strict=True)
            self._check_inside(found)
            # What was checked is what is opened: a link put in its place since then is not followed.
            descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, RuntimeError) as error:
            raise AdapterMissing(f"{file.name} cannot be read; check the adapter's files.") from error
        opened = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            opened.close()
            raise AdapterMissing(f"{file.name} is no regular file.")
        return opened

    def _fetch_uri(self, source: str, into: Path) -> None:
        with translated():
            protocol = str(split_protocol(source)[0])
            files, root = url_to_fs(source, **self._options.get(protocol, {}))
            try:
                names = {PurePosixPath(name).name for name in files.ls(root, detail=False)}
            except FileNotFoundError as error:
                raise AdapterMissing("There is nothing at that address.") from error
            except PermissionError as error:
                raise AdapterMissing("That address may not be read with the credentials at hand.") from error
            remaining = self._max_bytes
            for name in FILES:
                if name in names:
                    with files.open(f"{root}/{name}", "rb") as opened:
                        remaining -= copy_bounded(opened, into / name, remaining, self._max_bytes)
        if TENSORS_NAME not in names and PICKLE_NAME in names:
            raise MalformedAdapter(f"The adapter comes as {PICKLE_NAME}, a pickle, which is never read.")

    def _check_uri(self, source: str) -> None:
        protocol, path = split_protocol(source)
        is_plain = protocol in SCHEMES and not {"", ".", ".."} & set(path.rstrip("/").split("/"))
        if not is_plain or not any(_is_below(source.rstrip("/"), prefix) for prefix in self._prefixes):
            raise InvalidRequest(
                "The address is outside those that adapters may be taken from (setting adapters.sources): "
                f"{listed(self._prefixes)}.",
                param="path",
            )

    def _check_inside(self, path: Path) -> None:
        if not any(path.is_relative_to(root) for root in (*self._roots, *self._preloaded)):
            raise InvalidRequest(
                "The path is outside the folders that adapters may be registered from (setting adapters.roots): "
                f"{listed(self._roots)}.",
                param="path",
            )


def listed(allowed: Sequence[object]) -> str:
    """The first few places that are allowed, for an error's message."""
    shown = [str(place) for place in allowed[:MAX_LISTED]]
    more = f" and {len(allowed) - MAX_LISTED} more" if len(allowed) > MAX_LISTED else ""
    return f"{', '.join(shown)}{more}" if shown else "none is set"


def _is_below(source: str, prefix: str) -> bool:
    if source == prefix or source.startswith(f"{prefix}/"):
        return True
    # A repository of a model hub, hf://org/name, at a revision: hf://org/name@main.
    return prefix.startswith("hf://") and prefix.count("/") == 3 and source.startswith(f"{prefix}@")


def present(folder: Path) -> list[str]:
    """The names of an adapter's files in ``folder``. Raises AdapterMissing, MalformedAdapter or UnsupportedAdapter."""
    config_file(folder)
    tensors_file(folder)
    return [name for name in FILES if os.path.lexists(folder / name)]


def copy_bounded(content: BinaryIO, to: Path, limit: int, told: int) -> int:
    """Copy to the new file ``to``; returns the bytes.

    Raises AdapterTooLarge beyond ``limit``, which the message says is ``told``, StoreUnavailable where the disk fails.
    """
    size = 0
    try:
        with open(to, "xb") as file:
            while chunk := content.read(CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise AdapterTooLarge(f"The adapter's files hold more than {told} bytes.", limit=told)
                file.write(chunk)
    except OSError as error:
        raise StoreUnavailable(f"The adapter could not be copied: {error.strerror}.", retry_after_s=5) from error
    return size
