"""Every tensor of an adapter file to its place in the base, or a refusal that names the nearest real module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_runtime.config import AdapterConfig
from lora_runtime.errors import NonFiniteWeights, UnknownModules, UnsupportedAdapter
from lora_runtime.layout import BaseLayout
from lora_runtime.names import canonical, listed, nearest, shown, tail, unwrapped
from lora_runtime.tensor_keys import TensorKey, parse_key, parse_method_key
from lora_runtime.weights import is_finite

CLASSIFIER_NAMES = ("classifier", "score")
MAX_EXPLAINED = 8
"""Unmatched names that get near ones: finding those is slow, and a file may hold any number."""

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(slots=True)
class Placed:
    """The file's tensors by what they are, under canonical names; ``spelled`` keeps the trained model's own.

    ``method``: by leaf, the tensors of a PEFT method other than LoRA by PEFT's name for them.
    """

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    b_bias: dict[str, Tensor] = field(default_factory=dict)
    embedding_a: dict[str, Tensor] = field(default_factory=dict)
    embedding_b: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    heads: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    method: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)

    def factored(self) -> set[str]:
        """Leaves that have any tensor of LoRA, or of the config's method."""
        return {*self.a, *self.b, *self.b_bias, *self.embedding_a, *self.embedding_b, *self.method}


def place(
    tensors: Mapping[str, Tensor], layout: BaseLayout, config: AdapterConfig, *, reads_values: bool = True
) -> Placed:
    """Give every tensor its place. Raises UnknownModules, UnsupportedAdapter or NonFiniteWeights, for all at once.

    Without ``reads_values`` NaN and infinity are not looked for, and of a mapped file nothing is read.
    """
    _check_dtypes(tensors)
    if reads_values:
        _check_finite(tensors)
    placed = Placed()
    originals: dict[str, TensorKey] = {}
    unmatched: list[str] = []
    doubled: list[str] = []
    heads = _head_names(config)
    for key, tensor in tensors.items():
        own = () if config.method is None else parse_method_key(key, config.method.prefix)
        readings = own or parse_key(key)
        _check_served(key, readings, heads)
        real = {(canonical(r.module), r.parameter): r for r in readings if _exists(r, layout)}
        head = next((tail(r.module) for r in readings if r.role == "parameter" and tail(r.module) in heads), None)
        if len(real) == 1:
            reading = next(iter(real.values()))
            if reading.role == "original":
                originals[key] = reading
            elif not _put(placed, reading, tensor):
                doubled.append(key)
        elif head is not None and not real:
            if placed.heads.setdefault((head, readings[0].parameter), tensor) is not tensor:
                doubled.append(key)
        else:
            unmatched.append(key)
    # The base's own parameters beside saved ones change nothing; without these they mean another layout.
    unmatched += [k for k, r in originals.items() if (canonical(r.module), r.parameter) not in placed.parameters]
    if unmatched:
        raise _unknown(unmatched, layout)
    if doubled:
        raise UnknownModules(
            f"Several tensors of the file mean the same place of the base: {listed(doubled)}. Save the adapter again "
            "under one name.",
            unmatched={key: [] for key in doubled},
        )
    return placed


def _head_names(config: AdapterConfig) -> frozenset[str]:
    return frozenset(tail(name) for name in config.saved_names) | (
        frozenset(CLASSIFIER_NAMES) if config.is_classifier else frozenset()
    )


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    if odd := [f"{shown(key)} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise UnsupportedAdapter(
            f"{len(odd)} tensors are not of a served type: {listed(odd)}. Save the adapter in float16, bfloat16 or "
            "float32.",
            tensors=odd,
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise NonFiniteWeights(
            f"NaN or infinity in {len(bad)} tensors: {listed(bad)}. The training diverged; use an earlier checkpoint.",
            tensors=bad,
        )


def _check_served(key: str, readings: Iterable[TensorKey], heads: frozenset[str]) -> None:
    """Refuse what has a name that is understood and that is not served."""
    for reading in readings:
        if reading.role == "magnitude":
            raise UnsupportedAdapter(
                f"'{shown(key)}' is a DoRA magnitude, but the config does not say use_dora. Save config and tensors "
                "together again."
            )
        outer, _, inner = tail(reading.module).partition(".")
        is_nested = bool(inner) and "modules_to_save" not in key.split(".")
        if outer in heads & set(CLASSIFIER_NAMES) and (is_nested or reading.role != "parameter"):
            raise UnsupportedAdapter(
                f"The head '{outer}' is not one Linear ('{shown(key)}'); only a single Linear on the last hidden "
                "state is served.",
                module=outer,
            )


def _exists(reading: TensorKey, layout: BaseLayout) -> bool:
    leaf = layout.leaves.get(canonical(reading.module))
    return leaf is not None and (
        not reading.parameter or reading.role == "method" or reading.parameter in leaf.parameters
    )


def _put(placed: Placed, reading: TensorKey, tensor: Tensor) -> bool:
    """False where the place is taken by another value. PEFT writes saved biases twice for ``bias="all"``."""
    name = canonical(reading.module)
    placed.spelled[name] = unwrapped(reading.module)
    if reading.role == "parameter":
        known = placed.parameters.setdefault((name, reading.parameter), tensor)
        return known is tensor or torch.equal(known, tensor)
    if reading.role == "method":
        return placed.method.setdefault(name, {}).setdefault(reading.parameter, tensor) is tensor
    table: dict[str, Tensor] = getattr(placed, reading.role)
    return table.setdefault(name, tensor) is tensor


def _unknown(unmatched: list[str], layout: BaseLayout) -> UnknownModules:
    near: dict[str, list[str]] = {key: [] for key in unmatched}
    for key in unmatched[:MAX_EXPLAINED]:
        readings = parse_key(key)
        near[key] = nearest(canonical(readings[-1].module) if readings else key, layout.leaves)
    lines = [
        f"'{shown(key)}'" + (f" (nearest in the base: {', '.join(near[key])})" if near[key] else "")
        for key in unmatched[:MAX_EXPLAINED]
    ]
    more = f" and {len(unmatched) - MAX_EXPLAINED} more" if len(unmatched) > MAX_EXPLAINED else ""
    return UnknownModules(
        f"{len(unmatched)} tensors of the adapter match nothing in the base: {'; '.join(lines)}{more}. "
        "They would be ignored silently elsewhere. Was the adapter trained on another base?",
        unmatched=near,
    )
