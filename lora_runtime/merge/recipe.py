"""What a merge is to be, checked as a whole before anything is read. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from lora_runtime.merge.methods import FULL_SEMANTICS, METHODS_OF, SEMANTICS, Convention, Options

MAX_INPUTS = 64
MAX_PATTERNS = 256
EXACT = ("cat", "linear")
"""Methods that lose nothing, whatever their space."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)(?:\.|$)")

Number = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Gradient = Annotated[tuple[Number, ...], Field(fail_fast=True, min_length=2, max_length=256)]
Method = Literal[
    "cat",
    "linear",
    "svd",
    "magnitude_prune",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "breadcrumbs",
    "tsv",
    "core_tsv",
    "iso_c",
    "robust_merge",
    "slerp",
    "karcher",
]


class Part(BaseModel):
    """A piece of a recipe: unknown fields are errors, and nothing is changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleWeight(Part):
    """A weight for the leaves whose names match ``modules`` (``*.self_attn.*``)."""

    modules: str = Field(min_length=1, max_length=256)
    weight: Number | Gradient


ByModules = Annotated[tuple[ModuleWeight, ...], Field(fail_fast=True, max_length=MAX_PATTERNS)]


class Input(Part):
    """An adapter and its weight: a number; several, spread evenly over the layers from first to last; or by modules,
    the first that matches (1 where none does). Leaves outside of any layer take a spread's first number. Where its
    weight is 0, an adapter has no part in the merge, whatever the method."""

    adapter: str = Field(min_length=1, max_length=4096)
    weight: Number | Gradient | ByModules = 1.0

    @property
    def by_modules(self) -> tuple[ModuleWeight, ...]:
        """Its weights by modules; none where it has one weight for all, or one for each layer."""
        weight = self.weight if isinstance(self.weight, tuple) else ()
        return tuple(part for part in weight if isinstance(part, ModuleWeight))

    def weight_at(self, leaf: str, num_layers: int) -> float:
        """``num_layers`` of the stack that ``leaf`` is in."""
        weight = self.weight
        if by_modules := self.by_modules:
            weight = next((part.weight for part in by_modules if fnmatchcase(leaf, part.modules)), 1.0)
        if isinstance(weight, float | int):
            return float(weight)
        return _along(tuple(float(value) for value in weight), leaf, num_layers)  # type: ignore[arg-type]


class Recipe(Part):
    """``method`` over ``inputs``; ``space``: where rules look at entries, the small core or the whole matrices.

    ``core_tsv`` is ``tsv`` in the core, as Core Space's authors pair them (arXiv 2509.17786), ``svd`` is ``linear`` at
    a rank, and ``slerp`` is ``karcher`` of two.

    What the method makes of low-rank parts counts ``scale`` times (λ of the papers). It is of ``rank`` at most where
    the method is not exact: if none is given, the largest of the inputs' for ``svd``, and otherwise all that there is.
    Everything random follows from ``seed`` and from the tensor's name. Options that have no effect on the method are
    refused where they are set, and are no part of what is dumped.
    """

    method: Method
    inputs: tuple[Input, ...] = Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)
    space: Literal["core", "full"] = "core"
    rank: int | None = Field(default=None, ge=1, le=16384)
    density: float = Field(default=0.5, gt=0, le=1)
    epsilon: float = Field(default=0.2, ge=0, lt=1)
    gamma: float = Field(default=0.01, ge=0, lt=1)
    scale: Number = 1.0
    convention: Convention = "loom"
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        names = [found.adapter for found in self.inputs]
        if len(set(names)) < len(names):
            raise ValueError("an adapter is named twice; add its weights up")
        if self.method in EXACT and self.rank is not None:
            raise ValueError(f"'{self.method}' is exact and takes no rank; 'svd' is the same at a rank")
        if self.method == "slerp" and len(self.inputs) != 2:
            raise ValueError("'slerp' takes two adapters; 'karcher' is the same for more")
        self._check_options()
        self._check_weights()
        spread = self.epsilon / (1 if self.convention == "mergekit" else 2)
        if self.method == "della" and self.density < 1 and not spread < min(self.density, 1 - self.density):
            half = "" if self.convention == "mergekit" else "/2"
            raise ValueError(f"'epsilon' must be small enough that density ± epsilon{half} stays between 0 and 1")
        return self

    def _check_options(self) -> None:
        if self.method == "core_tsv" and self.space != "core":
            raise ValueError("'core_tsv' is 'tsv' in the core space; leave 'space' out")
        for option, methods in METHODS_OF.items():
            if option in self.model_fields_set and self.method not in methods:
                having = ", ".join(methods)
                raise ValueError(f"'{option}' has no effect on '{self.method}', but on {having}; leave it out")
        if self.method == "della" and self.convention == "peft":
            raise ValueError("PEFT has no 'della'; leave 'convention' out, or take 'mergekit'")

    def _check_weights(self) -> None:
        if not self.scale:
            raise ValueError("'scale' is 0, which would leave nothing of what is merged")
        if self.method in ("slerp", "karcher"):
            wrong = [
                found.adapter
                for found in self.inputs
                if any(value < 0 for value in _values(found)) or (not found.by_modules and 0 in _values(found))
            ]
            if wrong:
                raise ValueError(
                    f"'{self.method}' is a mean, and takes weights above 0 only, or 0 for some modules: '{wrong[0]}'"
                )
        if self.convention == "mergekit" and self.method in ("ties", "della"):
            negative = [found.adapter for found in self.inputs if any(value < 0 for value in _values(found))]
            if negative:
                raise ValueError(
                    f"'{self.method}' as mergekit does it divides by the signed sum of weights, which turns a negative "
                    f"one round or grows without bound: '{negative[0]}' has one. The convention 'loom' divides by the "
                    "sum of their sizes, and is the same where all are positive"
                )

    @model_serializer(mode="wrap")
    def _said(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what has no effect, so that what was dumped can be read again."""
        said: dict[str, Any] = dumped(self)
        return {name: value for name, value in said.items() if self.method in METHODS_OF.get(name, (self.method,))}

    def constant_weights(self) -> list[float]:
        """Every number that any input's weight is made of."""
        return [value for found in self.inputs for value in _values(found)]

    @property
    def rule(self) -> str:
        """The name in ``RULES`` of what the method does to deltas."""
        return {"cat": "linear", "svd": "linear", "slerp": "karcher", "core_tsv": "tsv"}.get(self.method, self.method)

    @property
    def semantics(self) -> str:
        """Grows when the same recipe would give another result."""
        return f"{self.method}/{SEMANTICS[self.rule]}"

    @property
    def options(self) -> Options:
        return Options(
            density=self.density,
            epsilon=self.epsilon,
            gamma=self.gamma,
            convention=self.convention,
        )

    def version(self, inputs: dict[str, str]) -> str:
        """Identity of the result: sha256 over the recipe, its semantics, and its ``inputs``' versions by name."""
        return hashlib.sha256(self.provenance(inputs).encode()).hexdigest()

    def provenance(self, inputs: dict[str, str]) -> str:
        """What the result's values follow from, as JSON: the same whatever the inputs' names and their order."""
        said = self.model_dump(mode="json")
        said["inputs"] = sorted([inputs[found["adapter"]], found["weight"]] for found in said["inputs"])
        return json.dumps({"recipe": said, "semantics": self.semantics, "full": FULL_SEMANTICS}, sort_keys=True)


def layer_of(leaf: str) -> tuple[str, int] | None:
    """The stack that a leaf is in and its place there: ``("model.visual.blocks", 3)``."""
    match = _LAYER.search(leaf)
    return None if match is None else (leaf[: match.start(1) - 1], int(match[1]))


def _along(values: tuple[float, ...], leaf: str, num_layers: int) -> float:
    place = layer_of(leaf)
    if place is None or num_layers < 2:
        return values[0]
    position = place[1] / (num_layers - 1) * (len(values) - 1)
    low = min(int(position), len(values) - 2)
    return values[low] + (position - low) * (values[low + 1] - values[low])


def _values(found: Input) -> list[float]:
    weights: list[object] = list(found.weight) if isinstance(found.weight, tuple) else [found.weight]
    values: list[float] = []
    for weight in weights:
        inner = weight.weight if isinstance(weight, ModuleWeight) else weight
        values += [float(value) for value in (inner if isinstance(inner, tuple) else (inner,))]
    return values
