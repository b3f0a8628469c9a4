"""Images at URLs: what is public is fetched, and nothing makes us look around our own network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from threading import Event, Thread

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import InvalidImage, Overloaded
from serve.config import ImageSettings
from serve.gateway import addresses
from serve.gateway.addresses import PublicNetwork, is_public, resolved
from serve.gateway.fetching import MAX_CONNECTIONS, MAX_OF_OWNER, MAX_OF_REQUEST, ImageFetcher

PUBLIC = "93.184.216.34"
NAMES = {
    "pictures.example": [PUBLIC],
    "six.example": ["2606:2800:220:1:248:1893:25c8:1946"],
    "inside.example": ["10.0.0.7"],
    "both.example": [PUBLIC, "127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "none.example": [],
}
IMAGE = b"\x89PNG" + b"x" * 1000


class Pages(BaseHTTPRequestHandler):
    """``/to/<url>`` redirects there; the rest is what its name says."""

    def do_GET(self) -> None:
        _, kind, *rest = self.path.split("/", 2)
        if kind == "to":
            self.answer(302, b"", Location=rest[0])
        elif kind == "loop":
            self.answer(302, b"", Location="/loop")
        elif kind == "hop":
            count = int(rest[0])
            self.answer(302, b"", Location=f"/hop/{count - 1}" if count else "/image")
        elif kind == "missing":
            self.answer(404, b"no")
        elif kind == "zipped":
            self.answer(200, b"x", **{"Content-Encoding": "gzip"})
        elif kind == "liar":
            self.answer(200, b"", **{"Content-Length": str(10**12)})
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(10_000):
                self.wfile.write(b"x" * 1000)
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            self.server.left.wait(20)
        else:
            self.answer(200, IMAGE)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quietly."""


class Recorder(httpcore.AnyIOBackend):
    """Connects every address to one server of this test, and remembers which were asked for."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.asked: list[str] = []

    async def connect_tcp(self, host: str, port: int, *args, **kwargs) -> httpcore.AsyncNetworkStream:
        self.asked.append(host)
        return await super().connect_tcp("127.0.0.1", self.port, *args, **kwargs)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    opened = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    opened.left = Event()
    opened.daemon_threads = True
    Thread(target=opened.serve_forever, daemon=True).start()
    yield opened
    opened.left.set()
    opened.shutdown()


@pytest.fixture
def recorder(server: ThreadingHTTPServer) -> Recorder:
    return Recorder(server.server_address[1])


async def resolve(host: str, port: int) -> list[str]:
    return NAMES[host] if host in NAMES else await resolved(host, port)


def fetching(recorder: Recorder, **settings: object) -> Callable[[str], Awaitable[bytes]]:
    """Fetch one URL as a gateway would, over http so that no certificate stands between."""
    given = {"fetch": True, "allow_http": True, "max_bytes": 5000, "timeout_s": 5.0} | settings
    fetcher = ImageFetcher(ImageSettings(**given), PublicNetwork([80, 443], recorder, resolve))

    async def fetch(url: str) -> bytes:
        try:
            return (await fetcher.fetch_all([url]))[url]
        finally:
            await fetcher.close()

    return fetch


@pytest.mark.parametrize("url", ["http://pictures.example/image", "http://six.example/image", f"http://{PUBLIC}/image",
                                 "http://pictures.example/hop/2", "http://pictures.example:80/image#fragment",
                                 "HTTP://PICTURES.example/to/http://six.example/image"])  # fmt: skip
async def test_public_images_are_fetched(recorder: Recorder, url: str):
    assert await fetching(recorder)(url) == IMAGE
    assert all(is_public(ip_address(address)) for address in recorder.asked)


LOCAL = [
    "127.0.0.1", "127.1", "127.255.255.254", "0x7f.0.0.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001",
    "0.0.0.0", "0", "localhost", "localhost.", "LOCALHOST", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001:0:7f00:1::1]",
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254",
    "[::ffff:169.254.169.254]", "[fe80::1]", "[fd00:ec2::254]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "192.88.99.1", "168.63.129.16", "[2001:db8::1]", "[3fff::1]", "[5f00::1]", "[100::1]",
    "[::ffff:0:127.0.0.1]", "[::ffff:0:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "[::ffff:a00:1]",
    "[::ffff:100.64.0.1]", "[0:0:0:0:0:ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "127.0.0.1.", "127。0。0。1", "１２７.0.0.1",
    "①②⑦.⓪.⓪.①", "%31%32%37.0.0.1", "0x7f.1", "127.0.0x0.1", "0xA9FEA9FE", "2852039166", "0251.0376.0251.0376",
    "0xa9.0xfe.0xa9.0xfe", "169.254.43518", "[2001:10::1]", "[2001:20::1]", "[fec0::ffff]", "[fd12:3456:789a::1]",
    "[fe80::a9fe:a9fe]", "[ff05::2]", "192.0.0.8", "192.0.0.170", "239.255.255.250", "0.1.2.3", "localhost.localdomain",
    "inside.example", "both.example", "metadata.example", "none.example",
]  # fmt: skip


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("redirected", [False, True])
async def test_no_address_of_ours_is_connected_to(recorder: Recorder, host: str, redirected: bool):
    url = f"http://{host}/image"
    with pytest.raises(InvalidImage, match=r"no answer|cannot be read") as refused:
        await fetching(recorder)(f"http://pictures.example/to/{url}" if redirected else url)
    assert recorder.asked == ([PUBLIC] if redirected else [])
    assert host not in refused.value.message


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://pictures.example/a", "gopher://127.0.0.1/", "http:///image", "http://", "//x/y",
        "http://user@pictures.example/", "http://user:pass@pictures.example/", "http://pictures.example@127.0.0.1/",
        "http://pictures.example:22/", "http://pictures.example:8080/", "http://[::1%25lo]/", "http://[fe80::1%lo]/",
        "unix:///var/run/docker.sock", "", "image.png", "javascript:1", "DATA:image/png;base64,eA==", "http://a b/",
        "http://\x00/", "http://pictures.example\r\nHost: x/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("redirected", [False, True])
async def test_odd_urls_are_refused(recorder: Recorder, url: str, redirected: bool):
    if redirected and ("\r" in url or "\x00" in url or url in ("", "image.png", "//x/y", "http:///image", "http://")):
        pytest.skip("no header holds it, or it means the same host")
    with pytest.raises(InvalidImage):
        await fetching(recorder)(f"http://pictures.example/to/{url}" if redirected else url)
    assert recorder.asked in ([], [PUBLIC])


async def test_a_name_that_changes_its_mind_is_connected_to_as_it_was_checked(recorder: Recorder):
    """DNS rebinding: what was checked is what is connected to, and each connection is checked."""
    turns = iter([[PUBLIC], ["127.0.0.1"]])

    async def fickle(host: str, port: int) -> list[str]:
        return next(turns)

    network = PublicNetwork([80], recorder, fickle)
    await (await network.connect_tcp("rebind.example", 80)).aclose()
    with pytest.raises(httpcore.ConnectError):
        await network.connect_tcp("rebind.example", 80)
    assert recorder.asked == [PUBLIC]
    with pytest.raises(httpcore.ConnectError):
        await network.connect_unix_socket("/var/run/docker.sock")


@pytest.mark.parametrize(
    ("path", "said"),
    [("loop", "redirects"), ("hop/4", "redirects"), ("missing", "404"), ("zipped", "compressed"),
     ("liar", "more than 5000"), ("endless", "more than 5000"), ("slow", "no answer within 0.5 s")],
)  # fmt: skip
async def test_what_is_too_much_is_given_up(recorder: Recorder, path: str, said: str):
    with pytest.raises(InvalidImage, match=said):
        await asyncio.wait_for(fetching(recorder, timeout_s=0.5)(f"http://pictures.example/{path}"), 5)


async def test_settings_say_what_is_fetched(recorder: Recorder):
    url = "http://pictures.example/image"
    for settings, said in (
        ({"fetch": False}, "not fetched"),
        ({"allow_http": False}, "must begin with https"),
        ({"hosts": ("*.ours.example",)}, "not fetched from that host"),
    ):
        with pytest.raises(InvalidImage, match=said):
            await fetching(recorder, **settings)(url)
    assert recorder.asked == []
    assert await fetching(recorder, hosts=("Pictures.*",))(url) == IMAGE
    with pytest.raises(InvalidImage, match="not fetched from that host"):
        await fetching(recorder, hosts=("pictures.*",))("http://pictures.example/to/http://six.example/image")


async def test_each_image_is_fetched_once_and_one_failure_is_told_as_itself(recorder: Recorder):
    fetcher = ImageFetcher(ImageSettings(fetch=True, allow_http=True), PublicNetwork([80], recorder, resolve))
    urls = ["http://pictures.example/a", "http://pictures.example/b"]
    found = await fetcher.fetch_all([*urls, *urls])
    assert list(found) == urls and len(recorder.asked) <= 2
    with pytest.raises(InvalidImage, match="404"):
        await fetcher.fetch_all([*urls, "http://pictures.example/missing"])
    with pytest.raises(InvalidImage, match="at most 32"):
        await fetcher.fetch_all([f"http://pictures.example/{number}" for number in range(33)])
    await fetcher.close()


@given(st.ip_addresses())
def test_a_public_address_is_global_in_every_form(address):
    if is_public(address):
        assert address.is_global and not address.is_private and not address.is_loopback and not address.is_link_local
    if address.version == 4:
        assert is_public(ip_address(f"::ffff:{address}")) == is_public(address)


async def test_one_request_takes_a_few_connections_and_one_owner_not_all(recorder: Recorder):
    """Hosts that never answer hold their own owner's places; everyone else's images are fetched meanwhile."""
    settings = ImageSettings(fetch=True, allow_http=True, timeout_s=20)
    fetcher = ImageFetcher(settings, PublicNetwork([80], recorder, resolve))
    held = [
        asyncio.create_task(
            fetcher.fetch_all([f"http://pictures.example/slow/{number}-{each}" for each in range(32)], "hostile")
        )
        for number in range(4)
    ]
    while len(recorder.asked) < MAX_OF_OWNER:
        await asyncio.sleep(0.01)
    for owner in ("a", "b"):
        found = await asyncio.wait_for(fetcher.fetch_all(["http://pictures.example/image"], owner), 10)
        assert list(found.values()) == [IMAGE]
    assert recorder.asked == [PUBLIC] * len(recorder.asked) and len(recorder.asked) <= MAX_OF_OWNER + 2
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    assert list((await fetcher.fetch_all(["http://pictures.example/image"], "hostile")).values()) == [IMAGE]
    await fetcher.close()


async def test_a_request_alone_opens_few_connections(recorder: Recorder):
    fetcher = ImageFetcher(
        ImageSettings(fetch=True, allow_http=True, timeout_s=0.5), PublicNetwork([80], recorder, resolve)
    )
    urls = [f"http://pictures.example/slow/{number}" for number in range(32)]
    with pytest.raises(InvalidImage, match="no answer"):
        await asyncio.wait_for(fetcher.fetch_all(urls, "a"), 10)
    assert len(recorder.asked) <= MAX_OF_REQUEST
    await fetcher.close()


async def test_many_owners_who_hold_everything_make_others_come_again(recorder: Recorder):
    fetcher = ImageFetcher(
        ImageSettings(fetch=True, allow_http=True, timeout_s=1.0), PublicNetwork([80], recorder, resolve)
    )
    async with AsyncExitStack() as held:
        for number in range(MAX_CONNECTIONS):
            await held.enter_async_context(fetcher.place(f"owner {number}"))
        with pytest.raises(Overloaded, match="try again"):
            await fetcher.fetch_all(["http://pictures.example/image"], "late")
    assert list((await fetcher.fetch_all(["http://pictures.example/image"], "late")).values()) == [IMAGE]
    await fetcher.close()


async def test_the_images_of_a_request_are_bounded_together(recorder: Recorder):
    fetcher = ImageFetcher(
        ImageSettings(fetch=True, allow_http=True, max_bytes=1100), PublicNetwork([80], recorder, resolve)
    )
    urls = [f"http://pictures.example/{number}" for number in range(5)]
    assert len(await fetcher.fetch_all(urls[:4])) == 4
    with pytest.raises(InvalidImage, match="4400 bytes together"):
        await fetcher.fetch_all(urls)
    await fetcher.close()


async def test_silent_name_servers_leave_the_other_threads_alone(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    """The registry is read on the event loop's own threads."""
    answered = Event()

    def silent(*_: object, **__: object) -> list[object]:
        answered.wait(20)
        return []

    monkeypatch.setattr(addresses.socket, "getaddrinfo", silent)
    fetcher = ImageFetcher(ImageSettings(fetch=True, allow_http=True, timeout_s=0.5), PublicNetwork([80], recorder))
    try:
        for owner in range(7):
            urls = [f"http://{number}.silent.example/" for number in range(4)]
            with pytest.raises(InvalidImage, match="no answer"):
                await fetcher.fetch_all(urls, str(owner))
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "read"), 5) == "read"
    finally:
        answered.set()
        await fetcher.close()
