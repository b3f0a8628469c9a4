"""Whether a running answer notices adapters that are registered, loaded and evicted beside it.

    python -m tests.benchmarks.load_under_traffic [--tokens 400] [--adapters 10] [--engine]

A service with two slots on the random Qwen2-VL of ``mixed_batch.py`` (31 M parameters). With ``--demo``, on the demo's
base, whose tokens take 5 ms, less than the pauses that several processes make on two cores. A stream runs on one
adapter, first with nothing beside it, then while ten others are registered over HTTP and asked once each, so that each
is read, loaded, and evicts another. Printed: the median and the longest time between two tokens of both streams.
Wanted: the longest at most twice the median. With ``--engine`` the same of the engine alone, in this process, loading
without a pause, twice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.engine.protocol import AdapterRef, GenerateRequest, Sampling, TextPrompt
from lora_runtime.folder import fingerprint
from lora_runtime.zoo import paths
from serve.replica import SWITCH_S
from tests.benchmarks.many_adapters import PROMPT, counters, write_adapters
from tests.benchmarks.mixed_batch import write_world
from tests.served import Served, served


def gaps(service: Served, model: str, tokens: int, begun: threading.Event | None = None) -> list[float]:
    """Seconds between the tokens of one stream, from its second on."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    times: list[tuple[float, int]] = []
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append((time.monotonic(), len(json.loads(line[6:])["choices"])))
                if begun is not None and len(times) == 20:
                    begun.set()
    moments = [moment for moment, _ in times[1:]]
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def trouble(service: Served, root: Path, names: list[str], began: threading.Event, stop: threading.Event) -> int:
    """Register, ask and remove adapters one after another until told to stop; returns how many."""
    began.wait(60)
    done = 0
    for name in itertools.cycle(names):
        if stop.is_set():
            return done
        body = {"name": name, "path": str(root / name)}
        httpx.post(f"{service.url}/v1/adapters", json=body, timeout=60).raise_for_status()
        ask = {"model": name, "prompt": "x", "max_tokens": 1}
        httpx.post(f"{service.url}/v1/completions", json=ask, timeout=60).raise_for_status()
        if done >= len(names):
            httpx.delete(f"{service.url}/v1/adapters/{name}", timeout=60).raise_for_status()
        done += 1
    return done


async def inside(base: Path, root: Path, names: list[str], tokens: int) -> None:
    """The same of the embedded engine alone, without processes and HTTP around it; nothing is kept in host memory."""
    engine = EmbeddedEngine(
        EmbeddedConfig(
            base_path=str(base), max_slots=2, max_batch_size=4, num_threads=1, max_model_len=1024, host_cache_bytes=1
        )
    )
    sys.setswitchinterval(SWITCH_S)
    await engine.start()
    refs = [AdapterRef(version=fingerprint(root / name), path=str(root / name), name=name) for name in names]

    async def stream(ref: AdapterRef, tokens: int) -> list[float]:
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        request = GenerateRequest(request_id="x", prompt=TextPrompt(text=PROMPT), adapters=(ref,), sampling=sampling)
        return [time.monotonic() async for _ in engine.generate(request)][1:]

    async def others() -> None:
        for ref in itertools.cycle(refs[1:]):
            await stream(ref, 1)

    await stream(refs[0], 20)
    for name in ("quiet", "busy ") * 2:
        loads = engine.stats().counters["slot_loads"]
        beside = asyncio.create_task(others()) if name == "busy " else None
        moments = await stream(refs[0], tokens)
        if beside is not None:
            beside.cancel()
        told(name, [later - earlier for earlier, later in itertools.pairwise(moments)])
        print(f"       beside it: {engine.stats().counters['slot_loads'] - loads:.0f} loads")
    await engine.close()


def told(name: str, found: list[float]) -> None:
    median, longest = statistics.median(found), max(found)
    over = sum(gap > 2 * median for gap in found)
    print(f"{name}  median {median * 1e3:6.2f} ms   longest {longest * 1e3:6.2f} ms ({longest / median:4.1f} times)   "
          f"over twice the median: {over} of {len(found)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--engine", action="store_true", help="The engine alone, in this process.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        root.mkdir()
        base = paths.BASE if options.demo else Path(folder) / "base"
        if not options.demo:
            write_world(Path(folder))
        names = write_adapters(root, options.adapters + 1, base)
        if options.engine:
            asyncio.run(inside(base, root, names, options.tokens))
            return
        settings = {
            "base": {"path": str(base)},
            "engine": {"options": {"max_slots": 2, "max_batch_size": 4, "num_threads": 1, "max_model_len": 1024}},
            "adapters": {"roots": [str(root)], "preload": {names[0]: str(root / names[0])}},
        }
        with served(Path(folder), settings) as service:
            gaps(service, names[0], 20)
            quiet = gaps(service, names[0], options.tokens)
            begun, stop, done = threading.Event(), threading.Event(), []
            worker = threading.Thread(
                target=lambda: done.append(trouble(service, root, names[1:], begun, stop)), daemon=True
            )
            worker.start()
            before = counters(service)
            busy = gaps(service, names[0], options.tokens, begun)
            stop.set()
            worker.join(60)
            after = counters(service)
    told("quiet", quiet)
    told("busy ", busy)
    loads, evictions = (after[name] - before.get(name, 0) for name in ("slot_loads", "slot_evictions"))
    print(f"beside it: {done[0]} adapters registered and asked, {loads:.0f} loads, {evictions:.0f} evictions")


if __name__ == "__main__":
    main()
