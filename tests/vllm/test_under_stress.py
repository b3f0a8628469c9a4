"""Random work for a while: every answer equals the oracle's, bad adapters hurt nobody else, nothing is lost.

LOOM_STRESS_S=60 make test-vllm ARGS="-k stress"
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from importlib.util import find_spec

import psutil
import pytest
from safetensors.torch import load_file, save_file

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import LoomError, Overloaded
from tests.oracle.answers import PROMPTS
from tests.oracle.asking import answer, close
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
SECONDS = float(os.environ.get("LOOM_STRESS_S", "15"))
GROWTH_BYTES = 64 << 20
SAVED_BYTES = 1_700_000
"""More than any one target needs, and less than four at once: adapters leave for want of memory too."""


@pytest.fixture(scope="module")
def bad_adapters(world, tmp_path_factory) -> list[AdapterRef]:
    """Folders as they come: a tensor of another shape, a tensor missing, NaN, no file, other content than said."""
    root = tmp_path_factory.mktemp("bad")
    found = []
    for name in ("shape", "missing", "nan", "nowhere", "changed"):
        shutil.copytree(world.adapters["plain"], root / name)
        file = root / name / "adapter_model.safetensors"
        tensors = load_file(file)
        key = sorted(tensors)[0]
        if name == "shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        elif name == "missing":
            del tensors[key]
        elif name == "nan":
            tensors[key][0] = float("nan")
        elif name == "changed":
            tensors[key] *= 2
        save_file(tensors, file, metadata={"format": "pt"})
        if name == "nowhere":
            file.unlink()
        found.append(AdapterRef(version=f"{name}-as-registered", path=str(root / name), name=name))
    return found


def resident_bytes() -> int:
    """Of this process and all it started."""
    own = psutil.Process()
    return sum(p.memory_info().rss for p in [own, *own.children(recursive=True)])


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
async def test_stress(world, oracle, bad_adapters, is_compiled):
    if is_compiled and shutil.which("g++") is None:
        pytest.skip("compiling takes a C++ compiler, and g++ is not here")
    async with running(world, compile=is_compiled, saved_bytes=SAVED_BYTES) as engine:
        await work_at_random(engine, world, oracle, bad_adapters)


async def work_at_random(engine, world, oracle, bad_adapters):
    chosen = random.Random(0)
    targets = list(oracle)
    served = refused = cancelled = crowded = 0
    end = time.monotonic() + SECONDS
    memory_at_half = 0

    async def one() -> None:
        nonlocal served, refused, cancelled, crowded
        kind = chosen.random()
        number = chosen.randrange(len(PROMPTS))
        if kind < 0.1:
            with pytest.raises(LoomError):
                await answer(engine, PROMPTS[number], (chosen.choice(bad_adapters),))
            refused += 1
            return
        target = chosen.choice(targets)
        asking = asyncio.create_task(
            answer(engine, PROMPTS[number], tuple(world.ref(name, weight) for name, weight in target))
        )
        if kind < 0.3:
            await asyncio.sleep(chosen.random() * 0.3)
            asking.cancel()
            await asyncio.wait([asking])
            cancelled += 1
            return
        try:
            close(await asking, oracle[target][number], f"{target} on prompt {number}", 1e-3)
            served += 1
        except Overloaded:  # others held the memory for longer than is waited
            crowded += 1

    async def worker() -> None:
        while time.monotonic() < end:
            await one()

    async def watch() -> None:
        nonlocal memory_at_half
        await asyncio.sleep(SECONDS / 2)
        memory_at_half = resident_bytes()

    await asyncio.gather(watch(), *(worker() for _ in range(10)))
    print(f"{served} served, {cancelled} cancelled, {refused} refused, {crowded} told to come again")
    print(engine.stats().counters)
    assert min(served, refused, cancelled) > 5 and crowded < served / 20
    grown = resident_bytes() - memory_at_half
    print(f"grown by {grown / 2**20:.0f} MiB in the second half")
    assert grown < GROWTH_BYTES
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_slots, stats.kv_used_tokens) == (0, 0, 0, 0)
    close(await answer(engine, PROMPTS[1]), oracle[()][1], "the base afterwards", 1e-3)
