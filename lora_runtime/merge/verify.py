"""A merge's result, loaded as its users will load it and asked, before it is published: does it do what was meant?

The oracle is the base with the expected adapter added into its weights, on text and on text around an image. What a
file holds byte for byte is checked elsewhere; here is what needs a model. One model is held at a time, on the CPU:
4 bytes per parameter of the base in fp32, 2 in bf16, and beside it the logits of some 200 positions, four times.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_runtime.checkpoint import read_adapter
from lora_runtime.dense import add_into
from lora_runtime.errors import AdapterMissing, AdapterRejected, NotFound, VerificationFailed
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.changes import AdapterChanges
from lora_runtime.merge.expected import distances, expected_of, lost_changes
from lora_runtime.merge.probes import answers, probes_of
from lora_runtime.merge.reload import check_files, load, load_adapted, load_merged
from lora_runtime.merge.verdict import ProbeReport, Reference, judged, rounding_warnings, tolerance_of
from lora_runtime.names import listed
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights, BaseParameter

__all__ = ["ProbeReport", "check_adapter", "expected_of", "rounding_warnings", "verify_adapter", "verify_checkpoint"]

SAME, NEAR = 1e-5, 1e-3
"""How far a module may be from what was meant, relative to it, to be the same but for the last bits; and to be the same
but for what a merge in fp32 drops as rounding: singular values below 2e-3 of the largest, in the largest matrices."""


def check_adapter(
    result: Path, layout: BaseLayout, expected: AdapterWeights, base: BaseParameter
) -> tuple[AdapterWeights, list[str]]:
    """What the PEFT folder ``result`` reads as, and warnings of what its dtype rounds. Needs no model.

    Raises VerificationFailed unless it reads at all, finite and complete, and is ``expected`` leaf by leaf.
    """
    try:
        read = read_adapter(result, layout)
    except (AdapterRejected, AdapterMissing) as error:
        raise VerificationFailed(
            f"The merged adapter cannot be read back: {error.message}", check="read", **error.facts
        ) from error
    return read, _compare(expected, read, layout, base)


def verify_adapter(
    result: Path, base_path: Path, expected: AdapterWeights, *, dtype: torch.dtype = torch.float32
) -> ProbeReport:
    """Check the PEFT folder ``result``: read here and loaded by PEFT on the base, it must be ``expected``.

    Its tensors are compared first, leaf by leaf, up to the rounding of the dtype they are stored in; then PEFT's
    answers in ``dtype`` with those of the base and ``expected``. Heads are compared and loaded, and not run. Holds one
    model in ``dtype`` and the adapter. Raises VerificationFailed, with the report among its facts where there is one.
    """
    tolerance = tolerance_of(dtype)
    read, warnings = check_adapter(result, BaseLayout.from_config(base_path), expected, BaseParameters(base_path))
    # What is stored in a narrower dtype answers as that, and was found above to be near enough to what was meant.
    reference = _reference(base_path, read if warnings else expected, dtype, as_stored=False)
    model: Any = load_adapted(result, base_path, dtype, expected.heads)
    if expected.heads:
        warnings.append(
            f"The head {listed(sorted(expected.heads))} is as expected and PEFT loads it, but no probe runs it: its "
            "scores are its own arithmetic on hidden states that were compared."
        )
    return judged(model, reference, tolerance, warnings, f"peft {version('peft')}, {_transformers()}")


def verify_checkpoint(
    result: Path,
    base_path: Path,
    expected: AdapterWeights,
    *,
    dtype: torch.dtype = torch.float32,
    allow_lost: bool = False,
) -> ProbeReport:
    """Check the checkpoint ``result``: loaded by transformers it must be the base with ``expected`` added, rounded once
    to the dtype of each of the base's tensors, and beside its weights it must have the base's files.

    Answers are computed in ``dtype``; fp32 tells most, whatever is stored. Heads are no part of a checkpoint.
    ``allow_lost``: that the stored dtype rounds all of the change away is a warning. Holds one model in ``dtype`` and
    the adapter. Raises VerificationFailed, with the report among its facts where there is one.
    """
    tolerance = tolerance_of(dtype)
    check_files(result, base_path)
    reference = _reference(base_path, expected, dtype, as_stored=True)
    model = load_merged(result, dtype, reference.faults)
    warnings = [
        f"The base itself loads with {len(names)} {kind.replace('_', ' ')} ({listed(names, 3)}), and so does the merge."
        for kind, names in reference.faults.items()
    ]
    return judged(model, reference, tolerance, warnings, _transformers(), allow_lost=allow_lost)


def _compare(expected: AdapterWeights, read: AdapterWeights, layout: BaseLayout, base: BaseParameter) -> list[str]:
    """Warnings of what is rounded. Raises VerificationFailed for what differs by more."""
    found = distances(expected, read, layout)
    eps = max((torch.finfo(t.dtype).eps for t in read.tensors() if t.is_floating_point()), default=0.0)
    limit = NEAR + eps
    wrong = sorted((leaf for leaf in found if not found[leaf] <= limit), key=found.__getitem__, reverse=True)
    if wrong:
        raise VerificationFailed(
            f"The written adapter is not the merged one: {len(wrong)} of {len(found)} modules differ, "
            f"{wrong[0]} by {found[wrong[0]]:.2g} of it, where rounding may by {limit:.1g}. Write it again.",
            check="tensors",
            modules=wrong[:64],
        )
    if (worst := max(found.values(), default=0.0)) <= SAME:
        return []
    lost = {leaf: share for leaf, share in lost_changes(expected, read, layout, base).items() if found[leaf] > SAME}
    most = max(lost, key=lost.__getitem__, default="")
    if most and eps <= SAME and lost[most] > NEAR:
        raise VerificationFailed(
            f"The written adapter is not the merged one: of what changes in '{most}' {lost[most]:.0%} is lost, where "
            "the dtype that it is stored in rounds next to nothing. Write it again.",
            check="tensors",
            modules=sorted(lost, key=lost.__getitem__, reverse=True)[:64],
        )
    said = f"What is stored is up to {worst:.2g} of a module away from what was meant"
    if most:
        said += f", and up to {lost[most]:.0%} of the change of one that is carried in full ('{most}')"
    return [f"{said}: its dtype rounds it."]


def _reference(base_path: Path, expected: AdapterWeights, dtype: torch.dtype, *, as_stored: bool) -> Reference:
    model, faults = load(base_path, dtype)
    probes = probes_of(model.config, _tokens(expected))
    base = answers(model, probes)
    add_into(model, expected)
    exact = answers(model, probes)
    is_zero = _settle(model, BaseParameters(base_path), expected, as_stored=as_stored)
    rounded = answers(model, probes) if as_stored else exact
    model.to("meta")  # the next one needs the memory now, and import machinery may hold on to this one's frame
    return Reference(probes=probes, base=base, exact=exact, expected=rounded, is_zero=is_zero, faults=faults)


@torch.no_grad()
def _settle(model: Any, base: BaseParameters, expected: AdapterWeights, *, as_stored: bool) -> bool:
    """Whether nothing in the model, to which ``expected`` was added, is other than in the base. ``as_stored``: what was
    added to is rounded to the dtype in which the base holds it."""
    is_zero = True
    for leaf, name in sorted(AdapterChanges(expected).places):
        parameter = model.get_parameter(f"{leaf}.{name}")
        try:
            own = base(leaf, name)
        except NotFound:  # a bias that the base does not have
            is_zero &= not parameter.any()
            continue
        is_zero &= torch.equal(parameter, own.to(parameter.dtype))
        if as_stored:
            parameter.copy_(parameter.to(own.dtype))
    return is_zero


def _tokens(expected: AdapterWeights) -> list[int]:
    """Ids that are trained by themselves: text without them would not show it."""
    return sorted({token for rows in expected.token_rows.values() for token in rows.indices.tolist()})


def _transformers() -> str:
    return f"transformers {version('transformers')}"
