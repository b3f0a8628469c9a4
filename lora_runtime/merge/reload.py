"""A merge's result as its users will load it: through transformers, and through PEFT; and what those did not say.

Each raises VerificationFailed for what cannot be loaded, or is loaded in part only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lora_runtime.errors import VerificationFailed
from lora_runtime.merge.base import TEMPLATES, WEIGHT_SUFFIXES
from lora_runtime.names import listed, shown
from lora_runtime.weights import Head

OWN = frozenset({"README.md", "manifest.json"})
"""Where a checkpoint says what it is: a merge says something else than its base."""
ADAPTER_NAME = "default"

Loaded = tuple[Any, Mapping[str, list[str]]]
"""A model, and the tensors' names that transformers found fault with, by kind of fault."""


def load(folder: Path, dtype: torch.dtype) -> Loaded:
    """The checkpoint in ``folder`` by transformers, on the CPU in ``dtype``. Raises whatever transformers raises."""
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    model, info = loader.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, local_files_only=True)
    return model.eval(), {kind: sorted(map(str, found)) for kind, found in info.items() if found}


def load_merged(folder: Path, dtype: torch.dtype, base_faults: Mapping[str, list[str]]) -> Any:
    """As :func:`load`. What transformers does not find, it draws at random and goes on: that is a failure here, unless
    it is so of the base as well (``base_faults``)."""
    with _refusing("transformers cannot load the merged checkpoint"):
        model, faults = load(folder, dtype)
    for kind, names in faults.items():
        if new := sorted(set(names) - set(base_faults.get(kind, ()))):
            raise VerificationFailed(
                f"transformers loads the merged checkpoint with {len(new)} {kind.replace('_', ' ')} that the base does "
                f"not have: {listed(new, 3)}. Its index or a shard is not the base's; merge again.",
                check="load",
                **{kind: new[:64]},
            )
    return model


def load_adapted(folder: Path, base_path: Path, dtype: torch.dtype, heads: Mapping[str, Head]) -> nn.Module:
    """The base with the adapter in ``folder`` on it, by PEFT: the base's own class, with PEFT's layers in it.

    ``heads`` are put on the base, untrained, for PEFT to fill; no forward pass uses them.

    ``PeftModel.from_pretrained`` warns of missing low-rank tensors alone, and says nothing of tensors that match
    nothing. ``load_adapter`` returns both, so the adapter is loaded once more by it, over itself.
    """
    from peft import PeftConfig, PeftModel

    model, _ = load(base_path, dtype)
    with _refusing("PEFT cannot load the merged adapter"):
        config = PeftConfig.from_pretrained(str(folder))
        for name, head in heads.items():
            labels, width = head.weight.shape
            model.add_module(name, nn.Linear(width, labels, bias=head.bias is not None, dtype=dtype))
        if heads:
            config.task_type = None  # PEFT's class for classifiers asks more of a model than to have the head
        adapted: Any = PeftModel.from_pretrained(
            model, str(folder), adapter_name=ADAPTER_NAME, config=config, torch_device="cpu"
        )
        result = adapted.load_adapter(str(folder), ADAPTER_NAME, torch_device="cpu")
    if result.missing_keys or result.unexpected_keys:
        raise VerificationFailed(
            "PEFT loads the merged adapter in part only, without a word to its users: it finds no tensor for "
            f"{len(result.missing_keys)} of its own ({listed(result.missing_keys, 3) or 'none'}), and no place for "
            f"{len(result.unexpected_keys)} of the file's ({listed(result.unexpected_keys, 3) or 'none'}). The names "
            "are not those of this base in this release of transformers; write the adapter again.",
            check="load",
            missing=list(result.missing_keys)[:64],
            unexpected=list(result.unexpected_keys)[:64],
        )
    _check_heads(adapted, heads)
    transformer: nn.Module = adapted.get_base_model()
    return transformer.eval()


def check_files(result: Path, base_path: Path) -> None:
    """Raise VerificationFailed unless every file of the base but its weights is in ``result`` too, byte for byte.

    That is the tokenizer, the chat template, the preprocessing, the generation config, the model's own config and the
    index: a merge changes no shape and no name. Model cards, manifests and hidden files are left out.
    """
    missing, changed = [], []
    for file in _companions(base_path):
        if not (result / file).is_file():
            missing.append(str(file))
        elif _digest(result / file) != _digest(base_path / file):
            changed.append(str(file))
    if missing or changed:
        raise VerificationFailed(
            f"Beside its weights a merged checkpoint has the base's files. Missing: {listed(missing) or 'none'}. "
            f"Other than the base's: {listed(changed) or 'none'}. Copy them from the base.",
            check="files",
            missing=missing,
            changed=changed,
        )


def _companions(folder: Path) -> list[Path]:
    found = [path for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")) if path.is_file()]
    return sorted(
        path.relative_to(folder)
        for path in found
        if not path.name.startswith(".") and path.suffix not in WEIGHT_SUFFIXES and path.name not in OWN
    )


def _digest(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _check_heads(adapted: nn.Module, heads: Mapping[str, Head]) -> None:
    parameters = {name.replace(f".modules_to_save.{ADAPTER_NAME}", ""): p for name, p in adapted.named_parameters()}
    for name, head in heads.items():
        loaded = parameters[f"base_model.model.{name}.weight"]
        if not torch.equal(loaded, head.weight.to(loaded.dtype)):
            raise VerificationFailed(f"PEFT does not load the head '{name}' as it was written.", check="load")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """What these libraries raise over a file is the file's fault, as a rule: the base loaded a moment ago."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError) as error:
        raise VerificationFailed(
            f"{what} ({type(error).__name__}: {shown(str(error))}). Unless that says otherwise, a file is damaged or "
            "lacking; merge again.",
            check="load",
        ) from error
