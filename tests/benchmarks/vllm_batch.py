"""Tokens per second of vLLM under mixed batches: stock, and with Loom's slots, all sides in one run.

    python -m tests.benchmarks.vllm_batch [--rounds 5] [--new-tokens 64] [--requests 8] [--eager]
                                                            (in the environment with vLLM)

The random Qwen2-VL of ``mixed_batch.py`` (hidden 512, 8 layers), 8 adapters, 8 requests or more at once:
  base      vLLM without LoRA, run eagerly, as vLLM on a CPU runs whatever has LoRA
  compiled  vLLM without LoRA as it comes, its model compiled: the limit
  idle      Loom's engine with slots, none in use (its model compiled too; --eager: not)
  lora      Loom's engine, 8 LoRA adapters (r=8 on every linear of the language model), one a request
  differing Loom's engine, 8 targets: LoRA, saved merger, lm_head, norms, embeddings, combinations
  stock     vLLM's own LoRA on the "lora" work
  peft      PEFT's mixed batch (`adapter_names`) on it
Rounds go through the sides in turn, and ratios are medians of each round's. Each engine and PEFT have their
own processes; only one is busy at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_runtime.engine.vllm import names
from lora_runtime.engine.vllm.config import VllmConfig
from lora_runtime.engine.vllm.engine import VllmEngine
from tests.benchmarks.mixed_batch import ROWS, PeftProcess, prompts, run_engine, targets

MAX_LEN = 512
SPINNING_S = 1.5
"""Between sides: vLLM's processes spin for a second after their last step, and would take the next one's cores."""


def stock_engine(base: Path, requests: int, *, with_lora: bool = False, is_eager: bool = True) -> Any:
    options = {"enable_lora": True, "max_loras": ROWS + 1, "max_lora_rank": 8} if with_lora else {}
    arguments = names.AsyncEngineArgs(
        model=str(base), dtype="float32", max_model_len=MAX_LEN, max_num_seqs=requests, enforce_eager=is_eager,
        kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, limit_mm_per_prompt={"image": 1, "video": 0},
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


async def measure(
    rounds: int, new_tokens: int, requests: int, is_eager: bool, root: Path, peft_process: PeftProcess
) -> None:
    paths = peft_process.write_world(root)
    repeat = requests // ROWS
    work = {name: asked * repeat for name, asked in targets(paths).items()}
    config = VllmConfig(
        base_path=str(root / "base"), dtype="float32", max_model_len=MAX_LEN, max_batch_size=requests, max_slots=16,
        prefix_caching=False, max_images=1, compile=not is_eager,
    )  # fmt: skip
    loom = VllmEngine(config)
    await loom.start()
    base = await asyncio.to_thread(stock_engine, root / "base", requests)
    compiled = await asyncio.to_thread(stock_engine, root / "base", requests, is_eager=False)
    stock = await asyncio.to_thread(stock_engine, root / "base", requests, with_lora=True)
    loras = [names.LoRARequest(f"lora{n}", n + 1, str(paths[f"lora{n}"])) for n in range(ROWS)] * repeat
    of_peft = [f"lora{n}" for n in range(ROWS)] * repeat
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        sides: dict[str, Callable[[], Awaitable[float]]] = {
            "base": partial(run_stock, base, [None] * requests, new_tokens, number),
            "compiled": partial(run_stock, compiled, [None] * requests, new_tokens, number),
            "idle": partial(run_engine, loom, work["base"], new_tokens),
            "lora": partial(run_engine, loom, work["lora"], new_tokens),
            "differing": partial(run_engine, loom, work["differing"], new_tokens),
            "stock": partial(run_stock, stock, loras, new_tokens, number),
            "peft": partial(asyncio.to_thread, peft_process.run, root, of_peft, new_tokens),
        }
        taken = {}
        for name, side in sides.items():
            await asyncio.sleep(SPINNING_S)
            taken[name] = await side()
        if number:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    await loom.close()
    for engine in (base, compiled, stock):
        engine.shutdown()
    tokens = requests * new_tokens
    for name, taken in seconds.items():
        spread = f"{tokens / max(taken):.0f} to {tokens / min(taken):.0f}"
        print(f"{name:10} {tokens / statistics.median(taken):8.1f} tokens/s   ({spread})")
    for above, below, wanted in (
        ("idle", "base", 0.98), ("lora", "base", 0.85), ("differing", "base", 0.75), ("lora", "stock", 2.0),
        ("lora", "peft", 4.0), ("idle", "compiled", None), ("lora", "compiled", None), ("differing", "compiled", None),
        ("lora", "idle", None), ("differing", "idle", None),
    ):  # fmt: skip
        ratio = statistics.median(b / a for a, b in zip(seconds[above], seconds[below], strict=True))
        print(f"{above + ' / ' + below:22} {ratio:5.2f}" + (f"   (wanted: {wanted})" if wanted else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=ROWS, help=f"at once, a multiple of {ROWS}")
    parser.add_argument("--eager", action="store_true", help="Loom's model is not compiled either")
    arguments = parser.parse_args()
    if arguments.requests % ROWS:
        parser.error(f"--requests must be a multiple of {ROWS}")
    with tempfile.TemporaryDirectory() as folder, PeftProcess(torch.get_num_threads()) as peft_process:
        sizes = arguments.rounds, arguments.new_tokens, arguments.requests
        asyncio.run(measure(*sizes, arguments.eager, Path(folder), peft_process))


if __name__ == "__main__":
    main()
