"""Making a plan: everything that can be refused is refused here, all of it at once, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.checkpoint import OpenedAdapter
from lora_runtime.checkpoint import problems_of as problems_in
from lora_runtime.errors import AdapterMissing, AdapterRejected, CheckpointRejected, LoomError
from lora_runtime.folder import CONFIG_NAME, read_json, tensors_file
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.merge.agreement import MAX_VALUES
from lora_runtime.merge.base import BaseCheckpoint
from lora_runtime.merge.changes import check_all_land
from lora_runtime.merge.inputs import Inputs
from lora_runtime.merge.job import JobRecipe, Plan, PlannedBase, PlannedInput, Unit, refused
from lora_runtime.merge.patterns import idle, unmatched
from lora_runtime.merge.relations import Relations, bias_warnings, problems_of, relations, warnings_of
from lora_runtime.names import listed
from lora_runtime.parameters import BaseParameters

PART_BYTES = 512 << 20
"""Of low-rank factors that one task merges; most adapters are less, and are one part."""
WORKING_BYTES = 700 << 20
"""What a task needs whatever it merges: its process with torch loaded, and the blocks that pass through."""
MANIFEST_BYTES = 16 << 20
CHECK_BYTES = 48
"""For each entry of the dense deltas of a leaf that is checked against its method's statement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """An input of a recipe: what it is called there, which content it is, where that lies, and a folder of it here."""

    adapter: str
    version: str
    location: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A base and a recipe's adapters, open."""

    base: BaseCheckpoint
    layout: BaseLayout
    adapters: Mapping[str, OpenedAdapter]

    def inputs(self, recipe: JobRecipe) -> Inputs:
        return Inputs(recipe.arithmetic, self.adapters, BaseParameters(self.base.folder), self.layout)


def opened(base_path: str | Path, located: Sequence[Located], *, max_materialised_bytes: int) -> Opened:
    """Raises MergeRefused with every reason why the base or an adapter cannot be read."""
    base = _base(base_path)
    layout = BaseLayout.from_config(base.folder)
    materialiser = Materialiser(BaseParameters(base.folder), max_materialised_bytes)
    problems: list[str] = []
    adapters: dict[str, OpenedAdapter] = {}
    for one in located:
        try:
            found = OpenedAdapter(one.folder, layout, materialiser)
        except (AdapterRejected, AdapterMissing):
            problems += [f"'{one.adapter}': {problem.message}" for problem in problems_in(one.folder, layout)]
            continue
        if found.version != one.version:
            problems.append(f"'{one.adapter}' has other content than when it was registered: its files were changed.")
        adapters[one.adapter] = found
    if problems:
        raise refused(problems)
    return Opened(base=base, layout=layout, adapters=adapters)


def plan_of(
    recipe: JobRecipe, located: Sequence[Located], found: Opened, *, base_name: str, part_bytes: int = PART_BYTES
) -> Plan:
    """Raises MergeRefused. The disk and the cluster are looked at by who knows them."""
    inputs = found.inputs(recipe)
    planned = [_input(one, found.adapters[one.adapter]) for one in located]
    problems = _problems(recipe, planned, found, inputs)
    ranks = _ranks(recipe, found, inputs)
    seen = Relations()
    if recipe.search is None and not problems:
        seen = relations(recipe, inputs, found.layout, ranks)
        problems = problems_of(recipe, seen, is_all=_is_low_rank(found, inputs, ranks))
    if problems:
        raise refused(problems)
    base = PlannedBase(
        name=base_name,
        path=str(found.base.folder),
        revision=found.base.revision,
        num_bytes=found.base.num_bytes,
    )
    is_checkpoint = recipe.product == "checkpoint"
    units = _shards(found, inputs) if is_checkpoint else _parts(recipe, found, part_bytes)
    output_bytes = found.base.num_bytes if is_checkpoint else sum(unit.num_bytes for unit in units)
    return Plan(
        recipe=recipe,
        version=inputs.version,
        base=base,
        inputs=tuple(planned),
        units=units,
        output_bytes=output_bytes,
        # Parts of an adapter are staged beside the adapter that is made of them.
        disk_bytes=(1 if is_checkpoint else 2) * output_bytes + MANIFEST_BYTES,
        memory_bytes=_memory(recipe, found, units),
        probe_bytes=_probe_bytes(found) if recipe.verify.probes else 0,
        warnings=(
            *_warnings(recipe, found, planned),
            *_passed_over(recipe, found, ranks),
            *warnings_of(recipe, seen),
            *(() if is_checkpoint else bias_warnings(recipe, inputs, found.layout, ranks)),
        ),
    )


def _base(path: str | Path) -> BaseCheckpoint:
    try:
        return BaseCheckpoint(path)
    except CheckpointRejected as error:
        raise refused([error.message]) from error


def _problems(recipe: JobRecipe, planned: Sequence[PlannedInput], found: Opened, inputs: Inputs) -> list[str]:
    problems = _of_bases(recipe, planned) + _of_heads(recipe, found)
    same = {one.version: one.adapter for one in planned}
    if len(same) < len(planned):
        twice = next(one for one in planned if same[one.version] != one.adapter)
        problems.append(
            f"'{twice.adapter}' and '{same[twice.version]}' are one content under two names; add their weights up."
        )
    places = inputs.places
    heads = [(name, head) for name, adapter in found.adapters.items() for head in adapter.heads]
    if not heads and not any(adapter.modules for adapter in found.adapters.values()):
        problems.append("The adapters change nothing.")
    elif recipe.search is None and not places and not any(inputs.weight(*head) for head in heads):
        problems.append("Every weight is 0 where its adapter changes anything: the result would be the base.")
    known = {*found.layout.leaves, *(head for _, head in heads)}
    problems += [problem for said in recipe.inputs for problem in unmatched(said, known)]
    if unknown := found.base.unknown(found.layout.leaves):
        problems.append(
            f"The base's checkpoint holds tensors that its configuration's model lacks: {listed(unknown)}. "
            "Are shards and config.json of one model?"
        )
    if recipe.product == "checkpoint":
        problems += [
            f"The base ties '{head}' to '{found.layout.tied[head]}', and the adapters change one of them, or each in "
            "another way. Merge into an adapter, or untie the base first."
            for head in inputs.torn
        ]
        places = places - {(head, "weight") for head in inputs.torn}
        try:
            check_all_land(places, found.base.places.values())
        except LoomError as error:
            problems.append(error.message)
        if odd := found.base.unsummable(places):
            problems.append(
                f"The base stores {listed(odd)}, to which nothing can be added. Merge into the checkpoint that it was "
                "made of."
            )
    return problems


def _ranks(recipe: JobRecipe, found: Opened, inputs: Inputs) -> dict[str, list[int]]:
    """Of the low-rank parts that are merged, by leaf."""
    ranks: dict[str, list[int]] = {}
    for name, adapter in found.adapters.items():
        for leaf, rank in adapter.ranks.items():
            if recipe.search is not None or inputs.weight(name, leaf):
                ranks.setdefault(leaf, []).append(rank)
    return ranks


def _is_low_rank(found: Opened, inputs: Inputs, ranks: Mapping[str, Sequence[int]]) -> bool:
    """Whether the merge is low-rank parts of several adapters in each leaf, without biases, and nothing else."""
    heads = any(inputs.weight(name, head) for name, adapter in found.adapters.items() for head in adapter.heads)
    changed = inputs.places | {(leaf, "weight") for leaf in found.layout.tied if leaf in ranks}
    return not heads and changed == {(leaf, "weight") for leaf, each in ranks.items() if len(each) > 1}


def _of_bases(recipe: JobRecipe, planned: Sequence[PlannedInput]) -> list[str]:
    said = {one.base_name.rstrip("/").rpartition("/")[2]: one for one in planned if one.base_name}
    if len(said) < 2 or recipe.allow_other_bases:
        return []
    shown = ", ".join(f"'{one.adapter}' on '{one.base_name[:128]}'" for one in said.values())
    return [
        f"The adapters say that they were trained on different bases: {shown}. Deltas mean something on their own base "
        "only; if it is one base under two names, say allow_other_bases."
    ]


def _of_heads(recipe: JobRecipe, found: Opened) -> list[str]:
    problems: list[str] = []
    labels: dict[str, tuple[str, tuple[str, ...]]] = {}
    for adapter, opened_adapter in found.adapters.items():
        for name, head in opened_adapter.heads.items():
            if recipe.product == "checkpoint":
                problems.append(
                    f"'{adapter}' has the head '{name}', for which the base's checkpoint has no place. Merge into an "
                    "adapter."
                )
            first, known = labels.setdefault(name, (adapter, head.labels))
            if known != head.labels:
                problems.append(
                    f"The heads '{name}' of '{first}' and '{adapter}' have different labels: {listed(known)}; "
                    f"{listed(head.labels)}."
                )
    return problems


def _input(one: Located, adapter: OpenedAdapter) -> PlannedInput:
    said = read_json(one.folder / CONFIG_NAME).get("base_model_name_or_path")
    factors = adapter.ranks
    return PlannedInput(
        adapter=one.adapter,
        version=one.version,
        location=one.location,
        method=adapter.method,
        num_bytes=tensors_file(one.folder).stat().st_size,
        max_rank=max(factors.values(), default=0),
        num_leaves=len(adapter.modules),
        base_name=said if isinstance(said, str) else "",
    )


def _shards(found: Opened, inputs: Inputs) -> tuple[Unit, ...]:
    changed = inputs.places
    return tuple(
        Unit(
            name=shard.file,
            file=shard.file,
            num_bytes=shard.num_bytes,
            leaves=tuple(sorted({leaf for leaf, _ in shard.touched(changed).values()})),
        )
        for shard in found.base.shards
    )


def _parts(recipe: JobRecipe, found: Opened, part_bytes: int) -> tuple[Unit, ...]:
    """Leaves in order, cut where what they become is ``part_bytes`` in fp32."""
    leaves = sorted({leaf for adapter in found.adapters.values() for leaf in adapter.modules})
    groups: list[tuple[list[str], int]] = [([], 0)]
    for leaf in leaves:
        size = _leaf_bytes(recipe, found, leaf)
        names, so_far = groups[-1]
        if names and so_far + size > part_bytes:
            groups.append(([leaf], size))
        else:
            names.append(leaf)
            groups[-1] = (names, so_far + size)
    return tuple(
        Unit(name=f"part-{number:05d}", file=f"part-{number:05d}.safetensors", num_bytes=size, leaves=tuple(names))
        for number, (names, size) in enumerate(groups)
    )


def _leaf_bytes(recipe: JobRecipe, found: Opened, leaf: str) -> int:
    """Of what becomes of a leaf, in fp32."""
    shape = found.layout.leaves[leaf]
    rank = sum(adapter.ranks.get(leaf, 0) for adapter in found.adapters.values())
    if recipe.rank is not None:
        rank = min(rank, recipe.rank)
    size = rank * (shape.in_features + shape.out_features)
    carried = {name for adapter in found.adapters.values() for at, name in adapter.places if at == leaf}
    if any(leaf not in adapter.ranks for adapter in found.adapters.values() if leaf in adapter.modules):
        size += sum(_numel(shape.parameters[name]) for name in carried)
    return 4 * size


def _memory(recipe: JobRecipe, found: Opened, units: Sequence[Unit]) -> int:
    """Of a unit's task. Rules in the space ``full`` hold every adapter's dense delta of one leaf, several times over;
    what is materialised is held for one leaf at a time; an adapter is held as a whole while it is written."""
    leaves = [found.layout.leaves[leaf] for unit in units for leaf in unit.leaves]
    largest = max((leaf.in_features * leaf.out_features for leaf in leaves), default=0)
    factors = max((_leaf_bytes(recipe, found, leaf) for unit in units for leaf in unit.leaves), default=0)
    needed = WORKING_BYTES + 4 * factors
    if recipe.space == "full":
        needed += 4 * largest * (3 * len(recipe.inputs) + 4)
        needed += CHECK_BYTES * min(MAX_VALUES, len(recipe.inputs) * largest)
    if any(adapter.method != "LORA" for adapter in found.adapters.values()):
        needed += 4 * largest * 4
    if recipe.product == "adapter":
        needed += 2 * sum(unit.num_bytes for unit in units)
    return needed


def _probe_bytes(found: Opened) -> int:
    """One model in fp32, and the process around it."""
    return WORKING_BYTES + 4 * sum(_numel(p) for leaf in found.layout.leaves.values() for p in leaf.parameters.values())


def _passed_over(recipe: JobRecipe, found: Opened, ranks: Mapping[str, Sequence[int]]) -> list[str]:
    """Of modules that are too large to be checked against the method's independent statement."""
    if recipe.space != "full":
        return []
    shapes = {leaf: found.layout.leaves[leaf] for leaf in ranks}
    large = [x for x in ranks if len(ranks[x]) * shapes[x].in_features * shapes[x].out_features > MAX_VALUES]
    if not large:
        return []
    return [
        f"In the space 'full', {len(large)} of {len(ranks)} modules have more than {MAX_VALUES:,} entries in all "
        "adapters together: the merge of those is not held against a second statement of the method, as in the core."
    ]


def _warnings(recipe: JobRecipe, found: Opened, planned: Sequence[PlannedInput]) -> list[str]:
    warnings = [
        f"'{one.adapter}' is {one.method}: what it makes of the base is merged as weights in full."
        for one in planned
        if one.method != "LORA"
    ]
    for said in recipe.inputs:
        adapter = found.adapters[said.adapter]
        if unused := idle(said, {*adapter.modules, *adapter.heads}):
            warnings.append(f"'{said.adapter}' changes no module that {listed(unused)} decides about.")
    total = sum(one.max_rank for one in planned)
    if recipe.method == "svd" and (recipe.rank or max(one.max_rank for one in planned)) < total:
        warnings.append("A truncated merge loses what its rank cannot hold; the report says how much of each leaf.")
    if recipe.method == "cat" and total > 256:
        warnings.append(f"The result has ranks up to {total}; engines may bound them. 'svd' is the same at a rank.")
    return warnings


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
