"""Merged leaves on their way from the task that made them to the adapter they become a part of.

A file of the job's own, never a stranger's: names of tensors say where they belong, and what is no tensor lies in the
header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_runtime.merge.adapters import LeafReport, Merged
from lora_runtime.weights import AdapterWeights, Head, LoraFactors, SavedModule, TokenRows

SEPARATOR = "|"
META = "loom"


def write_part(merged: Merged, file: Path) -> None:
    """Write ``merged`` to ``file``, which must not be read before this returns."""
    weights = merged.weights
    tensors: dict[str, Tensor] = {}
    for leaf, factors in weights.lora.items():
        tensors |= {_key("lora", leaf, "a"): factors.a, _key("lora", leaf, "b"): factors.b}
        if factors.bias is not None:
            tensors[_key("lora", leaf, "bias")] = factors.bias
    for leaf, module in weights.saved.items():
        tensors |= {_key("saved", leaf, name): tensor for name, tensor in module.parameters.items()}
    for leaf, rows in weights.token_rows.items():
        tensors |= {_key("rows", leaf, "indices"): rows.indices, _key("rows", leaf, "rows"): rows.rows}
    for name, head in weights.heads.items():
        tensors[_key("head", name, "weight")] = head.weight
        if head.bias is not None:
            tensors[_key("head", name, "bias")] = head.bias
    said = {
        "version": weights.version,
        "lora": {leaf: [factors.scaling, factors.kind] for leaf, factors in weights.lora.items()},
        "heads": {name: list(head.labels) for name, head in weights.heads.items()},
        "leaves": {leaf: asdict(report) for leaf, report in merged.leaves.items()},
    }
    # Tensors of tied leaves share memory, which safetensors refuses.
    owned = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(owned, file, metadata={META: json.dumps(said)})


def read_parts(files: Iterable[Path]) -> Merged:
    """What parts amount to together. Tensors are mapped."""
    lora: dict[str, LoraFactors] = {}
    saved: dict[str, SavedModule] = {}
    rows: dict[str, TokenRows] = {}
    heads: dict[str, Head] = {}
    reports: dict[str, LeafReport] = {}
    version = ""
    for file in files:
        said, tensors = _read(file)
        version = said["version"]
        reports |= {leaf: LeafReport(**found) for leaf, found in said["leaves"].items()}
        of: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in sorted(tensors.items()):  # a file's own order may be any
            kind, name, part = key.split(SEPARATOR)
            of.setdefault((kind, name), {})[part] = tensor
        for (kind, name), found in of.items():
            if kind == "lora":
                scaling, of_kind = said["lora"][name]
                lora[name] = LoraFactors(scaling=scaling, kind=of_kind, **found)
            elif kind == "saved":
                saved[name] = SavedModule(parameters=found)
            elif kind == "rows":
                rows[name] = TokenRows(**found)
            else:
                labels = tuple(said["heads"][name])
                heads[name] = Head(name=name, weight=found["weight"], bias=found.get("bias"), labels=labels)
    weights = AdapterWeights(version=version, lora=lora, saved=saved, token_rows=rows, heads=heads)
    return Merged(weights=weights, leaves=reports)


def _key(kind: str, name: str, part: str) -> str:
    return SEPARATOR.join((kind, name, part))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a mapping
        return json.loads(opened.metadata()[META]), tensors
