"""vLLM's leaves under slot layers: found in its model, named as the base names them, wrapped in place.

vLLM computes a linear or an embedding through the leaf's ``quant_method``, a norm and the patch embedding
through ``forward``; those are what is replaced, on the instance. The rest of vLLM's model stays as it is.

Rows that a step pads beyond its tokens are base rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_runtime.engine.layers import SlotConv, SlotEmbedding, SlotLayer, SlotLinear, SlotNorm, space_of
from lora_runtime.engine.routing import Router
from lora_runtime.engine.vllm.fusion import FusedLeaf
from lora_runtime.engine.vllm.names import (
    Conv3dLayer,
    LinearBase,
    RMSNorm,
    VocabParallelEmbedding,
)
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's leaf → the leaves it is made of, in order of outputs, where the base has those."""


@dataclass(frozen=True, slots=True, eq=False)
class WrappedLeaf:
    """One slot layer in vLLM's model, and the leaves of the base that it stands for."""

    layer: SlotLayer
    leaf: FusedLeaf


def wrap_leaves(model: nn.Module, layout: BaseLayout, router: Router) -> dict[str, WrappedLeaf]:
    """Put a slot layer on every leaf of ``layout`` in ``model``, by vLLM's name.

    Raises EngineFault naming what of the base was not found: an adapter on it would have no effect.
    """
    prepack = next(model.parameters()).device.type == "cpu"
    wrapped: dict[str, WrappedLeaf] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = _parts(name, layout)
        if parts is not None and (found := _wrap(module, parts, layout, router, prepack)) is not None:
            wrapped[name] = found
    covered = {part for found in wrapped.values() for part in found.leaf.parts}
    missing = sorted(set(layout.leaves) - covered)
    if missing:
        raise EngineFault(
            f"vLLM's model has no place for {len(missing)} of the base's {len(layout.leaves)} leaves, such as "
            f"{', '.join(missing[:3])}. Serve this base with the embedded engine.",
            missing=missing,
        )
    return wrapped


def canonical_name(name: str) -> str:
    """A module's canonical path from vLLM's."""
    for prefix, replacement in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("visual.", "model.visual."),
    ):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _parts(name: str, layout: BaseLayout) -> tuple[str, ...] | None:
    path = canonical_name(name)
    if path in layout.leaves:
        return (path,)
    parent, _, last = path.rpartition(".")
    parts = tuple(f"{parent}.{part}" for part in FUSED.get(last, ()))
    return parts if parts and all(part in layout.leaves for part in parts) else None


def _wrap(module: Any, parts: tuple[str, ...], layout: BaseLayout, router: Router, prepack: bool) -> WrappedLeaf | None:
    space = space_of(parts[0])
    widths = tuple(layout.leaves[part].out_features for part in parts)
    if isinstance(module, VocabParallelEmbedding):
        padded: int = module.num_embeddings_padded
        if parts == ("lm_head",):
            method = _own_method(module)
            compute = method.apply
            head = SlotLinear(module, space, router, prepack=prepack, own=lambda x: compute(module, x))
            method.apply = lambda layer, x, bias=None: _routed(head, x)
            return WrappedLeaf(head, FusedLeaf(parts=parts, widths=widths, size=padded))
        method = _own_method(module)
        look_up = method.embedding
        table = VllmEmbedding(module, space, router, lambda ids: look_up(module, ids))
        method.embedding = lambda layer, ids: _routed(table, ids)
        return WrappedLeaf(table, FusedLeaf(parts=parts, widths=widths, is_embedding=True, size=padded))
    if isinstance(module, LinearBase):
        method = _own_method(module)
        product = method.apply
        linear = SlotLinear(module, space, router, prepack=prepack, own=lambda x: product(module, x, module.bias))
        method.apply = lambda layer, x, bias=None: _routed(linear, x)
        if len(widths) > 1:
            linear.set_widths(widths)
        return WrappedLeaf(linear, FusedLeaf(parts=parts, widths=widths))
    layer: SlotLayer
    if isinstance(module, RMSNorm):
        layer = VllmNorm(module, space, router)
    elif isinstance(module, nn.LayerNorm):
        layer = SlotNorm(_detached(module), space, router)
    elif isinstance(module, Conv3dLayer):
        layer = SlotConv(_detached(module), space, router)
    else:
        return None
    module.forward = layer.forward if isinstance(layer, VllmNorm) else lambda x: _routed(layer, x)
    return WrappedLeaf(layer, FusedLeaf(parts=parts, widths=widths))


def _own_method(module: Any) -> Any:
    """A ``quant_method`` that belongs to ``module`` alone; a tied head may share its embedding's."""
    module.quant_method = copy.copy(module.quant_method)
    return module.quant_method


def _detached(module: nn.Module) -> nn.Module:
    """The module with the same parameters and its class's own ``forward``."""
    return copy.copy(module)


def _routed(layer: SlotLayer, x: Tensor) -> Tensor:
    """``layer`` on the step's rows and the base on what is padded behind them. Raises EngineFault on fewer rows."""
    routing = layer.current_routing()
    if routing is None or routing.num_tokens == x.shape[0]:
        return cast(Tensor, layer(x))
    if x.shape[0] < routing.num_tokens:
        raise EngineFault(f"A step routes {routing.num_tokens} rows, but a leaf was given {x.shape[0]}.")
    own = layer.own(x[routing.num_tokens :])
    return torch.cat([cast(Tensor, layer(x[: routing.num_tokens])), own])


class VllmEmbedding(SlotEmbedding):
    """An embedding table that vLLM looks up."""

    def __init__(self, base: nn.Module, space: Any, router: Router, own: Any) -> None:
        super().__init__(base, space, router)
        self._look_up = own

    def own(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._look_up(x))


class VllmNorm(SlotNorm):
    """vLLM's RMSNorm, which adds the residual first and returns the sum beside the result."""

    def __init__(self, base: nn.Module, space: Any, router: Router) -> None:
        super().__init__(_detached(base), space, router)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if self.current_routing() is None:
            return self.base(x, residual)
        if residual is None:
            return _routed_norm(self, x)
        total = x + residual
        return _routed_norm(self, total), total


def _routed_norm(layer: VllmNorm, x: Tensor) -> Tensor:
    routing = layer.current_routing()
    assert routing is not None
    rows = SlotNorm.forward(layer, x[: routing.num_tokens])
    if x.shape[0] == routing.num_tokens:
        return rows
    return torch.cat([rows, layer.own(x[routing.num_tokens :])])
