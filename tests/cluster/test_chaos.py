"""Things die in turn under load on a real Ray cluster: an engine, a gateway, the registry's connections, a node.

No answer is wrong, no change that was acknowledged is lost, and the time until requests succeed again is printed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from ray.cluster_utils import Cluster

from tests.cluster.clusters import NODE, cluster_of, num_running, replica_processes, wait_until
from tests.fakes import write_fake_adapter
from tests.served import Served, served
from tests.unit.serve.conftest import new_database

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

CALM_S = 3.0
"""Without a failure for so long, the service counts as recovered."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(2) as started:
        yield started


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with new_database() as url:
        yield url


@pytest.fixture(scope="module")
def service(cluster: Cluster, database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("chaos")
    names = [f"a{number}" for number in range(4)]
    for name in names:
        write_fake_adapter(folder / "adapters" / name, name=name)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01}},
        "engines": {"replicas": 2, "num_cpus": 1.5},
        "gateways": {"replicas": 2, "num_cpus": 0.2},
        "registry": {"url": database},
        "adapters": {
            "roots": [str(folder / "adapters")],
            "preload": {name: str(folder / "adapters" / name) for name in names},
        },
    }
    with served(folder, settings, address=cluster.address) as running:
        yield running


@dataclass
class Load:
    """Requests and changes without a pause, and what became of them."""

    url: str
    adapters: Path
    wrong: list[str] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_right: int = 0
    written: list[str] = field(default_factory=list)
    refused_writes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(4)]
        threads.append(threading.Thread(target=self._write, daemon=True))
        for thread in threads:
            thread.start()
        return threads

    def stop(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        for thread in threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        """Each answer says who was asked what, so that another's answer would be seen."""
        count = 0
        while not self._stop.is_set():
            count += 1
            model, word = f"a{count % 4}", f"word{number}x{count}"
            body = {"model": model, "prompt": word, "max_tokens": 20}
            try:
                response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=20)
            except httpx.HTTPError as error:
                self._failed(type(error).__name__)
                continue
            if response.status_code != 200:
                self._failed(str(response.status_code))
                continue
            text = response.json()["choices"][0]["text"]
            if text.split() == [f"{model}:1", word] * 10:
                self.num_right += 1
            else:
                self.wrong.append(f"{body} -> {text}")

    def _write(self) -> None:
        """Adapters registered one after another; what was acknowledged is remembered."""
        count = 0
        while not self._stop.is_set():
            count += 1
            name = f"w{count}"
            folder = write_fake_adapter(self.adapters / name, name=name)
            body = {"name": name, "path": str(folder)}
            try:
                response = httpx.post(f"{self.url}/v1/adapters", json=body, timeout=20)
            except httpx.HTTPError:
                self.refused_writes += 1
                continue
            if response.is_success:
                self.written.append(name)
            else:
                self.refused_writes += 1
                assert response.status_code in (500, 503), response.text
            time.sleep(0.05)

    def _failed(self, how: str) -> None:
        self.failed_at.append(time.monotonic())
        self.failures.append(how)

    def recovery_s(self, since: float) -> float:
        """Waits until nothing has failed for a while; returns when the last failure was, counted from ``since``."""
        begun = time.monotonic()
        while time.monotonic() - max([since, *self.failed_at]) < CALM_S:
            assert time.monotonic() - begun < 120, f"it did not recover: {self.failures[-5:]}"
            time.sleep(0.1)
        return max([since, *self.failed_at]) - since


def test_what_dies_in_turn_under_load_is_survived(cluster: Cluster, service: Served, database: str, capsys):
    load = Load(service.url, service.log.parent / "adapters")
    threads = load.run()
    time.sleep(3)
    assert not load.failures and load.num_right > 20 and load.written
    for _ in range(20):  # whichever gateway registered it and whichever is asked
        assert httpx.get(f"{service.url}/v1/adapters/{load.written[-1]}", timeout=30).status_code == 200

    def cut_connections() -> None:
        """Every connection to the registry dies, and it takes no more for three seconds."""
        name = sa.engine.make_url(database).database
        admin = sa.create_engine(sa.engine.make_url(database).set(database="postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false'))
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )
            time.sleep(3)
            connection.execute(sa.text(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true'))
        admin.dispose()

    def lose_a_node() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        cluster.add_node(**NODE)

    chaos: dict[str, Callable[[], None]] = {
        "an engine replica": lambda: replica_processes(cluster, "Engine")[0].kill(),
        "a gateway replica": lambda: replica_processes(cluster, "Gateway")[0].kill(),
        "the intake": lambda: replica_processes(cluster, "Intake")[0].kill(),
        "the registry": cut_connections,
        "a node": lose_a_node,
    }

    def all_there() -> bool:
        """Processes too: for some seconds Ray takes a replica that died for one that runs."""
        wanted = {"Engine": 2, "Gateway": 2, "Intake": 1}
        return all(num_running(n) == len(replica_processes(cluster, n)) == count for n, count in wanted.items())

    assert all_there()
    lines = []
    for what, strike in chaos.items():
        before, right = len(load.failures), load.num_right
        since = time.monotonic()
        strike()
        wait_until(all_there, 90)
        whole = time.monotonic() - since
        recovery = load.recovery_s(since)
        lines.append(
            f"killed {what}: {len(load.failures) - before} requests failed of "
            f"{len(load.failures) - before + load.num_right - right}, the last after {recovery:.1f} s; "
            f"all replicas back after {whole:.1f} s"
        )
        if what == "the registry":
            assert len(load.failures) == before, "requests need no registry"
    load.stop(threads)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
        print(f"{load.num_right} right answers, {len(load.wrong)} wrong; {len(load.written)} changes acknowledged, "
              f"{load.refused_writes} refused")  # fmt: skip
    assert not load.wrong
    listed = {adapter["id"] for adapter in httpx.get(f"{service.url}/v1/adapters", timeout=30).json()["data"]}
    assert set(load.written) <= listed, "a change that was acknowledged is lost"
    body = {"model": load.written[-1], "prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=30).status_code == 200
