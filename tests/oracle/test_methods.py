"""Adapters of PEFT methods other than LoRA, with PEFT as the oracle: what they make of the base is what is served."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.errors import (
    AdapterRejected,
    MalformedAdapter,
    MissingTensors,
    NonFiniteWeights,
    ShapeMismatch,
    UnknownModules,
    UnsupportedAdapter,
)
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.weights import AdapterWeights
from tests.oracle.methods import METHODS
from tests.oracle.models import (
    apply_dense,
    dense_logits,
    logits_of,
    peft_logits,
    sample_inputs,
    save_adapter,
    tiny_qwen2vl,
)

INPUTS = sample_inputs()
TOLERANCE = 2e-5
MOVED = 1e-2
LAYOUT = BaseLayout.from_model(tiny_qwen2vl())


def materialiser(max_bytes: int = 1 << 30) -> Materialiser:
    model = tiny_qwen2vl()
    return Materialiser(lambda leaf, name: model.get_parameter(f"{leaf}.{name}").detach(), max_bytes)


def read(path: Path, max_bytes: int = 1 << 30) -> AdapterWeights:
    return read_adapter(path, LAYOUT, materialiser(max_bytes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_adapter(tiny_qwen2vl, METHODS[name], root / name, seed=len(name))
        return made[name]

    return folder


def altered(folder: Path, to: Path, *, tensors=None, **config) -> Path:
    """A copy with some fields of its config, or its tensors, replaced."""
    to.mkdir()
    raw = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(raw | config))
    save_file(tensors or load_file(folder / "adapter_model.safetensors"), to / "adapter_model.safetensors")
    return to


@pytest.mark.parametrize("name", METHODS)
def test_what_is_read_does_what_peft_does(folders, name):
    want = peft_logits(tiny_qwen2vl, folders(name), INPUTS)
    assert float((want - logits_of(tiny_qwen2vl(), INPUTS)).abs().max()) > MOVED
    weights = read(folders(name))
    assert float((dense_logits(tiny_qwen2vl, weights, INPUTS) - want).abs().max()) < TOLERANCE
    assert weights.method == ("DORA" if name.startswith("dora") else METHODS[name].peft_type.value)
    assert not weights.lora


@pytest.mark.parametrize("name", ["dora", "lokr"])
def test_what_is_written_is_a_plain_adapter_of_the_same_function(folders, tmp_path, name):
    write_adapter(read(folders(name)), tmp_path / "copy", LAYOUT, base_name="tiny")
    want = peft_logits(tiny_qwen2vl, folders(name), INPUTS)
    assert float((peft_logits(tiny_qwen2vl, tmp_path / "copy", INPUTS) - want).abs().max()) < TOLERANCE


def test_a_combination_adds_the_deltas(folders):
    shares = {"dora": 0.7, "loha": -0.4, "ia3": 0.5}
    members = [(read(folders(name)), weight) for name, weight in shares.items()]
    base = tiny_qwen2vl()
    together = combine(members, lambda leaf, name: base.get_parameter(f"{leaf}.{name}").detach())
    model = tiny_qwen2vl()
    with torch.no_grad():
        for weights, share in members:
            merged = apply_dense(tiny_qwen2vl(), weights)
            for name, parameter in model.named_parameters():
                parameter += share * (merged.get_parameter(name) - base.get_parameter(name))
    want = logits_of(model, INPUTS)
    assert float((dense_logits(tiny_qwen2vl, together, INPUTS) - want).abs().max()) < TOLERANCE


def test_without_the_base_they_are_refused(folders):
    with pytest.raises(UnsupportedAdapter, match="DORA changes the base's own weights"):
        read_adapter(folders("dora"), LAYOUT)


def test_beyond_the_limit_the_sizes_are_named(folders):
    with pytest.raises(UnsupportedAdapter, match=r"DORA is served by keeping .* 7 modules of 0\.\d MB .* 0\.0 MB"):
        read(folders("dora"), max_bytes=1000)


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("loha", {"r": 4}, ShapeMismatch, "hada_w1_a is"),
        ("loha", {"target_modules": ["q_proj", "fc1", "fc2"]}, MissingTensors, r"fc2\.hada_w1_a"),
        ("loha", {"target_modules": ["q_proj"]}, UnknownModules, "do not name"),
        ("loha", {"target_modules": ["q_proj", "fc1", "norm3"]}, UnknownModules, "norm3"),
        ("loha", {"alpha": "much"}, MalformedAdapter, "lora_alpha"),
        ("loha", {"bias": "all"}, UnsupportedAdapter, "bias"),
        ("loha", {"surprise": 1}, UnsupportedAdapter, "surprise"),
        ("lokr", {"decompose_factor": "x"}, AdapterRejected, "LOKR"),
        ("oft", {"num_cayley_neumann_terms": 10**9}, MalformedAdapter, "at most 64"),
        ("fourierft", {"n_frequency": 10**12}, AdapterRejected, "FOURIERFT|fourierft"),
        ("dora", {"use_dora": False}, UnsupportedAdapter, "does not say use_dora"),
        ("dora", {"peft_type": "VERA"}, UnsupportedAdapter, "LOHA"),
        ("dora", {"peft_type": "DORA"}, UnsupportedAdapter, "LOHA"),
        ("ia3", {"feedforward_modules": 1}, MalformedAdapter, "feedforward_modules"),
        ("ia3", {"feedforward_modules": "("}, MalformedAdapter, "no regular expression"),
        ("ia3", {"target_modules": r"(.*a?)*k_proj(x+x+)+"}, AdapterRejected, "no modul|takes too long|cannot act on"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folders, tmp_path, name, change, error, said):
    with pytest.raises(error, match=said):
        read(altered(folders(name), tmp_path / "bad", **change))


def test_a_tensor_too_many_or_too_few_is_named(folders, tmp_path):
    tensors = load_file(folders("loha") / "adapter_model.safetensors")
    first = next(key for key in tensors if key.endswith("hada_w1_a"))
    with pytest.raises(MissingTensors, match="hada_w1_a"):
        read(altered(folders("loha"), tmp_path / "few", tensors={k: v for k, v in tensors.items() if k != first}))
    extra = {**tensors, first.replace("hada_w1_a", "hada_w9"): torch.ones(2)}
    with pytest.raises(ShapeMismatch, match="hada_w9 is nothing that LOHA has"):
        read(altered(folders("loha"), tmp_path / "many", tensors=extra))
    lost = {**tensors, first.replace("q_proj", "r_proj").replace("fc1", "fc7"): torch.ones(2)}
    with pytest.raises(UnknownModules, match="match nothing in the base"):
        read(altered(folders("loha"), tmp_path / "lost", tensors=lost))


def test_what_becomes_nan_is_refused(folders, tmp_path):
    tensors = load_file(folders("loha") / "adapter_model.safetensors")
    huge = {key: torch.full_like(tensor, 1e30) for key, tensor in tensors.items()}
    with pytest.raises(NonFiniteWeights, match="LOHA makes NaN or infinity"):
        read(altered(folders("loha"), tmp_path / "huge", tensors=huge))


def test_a_method_beside_saved_weights_of_the_same_module_is_refused(tmp_path):
    made = save_adapter(tiny_qwen2vl, METHODS["loha"], tmp_path / "loha")
    tensors = load_file(made / "adapter_model.safetensors")
    weight = tiny_qwen2vl().get_parameter("model.visual.blocks.0.mlp.fc1.weight").detach()
    key = "base_model.model.model.visual.blocks.0.mlp.fc1"
    both = {**tensors, f"{key}.weight": weight, f"{key}.bias": torch.zeros(weight.shape[0])}
    with pytest.raises(UnsupportedAdapter, match="LOHA inside modules that it saves in full"):
        read(altered(made, tmp_path / "both", tensors=both, modules_to_save=["blocks.0.mlp.fc1"]))


def test_leaves_of_a_tied_base_change_apart(tmp_path):
    tied = partial(tiny_qwen2vl, tie=True)
    made = save_adapter(tied, METHODS["loha"], tmp_path / "tied")
    model = tied()
    base = Materialiser(lambda leaf, name: model.get_parameter(f"{leaf}.{name}").detach(), 1 << 30)
    weights = read_adapter(made, BaseLayout.from_model(tied()), base)
    want = peft_logits(tied, made, INPUTS)
    assert float((dense_logits(tied, weights, INPUTS) - want).abs().max()) < TOLERANCE
