"""Machines of a test's own: network, process and mount namespaces on one bridge, each with a Ray node started by
``ray start`` as KubeRay starts it. Needs Linux, root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

NEEDED = ("ip", "unshare", "redis-server", "socat")
GATEWAY = 1
_ENTER = """
set -eu
hostname "$1"
mkdir -p /tmp/ray && mount --bind "$2" /tmp/ray
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p "$3/upper" "$3/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$3/upper,workdir=$3/work" /etc
cp -f "$4/hosts" /etc/hosts; rm -f /etc/resolv.conf; cp -f "$4/resolv.conf" /etc/resolv.conf
mkdir -p /etc/loom && cp -f "$4/loom.yaml" /etc/loom/loom.yaml
shift 4
exec "$@"
"""
"""``/etc`` is written over in the namespace only. Without a name server Ray's agents would wait for one."""


@dataclass
class Lab:
    """A bridge, and machines at it. ``folder``: short, since Ray's sockets have paths of 107 characters at most."""

    folder: Path
    name: str
    subnet: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def run(
        self, host: str, command: Sequence[str], env: Mapping[str, str], *, name: str = "", timeout_s: float = 120
    ) -> str:
        """Run to its end on ``host``; what it printed. Raises CalledProcessError."""
        inside = self._inside(host, name or f"{host}-{uuid.uuid4().hex[:6]}", command)
        return subprocess.run(
            inside, env=_clean(env, self.folder), check=True, capture_output=True, text=True, timeout=timeout_s
        ).stdout

    def start(self, host: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start ``command`` as the first process of ``host``; whatever it starts ends with it."""
        log = open(self.folder / f"{host}.log", "ab")  # noqa: SIM115 - the process owns it
        self.processes[host] = subprocess.Popen(
            self._inside(host, host, command),
            env=_clean(env, self.folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def kill(self, host: str) -> None:
        """End everything on ``host`` at once, as when its power fails."""
        process = self.processes.pop(host)
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGKILL)  # the first process of the namespace takes all others with it
        process.kill()
        process.wait(timeout=30)

    def _inside(self, host: str, name: str, command: Sequence[str]) -> list[str]:
        ray, etc = self.folder / f"{name}.ray", self.folder / f"{name}.etc"
        ray.mkdir(exist_ok=True)
        etc.mkdir(exist_ok=True)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child"]
        enter = ["bash", "-c", _ENTER, "host", host, str(ray), str(etc), str(self.folder)]
        return ["ip", "netns", "exec", f"{self.name}{host}", *unshare, *enter, *command]


@contextmanager
def lab(hosts: Mapping[str, int], config: Path) -> Iterator[Lab]:
    """Machines by name, with the last part of their addresses; ``config`` is each one's ``/etc/loom/loom.yaml``."""
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if sys.platform != "linux" or os.geteuid() != 0 or missing:
        pytest.skip(f"needs Linux, root and {', '.join(missing or NEEDED)} to make machines of namespaces")
    number = uuid.uuid4().int % 200 + 20
    made = Lab(Path(tempfile.mkdtemp(prefix="lab")), f"lm{number}", f"10.{number}.7")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, made.folder, ignore_errors=True)
        shutil.copy(config, made.folder / "loom.yaml")
        lines = [f"{made.address(last)} {host}" for host, last in hosts.items()]
        (made.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (made.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        _ip("link", "add", made.name, "type", "bridge")
        stack.callback(_ip, "link", "del", made.name)
        _ip("addr", "add", f"{made.address(GATEWAY)}/24", "dev", made.name)
        _ip("link", "set", made.name, "up")
        for host, last in hosts.items():
            space, outside = f"{made.name}{host}", f"{made.name}v{last}"
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outside, "master", made.name, "up")
            _ip("-n", space, "addr", "add", f"{made.address(last)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")
            _ip("-n", space, "route", "add", "default", "via", made.address(GATEWAY))
        try:
            yield made
        finally:
            for host in list(made.processes):
                made.kill(host)


@contextmanager
def redis_at(address: str, port: int, folder: Path) -> Iterator[str]:
    """A Redis of the test's own, without persistence; its ``host:port``."""
    options = ["--bind", address, "--port", str(port), "--protected-mode", "no", "--save", "", "--dir", str(folder)]
    with _running(["redis-server", *options]):
        yield f"{address}:{port}"


@contextmanager
def forwarded(address: str, port: int, to: str) -> Iterator[None]:
    """Connections to ``address:port`` go to ``to``, which may listen on loopback only."""
    with _running(["socat", f"TCP-LISTEN:{port},bind={address},fork,reuseaddr", f"TCP:{to}"]):
        yield


@contextmanager
def _running(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    assert process.poll() is None, f"{command[0]} did not start"
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _clean(env: Mapping[str, str], home: Path) -> dict[str, str]:
    """Nothing of the test's own environment but where programs are."""
    folder = Path(sys.executable).parent
    found = {"HOME": str(home), "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HF_HUB_OFFLINE": "1"}
    found["PYTHONPATH"] = str(Path(__file__).parents[2])
    return found | dict(env)
