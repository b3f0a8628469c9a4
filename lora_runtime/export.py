"""Writing :class:`AdapterWeights` as a folder that PEFT loads to the same function."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_runtime.config import NO_TARGETS
from lora_runtime.errors import Conflict, UnsupportedAdapter
from lora_runtime.folder import CONFIG_NAME, MODEL_CONFIG_NAME, TENSORS_NAME
from lora_runtime.layout import BaseLayout
from lora_runtime.names import listed
from lora_runtime.weights import NOT_SAVED, AdapterWeights, LoraFactors, SavedModule

PREFIX = "base_model.model."


def write_adapter(
    weights: AdapterWeights,
    path: str | Path,
    layout: BaseLayout,
    *,
    base_name: str,
    dtype: torch.dtype | None = None,
    said: Mapping[str, str] | None = None,
) -> None:
    """Write a PEFT folder at ``path``, staged beside it and renamed: readers see all of it or nothing.

    Scalings are folded into B in fp32 (alpha = r); LoRA on a module that is saved too is folded into its
    weight. ``dtype``: of all tensors, as they are if None. ``said``: metadata for the tensor file.

    Raises Conflict where ``path`` exists, UnsupportedAdapter for what PEFT's format cannot say.
    """
    target = Path(path)
    if target.exists():
        raise Conflict(f"'{target.name}' exists already; choose another folder or remove it.")
    weights = _settled(weights, layout)
    tensors, config = _tensors(weights, layout), _config(weights, layout, base_name)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(tensors, staged / TENSORS_NAME, metadata={"format": "pt", **(said or {})})
        _settle_header(staged / TENSORS_NAME)
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2))
        if labels := _labels(weights):
            (staged / MODEL_CONFIG_NAME).write_text(json.dumps({"id2label": labels}, indent=2))
        staged.chmod(0o755)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _settle_header(file: Path) -> None:
    """Sort the metadata, which safetensors writes in any order: equal adapters are equal files."""
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same content in another order"
        opened.seek(8)
        opened.write(text.ljust(length))


def _settled(weights: AdapterWeights, layout: BaseLayout) -> AdapterWeights:
    """``weights`` with at most one of LoRA, saved weight and token rows per leaf."""
    lora, saved = dict(weights.lora), dict(weights.saved)
    for name in [name for name in lora if "weight" in saved.get(name, NOT_SAVED).parameters]:
        saved[name] = _folded(name, lora.pop(name), saved[name])
    clashes = sorted(
        name for name in weights.token_rows if name in lora or "weight" in saved.get(name, NOT_SAVED).parameters
    )
    if clashes:
        raise _inexpressible("token rows beside low-rank factors or a full weight of one module", clashes)
    if any(factors.bias is not None for factors in lora.values()):
        if embeddings := sorted(name for name, factors in lora.items() if factors.kind == "embedding"):
            raise _inexpressible("LoRA biases together with LoRA on an embedding", embeddings)
        # PEFT gives all low-rank parts a bias or none.
        lora = {name: factors if factors.bias is not None else _biased(factors) for name, factors in lora.items()}
    for head, embedding in layout.tied.items():
        rows = weights.token_rows
        if embedding in rows and not (head in rows and (_same_rows(weights, head) or _other_ids(weights, head))):
            raise _inexpressible("token rows of an embedding that differ from those of its tied head", [embedding])
    return replace(weights, lora=lora, saved=saved)


def _folded(name: str, factors: LoraFactors, saved: SavedModule) -> SavedModule:
    weight = saved.parameters["weight"]
    parameters = {**saved.parameters, "weight": weight.float() + factors.delta().reshape(weight.shape)}
    if factors.bias is not None:
        if "bias" not in parameters:
            raise _inexpressible("a LoRA bias on a module that is saved without a bias", [name])
        parameters["bias"] = parameters["bias"].float() + factors.bias.float() * factors.scaling
    return SavedModule(parameters=parameters)


def _biased(factors: LoraFactors) -> LoraFactors:
    return replace(factors, bias=torch.zeros(factors.b.shape[0], dtype=factors.b.dtype))


def _tied_rows(weights: AdapterWeights, head: str, layout: BaseLayout) -> bool:
    """Whether PEFT gives ``head`` its rows unasked, because it shares the embedding's weight."""
    return head in layout.tied and layout.tied[head] in weights.token_rows and _same_rows(weights, head)


def _same_rows(weights: AdapterWeights, head: str) -> bool:
    rows = [other for name, other in weights.token_rows.items() if name != head]
    own = weights.token_rows[head]
    return any(torch.equal(own.indices, o.indices) and torch.equal(own.rows, o.rows) for o in rows)


def _other_ids(weights: AdapterWeights, head: str) -> bool:
    own = weights.token_rows[head]
    return all(not torch.equal(own.indices, o.indices) for n, o in weights.token_rows.items() if n != head)


def _inexpressible(what: str, modules: list[str]) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"PEFT's format cannot hold {what} ({listed(modules)}). Serve the combination at run time, or merge it "
        "into a checkpoint.",
        modules=modules,
    )


def _tensors(weights: AdapterWeights, layout: BaseLayout) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, factors in weights.lora.items():
        tensors |= _factor_tensors(name, factors, layout)
    for name, module in weights.saved.items():
        inner = ".base_layer" if name in weights.lora else ""
        for parameter, tensor in module.parameters.items():
            tensors[f"{name}{inner}.{parameter}"] = tensor
    for name, rows in weights.token_rows.items():
        if not _tied_rows(weights, name, layout):
            tensors[f"{name}.token_adapter.trainable_tokens_delta"] = rows.rows
    for name, head in weights.heads.items():
        tensors[f"{name}.weight"] = head.weight
        if head.bias is not None:
            tensors[f"{name}.bias"] = head.bias
    # safetensors refuses tensors that share memory, as those of tied modules may.
    return {f"{PREFIX}{key}": tensor.clone().contiguous() for key, tensor in tensors.items()}


def _factor_tensors(name: str, factors: LoraFactors, layout: BaseLayout) -> dict[str, Tensor]:
    folded = factors.b.float() * factors.scaling
    if factors.kind == "embedding":
        return {f"{name}.lora_embedding_A": factors.a, f"{name}.lora_embedding_B": folded}
    kernel = layout.leaves[name].parameters["weight"][2:]
    found = {
        f"{name}.lora_A.weight": factors.a.reshape(factors.rank, -1, *kernel),
        f"{name}.lora_B.weight": folded.reshape(*folded.shape, *(1,) * len(kernel)),
    }
    if factors.bias is not None:
        found[f"{name}.lora_B.bias"] = factors.bias.float() * factors.scaling
    return found


def _config(weights: AdapterWeights, layout: BaseLayout, base_name: str) -> dict[str, Any]:
    ranks = {name: weights.lora[name].rank for name in sorted(weights.lora)}  # an order that identity sees
    rank = max(ranks.values(), default=8)
    others = {re.escape(name): r for name, r in ranks.items() if r != rank}
    # What is saved in part (biases alone) PEFT loads straight into the base's parameters, not as a module.
    whole = [name for name, m in weights.saved.items() if set(m.parameters) == set(layout.leaves[name].parameters)]
    indices = {
        name: rows.indices.tolist()
        for name, rows in weights.token_rows.items()
        if not _tied_rows(weights, name, layout)
    }
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if weights.heads else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_bias": any(factors.bias is not None for factors in weights.lora.values()),
        "target_modules": sorted(ranks) or NO_TARGETS,
        "modules_to_save": [*sorted(whole), *sorted(weights.heads)] or None,
        "trainable_token_indices": indices or None,
    }


def _labels(weights: AdapterWeights) -> Mapping[str, str]:
    return {str(i): label for head in weights.heads.values() for i, label in enumerate(head.labels)}
