"""Everything at once on a real service, for a while: python -m tests.soak.mixed_load --seconds 600 --database sqlite

Answers are compared with those that the same service gave to each question alone, every change that was acknowledged
is looked for at the end, and each process's memory is watched. Ends with 1 if anything was wrong, lost, hung or failed,
or if a process kept growing or was replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai

from tests.served import Served, served
from tests.soak import experimenting
from tests.soak.asking import Asker, watches
from tests.soak.client import DEADLINE_S, Client
from tests.soak.experimenting import Users
from tests.soak.ledger import Ledger
from tests.soak.memory import Memory
from tests.soak.tally import Tally
from tests.soak.verify import RECIPE, Database, verify
from tests.soak.world import TARGETS, Question, copies, measure, questions
from tests.soak.writing import Writer
from tests.unit.serve.conftest import new_database

NUM_WRITERS = 2
MIN_CLEAR = 4
ENDING_S = 3 * DEADLINE_S
COPIES_EACH = 6
"""Of each content. Few, so that content is deleted, collected and registered again, by several writers."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load; starting and checking come on top")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--url", help="of an empty database; a new one is made if not given")
    parser.add_argument("--seed", type=int, default=0, help="what clients choose depends on it")
    parser.add_argument("--pictures", type=int, default=2, help="of each task that are asked about")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="loom-soak-") as name,
        _database(given.database, given.url, Path(name)) as url,
        served(Path(name), _settings(Path(name), url)) as service,
    ):
        return asyncio.run(_soak(service, url, given))


def _settings(folder: Path, url: str) -> dict[str, Any]:
    """The demo on the embedded engine, with slots and host memory for fewer adapters than are asked for, and garbage
    that is collected as soon as the configuration allows."""
    return {
        "engine": {
            "kind": "embedded",
            "options": {"max_slots": 5, "max_batch_size": 8, "max_images": 8, "host_cache_bytes": 8 << 20},
        },
        "server": {"request_timeout_s": DEADLINE_S / 2},
        "registry": {"url": url},
        "adapters": {"roots": [str(folder / "copies")]},
        "store": {"grace_s": DEADLINE_S, "collect_every_s": 10.0},
        "experiments": {"look_every_s": 5.0},
    }


@contextmanager
def _database(kind: str, url: str | None, folder: Path) -> Iterator[str]:
    if url is not None:
        yield url
    elif kind == "sqlite":
        yield f"sqlite:///{folder / 'state' / 'registry.db'}"
    else:
        with new_database() as made:
            yield made


async def _soak(service: Served, url: str, given: argparse.Namespace) -> int:
    asked = questions(given.pictures)
    begun = time.monotonic()
    expected = await asyncio.to_thread(measure, service.url, asked)
    print(
        f"{len(asked)} questions, {len(TARGETS)} targets: {len(expected.answers)} of {len(asked) * len(TARGETS)} "
        f"answers are clear, asked alone in {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    alike, num_clear = expected.alike(asked), len(expected.clear(TARGETS, asked))
    if alike or num_clear < MIN_CLEAR:
        print(f"{num_clear} questions are clear to all targets; no question tells these apart: {alike}")
        return 1
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    async with (
        httpx.AsyncClient(base_url=service.url, timeout=None, limits=limits) as http,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=None) as api,
    ):
        client, memory = Client(http, api, expected, Ledger(), Tally()), Memory(service)
        await _load(client, memory, asked, url, given)
    return _report(client.tally, memory, given.seconds)


async def _load(client: Client, memory: Memory, asked: list[Question], url: str, given: argparse.Namespace) -> None:
    """Load for the given time, and the check of what is there afterwards."""
    found = await asyncio.to_thread(copies, memory.served.log.parent / "copies", COPIES_EACH)
    await experimenting.begin(client)
    merge = await client.send("set up", "POST", "/v1/merges", due=(202,), json=RECIPE)
    if merge is None:
        raise RuntimeError(client.tally.table())
    random = Random(given.seed)
    askers = [Asker(client, asked, Random(random.random())) for _ in range(4)]
    writers = [Writer(client, asked, found, Random(random.random()), number) for number in range(NUM_WRITERS)]
    users = Users(client, asked, Random(random.random()))
    clients = [
        *(asker.whole() for asker in askers[:2]),
        *(asker.streams() for asker in askers[:2]),
        askers[2].leaves(),
        askers[3].bad(),
        askers[3].classes(),
        *(writer.writes() for writer in writers),
        *(users.visits() for _ in range(2)),
        watches(client, Random(random.random())),
    ]
    watching = asyncio.create_task(memory.watch())
    await _run(client, [asyncio.create_task(one) for one in clients], given.seconds)
    watching.cancel()
    given_up = {name for writer in writers for name in writer.is_lost}
    await verify(client, Database(url), users, given_up, merge.json()["id"])
    await asyncio.to_thread(memory.sample)


async def _run(client: Client, clients: list[asyncio.Task[None]], seconds: float) -> None:
    """Let clients go on for so long, and end what they have begun. Raises what one of them raised, which is a mistake
    of this program."""
    await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    client.ending.set()
    ended, going = await asyncio.wait(clients, timeout=ENDING_S)
    for task in going:
        client.tally.find("hung", "clients", f"{task.get_coro()} did not end in {ENDING_S:g} s")
        task.cancel()
    for task in ended:
        task.result()


def _report(tally: Tally, memory: Memory, seconds: float) -> int:
    num_done = sum(map(len, tally.seconds.values()))
    print(f"\n{seconds:g} s of load, {num_done / seconds:.1f} requests/s. A request hangs after {DEADLINE_S:g} s.\n")
    print(tally.table(), "", memory.table(), "", sep="\n")
    problems = memory.problems()
    print(*problems or ["Memory is within its bounds."], sep="\n")
    print("FOUND PROBLEMS" if problems or tally.num_found else "Nothing was wrong, lost, hung or failed.")
    return 1 if problems or tally.num_found else 0


if __name__ == "__main__":
    sys.exit(main())
