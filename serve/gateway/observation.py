"""Each request seen from outside: a span, and a line in the log. Neither holds what was asked or answered."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.errors import CLIENT_LEFT
from serve.logs import REQUEST_ID
from serve.tracing import HEADER, Tracing

log = logging.getLogger(__name__)

QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class ObservationMiddleware:
    """Stands right behind the request's id, around everything else."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        REQUEST_ID.set(state["request_id"])
        exchange, begun = _Exchange(receive, send), time.monotonic()
        parent = Headers(scope=scope).get(HEADER, "")
        with self._tracing.span(f"{scope['method']} {scope['path']}", parent, request_id=state["request_id"]) as span:
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception:
                exchange.has_failed = True
                raise
            finally:
                span.set_attribute("http.response.status_code", exchange.status)
                said = {
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": exchange.status,
                    "seconds": round(time.monotonic() - begun, 4),
                    "key": getattr(state.get("identity"), "id", ""),
                    "model": state.get("model", ""),
                    "variant": "/".join(((dispatch := state.get("dispatch")) and dispatch.variant) or ()),
                }
                log.info("request", extra=said)


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._answered = 0
        self._is_whole = False
        self._has_left = False
        self.has_failed = False

    @property
    def status(self) -> int:
        """Of the answer; CLIENT_LEFT where the client was gone before the whole of it was sent."""
        if self._is_whole and not self._has_left:
            return self._answered
        return 500 if self.has_failed and not self._has_left else CLIENT_LEFT

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_whole:
            self._has_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answered = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_whole = True
