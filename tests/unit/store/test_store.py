"""Entries of a store: there as a whole or not at all, whoever writes at once, and gone when they are removed."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lora_runtime.errors import NotFound, StoreUnavailable
from lora_runtime.folder import CONFIG_NAME, TENSORS_NAME, fingerprint
from lora_runtime.store.factory import local_path, open_store
from lora_runtime.store.protocol import Store, new_receipt
from tests.fakes import EMPTY_TENSORS, write_fake_adapter
from tests.unit.store.conftest import Place, publish


def test_what_is_published_is_there_for_everyone(place: Place, store: Store):
    version, location = publish(store, name="a")
    other = place.open()
    assert other.holds(version) and list(other.versions()) == [version] and other.location(version) == location
    folder = place.copies().folder_of(location, version)
    assert fingerprint(folder) == version and (folder / TENSORS_NAME).read_bytes() == EMPTY_TENSORS
    age = datetime.now(UTC) - other.published_at(version)
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_nothing_is_there_before_it_is_published(store: Store):
    with store.staging() as folder:
        version = fingerprint(write_fake_adapter(folder, name="a"))
        assert not store.holds(version) and list(store.versions()) == []
    assert not folder.exists() and not store.holds(version) and store.published_at(version) is None


def test_publishing_again_renews_and_changes_nothing_else(store: Store):
    version, location = publish(store, name="a")
    first = store.published_at(version)
    assert publish(store, name="a") == (version, location)
    second = store.published_at(version)
    store.renew(version)
    assert first < second < store.published_at(version)
    store.renew("0" * 64)
    assert list(store.versions()) == [version]


def test_writers_of_one_version_meet_in_one_entry(place: Place):
    def write(number: int) -> tuple[str, str]:
        return publish(place.open(), name="shared", layout=sorted([number % 1]))

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(write, range(16)))
    ((version, location),) = results
    assert list(place.open().versions()) == [version]
    assert fingerprint(place.copies().folder_of(location, version)) == version


def test_removing_is_final_and_may_be_repeated(place: Place, store: Store):
    version, location = publish(store, name="a")
    kept, _ = publish(store, name="b")
    store.remove(version)
    store.remove(version)
    assert not store.holds(version) and list(store.versions()) == [kept]
    assert publish(store, name="a") == (version, location) and store.holds(version)


@pytest.mark.parametrize("version", ["", "..", "../" * 20, "a" * 63, "A" * 64, "0" * 64 + "/..", "0" * 63 + "\n"])
def test_what_is_no_version_makes_no_path(store: Store, version: str):
    for call in (store.holds, store.remove, store.location, store.published_at):
        with pytest.raises(NotFound):
            call(version)
    with pytest.raises(NotFound):
        store.take(version, Path())


def test_uploads_are_taken_once(place: Place, store: Store, tmp_path: Path):
    receipt = new_receipt()
    write_fake_adapter(tmp_path / "sent", name="a")
    for name in (CONFIG_NAME, TENSORS_NAME):
        with open(tmp_path / "sent" / name, "rb") as content:
            store.receive(receipt, name, content)
    assert list(store.versions()) == []
    with place.open().staging() as folder:
        place.open().take(receipt, folder)
        assert fingerprint(folder) == fingerprint(tmp_path / "sent")
        with pytest.raises(NotFound):
            store.take(receipt, folder)


def test_uploads_hold_an_adapters_files_only(store: Store, tmp_path: Path):
    receipt = new_receipt()
    for name in ("evil.py", "../adapter_config.json", "manifest.json", ""):
        with pytest.raises(NotFound):
            store.receive(receipt, name, io.BytesIO(b"x"))
    store.discard(receipt)
    with pytest.raises(NotFound):
        store.take(receipt, tmp_path)


def test_what_was_left_behind_is_swept(place: Place, store: Store):
    version, _ = publish(store, name="a")
    old, fresh = new_receipt(), new_receipt()
    store.receive(old, CONFIG_NAME, io.BytesIO(b"{}"))
    store.sweep(older_than_s=60)
    store.sweep(older_than_s=-1)
    with pytest.raises(NotFound):
        store.take(old, place.scratch)
    store.receive(fresh, CONFIG_NAME, io.BytesIO(b"{}"))
    store.sweep(older_than_s=60)
    place.scratch.mkdir(parents=True, exist_ok=True)
    store.take(fresh, place.scratch)
    assert store.holds(version)


def test_a_damaged_entry_of_a_folder_is_repaired_by_publishing_it_again(tmp_path: Path):
    store = open_store(str(tmp_path), tmp_path)
    version, location = publish(store, name="a")
    (Path(location) / TENSORS_NAME).write_bytes(b"rot")
    assert publish(store, name="a") == (version, location)
    assert fingerprint(location) == version


def test_a_medium_that_fails_is_told_apart_from_what_is_not_there(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable), open_store(str(tmp_path / "file"), tmp_path).staging():
        pass
    gone = {"key": "x", "secret": "x", "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    gone["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    with pytest.raises(StoreUnavailable):
        open_store("s3://bucket/loom", tmp_path, gone).holds("0" * 64)


def test_addresses_of_folders(tmp_path: Path):
    assert local_path("/a/b") == local_path("file:///a/b") == Path("/a/b")
    assert local_path("s3://bucket/a") is None
