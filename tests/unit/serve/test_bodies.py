"""Bodies at the door: where one is taken, how long it is waited for, and who has to make room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from lora_runtime.errors import AdapterTooLarge
from serve.gateway.bodies import BodyMiddleware
from serve.gateway.errors import install_handlers
from serve.gateway.middleware import IdentityMiddleware
from serve.gateway.receiving import Arriving, BodyLimits, BodyTimeout, BodyTooLarge
from serve.identity import Identity, KeyRecord, KeyRing, Scope, digest_of, new_key
from serve.limits import KeyLimits
from serve.schemas.management import RegisterRequest

LIMITS = BodyLimits(
    max_bytes=1000, max_upload_bytes=5000, timeout_s=0.2, bytes_per_s=1000.0, max_arriving=2, max_held_bytes=1500
)


class Client:
    """Sends what it is told, when it is told; keeps the answer."""

    def __init__(self, chunks: Iterable[tuple[float, bytes]] = (), *, ends: bool = True) -> None:
        self._chunks = list(chunks)
        self._ends = ends
        self.asked = 0
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        self.asked += 1
        if self._chunks:
            pause_s, body = self._chunks.pop(0)
            await asyncio.sleep(pause_s)
            return {"type": "http.request", "body": body, "more_body": bool(self._chunks) or not self._ends}
        await asyncio.Event().wait()
        raise AssertionError("nothing wakes an event that nobody sets")

    async def send(self, message: Message) -> None:
        self.answer.append(message)

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])


def app(limits: BodyLimits = LIMITS) -> FastAPI:
    """Routes of each kind behind the middleware."""
    served = FastAPI()

    @served.get("/healthz")
    async def healthz() -> str:
        return "ok"

    @served.delete("/v1/adapters/{name}")
    async def delete(name: str) -> str:
        return name

    @served.post("/v1/adapters")
    async def register(body: RegisterRequest) -> str:
        return body.name

    @served.post("/v1/adapters/{name}/versions", openapi_extra={"requestBody": {}})
    async def upload(name: str, request: Request) -> int:
        return len(await request.body())

    install_handlers(served)
    served.add_middleware(BodyMiddleware, routes=served.routes, limits=limits)
    return served


async def ask(served: FastAPI, method: str, path: str, client: Client, **headers: str) -> Client:
    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    await asyncio.wait_for(served(scope, client.receive, client.send), 10)
    return client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/healthz", 405),
        ("GET", "/healthz", 200),
        ("DELETE", "/v1/adapters/shape", 200),
        ("POST", "/nothing", 404),
        ("PUT", "/v1/adapters", 405),
        ("PUT", "/v1/adapters/shape/versions", 405),
    ],
)
async def test_no_body_is_waited_for_where_none_is_taken(method: str, path: str, status: int):
    client = await ask(app(), method, path, Client(ends=False))
    assert client.status == status


async def test_a_body_that_stops_coming_is_given_up():
    client = await ask(app(), "POST", "/v1/adapters", Client([(0, b'{"name"')], ends=False))
    assert client.status == 408
    assert (b"connection", b"close") in client.answer[0]["headers"]


async def test_a_stalled_upload_is_given_up():
    form = "multipart/form-data; boundary=x"
    client = await ask(
        app(), "POST", "/v1/adapters/a/versions", Client([(0, b"--x")], ends=False), content_type=form
    )  # fmt: skip
    assert client.status == 408


async def test_a_slow_body_that_keeps_its_pace_is_taken():
    body = b'{"name": "a", "path": "' + b"x" * 400 + b'"}'
    chunks = [(0.05, body[start : start + 60]) for start in range(0, len(body), 60)]
    assert sum(pause_s for pause_s, _ in chunks) > LIMITS.timeout_s
    client = await ask(app(), "POST", "/v1/adapters", Client(chunks))
    assert client.status == 200


async def test_a_body_that_dribbles_is_given_up():
    client = await ask(app(), "POST", "/v1/adapters", Client([(0.05, b" ")] * 100))
    assert client.status == 408
    assert client.asked < 20


async def test_only_forms_are_uploads():
    client = await ask(app(), "POST", "/v1/adapters/a/versions", Client([(0, b"1" * 2000)]))
    assert client.status == 413
    form = "multipart/form-data; boundary=x"
    client = await ask(app(), "POST", "/v1/adapters/a/versions", Client([(0, b"1" * 2000)]), content_type=form)
    assert client.status == 200


@pytest.mark.parametrize("declared", ["2000", "0"])
async def test_a_body_that_is_too_large(declared: str):
    client = await ask(app(), "POST", "/v1/adapters", Client([(0, b"1" * 2000)]), content_length=declared)
    assert client.status == 413


async def test_when_many_are_slow_the_oldest_makes_room():
    served = app(replace(LIMITS, timeout_s=60))
    slow = [Client([(0, b"{")], ends=False) for _ in range(2)]
    waiting = [asyncio.create_task(ask(served, "POST", "/v1/adapters", client)) for client in slow]
    await asyncio.sleep(0)
    quick = Client([(0.01, b'{"name": "a", "path": "b"}')])
    await ask(served, "POST", "/v1/adapters", quick)
    assert quick.status == 200
    assert not any(task.done() for task in waiting), "what came a moment ago is not slow"
    await asyncio.sleep(1.2)
    await ask(served, "POST", "/v1/adapters", Client([(0.01, b'{"name": "a", "path": "b"}')]))
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert done == {waiting[0]} and slow[0].status == 408
    for task in pending:
        task.cancel()


async def test_a_complete_body_is_followed_by_no_deadline():
    arriving = Arriving(Client([(0, b"{}")]).receive, LIMITS, 10)
    assert (await arriving())["body"] == b"{}"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(arriving(), 3 * LIMITS.timeout_s)


@pytest.mark.parametrize(("is_upload", "error"), [(True, AdapterTooLarge), (False, BodyTooLarge)])
async def test_bytes_are_counted(is_upload: bool, error: type[Exception]):
    arriving = Arriving(Client([(0, b"12345")] * 3).receive, LIMITS, 10, is_upload=is_upload)
    await arriving()
    await arriving()
    with pytest.raises(error):
        await arriving()


async def test_giving_up_ends_the_wait_under_way_and_the_next():
    arriving = Arriving(Client(ends=False).receive, LIMITS, 10)
    waiting = asyncio.create_task(arriving())
    await asyncio.sleep(0)
    arriving.give_up()
    with pytest.raises(BodyTimeout, match="short of places"):
        await waiting
    with pytest.raises(BodyTimeout, match="short of places"):
        await arriving()


LARGE = b'{"name": "a", "path": "' + b"x" * 900 + b'"}'


async def test_bodies_in_memory_are_bounded_and_released():
    served = app(replace(LIMITS, timeout_s=60))
    first = Client([(0, LARGE)], ends=False)
    waiting = asyncio.create_task(ask(served, "POST", "/v1/adapters", first))
    await asyncio.sleep(0.01)
    assert (await ask(served, "POST", "/v1/adapters", Client([(0, LARGE)]))).status == 429
    await asyncio.sleep(1.2)
    second = await ask(served, "POST", "/v1/adapters", Client([(0, LARGE)]))
    assert second.status == 200, "the first has become slow, and made room"
    await waiting
    assert first.status == 408
    for _ in range(3):
        assert (await ask(served, "POST", "/v1/adapters", Client([(0, LARGE)]))).status == 200


async def test_a_body_that_stalls_gives_its_keys_place_back():
    served = app()
    identifier, key = new_key()
    identity = Identity(id=identifier, name="ada", scopes=frozenset(Scope), max_concurrent=1)
    record = KeyRecord(identity=identity, digest=digest_of(key), created_at=datetime.now(UTC))
    keys = KeyRing(lambda: [record], is_required=True)
    keys.reload()
    served.add_middleware(IdentityMiddleware, keys=keys, limits=KeyLimits("memory://"))
    said = {"authorization": f"Bearer {key}"}
    stalled = Client([(0, b"{")], ends=False)
    waiting = asyncio.create_task(ask(served, "POST", "/v1/adapters", stalled, **said))
    await asyncio.sleep(0.05)
    assert (await ask(served, "POST", "/v1/adapters", Client([(0, LARGE)]), **said)).status == 429
    await waiting
    assert stalled.status == 408
    assert (await ask(served, "POST", "/v1/adapters", Client([(0, LARGE)]), **said)).status == 200


async def test_nobody_without_a_key_has_a_body_read():
    served = app()
    served.add_middleware(
        IdentityMiddleware, keys=KeyRing(list, is_required=True), limits=KeyLimits("memory://")
    )  # fmt: skip
    client = await ask(served, "POST", "/v1/adapters", Client(ends=False))
    assert (client.status, client.asked) == (401, 0)
