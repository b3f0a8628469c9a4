"""A merge as a job: what is asked for, and the plan that is made of it before anything is done. Imports no torch.

A plan is a value: it prints, is kept as JSON, and its id says what the result depends on and nothing else. So work that
was done for a plan of the same id need not be done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_runtime.errors import MergeRefused
from lora_runtime.merge.methods import METHODS_OF
from lora_runtime.merge.recipe import EXACT, Part, Recipe
from lora_runtime.merge.search import Search

Product = Literal["adapter", "checkpoint"]
Dtype = Literal["float32", "bfloat16", "float16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class Verify(Part):
    """What is asked of a result before it is published. That all is finite, that each tensor which is to change does,
    and that all else is the base's byte for byte, is always asked.

    ``probes``: run the result and the base on text and images, as transformers and PEFT load them; holds one model in
    memory at a time. ``allow_lost``: publish though tensors are as they were, since the dtype cannot hold their change.
    """

    probes: bool = True
    allow_lost: bool = False


class JobRecipe(Recipe):
    """A recipe, what is to come of it, and under which name.

    ``product``: ``adapter`` for one PEFT adapter, which needs none of the base's weights but for saved modules;
    ``checkpoint`` for the base with everything added in, in the base's own shards and dtype. ``dtype``: of an adapter.
    ``activate``: whether the bare name means the new version from now on, where it is an adapter's already.
    ``allow_other_bases``: merge adapters whose configurations name different bases. ``search``: weights are looked for
    first, and those of ``inputs`` are where the search starts.
    """

    name: str = Field(pattern=NAME)
    product: Product = "adapter"
    dtype: Dtype = "float32"
    activate: bool = True
    allow_other_bases: bool = False
    verify: Verify = Verify()
    search: Search | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> JobRecipe:
        if self.product == "checkpoint" and self.dtype != "float32":
            raise ValueError("a checkpoint keeps the dtypes of its base; 'dtype' is an adapter's")
        if self.search is not None and not all(isinstance(found.weight, int | float) for found in self.inputs):
            raise ValueError("'search' looks for one weight an adapter, so inputs take a number or nothing")
        if self.search is not None and self.method not in (*EXACT, "svd"):
            raise ValueError("'search' tries sums of adapters, as engines serve them; merge by cat, linear or svd")
        return self

    @property
    def arithmetic(self) -> Recipe:
        """What the result's values depend on."""
        return Recipe.model_validate(self.model_dump(include=set(Recipe.model_fields)))

    def weighing(self, weights: dict[str, float]) -> JobRecipe:
        """The same with these weights, by adapter, and nothing left to search for."""
        inputs = [{"adapter": found.adapter, "weight": weights[found.adapter]} for found in self.inputs]
        return JobRecipe.model_validate({**self.model_dump(), "inputs": inputs, "search": None})


class PlannedInput(Part):
    """An adapter that goes in. ``adapter``: as the recipe names it; ``location``: a folder, or the store's address."""

    adapter: str
    version: str
    location: str
    method: str
    num_bytes: int
    max_rank: int
    num_leaves: int
    base_name: str = ""


class PlannedBase(Part):
    """``revision``: sha256 over the configuration, and over the name, size and header of every shard."""

    name: str
    path: str
    revision: str
    num_bytes: int


class Unit(Part):
    """What one task does: an output shard of ``file``, or a part of an adapter.

    ``leaves``: those whose low-rank parts or saved parameters are made in it. ``num_bytes``: about how many it writes.
    """

    name: str
    file: str
    num_bytes: int
    leaves: tuple[str, ...]


class Plan(Part):
    """Everything that is known before the first task. ``version``: the recipe's, over its inputs' versions.

    ``memory_bytes`` a unit's task may need; ``probe_bytes`` the probes', 0 where there are none. ``disk_bytes``: of
    the place where the result is staged. ``search``: how the recipe's weights were found, where they were searched for.
    """

    recipe: JobRecipe
    version: str
    base: PlannedBase
    inputs: tuple[PlannedInput, ...]
    units: tuple[Unit, ...]
    output_bytes: int
    disk_bytes: int
    memory_bytes: int
    probe_bytes: int
    warnings: tuple[str, ...] = ()
    search: dict[str, Any] | None = None

    @field_validator("recipe", mode="before")
    @classmethod
    def _of_an_earlier_release(cls, recipe: Any) -> Any:
        """Plans that were kept before options without effect were left out have all of them, at their defaults."""
        if not isinstance(recipe, dict):
            return recipe
        fields, method = JobRecipe.model_fields, recipe.get("method")
        return {
            name: value
            for name, value in recipe.items()
            if method in METHODS_OF.get(name, (method,)) or value != fields[name].default
        }

    @property
    def id(self) -> str:
        """sha256 of what the result's bytes depend on."""
        content = {
            "version": self.version,
            "product": self.recipe.product,
            "dtype": self.recipe.dtype,
            "base": self.base.revision,
            "units": [[unit.name, unit.file, sorted(unit.leaves)] for unit in self.units],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the inputs, by the names that the recipe has for them."""
        return {found.adapter: found.version for found in self.inputs}


def refused(problems: Sequence[str]) -> MergeRefused:
    """The error that lists ``problems``."""
    numbered = problems[0] if len(problems) == 1 else " ".join(f"({n}) {p}" for n, p in enumerate(problems, 1))
    return MergeRefused(f"The merge cannot be done: {numbered}", problems=list(problems))
