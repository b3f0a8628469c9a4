"""An adapter's parts for a leaf that another runtime made of several: q, k and v in one, gate and up in one.

Outputs of fused leaves follow one another, so factors stack along the rank with ``b`` block by block, and a
leaf saved in full takes the base's rows where a part is not saved. Vocabularies may be padded. Under tensor
parallelism all of it is of the part that this worker holds (:mod:`.sharding`).

Shape legend: R rank, I in features, O out features, V vocabulary, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_runtime.engine.vllm.sharding import Shard
from lora_runtime.weights import AdapterWeights, BaseParameter, LoraFactors, SavedModule, TokenRows, is_shift


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLeaf:
    """``parts``: canonical leaves in the order of their outputs, ``widths`` their out features in this worker.

    ``shards``: what this worker holds of each part. ``size``: what the padded dimension of a vocabulary holds
    here; None where nothing is padded.
    """

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    shards: tuple[Shard, ...]
    is_embedding: bool = False
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeafParts:
    """What an adapter puts into one leaf; all None where it leaves the leaf alone."""

    lora: LoraFactors | None
    saved: SavedModule | None
    rows: TokenRows | None
    ranks: tuple[int, ...]
    """Of each of the leaf's parts, 0 where it has no factors."""

    @property
    def is_empty(self) -> bool:
        return self.lora is None and self.saved is None and self.rows is None

    @property
    def num_saved(self) -> int:
        """Elements of what is saved in full."""
        return 0 if self.saved is None else sum(tensor.numel() for tensor in self.saved.parameters.values())

    def in_dtype(self, dtype: torch.dtype) -> LeafParts:
        """With what is saved in full converted; factors stay as they are until their scaling is folded in, and a bias
        alone until it is a difference from the base's."""
        if self.saved is None or is_shift(self.saved):
            return self
        return replace(self, saved=self.saved.in_dtype(dtype))


def fused(weights: AdapterWeights, leaf: FusedLeaf, base: BaseParameter) -> LeafParts:
    """The parts of ``weights`` for ``leaf``. ``base`` is asked only where a leaf is saved in part."""
    held = list(zip(leaf.parts, leaf.shards, strict=True))
    rows = [shard.token_rows(weights.token_rows[name]) for name, shard in held if name in weights.token_rows]
    lora = [shard.lora(weights.lora[name]) if name in weights.lora else None for name, shard in held]
    saved = [shard.saved(weights.saved[name]) if name in weights.saved else None for name, shard in held]
    return LeafParts(
        lora=_fused_lora(lora, leaf),
        saved=_fused_saved(saved, leaf, base),
        rows=rows[0] if rows else None,
        ranks=tuple(weights.lora[name].rank if name in weights.lora else 0 for name in leaf.parts),
    )


def _fused_lora(members: Sequence[LoraFactors | None], leaf: FusedLeaf) -> LoraFactors | None:
    present = [member for member in members if member is not None]
    if not present:
        return None
    if leaf.is_embedding:
        (only,) = present
        a = only.a if leaf.size is None else pad(only.a, (0, leaf.size - only.a.shape[1]))
        return LoraFactors(a=a, b=only.b, scaling=only.scaling, kind="embedding")
    height = leaf.size or sum(leaf.widths)
    b = torch.zeros(height, sum(member.rank for member in present))
    bias = torch.zeros(height) if any(member.bias is not None for member in present) else None
    row = column = 0
    for member, width in zip(members, leaf.widths, strict=True):
        if member is not None:
            b[row : row + width, column : column + member.rank] = member.b.float() * member.scaling
            if bias is not None and member.bias is not None:
                bias[row : row + width] = member.bias.float() * member.scaling
            column += member.rank
        row += width
    return LoraFactors(a=torch.cat([member.a for member in present]), b=b, scaling=1.0, bias=bias)


def _fused_saved(members: Sequence[SavedModule | None], leaf: FusedLeaf, base: BaseParameter) -> SavedModule | None:
    named = sorted({name for member in members if member is not None for name in member.parameters})
    if not named:
        return None

    def held(part: str, shard: Shard, member: SavedModule | None, name: str) -> Tensor:
        if member is not None and name in member.parameters:
            return member.parameters[name]
        own = shard.parameter(name, base(part, name))
        assert own is not None, "parts of one leaf have their biases in the same workers"
        return own

    def parameter(name: str) -> Tensor:
        each = zip(leaf.parts, leaf.shards, members, strict=True)
        tensors = [held(part, shard, member, name) for part, shard, member in each]
        whole = tensors[0] if len(tensors) == 1 else torch.cat([tensor.float() for tensor in tensors])
        missing = 0 if leaf.size is None else leaf.size - whole.shape[0]
        return pad(whole, (0, 0) * (whole.ndim - 1) + (0, missing)) if missing else whole

    return SavedModule(parameters={name: parameter(name) for name in named})
