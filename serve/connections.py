"""HTTP connections within limits. uvicorn reads a head of any size for any time, and waits without end for a client to
read its answer; Ray Serve has no setting for either.

Such connections, which need no key, would hold the proxy's memory and file descriptors, and an answer's place.
"""

from __future__ import annotations

import asyncio

import uvicorn.protocols.http.auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 15.0
"""From the connection, or from a later request's first byte, to the end of the head."""
MAX_HEAD_BYTES = 256 << 10
"""Beyond the first packet. Far over ``server.max_header_bytes``, over which the gateway answers 431."""


STALL_TIMEOUT_S = 60.0
"""For a client to read some of what fills the buffers. One that does not is dropped, and its request ends."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol. Closes connections whose head is too large or too slow, or whose client does not read."""

    _in_head = False
    _head_bytes = 0
    _head_timeout: asyncio.TimerHandle | None = None
    _stall_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._reads_again()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timeout = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)  # close() would wait too

    def resume_writing(self) -> None:
        self._reads_again()
        super().resume_writing()

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

    def _reads_again(self) -> None:
        if self._stall_timeout is not None:
            self._stall_timeout.cancel()
            self._stall_timeout = None


def bound_connections() -> None:
    """Have every uvicorn server that this process starts from now on, and that chooses its protocol itself, do so."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = BoundedHttp
