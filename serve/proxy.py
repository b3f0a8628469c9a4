"""What stands in front of Ray Serve's HTTP proxy, in the proxy's own process.

Ray's proxy takes orders from request headers, and fails with a 500 of its own on one that is not UTF-8. Ray calls
:func:`middlewares` where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it (``ray_environment.py``).
"""

from __future__ import annotations

import json

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.connections import bound_connections

DROPPED = frozenset({b"serve-multiplexed-model-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""Orders to Ray that are not a client's to give: which replica, no deadline, no end when the client leaves."""
READ = frozenset({b"x-request-id", b"x-session-id"})
"""Headers that Ray reads as UTF-8 and Loom has a use for."""


def middlewares() -> list[Middleware]:
    """Called once in each proxy's process, before it listens."""
    bound_connections()
    return [Middleware(HeaderMiddleware)]


class HeaderMiddleware:
    """Drops the headers that only Ray reads, and answers 400 for one that Ray could not read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept: list[tuple[bytes, bytes]] = []
        for name, value in scope.get("headers", ()):
            known = name.lower().replace(b"_", b"-")
            if known in READ and not _is_text(value):
                return await _refuse(known.decode(), send)
            if known not in DROPPED:
                kept.append((name, value))
        await self._app({**scope, "headers": kept}, receive, send)


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _refuse(name: str, send: Send) -> None:
    error = {
        "message": f"The header {name} is not valid UTF-8.",
        "type": "invalid_request_error",
        "param": name,
        "code": "invalid_header",
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
