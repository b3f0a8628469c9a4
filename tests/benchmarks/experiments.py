"""What an experiment costs a request: assignment alone, and whole requests with and without one.

    python -m tests.benchmarks.experiments [--seconds 10] [--clients 8]

First, in this process, the draw of one request (layer, gate and three arms) and all of what a gateway does for it,
beside what it does for a plain model name. Then a service on the fake engine, whose requests cost nothing but the
gateway: requests a second for an adapter's name and for an alias that an experiment owns, taken in turns in one run;
and feedback a second, each acknowledged when it is on disk (SQLite).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import httpx

from serve.assigner import Assigner, draw_of
from serve.experiments.assignment import Subject
from serve.experiments.definition import Allocation, Arm, Plan
from serve.experiments.records import Experiment, ModelAlias, Phase, State
from serve.registry.experiments import Snapshot
from serve.targets import Registered, resolve
from tests.fakes import write_fake_adapter
from tests.served import Served, served

ROUNDS = 6


def microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=20_000, repeat=5)) / 20_000 * 1e6


def in_process() -> None:
    now, version = datetime.now(UTC), "f" * 64
    registered = {name: Registered(name, version, {version: "/x"}, {"latest": version}) for name in "abc"}
    arms = tuple(Arm(name=name, target=f"{name}@{version}") for name in "abc")
    experiment = Experiment(
        **{"id": "exp_0123456789abcdef", "state": State.RUNNING, "created_at": now, "since": now},
        plan=Plan.model_validate({"name": "x", "alias": "x", "control": "a", "layer": {"name": "l", "share": 1}}),
        phase=Phase(number=1, drawn=1, allocation=Allocation(arms=arms), coverage=1.0, opened_at=now),
        layer=(0.0, 1.0),
    )
    snapshot = Snapshot(
        aliases={"x": ModelAlias(name="x", target=arms[0].target, moved_at=now)}, experiments={"x": experiment}
    )
    reloads: list[Callable[[], None]] = []
    assigner = Assigner(
        SimpleNamespace(snapshot=lambda: snapshot),  # type: ignore[arg-type]
        SimpleNamespace(registered=registered),  # type: ignore[arg-type]
        SimpleNamespace(add=reloads.append),  # type: ignore[arg-type]
        base_name="base",
        unit_secret="",
    )
    reloads[0]()
    draw, numbers = draw_of(experiment), itertools.count()
    subjects = [Subject(unit=f"user-{number}", request_id="r") for number in range(1000)]
    one = microseconds(lambda: draw.arm(subjects[next(numbers) % 1000]))
    whole = microseconds(lambda: assigner.assign("x", subjects[next(numbers) % 1000]))
    plain = microseconds(lambda: resolve("a", None, "base", registered))
    print(f"draw of layer, gate and 3 arms   {one:6.2f} us   (asked: < 20)")
    print(f"all of an assignment             {whole:6.2f} us")
    print(f"a plain model name, resolved     {plain:6.2f} us")


class Clients:
    """Several clients that ask without a pause."""

    def __init__(self, service: Served, count: int) -> None:
        self._url = service.url
        self._count = count
        self._users = itertools.count()
        self.issued: list[str] = []

    def asking(self, model: str, seconds: float) -> float:
        def ask(http: httpx.Client) -> None:
            body = {"model": model, "prompt": "hi", "max_tokens": 1, "user": f"u{next(self._users)}"}
            response = http.post("/v1/completions", json=body).raise_for_status()
            if "X-Variant" in response.headers:
                self.issued.append(response.headers["X-Request-Id"])

        return self._rate(ask, seconds)

    def reporting(self, seconds: float) -> float:
        def report(http: httpx.Client) -> None:
            body = {"request_id": self.issued.pop(), "metric": "solved", "value": True}
            http.post("/v1/feedback", json=body).raise_for_status()

        return self._rate(report, seconds)

    def _rate(self, call: Callable[[httpx.Client], None], seconds: float) -> float:
        stop, counts = threading.Event(), [0] * self._count

        def client(number: int) -> None:
            with httpx.Client(base_url=self._url, timeout=60) as http:
                while not stop.is_set():
                    call(http)
                    counts[number] += 1

        with ThreadPoolExecutor(self._count) as pool:
            done = [pool.submit(client, number) for number in range(self._count)]
            time.sleep(seconds)
            stop.set()
            for future in done:
                future.result()
        return sum(counts) / seconds


def over_http(seconds: float, clients: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        for name in ("old", "new"):
            write_fake_adapter(root / name, name=name)
        settings = {
            "base": {"name": "base"},
            "engine": {"kind": "fake"},
            "adapters": {"roots": [str(root)], "preload": {name: str(root / name) for name in ("old", "new")}},
        }
        with served(Path(folder), settings) as service:
            with httpx.Client(base_url=service.url, timeout=60) as http:
                definition = {
                    **{"name": "x", "alias": "model", "metrics": [{"name": "solved"}]},
                    "arms": [{"name": "a", "target": "old"}, {"name": "b", "target": "new"}],
                }
                http.post("/v1/experiments", json=definition).raise_for_status()
                http.post("/v1/experiments/x/run", json={}).raise_for_status()
            asking = Clients(service, clients)
            asking.asking("old", 2)
            rates: dict[str, list[float]] = {"old": [], "model": []}
            for _ in range(ROUNDS):
                for model, found in rates.items():
                    found.append(asking.asking(model, seconds / ROUNDS))
            reports = asking.reporting(min(seconds, len(asking.issued) / 1000))
    plain, tried = median(rates["old"]), median(rates["model"])
    print(f"requests, an adapter's name      {plain:6.0f} /s")
    print(f"requests, an experiment's alias  {tried:6.0f} /s   {tried / plain:.2f} of it")
    print(f"feedback, each on disk           {reports:6.0f} /s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    in_process()
    over_http(options.seconds, options.clients)


if __name__ == "__main__":
    main()
