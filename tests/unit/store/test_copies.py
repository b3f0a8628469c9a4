"""Copies of a bucket's versions on a machine: right or refused, fetched once, and kept within their room."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_runtime.errors import AdapterMissing, MalformedAdapter
from lora_runtime.folder import TENSORS_NAME, fingerprint
from lora_runtime.store.copies import IN_USE_S
from tests.unit.store.conftest import Place, publish


@pytest.fixture
def remote(s3, bucket: str, tmp_path: Path) -> Place:
    return Place(f"{bucket}/loom", tmp_path / "scratch", s3)


def test_folders_are_served_as_they_are(tmp_path: Path):
    place = Place(str(tmp_path / "store"), tmp_path / "scratch")
    version, location = publish(place.open(), name="a")
    assert place.copies().folder_of(location, version) == Path(location)
    assert not place.scratch.exists()


def test_a_version_is_fetched_once_however_many_ask(remote: Place):
    version, location = publish(remote.open(), name="a")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: remote.copies().folder_of(location, version), range(16)))
    (folder,) = folders
    assert fingerprint(folder) == version
    remote.open().remove(version)
    assert remote.copies().folder_of(location, version) == folder, "what was fetched needs no store"


def test_what_the_store_lost_or_damaged_is_refused_and_leaves_nothing(remote: Place):
    import s3fs

    version, location = publish(remote.open(), name="a")
    s3fs.S3FileSystem(**remote.options).pipe_file(f"{location}/{TENSORS_NAME}", b"\x03" + b"\0" * 7 + b"{ }")
    with pytest.raises(MalformedAdapter, match="other content"):
        remote.copies().folder_of(location, version)
    remote.open().remove(version)
    with pytest.raises(AdapterMissing, match="register it again"):
        remote.copies().folder_of(location, version)
    assert [path for path in (remote.scratch / "copies").iterdir() if path.is_dir()] == []


def test_copies_least_recently_asked_for_leave_first(remote: Place):
    store, copies = remote.open(), remote.copies(max_bytes=1)
    entries = [publish(store, name=f"a{number}") for number in range(3)]
    folders = [copies.folder_of(location, version) for version, location in entries[:2]]
    assert all(folder.is_dir() for folder in folders), "nothing that may be in use goes, whatever the limit"
    long_ago = time.time() - IN_USE_S - 1
    os.utime(folders[0], (long_ago, long_ago))
    newest = copies.folder_of(entries[2][1], entries[2][0])
    assert [folder.is_dir() for folder in (*folders, newest)] == [False, True, True]
    assert copies.folder_of(entries[0][1], entries[0][0]).is_dir()
