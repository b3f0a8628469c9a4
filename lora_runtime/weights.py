"""``AdapterWeights``: the one in-memory form of an adapter or a combination.

Names are canonical (``names.py``): the base's own module paths, e.g.
``model.language_model.layers.0.self_attn.q_proj``, ``model.visual.merger.mlp.0``,
``lm_head``. Everything is kept per *leaf* module (Linear, Embedding, norm, Conv),
because a leaf is linear in its own weights: what an adapter does to a leaf is a
sum of deltas, and sums of deltas combine.

Shape legend: R rank, I in_features, O out_features, V vocabulary, D embedding width,
N number of token rows, L labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

BaseParameter = Callable[[str, str], Tensor]
"""(leaf, parameter) → the base's own tensor W₀."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFactors:
    """Low-rank delta of one leaf, with its scaling resolved.

    ``kind == "linear"``: ``a`` is (R, I), ``b`` is (O, R), ΔW = scaling · b @ a, and an
    optional ``bias`` (O,) adds scaling · bias to the output (PEFT's ``lora_bias``).
    A convolution whose kernel equals its stride is a Linear on the flattened patch:
    its factors are stored flattened.

    ``kind == "embedding"``: ``a`` is (R, V), ``b`` is (D, R), ΔW = scaling · (b @ a)ᵀ of shape (V, D).

    ``scaling`` is alpha/r, or alpha/√r with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732),
    after rank and alpha patterns.
    """

    a: Tensor
    b: Tensor
    scaling: float
    kind: Literal["linear", "embedding"] = "linear"
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """ΔW in fp32, in the base weight's orientation: (O, I), or (V, D) for an embedding."""
        product = (self.b.float() @ self.a.float()) * self.scaling
        return product.T if self.kind == "embedding" else product


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedModule:
    """Parameters of one leaf carried in full: ``weight`` and/or ``bias``, in the base's shapes.

    A parameter that is absent stays the base's. ``bias`` alone is what PEFT's
    ``bias="all"`` / ``"lora_only"`` saves.
    """

    parameters: Mapping[str, Tensor]

    def in_dtype(self, dtype: torch.dtype) -> SavedModule:
        """The same, rounded to ``dtype`` where that is narrower."""
        return SavedModule(parameters={name: tensor.to(dtype) for name, tensor in self.parameters.items()})


NOT_SAVED = SavedModule(parameters={})
"""What an adapter carries of a leaf that it leaves alone."""


def is_shift(saved: SavedModule) -> bool:
    """Whether ``saved`` changes a bias alone. Engines keep that as a difference from the base's, which no dtype takes
    much of, where a weight is kept as a whole."""
    return set(saved.parameters) == {"bias"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of an embedding (or tied head) carried in full: PEFT's ``trainable_token_indices``.

    ``indices`` (N,) int64, distinct; ``rows`` (N, D) replace the base's rows.
    """

    indices: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """A saved module that the base does not have: a classifier on the last hidden state.

    ``weight`` (L, H), ``bias`` (L,) or None; ``labels`` has L names.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    labels: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of its tensors, as stored."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def cloned(self) -> Head:
        """A copy that shares no memory with this one."""
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())


def _frozen(mapping: Mapping[str, object]) -> Mapping[str, object]:
    return MappingProxyType(dict(mapping))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """What an adapter does to the base, leaf by leaf; see the module docstring.

    ``version`` is the sha256 of the content it came from (or of the recipe, for a combination). ``method`` is the
    PEFT method it was trained with; what other methods than "LORA" do to a leaf is held in ``saved``.
    """

    version: str
    method: str = "LORA"
    lora: Mapping[str, LoraFactors] = field(default_factory=dict)
    saved: Mapping[str, SavedModule] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lora", "saved", "token_rows", "heads"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @property
    def modules(self) -> frozenset[str]:
        """Leaves of the base that this adapter changes."""
        return frozenset(self.lora) | frozenset(self.saved) | frozenset(self.token_rows)

    @property
    def touches_vision(self) -> bool:
        """Whether an image's encoding depends on this adapter."""
        return touches_vision(self.modules)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def cloned(self) -> AdapterWeights:
        """A copy that shares no memory with this one, in particular no mapped file."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        def saved(module: SavedModule) -> SavedModule:
            return SavedModule(parameters={name: tensor.clone() for name, tensor in module.parameters.items()})

        return AdapterWeights(
            version=self.version,
            method=self.method,
            lora={name: replace(f, a=f.a.clone(), b=f.b.clone(), bias=copy(f.bias)) for name, f in self.lora.items()},
            saved={name: saved(module) for name, module in self.saved.items()},
            token_rows={
                name: TokenRows(indices=rows.indices.clone(), rows=rows.rows.clone())
                for name, rows in self.token_rows.items()
            },
            heads={name: head.cloned() for name, head in self.heads.items()},
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor held, in no particular order."""
        found: list[Tensor] = []
        for factors in self.lora.values():
            found += [factors.a, factors.b] + ([] if factors.bias is None else [factors.bias])
        for module in self.saved.values():
            found += list(module.parameters.values())
        for rows in self.token_rows.values():
            found += [rows.indices, rows.rows]
        for head in self.heads.values():
            found += [head.weight] + ([] if head.bias is None else [head.bias])
        return found


def touches_vision(modules: Iterable[str]) -> bool:
    """Whether one of ``modules`` has a part in an image's encoding."""
    return any(".visual." in f".{name}" for name in modules)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())
