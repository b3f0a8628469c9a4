"""``adapter_config.json``, read and checked: what PEFT's LoRA config means for this base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_runtime.errors import AdapterMissing, MalformedAdapter, UnsupportedAdapter
from lora_runtime.layout import BaseLayout

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
PATTERN_TIMEOUT_S = 1.0
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "true", "false"})
CLASSIFIER_NAMES = frozenset({"classifier", "score"})

_UNSUPPORTED = {
    "use_dora": "DoRA scales by a norm of the merged weight",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "aLoRA acts on part of the prompt only",
    "megatron_config": "Megatron layers are not the base's",
    "layer_replication": "replicated layers change the base",
    "target_parameters": "parameters outside a Linear, Embedding or Conv are not served",
    "use_bdlora": "block-diagonal LoRA has another shape",
    "arrow_config": "Arrow routes by token",
    "kasa_config": "KaSA changes the base's singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
}


class AdapterConfig(BaseModel):
    """The fields of PEFT's ``LoraConfig`` that decide what an adapter does. Unknown fields are kept out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str
    task_type: str | None = None
    r: int = Field(default=8, ge=1, le=1 << 16)
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False

    @property
    def saved_names(self) -> tuple[str, ...]:
        return tuple(self.modules_to_save or ())

    @property
    def may_lack_a_head(self) -> bool:
        """PEFT writes both usual head names into the config of a classifier; a model has one of them."""
        return self.task_type in ("SEQ_CLS", "TOKEN_CLS")

    def token_indices(self) -> dict[str, list[int]]:
        """Trained token ids by module name as written; a bare list means the input embedding."""
        indices = self.trainable_token_indices
        if indices is None:
            return {}
        return dict(indices) if isinstance(indices, dict) else {"embed_tokens": indices}

    def rank_and_scaling(self, key: str) -> tuple[int, float]:
        """Rank and scaling of the module ``key``: alpha/r, or alpha/√r for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_pattern.get(_pattern_key(self.rank_pattern, key), self.r)
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, key), self.lora_alpha)
        return rank, alpha / (rank**0.5 if self.use_rslora else rank)

    def targets(self, key: str, layout: BaseLayout) -> bool:
        """Whether LoRA targets the leaf known as ``key``; PEFT's rules (``check_target_module_exists``)."""
        if self._excludes(key) or self.target_modules is None:
            return False
        if self.target_modules == "all-linear":
            return key != "lm_head" and _kind(layout, key) == "linear"
        if isinstance(self.target_modules, str):
            return _fullmatch(self.target_modules, key)
        if key in self.target_modules:
            return True
        return any(key.endswith(f".{name}") for name in self.target_modules) and self._in_layers(key)

    def _excludes(self, key: str) -> bool:
        names = self.exclude_modules
        if isinstance(names, str):
            if names and _fullmatch(names, key):
                return True
        elif names and any(key == name or key.endswith(f".{name}") for name in names):
            return True
        return any(_match(rf"(^|.*\.){name}($|\..*)", key) for name in self.saved_names)

    def _in_layers(self, key: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((match for e in expressions if (match := _match(e, key))), None)
        return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)


def read_config(path: Path) -> AdapterConfig:
    """Read ``path/adapter_config.json``. Raises AdapterMissing, MalformedAdapter or UnsupportedAdapter."""
    raw = read_json(path / CONFIG_NAME)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} says peft_type {raw.get('peft_type')!r}; only LORA is served. "
            "Merge the adapter into a checkpoint, or train it as LoRA.",
            option="peft_type",
        )
    try:
        config = AdapterConfig.model_validate(raw)
        _check_patterns(config)
    except (ValidationError, regex.error) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("pattern",), "msg": str(error)}
        where = ".".join(str(part) for part in problem["loc"])
        raise MalformedAdapter(f"{CONFIG_NAME}: '{where}' is wrong: {problem['msg']}.", field=where) from error
    _check_supported(raw, config)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises AdapterMissing or MalformedAdapter."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise MalformedAdapter(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes; it is no adapter config.")
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterMissing(f"There is no {path.name} in the adapter's folder; check the path.") from error
    except OSError as error:
        raise AdapterMissing(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{path.name} is not valid JSON; save the adapter again.") from error
    if not isinstance(raw, dict):
        raise MalformedAdapter(f"{path.name} holds no JSON object; save the adapter again.")
    return raw


def _check_supported(raw: Mapping[str, Any], config: AdapterConfig) -> None:
    for option, reason in _UNSUPPORTED.items():
        if raw.get(option):
            raise UnsupportedAdapter(
                f"{CONFIG_NAME} sets {option}, which is not served: {reason}. Merge the adapter instead.",
                option=option,
            )
    init = str(config.init_lora_weights).lower()
    if config.init_lora_weights is not None and init not in PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights as well. Save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
            option="init_lora_weights",
        )


def _check_patterns(config: AdapterConfig) -> None:
    for pattern in _expressions(config):
        regex.compile(pattern)


def _expressions(config: AdapterConfig) -> Iterable[str]:
    for value in (config.target_modules, config.exclude_modules):
        if isinstance(value, str):
            yield value
    yield from config.saved_names
    yield from config.rank_pattern
    yield from config.alpha_pattern
    yield from [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []


def _pattern_key(patterns: Mapping[str, object], key: str) -> str:
    """PEFT's ``get_pattern_key``: the first pattern that matches the end of ``key``."""
    return next((pattern for pattern in patterns if _match(rf"(.*\.)?({pattern})$", key)), key)


def _match(pattern: str, key: str) -> Any:
    """``re.match`` for a pattern that came with an adapter: bounded in time, since it may be hostile."""
    try:
        return regex.match(pattern, key, timeout=PATTERN_TIMEOUT_S)
    except TimeoutError as error:
        raise MalformedAdapter(f"{CONFIG_NAME}: the pattern {pattern[:80]!r} takes too long to match.") from error


def _fullmatch(pattern: str, key: str) -> bool:
    return _match(rf"(?:{pattern})\Z", key) is not None


def _kind(layout: BaseLayout, key: str) -> str | None:
    leaf = layout.leaves.get(key)
    return None if leaf is None else leaf.kind
