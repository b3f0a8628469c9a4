"""Receiving a request's body, within limits of size and of time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import Message, Receive

from lora_runtime.errors import AdapterTooLarge, CallerError

SLOW_S = 1.0
"""A body that takes longer may be given up for another one."""


class BodyTooLarge(CallerError):
    """The body has more bytes than may be sent."""


class BodyTimeout(CallerError):
    """The body stopped coming, or came too slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """``max_bytes`` of an ordinary body and ``max_upload_bytes`` of an uploaded adapter may be sent.

    ``timeout_s``: the longest wait for the next bytes. Beyond that much in all, a body must have come at
    ``bytes_per_s`` on average.

    Ordinary bodies stay in memory until their requests end, ``max_held_bytes`` of them. When these are taken, or
    ``max_arriving`` bodies are under way, the oldest that is slow is given up for the next.
    """

    max_bytes: int
    max_upload_bytes: int
    timeout_s: float
    bytes_per_s: float
    max_arriving: int
    max_held_bytes: int


class Arriving:
    """An ASGI ``receive`` that counts bytes against ``max_bytes`` and waits no longer than ``limits`` allow.

    Raises AdapterTooLarge for an upload, BodyTooLarge for any other body, and BodyTimeout. Once the body is complete it
    waits without a limit, for the client to leave.
    """

    def __init__(self, receive: Receive, limits: BodyLimits, max_bytes: int, *, is_upload: bool = False) -> None:
        self._receive = receive
        self._limits = limits
        self._max_bytes = max_bytes
        self._is_upload = is_upload
        self._size = 0
        self._waited_s = 0.0
        self._is_complete = False
        self._given_up = False
        self._timeout: asyncio.Timeout | None = None
        self._begun = 0.0

    @property
    def is_slow(self) -> bool:
        return self._waited_s + self._waiting_s > SLOW_S

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        message = await self._next()
        self._size += len(message.get("body", b""))
        if self._size > self._max_bytes:
            raise self._too_large()
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    def give_up(self) -> None:
        """Have the wait under way, or else the next one, end with BodyTimeout."""
        self._given_up = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def _next(self) -> Message:
        self._begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._patience_s) as self._timeout:
                return await self._receive()
        except TimeoutError as error:
            raise BodyTimeout(self._reason(), received=self._size) from error
        finally:
            self._waited_s += self._waiting_s
            self._timeout = None

    @property
    def _waiting_s(self) -> float:
        return 0.0 if self._timeout is None else asyncio.get_running_loop().time() - self._begun

    @property
    def _patience_s(self) -> float:
        if self._given_up:
            return 0.0
        limits = self._limits
        remaining = limits.timeout_s + self._size / limits.bytes_per_s - self._waited_s
        return max(0.0, min(limits.timeout_s, remaining))

    def _reason(self) -> str:
        if self._given_up:
            return f"The service is short of places; after {self._size} bytes your body was still incomplete. Retry."
        return (
            f"The body is incomplete after {self._size} bytes: the next bytes must come within "
            f"{self._limits.timeout_s:g} s, and {self._limits.bytes_per_s:g} bytes per second on average."
        )

    def _too_large(self) -> CallerError:
        if self._is_upload:
            return AdapterTooLarge(f"The upload is larger than {self._max_bytes} bytes.", limit=self._max_bytes)
        return too_large(self._max_bytes)


def without_body(receive: Receive) -> Receive:
    """An ASGI ``receive`` with an empty body, which then waits for the client to leave; what it sends is dropped."""
    is_given = False

    async def empty() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await receive())["type"] != "http.disconnect":
            continue
        return message

    return empty


def replayed(body: bytes, receive: Receive) -> Receive:
    """An ASGI ``receive`` that gives ``body``, and then what ``receive`` gives."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit} bytes; send smaller or fewer images or files.", limit=limit)
