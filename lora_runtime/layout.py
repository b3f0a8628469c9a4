"""What a base offers to adapters: its leaf modules, their parameters and shapes. Holds no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

LeafKind = Literal["linear", "embedding", "norm", "conv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A module that owns parameters. ``parameters`` maps their names to shapes.

    ``in_features`` and ``out_features`` are those of the matrix that LoRA factors act on; an
    embedding's are (vocabulary, width), a convolution's input is its flattened patch, a norm's both
    are its width.
    """

    kind: LeafKind
    parameters: Mapping[str, tuple[int, ...]]
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayout:
    """The base's leaves under canonical names (its own module paths).

    ``tied`` maps a module to the one whose weight it shares (``lm_head`` to the input embedding);
    ``containers`` are all other modules, of use in matching and in messages; ``embedding`` names the
    input embedding.
    """

    leaves: Mapping[str, Leaf]
    tied: Mapping[str, str]
    containers: frozenset[str]
    embedding: str
    vocab_size: int
    hidden_size: int

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseLayout:
        """Read off a transformers model, on any device including meta."""
        leaves: dict[str, Leaf] = {}
        containers: set[str] = set()
        for name, module in model.named_modules():
            if (leaf := _leaf(module)) is not None:
                leaves[name] = leaf
            elif name:
                containers.add(name)
        transformer: Any = model
        embedding = next(name for name, m in model.named_modules() if m is transformer.get_input_embeddings())
        head = transformer.get_output_embeddings()
        is_tied = head is not None and head.weight is transformer.get_input_embeddings().weight
        return cls(
            leaves=MappingProxyType(leaves),
            tied=MappingProxyType({"lm_head": embedding} if is_tied else {}),
            containers=frozenset(containers),
            embedding=embedding,
            vocab_size=leaves[embedding].in_features,
            hidden_size=leaves[embedding].out_features,
        )

    @classmethod
    def from_config(cls, base_path: str | Path) -> BaseLayout:
        """Read off a checkpoint's ``config.json`` alone; builds the model without memory for its weights."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(base_path)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return cls.from_model(model)


def _leaf(module: nn.Module) -> Leaf | None:
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if "weight" not in parameters:
        return None
    shape = parameters["weight"]
    kind: LeafKind
    if isinstance(module, nn.Linear):
        kind, in_features, out_features = "linear", shape[1], shape[0]
    elif isinstance(module, nn.Embedding):
        kind, in_features, out_features = "embedding", shape[0], shape[1]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind, in_features, out_features = "conv", int(torch.Size(shape[1:]).numel()), shape[0]
    elif len(shape) == 1:
        kind, in_features, out_features = "norm", shape[0], shape[0]
    else:
        return None
    return Leaf(kind=kind, parameters=MappingProxyType(parameters), in_features=in_features, out_features=out_features)
