"""What the doctor says of adapters that PEFT made and that were then spoilt, as they are in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lora_runtime.behaviour import behaviour
from lora_runtime.doctor import Diagnosis, diagnose, seen
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from serve.cli import app
from tests.oracle.methods import METHODS
from tests.oracle.models import dense_logits, peft_logits, sample_inputs, save_adapter, tiny_qwen2vl

INPUTS = sample_inputs()
PLAIN = LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["merger"])
Spoil = Callable[[dict[str, Tensor], dict[str, object]], tuple[dict[str, Tensor], dict[str, object]]]


def examined(folder: Path, *, tie: bool = False) -> Diagnosis:
    model = tiny_qwen2vl(tie=tie)
    base = Materialiser(lambda leaf, name: model.get_parameter(f"{leaf}.{name}").detach(), 1 << 30)
    return diagnose(folder, BaseLayout.from_model(tiny_qwen2vl(tie=tie)), base)


def codes(found: Diagnosis) -> list[str]:
    """Without what random weights of this size always are."""
    return [finding.code for finding in found.findings if finding.code != "large-change"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_qwen2vl, PLAIN, tmp_path_factory.mktemp("plain") / "plain")


def spoilt(folder: Path, to: Path, spoil: Spoil) -> Path:
    tensors, config = spoil(
        load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    )
    to.mkdir()
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    return to


def renamed(change: Callable[[str], str]) -> Spoil:
    return lambda tensors, config: ({change(name): tensor for name, tensor in tensors.items()}, config)


def configured(**changes: object) -> Spoil:
    return lambda tensors, config: (tensors, {**config, **changes})


def changed(where: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda tensors, config: (
        {name: change(tensor) if where in name else tensor for name, tensor in tensors.items()},
        config,
    )


def without(where: str) -> Spoil:
    return lambda tensors, config: ({n: t for n, t in tensors.items() if where not in n}, config)


def old_names(name: str) -> str:
    name = name.replace("model.language_model.", "model.")
    return name.replace("base_model.model.model.visual", "base_model.model.visual")


def inserted(adapter: str) -> Spoil:
    return renamed(lambda n: n.replace("lora_A.", f"lora_A.{adapter}.").replace("lora_B.", f"lora_B.{adapter}."))


SPOILT: dict[str, tuple[Spoil, bool, str, str]] = {
    "names of transformers before 4.52": (renamed(old_names), True, "old-names", "without a word"),
    "default. inside keys": (inserted("default"), True, "adapter-name-in-keys", "adapter's name"),
    "default.default.": (inserted("default.default"), True, "adapter-name-in-keys", "adapter's name"),
    "the prefix twice": (renamed(lambda n: f"base_model.model.{n}"), True, "doubled-prefix", "wrapped again"),
    "names of nothing": (renamed(lambda n: n.replace("q_proj", "query")), False, "unknown-modules", "q_proj"),
    "half of the layers": (without("layers.1.self_attn"), False, "missing-tensors", "layers.1.self_attn.q_proj"),
    "saved modules without tensors": (without("merger"), False, "missing-tensors", "merger"),
    "B all zero": (changed("lora_B", torch.zeros_like), True, "idle-modules", "exactly what the base does"),
    "NaN": (changed("lora_A", lambda t: t * float("nan")), False, "non-finite-weights", "NaN"),
    "another rank in the config": (configured(r=8), False, "shape-mismatch", "lora_A"),
    "another base's width": (changed("q_proj.lora_A", lambda t: t[:, :64]), False, "shape-mismatch", "(4, 64)"),
    "a target that is Dropout": (
        configured(target_modules=r".*(q_proj|fc1|dropout|self_attn)"), False, "unsupported-adapter", "self_attn"
    ),
    "a target that is nowhere": (
        configured(target_modules=["q_proj", "fc1", "qproj"]), False, "unknown-modules", "did you mean q_proj"
    ),
    "a saved module that is nowhere": (
        configured(modules_to_save=["merger", "mergers"]), False, "unknown-modules", "mergers"
    ),
    "a method that is not served": (configured(peft_type="VERA"), False, "unsupported-adapter", "VERA"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_found(plain: Path, tmp_path: Path, name: str) -> None:
    spoil, is_servable, code, words = SPOILT[name]
    found = examined(spoilt(plain, tmp_path / "spoilt", spoil))
    assert found.is_servable == is_servable
    assert code in codes(found)
    finding = next(finding for finding in found.findings if finding.code == code)
    assert words in finding.message
    assert finding.severity == ("warning" if is_servable else "error")


def test_a_sound_adapter_has_nothing(plain: Path) -> None:
    assert codes(examined(plain)) == []


def test_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    folder = save_adapter(tiny_qwen2vl, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "made")
    idle = spoilt(folder, tmp_path / "idle", changed("lora_B", torch.zeros_like))
    assert codes(examined(idle)) == ["no-op"]


def test_parts_that_cancel_change_nothing(tmp_path: Path) -> None:
    """What fp32 makes of x - x, in ranks of their own, is not 0; the adapter changes nothing all the same."""
    folder = save_adapter(tiny_qwen2vl, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "made")
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]

    def doubled(tensors: dict[str, Tensor], config: dict[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
        both = {
            name: torch.cat([t, turn @ t]) if "lora_A" in name else torch.cat([t, -(t @ turn.T)], dim=1)
            for name, t in tensors.items()
        }
        return both, {**config, "r": 8, "lora_alpha": 16}

    assert codes(examined(spoilt(folder, tmp_path / "cancelled", doubled))) == ["no-op"]


def test_one_end_of_tied_weights(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = save_adapter(partial(tiny_qwen2vl, tie=True), config, tmp_path / "tied")
    assert "tied-weights" in codes(examined(folder, tie=True))


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    folder = save_adapter(partial(tiny_qwen2vl, vocabulary=328), config, tmp_path / "larger")
    found = examined(folder)
    assert not found.is_servable and codes(found)[:2] == ["shape-mismatch", "changed-vocabulary"]


def test_a_bare_name_that_means_several_modules(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    folder = save_adapter(tiny_qwen2vl, config, tmp_path / "norms")
    assert codes(examined(folder)) == ["several-modules"]


def test_pickles(plain: Path, tmp_path: Path) -> None:
    both = spoilt(plain, tmp_path / "both", lambda tensors, config: (tensors, config))
    (both / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert codes(examined(both)) == ["pickle"]
    (both / "adapter_model.safetensors").unlink()
    found = examined(both)
    assert not found.is_servable and "pickle" in found.findings[0].message


def test_other_methods_say_what_they_take(tmp_path: Path) -> None:
    found = examined(save_adapter(tiny_qwen2vl, METHODS["loha"], tmp_path / "loha"))
    assert "materialised" in codes(found)


def test_what_is_written_anew_peft_loads_rightly(plain: Path, tmp_path: Path) -> None:
    """Old names are what PEFT passes over silently; the repaired adapter is the one that was trained."""
    old = spoilt(plain, tmp_path / "old", renamed(old_names))
    found = examined(old)
    assert found.weights is not None
    write_adapter(found.weights, tmp_path / "new", BaseLayout.from_model(tiny_qwen2vl()), base_name="tiny")
    want = peft_logits(tiny_qwen2vl, plain, INPUTS)
    assert float((peft_logits(tiny_qwen2vl, tmp_path / "new", INPUTS) - want).abs().max()) < 1e-5
    assert float((dense_logits(tiny_qwen2vl, found.weights, INPUTS) - want).abs().max()) < 1e-5
    assert codes(examined(tmp_path / "new")) == []


def test_a_probe_shows_whether_answers_move(plain: Path, tmp_path: Path) -> None:
    tiny_qwen2vl().save_pretrained(tmp_path / "base")
    moved = examined(plain).weights
    idle = examined(spoilt(plain, tmp_path / "idle", lambda t, c: ({n: x for n, x in t.items() if "merger" not in n}
                    and {n: torch.zeros_like(x) if "lora_B" in n else x for n, x in t.items() if "merger" not in n},
                    {**c, "modules_to_save": None}))).weights  # fmt: skip
    assert moved is not None and idle is not None
    assert seen(behaviour(str(tmp_path / "base"), moved)).code == "probe"
    assert seen(behaviour(str(tmp_path / "base"), idle)).code == "no-op-probe"


def test_the_command(plain: Path, tmp_path: Path) -> None:
    tiny_qwen2vl().save_pretrained(tmp_path / "base")
    old = spoilt(plain, tmp_path / "old", renamed(old_names))
    run = CliRunner().invoke
    arguments = ["doctor", str(old), "--base", str(tmp_path / "base")]
    as_json = run(app, [*arguments, "--json", "--fix", str(tmp_path / "new")])
    assert as_json.exit_code == 0, as_json.output
    answer = json.loads(as_json.stdout)
    assert answer["servable"] is True and answer["findings"][0]["code"] == "old-names"
    table = run(app, [*arguments, "--probe"])
    assert table.exit_code == 0 and "old-names" in table.stdout and "can be served" in table.stdout
    assert run(app, ["doctor", str(tmp_path / "new"), "--base", str(tmp_path / "base")]).exit_code == 0
    broken = spoilt(plain, tmp_path / "broken", without("merger"))
    refused = run(app, ["doctor", str(broken), "--base", str(tmp_path / "base"), "--json"])
    assert refused.exit_code == 1 and json.loads(refused.stdout)["servable"] is False
