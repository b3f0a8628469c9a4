"""Request bodies at the door: read only where a route takes one, never too large, and never too slow.

Behind Ray Serve's proxy a request has its place in a gateway before its body arrives. So a body that does not come
must not be waited for longer than seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_runtime.errors import InvalidRequest, Overloaded
from serve.gateway.errors import error_response
from serve.gateway.json_check import check_json
from serve.gateway.receiving import Arriving, BodyLimits, BodyTimeout, BodyTooLarge, replayed, too_large, without_body

UPLOAD = re.compile(r"/v1/adapters/[^/]+/versions")
FORM = "multipart/form-data"
PROMPTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/classify"})
"""Routes whose texts go to an engine, which takes any character."""


class BodyMiddleware:
    """Reads an ordinary body and checks its JSON before the route runs; an upload is read by its route, through an
    :class:`Arriving`. Where ``routes`` take no body, none is waited for: the route is called at once."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], limits: BodyLimits) -> None:
        self._app = app
        self._routes = routes
        self._limits = limits
        self._under_way: dict[Arriving, None] = {}
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if not self._takes_body(scope):
            return await self._app(scope, without_body(receive), send)
        is_upload = _is_upload(scope)
        limit = self._limits.max_upload_bytes if is_upload else self._limits.max_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            return await error_response(too_large(limit))(scope, receive, send)
        arriving = Arriving(receive, self._limits, limit, is_upload=is_upload)
        if is_upload:
            return await self._app(scope, arriving, send)
        with self._holding() as hold:
            try:
                body = await self._whole(arriving, hold)
                if body is None:
                    return None
                check_json(body, allows_nul=scope["path"] in PROMPTS)
            except (BodyTooLarge, BodyTimeout, InvalidRequest, Overloaded) as error:
                return await error_response(error)(scope, receive, send)
            await self._app(scope, replayed(body, receive), send)

    def _takes_body(self, scope: Scope) -> bool:
        if UPLOAD.fullmatch(scope["path"]) and not _is_upload(scope):
            return False  # the route refuses whatever is not a form
        for route in self._routes:
            if isinstance(route, APIRoute) and route.matches(scope)[0] is Match.FULL:
                return route.body_field is not None or "requestBody" in (route.openapi_extra or {})
        return False

    async def _whole(self, arriving: Arriving, hold: Callable[[int], None]) -> bytes | None:
        """The body; ``hold`` is called with the size of each part. None where the client left."""
        chunks: list[bytes] = []
        with self._counted(arriving):
            while True:
                message = await arriving()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                hold(len(chunks[-1]))
                if not message.get("more_body", False):
                    return b"".join(chunks)

    @contextmanager
    def _counted(self, arriving: Arriving) -> Iterator[None]:
        if len(self._under_way) >= self._limits.max_arriving:
            self._end_oldest()
        self._under_way[arriving] = None
        try:
            yield
        finally:
            self._under_way.pop(arriving, None)

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Count bytes as held until the context's end. Calls raise Overloaded where there is no memory for more."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size
            if self._held_bytes > self._limits.max_held_bytes and not self._end_oldest():
                raise Overloaded("The gateway holds as many large bodies as it may; try again.", retry_after_s=1)

        try:
            yield hold
        finally:
            self._held_bytes -= held

    def _end_oldest(self) -> bool:
        """Give up the body that has been under way the longest, if it is slow. Whether there is one."""
        oldest = next(iter(self._under_way), None)
        if oldest is None or not oldest.is_slow:
            return False
        del self._under_way[oldest]
        oldest.give_up()
        return True


def _is_upload(scope: Scope) -> bool:
    content_type = Headers(scope=scope).get("content-type", "")
    return UPLOAD.fullmatch(scope["path"]) is not None and content_type.startswith(FORM)
