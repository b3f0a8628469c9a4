"""``Idempotency-Key``: a change that is sent twice, since its answer was lost, happens once and answers the same."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from lora_runtime.errors import InvalidRequest
from serve.background import ended
from serve.registry.errors import RegistryUnavailable
from serve.registry.replies import RENEWED_EVERY, Replies, Reply

log = logging.getLogger(__name__)

HEADER = "idempotency-key"
REPLAYED = "Idempotent-Replayed"
_SOUND = re.compile(r"[\x21-\x7e]{1,255}")

Handler = Callable[[Request], Awaitable[Response]]

_CARRYING: set[asyncio.Task[Response]] = set()
"""Event loops keep no tasks alive."""


def idempotent(replies: Replies) -> type[APIRoute]:
    """A class of routes whose changes take an idempotency key. Only successes are kept: after an error, the same key
    may try again."""

    class IdempotentRoute(APIRoute):
        def get_route_handler(self) -> Handler:  # type: ignore[override]
            handle = super().get_route_handler()

            async def once(request: Request) -> Response:
                key = request.headers.get(HEADER)
                if key is None or request.method == "GET":
                    return await handle(request)
                if not _SOUND.fullmatch(key):
                    raise InvalidRequest("An idempotency key has 1 to 255 visible ASCII characters.", param=HEADER)
                return await _once(replies, request, key, handle)

            return once

    return IdempotentRoute


async def _once(replies: Replies, request: Request, key: str, handle: Handler) -> Response:
    """Once all of it was received, the request is carried out to its end and its answer kept, also where the client
    leaves meanwhile: nobody could tell how much of it has happened, and a repeated one would make it happen again."""
    is_received = asyncio.Event()

    async def receive() -> Message:
        message = await request.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            is_received.set()
        return message

    carrying = asyncio.create_task(_carried_out(replies, Request(request.scope, receive), key, handle))
    _CARRYING.add(carrying)
    carrying.add_done_callback(_CARRYING.discard)
    try:
        return await asyncio.shield(carrying)
    except asyncio.CancelledError:
        carrying.add_done_callback(_log_failure)
        if not is_received.is_set():
            carrying.cancel()  # the rest of it will never come
        raise


async def _begin(replies: Replies, owner: str, key: str, fingerprint: str) -> Reply | None:
    """As ``Replies.begin``; cancelled, it leaves nothing behind."""
    beginning = asyncio.create_task(asyncio.to_thread(replies.begin, owner, key, fingerprint))
    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        if await beginning is None:
            await asyncio.to_thread(replies.forget, owner, key)
        raise


async def _carried_out(replies: Replies, request: Request, key: str, handle: Handler) -> Response:
    owner = request.state.identity.id
    known = await _begin(replies, owner, key, await _fingerprint(request))
    if known is not None:
        return Response(known.body, known.status, {REPLAYED: "true"}, known.content_type)
    try:
        async with _renewed(replies, owner, key):
            response = await handle(request)
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
    """What nobody waits for any more has nobody to tell how it failed."""
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


async def _fingerprint(request: Request) -> str:
    """Of what is asked. An upload is too large to be read for it: its length stands for it."""
    is_form = request.headers.get("content-type", "").startswith("multipart/")
    content = request.headers.get("content-length", "").encode() if is_form else await request.body()
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    return hashlib.sha256(asked + content).hexdigest()
