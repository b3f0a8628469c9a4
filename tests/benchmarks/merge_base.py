"""Merging an adapter into a base: here, by PEFT's merge_and_unload, and the copy that either must at least be.

    python -m tests.benchmarks.merge_base [--layers 2] [--rounds 3]

A random Qwen2-VL of the 7B's widths with few layers, in bf16 and in shards of 500 MB, and an adapter of rank 16 on
every linear layer of its language model. Each side runs in a process of its own, one thread of arithmetic, in turns:
seconds from start to files on disk (without importing), and the most memory it had. The files are in the page cache.
A hashed copy is what a merge must at least do, since it says what it wrote; a plain one is without the hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SIDES = ("copy", "hashed copy", "loom", "PEFT")
CHUNK = 8 << 20


def build(folder: Path, layers: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    from tests.oracle.models import tiny_qwen2vl

    config = tiny_qwen2vl().config
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 3584, 18944, layers
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 28, 4, ["full_attention"] * layers
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.hidden_size = 3584
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    targets = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapted.save_pretrained(folder / "adapter")


def copied(folder: Path, out: Path, *, hashed: bool) -> None:
    for shard in sorted((folder / "base").glob("*.safetensors")):
        digest = hashlib.sha256()
        with open(shard, "rb") as source, open(out / shard.name, "wb") as target:
            while chunk := source.read(CHUNK):
                if hashed:
                    digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())


def run_side(side: str, folder: Path, out: Path) -> float:
    """Seconds, once everything is imported."""
    if side in ("copy", "hashed copy"):
        begun = time.perf_counter()
        copied(folder, out, hashed=side == "hashed copy")
        return time.perf_counter() - begun
    import torch

    torch.set_num_threads(1)
    if side == "loom":
        from safetensors import safe_open

        from lora_runtime.checkpoint import read_adapter
        from lora_runtime.layout import BaseLayout
        from lora_runtime.merge.shard import check_all_land, merge_shard
        from lora_runtime.names import canonical

        begun = time.perf_counter()
        weights = read_adapter(folder / "adapter", BaseLayout.from_config(folder / "base"))
        shards, places = sorted((folder / "base").glob("*.safetensors")), {}
        for shard in shards:
            with safe_open(shard, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # not a mapping
                    module, _, parameter = key.rpartition(".")
                    places[key] = (canonical(module), parameter)
        check_all_land(weights, places.values())
        for shard in shards:
            merge_shard(shard, out / shard.name, weights, places)
        return time.perf_counter() - begun
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    begun = time.perf_counter()
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(out, max_shard_size="500MB")
    os.sync()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds = run_side(options.side, options.folder, options.out)
        # Not getrusage: its maximum is the parent's until this process has more.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, options.layers)
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, runs in found.items():
                out = folder / "out"
                out.mkdir()
                done = subprocess.run(
                    [
                        *(sys.executable, "-m", "tests.benchmarks.merge_base", "--side", side),
                        *("--folder", str(folder), "--out", str(out)),
                    ],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
                shutil.rmtree(out)
    seconds = {side: median(run["seconds"] for run in runs) for side, runs in found.items()}
    peak = {side: max(run["peak"] for run in runs) for side, runs in found.items()}
    print(
        f"{size / 1e9:.2f} GB in bf16, {options.layers} layers of Qwen2-VL-7B's widths, rank 16 on every linear of them"
    )
    for side in SIDES:
        plain, hashed = (seconds[side] / seconds[other] for other in ("copy", "hashed copy"))
        print(
            f"{side:12} {seconds[side]:7.2f} s   {size / seconds[side] / 1e9:5.2f} GB/s   "
            f"peak {peak[side] / 1e9:5.2f} GB   {plain:5.1f} x copy, {hashed:5.1f} x hashed copy"
        )
    print(f"PEFT / here: {seconds['PEFT'] / seconds['loom']:.1f} in time, {peak['PEFT'] / peak['loom']:.1f} in memory")


if __name__ == "__main__":
    main()
