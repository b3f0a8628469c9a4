"""Which addresses a request may make us connect to: public ones, and none that leads to one that is not.

Checked on the address that is connected to, after names are resolved, so that no spelling and no name server gets
around it (OWASP, Server-Side Request Forgery Prevention Cheat Sheet).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpcore

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

RESOLVING = ThreadPoolExecutor(32, "loom-resolve")
"""Threads of their own: a name server that does not answer holds one for many seconds, also when nobody waits any more,
and those of ``asyncio.to_thread`` are what the registry is read on."""

REFUSED = tuple(
    ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's host agent, at a public address
        "192.0.0.0/24",  # protocol assignments, among them Oracle's metadata
        "192.88.99.0/24",  # 6to4 relays
        "64:ff9b::/96",  # NAT64: leads to any IPv4 address
        "64:ff9b:1::/48",
        "2001::/23",  # protocol assignments, among them Teredo
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fec0::/10",  # site-local
        "::/96",  # IPv4-compatible
    )
)


class Blocked(httpcore.ConnectError):
    """An address that is not to be connected to."""


def is_public(address: Address) -> bool:
    """Whether everyone on the Internet reaches the same host there."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    special = address.is_multicast or address.is_reserved or not address.is_global
    return not special and not any(address in network for network in REFUSED)


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects where every address of a name is public, to the very address that was checked.

    ``inner`` opens connections; ``resolve`` gives a name's addresses. Raises Blocked, which is a ConnectError.
    """

    def __init__(
        self, ports: Iterable[int], inner: httpcore.AsyncNetworkBackend | None = None, resolve: Resolver | None = None
    ) -> None:
        self._ports = frozenset(ports)
        self._inner = inner or httpcore.AnyIOBackend()
        self._resolve = resolve or resolved

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        if port not in self._ports:
            raise Blocked(f"port {port} is not to be connected to")
        found = await self._resolve(host, port)
        try:
            addresses = [ip_address(text) for text in found]
        except ValueError as error:  # a scope, such as %eth0, makes an address local
            raise Blocked("the name leads to no plain address") from error
        if not addresses or not all(is_public(address) for address in addresses):
            raise Blocked("the name leads to an address that is not public")
        return await self._inner.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise Blocked("sockets of this machine are not to be connected to")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


async def resolved(host: str, port: int) -> list[str]:
    """The addresses of ``host``, as the system resolves it; odd spellings (``0x7f.1``) become what they mean."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(RESOLVING, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError as error:
        raise httpcore.ConnectError("the name is not known") from error
    except UnicodeError as error:
        raise Blocked("the name is none") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
