"""``Idempotency-Key``: a change that is sent twice, since its answer was lost, happens once and answers the same.

Two requests are the same if method, path, query and content are. The content of an upload is its files and fields, read
from the disk where they were spooled (:func:`once`); boundaries and the order of parts do not count.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.routing import APIRoute

from lora_runtime.errors import InvalidRequest
from serve.registry.replies import Replies, Reply

HEADER = "idempotency-key"
REPLAYED = "Idempotent-Replayed"
_SOUND = re.compile(r"[\x21-\x7e]{1,255}")

Handler = Callable[[Request], Awaitable[Response]]


def idempotent(replies: Replies) -> type[APIRoute]:
    """A class of routes whose changes take an idempotency key. Only successes are kept: after an error, the same key
    may try again."""

    class IdempotentRoute(APIRoute):
        def get_route_handler(self) -> Handler:  # type: ignore[override]
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                if not has_key(request) or request.method == "GET":
                    return await handle(request)
                return await once(replies, request, await request.body(), lambda: handle(request))

            return handled

    return IdempotentRoute


def has_key(request: Request) -> bool:
    return HEADER in request.headers


async def once(
    replies: Replies, request: Request, content: bytes, carry_out: Callable[[], Awaitable[Response]]
) -> Response:
    """Carry the request out, or give the answer that it had before. ``content``: its body, or a digest of that.

    Raises InvalidRequest for a malformed key and for one that stood for another request, Conflict while the first
    request runs. A request without a key is carried out.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return await carry_out()
    if not _SOUND.fullmatch(key):
        raise InvalidRequest("An idempotency key has 1 to 255 visible ASCII characters.", param=HEADER)
    owner = request.state.identity.id
    known = await asyncio.to_thread(replies.begin, owner, key, _fingerprint(request, content))
    if known is not None:
        return Response(known.body, known.status, {REPLAYED: "true"}, known.content_type)
    try:
        response = await carry_out()
    except BaseException:
        await asyncio.shield(asyncio.to_thread(replies.forget, owner, key))
        raise
    reply = Reply(
        status=response.status_code,
        content_type=response.headers.get("content-type", ""),
        body=bytes(response.body),
    )
    await asyncio.to_thread(replies.finish, owner, key, reply)
    return response


def _fingerprint(request: Request, content: bytes) -> str:
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    return hashlib.sha256(asked + content).hexdigest()
