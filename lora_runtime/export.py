"""Writing :class:`AdapterWeights` as a folder that PEFT loads to the same function."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_runtime.errors import Conflict, UnsupportedAdapter
from lora_runtime.folder import CONFIG_NAME, TENSORS_NAME
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights

PREFIX = "base_model.model."


def write_adapter(weights: AdapterWeights, path: str | Path, layout: BaseLayout, *, base_name: str) -> None:
    """Write a PEFT folder at ``path``, staged beside it and renamed: readers see all of it or nothing.

    Scalings are folded into B (alpha = r). Raises Conflict where ``path`` exists, UnsupportedAdapter for what
    PEFT's format cannot say: a LoRA inside a module that is saved too.
    """
    target = Path(path)
    if target.exists():
        raise Conflict(f"'{target.name}' exists already; choose another folder or remove it.")
    _check_expressible(weights, layout)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(_tensors(weights, layout), staged / TENSORS_NAME, metadata={"format": "pt"})
        (staged / CONFIG_NAME).write_text(json.dumps(_config(weights, layout, base_name), indent=2))
        if labels := _labels(weights):
            (staged / "config.json").write_text(json.dumps({"id2label": labels}, indent=2))
        staged.chmod(0o755)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _check_expressible(weights: AdapterWeights, layout: BaseLayout) -> None:
    partial = sorted(n for n, m in weights.saved.items() if set(m.parameters) != set(layout.leaves[n].parameters))
    if partial:
        raise UnsupportedAdapter(
            f"PEFT saves modules whole; of {', '.join(partial[:4])} only some parameters are changed. "
            "Serve the combination at run time, or merge it into a checkpoint.",
            modules=partial,
        )
    both = sorted((set(weights.lora) | set(weights.token_rows)) & set(weights.saved))
    if both:
        raise UnsupportedAdapter(
            f"PEFT cannot hold low-rank factors and full weights of one module ({', '.join(both[:4])}). "
            "Serve the combination at run time, or merge it into a checkpoint.",
            modules=both,
        )


def _tensors(weights: AdapterWeights, layout: BaseLayout) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, f in weights.lora.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if f.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        shape = layout.leaves[name].parameters["weight"]
        kernel = shape[1:] if layout.leaves[name].kind == "conv" else ()
        tensors[f"{PREFIX}{name}.{a}"] = f.a.reshape(f.rank, *kernel) if kernel else f.a
        folded = f.b.float() * f.scaling
        tensors[f"{PREFIX}{name}.{b}"] = folded.reshape(*folded.shape, *(1,) * (len(kernel) - 1)) if kernel else folded
        if f.bias is not None:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = f.bias.float() * f.scaling
    for name, module in weights.saved.items():
        for parameter, tensor in module.parameters.items():
            tensors[f"{PREFIX}{name}.{parameter}"] = tensor
    for name, rows in weights.token_rows.items():
        if name not in layout.tied:
            tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows.rows
    for name, head in weights.heads.items():
        tensors[f"{PREFIX}{name}.weight"] = head.weight
        if head.bias is not None:
            tensors[f"{PREFIX}{name}.bias"] = head.bias
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def _config(weights: AdapterWeights, layout: BaseLayout, base_name: str) -> dict[str, Any]:
    ranks = {name: f.rank for name, f in weights.lora.items()}
    rank = max(ranks.values(), default=8)
    others = {re.escape(name): r for name, r in ranks.items() if r != rank}
    is_biased = any(f.bias is not None for f in weights.lora.values())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if weights.heads else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_bias": is_biased,
        "target_modules": sorted(ranks),
        "modules_to_save": [*sorted(weights.saved), *sorted(weights.heads)] or None,
        "trainable_token_indices": {
            name: rows.indices.tolist() for name, rows in weights.token_rows.items() if name not in layout.tied
        }
        or None,
    }


def _labels(weights: AdapterWeights) -> Mapping[str, str]:
    return {str(i): label for head in weights.heads.values() for i, label in enumerate(head.labels)}
