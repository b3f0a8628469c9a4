"""A client that leaves, at any moment: its request ends in the engine, is counted and logged once as 499, and is no
error. Ray Serve's side is imitated: ``receive`` raises, and the request's task may be cancelled."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError, TaskCancelledError
from starlette.types import Message

from lora_runtime.engine.fake import FakeConfig, FakeEngine
from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    GenerateRequest,
    TokenEvent,
)
from lora_runtime.merge.job import JobRecipe, Plan
from serve.assembly import gateway_app
from serve.config import Settings
from serve.disconnects import DisconnectMiddleware
from serve.gateway.fetching import ImageFetcher
from serve.intake import Admitted, Named, Source
from serve.replica import coalesced
from serve.telemetry import Metrics


class Engines:
    """The gateway's way to an engine in this process."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.is_classifying = asyncio.Event()
        self.is_fetching = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        events = coalesced(self._engine.generate(request))
        try:
            async for found in events:
                yield found
        finally:
            await events.aclose()

    async def classify(self, request: ClassifyRequest) -> Classification:
        self.is_classifying.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody ends it")

    async def admit(self, source: Source) -> Admitted:
        raise AssertionError("nothing is registered")

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        raise AssertionError("nothing is merged")

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Nothing to bring."""

    async def info(self) -> EngineInfo:
        return self._engine.info


@dataclass
class Lines(logging.Handler):
    """What was logged."""

    records: list[logging.LogRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = object.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def statuses(self) -> list[int]:
        return [record.__dict__["status"] for record in self.records if record.getMessage() == "request"]


@contextmanager
def logged() -> Iterator[Lines]:
    lines = Lines()
    logger = logging.getLogger("serve")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


class Client:
    """One connection as Ray Serve's proxy passes it on. ``leave`` ends it."""

    def __init__(self, body: bytes, *, is_whole: bool, gone: Exception) -> None:
        self._first: list[Message] = [{"type": "http.request", "body": body, "more_body": not is_whole}]
        self._gone = gone
        self._has_left = asyncio.Event()
        self._has_raised = False
        self.is_reading = asyncio.Event()
        self.sent: list[Message] = []
        self.has_body = asyncio.Event()

    async def receive(self) -> Message:
        if self._first:
            return self._first.pop()
        self.is_reading.set()
        await self._has_left.wait()
        if self._has_raised:
            await asyncio.Event().wait()  # as Ray does: it raises once
        self._has_raised = True
        raise self._gone

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.has_body.set()

    def leave(self) -> None:
        self._has_left.set()


@dataclass(frozen=True)
class Moment:
    """When a client leaves. ``cancels``: Ray cancels the request's task, since the application reads no more.

    ``until``: waits for the moment. ``counts``: whether an engine was asked, so that metrics count the request.
    """

    path: str
    body: dict[str, Any] | bytes
    until: Callable[[Client, FakeEngine, Engines], Any]
    cancels: bool = False
    counts: bool = True
    token_s: float = 0.01
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


async def reading(client: Client, _: FakeEngine, __: Engines) -> None:
    await client.is_reading.wait()


async def midway(client: Client, _: FakeEngine, __: Engines) -> None:
    await client.has_body.wait()


async def running(_: Client, engine: FakeEngine, __: Engines) -> None:
    while not engine.stats().running:
        await asyncio.sleep(0.005)


async def fetching(_: Client, __: FakeEngine, engines: Engines) -> None:
    await engines.is_fetching.wait()


async def classifying(_: Client, __: FakeEngine, engines: Engines) -> None:
    await engines.is_classifying.wait()


async def at_once(client: Client, _: FakeEngine, __: Engines) -> None:
    """Before the answer begins: whoever reads from the client hears of it without waiting."""


CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/1.png"}}
FORM = (
    b'--XX\r\nContent-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n'
    b'Content-Type: application/json\r\n\r\n{"a": 1'
)


def chat(content: Any = "a b c", **more: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 100, **more}


MOMENTS = {
    "in the body": Moment(CHAT, b'{"model": "ba', reading, counts=False),
    "in an upload": Moment(
        "/v1/adapters/new/versions",
        FORM,
        reading,
        counts=False,
        headers=((b"content-type", b"multipart/form-data; boundary=XX"),),
    ),
    "while an image is fetched": Moment(CHAT, chat([PICTURE]), fetching, cancels=True, counts=False),
    "before the first token": Moment(CHAT, chat(stream=True), running, cancels=True, token_s=60),
    "before the first line": Moment(CHAT, chat(stream=True), at_once),
    "midway in a stream": Moment(CHAT, chat(stream=True), midway),
    "midway in a stream, cancelled": Moment(CHAT, chat(stream=True), midway, cancels=True),
    "before a whole answer": Moment(CHAT, chat(), running, cancels=True),
    "before one of several answers": Moment(
        "/v1/completions", {"model": "base", "prompt": ["a", "b"], "max_tokens": 100}, running, cancels=True
    ),
    "before a classification": Moment(
        "/v1/classify", {"model": "base", "messages": chat()["messages"]}, classifying, cancels=True
    ),
}
GONE = (
    TaskCancelledError(),
    RayTaskError("receive", "cancelled", TaskCancelledError()).as_instanceof_cause(),
)
"""What Ray Serve raises where a client is gone: its own task was cancelled, or the proxy's."""


@pytest.mark.parametrize("name", MOMENTS)
async def test_a_client_that_leaves_is_counted_once_and_is_no_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    moment = MOMENTS[name]
    counted: list[int] = []
    monkeypatch.setattr(Metrics, "answered", lambda _, route, target, status, seconds: counted.append(status))
    engine = FakeEngine(FakeConfig(token_s=moment.token_s))
    engines = Engines(engine)

    async def fetch_for_ever(_: ImageFetcher, urls: Sequence[str], caller: str) -> dict[str, bytes]:
        if urls:
            engines.is_fetching.set()
            await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(ImageFetcher, "fetch_all", fetch_for_ever)
    body = moment.body if isinstance(moment.body, bytes) else json.dumps(moment.body).encode()
    gone = GONE[list(MOMENTS).index(name) % len(GONE)]
    client = Client(body, is_whole=not isinstance(moment.body, bytes), gone=gone)
    if moment.until is at_once:
        client.leave()
    settings = Settings(state_dir=tmp_path, base={"name": "base"}, engine={"kind": "fake"}, adapters={"preload": {}})
    app = gateway_app(settings, engines, lambda: None)
    async with app.router.lifespan_context(app):
        with logged() as lines:
            async with asyncio.timeout(30):
                task = asyncio.create_task(app(scope(moment), client.receive, client.send))
                await moment.until(client, engine, engines)
                client.leave()
                if moment.cancels:
                    task.cancel()
                (ended,) = await asyncio.gather(task, return_exceptions=True)
    assert ended is None or isinstance(ended, asyncio.CancelledError), ended
    assert lines.statuses == [499]
    assert [record.getMessage() for record in lines.records if record.levelno >= logging.ERROR] == []
    assert engine.stats().running == 0
    assert counted == [499] * (moment.counts * parts(moment))


@pytest.mark.parametrize("gone", GONE, ids=["its own", "the proxy's"])
async def test_a_client_that_is_gone_stays_gone(gone: Exception):
    heard: list[Message] = []

    async def app(_: Any, receive: Any, __: Any) -> None:
        heard.extend([await receive(), await receive(), await receive()])

    client = Client(b"{}", is_whole=True, gone=gone)
    client.leave()
    async with asyncio.timeout(30):
        await DisconnectMiddleware(app)({"type": "http"}, client.receive, client.send)
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect", "http.disconnect"]


def parts(moment: Moment) -> int:
    prompts = moment.body.get("prompt", "") if isinstance(moment.body, dict) else ""
    return len(prompts) if isinstance(prompts, list) else 1


def scope(moment: Moment) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": moment.path,
        "raw_path": moment.path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": list(moment.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


async def test_an_answer_that_was_sent_whole_keeps_its_status(tmp_path: Path):
    """The client leaves after the last byte, as all do."""
    engine = FakeEngine(FakeConfig())
    settings = Settings(state_dir=tmp_path, base={"name": "base"}, engine={"kind": "fake"}, adapters={"preload": {}})
    app = gateway_app(settings, Engines(engine), lambda: None)
    client = Client(json.dumps(chat(stream=True)).encode(), is_whole=True, gone=TaskCancelledError())
    async with app.router.lifespan_context(app):
        with logged() as lines:
            await app(scope(MOMENTS["midway in a stream"]), client.receive, client.send)
            client.leave()
    assert lines.statuses == [200] and client.sent[-1]["more_body"] is False


async def test_a_fault_of_the_gateway_is_logged_as_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its answer is written outside of everything that logs requests."""

    async def broken(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(ImageFetcher, "fetch_all", broken)
    settings = Settings(state_dir=tmp_path, base={"name": "base"}, engine={"kind": "fake"}, adapters={"preload": {}})
    app = gateway_app(settings, Engines(FakeEngine(FakeConfig())), lambda: None)
    client = Client(json.dumps(chat()).encode(), is_whole=True, gone=TaskCancelledError())
    async with app.router.lifespan_context(app):
        with logged() as lines, pytest.raises(RuntimeError, match="a fault"):
            await app(scope(MOMENTS["before a whole answer"]), client.receive, client.send)
    assert client.sent[0]["status"] == 500 and lines.statuses == [500]
