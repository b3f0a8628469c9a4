"""vLLM's leaves under slot layers: found in its model, named as the base names them, wrapped in place.

vLLM computes a linear or an embedding through the leaf's ``quant_method``, a norm and the patch embedding
through ``forward``; those are what is replaced, on the instance. The rest of vLLM's model stays as it is.

Rows that a step pads beyond its tokens are base rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_runtime.engine.layers import SlotConv, SlotEmbedding, SlotLayer, SlotLinear, SlotNorm, space_of
from lora_runtime.engine.routing import Router, Routing, Space
from lora_runtime.engine.vllm.fusion import FusedLeaf, LeafParts
from lora_runtime.engine.vllm.names import (
    ColumnParallelLinear,
    Conv3dLayer,
    LinearBase,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lora_runtime.engine.vllm.sharding import WHOLE, Shard, evenly, heads
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's leaf → the leaves it is made of, in order of outputs, where the base has those."""


SMALLEST_DIVISOR = 1e-12
"""Of a norm's weights: what the base's norm gave is scaled to another's where it is exact to fp32's rounding."""

MAX_SCALED_TOKENS = 64
"""In a step: each norm keeps the scales of its tokens while they are routed alike, as when they decode."""


class WrappedLeaf:
    """A slot layer for one of vLLM's modules, and the leaves of the base that it stands for.

    It takes the module's place only while something is in its slots: until then vLLM runs as if it were not there.
    """

    def __init__(self, layer: SlotLayer, leaf: FusedLeaf, owner: Any, attribute: str, replacement: Any) -> None:
        """``replacement`` becomes ``attribute`` of the instance ``owner``, in front of its class's own."""
        self.layer = layer
        self.leaf = leaf
        self._owner = owner
        self._attribute = attribute
        self._replacement = replacement

    def fill(self, slot: int, parts: LeafParts) -> None:
        """Put an adapter's parts into ``slot``, which must be clear."""
        self.layer.fill(slot, parts.lora, parts.saved, parts.rows, parts.ranks)
        setattr(self._owner, self._attribute, self._replacement)

    def clear(self, slot: int) -> None:
        """Empty ``slot``; nothing happens where it is empty."""
        self.layer.clear(slot)
        if not self.layer.owners:
            vars(self._owner).pop(self._attribute, None)

    @property
    def own(self) -> Any:
        """What the module computes with while nothing stands in its place."""
        return getattr(type(self._owner), self._attribute).__get__(self._owner)

    @contextmanager
    def standing_in(self, replacement: Any | None) -> Iterator[None]:
        """``replacement`` takes the module's place meanwhile; the module itself does if None."""
        before = vars(self._owner).pop(self._attribute, None)
        if replacement is not None:
            setattr(self._owner, self._attribute, replacement)
        try:
            yield
        finally:
            vars(self._owner).pop(self._attribute, None)
            if before is not None:
                setattr(self._owner, self._attribute, before)


def wrap_leaves(model: nn.Module, layout: BaseLayout, router: Router) -> dict[str, WrappedLeaf]:
    """Put a slot layer on every leaf of ``layout`` in ``model``, by vLLM's name.

    Raises EngineFault naming what of the base was not found: an adapter on it would have no effect.
    """
    wrapping = _Wrapping(layout, router, prepack=next(model.parameters()).device.type == "cpu")
    wrapped: dict[str, WrappedLeaf] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = _parts(name, layout)
        if parts is not None and (found := wrapping.leaf(module, parts)) is not None:
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


def shards_of(module: Any, widths: Sequence[int]) -> tuple[Shard, ...]:
    """What this worker holds of each of the leaves with ``widths`` outputs that ``module`` computes."""
    num_workers = getattr(module, "tp_size", 1)
    if num_workers == 1:
        return (WHOLE,) * len(widths)
    if isinstance(module, VocabParallelEmbedding):
        indices = module.shard_indices
        return (Shard(rows=((indices.org_vocab_start_index, indices.org_vocab_end_index),)),)
    rank = module.tp_rank
    if isinstance(module, QKVParallelLinear):
        spans = [
            heads(module.total_num_heads, module.head_size, rank, num_workers),
            heads(module.total_num_kv_heads, module.head_size, rank, num_workers),
            heads(module.total_num_kv_heads, module.v_head_size, rank, num_workers),
        ]
        if len(widths) == 3:
            return tuple(Shard(rows=(span,)) for span in spans)
        sizes = (module.total_num_heads * module.head_size, module.total_num_kv_heads * module.head_size)
        starts = (0, sizes[0], sum(sizes))
        return (Shard(rows=tuple((at + start, at + stop) for at, (start, stop) in zip(starts, spans, strict=True))),)
    if isinstance(module, ColumnParallelLinear):
        return tuple(Shard(rows=(evenly(width, rank, num_workers),)) for width in widths)
    if isinstance(module, RowParallelLinear):
        return (Shard(columns=evenly(module.input_size, rank, num_workers), has_bias=rank == 0),)
    return (WHOLE,) * len(widths)


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


class _Wrapping:
    """Makes slot layers for the modules of one model."""

    def __init__(self, layout: BaseLayout, router: Router, *, prepack: bool) -> None:
        self._layout = layout
        self._router = router
        self._prepack = prepack
        self._methods: dict[nn.Module, Any] = {}

    def leaf(self, module: Any, parts: tuple[str, ...]) -> WrappedLeaf | None:
        """The slot layer for ``module``, which computes ``parts``; None for what is no leaf."""
        space = space_of(parts[0])
        shards = shards_of(module, [self._layout.leaves[part].out_features for part in parts])
        widths = tuple(
            shard.width(self._layout.leaves[part].out_features) for part, shard in zip(parts, shards, strict=True)
        )
        leaf = FusedLeaf(parts=parts, widths=widths, shards=shards)
        if isinstance(module, VocabParallelEmbedding):
            leaf = replace(leaf, is_embedding=parts != ("lm_head",), size=module.num_embeddings_per_partition)
            return self._table(module, leaf) if leaf.is_embedding else self._linear(module, leaf)
        if isinstance(module, LinearBase):
            return self._linear(module, leaf)
        if isinstance(module, RMSNorm):
            norm = VllmNorm(module, space, self._router)
            return WrappedLeaf(norm, leaf, module, "forward", norm.forward)
        if isinstance(module, nn.LayerNorm | Conv3dLayer):
            slot_class = SlotNorm if isinstance(module, nn.LayerNorm) else SlotConv
            layer = slot_class(_detached(module), space, self._router)
            return WrappedLeaf(layer, leaf, module, "forward", lambda x: _routed(layer, x))
        return None

    def _linear(self, module: Any, leaf: FusedLeaf) -> WrappedLeaf:
        method = self._own_method(module)
        space = space_of(leaf.parts[0])
        layer = VllmLinear(
            module, space, self._router, method.apply, prepack=self._prepack, has_bias=leaf.shards[0].has_bias
        )
        if len(leaf.widths) > 1:
            layer.set_widths(leaf.widths)
        return WrappedLeaf(layer, leaf, method, "apply", lambda _, x, bias=None: _routed(layer, x))

    def _table(self, module: Any, leaf: FusedLeaf) -> WrappedLeaf:
        method = self._own_method(module)
        look_up = method.embedding
        # A kernel for sharded vocabularies that would go past the method.
        module.use_fused_embedding = False
        layer = VllmEmbedding(module, space_of(leaf.parts[0]), self._router, lambda ids: look_up(module, ids))
        return WrappedLeaf(layer, leaf, method, "embedding", lambda _, ids: _routed(layer, ids))

    def _own_method(self, module: Any) -> Any:
        """The ``quant_method`` of ``module`` alone. A tied head is the same module as its embedding."""
        if module not in self._methods:
            self._methods[module] = module.quant_method = copy.copy(module.quant_method)
        return self._methods[module]


def _detached(module: nn.Module) -> nn.Module:
    """The module with the same parameters and its class's own ``forward``."""
    return copy.copy(module)


def _routed(layer: SlotLayer, x: Tensor) -> Tensor:
    """``layer`` on the step's rows and the base on what is padded behind them. Raises EngineFault on fewer rows."""
    routing = layer.current_routing()
    if routing is None or routing.num_tokens == x.shape[0]:
        return cast(Tensor, layer.forward(x))
    own = layer.own(x[check_rows(routing, x) :])
    return torch.cat([cast(Tensor, layer.forward(x[: routing.num_tokens])), own])


def check_rows(routing: Routing, x: Tensor) -> int:
    """How many rows of ``x`` are routed; those behind are padding. Raises EngineFault on fewer."""
    if x.shape[0] < routing.num_tokens:
        raise EngineFault(f"A step routes {routing.num_tokens} rows, but a leaf was given {x.shape[0]}.")
    return routing.num_tokens


class VllmLinear(SlotLinear):
    """A linear, or a vocabulary's head, that vLLM multiplies with."""

    def __init__(
        self, base: nn.Module, space: Space, router: Router, product: Any, *, prepack: bool, has_bias: bool
    ) -> None:
        self._has_bias = has_bias
        super().__init__(base, space, router, prepack=prepack, own=lambda x: product(base, x, self.bias))

    @property
    def bias(self) -> Tensor | None:
        """None also in a worker that leaves it to the first to add the bias of a sum."""
        return super().bias if self._has_bias else None


class VllmEmbedding(SlotEmbedding):
    """An embedding table that vLLM looks up."""

    def __init__(self, base: nn.Module, space: Space, router: Router, own: Any) -> None:
        super().__init__(base, space, router)
        self._look_up = own

    def own(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._look_up(x))


class VllmNorm(SlotNorm):
    """vLLM's RMSNorm, which adds the residual first and returns the sum beside the result."""

    def __init__(self, base: nn.Module, space: Space, router: Router) -> None:
        super().__init__(_detached(base), space, router)
        self._scale: tuple[Routing, Tensor] | None = None
        smallest = float(self.weight.detach().abs().min())
        self._is_scalable = self.weight.dtype == torch.float32 and smallest > SMALLEST_DIVISOR

    def _changed(self) -> None:
        super()._changed()
        self._scale = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if self.current_routing() is None:
            return self.base(x, residual)
        if residual is None:
            return self._normed(x)
        total = x + residual
        return self._normed(total), total

    def act(self, y: Tensor, x: Tensor, routing: Routing) -> None:
        """Make ``y`` (T, D), the base's norm of ``x`` (T, D), this leaf's, in place."""
        if not self._is_scalable or routing.num_tokens > MAX_SCALED_TOKENS:
            y.copy_(super().forward(x))
            return
        if self._scale is None or self._scale[0] is not routing:
            saving = routing.active(self._saved_owners)
            weights = self._stacked(saving, "weight", self.weight)
            self._scale = routing, (routing.shares(saving) @ weights).div_(self.weight)
        y.mul_(self._scale[1])

    def _normed(self, x: Tensor) -> Tensor:
        routing = self.current_routing()
        assert routing is not None
        rows = super().forward(x[: routing.num_tokens])
        if x.shape[0] == routing.num_tokens:
            return rows
        return torch.cat([rows, self.own(x[routing.num_tokens :])])
