"""A PostgreSQL server that is restarted under load: nothing acknowledged is lost, and all recover by themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve.follower import Follower
from serve.registry.database import Database
from serve.registry.errors import RegistryUnavailable
from serve.registry.repository import Repository
from tests.served import free_port

pytestmark = pytest.mark.slow

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


@dataclass(frozen=True)
class Server:
    """A server of the test's own. It refuses to run as root, so root runs it as another user."""

    pg_ctl: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*as_other, str(self.pg_ctl.with_name(program)), "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str) -> None:
        self.run("pg_ctl", "-w", "-m", mode, "stop")


@pytest.fixture
def server() -> Iterator[Server]:
    if not BINARIES:
        pytest.skip("needs PostgreSQL's server programs")
    folder = Path(tempfile.mkdtemp(prefix="loom-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    made = Server(BINARIES[-1], folder, free_port())
    made.run("initdb", "-U", "postgres", "-A", "trust")
    made.start()
    try:
        yield made
    finally:
        made.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_is_restarted_under_load_loses_nothing(server: Server, mode: str):
    databases = [Database(server.url) for _ in range(3)]
    watched = Repository(databases[2])
    seen: list[int] = []
    follower = Follower(watched.revision, snapshot=databases[2].reading)
    follower.add(lambda: seen.append(len(watched.adapters())))
    await follower.start()
    written: list[str] = []
    unexpected: list[BaseException] = []
    is_over = threading.Event()

    def write(number: int) -> None:
        repository = Repository(databases[number])
        count = 0
        while not is_over.wait(0.01):
            count += 1
            try:
                repository.add(f"a{number}-{count}", f"{count:064x}", "/1", {})
            except RegistryUnavailable:
                continue
            except BaseException as error:
                unexpected.append(error)
                return
            written.append(f"a{number}-{count}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    for _ in range(2):
        server.stop(mode)
        time.sleep(0.5)
        server.start()
        before, ends = len(written), time.monotonic() + 30
        while len(written) < before + 3 and not unexpected and time.monotonic() < ends:
            time.sleep(0.05)
        assert len(written) >= before + 3, "writing recovers"
    is_over.set()
    for thread in threads:
        thread.join(60)
    assert not unexpected, unexpected
    await follower.refresh()
    assert set(written) <= set(watched.adapters()) and seen[-1] == len(watched.adapters())
    await follower.stop()
