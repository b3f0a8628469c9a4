"""What one busy adapter does to the others: the worst quiet tenant's p99, alone and beside a flood.

    python -m tests.benchmarks.fairness [--seconds 20] [--flood 64]

The demo service, one replica. Six quiet clients, each on its own adapter, ask for 16 tokens and pause a little; then
the same while a flood of clients asks without a pause, for one other adapter and then for all combinations of a few.
Printed: each side's rates and p99s, and how many requests were refused. Without turns, a quiet request would wait
behind the whole flood: its p99 says how long that is. Then, without a service, what one turn costs while a queue's
places are all taken: by one caller's adapters, and by callers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from serve.fairness import FairQueue
from tests.benchmarks.many_adapters import PROMPT, TOKENS, percentile, write_adapters
from tests.served import Served, served

QUIET = 6
SPREAD = 4
"""Adapters that are combined in the second flood."""
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
        worst = max((percentile(found, 0.99) for found in self.latencies.values()), default=float("nan"))
        print(f"{what:32} {total / seconds:6.1f} answers/s   worst p99 {worst:.3f} s   refused {self.num_refused}")


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


async def turn_s(num_waiting: int, num_turns: int, *, as_callers: bool) -> float:
    """Seconds from one who leaves to the next who is inside, with ``num_waiting`` callers or adapters that wait."""
    queue = FairQueue(8, num_waiting)

    async def visit(number: int) -> None:
        for _ in range(num_turns // num_waiting):
            caller, adapters = (str(number), []) if as_callers else ("", [str(number)])
            async with queue.turn(caller, adapters):
                await asyncio.sleep(0)

    begun = time.perf_counter()
    await asyncio.gather(*(visit(number) for number in range(num_waiting)))
    return (time.perf_counter() - begun) / num_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--flood", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        root.mkdir()
        names = write_adapters(root, QUIET + SPREAD)
        quiet, hot = names[:QUIET], names[QUIET:]
        spread = ["+".join(some) for size in range(1, SPREAD + 1) for some in itertools.combinations(hot, size)]
        settings = {
            "engine": {"options": {"max_slots": QUIET + SPREAD, "max_batch_size": 8, "num_threads": 1}},
            "adapters": {"roots": [str(root)], "preload": {name: str(root / name) for name in names}},
        }
        with served(Path(folder), settings) as service:
            measured(service, quiet, hot, 2)
            alone, _ = measured(service, quiet, [], options.seconds / 2)
            alone.told("quiet, alone", options.seconds / 2)
            for what, asked in (("one adapter", hot[:1]), (f"{len(spread)} combinations", spread)):
                flood = [asked[number % len(asked)] for number in range(options.flood)]
                beside, flooding = measured(service, quiet, flood, options.seconds)
                beside.told(f"quiet, beside {what}", options.seconds)
                flooding.told("the flood", options.seconds)
    for waiting in (16, 128, 1024):
        one, other = (asyncio.run(turn_s(waiting, 20 * waiting, as_callers=callers)) for callers in (False, True))
        print(f"a turn among {waiting} adapters {one * 1e6:.0f} µs, among {waiting} callers {other * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
