"""``deploy/serve-config.yaml`` as KubeRay's operator deploys it: ``ray start`` on two machines, a PUT to the dashboard.

Then the head dies, and what the other machine holds goes on serving.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from sqlalchemy.engine import make_url

from lora_runtime.zoo import paths
from lora_runtime.zoo.tasks import examples
from serve.ray_environment import PROXY_CALLBACK
from tests.cluster.clusters import wait_until
from tests.cluster.hosts import GATEWAY, Lab, forwarded, lab, redis_at
from tests.http.test_zoo import messages
from tests.unit.serve.conftest import new_database

DEPLOY = Path(__file__).parents[2] / "deploy"
HEAD, WORKER = 10, 11
TOKEN = "a-token-of-this-test-only-0123456789"
PASSWORD, UNIT_SECRET = "pw-never-in-ray", "unit-secret-never-in-ray"
REDIS_PORT, DATABASE_PORT = 6399, 5499
START_S = 240

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Deployed:
    """Two machines that serve; ``env`` is what their processes, and commands on them, start with."""

    lab: Lab
    env: dict[str, str]
    redis: str

    def start_head(self) -> None:
        own = {"RAY_REDIS_ADDRESS": self.redis, "RAY_external_storage_namespace": "loom-test"}
        port = ["--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        address = f"--node-ip-address={self.lab.address(HEAD)}"
        self.lab.start("head", ["ray", "start", "--head", "--block", "--num-cpus=2", *port, address], self.env | own)

    def start_worker(self) -> None:
        own = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        resources = ["--num-cpus=4", "--num-gpus=0", '--resources={"engine": 1}']
        address = [f"--address={self.lab.address(HEAD)}:6379", f"--node-ip-address={self.lab.address(WORKER)}"]
        self.lab.start("worker", ["ray", "start", "--block", *address, *resources], self.env | own)

    def is_healthy(self) -> bool:
        try:
            self.lab.run("head", ["ray", "health-check", f"--address={self.lab.address(HEAD)}:6379"], self.env)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return False
        return True

    def applications(self) -> dict[str, Any]:
        return self._dashboard("GET").json()["applications"]

    def has_dashboard(self) -> bool:
        try:
            return self._dashboard("GET").status_code == 200
        except httpx.HTTPError:
            return False

    def put(self) -> None:
        self._dashboard("PUT", json=yaml.safe_load((DEPLOY / "serve-config.yaml").read_text())).raise_for_status()

    def is_running(self) -> bool:
        try:
            found = self.applications().get("loom", {"status": "absent"})
        except (httpx.HTTPError, KeyError):
            return False
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return found["status"] == "RUNNING"

    def url(self, machine: int) -> str:
        return f"http://{self.lab.address(machine)}:8000"

    def engine(self) -> psutil.Process:
        family = psutil.Process(self.lab.processes["worker"].pid).children(recursive=True)
        found = [one for one in family if "ServeReplica:loom:Engine" in "".join(one.cmdline())]
        assert len(found) == 1
        return found[0]

    def _dashboard(self, method: str, **given: Any) -> httpx.Response:
        url = f"http://{self.lab.address(HEAD)}:8265/api/serve/applications/"
        return httpx.request(method, url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, **given)


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    with lab({"head": HEAD, "worker": WORKER}, DEPLOY / "loom.yaml") as made, new_database() as database:
        shared = made.folder / "shared"
        gateway = made.address(GATEWAY)
        url = make_url(database)
        seen = url.set(host=gateway, port=DATABASE_PORT, password=PASSWORD)
        env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
            **dict([PROXY_CALLBACK]),
            # What a chart sets: secrets and what this cluster has.
            "LOOM_REGISTRY__URL": seen.render_as_string(hide_password=False),
            "LOOM_EXPERIMENTS__UNIT_SECRET": UNIT_SECRET,
            "LOOM_BASE__PATH": str(paths.BASE),
            "LOOM_STATE_DIR": str(shared / "state"),
            "LOOM_STORE__URL": str(shared / "store"),
            "LOOM_MERGES__URL": str(shared / "merges"),
            "LOOM_ADAPTERS__ROOTS": f'["{paths.ZOO}"]',
            "LOOM_ENGINES__NUM_GPUS": "0",
            "LOOM_ENGINES__NUM_CPUS": "1",
            "LOOM_ENGINES__RESOURCES": '{"engine": 1}',
            "LOOM_GATEWAYS__REPLICAS": "2",
            "LOOM_GATEWAYS__MAX_REPLICAS_PER_NODE": "1",
        }
        with (
            redis_at(gateway, REDIS_PORT, made.folder) as redis,
            forwarded(gateway, DATABASE_PORT, f"{url.host}:{url.port or 5432}"),
        ):
            found = Deployed(made, env, redis)
            found.start_head()
            wait_until(found.is_healthy, 120)
            found.start_worker()
            wait_until(found.has_dashboard, 120)
            found.put()
            wait_until(found.is_running, START_S)
            yield found


@pytest.fixture(scope="module")
def key(deployed: Deployed) -> str:
    """Made on the head, with the configuration that lies there."""
    command = ["loom", "keys", "create", "ada", "--scope", "admin", "--config", "/etc/loom/loom.yaml"]
    printed = deployed.lab.run("head", command, deployed.env).split()
    return next(word for word in printed if word.startswith("loom_"))


def ask(url: str, key: str, model: str, question: int = 0) -> tuple[str, str]:
    """The answer to a held-out question, and the right one."""
    example = list(examples("shape", "heldout", question + 1))[question]
    body = {"model": model, "messages": messages(example), "temperature": 0, "max_tokens": 32}
    headers = {"Authorization": f"Bearer {key}"}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"], example.answer


def test_it_answers_right_through_each_machines_proxy(deployed: Deployed, key: str):
    body = {"path": str(paths.ADAPTERS["shape"]), "name": "shape"}
    headers = {"Authorization": f"Bearer {key}"}
    httpx.post(f"{deployed.url(HEAD)}/v1/adapters", json=body, headers=headers, timeout=60).raise_for_status()
    for machine in (HEAD, WORKER):
        assert httpx.get(f"{deployed.url(machine)}/v1/models", timeout=60).status_code == 401
        answer, right = ask(deployed.url(machine), key, "shape")
        assert answer == right


def test_serve_deploy_takes_the_same_file(deployed: Deployed, key: str):
    """Nothing in it changed, so nothing is restarted."""
    engine = deployed.engine().pid
    config = str(DEPLOY / "serve-config.yaml")
    address = f"http://{deployed.lab.address(HEAD)}:8265"
    deployed.lab.run("head", ["serve", "deploy", config, "--address", address], deployed.env)
    wait_until(deployed.is_running, START_S)
    answer, right = ask(deployed.url(WORKER), key, "shape")
    assert answer == right and deployed.engine().pid == engine


def test_ray_keeps_no_secret(deployed: Deployed, key: str):
    """Everything in Redis is what Ray's control store keeps; logs and Serve's details are what Ray shows."""
    host, port = deployed.redis.split(":")
    dump = deployed.lab.folder / "dump.rdb"
    dump.unlink(missing_ok=True)
    subprocess.run(["redis-cli", "-h", host, "-p", port, "CONFIG", "SET", "rdbcompression", "no"], check=True)
    subprocess.run(["redis-cli", "-h", host, "-p", port, "SAVE"], check=True)
    kept = dump.read_bytes()
    assert b"ServeReplica" in kept  # it is what Ray keeps
    shown = str(deployed.applications()).encode()
    files = deployed.lab.folder.glob("*.ray/session_2*/logs/**/*.*")
    logs = b"".join(file.read_bytes() for file in files if file.is_file())
    assert b"loom" in logs
    for secret in (PASSWORD, UNIT_SECRET, key):
        assert secret.encode() not in kept + shown + logs


def test_who_has_no_token_cannot_run_code(deployed: Deployed):
    """From outside: the test's own network reaches every port of the machines."""
    program = "import ray; ray.init(address='{}:6379', log_to_driver=False); print(ray.nodes())"
    env = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_connect_timeout_s": "5"}
    with pytest.raises((subprocess.CalledProcessError, subprocess.TimeoutExpired)) as caught:
        deployed.lab.run("worker", ["python", "-c", program.format(deployed.lab.address(HEAD))], env, timeout_s=90)
    assert "Authentica" in str(caught.value.stderr) or isinstance(caught.value, subprocess.TimeoutExpired)
    response = httpx.get(f"http://{deployed.lab.address(HEAD)}:8265/api/serve/applications/", timeout=10)
    assert response.status_code in (401, 403)


@dataclass
class Loop:
    """Questions to one machine, one after the other, until told to stop."""

    url: str
    key: str
    served: int = 0
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                answer, right = ask(self.url, self.key, "shape", self.served % 4)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
            else:
                self.served += 1
                if answer != right:
                    self.failures.append(f"{answer} instead of {right}")
            time.sleep(0.2)

    def stop(self) -> None:
        self._stopping.set()


def test_the_head_may_die(deployed: Deployed, key: str, capsys: pytest.CaptureFixture[str]):
    """Requests through the other machine are answered all the while, and the same engine is there afterwards."""
    engine = deployed.engine()
    begun = engine.create_time()
    loop = Loop(deployed.url(WORKER), key)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        wait_until(lambda: loop.served >= 5, 60)
        deployed.lab.kill("head")
        dead = time.monotonic()
        during = loop.served
        wait_until(lambda: loop.served >= during + 10, 120)
        deployed.start_head()
        wait_until(deployed.is_running, START_S)
        back_s = time.monotonic() - dead
        wait_until(lambda: ask(deployed.url(HEAD), key, "shape") is not None, 60)
        wait_until(lambda: loop.served >= during + 20, 60)
    finally:
        loop.stop()
        thread.join()
    with capsys.disabled():
        print(
            f"\nhead killed; back and RUNNING after {back_s:.0f} s; through the worker {loop.served} answered, "
            f"{len(loop.failures)} failed; engine process {engine.pid} the same: {deployed.engine() == engine}"
        )
    assert loop.failures == []
    assert deployed.engine().pid == engine.pid and engine.create_time() == begun
    answer, right = ask(deployed.url(HEAD), key, "shape")
    assert answer == right


def test_serve_run_on_one_machine():
    """Ray's command for developers; on a machine of its own, as it takes port 8000 of all interfaces."""
    with lab({"solo": HEAD}, DEPLOY / "loom.yaml") as made:
        env = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "LOOM_STATE_DIR": str(made.folder / "state"),
            "LOOM_STORE__URL": str(made.folder / "store"),
            "LOOM_BASE__PATH": str(paths.BASE),
            "LOOM_ENGINES__NUM_GPUS": "0",
            "LOOM_ENGINES__NUM_CPUS": "1",
            "LOOM_AUTH__REQUIRED": "false",
        }
        made.start("solo", ["serve", "run", "--name", "loom", "serve.app:build_app", "config=/etc/loom/loom.yaml"], env)
        # Such a Ray Serve listens on loopback.
        body = {"model": "qwen2-vl", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        headers = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        command = ["curl", "-sf", "http://127.0.0.1:8000/v1/chat/completions", *headers]

        def answers() -> bool:
            try:
                return bool(json.loads(made.run("solo", command, env))["choices"])
            except subprocess.CalledProcessError:
                return False

        wait_until(answers, START_S)
