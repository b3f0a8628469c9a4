"""Merging an adapter into a base: here, by PEFT's merge_and_unload, by mergekit; and the copy that it at least is.

    python -m tests.benchmarks.merge_base [--layers 2] [--rounds 3] [--out-dir DIR] [--mergekit VENV/bin/mergekit-yaml]

A random Qwen2-VL of the 7B's widths with few layers, in bf16 and in shards of 500 MB, and an adapter of rank 16 on
every linear layer of its language model. Sides take turns, each in a process of its own: seconds from start to files on
disk, without importing, and the most memory it had. ``--out-dir``: on the disk in question, for all that is written.

- copy, hashed copy: one thread, with fsync. A merge must do at least the latter, since it says what it wrote.
- loom: one process, whose arithmetic has one thread and whose hashing and writing another.
- loom x2: shards spread over two such processes, which are there and have imported already, as a job on two cores has
  them. Their memory is added up.
- PEFT, mergekit: as many threads as there are cores.

mergekit wants other versions of libraries: it is not installed here, but run from where ``--mergekit`` says (``python
-m venv V``, ``V/bin/pip install torch mergekit``), and left out otherwise. It takes adapters as "model+adapter": it
loads the model, calls PEFT's merge_and_unload, saves that, and copies it to its output tensor by tensor. Version 0.1.5
looks for Qwen2-VL's number of layers where transformers 5 does not keep it, so it reads a configuration that says it
twice.

Each side begins with the base in the page cache, and with memory that the machine really has: on a virtual one, memory
that was not in use for a while is fetched from the host page by page when it is written to, which takes longer than the
copy. So each first writes a file of three times the base's size and deletes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("copy", "hashed copy", "loom", "loom x2", "PEFT", "mergekit")
CHUNK = 8 << 20
MERGEKIT = """
import json, os, sys, time
from pathlib import Path
from mergekit.scripts.run_yaml import main
begun = time.perf_counter()
try:
    main.main(sys.argv[1:], standalone_mode=False)
except SystemExit:
    pass
for file in Path(sys.argv[2]).iterdir():
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
seconds = time.perf_counter() - begun
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"seconds": seconds, "peak": int(status["VmHWM"].split()[0]) * 1024}))
"""


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


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "base").glob("*.safetensors"))


def settle(folder: Path, out: Path) -> None:
    """See the module's docstring: the base into the page cache, free memory into the machine."""
    size = 0
    for shard in shards_of(folder):
        with open(shard, "rb", buffering=0) as opened:
            while chunk := opened.read(CHUNK):
                size += len(chunk)
    ballast, zeros = out / "ballast", bytes(CHUNK)
    with open(ballast, "wb", buffering=0) as opened:
        for _ in range(3 * size // CHUNK):
            opened.write(zeros)
    ballast.unlink()


def synced(out: Path) -> None:
    for file in out.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def peak_bytes() -> int:
    """Not getrusage's: that maximum is the parent's until this process has more."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def copied(folder: Path, out: Path, *, hashed: bool) -> None:
    data = memoryview(bytearray(CHUNK))
    for shard in shards_of(folder):
        digest = hashlib.sha256()
        with open(shard, "rb", buffering=0) as source, open(out / shard.name, "wb", buffering=0) as target:
            while length := source.readinto(data):
                if hashed:
                    digest.update(data[:length])
                target.write(data[:length])
            os.fsync(target.fileno())


@cache
def opened_adapter(folder: Path) -> tuple[Any, Mapping[str, tuple[str, str]]]:
    """The changes, and what the base's tensors are."""
    from safetensors import safe_open

    from lora_runtime.checkpoint import read_adapter
    from lora_runtime.layout import BaseLayout
    from lora_runtime.merge.changes import AdapterChanges, check_all_land
    from lora_runtime.names import canonical

    changes = AdapterChanges(read_adapter(folder / "adapter", BaseLayout.from_config(folder / "base")))
    places = {}
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a mapping
                module, _, parameter = key.rpartition(".")
                places[key] = (canonical(module), parameter)
    check_all_land(changes.places, places.values())
    return changes, places


def merge_one(folder: Path, shard: Path, out: Path) -> tuple[int, int]:
    """The process that did it, and the most memory it had."""
    from lora_runtime.merge.shard import merge_shard

    changes, places = opened_adapter(folder)
    merge_shard(shard, out / shard.name, changes, places)
    return os.getpid(), peak_bytes()


def import_loom(folder: Path) -> None:
    import torch

    import lora_runtime.checkpoint
    import lora_runtime.merge.shard  # noqa: F401
    from lora_runtime.layout import BaseLayout

    BaseLayout.from_config(folder / "base")  # imports the model's code, as naming its class does for PEFT
    torch.set_num_threads(1)


def begin_worker(ready: Any, folder: Path) -> None:
    import_loom(folder)
    ready.wait()


def by_two_processes(folder: Path, out: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    with ProcessPoolExecutor(2, mp_context=context, initializer=begin_worker, initargs=(ready, folder)) as pool:
        for _ in range(2):
            pool.submit(os.getpid)  # each starts one
        ready.wait()
        settle(folder, out)
        begun = time.perf_counter()
        done = [pool.submit(merge_one, folder, shard, out) for shard in shards_of(folder)]
        peaks = dict(sorted(future.result() for future in done))  # of each process, its last and so its largest
        return {"seconds": time.perf_counter() - begun, "peak": sum(peaks.values())}


def by_mergekit(folder: Path, out: Path, command: Path) -> dict[str, float]:
    base, cached = folder / "for mergekit", folder / "mergekit's cache"
    base.mkdir(exist_ok=True)
    for file in (folder / "base").iterdir():
        if not (base / file.name).exists():
            (base / file.name).symlink_to(file)
    config = json.loads((folder / "base" / "config.json").read_text())
    (base / "config.json").unlink()
    num_layers = config["text_config"]["num_hidden_layers"]
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    model = {"model": {"model": {"path": str(base)}, "lora": {"path": str(folder / "adapter")}}}
    recipe = folder / "mergekit.yml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [model], "dtype": "bfloat16"}))
    cached.mkdir()
    settle(folder, out)
    try:
        done = subprocess.run(
            [
                *(str(command.parent / "python"), "-c", MERGEKIT, str(recipe), str(out / "model")),
                *("--lora-merge-cache", str(cached), "--no-copy-tokenizer", "--out-shard-size", "500M"),
            ],
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(cached)
    if done.returncode:
        raise SystemExit(f"mergekit failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_side(side: str, folder: Path, out: Path, mergekit: Path | None) -> dict[str, float]:
    """Seconds, once everything is imported, and the most memory."""
    if side == "loom x2":
        return by_two_processes(folder, out)
    if side == "mergekit":
        assert mergekit is not None
        return by_mergekit(folder, out, mergekit)
    if side in ("copy", "hashed copy"):
        settle(folder, out)
        begun = time.perf_counter()
        copied(folder, out, hashed=side == "hashed copy")
    elif side == "loom":
        import_loom(folder)
        settle(folder, out)
        begun = time.perf_counter()
        for shard in shards_of(folder):
            merge_one(folder, shard, out)
    else:
        import torch
        from peft import PeftModel
        from transformers import Qwen2VLForConditionalGeneration

        settle(folder, out)
        begun = time.perf_counter()
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(out, max_shard_size="500MB")
        synced(out)
    return {"seconds": time.perf_counter() - begun, "peak": peak_bytes()}


def measured(side: str, folder: Path, mergekit: Path | None) -> dict[str, float]:
    """One run of a side, in a process of its own."""
    out = folder / "out"
    out.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.benchmarks.merge_base", "--side", side, "--folder", str(folder)),
            *(("--mergekit", str(mergekit)) if mergekit else ()),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out-dir", type=Path, help="where to work; else where temporary files go")
    parser.add_argument("--mergekit", type=Path, help="the command mergekit-yaml, in a virtual environment of its own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.folder, options.folder / "out", options.mergekit)))
        return
    sides = list(options.sides)
    if "mergekit" in sides and not (options.mergekit and options.mergekit.exists()):
        print("mergekit is left out: --mergekit names no command that is there")
        sides.remove("mergekit")
    with tempfile.TemporaryDirectory(dir=options.out_dir) as name:
        folder = Path(name)
        build(folder, options.layers)
        size = sum(shard.stat().st_size for shard in shards_of(folder))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, runs in found.items():
                runs.append(measured(side, folder, options.mergekit))
    report(found, size, options.layers)


def report(found: Mapping[str, list[dict[str, float]]], size: int, layers: int) -> None:
    seconds = {side: median(run["seconds"] for run in runs) for side, runs in found.items()}
    peak = {side: max(run["peak"] for run in runs) for side, runs in found.items()}
    print(f"{size / 1e9:.2f} GB in bf16, {layers} layers of Qwen2-VL-7B's widths, rank 16 on every linear of them")
    for side, runs in found.items():
        ratios = ", ".join(
            f"{seconds[side] / seconds[other]:5.2f} x {other}" for other in ("copy", "hashed copy") if other in seconds
        )
        print(
            f"{side:12} {seconds[side]:6.2f} s (least {min(run['seconds'] for run in runs):5.2f})   "
            f"{size / seconds[side] / 1e9:5.2f} GB/s   peak {peak[side] / 1e9:5.2f} GB   {ratios}"
        )
    for other in ("PEFT", "mergekit"):
        for side in ("loom", "loom x2"):
            if {side, other} <= seconds.keys():
                print(
                    f"{other} / {side}: {seconds[other] / seconds[side]:.1f} in time, "
                    f"{peak[other] / peak[side]:.1f} in memory"
                )


if __name__ == "__main__":
    main()
