"""Images at URLs, fetched for a request: from public hosts only, and no more of them than may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from urllib.parse import urljoin

import httpcore
import httpx

from lora_runtime.errors import InvalidImage, Overloaded
from serve.config import ImageSettings
from serve.gateway.addresses import PublicNetwork
from serve.gateway.together import together

MAX_CONNECTIONS = 32
MAX_OF_OWNER = 8
"""Images that are fetched at once for one owner, so that nobody can take every connection."""
MAX_OF_REQUEST = 4
MAX_TOTAL = 4
"""Of one request: its images may have so many times ``max_bytes`` together, and so many times ``timeout_s``."""
MAX_REDIRECTS = 3
MAX_URLS = 32
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "loom")]
PORTS = {"https": 443, "http": 80}


class ImageFetcher:
    """Fetches what requests name by URL. Used from one event loop.

    No proxy, cookie or credential of this machine takes part. That an address is blocked, unknown or silent is told
    in the same words, so that nobody can look around our network with it.
    """

    def __init__(self, settings: ImageSettings, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        """``network``: what connections are opened by, the public one if not given."""
        self._settings = settings
        self._schemes = {"https", "http"} if settings.allow_http else {"https"}
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=MAX_CONNECTIONS,
            network_backend=network or PublicNetwork(PORTS[scheme] for scheme in self._schemes),
        )
        self._places = _Places()

    async def fetch_all(self, urls: Iterable[str], owner: str = "") -> dict[str, bytes]:
        """The images at ``urls``, each fetched once. ``owner``: for whom, whose share of the connections is used.

        Raises InvalidImage, and Overloaded where others hold the connections for longer than is waited.
        """
        wanted = list(dict.fromkeys(urls))
        if wanted and not self._settings.fetch:
            raise InvalidImage(
                "Images are taken as data: URIs only here, such as 'data:image/png;base64,…'; URLs are not fetched "
                "(setting images.fetch).",
                param="messages",
            )
        if len(wanted) > MAX_URLS:
            raise InvalidImage(f"{len(wanted)} images at URLs; at most {MAX_URLS} are fetched.", param="messages")
        fetch = _Request(self, owner, self._settings)
        limit_s = MAX_TOTAL * self._settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return dict(zip(wanted, await together(fetch(url) for url in wanted), strict=True))
        except TimeoutError as error:
            raise InvalidImage(
                f"The images at URLs did not arrive within {limit_s:g} s together.", param="messages"
            ) from error

    async def close(self) -> None:
        await self._pool.aclose()

    @asynccontextmanager
    async def place(self, owner: str) -> AsyncIterator[None]:
        """One of the connections, for as long as the context lasts. Raises Overloaded."""
        async with self._places.one_of(owner, self._settings.timeout_s):
            yield

    async def fetch(self, url: str) -> bytes:
        """One image, for who holds a place. Raises InvalidImage."""
        limits = self._settings
        try:
            async with asyncio.timeout(limits.timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    outcome = await self._step(url)
                    if isinstance(outcome, bytes):
                        return outcome
                    url = outcome
        except (TimeoutError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise InvalidImage(
                f"An image's URL gave no answer within {limits.timeout_s:g} s. It must be at a public address.",
                param="messages",
            ) from error
        raise InvalidImage(f"An image's URL redirects more than {MAX_REDIRECTS} times.", param="messages")

    async def _step(self, url: str) -> bytes | str:
        """The body at ``url``, or where it redirects to."""
        target = self._checked(url)
        address = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        async with self._pool.stream("GET", address, headers=HEADERS) as response:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and "location" in headers:
                return urljoin(str(target), headers["location"])
            if response.status != 200:
                raise InvalidImage(f"An image's URL answered {response.status}.", param="messages")
            if headers.get("content-encoding", "identity") != "identity":
                raise InvalidImage("An image's URL answered with a compressed body, unasked.", param="messages")
            return await self._body(response, headers.get("content-length", ""))

    async def _body(self, response: httpcore.Response, declared: str) -> bytes:
        limit = self._settings.max_bytes
        chunks: list[bytes] = []
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        if size <= limit:
            size = 0
            async for chunk in response.aiter_stream():
                size += len(chunk)
                if size > limit:
                    break
                chunks.append(chunk)
        if size > limit:
            raise InvalidImage(f"An image at a URL has more than {limit} bytes.", param="messages")
        return b"".join(chunks)

    def _checked(self, url: str) -> httpx.URL:
        """``url``, if it may be fetched as far as its text tells; its address is checked when it is connected to."""
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InvalidImage("An image's URL cannot be read.", param="messages") from error
        if parsed.scheme not in self._schemes or not parsed.host or parsed.userinfo:
            raise InvalidImage(
                f"An image's URL must begin with {' or '.join(f'{s}://' for s in sorted(self._schemes))} and name a "
                "host, without a user.",
                param="messages",
            )
        if parsed.port not in (None, PORTS[parsed.scheme]):
            raise InvalidImage("An image's URL must not name another port than its scheme's.", param="messages")
        hosts = self._settings.hosts
        if hosts and not any(fnmatchcase(parsed.host.lower(), pattern.lower()) for pattern in hosts):
            raise InvalidImage("Images are not fetched from that host (setting images.hosts).", param="messages")
        return parsed


class _Request:
    """Fetches the images of one request: some at once, and so many bytes together."""

    def __init__(self, fetcher: ImageFetcher, owner: str, settings: ImageSettings) -> None:
        self._fetcher = fetcher
        self._owner = owner
        self._at_once = asyncio.Semaphore(MAX_OF_REQUEST)
        self._left_bytes = self._limit_bytes = MAX_TOTAL * settings.max_bytes

    async def __call__(self, url: str) -> bytes:
        async with self._at_once, self._fetcher.place(self._owner):
            found = await self._fetcher.fetch(url)
        self._left_bytes -= len(found)
        if self._left_bytes < 0:
            raise InvalidImage(
                f"The images at URLs have more than {self._limit_bytes} bytes together.", param="messages"
            )
        return found


class _Places:
    """Connections, shared out: each owner has ``MAX_OF_OWNER`` at most. What an owner wants beyond that waits in a
    queue of its own and delays nobody else."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(MAX_CONNECTIONS)
        self._owners: dict[str, tuple[asyncio.Semaphore, int]] = {}

    @asynccontextmanager
    async def one_of(self, owner: str, wait_s: float) -> AsyncIterator[None]:
        """A place, waited for ``wait_s`` at most once it is the owner's turn. Raises Overloaded."""
        own, users = self._owners.get(owner, (asyncio.Semaphore(MAX_OF_OWNER), 0))
        self._owners[owner] = own, users + 1
        try:
            async with own:
                await self._enter(wait_s)
                try:
                    yield
                finally:
                    self._all.release()
        finally:
            _, users = self._owners.pop(owner)
            if users > 1:
                self._owners[owner] = own, users - 1

    async def _enter(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._all.acquire()
        except TimeoutError as error:
            raise Overloaded("Too many images are being fetched; try again shortly.", retry_after_s=1) from error
