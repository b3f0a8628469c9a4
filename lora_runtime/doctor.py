"""What is wrong with an adapter, what is odd about it, and what to do: for people and for machines.

Errors are what serving refuses. Warnings are what serves here and fails, or does nothing, silently elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_runtime.behaviour import Behaviour
from lora_runtime.checkpoint import OpenedAdapter, problems_of
from lora_runtime.config import AdapterConfig, read_config
from lora_runtime.effects import Effect, effect_of, share_lost
from lora_runtime.errors import AdapterMissing, AdapterRejected, LoomError
from lora_runtime.findings import Finding
from lora_runtime.folder import PICKLE_NAME
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.names import canonical, listed, shown, spellings, unwrapped
from lora_runtime.tensor_file import read_tensors
from lora_runtime.tensor_keys import parse_key
from lora_runtime.weights import AdapterWeights

_VOCABULARY_ENDS = ("embed_tokens.weight", "lm_head.weight", "embed_tokens.base_layer.weight")
LARGE = 1.0
"""‖Δ‖/‖W₀‖ above which an adapter replaces what a module knew rather than adding to it."""
ROUNDED = 0.05
"""Share of a change in full that an engine's dtype rounds away, above which that is said."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diagnosis:
    """All findings on one adapter, gravest first; ``weights`` where it can be served."""

    findings: tuple[Finding, ...]
    weights: AdapterWeights | None

    @property
    def is_servable(self) -> bool:
        return self.weights is not None


def diagnose(path: str | Path, layout: BaseLayout, materialiser: Materialiser) -> Diagnosis:
    """Examine the adapter in the folder ``path`` against a base. Raises nothing for what the folder holds.

    No engine is known here: what rounding takes is said of one that computes in the base's own dtype.
    """
    folder = Path(path)
    errors = [_refusal(error) for error in problems_of(folder, layout)]
    findings: list[Finding] = []
    weights = None
    if not errors:
        try:
            opened = OpenedAdapter(folder, layout, materialiser)
            weights = opened.weights()
            dtype = base_dtype(opened, materialiser)
            effects = [effect_of(leaf, weights, materialiser.base, dtype) for leaf in sorted(weights.modules)]
            findings = oddities(folder, opened, effects, layout, dtype, is_certain=False)
        except (AdapterRejected, AdapterMissing) as error:
            errors = [_refusal(error)]
    findings += errors + _vocabulary(folder, layout)
    return Diagnosis(findings=tuple(sorted(findings, key=_gravity)), weights=weights)


def base_dtype(opened: OpenedAdapter, materialiser: Materialiser) -> torch.dtype:
    """The dtype in which the base holds a weight that the adapter changes."""
    return next((materialiser.base(leaf, "weight").dtype for leaf in sorted(opened.modules)), torch.float32)


def oddities(
    folder: Path,
    opened: OpenedAdapter,
    effects: Sequence[Effect],
    layout: BaseLayout,
    dtype: torch.dtype,
    *,
    is_certain: bool,
) -> list[Finding]:
    """Warnings and notes on an adapter that was read. ``effects``: on each leaf, in an engine that computes in
    ``dtype``. ``is_certain``: that is the dtype of the engine that serves it, rather than a likely one."""
    return [
        *_names(folder, layout),
        *_effect(effects, opened),
        *_rounded(effects, dtype, is_certain=is_certain),
        *_tied(opened, layout),
        *_saved_names(read_config(folder), layout),
        *_files(folder),
        *_method(opened, effects),
    ]


def _refusal(error: LoomError) -> Finding:
    code = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    listed_modules = error.facts.get("unmatched") or error.facts.get("missing") or error.facts.get("modules") or ()
    return Finding(code=code, severity="error", message=error.message, modules=tuple(listed_modules)[:64])


def _gravity(finding: Finding) -> int:
    return ("error", "warning", "note").index(finding.severity)


def _names(folder: Path, layout: BaseLayout) -> Iterator[Finding]:
    """Tensors under names that PEFT does not look for on today's transformers."""
    named: list[str] = []
    doubled: list[str] = []
    old: list[str] = []
    for key in read_tensors(folder):
        readings = [reading for reading in parse_key(key) if canonical(reading.module) in layout.leaves]
        if not readings:
            continue
        module = readings[0].module
        if ".default." in f".{key}." or (key.count("modules_to_save.") and len(readings) > 1):
            named.append(key)
        if key.startswith("base_model.model.base_model."):
            doubled.append(key)
        if unwrapped(module) not in spellings(canonical(module))[:1]:
            old.append(key)
    silent = "PEFT loads such an adapter without a word, and leaves these tensors out."
    for code, keys, what in (
        ("adapter-name-in-keys", named, "hold an adapter's name, as PEFT keeps it in memory and never on disk"),
        ("doubled-prefix", doubled, "begin with PEFT's prefix twice: a PEFT model was wrapped again before saving"),
        ("old-names", old, "are named as another release of transformers named its modules"),
    ):
        if keys:
            yield Finding(
                code=code,
                severity="warning",
                message=f"{len(keys)} tensors {what}: {listed(keys, 3)}. {silent}",
                advice="They are read here as they are; --fix writes them under today's names.",
                modules=tuple(keys[:64]),
            )


def _effect(effects: Sequence[Effect], opened: OpenedAdapter) -> Iterator[Finding]:
    """Parts that do nothing, and parts that do very much."""
    sizes = {effect.leaf: effect.size for effect in effects}
    nothing = sorted(name for name, size in sizes.items() if size == 0.0)
    if sizes and len(nothing) == len(sizes) and not opened.heads:
        yield Finding(
            code="no-op",
            severity="warning",
            message=f"The adapter changes nothing: all of its {len(sizes)} modules do exactly what the base does.",
            advice="It was saved before it was trained, or B never got a gradient. Check the training.",
            modules=tuple(nothing[:64]),
        )
    elif nothing:
        yield Finding(
            code="idle-modules",
            severity="warning",
            message=f"{len(nothing)} of {len(sizes)} modules do exactly what the base does: {listed(nothing, 3)}.",
            advice="B is zero there, or what is saved equals the base. Some modules got no gradient in training.",
            modules=tuple(nothing[:64]),
        )
    large = sorted((name for name, size in sizes.items() if size > LARGE), key=sizes.__getitem__, reverse=True)
    if large:
        yield Finding(
            code="large-change",
            severity="note",
            message=f"{len(large)} modules change by more than their own size, {large[0]} by "
            f"{sizes[large[0]]:.1f} times.",
            advice="Alpha may be too high for the rank, or the adapter is of another base.",
            modules=tuple(large[:64]),
        )


def _rounded(effects: Sequence[Effect], dtype: torch.dtype, *, is_certain: bool) -> Iterator[Finding]:
    """Weights carried in full whose change is small beside what the engine's dtype can tell apart in them."""
    lost = sorted((effect for effect in effects if effect.share_lost > ROUNDED), key=lambda one: -one.share_lost)
    if lost:
        name = str(dtype).removeprefix("torch.")
        yield Finding(
            code="rounded-away",
            severity="warning" if is_certain else "note",
            message=f"{f'Served in {name}' if is_certain else f'An engine that computes in {name}'} loses "
            f"{share_lost(effects):.0%} of what the adapter changes in full weights (norm of the difference, relative "
            f"to the change): {len(lost)} modules lose more than {ROUNDED:.0%}, {lost[0].leaf} "
            f"{lost[0].share_lost:.0%}.",
            advice="Serve it with dtype float32, which loses nothing, or train it as LoRA, whose factors hold small "
            "changes in any dtype.",
            modules=tuple(effect.leaf for effect in lost[:64]),
        )


def _tied(opened: OpenedAdapter, layout: BaseLayout) -> Iterator[Finding]:
    for head, embedding in layout.tied.items():
        changed = {head, embedding} & opened.modules
        if len(changed) == 1:
            (only,) = changed
            other = embedding if only == head else head
            yield Finding(
                code="tied-weights",
                severity="warning",
                message=f"The base shares one weight between {head} and {embedding}; the adapter changes only {only}.",
                advice=f"Here {other} stays the base's. Tools that keep the two tied, such as PEFT's merge_and_unload, "
                "change both.",
                modules=(only,),
            )


def _saved_names(config: AdapterConfig, layout: BaseLayout) -> Iterator[Finding]:
    for name in config.saved_names:
        roots = [root for root in (*layout.leaves, *layout.containers) if root == name or root.endswith(f".{name}")]
        if len(roots) > 1:
            yield Finding(
                code="several-modules",
                severity="note",
                message=f"'{shown(name)}' of modules_to_save means {len(roots)} modules: {listed(roots, 3)}.",
                advice="PEFT matches by the end of a name. If one was meant, save the adapter with its full path.",
                modules=tuple(roots[:64]),
            )


def _vocabulary(folder: Path, layout: BaseLayout) -> list[Finding]:
    """A saved embedding or head of another length: tokens were added in training."""
    try:
        tensors = read_tensors(folder)
    except LoomError:
        return []
    ends: Mapping[str, int] = {
        key: tensor.shape[0] for key, tensor in tensors.items() if tensor.ndim == 2 and key.endswith(_VOCABULARY_ENDS)
    }
    wrong = {key: size for key, size in ends.items() if size != layout.vocab_size}
    if not wrong:
        return []
    sizes = sorted(set(wrong.values()))
    return [
        Finding(
            code="changed-vocabulary",
            severity="error",
            message=f"The adapter was trained with a vocabulary of {', '.join(map(str, sizes))} tokens; the base has "
            f"{layout.vocab_size}.",
            advice="Serve a base whose embeddings were resized the same way, or train new tokens in unused places of "
            "this vocabulary (trainable_token_indices).",
            modules=tuple(wrong),
        )
    ]


def _files(folder: Path) -> Iterator[Finding]:
    if (folder / PICKLE_NAME).exists():
        yield Finding(
            code="pickle",
            severity="warning",
            message=f"Beside its safetensors the folder holds {PICKLE_NAME}, a pickle. It is never read here.",
            advice="Delete it: whoever loads it runs what is in it.",
        )


def _method(opened: OpenedAdapter, effects: Sequence[Effect]) -> Iterator[Finding]:
    if opened.method != "LORA":
        carried = [effect for effect in effects if effect.carried_bytes]
        size = sum(effect.carried_bytes for effect in carried)
        yield Finding(
            code="materialised",
            severity="note",
            message=f"{opened.method} is served through the {len(carried)} modules it changes, which take "
            f"{size / 1e6:.1f} MB in a slot.",
            advice="LoRA of the same effect takes a small part of that.",
            modules=tuple(effect.leaf for effect in carried[:64]),
        )


def seen(found: Behaviour) -> Finding:
    """What a probe of the base with and without the adapter showed."""
    if found.is_same:
        return Finding(
            code="no-op-probe",
            severity="warning",
            message="On a probe of text around an image the adapter gives bit for bit the base's answers.",
            advice="What it changes does not reach the answers. Check what it was trained on, and its config.",
        )
    return Finding(
        code="probe",
        severity="note",
        message=f"On a probe of text around an image the answers move by {found.kl:.3g} nats (mean KL), and "
        f"{found.agreement:.0%} of the likeliest tokens stay.",
    )
