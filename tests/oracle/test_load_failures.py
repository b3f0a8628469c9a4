"""Load failures of PEFT 0.21.2: what PEFT does today, and what happens here.

Each test asserts PEFT's behaviour first (an error, or a silently wrong model), so that it also
tells when a newer PEFT has mended it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.errors import MissingTensors, UnknownModules, UnsupportedAdapter
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights
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
TOLERANCE = 1e-5
WRONG = 1e-2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    return BaseLayout.from_model(tiny_qwen2vl())


@pytest.fixture(scope="module")
def base_logits() -> Tensor:
    return logits_of(tiny_qwen2vl(), INPUTS)


def make(path: Path, seed: int = 1, **options: object) -> Path:
    return save_adapter(tiny_qwen2vl, LoraConfig(r=4, **options), path, seed=seed)


def renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of an adapter under other tensor names; None drops a tensor."""
    target.mkdir()
    found = {rename(key): tensor for key, tensor in load_file(source / "adapter_model.safetensors").items()}
    save_file({key: t for key, t in found.items() if key is not None}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return target


def old_name(key: str) -> str:
    """As saved with transformers < 4.52."""
    return key.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def quietly(call: Callable[[], PeftModel]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call().eval()


class TestLowRankBesideSavedMerger:
    """One resident adapter has LoRA on the merger's layers, another saves the merger in full."""

    @pytest.fixture(scope="class")
    def paths(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("merger")
        return {
            "low rank": make(root / "low", seed=3, target_modules=["q_proj", "merger.mlp.0", "merger.mlp.2"]),
            "saved": make(root / "saved", seed=4, target_modules=["q_proj"], modules_to_save=["merger"]),
        }

    def test_peft_raises_when_the_saved_one_comes_second(self, paths: dict[str, Path]) -> None:
        model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), paths["low rank"], adapter_name="low"))
        with pytest.raises(KeyError, match=r"merger\.mlp\.0\.base_layer\.weight"):
            model.load_adapter(paths["saved"], "saved")
        assert "saved" in model.peft_config, "and the half-loaded adapter can still be selected"

    def test_peft_is_silently_wrong_when_the_saved_one_comes_first(self, paths: dict[str, Path]) -> None:
        model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), paths["saved"], adapter_name="saved"))
        result = model.load_adapter(paths["low rank"], "low")
        assert result.missing_keys == []
        assert len(result.unexpected_keys) == 4
        model.set_adapter("low")
        want = peft_logits(tiny_qwen2vl, paths["low rank"], INPUTS)
        assert differ(logits_of(model.eval(), INPUTS), want) > WRONG

    def test_here_each_is_what_it_is_alone(self, paths: dict[str, Path], layout: BaseLayout) -> None:
        for path in paths.values():
            got = dense_logits(tiny_qwen2vl, read_adapter(path, layout), INPUTS)
            assert differ(got, peft_logits(tiny_qwen2vl, path, INPUTS)) < TOLERANCE

    def test_here_both_together_are_the_sum_of_their_deltas(self, paths: dict[str, Path], layout: BaseLayout) -> None:
        low, saved = (read_adapter(paths[name], layout) for name in ("low rank", "saved"))
        want = logits_of(apply_dense(apply_dense(tiny_qwen2vl(), saved), low), INPUTS)
        for members in ([(low, 1.0), (saved, 1.0)], [(saved, 1.0), (low, 1.0)]):
            assert differ(dense_logits(tiny_qwen2vl, combine(members, own_parameter), INPUTS), want) < TOLERANCE


class TestOldNames:
    """Saved with transformers < 4.52, loaded with today's."""

    @pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["qkv", "merger.mlp.0"]], ids=["language", "vision"])
    def test_low_rank(self, tmp_path: Path, layout: BaseLayout, base_logits: Tensor, targets: list[str]) -> None:
        modern = make(tmp_path / "modern", target_modules=targets)
        old = renamed(modern, tmp_path / "old", old_name)
        with pytest.warns(UserWarning, match="missing adapter keys"):
            model = PeftModel.from_pretrained(tiny_qwen2vl(), old).eval()
        assert differ(logits_of(model, INPUTS), base_logits) == 0.0, "PEFT loads it as a no-op"
        want = peft_logits(tiny_qwen2vl, modern, INPUTS)
        assert differ(want, base_logits) > WRONG
        assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, layout), INPUTS), want) < TOLERANCE

    def test_a_second_adapter_without_a_word(self, tmp_path: Path, layout: BaseLayout, base_logits: Tensor) -> None:
        modern = make(tmp_path / "modern", target_modules=["q_proj"])
        old = renamed(modern, tmp_path / "old", old_name)
        model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), modern, adapter_name="first"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_adapter(old, "second")
        model.set_adapter("second")
        assert differ(logits_of(model.eval(), INPUTS), base_logits) == 0.0
        want = peft_logits(tiny_qwen2vl, modern, INPUTS)
        assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, layout), INPUTS), want) < TOLERANCE

    def test_a_saved_merger(self, tmp_path: Path, layout: BaseLayout) -> None:
        modern = make(tmp_path / "modern", target_modules=["q_proj"], modules_to_save=["merger"])
        old = renamed(modern, tmp_path / "old", old_name)
        with pytest.raises(KeyError, match=r"merger\.ln_q\.weight"):
            peft_logits(tiny_qwen2vl, old, INPUTS)
        want = peft_logits(tiny_qwen2vl, modern, INPUTS)
        assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, layout), INPUTS), want) < TOLERANCE

    def test_a_saved_head_is_half_applied_by_peft(
        self, tmp_path: Path, layout: BaseLayout, base_logits: Tensor
    ) -> None:
        modern = make(tmp_path / "modern", target_modules=["q_proj"], modules_to_save=["lm_head"])
        old = renamed(modern, tmp_path / "old", old_name)
        want = peft_logits(tiny_qwen2vl, modern, INPUTS)
        half = peft_logits(tiny_qwen2vl, old, INPUTS)
        assert differ(half, base_logits) > WRONG
        assert differ(half, want) > WRONG
        assert differ(dense_logits(tiny_qwen2vl, read_adapter(old, layout), INPUTS), want) < TOLERANCE


@pytest.mark.parametrize("inserted", ["default", "default.default"])
def test_an_adapter_name_inside_the_keys(
    tmp_path: Path, layout: BaseLayout, base_logits: Tensor, inserted: str
) -> None:
    clean = make(tmp_path / "clean", target_modules=["q_proj"])
    named = renamed(clean, tmp_path / "named", lambda key: re.sub(r"(lora_[AB])\.", rf"\1.{inserted}.", key))
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), named, adapter_name="mine"))
    assert differ(logits_of(model, INPUTS), base_logits) == 0.0, "PEFT loads it as a no-op"
    want = peft_logits(tiny_qwen2vl, clean, INPUTS)
    assert differ(dense_logits(tiny_qwen2vl, read_adapter(named, layout), INPUTS), want) < TOLERANCE


def test_an_adapter_named_like_a_module(tmp_path: Path, layout: BaseLayout) -> None:
    path = make(tmp_path / "merger", target_modules=["merger.mlp.0", "q_proj"])
    other = make(tmp_path / "other", target_modules=["q_proj"], modules_to_save=["merger"])
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), path, adapter_name="x"))
    with pytest.raises(ValueError, match="does not conflict with any of the targeted modules"):
        model.load_adapter(other, "merger")
    # Names are no part of the weights form; the folder may be called what it likes.
    for folder in (path, other):
        got = dense_logits(tiny_qwen2vl, read_adapter(folder, layout), INPUTS)
        assert differ(got, peft_logits(tiny_qwen2vl, folder, INPUTS)) < TOLERANCE


def test_half_of_the_layers(tmp_path: Path, layout: BaseLayout, base_logits: Tensor) -> None:
    whole = make(tmp_path / "whole", target_modules=["q_proj"])
    half = renamed(whole, tmp_path / "half", lambda key: None if ".layers.1." in key else key)
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), whole, adapter_name="whole"))
    model.load_adapter(half, "part")
    model.set_adapter("part")
    got = logits_of(model.eval(), INPUTS)
    assert differ(got, base_logits) > WRONG
    assert differ(got, peft_logits(tiny_qwen2vl, whole, INPUTS)) > WRONG, "PEFT loads half of it without a word"
    with pytest.raises(MissingTensors, match=r"model\.language_model\.layers\.1\.self_attn\.q_proj\.lora_A") as caught:
        read_adapter(half, layout)
    assert len(caught.value.facts["missing"]) == 2


def test_names_that_match_nothing(tmp_path: Path, layout: BaseLayout, base_logits: Tensor) -> None:
    right = make(tmp_path / "right", target_modules=["q_proj"])
    wrong = renamed(right, tmp_path / "wrong", lambda key: key.replace("q_proj", "q_prj"))
    assert differ(peft_logits(tiny_qwen2vl, wrong, INPUTS), base_logits) == 0.0, "PEFT loads it as a no-op"
    with pytest.raises(UnknownModules, match=r"q_prj.*nearest in the base: .*self_attn\.q_proj") as caught:
        read_adapter(wrong, layout)
    assert len(caught.value.facts["unmatched"]) == 4


def test_a_low_rank_part_that_the_config_does_not_name(tmp_path: Path, layout: BaseLayout) -> None:
    path = make(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    full = peft_logits(tiny_qwen2vl, path, INPUTS)
    edit(path, target_modules=["q_proj"])
    assert differ(peft_logits(tiny_qwen2vl, path, INPUTS), full) > WRONG, "PEFT drops the v_proj tensors in silence"
    with pytest.raises(UnknownModules, match=r"do not name: .*v_proj"):
        read_adapter(path, layout)


def test_a_pattern_that_ran_into_dropout(tmp_path: Path, layout: BaseLayout) -> None:
    """``Target module Dropout is not supported``: a pattern that ends in ``.*`` met the first adapter's own layers."""
    pattern = r"^(?!.*visual).*(?:q_proj|v_proj).*"
    first = make(tmp_path / "first", seed=1, target_modules=pattern, lora_dropout=0.1)
    second = make(tmp_path / "second", seed=2, target_modules=pattern, lora_dropout=0.1)
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), first, adapter_name="first"))
    model.load_adapter(second, "second")
    model.set_adapter("second")
    want = logits_of(model.eval(), INPUTS)  # mended since PEFT 0.18
    assert differ(dense_logits(tiny_qwen2vl, read_adapter(second, layout), INPUTS), want) < TOLERANCE
    edit(second, target_modules=["q_proj", "Dropout"])
    with pytest.raises(UnknownModules, match="'Dropout'"):
        read_adapter(second, layout)


def test_low_rank_on_a_container(tmp_path: Path, layout: BaseLayout) -> None:
    path = make(tmp_path / "adapter", target_modules=["merger.mlp.0", "merger.mlp.2"])
    edit(path, target_modules=["merger"])
    with pytest.raises(ValueError, match=r"(?s)PatchMerger.* is not supported"):
        peft_logits(tiny_qwen2vl, path, INPUTS)
    with pytest.raises(UnknownModules, match=r"'merger' \(did you mean .*model\.visual\.merger\.mlp\.0"):
        read_adapter(path, layout)
    edit(path, target_modules=".*merger.*")
    with pytest.raises(UnsupportedAdapter, match=r"model\.visual\.merger"):
        read_adapter(path, layout)


def test_no_matching_loras(tmp_path: Path, layout: BaseLayout) -> None:
    """PEFT cannot combine adapters of different layers, and cannot combine saved modules at all."""
    one = make(tmp_path / "one", seed=1, target_modules=["q_proj"], layers_to_transform=[0])
    two = make(tmp_path / "two", seed=2, target_modules=["v_proj"], layers_to_transform=[1])
    three = make(tmp_path / "three", seed=3, target_modules=["v_proj"], modules_to_save=["lm_head"])
    four = make(tmp_path / "four", seed=4, target_modules=["v_proj"], modules_to_save=["lm_head"])
    model = quietly(lambda: PeftModel.from_pretrained(tiny_qwen2vl(), one, adapter_name="one"))
    for name, path in {"two": two, "three": three, "four": four}.items():
        model.load_adapter(path, name)
    with pytest.raises(ValueError, match="No matching LoRAs found"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["three", "four"], [0.5, 0.5], "heads")
    shares = {one: 0.5, two: -0.25, three: 0.5, four: 1.5}
    members = [(read_adapter(path, layout), share) for path, share in shares.items()]
    got = dense_logits(tiny_qwen2vl, combine(members, own_parameter), INPUTS)
    assert differ(got, logits_of(sum_of_peft_models(shares), INPUTS)) < TOLERANCE


def own_parameter(leaf: str, parameter: str) -> Tensor:
    return tiny_qwen2vl().get_parameter(f"{leaf}.{parameter}").detach()


def sum_of_peft_models(shares: dict[Path, float]) -> nn.Module:
    """base + Σ w (PEFT's merged model - base): the truth without any code of ours."""
    total = tiny_qwen2vl()
    with torch.no_grad():
        for path, share in shares.items():
            merged = quietly(lambda path=path: PeftModel.from_pretrained(tiny_qwen2vl(), path)).merge_and_unload()
            assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
            for (name, own), (_, changed) in zip(
                tiny_qwen2vl().named_parameters(), merged.named_parameters(), strict=True
            ):
                total.get_parameter(name).add_(share * (changed - own))
    return total


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_empty_adapter_is_the_base(base_logits: Tensor) -> None:
    """The yardstick itself: adding nothing changes nothing."""
    assert differ(dense_logits(tiny_qwen2vl, AdapterWeights(version="none"), INPUTS), base_logits) == 0.0
