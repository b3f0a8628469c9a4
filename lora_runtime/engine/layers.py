"""Slot layers: the base's leaf modules, each holding what the resident adapters do to it.

``install`` replaces every leaf of the model in place; a layer without anything in its slots
costs one dictionary look-up. Slots are filled and cleared between steps only.

Shape legend: T tokens, I in features, O out features, R rank, V vocabulary, D embedding width, N token rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_runtime.engine import low_rank, ops
from lora_runtime.engine.matrix import Matrix
from lora_runtime.engine.routing import Router, Routing, Space
from lora_runtime.weights import AdapterWeights, LoraFactors, SavedModule, TokenRows, is_shift

LAUNCH_FLOPS = {"cpu": 5e4, "cuda": 5e8}
"""Multiply-adds that one kernel launch is worth, measured roughly; only a choice of path depends on it."""


class SlotLayer(nn.Module):
    """What all slot layers share: the base leaf, the router, and low-rank factors by slot."""

    def __init__(self, base: nn.Module, space: Space, router: Router) -> None:
        super().__init__()
        self.base = base
        self._space = space
        self._router = router
        self._factors: dict[int, low_rank.Factors] = {}
        self._saved: dict[int, dict[str, Tensor]] = {}
        self._rows: dict[int, _RowDelta] = {}
        self._shift: dict[int, Tensor] = {}
        self._widths: tuple[int, ...] | None = None
        self._form: tuple[Routing, low_rank.Form] | None = None
        self._low_rank_alone: Routing | None = None
        """The last one that nothing else than low-rank factors acts in."""
        self._laid_out: dict[tuple[low_rank.Name, tuple[int, ...]], tuple[Tensor, ...]] = {}
        self._owners = self._low_rank_owners = self._saved_owners = frozenset[int]()
        self._rows_owners = self._shift_owners = self._beyond_low_rank = frozenset[int]()

    @property
    def weight(self) -> Tensor:
        """The base's weight: models ask their leaves for dtype and device."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    @property
    def owners(self) -> frozenset[int]:
        """Slots that do something here."""
        return self._owners

    def fill(
        self,
        slot: int,
        lora: LoraFactors | None,
        saved: SavedModule | None,
        rows: TokenRows | None,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        """Put an adapter's part into ``slot``, in the base's dtype and on its device. The slot must be clear.

        ``ranks``: for a fused leaf, the rank of each of its outputs (see :meth:`set_widths`).
        """
        if lora is not None:
            self._fill_lora(slot, lora, ranks or (lora.rank,))
        if saved is not None:
            self._fill_saved(slot, saved)
        if rows is not None:
            self._rows[slot] = _RowDelta.of(rows, self.weight)
        self._changed()

    def set_widths(self, widths: tuple[int, ...]) -> None:
        """The outputs that this leaf is made of, in order, where it is more than one."""
        self._widths = widths

    def clear(self, slot: int) -> None:
        """Empty ``slot``; nothing happens where it is empty."""
        for part in (self._factors, self._saved, self._rows, self._shift):
            part.pop(slot, None)
        self._changed()

    def _fill_lora(self, slot: int, lora: LoraFactors, ranks: tuple[int, ...]) -> None:
        like = self.weight
        a = lora.a.to(device=like.device, dtype=like.dtype)
        b = (lora.b.float() * lora.scaling).to(device=like.device, dtype=like.dtype).T
        self._factors[slot] = low_rank.Factors(a.contiguous(), b.contiguous(), ranks)
        if lora.bias is not None:
            self._add_shift(slot, lora.bias.float() * lora.scaling)

    def _fill_saved(self, slot: int, saved: SavedModule) -> None:
        like = self.weight
        if is_shift(saved) and self.bias is not None:
            # The difference is taken before anything is rounded: it may be small beside the bias.
            self._add_shift(slot, saved.parameters["bias"].to(like.device).float() - self.bias.float())
            return
        self._saved[slot] = {
            name: tensor.to(device=like.device, dtype=like.dtype).contiguous()
            for name, tensor in saved.parameters.items()
        }

    def _add_shift(self, slot: int, shift: Tensor) -> None:
        shift = shift.to(self.weight.device)
        known = self._shift.get(slot)
        self._shift[slot] = (shift if known is None else known.float() + shift).to(self.weight.dtype)

    def _changed(self) -> None:
        self._low_rank_owners = frozenset(self._factors)
        self._saved_owners = frozenset(self._saved)
        self._rows_owners = frozenset(self._rows)
        self._shift_owners = frozenset(self._shift)
        self._beyond_low_rank = self._saved_owners | self._rows_owners | self._shift_owners
        self._owners = self._low_rank_owners | self._beyond_low_rank
        self._form = self._low_rank_alone = None
        self._laid_out.clear()

    def current_routing(self) -> Routing | None:
        """This step's routing, or None where only the base's own weights matter."""
        if not self._owners:
            return None
        routing = self._router.get(self._space)
        return None if routing is None or not routing.active(self._owners) else routing

    def _replaced(self, slot: int, x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(self.base, self._saved[slot], (x,), strict=False))

    def own(self, x: Tensor) -> Tensor:
        """The base's output."""
        return cast(Tensor, self.base(x))

    def _full(self, x: Tensor, routing: Routing) -> Tensor:
        """The leaf's output with its full replacements, before any low-rank part."""
        saving = routing.active(self._saved_owners)
        if not saving:
            return self.own(x)
        return ops.blend(x, routing, saving, self.own, self._replaced)

    def _add_low_rank(self, y: Tensor, x: Tensor, routing: Routing) -> None:
        """In place on ``y`` (T, O), from ``x`` (T, I)."""
        if slots := routing.active(self._low_rank_owners):
            if self._form is None or self._form[0] is not routing:
                widths = self._widths or (y.shape[1],)
                launch = LAUNCH_FLOPS.get(x.device.type, LAUNCH_FLOPS["cuda"])
                name = low_rank.cheapest(routing, slots, self._factors, widths, launch)
                # Kept for the steps that follow: while requests decode, most are routed alike.
                form = low_rank.make(name, routing, slots, self._factors, widths, self._laid_out)
                self._form = routing, form
            self._form[1].add(y, x)
        if slots := routing.active(self._shift_owners):
            stacked = torch.stack([self._shift[slot] for slot in slots])
            y.addmm_(routing.weights(slots).to(y.dtype), stacked)


class SlotLinear(SlotLayer):
    """A Linear. Token rows are rows of its weight (a tied head under trained tokens)."""

    def __init__(
        self,
        base: nn.Module,
        space: Space,
        router: Router,
        *,
        prepack: bool = False,
        own: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``own`` computes the base's output, where another runtime holds the base's weight."""
        super().__init__(base, space, router)
        self._prepack = prepack
        self._own_product = own or partial(Matrix(self.weight, prepack=prepack), bias=self.bias)
        self._matrices: dict[int, Matrix] = {}

    def clear(self, slot: int) -> None:
        self._matrices.pop(slot, None)
        super().clear(slot)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.current_routing()
        if routing is None:
            return self.own(x)
        flat = x.reshape(-1, x.shape[-1])
        y = self._full(flat, routing)
        self._add(y, flat, routing)
        return y.reshape(*x.shape[:-1], -1)

    def act(self, y: Tensor, x: Tensor, routing: Routing) -> None:
        """Make ``y`` (T, O), the base's output for ``x`` (T, I), this leaf's, in place."""
        if routing is not self._low_rank_alone and routing.active(self._saved_owners):
            y.copy_(self.forward(x))
        else:
            self._add(y, x, routing)

    def _add(self, y: Tensor, x: Tensor, routing: Routing) -> None:
        """In place on ``y`` (T, O) all that is no full replacement."""
        if routing is self._low_rank_alone and self._form is not None:
            self._form[1].add(y, x)
            return
        self._add_low_rank(y, x, routing)
        if not routing.active(self._beyond_low_rank):
            self._low_rank_alone = routing
        for slot in routing.active(self._rows_owners):
            group, rows = routing.group(slot), self._rows[slot]
            shares = ops.scaled(nn.functional.linear(x[group.index], rows.delta[:-1]), group)
            part = y[group.index]
            part[:, rows.indices] += shares
            y[group.index] = part

    def _fill_saved(self, slot: int, saved: SavedModule) -> None:
        super()._fill_saved(slot, saved)
        parameters = self._saved.get(slot)
        if parameters is not None:
            self._matrices[slot] = Matrix(parameters.pop("weight"), prepack=self._prepack)

    def own(self, x: Tensor) -> Tensor:
        return self._own_product(x)

    def _replaced(self, slot: int, x: Tensor) -> Tensor:
        return self._matrices[slot](x, self._saved[slot].get("bias", self.bias))


class SlotEmbedding(SlotLayer):
    """An embedding table: ids (…) in, vectors (…, D) out."""

    def forward(self, ids: Tensor) -> Tensor:
        routing = self.current_routing()
        if routing is None:
            return self.own(ids)
        flat = ids.reshape(-1)
        y = self._full(flat, routing)
        for slot in routing.active(self._low_rank_owners):
            group, member = routing.group(slot), self._factors[slot]
            hidden = nn.functional.embedding(flat[group.index], member.a.T)
            y[group.index] += ops.scaled(hidden @ member.b, group)
        for slot in routing.active(self._rows_owners):
            group, rows = routing.group(slot), self._rows[slot]
            y[group.index] += ops.scaled(rows.delta[rows.position[flat[group.index]]], group)
        return y.reshape(*ids.shape, -1)

    def _replaced(self, slot: int, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self._saved[slot]["weight"])


class SlotNorm(SlotLayer):
    """A LayerNorm or RMSNorm over the last dimension: linear in its own weights.

    Each token gets its own blend of the versions' weights, so the input is normalised once.
    """

    def __init__(self, base: nn.Module, space: Space, router: Router) -> None:
        super().__init__(base, space, router)
        self._epsilon = cast("float | None", base.eps if hasattr(base, "eps") else base.variance_epsilon)
        self._versions: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def _changed(self) -> None:
        super()._changed()
        self._versions = {}

    def forward(self, x: Tensor) -> Tensor:
        routing = self.current_routing()
        if routing is None:
            return self.own(x)
        flat = x.reshape(-1, x.shape[-1])
        y = self._full(flat, routing)
        self._add_low_rank(y, flat, routing)
        return y.reshape(x.shape)

    def _full(self, x: Tensor, routing: Routing) -> Tensor:
        saving = routing.active(self._saved_owners)
        if not saving:
            return self.own(x)
        if saving not in self._versions:
            weights = self._stacked(saving, "weight", self.weight)
            biases = None if self.bias is None else self._stacked(saving, "bias", self.bias)
            self._versions = {saving: (weights, biases)}
        weight, bias = self._versions[saving]
        shares = routing.shares(saving)
        y = self._normalised(x) * (shares @ weight)
        return y if bias is None else y.addmm_(shares, bias)

    def _stacked(self, saving: tuple[int, ...], parameter: str, own: Tensor) -> Tensor:
        """The base's version ``own`` and those of ``saving``, (S + 1, D)."""
        return torch.stack([own, *(self._saved[slot].get(parameter, own) for slot in saving)])

    def _normalised(self, x: Tensor) -> Tensor:
        """``x`` (T, D) before any weight; in fp32 inside, as transformers has it."""
        shape = (x.shape[-1],)
        if isinstance(self.base, nn.LayerNorm):
            return nn.functional.layer_norm(x, shape, eps=self.base.eps)
        return nn.functional.rms_norm(x.float(), shape, eps=self._epsilon).to(x.dtype)


class SlotConv(SlotLayer):
    """A convolution whose kernel covers its whole input (a patch embedding): T patches in, T vectors out."""

    def forward(self, x: Tensor) -> Tensor:
        routing = self.current_routing()
        if routing is None:
            return self.own(x)
        full = self._full(x, routing)
        y = full.reshape(x.shape[0], -1)
        self._add_low_rank(y, x.reshape(x.shape[0], -1), routing)
        return y.reshape(full.shape)


class _RowDelta:
    """Trained rows as differences: ``delta`` (N + 1, D) with a zero last row, ``position`` (V,) into it."""

    def __init__(self, indices: Tensor, delta: Tensor, position: Tensor) -> None:
        self.indices = indices
        self.delta = delta
        self.position = position

    @classmethod
    def of(cls, rows: TokenRows, base: Tensor) -> _RowDelta:
        indices = rows.indices.to(base.device)
        delta = rows.rows.to(base.device).float() - base[indices].float()
        delta = torch.cat([delta, delta.new_zeros(1, delta.shape[1])]).to(base.dtype)
        position = torch.full((base.shape[0],), indices.numel(), dtype=torch.int64, device=base.device)
        position[indices] = torch.arange(indices.numel(), device=base.device)
        return cls(indices, delta, position)


def space_of(name: str) -> Space:
    """What the rows of the leaf ``name`` (canonical) are."""
    if name == "lm_head":
        return "logits"
    if ".visual.merger.mlp" in f".{name}":
        return "merged"
    return "patch" if ".visual." in f".{name}" else "text"


def _wrap(leaf: nn.Module, space: Space, router: Router, *, prepack: bool) -> SlotLayer | None:
    if isinstance(leaf, nn.Linear):
        return SlotLinear(leaf, space, router, prepack=prepack)
    if isinstance(leaf, nn.Embedding):
        return SlotEmbedding(leaf, space, router)
    if isinstance(leaf, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return SlotConv(leaf, space, router)
    if isinstance(leaf, nn.LayerNorm) or type(leaf).__name__.endswith("RMSNorm"):
        return SlotNorm(leaf, space, router)
    return None


class SlotLayers:
    """All slot layers of a model, filled and cleared together."""

    def __init__(self, layers: Mapping[str, SlotLayer]) -> None:
        self._layers = dict(layers)
        self._filled: dict[int, tuple[str, ...]] = {}

    def fill(self, slot: int, weights: AdapterWeights) -> None:
        """Put ``weights`` into ``slot``, clearing it first. All or nothing: on failure the slot is clear."""
        self.clear(slot)
        names = tuple(sorted(weights.modules))
        unknown = [name for name in names if name not in self._layers]
        if unknown:
            raise KeyError(f"no slot layer for {unknown}; weights must be read against this base's layout")
        self._filled[slot] = names
        try:
            for name in names:
                parts = weights.lora.get(name), weights.saved.get(name), weights.token_rows.get(name)
                self._layers[name].fill(slot, *parts)
        except BaseException:
            self.clear(slot)
            raise

    def clear(self, slot: int) -> None:
        for name in self._filled.pop(slot, ()):
            self._layers[name].clear(slot)


def install(model: nn.Module, router: Router, *, prepack: bool = False) -> SlotLayers:
    """Replace every leaf of ``model`` by its slot layer, in place. Names are the model's own.

    ``prepack``: keep a second copy of each linear weight in the layout that CPUs multiply fastest with;
    gradients do not pass through it.
    """
    layers: dict[str, SlotLayer] = {}
    for name, leaf in list(model.named_modules()):
        if (
            next(leaf.children(), None) is None
            and (layer := _wrap(leaf, space_of(name), router, prepack=prepack)) is not None
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            layers[name] = layer
    return SlotLayers(layers)
