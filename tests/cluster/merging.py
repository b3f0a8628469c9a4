"""A base with the real shapes of Qwen2-VL-2B and few layers, an adapter for it, and merges of the two on a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.job import JobRecipe
from lora_runtime.weights import AdapterWeights, LoraFactors, SavedModule
from serve.config import Settings
from serve.jobs.local import plan_here
from serve.registry.database import Database
from serve.registry.merges import ENDED, MergeJob, Merges
from tests.oracle.models import tiny_qwen2vl

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 1536, 8960, 12, 2, 151936
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_base(folder: Path, layers: int, shard_size: str) -> int:
    """Random weights in bf16; returns how many bytes of them there are."""
    config = tiny_qwen2vl().config
    text = config.text_config
    text.hidden_size, text.intermediate_size = HIDDEN, INNER
    text.num_hidden_layers, text.vocab_size = layers, VOCABULARY
    text.num_attention_heads, text.num_key_value_heads = HEADS, KV_HEADS
    text.layer_types = ["full_attention"] * layers
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.hidden_size = HIDDEN
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def build_adapter(folder: Path, base: Path, *, seed: int, rank: int = 16, norms: bool = False) -> Path:
    """LoRA on every linear layer of the language model, and with ``norms`` its last norm in full."""
    layout = BaseLayout.from_config(base)
    generator = torch.Generator().manual_seed(seed)
    lora = {
        name: LoraFactors(
            a=torch.randn(rank, leaf.in_features, generator=generator) / leaf.in_features**0.5,
            b=torch.randn(leaf.out_features, rank, generator=generator) * 0.02,
            scaling=0.5,
        )
        for name, leaf in layout.leaves.items()
        if name.rpartition(".")[2] in TARGETS
    }
    norm = "model.language_model.norm"
    saved = {norm: SavedModule(parameters={"weight": torch.rand(HIDDEN, generator=generator)})} if norms else {}
    write_adapter(AdapterWeights(version="", lora=lora, saved=saved), folder, layout, base_name="two-billion")
    return folder


def submit(settings: Settings, recipe: dict[str, Any]) -> MergeJob:
    """Plan a merge and have it done by whoever works on the registry's jobs."""
    asked = JobRecipe.model_validate(recipe)
    plan = plan_here(asked, settings, None)
    database = Database(settings.registry_url)
    job = Merges(database).create(asked.name, plan.model_dump(mode="json"), plan.id, actor="test")
    database.close()
    return job


def followed(
    settings: Settings, job: MergeJob, each: Callable[[dict[str, str]], None] = lambda _: None, seconds: float = 400
) -> MergeJob:
    """The job once it has ended; ``each`` is given its units' states every time they are looked at."""
    database = Database(settings.registry_url)
    merges = Merges(database)
    deadline = time.monotonic() + seconds
    while (job := merges.get(job.id)).state not in ENDED:
        assert time.monotonic() < deadline, [line.message for line in merges.log(job.id)]
        each({unit.unit: unit.state for unit in merges.units(job.id)})
        time.sleep(0.1)
    database.close()
    return job


def hashes(settings: Settings, name: str) -> dict[str, str]:
    """sha256 of each weight file of a checkpoint, as its manifest has it."""
    manifest = json.loads((Path(settings.merges_url) / name / "manifest.json").read_text())
    return {file: told["sha256"] for file, told in manifest["files"].items() if file.endswith(".safetensors")}
