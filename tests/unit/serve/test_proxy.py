"""What stands in front of Ray Serve's proxy, put there by Ray's own functions, without a cluster."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
import uvicorn.protocols.http.auto
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from serve.connections import BoundedHttp
from serve.ray_environment import PROXY_CALLBACK


async def headers_of(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the headers that arrive where Ray's proxy stands."""
    body = json.dumps([name.decode() for name, _ in scope["headers"]]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def asked(port: int, *lines: str) -> tuple[bytes, bytes]:
    """Head and body of the answer to a request with these lines among its headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = "\r\n".join(["GET / HTTP/1.1", "Host: x", "Connection: close", *lines, "", ""])
    writer.write(said.encode("latin-1"))
    head, _, body = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
    writer.close()
    return head, body


async def test_ray_puts_it_in_front_and_its_own_headers_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", uvicorn.protocols.http.auto.AutoHTTPProtocol)
    monkeypatch.setattr(http_util, *PROXY_CALLBACK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = http_util.configure_http_middlewares(HTTPOptions(host="127.0.0.1", port=port))
    task, server = await http_util.start_asgi_http_server(
        headers_of, options, event_loop=asyncio.get_running_loop()
    )  # fmt: skip
    while not server.started:
        await asyncio.sleep(0.01)
    assert server.config.http_protocol_class is BoundedHttp
    head, body = await asked(port, "serve_multiplexed_model_id: a", "X-Request-Timeout-Seconds: 0", "X-Mine: a")
    assert json.loads(body) == ["host", "connection", "x-mine", "x-request-id"]
    assert head.lower().count(b"x-request-id") == 1
    for name in ("X-Request-Id", "X-Session-Id"):
        head, body = await asked(port, f"{name}: \xff")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["param"] == name.lower()
    for line in ("X-Request-Disconnect-Disabled: \xff", "X-Session-Id: \xc3\xa9", "X-Other: \xff"):
        assert (await asked(port, line))[0].startswith(b"HTTP/1.1 200")
    server.should_exit = True
    await task
