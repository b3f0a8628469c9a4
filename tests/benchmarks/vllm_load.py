"""How long a running answer waits while large adapters are loaded beside it.

    python -m tests.benchmarks.vllm_load [--loads 8]          (in the environment with vLLM)

One request decodes on the base of ``mixed_batch.py`` while adapters that save the whole language model (about
90 MB each) take turns in two slots. Printed: the longest pause between two tokens with nothing else to do, the
longest during the loads, how long a request for such an adapter waited for its first token, and how long reading
one takes: what the running answer would wait for if files were read between steps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from lora_runtime.checkpoint import fingerprint, read_adapter
from lora_runtime.engine.protocol import GenerateRequest, Sampling, TokenPrompt
from lora_runtime.engine.vllm.config import VllmConfig
from lora_runtime.engine.vllm.engine import VllmEngine
from lora_runtime.layout import BaseLayout
from tests.benchmarks.mixed_batch import Target, _load, prompts, ref, write_world
from tests.oracle.world import _randomise


def write_large(root: Path, count: int) -> list[Path]:
    made = []
    for seed in range(count):
        layers = [f"language_model.layers.{number}" for number in range(8)]
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=layers)
        model = get_peft_model(_load(root), config)
        _randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad], seed)
        model.save_pretrained(root / f"large{seed}", save_embedding_layers=False)
        made.append(root / f"large{seed}")
    return made


async def arrivals(engine: VllmEngine, target: Target, count: int) -> list[float]:
    """When each token of one answer came."""
    sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
    request = GenerateRequest(
        request_id="a", prompt=TokenPrompt(token_ids=prompts()[0]), adapters=target, sampling=sampling
    )
    return [time.perf_counter() async for event in engine.generate(request) if event.tokens]


def longest_pause(times: list[float]) -> float:
    return 1e3 * max(later - earlier for earlier, later in pairwise(times))


async def measure(loads: int, root: Path) -> None:
    write_world(root)
    large = write_large(root, 3)
    refs = [ref(path) for path in large]  # hashes each file, which a registry has done when an adapter is asked for
    config = VllmConfig(
        base_path=str(root / "base"), dtype="float32", max_model_len=2048, max_batch_size=4, max_slots=2,
        prefix_caching=False, max_images=1,
    )  # fmt: skip
    engine = VllmEngine(config)
    await engine.start()
    await arrivals(engine, (), 50)
    quiet = longest_pause(await arrivals(engine, (), 200))
    running = asyncio.create_task(arrivals(engine, (), 2000))
    waited = []
    for number in range(loads):
        start = time.perf_counter()
        (first,) = await arrivals(engine, (refs[number % len(refs)],), 1)
        waited.append(1e3 * (first - start))
    end = time.perf_counter()
    during = longest_pause([at for at in await running if at < end])
    await engine.close()
    layout = BaseLayout.from_config(root / "base")
    start = time.perf_counter()
    read_adapter(large[0], layout).cloned()
    fingerprint(large[0])
    size = os.path.getsize(large[0] / "adapter_model.safetensors") / 1e6
    print(f"longest pause, nothing else to do       {quiet:8.1f} ms")
    print(f"longest pause during {loads} loads of {size:.0f} MB  {during:8.1f} ms")
    print(f"first token on such an adapter, at most {max(waited):8.1f} ms")
    print(f"reading one                             {1e3 * (time.perf_counter() - start):8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(arguments.loads, Path(folder)))


if __name__ == "__main__":
    main()
