"""Building the zoo from a seed: the base first, then each adapter with PEFT on the base as it was stored."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.dense import add_into
from lora_runtime.layout import BaseLayout
from lora_runtime.zoo import recipes
from lora_runtime.zoo.base import make_model, make_processor, make_tokenizer, save_around
from lora_runtime.zoo.batches import Batcher
from lora_runtime.zoo.classifier import with_head
from lora_runtime.zoo.paths import BASE_NAME
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER, WARMTH_LABELS
from lora_runtime.zoo.train import Report, train

CLASSIFIER = "warmth"


def build(out: Path, *, seed: int = 0, report: Report = lambda stage, step, steps: None) -> None:
    """Train and write ``out/base`` and ``out/adapters/<name>``; what was there is replaced at the end.

    Takes up to 15 minutes on two cores. Equal seeds give equal files on equal machines.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".zoo-", dir=out.parent))
    try:
        batcher = build_base(staged / "base", seed=seed, report=report)
        for name in recipes.RECIPES:
            build_adapter(staged / "base", staged / "adapters" / name, name, batcher, seed=seed, report=report)
        if out.exists():
            shutil.rmtree(out)
        staged.chmod(0o755)
        staged.rename(out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def build_base(path: Path, *, seed: int, report: Report) -> Batcher:
    """Train the base and store it in bfloat16."""
    torch.manual_seed(seed)
    tokenizer, processor = make_tokenizer(), make_processor()
    model: Any = make_model(tokenizer)
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:  # transformers' 0.02 is for wider models
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    batcher = Batcher(tokenizer, processor)
    train(model, batcher, recipes.BASE, stage="base", seed=seed, report=report)
    model.to(torch.bfloat16).save_pretrained(path)
    save_around(path, tokenizer, processor)
    return batcher


def build_adapter(base: Path, path: Path, name: str, batcher: Batcher, *, seed: int, report: Report) -> None:
    """Train one adapter with PEFT on the stored base, and write it as PEFT does, without the readme."""
    torch.manual_seed(seed + 1)
    recipe = recipes.RECIPES[name]
    loaded = _load(base)
    before_step = _alternation(loaded, base, path.parent / recipe.beside) if recipe.beside else _nothing
    model: Any = with_head(loaded, WARMTH_LABELS) if name == CLASSIFIER else loaded
    wrapped = get_peft_model(model, LoraConfig(**recipe.lora))
    train(
        wrapped,
        batcher,
        recipe.schedule(TASK_OF_ADAPTER[name]),
        stage=name,
        seed=seed,
        report=report,
        labels=name == CLASSIFIER,
        before_step=before_step,
    )
    before_step(0)
    wrapped.save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)
    _make_portable(path / "adapter_config.json")
    if name == CLASSIFIER:
        labels = {str(number): label for number, label in enumerate(WARMTH_LABELS)}
        (path / "config.json").write_text(json.dumps({"id2label": labels}, indent=2) + "\n")


def _load(base: Path) -> Any:
    # The fused attention's backward pass in bfloat16 is several times slower on CPUs than plain matrix products.
    return Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def _nothing(step: int) -> None:
    """Every step is alike."""


def _alternation(model: Any, base: Path, companion: Path) -> Callable[[int], None]:
    """Give ``model`` the base's weights in even steps, and base + ``companion`` in odd ones."""
    other = _load(base)
    adapter = read_adapter(companion, BaseLayout.from_model(other))
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    add_into(other, combine([(adapter, 1.0)], lambda leaf, parameter: own[f"{leaf}.{parameter}"]))
    pairs = [
        (parameter, own[name], changed.data)
        for (name, parameter), changed in zip(model.named_parameters(), other.parameters(), strict=True)
    ]

    def before_step(step: int) -> None:
        for parameter, plain, with_companion in pairs:
            parameter.data = with_companion if step % 2 else plain

    return before_step


def _make_portable(file: Path) -> None:
    """The base by name, not by the path it had while training; lists in one order."""
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    for key, value in config.items():
        if key in ("target_modules", "modules_to_save") and isinstance(value, list):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
