"""``adapter_config.json``, read and checked: the fields of PEFT's LoRA config that decide what an adapter does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError

from lora_runtime.errors import MalformedAdapter, UnsupportedAdapter
from lora_runtime.folder import CONFIG_NAME, read_json
from lora_runtime.methods import BY_TYPE, INERT, Method, method_of
from lora_runtime.names import shown

MAX_NAMES = 1 << 12
"""Longer lists than any base has modules for; matching them would only take time."""

Name = Annotated[str, Field(min_length=1, max_length=1 << 16)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Index = Annotated[int, Field(ge=0, lt=1 << 31)]

NO_TARGETS = "dummy-target-modules"
"""PEFT's word for: this adapter has no low-rank part."""

PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false", "none"})
"""Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not."""

_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
        *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # act through init_lora_weights alone
        "fan_in_fan_out",  # PEFT itself resets it for the layers that this base has
    }
)
"""Options that do not change what a trained adapter computes."""

_SHARED = frozenset(
    {
        *("peft_type", "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "bias", "init_lora_weights"),
    }
)
"""Fields that mean with every method what they mean with LoRA."""

_REASONS = {
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "aLoRA acts on part of the prompt only",
    "megatron_config": "Megatron layers are not the base's",
    "layer_replication": "replicated layers change the base",
    "target_parameters": "parameters outside a Linear, Embedding or Conv are not served",
    "use_bdlora": "block-diagonal LoRA has another shape",
    "arrow_config": "Arrow routes by token",
    "kasa_config": "KaSA changes the base's singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA replaces the layer's projection",
}


class AdapterConfig(BaseModel):
    """What PEFT's config says about the trained function. ``read_config`` refuses what it cannot hold.

    ``method`` is None for plain LoRA. For others ``options`` holds what decides their arithmetic, as PEFT's
    config has it, and the LoRA fields say what they share with LoRA: where it acts, ranks and alphas.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    task_type: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    rank_pattern: dict[Name, Rank] = Field(default_factory=dict, max_length=MAX_NAMES)
    alpha_pattern: dict[Name, Alpha] = Field(default_factory=dict, max_length=MAX_NAMES)
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | str | None = None
    modules_to_save: Names | None = None
    trainable_token_indices: list[Index] | Annotated[dict[Name, list[Index]], Field(max_length=16)] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False
    feedforward_modules: Names | str | None = None
    method: SkipValidation[Method | None] = None
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def saved_names(self) -> tuple[str, ...]:
        return tuple(self.modules_to_save or ())

    @property
    def layer_patterns(self) -> tuple[str, ...]:
        patterns = self.layers_pattern
        return (patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ())

    @property
    def is_classifier(self) -> bool:
        """PEFT then saves ``classifier`` and ``score`` unasked; a model has one of them."""
        return self.task_type == "SEQ_CLS"

    def token_indices(self, embedding: str) -> Mapping[str, list[int]]:
        """Trained token ids by module name as written; a bare list means the input ``embedding``."""
        indices = self.trainable_token_indices
        if indices is None:
            return {}
        return indices if isinstance(indices, dict) else {embedding: indices}

    def expressions(self) -> Iterable[str]:
        """All that PEFT compiles as a regular expression."""
        for value in (self.target_modules, self.exclude_modules, self.feedforward_modules):
            if isinstance(value, str):
                yield value
        yield from (*self.saved_names, *self.rank_pattern, *self.alpha_pattern, *self.layer_patterns)


def read_config(folder: Path) -> AdapterConfig:
    """Read ``adapter_config.json`` in ``folder``. Raises AdapterMissing, MalformedAdapter or UnsupportedAdapter."""
    raw = read_json(folder / CONFIG_NAME)
    try:
        method = method_of(raw)
    except KeyError as error:
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} says peft_type {shown(repr(raw.get('peft_type')))}; LORA (with DoRA), {', '.join(BY_TYPE)} "
            "are served. Merge the adapter into a checkpoint, or train it as LoRA.",
            option="peft_type",
        ) from error
    try:
        config = AdapterConfig.model_validate(_fields(raw, method))
    except (ValidationError, ArithmeticError) as error:
        raise _malformed(_problems(error)) from error
    _check_expressions(config)
    _check_supported(raw, config)
    return config


def _fields(raw: Mapping[str, Any], method: Method | None) -> dict[str, Any]:
    """``raw`` in LoRA's terms. What only ``read_config`` may set is not taken from the file."""
    fields = {name: value for name, value in raw.items() if name not in ("method", "options")}
    if method is None:
        return fields
    if method.alpha is None:
        fields = {name: value for name, value in fields.items() if name not in ("r", "lora_alpha")}
    else:
        fields["lora_alpha"] = fields.get(method.alpha, 8)
    return {**fields, "method": method, "options": {name: raw[name] for name in method.options if name in raw}}


def _problems(error: ValidationError | ArithmeticError) -> list[tuple[str, str]]:
    if not isinstance(error, ValidationError):
        return [("a number", str(error))]
    return [(".".join(str(part) for part in found["loc"]), found["msg"]) for found in error.errors()]


def _malformed(problems: list[tuple[str, str]]) -> MalformedAdapter:
    said = "; ".join(f"'{shown(where)}': {shown(what)}" for where, what in problems[:4])
    return MalformedAdapter(
        f"{CONFIG_NAME} is wrong at {said}. Save the adapter again with PEFT.", fields=[w for w, _ in problems]
    )


def _check_expressions(config: AdapterConfig) -> None:
    for pattern in config.expressions():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise _malformed([(pattern, f"no regular expression ({error})")]) from error
    if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
        raise _malformed([("layers_to_transform", "PEFT refuses it where target_modules is one expression")])


def _check_supported(raw: Mapping[str, Any], config: AdapterConfig) -> None:
    of_lora = set(AdapterConfig.model_fields) - {"feedforward_modules"}
    known = _INERT | (_SHARED | INERT | _of(config.method) if config.method else of_lora)
    if options := sorted(name for name, value in raw.items() if value and name not in known):
        reasons = [f"{shown(name)} ({_REASONS.get(name, 'unknown here')})" for name in options]
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} sets what is not served: {'; '.join(reasons[:8])}. Merge the adapter into a checkpoint "
            "instead, or train it without.",
            options=options,
        )
    if config.method is not None and config.bias != "none":
        raise UnsupportedAdapter(
            f"bias={shown(repr(config.bias))} is served with plain LoRA, not with {config.method.name}.",
            options=["bias"],
        )
    if str(config.init_lora_weights).lower() not in PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights={shown(repr(config.init_lora_weights))} changes the base's weights as well. Save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
            options=["init_lora_weights"],
        )
    if config.task_type == "TOKEN_CLS":
        raise UnsupportedAdapter(
            "task_type TOKEN_CLS classifies each token; only sequences are classified.", options=["task_type"]
        )


def _of(method: Method) -> frozenset[str]:
    return method.options | (frozenset({"r", method.alpha, "rank_pattern", "alpha_pattern"}) if method.alpha else set())
