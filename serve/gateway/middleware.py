"""What stands before every route, and before the body is read: a request id, bounds on headers, and who asks."""

from __future__ import annotations

import re
import uuid
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.errors import error_response, plain_error
from serve.identity import KeyRing, Unauthenticated
from serve.limits import KeyLimits, RateLimited
from serve.registry.errors import RegistryStale

REQUEST_ID = "x-request-id"
PROTECTED = "/v1/"
UNSOUND_ID = "X-Request-Id must be 1 to 128 letters, digits, '.', '_' or '-'; leave it out to be given one."
_SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIdMiddleware:
    """Takes a sound ``X-Request-Id`` or makes one. ``echo`` puts it on the answer, which Ray Serve's proxy
    does by itself: behind it, a second one would be wrong."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id if self._echo else send)


class HeadMiddleware:
    """Refuses what is wrong with a request before its body: headers and a query over ``max_bytes`` together with 431;
    with 400 an ``X-Request-Id`` that cannot be used, and a NUL in the path or the query.

    An unsound id is refused rather than replaced: Ray Serve's proxy answers with the id that it was sent, whatever
    the gateway does, and the client would look for one that no log has.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(scope)) is not None:
            return await refused(scope, receive, send)
        await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> Response | None:
        query = scope.get("query_string", b"")
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(query) > self._max_bytes:
            message = f"The headers and the query are larger than {self._max_bytes} bytes together."
            return plain_error(431, message, code="headers_too_large")
        given = Headers(scope=scope).get(REQUEST_ID)
        if given is not None and not _SOUND_ID.fullmatch(given):
            return plain_error(400, UNSOUND_ID, code="invalid_request_id", param="X-Request-Id")
        if "\0" in scope["path"] or b"\0" in unquote_to_bytes(query):
            return plain_error(400, "The path and the query must not hold U+0000.", code="invalid_url")
        return None


class IdentityMiddleware:
    """Says who asks, in ``request.state.identity``, before a byte of the body is read: 401 where nobody valid does,
    429 beyond their limits, 503 where the gateway cannot know which keys are valid. A request counts as running until
    its answer is sent, or its client gone."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limits: KeyLimits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            return await self._app(scope, receive, send)
        try:
            identity = self._keys.identify(Headers(scope=scope).get("authorization", ""))
            leave = await self._limits.enter(identity)
        except (Unauthenticated, RateLimited, RegistryStale) as error:
            return await error_response(error)(scope, receive, send)
        scope.setdefault("state", {})["identity"] = identity
        try:
            await self._app(scope, receive, send)
        finally:
            leave()
