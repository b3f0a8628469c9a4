"""``Idempotency-Key``: a change that is sent twice, since its answer was lost, happens once and answers the same.

Two requests are the same if method, path, query and content are. The content of an upload is its files and fields, read
from the disk where they were spooled (:func:`once`); boundaries and the order of parts do not count.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Request, Response
from fastapi.routing import APIRoute

from lora_runtime.errors import InvalidRequest
from serve.background import ended
from serve.registry.errors import RegistryUnavailable
from serve.registry.replies import RENEWED_EVERY, Replies, Reply

log = logging.getLogger(__name__)

HEADER = "idempotency-key"
REPLAYED = "Idempotent-Replayed"
_SOUND = re.compile(r"[\x21-\x7e]{1,255}")

Handler = Callable[[Request], Awaitable[Response]]
Change = Callable[[], Awaitable[Response]]

_CARRYING: set[asyncio.Task[Response]] = set()
"""Event loops keep no tasks alive."""


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
    replies: Replies, request: Request, content: bytes, carry_out: Change, *, keeps: AsyncExitStack | None = None
) -> Response:
    """Carry the request out, or give the answer that it had before. ``content``: its body, or a digest of that.

    With a key it is carried out to its end and its answer kept, also where the client leaves meanwhile: nobody could
    tell how much of it had happened, and a repeated request would make it happen again. ``keeps`` is taken over then,
    and closed at that end. Without a key it is carried out as any request.

    Raises InvalidRequest for a malformed key and for one that stood for another request, Conflict while the first
    request runs.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return await carry_out()
    if not _SOUND.fullmatch(key):
        raise InvalidRequest("An idempotency key has 1 to 255 visible ASCII characters.", param=HEADER)
    kept = AsyncExitStack() if keeps is None else keeps.pop_all()
    carrying = asyncio.create_task(_carried_out(replies, request, key, content, carry_out, kept))
    _CARRYING.add(carrying)
    carrying.add_done_callback(_CARRYING.discard)
    try:
        return await asyncio.shield(carrying)
    except asyncio.CancelledError:
        carrying.add_done_callback(_log_failure)
        raise


async def _carried_out(
    replies: Replies, request: Request, key: str, content: bytes, carry_out: Change, kept: AsyncExitStack
) -> Response:
    owner = request.state.identity.id
    async with kept:
        known = await asyncio.to_thread(replies.begin, owner, key, _fingerprint(request, content))
        if known is not None:
            return Response(known.body, known.status, {REPLAYED: "true"}, known.content_type)
        try:
            async with _renewed(replies, owner, key):
                response = await carry_out()
        except BaseException:
            await asyncio.to_thread(replies.forget, owner, key)
            raise
        reply = Reply(
            status=response.status_code,
            content_type=response.headers.get("content-type", ""),
            body=bytes(response.body),
        )
        await asyncio.to_thread(replies.finish, owner, key, reply)
        return response


def _log_failure(carrying: asyncio.Task[Response]) -> None:
    """The client has left, so nobody else is told how it failed."""
    if not carrying.cancelled() and (error := carrying.exception()) is not None:
        log.info("a change whose client had left failed: %s", type(error).__name__)


@asynccontextmanager
async def _renewed(replies: Replies, owner: str, key: str) -> AsyncIterator[None]:
    """While in it, the request counts as running. A gateway that is killed stops renewing."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(RENEWED_EVERY.total_seconds())
            try:
                await asyncio.to_thread(replies.renew, owner, key)
            except RegistryUnavailable as error:  # the next try may come in time
                log.warning("an idempotency key could not be renewed: %s", error.message)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        await ended(renewing)


def _fingerprint(request: Request, content: bytes) -> str:
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    return hashlib.sha256(asked + content).hexdigest()
