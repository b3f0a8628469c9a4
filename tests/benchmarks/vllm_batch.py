"""Tokens per second of vLLM under mixed batches: stock, and with Loom's slots, all sides in one run.

    python -m tests.benchmarks.vllm_batch [--rounds 5] [--new-tokens 64] [--requests 8]   (in the environment with vLLM)

The random Qwen2-VL of ``mixed_batch.py`` (hidden 512, 8 layers), 8 adapters, 8 requests or more at once:
  base      vLLM without LoRA: the limit
  idle      Loom's engine with slots, none in use
  lora      Loom's engine, 8 LoRA adapters (r=8 on every linear of the language model), one a request
  differing Loom's engine, 8 targets: LoRA, saved merger, lm_head, norms, embeddings, combinations
  stock     vLLM's own LoRA on the "lora" work
  peft      PEFT's mixed batch (`adapter_names`) on it
Rounds go through the sides in turn, and ratios are medians of each round's. Each engine has its
own processes; only one is busy at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_runtime.engine.vllm import names
from lora_runtime.engine.vllm.config import VllmConfig
from lora_runtime.engine.vllm.engine import VllmEngine
from tests.benchmarks.mixed_batch import ROWS, _load, prompts, run_engine, run_peft, targets, write_world

MAX_LEN = 512
MEMORY_SHARE = 0.3
"""Of the machine's memory, for each of three engines."""


def stock_engine(base: Path, requests: int, *, with_lora: bool) -> Any:
    options = {"enable_lora": True, "max_loras": ROWS + 1, "max_lora_rank": 8} if with_lora else {}
    arguments = names.AsyncEngineArgs(
        model=str(base), dtype="float32", max_model_len=MAX_LEN, max_num_seqs=requests, enforce_eager=True,
        gpu_memory_utilization=MEMORY_SHARE, enable_prefix_caching=False, limit_mm_per_prompt={"image": 1, "video": 0},
        disable_log_stats=True, async_scheduling=False, **options,
    )  # fmt: skip
    return names.AsyncLLM.from_engine_args(arguments)


async def run_stock(engine: Any, loras: list[Any], new_tokens: int, round_: int) -> float:
    parameters = names.SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    async def one(number: int) -> None:
        prompt = names.tokens_input(list(prompts()[number % ROWS]))
        async for _ in engine.generate(prompt, parameters, f"{round_}-{number}", lora_request=loras[number]):
            pass

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(len(loras))))
    return time.perf_counter() - start


async def measure(rounds: int, new_tokens: int, requests: int, root: Path) -> None:
    paths = write_world(root)
    repeat = requests // ROWS
    work = {name: asked * repeat for name, asked in targets(paths).items()}
    config = VllmConfig(
        base_path=str(root / "base"), dtype="float32", max_model_len=MAX_LEN, max_batch_size=requests, max_slots=16,
        prefix_caching=False, max_images=1,
    )  # fmt: skip
    loom = VllmEngine(config)
    await loom.start()
    base = await asyncio.to_thread(stock_engine, root / "base", requests, with_lora=False)
    stock = await asyncio.to_thread(stock_engine, root / "base", requests, with_lora=True)
    loras = [names.LoRARequest(f"lora{n}", n + 1, str(paths[f"lora{n}"])) for n in range(ROWS)] * repeat
    model = PeftModel.from_pretrained(_load(root), paths["lora0"], adapter_name="lora0").eval()
    for number in range(1, ROWS):
        model.load_adapter(str(paths[f"lora{number}"]), f"lora{number}")
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        taken = {
            "base": await run_stock(base, [None] * requests, new_tokens, number),
            "idle": await run_engine(loom, work["base"], new_tokens),
            "lora": await run_engine(loom, work["lora"], new_tokens),
            "differing": await run_engine(loom, work["differing"], new_tokens),
            "stock": await run_stock(stock, loras, new_tokens, number),
            "peft": run_peft(model, [f"lora{n}" for n in range(ROWS)] * repeat, new_tokens),
        }
        if number:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    await loom.close()
    base.shutdown()
    stock.shutdown()
    tokens = requests * new_tokens
    for name, taken in seconds.items():
        spread = f"{tokens / max(taken):.0f} to {tokens / min(taken):.0f}"
        print(f"{name:10} {tokens / statistics.median(taken):8.1f} tokens/s   ({spread})")
    for above, below, wanted in (
        ("idle", "base", 0.98), ("lora", "base", 0.85), ("differing", "base", 0.75), ("lora", "stock", 2.0),
        ("lora", "peft", 4.0),
    ):  # fmt: skip
        ratio = statistics.median(b / a for a, b in zip(seconds[above], seconds[below], strict=True))
        print(f"{above} / {below:10} {ratio:5.2f}   (wanted: {wanted})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=ROWS, help=f"at once, a multiple of {ROWS}")
    arguments = parser.parse_args()
    if arguments.requests % ROWS:
        parser.error(f"--requests must be a multiple of {ROWS}")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(arguments.rounds, arguments.new_tokens, arguments.requests, Path(folder)))


if __name__ == "__main__":
    main()
