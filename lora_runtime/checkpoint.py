"""PEFT adapter folders to :class:`AdapterWeights`, fail-closed.

An adapter is accepted only if every tensor of its file lands on exactly one place of the base and
every tensor that its config promises is there. PEFT's own loader checks neither reliably: names
that match nothing load as a silent no-op.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_runtime.config import CLASSIFIER_NAMES, CONFIG_NAME, AdapterConfig, read_config, read_json
from lora_runtime.errors import (
    AdapterMissing,
    MalformedAdapter,
    MissingTensors,
    NonFiniteWeights,
    ShapeMismatch,
    UnknownModules,
    UnsupportedAdapter,
)
from lora_runtime.layout import BaseLayout
from lora_runtime.names import canonical, nearest, spellings, tail
from lora_runtime.tensor_keys import TensorKey, parse_key
from lora_runtime.weights import AdapterWeights, Head, LoraFactors, SavedModule, TokenRows, is_finite

TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_LISTED = 8
"""Names listed in one message; ``facts`` hold them all."""


def read_adapter(path: str | Path, layout: BaseLayout) -> AdapterWeights:
    """The adapter in the folder ``path``, checked against ``layout``. Tensors stay memory-mapped, in their stored dtype.

    Raises AdapterMissing for absent files, else the subclass of AdapterRejected that fits, with every
    problem of its kind in one message.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    found = _sorted_out(tensors, layout, config)
    weights = AdapterWeights(
        version=fingerprint(folder),
        lora=_lora(found, config, layout),
        saved=_saved(found, config, layout),
        token_rows=_token_rows(found, config, layout),
        heads=_heads(found, config, layout, folder),
    )
    _check_finite(found)
    return _tied(weights, config, layout)


def fingerprint(path: str | Path) -> str:
    """sha256 of an adapter's content: its config (canonical JSON), its tensor file and its labels, in hex."""
    folder = Path(path)
    digest = hashlib.sha256()
    config = read_json(folder / CONFIG_NAME)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(json.dumps(_labels(folder)).encode())
    try:
        with open(folder / TENSORS_NAME, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise _missing_tensors_file(folder) from error
    return digest.hexdigest()


@dataclass(slots=True)
class _Found:
    """The file's tensors by what they are, under canonical names. ``spelled`` maps back for messages."""

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    b_bias: dict[str, Tensor] = field(default_factory=dict)
    embedding_a: dict[str, Tensor] = field(default_factory=dict)
    embedding_b: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    parameter: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    head: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    spelled: dict[int, str] = field(default_factory=dict)

    def factored(self) -> set[str]:
        """Leaves that have any LoRA tensor."""
        return {*self.a, *self.b, *self.b_bias, *self.embedding_a, *self.embedding_b}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS_NAME
    if not file.is_file():
        raise _missing_tensors_file(folder)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise MalformedAdapter(
            f"{TENSORS_NAME} is damaged or no safetensors file ({error}). Copy or save it again."
        ) from error


def _missing_tensors_file(folder: Path) -> AdapterMissing | MalformedAdapter:
    if (folder / PICKLE_NAME).exists():
        return MalformedAdapter(
            f"The adapter comes as {PICKLE_NAME}, a pickle, which is never read. Save it with safetensors "
            "(PeftModel.save_pretrained does so by default)."
        )
    return AdapterMissing(f"There is no {TENSORS_NAME} in the adapter's folder; check the path.")


def _sorted_out(tensors: Mapping[str, Tensor], layout: BaseLayout, config: AdapterConfig) -> _Found:
    """Give every tensor its place, or raise with all that have none."""
    found = _Found()
    unmatched: dict[str, list[str]] = {}
    doubled: list[str] = []
    head_names = {tail(name) for name in config.saved_names} | (CLASSIFIER_NAMES if config.may_lack_a_head else set())
    for key, tensor in tensors.items():
        readings = parse_key(key)
        if any(reading.role == "magnitude" for reading in readings):
            raise UnsupportedAdapter(f"'{key}' is a DoRA magnitude; DoRA is not served. Merge the adapter instead.")
        reading = next((r for r in readings if _exists(r, layout)), None)
        head = next((r for r in readings if r.role == "parameter" and tail(r.module) in head_names), None)
        if reading is not None:
            place = canonical(reading.module)
            is_new = _put(found, reading.role, place, reading.parameter, tensor)
        elif head is not None:
            is_new = (tail(head.module), head.parameter) not in found.head
            found.head[tail(head.module), head.parameter] = tensor
        else:
            module = canonical(readings[0].module) if readings else key
            unmatched[key] = nearest(module, [*layout.leaves])
            continue
        found.spelled[id(tensor)] = key
        if not is_new:
            doubled.append(key)
    if unmatched:
        raise _unknown(unmatched)
    if doubled:
        raise UnknownModules(
            f"Several tensors of the file mean the same place of the base: {_listed(doubled)}. Save the adapter again "
            "under one name.",
            unmatched={key: [] for key in doubled},
        )
    return found


def _exists(reading: TensorKey, layout: BaseLayout) -> bool:
    leaf = layout.leaves.get(canonical(reading.module))
    if leaf is None:
        return False
    return reading.role != "parameter" or reading.parameter in leaf.parameters


def _put(found: _Found, role: str, place: str, parameter: str, tensor: Tensor) -> bool:
    table: dict[object, Tensor] = getattr(found, role)
    key = (place, parameter) if role == "parameter" else place
    is_new = key not in table
    table[key] = tensor
    return is_new


def _unknown(unmatched: Mapping[str, list[str]]) -> UnknownModules:
    lines = [
        f"'{key}'" + (f" (nearest in the base: {', '.join(near)})" if near else "")
        for key, near in list(unmatched.items())[:MAX_LISTED]
    ]
    more = f" and {len(unmatched) - MAX_LISTED} more" if len(unmatched) > MAX_LISTED else ""
    return UnknownModules(
        f"{len(unmatched)} tensors of the adapter match nothing in the base: {'; '.join(lines)}{more}. "
        "They would be ignored silently elsewhere. Was the adapter trained on another base?",
        unmatched=dict(unmatched),
    )


def _lora(found: _Found, config: AdapterConfig, layout: BaseLayout) -> dict[str, LoraFactors]:
    keys = _targets(found, config, layout)
    missing = [f"{name}.{part}" for name in sorted(keys) for part in _missing_parts(found, name, config, layout)]
    if missing:
        raise _missing(missing, "the config's target_modules")
    return {name: _factors(found, name, key, config, layout) for name, key in keys.items()}


def _targets(found: _Found, config: AdapterConfig, layout: BaseLayout) -> dict[str, str]:
    """Canonical name → name as the config knows it, of every leaf that LoRA targets.

    A config speaks the names of the transformers release that trained it. The spelling under which
    its patterns mean the leaves that the file has is the one.
    """
    present = found.factored()
    choices: list[dict[str, str]] = []
    for spelling in (0, 1):
        named = {name: spellings(name)[spelling] for name in layout.leaves}
        choices.append({name: key for name, key in named.items() if _is_target(name, key, config, layout)})
    best = min(choices, key=lambda choice: len(present ^ set(choice)))
    stray = sorted(present - set(best))
    if stray:
        raise UnknownModules(
            f"The file holds LoRA factors that the config's target_modules do not name: {_listed(stray)}. "
            "PEFT would ignore them. Save config and tensors together again.",
            unmatched={name: [] for name in stray},
        )
    _check_target_names(config, layout)
    return best


def _is_target(name: str, key: str, config: AdapterConfig, layout: BaseLayout) -> bool:
    if config.target_modules == "all-linear":
        return layout.leaves[name].kind == "linear" and config.targets(name, layout)
    return config.targets(key, layout)


def _check_target_names(config: AdapterConfig, layout: BaseLayout) -> None:
    """Each listed target must end some leaf that LoRA can act on; the near ones are named where it does not."""
    if not isinstance(config.target_modules, list):
        return
    for wanted in config.target_modules:
        ends = [
            name
            for name in [*layout.leaves, *layout.containers]
            if any(key == wanted or key.endswith(f".{wanted}") for key in spellings(name))
        ]
        if any(name in layout.leaves and layout.leaves[name].kind != "norm" for name in ends):
            continue
        inside = sorted(leaf for leaf in layout.leaves if any(leaf.startswith(f"{name}.") for name in ends))
        near = inside[:4] or nearest(canonical(wanted), layout.leaves)
        what = "is not a Linear, Embedding or Conv" if ends else "matches nothing in the base"
        raise UnknownModules(
            f"The config targets '{wanted}', which {what}. "
            + (f"Did you mean {', '.join(near)}?" if near else "Was the adapter trained on another base?"),
            unmatched={wanted: near},
        )


def _missing_parts(found: _Found, name: str, config: AdapterConfig, layout: BaseLayout) -> list[str]:
    if layout.leaves[name].kind == "embedding":
        parts = {"lora_embedding_A": found.embedding_a, "lora_embedding_B": found.embedding_b}
    else:
        parts = {"lora_A.weight": found.a, "lora_B.weight": found.b}
        if config.lora_bias:
            parts["lora_B.bias"] = found.b_bias
    return [part for part, table in parts.items() if name not in table]


def _factors(found: _Found, name: str, key: str, config: AdapterConfig, layout: BaseLayout) -> LoraFactors:
    leaf = layout.leaves[name]
    if leaf.kind == "norm":
        raise UnsupportedAdapter(f"LoRA on the norm '{name}' is not possible; save the norm instead.", module=name)
    is_embedding = leaf.kind == "embedding"
    a = found.embedding_a[name] if is_embedding else found.a[name].flatten(1)
    b = found.embedding_b[name] if is_embedding else found.b[name].flatten(1)
    rank, scaling = config.rank_and_scaling(key)
    _check_shape(name, "lora A", a, (rank, leaf.in_features))
    _check_shape(name, "lora B", b, (leaf.out_features, rank))
    bias = found.b_bias.get(name)
    if bias is not None:
        _check_shape(name, "lora B's bias", bias, (leaf.out_features,))
    return LoraFactors(a=a, b=b, scaling=scaling, kind="embedding" if is_embedding else "linear", bias=bias)


def _check_shape(name: str, what: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ShapeMismatch(
            f"{what} of '{name}' has the shape {tuple(tensor.shape)}; the config and the base want {wanted}. "
            "The config's r or rank_pattern, or the base, is another than the adapter was trained with.",
            module=name,
            found=list(tensor.shape),
            wanted=list(wanted),
        )


def _saved(found: _Found, config: AdapterConfig, layout: BaseLayout) -> dict[str, SavedModule]:
    expected = _expected_parameters(found, config, layout)
    missing = sorted(f"{name}.{parameter}" for name, parameter in expected - set(found.parameter))
    if missing:
        raise _missing(missing, "the config's modules_to_save or bias")
    modules: dict[str, dict[str, Tensor]] = {}
    for (name, parameter), tensor in found.parameter.items():
        _check_shape(name, parameter, tensor, layout.leaves[name].parameters[parameter])
        modules.setdefault(name, {})[parameter] = tensor
    return {name: SavedModule(parameters=parameters) for name, parameters in modules.items()}


def _expected_parameters(found: _Found, config: AdapterConfig, layout: BaseLayout) -> set[tuple[str, str]]:
    """Parameters that the config promises in full. PEFT matches ``modules_to_save`` by bare suffix, and so do we."""
    expected: set[tuple[str, str]] = set()
    for wanted in config.saved_names:
        roots = [
            name
            for name in [*layout.leaves, *layout.containers]
            if any(key.endswith(wanted) for key in spellings(name))
        ]
        leaves = {leaf for leaf in layout.leaves for root in roots if leaf == root or leaf.startswith(f"{root}.")}
        expected |= {(leaf, parameter) for leaf in leaves for parameter in layout.leaves[leaf].parameters}
        is_head = any(name == tail(wanted) for name, _ in found.head)
        if not leaves and not is_head and not (config.may_lack_a_head and wanted in CLASSIFIER_NAMES):
            near = nearest(canonical(wanted), [*layout.leaves, *layout.containers])
            raise MissingTensors(
                f"The config saves '{wanted}', but the file has no tensor for it and the base no such module. "
                + (f"Nearest in the base: {', '.join(near)}." if near else "Save the adapter again."),
                missing=[wanted],
            )
    if config.bias != "none":
        targets = found.factored()
        expected |= {
            (name, "bias")
            for name, leaf in layout.leaves.items()
            if "bias" in leaf.parameters and (config.bias == "all" or name in targets)
        }
    return expected


def _missing(missing: list[str], promise: str) -> MissingTensors:
    return MissingTensors(
        f"{len(missing)} tensors that {promise} promise are not in the file: {_listed(missing)}. "
        "The adapter was saved in part; save it again.",
        missing=missing,
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _token_rows(found: _Found, config: AdapterConfig, layout: BaseLayout) -> dict[str, TokenRows]:
    rows: dict[str, TokenRows] = {}
    for wanted, indices in config.token_indices().items():
        name = next((leaf for leaf in layout.leaves if leaf == canonical(wanted) or leaf.endswith(f".{wanted}")), None)
        if name is None or name not in found.tokens:
            if name is not None and name in layout.tied:
                continue  # a tied head takes the embedding's rows
            raise _missing([f"{wanted}.token_adapter.trainable_tokens_delta"], "the config's trainable_token_indices")
        height, width = layout.leaves[name].parameters["weight"]
        _check_shape(name, "trained token rows", found.tokens[name], (len(indices), width))
        index = torch.tensor(indices, dtype=torch.int64)
        if len(set(indices)) != len(indices) or not all(0 <= i < height for i in indices):
            raise ShapeMismatch(
                f"trainable_token_indices of '{name}' must be distinct and below {height}.", module=name
            )
        rows[name] = TokenRows(indices=index, rows=found.tokens[name])
    stray = sorted(set(found.tokens) - set(rows))
    if stray:
        raise UnknownModules(
            f"The file trains tokens of {_listed(stray)}, which the config's trainable_token_indices do not name.",
            unmatched={name: [] for name in stray},
        )
    return rows


def _heads(found: _Found, config: AdapterConfig, layout: BaseLayout, folder: Path) -> dict[str, Head]:
    heads: dict[str, Head] = {}
    for name in {name for name, _ in found.head}:
        weight, bias = found.head.get((name, "weight")), found.head.get((name, "bias"))
        if weight is None or weight.ndim != 2 or "." in name:
            raise UnsupportedAdapter(
                f"The head '{name}' is not one Linear; only a single Linear on the last hidden state is served.",
                module=name,
            )
        num_labels = weight.shape[0]
        _check_shape(name, "the head's weight", weight, (num_labels, layout.hidden_size))
        if bias is not None:
            _check_shape(name, "the head's bias", bias, (num_labels,))
        heads[name] = Head(name=name, weight=weight, bias=bias, labels=_label_names(folder, num_labels))
    return heads


def _labels(folder: Path) -> dict[str, str]:
    """``id2label`` of the model config that trainers save beside a classifier, if there is one."""
    if not (folder / "config.json").is_file():
        return {}
    labels = read_json(folder / "config.json").get("id2label")
    return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}


def _label_names(folder: Path, count: int) -> tuple[str, ...]:
    labels = _labels(folder)
    if labels and set(labels) != {str(i) for i in range(count)}:
        raise ShapeMismatch(f"config.json names {len(labels)} labels; the head has {count}.", module="id2label")
    return tuple(labels.get(str(i), f"LABEL_{i}") for i in range(count))


def _check_finite(found: _Found) -> None:
    tables = (found.a, found.b, found.b_bias, found.embedding_a, found.embedding_b, found.tokens)
    tensors = [t for table in tables for t in table.values()]
    tensors += [*found.parameter.values(), *found.head.values()]
    bad = []
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ShapeMismatch(f"'{found.spelled[id(tensor)]}' holds {tensor.dtype}, not floating-point weights.")
        if not is_finite(tensor.float() if tensor.element_size() == 1 else tensor):
            bad.append(found.spelled[id(tensor)])
    if bad:
        raise NonFiniteWeights(
            f"NaN or infinity in {len(bad)} tensors: {_listed(bad)}. The training diverged; use an earlier checkpoint.",
            tensors=bad,
        )


def _tied(weights: AdapterWeights, config: AdapterConfig, layout: BaseLayout) -> AdapterWeights:
    """What PEFT does to a head that shares the embedding's weight.

    Trained token rows reach the head always; a saved embedding or LoRA on it only with
    ``ensure_weight_tying``. A LoRA's delta of the head is that of the embedding: (B·A)ᵀ = Aᵀ·Bᵀ.
    """
    lora, saved, rows = dict(weights.lora), dict(weights.saved), dict(weights.token_rows)
    for head, embedding in layout.tied.items():
        if embedding in rows and head not in rows:
            rows[head] = rows[embedding]
        if config.ensure_weight_tying and embedding in saved and head not in saved:
            saved[head] = saved[embedding]
        if config.ensure_weight_tying and embedding in lora and head not in lora:
            factors = lora[embedding]
            lora[head] = LoraFactors(a=factors.b.T, b=factors.a.T, scaling=factors.scaling)
    return AdapterWeights(version=weights.version, lora=lora, saved=saved, token_rows=rows, heads=weights.heads)
