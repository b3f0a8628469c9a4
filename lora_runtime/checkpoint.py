"""PEFT adapter folders to :class:`AdapterWeights`, fail-closed.

An adapter is accepted only if every tensor of its file lands on exactly one place of the base and
every tensor that its config promises is there. PEFT's own loader checks neither reliably: names
that match nothing load as a silent no-op.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_runtime.errors import AdapterMissing, AdapterRejected, ShapeMismatch, UnsupportedAdapter
from lora_runtime.folder import TENSORS_NAME, fingerprint, read_labels
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.methods import Method
from lora_runtime.names import listed
from lora_runtime.reading import Reading
from lora_runtime.weights import NOT_SAVED, AdapterWeights, Head, LoraFactors, SavedModule, TokenRows, touches_vision

__all__ = [
    "TENSORS_NAME",
    "AdapterOutline",
    "OpenedAdapter",
    "fingerprint",
    "outline_adapter",
    "problems_of",
    "read_adapter",
]

Part = TypeVar("Part")


def read_adapter(path: str | Path, layout: BaseLayout, materialiser: Materialiser | None = None) -> AdapterWeights:
    """The adapter in the folder ``path``, checked against ``layout``. Tensors stay memory-mapped, as stored.

    An adapter of a method other than LoRA needs the ``materialiser``, and has the modules it changes as saved
    ones, in memory of their own and in the materialiser's dtype.

    Raises AdapterMissing for absent files, else the subclass of AdapterRejected that fits, with every
    problem of its kind in one message.
    """
    return OpenedAdapter(path, layout, materialiser).weights()


def problems_of(path: str | Path, layout: BaseLayout) -> list[AdapterRejected | AdapterMissing]:
    """Every reason why :func:`read_adapter` would refuse the folder ``path``, of all kinds that can be told apart."""
    try:
        reading = _Assembly(Path(path), layout)
    except (AdapterRejected, AdapterMissing) as error:
        return [error]
    return reading.problems()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterOutline:
    """What is known of an adapter without what it makes of the base: the leaves it changes, and its heads."""

    modules: frozenset[str]
    heads: Mapping[str, Head]

    @property
    def touches_vision(self) -> bool:
        """Whether an image's encoding depends on this adapter."""
        return touches_vision(self.modules)


def outline_adapter(path: str | Path, layout: BaseLayout) -> AdapterOutline:
    """As :func:`read_adapter`, with all its checks of names and shapes, and without the base's weights.

    Of the file's tensors only heads are read; they are copied, and share no memory with it.
    """
    return _Assembly(Path(path), layout, reads_values=False).outline()


class OpenedAdapter:
    """An adapter that was read and checked, whose weights are made a few leaves at a time.

    For what goes through large adapters leaf by leaf: those of other methods than LoRA are as large as the leaves that
    they change, once they are made. Tensors stay memory-mapped otherwise.
    """

    def __init__(self, path: str | Path, layout: BaseLayout, materialiser: Materialiser | None = None) -> None:
        """Raises as :func:`read_adapter`."""
        folder = Path(path)
        self._assembly = _Assembly(folder, layout)
        self._materialiser = materialiser
        self.version = fingerprint(folder)
        self._assembly.check()

    @cached_property
    def modules(self) -> frozenset[str]:
        """Leaves of the base that it changes."""
        return frozenset(leaf for leaf, _ in self.places)

    @cached_property
    def places(self) -> frozenset[tuple[str, str]]:
        """Every parameter of the base that it changes, as leaf and name."""
        return self._assembly.places()

    @cached_property
    def heads(self) -> Mapping[str, Head]:
        return self._assembly.heads()

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Of its LoRA, by leaf."""
        return self._assembly.ranks()

    @property
    def method(self) -> str:
        """How PEFT trained it."""
        return self._assembly.method

    @cached_property
    def materialised(self) -> frozenset[str]:
        """Leaves that a method other than LoRA changes."""
        return self._assembly.materialised()

    def check_affordable(self, materialiser: Materialiser) -> None:
        """Raise UnsupportedAdapter where what is made of the base, all together, is more than ``materialiser`` may
        keep; :meth:`weights` looks only at what it is asked for."""
        self._assembly.check_affordable(materialiser)

    def weights(self, only: Collection[str] | None = None) -> AdapterWeights:
        """All of it, or what it does to the leaves ``only``, without heads then."""
        return self._assembly.weights(self.version, self._materialiser, only)


class _Assembly(Reading):
    """What a reading amounts to, once it is checked."""

    @property
    def method(self) -> str:
        return self._config.method.name if self._config.method else "LORA"

    def places(self) -> frozenset[tuple[str, str]]:
        leaves = self._layout.leaves
        found = {(leaf, name) for leaf, module in self._saved.items() for name in module.parameters}
        found |= {(leaf, "weight") for leaf in self._token_rows}
        found |= {(leaf, name) for leaf in self._placed.method for name in leaves[leaf].parameters}
        for leaf, factors in self._lora.items():
            found |= {(leaf, "weight")} if factors.bias is None else {(leaf, "weight"), (leaf, "bias")}
        return frozenset(found)

    def heads(self) -> dict[str, Head]:
        return self._heads

    def materialised(self) -> frozenset[str]:
        return frozenset(self._placed.method)

    def check_affordable(self, materialiser: Materialiser) -> None:
        if self._config.method is not None:
            materialiser.check_affordable(self._placed.method, self._layout, self._config.method.name)

    def ranks(self) -> dict[str, int]:
        return {leaf: factors.rank for leaf, factors in self._lora.items()}

    def outline(self) -> AdapterOutline:
        self.check()
        modules = {*self._saved, *self._token_rows, *self._lora, *self._placed.method}
        heads = {name: head.cloned() for name, head in self._heads.items()}
        return AdapterOutline(modules=frozenset(modules), heads=heads)

    def weights(
        self, version: str, materialiser: Materialiser | None, only: Collection[str] | None = None
    ) -> AdapterWeights:
        def wanted(parts: dict[str, Part]) -> dict[str, Part]:
            return {name: part for name, part in parts.items() if only is None or name in only}

        saved, rows = wanted(self._saved), wanted(self._token_rows)
        if self._config.method is not None:
            targeted = wanted(self._placed.method)
            saved |= self._materialised(saved, targeted, self._config.method, materialiser)
        for name in [name for name in rows if "weight" in saved.get(name, NOT_SAVED).parameters]:
            saved[name] = _with_rows(saved[name], rows.pop(name))
        return AdapterWeights(
            version=version,
            lora=wanted(self._lora),
            saved=saved,
            token_rows=rows,
            heads=self._heads if only is None else {},
            method=self.method,
        )

    @cached_property
    def _lora(self) -> dict[str, LoraFactors]:
        placed = self._placed
        lora: dict[str, LoraFactors] = {}
        if self._config.method is not None:
            return lora
        for name in sorted(placed.factored()):
            _, scaling = self._matcher.rank_and_scaling(self._targets.keys[name])
            if self._layout.leaves[name].kind == "embedding":
                a, b = placed.embedding_a[name], placed.embedding_b[name]
                lora[name] = LoraFactors(a=a, b=b, scaling=scaling, kind="embedding")
            else:
                a, b, bias = placed.a[name].flatten(1), placed.b[name].flatten(1), placed.b_bias.get(name)
                lora[name] = LoraFactors(a=a, b=b, scaling=scaling, bias=bias)
        for head, embedding in self._layout.tied.items():
            if self._matcher.ties_lora and embedding in lora and head not in lora:
                # The head's ΔW is the embedding's: (B·A)ᵀ = Aᵀ·Bᵀ.
                _, scaling = self._matcher.rank_and_scaling(self._targets.keys[head])
                lora[head] = LoraFactors(a=lora[embedding].b.T, b=lora[embedding].a.T, scaling=scaling)
        return lora

    @cached_property
    def _saved(self) -> dict[str, SavedModule]:
        parameters: dict[str, dict[str, Tensor]] = {}
        for (name, parameter), tensor in self._placed.parameters.items():
            parameters.setdefault(name, {})[parameter] = tensor
        own = self._saved_leaves()
        for head, embedding in self._layout.tied.items():
            if self._matcher.ties_saved and embedding in parameters:
                parameters.setdefault(head, parameters[embedding])
                continue
            # What PEFT loads straight into a shared weight, without a copy for the adapter, both ends see.
            for one, other in ((head, embedding), (embedding, head)):
                if one in parameters and one not in own and other not in parameters:
                    parameters[other] = {"weight": parameters[one]["weight"]}
        return {name: SavedModule(parameters=found) for name, found in sorted(parameters.items())}

    def _materialised(
        self,
        saved: Mapping[str, SavedModule],
        targeted: Mapping[str, Mapping[str, Tensor]],
        method: Method,
        materialiser: Materialiser | None,
    ) -> dict[str, SavedModule]:
        """The leaves that the config's method changes, of those ``targeted``."""
        if materialiser is None:
            raise UnsupportedAdapter(
                f"{method.name} changes the base's own weights, which are not at hand here; name the base's "
                "checkpoint.",
                option="peft_type",
            )
        if both := sorted(set(targeted) - self._targets.required):
            raise UnsupportedAdapter(
                f"The adapter has {method.name} inside modules that it saves in full: {listed(both)}. Train it with "
                "one of them.",
                modules=both,
            )
        materialiser.check_affordable(targeted, self._layout, method.name)
        found: dict[str, SavedModule] = {}
        for name, tensors in targeted.items():
            # PEFT writes an embedding's own weight beside what it trained, and loads that instead of the base's.
            carried = saved.get(name, NOT_SAVED).parameters
            own = {
                parameter: carried[parameter] if parameter in carried else materialiser.base(name, parameter)
                for parameter in self._layout.leaves[name].parameters
            }
            found[name] = self._layer(name).merged(tensors, own).in_dtype(materialiser.dtype)
        return found

    @cached_property
    def _token_rows(self) -> dict[str, TokenRows]:
        rows = {
            name: TokenRows(indices=torch.tensor(indices, dtype=torch.int64), rows=self._placed.tokens[name])
            for name, indices in self._trained_tokens().items()
        }
        for head, embedding in self._layout.tied.items():
            if embedding in rows and head not in rows:
                rows[head] = rows[embedding]
        return rows

    @cached_property
    def _heads(self) -> dict[str, Head]:
        found: dict[str, Head] = {}
        labels = read_labels(self._folder)
        for name in sorted({name for name, _ in self._placed.heads}):
            weight, bias = self._placed.heads[name, "weight"], self._placed.heads.get((name, "bias"))
            found[name] = Head(name=name, weight=weight, bias=bias, labels=_label_names(labels, weight.shape[0]))
        return found


def _with_rows(saved: SavedModule, rows: TokenRows) -> SavedModule:
    """PEFT's trained rows replace those of the weight that the adapter carries in full. Neither is rounded."""
    weight = saved.parameters["weight"]
    dtype = torch.promote_types(weight.dtype, rows.rows.dtype)
    replaced = weight.to(dtype, copy=True).index_copy_(0, rows.indices, rows.rows.to(dtype))
    return SavedModule(parameters={**saved.parameters, "weight": replaced})


def _label_names(labels: Mapping[str, str], count: int) -> tuple[str, ...]:
    if labels and set(labels) != {str(i) for i in range(count)}:
        raise ShapeMismatch(f"config.json names {len(labels)} labels; the head has {count}.", module="id2label")
    return tuple(labels.get(str(i), f"LABEL_{i}") for i in range(count))
