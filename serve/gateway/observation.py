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
        status, begun = CLIENT_LEFT, time.monotonic()

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        parent = Headers(scope=scope).get(HEADER, "")
        with self._tracing.span(f"{scope['method']} {scope['path']}", parent, request_id=state["request_id"]) as span:
            try:
                await self._app(scope, receive, watching)
            finally:
                span.set_attribute("http.response.status_code", status)
                said = {
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.monotonic() - begun, 4),
                    "key": getattr(state.get("identity"), "id", ""),
                    "model": state.get("model", ""),
                    "variant": "/".join(((dispatch := state.get("dispatch")) and dispatch.variant) or ()),
                }
                log.info("request", extra=said)
