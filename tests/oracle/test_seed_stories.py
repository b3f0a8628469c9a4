"""The five stories that Loom began with: what PEFT 0.21.2 does today, what happens here, and what the doctor says.

Four of the five still fail there. ``pytest -s`` prints the doctor's words.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.doctor import diagnose
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from tests.oracle.models import dense_logits, logits_of, peft_logits, tiny_qwen2vl
from tests.oracle.test_load_failures import (
    INPUTS,
    TOLERANCE,
    WRONG,
    differ,
    edit,
    make,
    old_name,
    own_parameter,
    quietly,
    renamed,
    sum_of_peft_models,
)


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return BaseLayout.from_model(tiny_qwen2vl())


@pytest.fixture(scope="module")
def base_logits() -> Tensor:
    return logits_of(tiny_qwen2vl(), INPUTS)


def doctor(folder: Path, layout: BaseLayout) -> str:
    """What the doctor says of an adapter, a finding a line, and whether it can be served."""
    found = diagnose(folder, layout, Materialiser(own_parameter, 1 << 30))
    lines = [f"{finding.severity} {finding.code}: {finding.message} {finding.advice}" for finding in found.findings]
    text = "\n".join([*lines, "It can be served." if found.is_servable else "It cannot be served on this base."])
    print(f"\n{text}")
    return text


def test_target_module_is_not_supported(tmp_path: Path, layout: BaseLayout) -> None:
    """A pattern that matched a second adapter's Dropout. PEFT has mended that; a container it still refuses without
    saying what was meant."""
    pattern = r"^(?!.*visual).*(?:q_proj|v_proj).*"
    first = make(tmp_path / "first", seed=1, target_modules=pattern, lora_dropout=0.1)
    second = make(tmp_path / "second", seed=2, target_modules=pattern, lora_dropout=0.1)
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), first, adapter_name="first"))
    model.load_adapter(second, "second")
    model.set_adapter("second")
    want = logits_of(model.eval(), INPUTS)
    assert differ(dense_logits(tiny_qwen2vl, read_adapter(second, layout), INPUTS), want) < TOLERANCE
    assert doctor(second, layout) == "It can be served."

    meant = make(tmp_path / "meant", target_modules=["merger.mlp.0", "merger.mlp.2"])
    edit(meant, target_modules=["merger", "Dropout"])
    with pytest.raises(ValueError, match=r"(?s)Target module .* is not supported"):
        peft_logits(tiny_qwen2vl, meant, INPUTS)
    text = doctor(meant, layout)
    assert "'Dropout'" in text and "did you mean" in text and "model.visual.merger.mlp.0" in text


def test_no_matching_loras_found(tmp_path: Path, layout: BaseLayout) -> None:
    """A weighted merge of adapters on different layers."""
    one = make(tmp_path / "one", seed=1, target_modules=["q_proj"], layers_to_transform=[0])
    two = make(tmp_path / "two", seed=2, target_modules=["v_proj"], layers_to_transform=[1])
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), one, adapter_name="one"))
    model.load_adapter(two, "two")
    with pytest.raises(ValueError, match="No matching LoRAs found"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum")
    members = [(read_adapter(one, layout), 0.7), (read_adapter(two, layout), 0.3)]
    got = dense_logits(tiny_qwen2vl, combine(members, own_parameter), INPUTS)
    assert differ(got, logits_of(sum_of_peft_models({one: 0.7, two: 0.3}), INPUTS)) < TOLERANCE
    assert doctor(one, layout) == doctor(two, layout) == "It can be served."


def test_a_key_error_when_saved_modules_differ(tmp_path: Path, layout: BaseLayout) -> None:
    """One adapter saves the head and another does not, and their rows share a batch."""
    saved = make(tmp_path / "saved", seed=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain = make(tmp_path / "plain", seed=2, target_modules=["q_proj"])
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), saved, adapter_name="saved"))
    model.load_adapter(plain, "plain")
    model.eval()
    batch = {name: torch.cat([tensor, tensor]) for name, tensor in INPUTS.items()}
    with torch.no_grad(), pytest.raises(KeyError, match="plain"):
        model(**batch, adapter_names=["saved", "plain"])
    for folder in (saved, plain):
        got = dense_logits(tiny_qwen2vl, read_adapter(folder, layout), INPUTS)
        assert differ(got, peft_logits(tiny_qwen2vl, folder, INPUTS)) < TOLERANCE
        assert doctor(folder, layout).endswith("It can be served.")


def test_merge_and_unload_that_changes_nothing(tmp_path: Path, layout: BaseLayout, base_logits: Tensor) -> None:
    """Keys as transformers before 4.52 spelled them: merged, and equal to the base without an error."""
    modern = make(tmp_path / "modern", target_modules=["q_proj", "v_proj"])
    old = renamed(modern, tmp_path / "old", old_name)
    merged = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), old)).merge_and_unload()
    assert differ(logits_of(merged, INPUTS), base_logits) == 0.0
    want = peft_logits(tiny_qwen2vl, modern, INPUTS)
    assert differ(want, base_logits) > WRONG
    assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, layout), INPUTS), want) < TOLERANCE
    text = doctor(old, layout)
    assert "old-names" in text and "It can be served." in text


def test_low_rank_on_the_projector(tmp_path: Path, layout: BaseLayout) -> None:
    """LoRA on Qwen2-VL's ``merger``, beside an adapter that saves it in full."""
    low = make(tmp_path / "low", seed=3, target_modules=["q_proj", "merger.mlp.0", "merger.mlp.2"])
    saved = make(tmp_path / "saved", seed=4, target_modules=["q_proj"], modules_to_save=["merger"])
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), low, adapter_name="low"))
    with pytest.raises(KeyError, match=r"merger\.mlp\.0\.base_layer\.weight"):
        model.load_adapter(saved, "saved")
    for folder in (low, saved):
        got = dense_logits(tiny_qwen2vl, read_adapter(folder, layout), INPUTS)
        assert differ(got, peft_logits(tiny_qwen2vl, folder, INPUTS)) < TOLERANCE
        assert doctor(folder, layout).endswith("It can be served.")
    both = combine([(read_adapter(low, layout), 1.0), (read_adapter(saved, layout), -0.5)], own_parameter)
    want = logits_of(sum_of_peft_models({low: 1.0, saved: -0.5}), INPUTS)
    assert differ(want, logits_of(tiny_qwen2vl(), INPUTS)) > WRONG
    assert both.modules >= {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
