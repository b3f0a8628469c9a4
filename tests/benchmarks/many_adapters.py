"""A thousand adapters on two replicas under zipf traffic, beside the same traffic on one adapter.

    python -m tests.benchmarks.many_adapters [--adapters 1000] [--seconds 25] [--clients 16]

The demo base; adapters are LoRA r=4 on its attention with random weights, registered over HTTP. Clients ask one after
another for 16 tokens, adapters drawn with probability ~ 1/rank. Printed: registration, requests a second of both
runs, slot hits, the worst adapter's p99 beside everyone's, and whether each adapter always gave the same answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from lora_runtime.layout import BaseLayout
from lora_runtime.zoo import paths
from serve.engine_telemetry import SAMPLE_S
from tests.metrics import scrape
from tests.served import METRICS_S, Served, served

TOKENS = 16
RANK = 4
PROMPT = "Which colour has the shape at the top left?"


def write_adapters(root: Path, count: int, base: Path = paths.BASE) -> list[str]:
    """Folders by name. Each differs from the base enough to change its answers."""
    leaves = BaseLayout.from_config(base).leaves
    targets = [name for name in leaves if re.search(r"language_model.*self_attn\.[qv]_proj$", name)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    config["base_model_name_or_path"] = paths.BASE_NAME
    names = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name in targets:
            out_features, in_features = leaves[name].parameters["weight"]
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) * 0.1
        folder = root / f"t{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        names.append(folder.name)
    return names


def register(service: Served, root: Path, names: list[str]) -> None:
    def one(name: str) -> None:
        body = {"name": name, "path": str(root / name)}
        httpx.post(f"{service.url}/v1/adapters", json=body, timeout=120).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, names))


class Traffic:
    """Requests of many clients, and what became of them."""

    def __init__(self, service: Served, clients: int, seed: int) -> None:
        self._service = service
        self._clients = clients
        self._seed = seed
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.answers: dict[str, set[str]] = defaultdict(set)
        self.refused: list[str] = []

    def run(self, names: list[str], seconds: float) -> float:
        """Requests a second, adapters drawn from ``names`` with probability ~ 1/rank."""
        weights = list(itertools.accumulate(1 / rank for rank in range(1, len(names) + 1)))
        until = time.monotonic() + seconds

        def client(number: int) -> int:
            dice = random.Random(f"{self._seed}/{number}")
            done = 0
            with httpx.Client(base_url=self._service.url, timeout=60) as http:
                while time.monotonic() < until:
                    (name,) = dice.choices(names, cum_weights=weights)
                    self._ask(http, name)
                    done += 1
            return done

        begun = time.monotonic()
        with ThreadPoolExecutor(self._clients) as pool:
            total = sum(pool.map(client, range(self._clients)))
        return total / (time.monotonic() - begun)

    def _ask(self, http: httpx.Client, name: str) -> None:
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        begun = time.monotonic()
        response = http.post("/v1/completions", json=body)
        self.latencies[name].append(time.monotonic() - begun)
        if response.status_code != 200:
            self.refused.append(f"{response.status_code} {response.text[:200]}")
        else:
            self.answers[name].add(response.json()["choices"][0]["text"])


def counters(service: Served) -> dict[str, float]:
    time.sleep(3 * METRICS_S + SAMPLE_S)  # until what was counted is there
    found = scrape(service.url)
    names = {name for name, _ in found.values if name.startswith("loom_engine_") and name.endswith("_total")}
    return {name.removeprefix("loom_engine_").removesuffix("_total"): found.total(name) for name in names}


def percentile(values: list[float], share: float) -> float:
    return (
        statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
        if len(values) > 1
        else values[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        root.mkdir()
        names = write_adapters(root, options.adapters)
        settings = {
            "engine": {"options": {"max_slots": options.slots, "max_batch_size": 16, "num_threads": 1}},
            "engines": {"replicas": 2, "num_cpus": 1},
            "adapters": {"roots": [str(root)], "preload": {}},
        }
        with served(Path(folder), settings) as service:
            begun = time.monotonic()
            register(service, root, names)
            took = time.monotonic() - begun
            print(f"registered {len(names)} adapters in {took:.1f} s ({took / len(names) * 1e3:.0f} ms each)")
            one, many = Traffic(service, options.clients, seed=0), Traffic(service, options.clients, seed=1)
            one.run(names[:1], 3)
            alone = Traffic(service, options.clients, seed=2)
            single = alone.run(names[:1], options.seconds / 2)
            before = counters(service)
            zipf = many.run(names, options.seconds)
            after = counters(service)
    report(one=alone, many=many, single=single, zipf=zipf, moved={k: after[k] - before.get(k, 0) for k in after})


def report(*, one: Traffic, many: Traffic, single: float, zipf: float, moved: dict[str, float]) -> None:
    everyone = [seconds for found in many.latencies.values() for seconds in found]
    often = {name: found for name, found in many.latencies.items() if len(found) >= 5}
    worst = max(often, key=lambda name: percentile(often[name], 0.99))
    print(f"one adapter   {single:7.1f} requests/s   p50 {percentile(one.latencies['t0'], 0.5):.3f} s   "
          f"p99 {percentile(one.latencies['t0'], 0.99):.3f} s")  # fmt: skip
    print(f"zipf          {zipf:7.1f} requests/s   p50 {percentile(everyone, 0.5):.3f} s   "
          f"p99 {percentile(everyone, 0.99):.3f} s   ({zipf / single:.2f} of one adapter's throughput)")  # fmt: skip
    print(f"worst adapter of {len(often)} asked 5 times or more: {worst}, p99 {percentile(often[worst], 0.99):.3f} s")
    print(f"adapters asked for: {len(many.latencies)}   refused or failed: {len(many.refused)} {many.refused[:3]}")
    wrong = [name for name, found in many.answers.items() if len(found) > 1]
    print(f"adapters whose answer changed: {len(wrong)}   distinct answers: "
          f"{len({text for found in many.answers.values() for text in found})}")  # fmt: skip
    hits, loads = moved.get("slot_hits", 0), moved.get("slot_loads", 0)
    print(f"slots: {hits:.0f} hits, {loads:.0f} loads: hit rate {hits / (hits + loads):.2f}")


if __name__ == "__main__":
    main()
