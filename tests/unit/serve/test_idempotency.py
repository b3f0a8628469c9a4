"""A change under an idempotency key counts as running for as long as its gateway says so, and no longer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request

from lora_runtime.errors import LoomError, Overloaded
from serve.gateway import idempotency
from serve.gateway.errors import install_handlers
from serve.gateway.idempotency import idempotent
from serve.identity import Identity
from serve.registry import replies
from serve.registry.database import Database
from serve.registry.replies import Replies, Reply

ANYONE = Identity(id="me", name="me", scopes=frozenset())
KEY = {"Idempotency-Key": "k"}


class Gateway:
    """One whose only change takes as long as the test wants."""

    def __init__(self, kept: Replies) -> None:
        self.num_calls = 0
        self.error: LoomError | None = None
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        routes, app = APIRouter(route_class=idempotent(kept)), FastAPI()

        @routes.post("/change")
        async def change(request: Request) -> dict[str, int]:
            await request.body()
            self.num_calls += 1
            self.has_begun.set()
            await self.may_end.wait()
            if self.error is not None:
                raise self.error
            return {"call": self.num_calls}

        @app.middleware("http")
        async def _(request: Request, call_next):  # type: ignore[no-untyped-def]
            request.state.identity = ANYONE
            return await call_next(request)

        install_handlers(app)
        app.include_router(routes)
        self.app = app
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    async def change(self) -> httpx.Response:
        return await self.http.post("/change", headers=KEY)


@pytest.fixture
async def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replies]:
    """What takes a minute elsewhere takes two seconds."""
    monkeypatch.setattr(idempotency, "RENEWED_EVERY", timedelta(seconds=0.2))
    monkeypatch.setattr(replies, "GIVEN_UP_AFTER", timedelta(seconds=2))
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    yield Replies(database)
    database.close()


async def test_a_change_that_takes_long_is_carried_out_once(kept: Replies):
    first, second = Gateway(kept), Gateway(kept)
    second.may_end.set()
    running = asyncio.create_task(first.change())
    await first.has_begun.wait()
    for _ in range(4):
        await asyncio.sleep(1)
        assert (await second.change()).status_code == 409
    first.may_end.set()
    assert (await running).json() == (await second.change()).json() == {"call": 1}
    assert second.num_calls == 0


async def test_a_change_whose_client_leaves_is_carried_out_once(kept: Replies):
    first, second = Gateway(kept), Gateway(kept)
    second.may_end.set()
    leaving = asyncio.create_task(first.change())
    await first.has_begun.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    assert (await second.change()).status_code == 409
    first.may_end.set()
    assert (await eventually(second)).json() == {"call": 1}
    assert (first.num_calls, second.num_calls) == (1, 0)


async def test_a_client_that_leaves_while_the_key_is_written_down_does_not_block_it(
    kept: Replies, monkeypatch: pytest.MonkeyPatch
):
    gateway, begun, may_go_on = Gateway(kept), threading.Event(), threading.Event()
    gateway.may_end.set()
    begin = kept.begin

    def slow(*asked: str) -> Reply | None:
        found = begin(*asked)
        begun.set()
        may_go_on.wait(20)
        return found

    monkeypatch.setattr(kept, "begin", slow)
    leaving = asyncio.create_task(gateway.change())
    await asyncio.to_thread(begun.wait, 20)
    leaving.cancel()
    await asyncio.wait([leaving])
    monkeypatch.setattr(kept, "begin", begin)
    may_go_on.set()
    monkeypatch.setattr(replies, "GIVEN_UP_AFTER", timedelta(minutes=1))
    assert (await eventually(gateway)).json() == {"call": 1}
    assert gateway.num_calls == 1


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_client_that_leaves_while_it_sends_does_not_block_its_key(kept: Replies, is_begun: bool):
    """Nothing more is received then, not even that it left."""
    gateway, waits = Gateway(kept), asyncio.Event()
    gateway.may_end.set()
    parts = [{"type": "http.request", "body": b"--b", "more_body": True}] if is_begun else []

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        waits.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(_: Any) -> None:
        raise AssertionError("there is nobody to answer")

    form = (b"content-type", b"multipart/form-data; boundary=b")  # which is read late, by the change itself
    headers = [(b"idempotency-key", b"k"), (b"content-length", b"9"), form]
    scope = {"type": "http", "method": "POST", "path": "/change", "query_string": b"", "headers": headers}
    leaving = asyncio.create_task(gateway.app(scope, receive, send))
    await waits.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    await asyncio.sleep(0.5)
    with_another_body = await gateway.http.post("/change", headers=KEY, content=b"other")
    assert with_another_body.json() == {"call": 1}, "the key is free, whatever it stood for"


async def test_a_change_that_fails_after_its_client_left_may_be_tried_again(kept: Replies):
    first, second = Gateway(kept), Gateway(kept)
    second.may_end.set()
    first.error = Overloaded("No room.", retry_after_s=1)
    leaving = asyncio.create_task(first.change())
    await first.has_begun.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    first.may_end.set()
    assert (await eventually(second)).json() == {"call": 1}
    assert second.num_calls == 1


async def eventually(gateway: Gateway) -> httpx.Response:
    """The answer, as a client gets it that asks until it is not told to wait."""
    for _ in range(50):
        if (response := await gateway.change()).status_code != 409:
            return response
        await asyncio.sleep(0.1)
    raise AssertionError("the key stays taken")


async def test_a_repeated_change_takes_the_place_of_one_whose_gateway_was_killed(kept: Replies):
    first, second = Gateway(kept), Gateway(kept)
    second.may_end.set()
    running = asyncio.create_task(first.change())
    await first.has_begun.wait()
    with pytest.MonkeyPatch.context() as killed:  # it says nothing any more, neither that it runs nor that it ended
        for method in ("renew", "forget", "finish"):
            killed.setattr(kept, method, lambda *_: None)
        assert (await second.change()).status_code == 409
        await asyncio.sleep(2.5)
    assert (await second.change()).json() == {"call": 1} and second.num_calls == 1
    running.cancel()
    await asyncio.wait([running])
