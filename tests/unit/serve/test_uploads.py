"""Idempotency of uploads: the same content happens once, other content under the same key is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve.identity import Scope
from tests.fakes import EMPTY_TENSORS
from tests.gateways import Gateway, gateway

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PATH = "/v1/adapters/up/versions"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway(tmp_path, {"adapters": {"preload": {}}}) as found:
        yield found


@pytest.fixture
async def client(running: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with running.client(Scope.ADMIN) as found:
        yield found


async def upload(
    client: httpx.AsyncClient, config: bytes, key: str | None = "k", tensors: bytes = EMPTY_TENSORS, **fields: str
) -> httpx.Response:
    files = [("files", (CONFIG, config)), ("files", (TENSORS, tensors))]
    headers = {} if key is None else {"Idempotency-Key": key}
    return await client.post(PATH, files=files, data=fields, headers=headers)


async def test_an_upload_sent_again_has_its_first_answer(client: httpx.AsyncClient):
    """Whatever boundary the client chose; here each request has a new one of equal length."""
    first = await upload(client, b'{"name": "a"}')
    again = await upload(client, b'{"name": "a"}')
    assert (first.status_code, again.status_code) == (201, 201) and first.content == again.content
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    assert first.request.headers["content-type"] != again.request.headers["content-type"]


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"config": b'{"name": "a"}'}, {"config": b'{"name": "b"}'}),
        ({"config": b"{}"}, {"config": b"{}", "tensors": EMPTY_TENSORS[:-2] + b"[]"}),
        ({"config": b"{}", "activate": "1"}, {"config": b"{}", "activate": "0"}),
    ],
)
async def test_other_content_under_one_key_is_refused(client: httpx.AsyncClient, first: dict, other: dict):
    """Also of equal length, which is all that was looked at once."""
    assert (await upload(client, **first)).status_code == 201
    refused = await upload(client, **other)
    assert refused.status_code == 400 and "another request" in refused.json()["error"]["message"]
    assert (await client.get("/v1/adapters/up")).json()["num_versions"] == 1


async def test_the_same_meaning_spelled_otherwise_is_the_same_upload(client: httpx.AsyncClient):
    await upload(client, b"{}", activate="true")
    assert (await upload(client, b"{}", activate="YES")).headers["idempotent-replayed"] == "true"
    assert (await upload(client, b"{}")).headers["idempotent-replayed"] == "true", "true is the default"


async def test_many_at_once_happen_once(client: httpx.AsyncClient, running: Gateway):
    answers = await asyncio.gather(*(upload(client, b'{"name": "many"}') for _ in range(12)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {201, 409} and 201 in statuses
    assert len(running.engines.admitted) == 1
    assert (await upload(client, b'{"name": "many"}')).headers["idempotent-replayed"] == "true"


async def test_a_failed_upload_may_be_tried_again_under_its_key(client: httpx.AsyncClient):
    assert (await upload(client, b"{")).status_code == 400
    assert (await upload(client, b'{"name": "a"}')).status_code == 201
    assert (await upload(client, b'{"name": "a"}', key="a b")).status_code == 400


async def test_an_upload_route_never_reads_a_body_into_memory(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    """A key asks for a fingerprint; of anything but a form, nothing is read for it."""

    def nothing(*_: object) -> None:
        raise AssertionError("the body was read")

    monkeypatch.setattr("starlette.requests.Request.body", nothing)
    refused = await client.post(PATH, content=b"x" * 1000, headers={"Idempotency-Key": "k"})
    assert refused.status_code == 400 and "multipart/form-data" in refused.json()["error"]["message"]


def left_behind(running: Gateway) -> list[Path]:
    store = Path(running.settings.store_url)
    return [path for folder in ("incoming", "staging") for path in (store / folder).glob("*")]


async def test_a_full_disk_is_told_and_nothing_stays(
    client: httpx.AsyncClient, running: Gateway, monkeypatch: pytest.MonkeyPatch
):
    """Wherever it fills up: in the spool, while it is hashed, in the store's incoming folder, in the entry."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in (
        "tempfile.SpooledTemporaryFile.write",
        "serve.gateway.uploads.Upload._digest",
        "shutil.copyfileobj",
        "lora_runtime.store.folder_store.flush",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            refused = await upload(client, b'{"name": "full"}')
        assert refused.status_code == 503, (place, refused.text)
        assert refused.json()["error"]["code"] == "store_unavailable" and "retry-after" in refused.headers
        assert "No space left" in refused.json()["error"]["message"]
        assert left_behind(running) == [], place
        assert (await client.get("/v1/adapters/up")).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200
    assert (await upload(client, b'{"name": "full"}')).status_code == 201, "under the same key"
