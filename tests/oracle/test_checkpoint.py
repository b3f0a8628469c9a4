"""Reading, writing and combining adapters, with PEFT as the oracle.

What is read is added densely into a fresh base; PEFT loads the same folder. Their logits must agree,
on text around an image, in fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_runtime.checkpoint import fingerprint, read_adapter
from lora_runtime.combine import combine
from lora_runtime.errors import Conflict, InvalidCombination, UnsupportedAdapter
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights
from tests.oracle.families import TIED, UNTIED
from tests.oracle.models import (
    ModelFactory,
    apply_dense,
    dense_logits,
    logits_of,
    peft_logits,
    sample_inputs,
    save_adapter,
    tiny_qwen2vl,
)

INPUTS = sample_inputs()
TOLERANCE = 1e-5
MOVED = 1e-2
"""An adapter that changes the logits less than this would prove nothing."""

BASES: dict[bool, ModelFactory] = {False: tiny_qwen2vl, True: partial(tiny_qwen2vl, tie=True)}
FAMILIES = [(False, name) for name in UNTIED] + [(True, name) for name in TIED]


def options(tie: bool, name: str) -> dict[str, object]:
    return {"r": 4, **(TIED if tie else UNTIED)[name]}


class Saved:
    """Adapters by family, each made once, with what PEFT makes of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[tuple[bool, str], Path] = {}
        self._logits: dict[tuple[bool, str], Tensor] = {}
        self.layouts = {tie: BaseLayout.from_model(base()) for tie, base in BASES.items()}
        self.base_logits = {tie: logits_of(base(), INPUTS) for tie, base in BASES.items()}

    def path(self, tie: bool, name: str) -> Path:
        if (tie, name) not in self._paths:
            folder = self._root / f"{tie} {name}"
            self._paths[tie, name] = save_adapter(BASES[tie], LoraConfig(**options(tie, name)), folder, seed=len(name))
        return self._paths[tie, name]

    def logits(self, tie: bool, name: str) -> Tensor:
        if (tie, name) not in self._logits:
            self._logits[tie, name] = peft_logits(BASES[tie], self.path(tie, name), INPUTS)
        return self._logits[tie, name]

    def weights(self, tie: bool, name: str) -> AdapterWeights:
        return read_adapter(self.path(tie, name), self.layouts[tie])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Saved(tmp_path_factory.mktemp("adapters"))
    torch.set_num_threads(threads)


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(("tie", "name"), FAMILIES)
def test_what_is_read_does_what_peft_does(saved: Saved, tie: bool, name: str) -> None:
    want = saved.logits(tie, name)
    assert differ(want, saved.base_logits[tie]) > MOVED
    assert differ(dense_logits(BASES[tie], saved.weights(tie, name), INPUTS), want) < TOLERANCE


@pytest.mark.parametrize(("tie", "name"), FAMILIES)
def test_what_is_written_peft_loads_to_the_same_function(saved: Saved, tmp_path: Path, tie: bool, name: str) -> None:
    write_adapter(saved.weights(tie, name), tmp_path / "copy", saved.layouts[tie], base_name="tiny")
    assert differ(peft_logits(BASES[tie], tmp_path / "copy", INPUTS), saved.logits(tie, name)) < TOLERANCE
    again = read_adapter(tmp_path / "copy", saved.layouts[tie])
    assert differ(dense_logits(BASES[tie], again, INPUTS), saved.logits(tie, name)) < TOLERANCE
    assert [folder.name for folder in tmp_path.iterdir()] == ["copy"], "staging must leave nothing behind"


def test_the_same_is_written_as_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    """Whatever order safetensors has its metadata in."""
    written = set()
    for number in range(12):
        said = {"loom.merge": '{"quoted": "\u00e9"}', "b": "1", "a": "2"}
        write_adapter(
            saved.weights(False, "patterns"), tmp_path / str(number), saved.layouts[False], base_name="tiny", said=said
        )
        written.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **said}


def test_a_folder_that_exists_is_not_written_over(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="exists already"):
        write_adapter(saved.weights(False, "list"), tmp_path, saved.layouts[False], base_name="tiny")


OLD_NAMES: Callable[[str], str] = lambda key: (  # noqa: E731
    key.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")
)

SPELLINGS: dict[str, Callable[[str], str]] = {
    "transformers before 4.52": OLD_NAMES,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "doubled prefix": lambda key: f"base_model.model.{key}",
    "doubled model": lambda key: key.replace("base_model.model.", "base_model.model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled, outside": lambda key: f"_orig_mod.{key}",
    "data parallel": lambda key: f"module.{key}",
    "language model in a model": lambda key: key.replace("language_model.", "language_model.model."),
    "trained without the head": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "with the adapter's name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
    "with the adapter's name, twice": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.default.", key),
    "with a name like a module's": lambda key: re.sub(r"(lora_[AB])\.", r"\1.q_proj.", key),
    "in modules_to_save": lambda key: key.replace(".merger.", ".merger.modules_to_save.default."),
    "in modules_to_save, named like a child": lambda key: key.replace(".merger.", ".merger.modules_to_save.mlp."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["saved merger", "merger", "saved vocabulary", "tower and convolution", "tokens"])
def test_every_spelling_means_the_same(saved: Saved, tmp_path: Path, spelling: str, name: str) -> None:
    respelled = respell(saved.path(False, name), tmp_path / "respelled", SPELLINGS[spelling])
    weights = read_adapter(respelled, saved.layouts[False])
    assert differ(dense_logits(tiny_qwen2vl, weights, INPUTS), saved.logits(False, name)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.q_proj|visual\..*qkv"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "visual.blocks.1.attn.qkv"]},
        {
            "target_modules": ["q_proj", "qkv"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7, "^visual.blocks.1.attn.qkv": 2},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3},
        },
        {"target_modules": ["q_proj"], "modules_to_save": ["visual.merger", "model.norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [5, 9]}},
    ],
    ids=["regex", "full names", "patterns", "saved modules", "tokens"],
)
def test_configs_in_old_names(saved: Saved, tmp_path: Path, config: dict[str, object]) -> None:
    """Trained before transformers 4.52: tensors and config both speak old names. The truth is the same in new ones."""
    text = re.sub(r"model(?=\W+(layers|norm|embed))", "model.language_model", json.dumps(config))
    text = re.sub(r"visual", "model.visual", text)
    modern = save_adapter(tiny_qwen2vl, LoraConfig(r=4, **json.loads(text)), tmp_path / "modern")
    want = peft_logits(tiny_qwen2vl, modern, INPUTS)
    old = respell(modern, tmp_path / "old", OLD_NAMES, config)
    assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, saved.layouts[False]), INPUTS), want) < TOLERANCE


def test_a_low_rank_part_inside_a_module_that_the_adapter_saves(saved: Saved, tmp_path: Path) -> None:
    """As PEFT wrote it before it kept the two apart; today it can still write this, and cannot load it."""
    config = LoraConfig(r=4, target_modules=["q_proj", "merger.mlp.0"], modules_to_save=["erger"])
    folder = save_adapter(tiny_qwen2vl, config, tmp_path / "both")
    with pytest.raises(KeyError, match=r"merger\.mlp\.0"):
        peft_logits(tiny_qwen2vl, folder, INPUTS)
    edit_config(folder, modules_to_save=["merger"])
    weights = read_adapter(folder, saved.layouts[False])
    name = "model.visual.merger.mlp.0"
    assert name in weights.lora
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{name}"
    want = tensors[f"{prefix}.base_layer.weight"] + 2.0 * (
        tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    )
    got = apply_dense(tiny_qwen2vl(), weights).get_parameter(f"{name}.weight")
    assert torch.allclose(got, want, atol=1e-6)
    write_adapter(weights, tmp_path / "folded", saved.layouts[False], base_name="tiny")
    folded = peft_logits(tiny_qwen2vl, tmp_path / "folded", INPUTS)
    assert differ(folded, dense_logits(tiny_qwen2vl, weights, INPUTS)) < TOLERANCE


def test_an_embedding_saved_beside_its_low_rank_part_reaches_a_tied_head(saved: Saved, tmp_path: Path) -> None:
    """PEFT writes the base's embedding into the file, and loads it into the weight that the head shares."""
    folder = respell(saved.path(True, "embedding"), tmp_path / "moved", lambda key: key)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.language_model.embed_tokens.base_layer.weight"
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, file)
    want = peft_logits(BASES[True], folder, INPUTS)
    assert differ(want, saved.logits(True, "embedding")) > MOVED
    weights = read_adapter(folder, saved.layouts[True])
    assert differ(dense_logits(BASES[True], weights, INPUTS), want) < TOLERANCE


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_heads(saved: Saved, tmp_path: Path, with_bias: bool, task_type: str | None) -> None:
    factory = partial(tiny_qwen2vl, num_labels=3, head_bias=with_bias)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"])
    folder = save_adapter(factory, config, tmp_path / "head")
    edit_config(folder, task_type=task_type, modules_to_save=["score", "classifier"] if task_type else ["score"])
    stored = load_file(folder / "adapter_model.safetensors")
    head = read_adapter(folder, saved.layouts[False]).heads["score"]
    assert torch.equal(head.weight, stored["base_model.model.score.weight"])
    assert (head.bias is not None) == with_bias
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    before = fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"id2label": {"2": "owl", "0": "cat", "1": "dog"}}))
    weights = read_adapter(folder, saved.layouts[False])
    assert weights.heads["score"].labels == ("cat", "dog", "owl")
    assert weights.version != before, "labels are part of the content"
    write_adapter(weights, tmp_path / "copy", saved.layouts[False], base_name="tiny")
    copy = read_adapter(tmp_path / "copy", saved.layouts[False])
    assert torch.equal(copy.heads["score"].weight, head.weight)
    assert copy.heads["score"].labels == ("cat", "dog", "owl")


COMBINATIONS: list[tuple[bool, dict[str, float]]] = [
    (False, {"list": 1.0}),
    (False, {"list": 0.7, "rslora": 0.3, "regex": -0.4}),
    (False, {"saved merger": 1.0, "merger": -0.5}),
    (False, {"saved head": 0.6, "saved vocabulary": 0.8, "saved norms by bare suffix": 1.1}),
    (False, {"vocabulary": 0.5, "saved vocabulary": 0.5, "tokens": 0.5}),
    (False, {"vocabulary": -0.5, "tokens by module": 1.3}),
    (False, {"tokens": 0.4, "tokens by module": 0.9, "nothing but tokens": -2.0}),
    (False, {"tower and convolution": 0.4, "saved tower": -0.7, "own biases": 1.5, "all biases": 0.3}),
    (False, {"lora bias": 0.5, "list": 0.25, "patterns": 1.0}),
    (True, {"embedding, tying": 0.5, "saved embedding": 0.7, "tokens": 0.2}),
    (True, {"saved head, tying": 1.0, "tokens of the head": -1.0, "head": 0.5}),
]


def dense_sum(saved: Saved, tie: bool, shares: dict[str, float]) -> torch.nn.Module:
    """base + Σ w Δ, parameter by parameter, from models that hold one adapter each."""
    total = apply_dense(BASES[tie](), AdapterWeights(version="nothing"))
    own = {name: parameter.clone() for name, parameter in total.named_parameters()}
    with torch.no_grad():
        for name, share in shares.items():
            changed = apply_dense(BASES[tie](), saved.weights(tie, name))
            for key, parameter in changed.named_parameters():
                if key in own:
                    total.get_parameter(key).add_(share * (parameter - own[key]))
                else:  # a LoRA bias on a leaf without one
                    leaf = total.get_submodule(key.removesuffix(".bias"))
                    known = 0 if leaf.bias is None else leaf.bias
                    leaf.bias = torch.nn.Parameter(known + share * parameter)
    return total


@pytest.mark.parametrize(("tie", "shares"), COMBINATIONS)
def test_a_combination_is_the_sum_of_its_deltas(saved: Saved, tie: bool, shares: dict[str, float]) -> None:
    want = logits_of(dense_sum(saved, tie, shares), INPUTS)
    got = dense_logits(BASES[tie], combined(saved, tie, shares), INPUTS)
    assert differ(want, saved.base_logits[tie]) > MOVED
    assert differ(got, want) < 3 * TOLERANCE


@pytest.mark.parametrize(("tie", "shares"), COMBINATIONS)
def test_a_combination_can_be_written_for_peft(
    saved: Saved, tmp_path: Path, tie: bool, shares: dict[str, float]
) -> None:
    weights = combined(saved, tie, shares)
    write_adapter(weights, tmp_path / "sum", saved.layouts[tie], base_name="tiny")
    want = dense_logits(BASES[tie], weights, INPUTS)
    assert differ(peft_logits(BASES[tie], tmp_path / "sum", INPUTS), want) < 3 * TOLERANCE


def test_what_peft_cannot_hold_is_refused(saved: Saved, tmp_path: Path) -> None:
    weights = replace(combined(saved, False, {"lora bias": 0.5, "vocabulary": 0.5}), saved={})
    with pytest.raises(UnsupportedAdapter, match="embed_tokens"):
        write_adapter(weights, tmp_path / "sum", saved.layouts[False], base_name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_versions_of_combinations(saved: Saved) -> None:
    one, other = {"list": 0.5, "rslora": 0.25}, {"rslora": 0.25, "list": 0.5}
    assert combined(saved, False, one).version == combined(saved, False, other).version
    assert combined(saved, False, one).version != combined(saved, False, {"list": 0.25, "rslora": 0.5}).version


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(saved: Saved, weight: float) -> None:
    with pytest.raises(InvalidCombination, match="finite"):
        combined(saved, False, {"list": weight})


def test_a_combination_of_nothing() -> None:
    with pytest.raises(InvalidCombination, match="at least one"):
        combine([], lambda leaf, parameter: torch.zeros(()))


def combined(saved: Saved, tie: bool, shares: dict[str, float]) -> AdapterWeights:
    base = BASES[tie]()
    return combine(
        [(saved.weights(tie, name), share) for name, share in shares.items()],
        lambda leaf, parameter: base.get_parameter(f"{leaf}.{parameter}").detach(),
    )


def respell(source: Path, target: Path, rename: Callable[[str], str], config: dict[str, object] | None = None) -> Path:
    target.mkdir()
    tensors = {rename(key): tensor for key, tensor in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    edit_config(target, **(config or {}))
    return target


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
