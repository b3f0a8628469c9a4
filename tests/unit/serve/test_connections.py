"""Connections that are too slow, too large, never read, and as they should be, on uvicorn as Ray Serve starts it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
import uvicorn.protocols.http.auto
from starlette.types import Receive, Scope, Send

from serve import connections
from serve.proxy import middlewares


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body, once it is there; what is below /now is answered at once."""
    size = 0
    if scope["path"] == "/endless":
        return await pour(receive, send)
    while scope["path"] != "/now":
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": b"%8d" % size})


async def pour(receive: Receive, send: Send) -> None:
    """Sends for as long as the client is there."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await receive()
    gone = asyncio.create_task(receive())
    while not gone.done():
        await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
        await asyncio.sleep(0)
    Poured.ended.set()


class Poured:
    """When the last endless answer was given up."""

    ended: asyncio.Event


@pytest.fixture
def patience_s(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", uvicorn.protocols.http.auto.AutoHTTPProtocol)
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "STALL_TIMEOUT_S", 0.4)
    middlewares()
    return 0.4


@asynccontextmanager
async def server() -> AsyncIterator[int]:
    """Its port."""
    running = uvicorn.Server(uvicorn.Config(lambda: echo, factory=True, port=0, lifespan="off", log_config=None))
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        await task


async def test_heads_that_do_not_end_are_closed(patience_s: float):
    async with server() as port:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: a"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 20 * patience_s + 10) == b""
            writer.close()


async def test_a_head_that_dribbles_is_closed(patience_s: float):
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        ended = asyncio.create_task(reader.read())
        for _ in range(500):
            writer.write(b"a")
            await asyncio.sleep(patience_s / 10)
            if ended.done():
                break
        assert ended.done()


async def test_a_head_that_grows_without_end_is_closed(patience_s: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 600)
    async with server() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):
            for number in range(1000):
                writer.write(b"X-%d: %s\r\n" % (number, b"a" * 50_000))
                await writer.drain()
                await asyncio.sleep(0)


async def test_requests_as_they_should_be_are_answered(patience_s: float):
    """Several on one connection, with long pauses in the middle of bodies, and a large one that is not read."""
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path, size, pause_s in (
            ("/", 10, 2 * patience_s),
            ("/now", 3_000_000, 0),
            ("/", 3_000_000, 0),
            ("/", 0, 0),
        ):
            writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
            writer.write(b"a" * (size // 2))
            await asyncio.sleep(pause_s)
            writer.write(b"a" * (size - size // 2))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert head.startswith(b"HTTP/1.1 200")
            assert int(await reader.readexactly(8)) == (0 if path == "/now" else size)
        writer.close()


async def test_a_large_head_in_time_is_answered(patience_s: float):
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /now HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_that_never_reads_is_dropped_and_its_request_ends(patience_s: float):
    Poured.ended = asyncio.Event()
    async with server() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(Poured.ended.wait(), 30)
        writer.close()


async def test_a_client_that_reads_slowly_is_kept(patience_s: float):
    Poured.ended = asyncio.Event()
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(20):
            assert len(await reader.readexactly(1 << 20)) == 1 << 20
            await asyncio.sleep(patience_s / 4)
        assert not Poured.ended.is_set()
        writer.close()
        await asyncio.wait_for(Poured.ended.wait(), 30)
