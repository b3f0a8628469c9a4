"""Stores of both kinds: a folder, and a bucket of a real server that speaks S3's protocol."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from lora_runtime.folder import fingerprint
from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.factory import open_store
from lora_runtime.store.protocol import Store
from tests.fakes import write_fake_adapter


@dataclass(frozen=True)
class Place:
    """Where a store is, and how it is reached."""

    url: str
    scratch: Path
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Store:
        return open_store(self.url, self.scratch, self.options)

    def copies(self, max_bytes: int = 1 << 30) -> LocalCopies:
        return LocalCopies(self.scratch / "copies", max_bytes, self.options)


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, Any]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "key": "test", "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-central-1"},
    }  # fmt: skip
    server.stop()


@pytest.fixture
def bucket(s3: dict[str, Any]) -> str:
    """The address of an empty bucket."""
    import s3fs

    name = f"loom-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**s3).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "store"), tmp_path / "scratch")
    options = request.getfixturevalue("s3")
    return Place(f"{request.getfixturevalue('bucket')}/loom", tmp_path / "scratch", options)


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


def publish(store: Store, **config: Any) -> tuple[str, str]:
    """A fake adapter's version, and where the store has it now."""
    with store.staging() as folder:
        version = fingerprint(write_fake_adapter(folder, **config))
        return version, store.publish(folder, version)
