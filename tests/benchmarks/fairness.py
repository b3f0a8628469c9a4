"""What one busy adapter does to the others: the worst quiet tenant's p99, alone and beside a flood.

    python -m tests.benchmarks.fairness [--seconds 20] [--flood 64]

The demo service, one replica. Six quiet clients, each on its own adapter, ask for 16 tokens and pause a little; then
the same while a flood of clients asks one other adapter without a pause. Printed: each side's rates and p99s, and how
many of the flood's requests were refused. Without turns, a quiet request would wait behind the whole flood: the last
line says how long that is.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.benchmarks.many_adapters import PROMPT, TOKENS, percentile, write_adapters
from tests.served import Served, served

QUIET = 6
PAUSE_S = 0.1


class Side:
    """Requests of some clients: latencies by adapter, and how many were refused."""

    def __init__(self, service: Served) -> None:
        self._service = service
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.num_refused = 0

    def ask(self, http: httpx.Client, name: str) -> None:
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        begun = time.monotonic()
        response = http.post(f"{self._service.url}/v1/completions", json=body)
        if response.status_code == 200:
            self.latencies[name].append(time.monotonic() - begun)
        else:
            assert response.status_code == 429, response.text
            self.num_refused += 1
            time.sleep(0.05)

    def run(self, names: list[str], stop: threading.Event, pause_s: float) -> None:
        def client(name: str) -> None:
            with httpx.Client(timeout=120) as http:
                while not stop.is_set():
                    self.ask(http, name)
                    time.sleep(pause_s)

        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(client, names))

    def told(self, what: str, seconds: float) -> None:
        total = sum(map(len, self.latencies.values()))
        worst = max(percentile(found, 0.99) for found in self.latencies.values())
        print(f"{what:22} {total / seconds:6.1f} answers/s   worst p99 {worst:.3f} s   refused {self.num_refused}")


def measured(service: Served, quiet: list[str], flood: list[str], seconds: float) -> tuple[Side, Side]:
    one, other, stop = Side(service), Side(service), threading.Event()
    threads = [threading.Thread(target=one.run, args=(quiet, stop, PAUSE_S))]
    if flood:
        threads.append(threading.Thread(target=other.run, args=(flood, stop, 0.0)))
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return one, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--flood", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        root.mkdir()
        hot, *quiet = write_adapters(root, QUIET + 1)
        settings = {
            "engine": {"options": {"max_slots": 8, "max_batch_size": 8, "num_threads": 1}},
            "adapters": {"roots": [str(root)], "preload": {name: str(root / name) for name in (hot, *quiet)}},
        }
        with served(Path(folder), settings) as service:
            measured(service, quiet, [hot], 2)
            alone, _ = measured(service, quiet, [], options.seconds / 2)
            beside, flood = measured(service, quiet, [hot] * options.flood, options.seconds)
    alone.told("quiet, alone", options.seconds / 2)
    beside.told("quiet, beside a flood", options.seconds)
    flood.told("the flood", options.seconds)


if __name__ == "__main__":
    main()
