"""Heads of HTTP requests within limits: uvicorn reads one of any size, for any time, and Ray Serve has no setting.

Without it, connections whose heads never end hold file descriptors, and memory, of the proxy without a key.
"""

from __future__ import annotations

import asyncio

import uvicorn.protocols.http.auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 15.0
"""From the connection, or from a later request's first byte, to the end of the head."""
MAX_HEAD_BYTES = 256 << 10
"""Beyond the first packet. Far over ``server.max_header_bytes``, over which the gateway answers 431."""


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, which closes the connection of a head that is too large or too slow."""

    _in_head = False
    _head_bytes = 0
    _head_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.close()

    def _await_head(self) -> None:
        if self._head_timeout is None:
            self._head_timeout = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timeout is not None:
            self._head_timeout.cancel()
            self._head_timeout = None


def bound_heads() -> None:
    """Have every uvicorn server that this process starts from now on, and that chooses its protocol itself, do so."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = BoundedHeads
