"""Where a merge is made and where its result comes to lie: in a folder that all nodes mount, or in a bucket.

Readers see a result as a whole or not at all: it is there when its manifest is, which is written last. What tasks have
done is recorded beside, so that whoever goes on after a crash knows what need not be done again.

Calls block. Safe for several machines at once, each writing files of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs

from lora_runtime.errors import Conflict, StoreUnavailable
from lora_runtime.merge.scratch import scratch_folder
from lora_runtime.store.factory import local_path
from lora_runtime.store.folder_store import flush
from lora_runtime.store.object_store import translated

MANIFEST = "manifest.json"
STAGING = ".staging"
RECORDS, RESULT = "records", "result"
PARTIAL = (".*.part", ".*.part.tmp")
"""Files that are being written, by whoever writes at such a path and stages beside it once more."""


class Workspace(Protocol):
    """Every method raises StoreUnavailable where the medium fails. ``location``: where the result lies, or would."""

    location: str

    def writing(self, file: str) -> AbstractContextManager[Path]:
        """A path on this machine to write ``file`` at, which may be in a folder; what is there when the block has ended
        well is in its place then."""

    def reading(self, file: str) -> AbstractContextManager[Path]:
        """``file`` as it lies there, on this machine."""

    def remove(self, file: str) -> None:
        """Take ``file`` out of the result; nothing happens where it is not there."""

    def result(self) -> AbstractContextManager[Path]:
        """A folder on this machine with every file of the result."""

    def record(self, unit: str) -> dict[str, Any] | None:
        """What was recorded of ``unit``; None where nothing was."""

    def keep(self, unit: str, record: Mapping[str, Any]) -> None:
        """Record ``unit``, as a whole or not at all."""

    def published(self) -> dict[str, Any] | None:
        """The manifest of what is under the result's name; None where nothing is."""

    def free_bytes(self) -> int | None:
        """Room for what is staged; None where there is no telling."""

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Let readers see the result, with this manifest. Raises Conflict where the name is taken."""

    def written_at(self) -> float | None:
        """When what is staged was last written to, in seconds since the epoch; None where nothing is staged."""

    def discard(self) -> None:
        """Delete what is staged. A published result stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A workspace's address, for tasks on any node. ``root``: a folder or a bucket's URL; ``name``: of the result in
    it; ``id``: of what is staged; ``scratch``: a folder of each machine; ``options``: the bucket's file system's."""

    root: str
    name: str
    id: str
    scratch: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> Workspace:
        folder = local_path(self.root)
        return BucketWorkspace(self) if folder is None else FolderWorkspace(folder, self.name, self.id)


class FolderWorkspace:
    """Implements :class:`Workspace`: staged in a hidden folder of ``root``, and renamed."""

    def __init__(self, root: Path, name: str, identifier: str) -> None:
        self._root = root
        self._place = root / name
        self.location = str(self._place)
        self._staged = root / STAGING / identifier

    @contextmanager
    def writing(self, file: str) -> Iterator[Path]:
        place = self._staged / RESULT / file
        partial = place.with_name(f".{place.name}.{os.getpid()}.part")
        with _translated():
            place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with _translated():
                flush(partial)
                partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def reading(self, file: str) -> Iterator[Path]:
        yield self._staged / RESULT / file

    def remove(self, file: str) -> None:
        with _translated():
            (self._staged / RESULT / file).unlink(missing_ok=True)

    @contextmanager
    def result(self) -> Iterator[Path]:
        yield self._staged / RESULT

    def record(self, unit: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._staged / RECORDS / f"{unit}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found

    def keep(self, unit: str, record: Mapping[str, Any]) -> None:
        place = self._staged / RECORDS / f"{unit}.json"
        with _translated():
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{unit}.{os.getpid()}.part")
            partial.write_text(json.dumps(record))
            flush(partial)
            partial.replace(place)

    def published(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._place / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return {} if self._place.exists() else None
        return found

    def free_bytes(self) -> int | None:
        there = next((folder for folder in (self._root, *self._root.absolute().parents) if folder.exists()), None)
        with _translated():
            return None if there is None else shutil.disk_usage(there).free

    def publish(self, manifest: Mapping[str, Any]) -> None:
        result = self._staged / RESULT
        with _translated():
            if self._place.exists():
                raise Conflict(f"'{self._place.name}' exists already; choose another name or remove it.")
            for pattern in PARTIAL:
                for left in result.rglob(pattern):  # of tasks that were killed
                    left.unlink()
            (result / MANIFEST).write_text(json.dumps(manifest, indent=1))
            flush(result / MANIFEST)
            flush(result)
            try:
                result.rename(self._place)
            except OSError as error:
                if self._place.exists():
                    raise Conflict(f"'{self._place.name}' exists already; choose another name.") from error
                raise
            flush(self._root)

    def written_at(self) -> float | None:
        times = []
        for path in (self._staged, *self._staged.rglob("*")):
            with suppress(FileNotFoundError):  # a task may be at work
                times.append(path.stat().st_mtime)
        return max(times, default=None)

    def discard(self) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)
        with suppress(OSError):  # others' work is staged there
            self._staged.parent.rmdir()


class BucketWorkspace:
    """Implements :class:`Workspace`: objects are written where they will lie, under the id of what is staged, and the
    manifest under the name alone is what points there. Files pass through a scratch folder of the machine."""

    def __init__(self, site: Site) -> None:
        with translated():
            self._fs, self._root = url_to_fs(site.root, **site.options)
        self.location = f"{site.root.rstrip('/')}/{site.name}/{site.id}"
        self._pointer = f"{self._root}/{site.name}/{MANIFEST}"
        self._place = f"{self._root}/{site.name}/{site.id}"
        self._records = f"{self._root}/{STAGING}/{site.id}"
        self._name, self._site_id = site.name, site.id
        self._scratch = Path(site.scratch)

    @contextmanager
    def writing(self, file: str) -> Iterator[Path]:
        with self._folder() as folder:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            yield folder / file
            with translated():
                self._fs.put_file(str(folder / file), f"{self._place}/{file}")

    @contextmanager
    def reading(self, file: str) -> Iterator[Path]:
        with self._folder() as folder:
            with translated():
                self._fs.get_file(f"{self._place}/{file}", str(folder / file))
            yield folder / file

    def remove(self, file: str) -> None:
        with translated(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._place}/{file}")

    @contextmanager
    def result(self) -> Iterator[Path]:
        with self._folder() as folder:
            with translated():
                for name in self._listed(self._place):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{self._place}/{name}", str(folder / name))
            yield folder

    def record(self, unit: str) -> dict[str, Any] | None:
        return self._json(f"{self._records}/{unit}.json")

    def keep(self, unit: str, record: Mapping[str, Any]) -> None:
        with translated():
            self._fs.pipe_file(f"{self._records}/{unit}.json", json.dumps(record).encode())

    def published(self) -> dict[str, Any] | None:
        return self._json(self._pointer)

    def free_bytes(self) -> int | None:
        return None

    def publish(self, manifest: Mapping[str, Any]) -> None:
        if self.published() is not None:
            raise Conflict(f"'{self._name}' exists already; choose another name or remove it.")
        content = json.dumps({**manifest, "folder": self._site_id}, indent=1).encode()
        with translated():
            self._fs.pipe_file(f"{self._place}/{MANIFEST}", content)
            self._fs.pipe_file(self._pointer, content)

    def written_at(self) -> float | None:
        times = []
        with translated():
            for folder in self._staged():
                for name in self._listed(folder):
                    with suppress(FileNotFoundError):
                        times.append(self._fs.modified(f"{folder}/{name}").timestamp())
        return max(times, default=None)

    def discard(self) -> None:
        folders = self._staged()
        with translated():
            for folder in folders:
                for name in self._listed(folder):
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(f"{folder}/{name}")

    def _staged(self) -> tuple[str, ...]:
        is_published = (self.published() or {}).get("folder") == self._site_id
        return (self._records, *(() if is_published else (self._place,)))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with scratch_folder(self._scratch) as folder:
            yield folder

    def _listed(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        return [str(name)[len(folder.rstrip("/")) + 1 :] for name in self._fs.find(folder)]

    def _json(self, key: str) -> dict[str, Any] | None:
        with translated():
            self._fs.invalidate_cache()
            try:
                found: dict[str, Any] = json.loads(self._fs.cat_file(key))
            except (FileNotFoundError, ValueError):
                return None
        return found


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"The folder of merges failed: {error.strerror}.", retry_after_s=5) from error
