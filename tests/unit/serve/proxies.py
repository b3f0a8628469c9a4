"""A TCP proxy in front of a database, which can stall and drop what passes."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Passes bytes on until it is told otherwise. ``port``: where it listens."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Take connections and bytes, and pass nothing on, as a server does that is stopped."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def drop(self) -> None:
        """Cut every connection there is."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.flow()
        self.drop()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            self._open += [client, server]
            other = {client: server, server: client}
            with suppress(OSError):
                while True:
                    for end in select.select([client, server], [], [])[0]:
                        chunk = end.recv(1 << 16)
                        self._flows.wait()
                        if not chunk:
                            return
                        other[end].sendall(chunk)


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    made = Proxy(host, port)
    try:
        yield made
    finally:
        made.close()
