"""A client that leaves, as ASGI says it: Ray Serve says it with an exception."""

from __future__ import annotations

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE: Message = {"type": "http.disconnect"}


class DisconnectMiddleware:
    """Turns what Ray Serve raises from ``receive`` into ``http.disconnect``, which is what applications wait for.

    When a client leaves, Ray Serve's proxy cancels the call by which a replica reads from it, and the replica's
    ``receive`` raises TaskCancelledError, or RayTaskError from the proxy's side. Applications know only
    ``http.disconnect``: without this, each client that leaves is an unexpected error with a traceback. A proxy that
    died says the same, since its clients are gone as well. Stands in front of everything.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        is_gone = False

        async def receiving() -> Message:
            nonlocal is_gone
            if is_gone:  # Ray raises once; asked again, it would wait for ever
                return GONE
            try:
                return await receive()
            except RayError:
                is_gone = True
                return GONE

        await self._app(scope, receiving, send)
