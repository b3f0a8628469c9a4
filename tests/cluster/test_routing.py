"""Two engine replicas on a real Ray: requests find who holds their adapters, unless that one has too much to do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray import serve as ray_serve
from ray.cluster_utils import Cluster

from tests.cluster.clusters import cluster_of, wait_until
from tests.fakes import write_fake_adapter
from tests.served import Served, served

pytestmark = pytest.mark.cluster

NAMES = [f"a{number}" for number in range(8)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(0, head_cpus=4) as started:
        yield started


@pytest.fixture(scope="module")
def service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("routing")
    for name in NAMES:
        write_fake_adapter(folder / name, name=name)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01}},
        "engines": {"replicas": 2, "num_cpus": 0.5, "max_ongoing_requests": 40},
        "adapters": {"roots": [str(folder)], "preload": {name: str(folder / name) for name in NAMES}},
    }
    with served(folder, settings, address=cluster.address) as running:
        yield running


@pytest.fixture(scope="module")
def versions(service: Served) -> dict[str, str]:
    listed = httpx.get(f"{service.url}/v1/adapters").json()["data"]
    return {adapter["id"]: adapter["version"] for adapter in listed}


def ask(service: Served, model: str, tokens: int = 2) -> int:
    body = {"model": model, "prompt": "hello", "max_tokens": tokens}
    return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code


def held() -> list[set[str]]:
    """The versions in each replica's slots."""
    handle = ray_serve.get_deployment_handle("Engine", "loom")
    return [set(stats.resident) for stats in handle.broadcast("stats").results(timeout_s=10)]


def test_each_adapter_stays_where_it_is_held(service: Served, versions: dict[str, str]):
    for _ in range(6):
        assert {ask(service, name) for name in NAMES[:6]} == {200}
    first, second = held()
    assert first | second == {versions[name] for name in NAMES[:6]}
    assert not first & second, "one after another, no adapter was needed twice"
    assert first and second, "and they are spread"


def test_all_prompts_of_one_request_are_answered(service: Served):
    body = {"model": NAMES[0], "prompt": [f"word{number}" for number in range(16)], "max_tokens": 2}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=30).json()
    assert [choice["text"].split()[1] for choice in answer["choices"]] == body["prompt"]


def test_a_combination_goes_where_most_of_it_is_held(service: Served, versions: dict[str, str]):
    """Also right after a burst: what ended no longer counts."""
    before = held()
    together = next(found for found in before if len(found) >= 2)
    one, other = [name for name in NAMES if versions[name] in together][:2]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:  # few enough for one replica
            assert set(pool.map(lambda _: ask(service, other), range(8))) == {200}
        assert ask(service, f"{one}:0.5+{other}:0.5") == 200
    assert held() == before, "who held both answered"


def test_a_hot_adapter_is_shared_and_its_load_too(service: Served, versions: dict[str, str]):
    hot = NAMES[6]
    assert ask(service, hot) == 200 and sum(versions[hot] in found for found in held()) == 1
    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(lambda _: ask(service, hot, 150), range(24)))
    assert set(statuses) == {200}
    assert all(versions[hot] in found for found in held())


def test_pinned_aliases_are_held_by_every_replica_before_anyone_asks(service: Served, versions: dict[str, str]):
    name = NAMES[7]
    assert not any(versions[name] in found for found in held())
    body = {"version": "latest", "pinned": True}
    pinned = httpx.put(f"{service.url}/v1/adapters/{name}/aliases/prod", json=body)
    assert pinned.json()["pinned"] == ["prod"]
    wait_until(lambda: all(versions[name] in found for found in held()))
    kept = httpx.put(f"{service.url}/v1/adapters/{name}/aliases/prod", json={"version": "latest"})
    assert kept.json()["pinned"] == ["prod"]
