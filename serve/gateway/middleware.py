"""What stands before every route: a request id, bounds on headers and bodies, and who asks."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_runtime.errors import AdapterTooLarge
from serve.gateway.errors import error_response, plain_error
from serve.identity import KeyRing, Unauthenticated
from serve.limits import KeyLimits, RateLimited
from serve.registry.errors import RegistryStale

REQUEST_ID = "x-request-id"
PROTECTED = "/v1/"
UPLOAD = re.compile(r"/v1/adapters/[^/]+/versions")
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


class HeaderLimitMiddleware:
    """Refuses headers over ``max_bytes`` together with 431."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if size + len(scope.get("query_string", b"")) > self._max_bytes:
            message = f"The headers and the query are larger than {self._max_bytes} bytes together."
            return await plain_error(431, message, code="headers_too_large")(scope, receive, send)
        await self._app(scope, receive, send)


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


class BodyLimitMiddleware:
    """Refuses a body over ``max_bytes`` with 413, by its declared length or as soon as it grows too long.

    Bodies are read before their route is called; an upload's, up to ``max_upload_bytes``, while its route reads it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        is_upload = scope["method"] == "POST" and UPLOAD.fullmatch(scope["path"]) is not None
        limit = self._max_upload_bytes if is_upload else self._max_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            return await _refuse(limit, scope, receive, send)
        if is_upload:
            return await self._app(scope, _counted(receive, limit), send)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size > limit:
                return await _refuse(limit, scope, receive, send)
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        replayed = False

        async def receive_again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        await self._app(scope, receive_again, send)


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counting() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise AdapterTooLarge(f"The upload is larger than {limit} bytes.", limit=limit)
        return message

    return counting


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    message = f"The body is larger than {limit} bytes; send smaller or fewer images or files."
    await plain_error(413, message, code="body_too_large")(scope, receive, send)
