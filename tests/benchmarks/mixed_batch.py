"""Tokens per second of a mixed batch, beside its limits, all sides in one run.

    python -m tests.benchmarks.mixed_batch [--rounds 5] [--new-tokens 64] [--threads 2]

A random Qwen2-VL (hidden 512, 8 layers), 8 requests at once:
  base      the same engine, no adapter: the limit of any mixed batch
  lora      8 LoRA adapters (r=8 on every linear of the language model), one a request
  differing 8 targets: LoRA, saved merger, saved lm_head, saved norms, embeddings, combinations
  peft      PEFT's own mixed batch on the "lora" work: `generate(adapter_names=[...])`
Rounds go through the sides in turn, so that a machine that changes speed changes it for all. PEFT has a process of
its own, as threads of two that compute in one process get into each other's way (``lora_runtime.engine.threads``).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_runtime.checkpoint import fingerprint
from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.engine.protocol import AdapterRef, Engine, GenerateRequest, Sampling, TokenPrompt
from tests.oracle.world import ALL_LM, _config, _randomise, _tokenizer

ROWS = 8
PROMPT_TOKENS = 32
Target = tuple[AdapterRef, ...]


def write_world(root: Path) -> dict[str, Path]:
    """The base and the adapters; returns folders by name."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(root / "base")
    Qwen2VLImageProcessorPil().save_pretrained(root / "base")
    config = _config(tokenizer, tie=False)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 8
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 8, 2, 8192
    text.layer_types = ["full_attention"] * 8
    text.rope_parameters["mrope_section"] = [16, 8, 8]
    config.vision_config.hidden_size = 512
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, fp32")
    model.save_pretrained(root / "base")
    options: dict[str, dict[str, Any]] = {
        f"lora{n}": {"r": 8, "target_modules": r".*language_model.*\.(" + "|".join(ALL_LM) + ")"} for n in range(ROWS)
    }
    some = r".*language_model.*\.(q_proj|v_proj)"
    for name, saved in (
        ("merger", ["merger"]), ("head", ["lm_head"]), ("norms", ["input_layernorm"]), ("words", ["embed_tokens"])
    ):  # fmt: skip
        options[name] = {"r": 8, "target_modules": some, "modules_to_save": saved}
    for seed, (name, fields) in enumerate(options.items()):
        wrapped = get_peft_model(_load(root), LoraConfig(**fields))
        _randomise([(n, p) for n, p in wrapped.named_parameters() if p.requires_grad and "lora" in n], seed)
        wrapped.save_pretrained(root / name, save_embedding_layers=False)
    return {name: root / name for name in options}


def _load(root: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(root / "base", dtype=torch.float32).eval()


def ref(path: Path, weight: float = 1.0) -> AdapterRef:
    return AdapterRef(version=fingerprint(path), path=str(path), name=path.name, weight=weight)


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 256, (PROMPT_TOKENS,), generator=generator).tolist()) for _ in range(ROWS)]


async def run_engine(engine: Engine, targets: list[Target], new_tokens: int) -> float:
    """Seconds until all rows are done."""
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    async def one(number: int) -> None:
        prompt = TokenPrompt(token_ids=prompts()[number % ROWS])
        request = GenerateRequest(request_id=str(number), prompt=prompt, adapters=targets[number], sampling=sampling)
        async for _ in engine.generate(request):
            pass

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(len(targets))))
    return time.perf_counter() - start


class PeftProcess:
    """PEFT's side, and whatever else computes beside an engine, in another process. Use as a context."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,))

    def __enter__(self) -> PeftProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write_world(self, root: Path) -> dict[str, Path]:
        return self._pool.submit(write_world, root).result()

    def run(self, root: Path, names: list[str], new_tokens: int) -> float:
        """Seconds until all rows are done."""
        return self._pool.submit(_run_loaded, root, tuple(names), new_tokens).result()


def _run_loaded(root: Path, names: tuple[str, ...], new_tokens: int) -> float:
    return run_peft(_loaded(root, tuple(sorted(set(names)))), list(names), new_tokens)


@cache
def _loaded(root: Path, names: tuple[str, ...]) -> Any:
    model = PeftModel.from_pretrained(_load(root), root / names[0], adapter_name=names[0]).eval()
    for name in names[1:]:
        model.load_adapter(str(root / name), name)
    return model


def run_peft(model: Any, names: list[str], new_tokens: int) -> float:
    ids = torch.tensor([prompts()[number % ROWS] for number in range(len(names))])
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    return time.perf_counter() - start


def targets(paths: dict[str, Path]) -> dict[str, list[Target]]:
    """What the rows of each side ask for."""
    return {
        "base": [()] * ROWS,
        "lora": [(ref(paths[f"lora{n}"]),) for n in range(ROWS)],
        "differing": [
            (ref(paths["lora0"]),), (ref(paths["merger"]),), (ref(paths["head"]),), (ref(paths["norms"]),),
            (ref(paths["words"]),), (), (ref(paths["lora0"], 0.7), ref(paths["lora1"], 0.3)),
            (ref(paths["head"], 0.5), ref(paths["norms"], -0.5)),
        ],
    }  # fmt: skip


async def measure(rounds: int, new_tokens: int, threads: int, root: Path, peft_process: PeftProcess) -> None:
    paths = peft_process.write_world(root)
    loras = [f"lora{n}" for n in range(ROWS)]
    sides = targets(paths)
    config = EmbeddedConfig(
        base_path=str(root / "base"), max_batch_size=ROWS, max_slots=16, max_model_len=512, num_threads=threads
    )
    engine = EmbeddedEngine(config)
    await engine.start()
    seconds: dict[str, list[float]] = {name: [] for name in [*sides, "peft"]}
    for number in range(rounds + 1):
        taken = {name: await run_engine(engine, asked, new_tokens) for name, asked in sides.items()}
        taken["peft"] = await asyncio.to_thread(peft_process.run, root, loras, new_tokens)
        if number:
            for name, value in taken.items():
                seconds[name].append(value)
    await engine.close()
    rate = {name: ROWS * new_tokens / statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        spread = f"{ROWS * new_tokens / max(taken):.0f} to {ROWS * new_tokens / min(taken):.0f}"
        print(f"{name:10} {rate[name]:8.1f} tokens/s   ({spread})")
    print(f"lora / base       {rate['lora'] / rate['base']:.2f}   (wanted: 0.75)")
    print(f"differing / base  {rate['differing'] / rate['base']:.2f}   (wanted: 0.75)")
    print(f"lora / peft       {rate['lora'] / rate['peft']:.2f}   (wanted: 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    print(
        f"torch {torch.__version__} ({arguments.threads} threads), transformers {transformers.__version__}, "
        f"peft {peft.__version__}, {platform.processor() or platform.machine()}; {ROWS} rows, "
        f"{PROMPT_TOKENS} + {arguments.new_tokens} tokens, {arguments.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder, PeftProcess(arguments.threads) as peft_process:
        asyncio.run(measure(arguments.rounds, arguments.new_tokens, arguments.threads, Path(folder), peft_process))


if __name__ == "__main__":
    main()
