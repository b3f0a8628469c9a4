"""Right merges pass, as adapters and as checkpoints; and each way in which one can be spoilt is told for what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.errors import VerificationFailed
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.merge import verdict, verify
from lora_runtime.merge.adapters import merge
from lora_runtime.merge.base import BaseCheckpoint
from lora_runtime.merge.changes import AdapterChanges
from lora_runtime.merge.expected import distances
from lora_runtime.merge.probes import Generation
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.shard import TensorReport, merge_shard
from lora_runtime.merge.verify import expected_of, rounding_warnings, verify_adapter, verify_checkpoint
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights, LoraFactors
from lora_runtime.zoo.paths import ADAPTERS, BASE
from tests.oracle.models import logits_of, sample_inputs
from tests.oracle.world import World, build_world

Shares = dict[str, float]
MIXED: Shares = {"rslora": 0.5, "patterns": -0.3}
SAVED: Shares = {"saved_merger": 0.5, "tokens": 0.7, "own_biases": 0.4}
RIGHT = [
    ("cat", MIXED),
    ("linear", SAVED),
    ("ties", {"rslora": 0.5, "tower": 0.7, "saved_merger": 0.3}),
    ("svd", {"vocabulary_lora": 0.6, "saved_head": 0.5}),
    ("cat", {"ia3": 0.5, "loha": 0.5}),
]
NAMES = ["low rank", "saved merger and tokens", "ties", "vocabulary", "nothing but saved modules"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["stored fp32", "stored bf16"])
def base(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(world, tmp_path_factory.mktemp("base") / "base", request.param)


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(world, tmp_path_factory.mktemp("plain") / "base", torch.float32)


def sharded(world: World, out: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(world.base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    world.load().to(dtype).save_pretrained(out, max_shard_size="300KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def merged(world: World, base: Path, method: str, shares: Shares) -> tuple[AdapterWeights, AdapterWeights]:
    """What the merge makes, and what it is expected to be."""
    inputs = [{"adapter": name, "weight": weight} for name, weight in shares.items()]
    recipe = Recipe.model_validate({"method": method, "inputs": inputs})
    adapters, parameters = {name: world.read(name) for name in shares}, BaseParameters(base)
    found = merge(recipe, adapters, parameters).weights
    return found, expected_of(recipe, adapters, parameters, found)


def as_adapter(weights: AdapterWeights, base: Path, out: Path) -> Path:
    write_adapter(weights, out, BaseLayout.from_config(base), base_name="tiny")
    return out


def as_checkpoint(weights: AdapterWeights, base: Path, out: Path) -> Path:
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for shard in BaseCheckpoint(base).shards:
        merge_shard(base / shard.file, out / shard.file, AdapterChanges(weights), shard.places)
    return out


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()  # it may be mapped
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("method", "shares"), RIGHT, ids=NAMES)
def test_a_right_adapter_passes(world: World, tmp_path: Path, method: str, shares: Shares):
    found, expected = merged(world, world.base, method, shares)
    report = verify_adapter(as_adapter(found, world.base, tmp_path / "out"), world.base, expected)
    assert report.kl_to_expected < 1e-9 and report.agreement_with_expected == 1.0 and report.max_abs_logit < 1e-3
    assert report.kl_to_base > 1e-3 and not report.is_same_as_base and report.num_positions > 150
    assert [len(generation.tokens) > 0 for generation in report.generation] == [True, True]
    assert report.warnings == [] and report.loaded_by.startswith("peft 0.21")
    json.dumps(asdict(report))


@pytest.mark.parametrize(("method", "shares"), RIGHT, ids=NAMES)
def test_a_right_checkpoint_passes(world: World, base: Path, tmp_path: Path, method: str, shares: Shares):
    """In bf16 as tightly as in fp32: what it is compared with is rounded as it is."""
    found, expected = merged(world, base, method, shares)
    report = verify_checkpoint(as_checkpoint(found, base, tmp_path / "out"), base, expected)
    assert report.kl_to_expected < 1e-7 and report.agreement_with_expected == 1.0 and report.max_abs_logit < 5e-3
    assert report.kl_to_base > 1e-3 and report.warnings == [] and report.loaded_by.startswith("transformers 5")
    is_bf16 = BaseParameters(base)("lm_head", "weight").dtype is torch.bfloat16
    assert (report.kl_of_rounding > 1e-7) is is_bf16


@pytest.mark.parametrize("shares", [MIXED, SAVED], ids=["low rank", "saved"])
def test_bf16_is_enough_to_pass_and_to_fail(world: World, plain: Path, tmp_path: Path, shares: Shares):
    """For models whose fp32 does not fit."""
    found, expected = merged(world, plain, "cat", shares)
    folder = as_adapter(found, plain, tmp_path / "adapter")
    assert verify_adapter(folder, plain, expected, dtype=torch.bfloat16).kl_to_expected < 1e-2
    checkpoint = as_checkpoint(found, plain, tmp_path / "checkpoint")
    assert verify_checkpoint(checkpoint, plain, expected, dtype=torch.bfloat16).kl_to_expected < 1e-2
    _, other = merged(world, plain, "cat", {name: weight * 1.6 for name, weight in shares.items()})
    with pytest.raises(VerificationFailed, match="does not do what was meant"):
        verify_checkpoint(checkpoint, plain, other, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not in torch\.float16"):
        verify_checkpoint(checkpoint, plain, expected, dtype=torch.float16)


def test_qwen2_5_vl(tmp_path: Path):
    world = build_world(tmp_path, qwen2_5=True)
    found, expected = merged(world, world.base, "linear", {**MIXED, "saved_merger": 0.5})
    assert verify_adapter(as_adapter(found, world.base, tmp_path / "a"), world.base, expected).warnings == []
    assert verify_checkpoint(as_checkpoint(found, world.base, tmp_path / "c"), world.base, expected).warnings == []


def test_the_zoo(tmp_path: Path):
    """A trained base: some of its answers to noise end at once, and are no prompt to generate from."""
    layout, parameters = BaseLayout.from_config(BASE), BaseParameters(BASE)
    expected = combine([(read_adapter(ADAPTERS[name], layout), 0.5) for name in ("shape", "french")], parameters)
    for report in (
        verify_adapter(as_adapter(expected, BASE, tmp_path / "a"), BASE, expected),
        verify_checkpoint(as_checkpoint(expected, BASE, tmp_path / "c"), BASE, expected),
    ):
        assert report.kl_to_base > 1e-2 and report.kl_to_expected < 1e-9
    with_head = read_adapter(ADAPTERS["warmth"], layout)
    report = verify_adapter(as_adapter(with_head, BASE, tmp_path / "h"), BASE, with_head)
    assert any("no probe runs it" in warning for warning in report.warnings)


@pytest.mark.parametrize("name", ["tokens", "saved_head", "vocabulary_lora", "plain", "saved_vocabulary"])
def test_a_tied_base(tied_world: World, tmp_path: Path, name: str):
    """As adapters all of them pass. A checkpoint can hold what changes both ends alike; what does not is told."""
    weights = tied_world.read(name)
    base = tied_world.base
    report = verify_adapter(as_adapter(weights, base, tmp_path / "a"), base, weights)
    assert report.kl_to_base > 1e-4
    checkpoint = as_checkpoint(weights, base, tmp_path / "c")
    if name in ("tokens", "plain"):
        assert verify_checkpoint(checkpoint, base, weights).kl_to_base > 1e-4
    else:
        with pytest.raises(VerificationFailed) as caught:
            verify_checkpoint(checkpoint, base, weights)
        assert caught.value.facts["report"]["num_positions"] > 150


def test_nothing_that_was_asked_for_is_a_warning(world: World, plain: Path, tmp_path: Path):
    found, expected = merged(world, plain, "cat", dict.fromkeys(SAVED, 0.0))
    for report in (
        verify_adapter(as_adapter(found, plain, tmp_path / "a"), plain, expected),
        verify_checkpoint(as_checkpoint(found, plain, tmp_path / "c"), plain, expected),
    ):
        assert report.is_same_as_base and "changes nothing of the base, as was asked" in report.warnings[0]


def test_little_is_a_warning(world: World, plain: Path, tmp_path: Path):
    found, expected = merged(world, plain, "cat", {"plain": 1e-3})
    report = verify_checkpoint(as_checkpoint(found, plain, tmp_path / "out"), plain, expected)
    assert not report.is_same_as_base and "hardly tell" in report.warnings[0]


def test_a_narrow_adapter_is_told(world: World, tmp_path: Path):
    found, expected = merged(world, world.base, "cat", MIXED)
    folder = as_adapter(found, world.base, tmp_path / "out")
    narrow = lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()}  # noqa: E731
    rewritten(folder / "adapter_model.safetensors", narrow)
    report = verify_adapter(folder, world.base, expected)
    assert report.kl_to_expected < 1e-9 and "its dtype rounds it" in report.warnings[0]


def zeroed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    return {**tensors, name: torch.zeros_like(tensors[name])}


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = max(sorted(tensors), key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[3] = torch.nan
    return tensors


def under_old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual."): t
        for name, t in tensors.items()
    }


def with_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 128)}


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        (zeroed, "tensors", "1 of 23 modules differ, .* by 1 of it"),
        (with_nan, "read", "cannot be read back"),
        (with_more, "read", "cannot be read back"),
        (under_old_names, "load", "in part only"),
    ],
    ids=["a tensor is zero", "NaN", "a tensor too many", "old names"],
)
def test_a_spoilt_adapter_is_caught(world: World, tmp_path: Path, spoil, check: str, said: str):
    found, expected = merged(world, world.base, "cat", {**MIXED, "tower": 0.4})
    folder = as_adapter(found, world.base, tmp_path / "out")
    rewritten(folder / "adapter_model.safetensors", spoil)
    with pytest.raises(VerificationFailed, match=said) as caught:
        verify_adapter(folder, world.base, expected)
    assert caught.value.facts["check"] == check


def test_old_names_are_the_base_to_peft(world: World, tmp_path: Path):
    """The story behind the check: here it reads as it was meant, and to PEFT's users it is the bare base."""
    weights = world.read("plain")
    folder = as_adapter(weights, world.base, tmp_path / "out")
    rewritten(folder / "adapter_model.safetensors", under_old_names)
    read = read_adapter(folder, BaseLayout.from_config(world.base))
    assert max(distances(weights, read, BaseLayout.from_config(world.base)).values()) < 1e-5
    with pytest.warns(UserWarning, match="missing adapter keys"):
        adapted = PeftModel.from_pretrained(world.load(), folder).eval()
    text = sample_inputs(with_image=False)
    assert torch.equal(logits_of(adapted, text), logits_of(world.load(), text))


def test_what_peft_drops_and_does_not_report_is_caught(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = world.read("plain")
    monkeypatch.setattr(verify, "load_adapted", lambda *_: world.load())
    with pytest.raises(VerificationFailed, match="The merge changes nothing"):
        verify_adapter(as_adapter(weights, world.base, tmp_path / "out"), world.base, weights)


def test_another_scale_or_weight_of_an_adapter_is_caught(world: World, tmp_path: Path):
    found, _ = merged(world, world.base, "cat", {"plain": 0.7})
    _, expected = merged(world, world.base, "cat", {"plain": 0.5})
    folder = as_adapter(found, world.base, tmp_path / "out")
    with pytest.raises(VerificationFailed, match=r"4 of 4 modules differ, .* by 0\.4 of it"):
        verify_adapter(folder, world.base, expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(VerificationFailed, match="by 1 of it"):
        verify_adapter(folder, world.base, found)


def test_a_truncated_adapter_is_caught(world: World, tmp_path: Path):
    folder = as_adapter(world.read("plain"), world.base, tmp_path / "out")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(VerificationFailed, match="cannot be read back"):
        verify_adapter(folder, world.base, world.read("plain"))


def test_another_head_is_caught(world: World, tmp_path: Path):
    weights = world.read("classifier")
    folder = as_adapter(weights, world.base, tmp_path / "out")
    assert "no probe runs it" in verify_adapter(folder, world.base, weights).warnings[0]
    head = weights.heads["score"]
    other = replace(weights, heads={"score": replace(head, weight=head.weight * 1.5)})
    with pytest.raises(VerificationFailed, match="1 of 3 modules differ, score"):
        verify_adapter(folder, world.base, other)


@pytest.fixture(scope="module")
def right(world: World, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdapterWeights]:
    found, expected = merged(world, plain, "cat", {**MIXED, "saved_merger": 0.5})
    return as_checkpoint(found, plain, tmp_path_factory.mktemp("right") / "out"), expected


def shard_of(folder: Path, part: str) -> Path:
    """The file with a tensor of this name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in index.items() if part in name)


def zero_a_tensor(out: Path, base: Path) -> None:
    part = "layers.1.self_attn.o_proj.weight"
    rewritten(shard_of(out, part), lambda tensors: {n: t * 0 if n.endswith(part) else t for n, t in tensors.items()})


def put_nan(out: Path, base: Path) -> None:
    rewritten(shard_of(out, "layers.0.mlp.up_proj"), with_nan)


def put_base_shard(out: Path, base: Path) -> None:
    file = shard_of(out, "layers.1.mlp.down_proj")
    file.write_bytes((base / file.name).read_bytes())


def put_base_shards(out: Path, base: Path) -> None:
    for file in out.glob("*.safetensors"):
        file.write_bytes((base / file.name).read_bytes())


def rename_a_tensor(out: Path, base: Path) -> None:
    rewritten(
        shard_of(out, "layers.1.mlp.down_proj"),
        lambda tensors: {name.replace("down_proj", "drop_proj"): tensor for name, tensor in tensors.items()},
    )


def truncate(out: Path, base: Path) -> None:
    file = shard_of(out, "layers.1.mlp.down_proj")
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(out: Path, base: Path) -> None:
    shard_of(out, "layers.1.mlp.down_proj").unlink()


def lose_the_tokenizer(out: Path, base: Path) -> None:
    (out / "tokenizer.json").unlink()


def change_the_template(out: Path, base: Path) -> None:
    file = out / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def change_the_end(out: Path, base: Path) -> None:
    file = out / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        (zero_a_tensor, "function", "does not do what was meant"),
        (put_base_shard, "function", "does not do what was meant"),
        (put_base_shards, "no-op", "The merge changes nothing"),
        (put_nan, "finite", "NaN or infinity"),
        (rename_a_tensor, "load", "missing keys"),
        (truncate, "load", "cannot load the merged checkpoint"),
        (lose_a_shard, "load", "cannot load the merged checkpoint"),
        (lose_the_tokenizer, "files", r"Missing: tokenizer\.json"),
        (change_the_template, "files", r"Other than the base's: chat_template\.jinja"),
        (change_the_end, "files", r"Other than the base's: generation_config\.json"),
    ],
)
def test_a_spoilt_checkpoint_is_caught(
    right: tuple[Path, AdapterWeights], plain: Path, tmp_path: Path, spoil, check: str, said: str
):
    folder, expected = right
    shutil.copytree(folder, tmp_path / "out")
    spoil(tmp_path / "out", plain)
    with pytest.raises(VerificationFailed, match=said) as caught:
        verify_checkpoint(tmp_path / "out", plain, expected)
    assert caught.value.facts["check"] == check
    json.dumps(caught.value.facts)


def test_another_weight_in_a_checkpoint_is_caught(world: World, base: Path, tmp_path: Path):
    found, _ = merged(world, base, "cat", {"plain": 0.7})
    _, expected = merged(world, base, "cat", {"plain": 0.5})
    with pytest.raises(VerificationFailed, match="does not do what was meant") as caught:
        verify_checkpoint(as_checkpoint(found, base, tmp_path / "out"), base, expected)
    report = caught.value.facts["report"]
    assert report["kl_to_expected"] > 1e-5 and report["num_positions"] > 150


def test_a_change_that_rounding_takes_away_is_caught(world: World, tmp_path: Path):
    """Each tensor is the nearest to what was meant, and the result is the base."""
    base = sharded(world, tmp_path / "base", torch.bfloat16)
    for file in base.glob("*.safetensors"):  # numbers near zero would hold the smallest change
        rewritten(file, lambda tensors: {name: t.sign() * t.abs().clamp(min=0.01) for name, t in tensors.items()})
    found, expected = merged(world, base, "cat", {"plain": 1e-5})
    folder = as_checkpoint(found, base, tmp_path / "out")
    with pytest.raises(VerificationFailed, match="rounds the whole merge away") as caught:
        verify_checkpoint(folder, base, expected)
    assert caught.value.facts["check"] == "lost"
    report = verify_checkpoint(folder, base, expected, allow_lost=True)
    assert report.is_same_as_base and "rounds the whole merge away" in report.warnings[0]


def test_a_change_that_rounding_takes_in_part_is_told(world: World, tmp_path: Path):
    base = sharded(world, tmp_path / "base", torch.bfloat16)
    found, expected = merged(world, base, "cat", {"plain": 0.01})
    report = verify_checkpoint(as_checkpoint(found, base, tmp_path / "out"), base, expected)
    assert report.kl_of_rounding > 0 and any("part of it is lost" in warning for warning in report.warnings)


def test_a_merge_that_says_nothing_is_caught(right: tuple[Path, AdapterWeights], plain: Path, monkeypatch):
    def silent(model: object, inputs: dict[str, Tensor], is_expected: bool) -> Generation:
        return Generation(probe="text", num_prompt_tokens=24, tokens=(), num_ordinary=0, is_expected=is_expected)

    monkeypatch.setattr(verdict, "generated", silent)
    folder, expected = right
    with pytest.raises(VerificationFailed, match="the merge generates nothing"):
        verify_checkpoint(folder, plain, expected)


SPREAD = [
    {"adapter": "rslora", "weight": (0.2, 0.9)},
    {"adapter": "saved_merger", "weight": [{"modules": "*attn*", "weight": 0.5}, {"modules": "*", "weight": 0.1}]},
    {"adapter": "tokens", "weight": 0.6},
]


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_exact_methods_are_expected_from_their_inputs(world: World, method: str):
    """Weights by layer and by module, and a scale: what merge() makes has no part in it, and agrees."""
    recipe = Recipe.model_validate({"method": method, "inputs": SPREAD, "scale": 0.5})
    adapters = {str(found["adapter"]): world.read(str(found["adapter"])) for found in SPREAD}
    base, layout = BaseParameters(world.base), BaseLayout.from_config(world.base)
    nothing = AdapterWeights(version="wrong")
    expected = expected_of(recipe, adapters, base, nothing)
    found = distances(expected, merge(recipe, adapters, base).weights, layout)
    assert len(found) > 15 and max(found.values()) < 1e-5
    ties = Recipe.model_validate({"method": "ties", "inputs": SPREAD})
    assert expected_of(ties, adapters, base, nothing) is nothing


def test_plain_weights_are_a_combination(world: World):
    recipe = Recipe.model_validate(
        {"method": "linear", "inputs": [{"adapter": name, "weight": weight} for name, weight in SAVED.items()]}
    )
    adapters, base = {name: world.read(name) for name in SAVED}, BaseParameters(world.base)
    want = combine([(adapters[name], weight) for name, weight in SAVED.items()], base)
    expected = expected_of(recipe, adapters, base, AdapterWeights(version="x"))
    assert max(distances(want, expected, BaseLayout.from_config(world.base)).values()) < 1e-6


def test_deltas_that_cancel_are_compared_by_what_was_added(world: World):
    """Their sum is rounding, and so is its own relative error."""
    leaf = "model.language_model.layers.0.self_attn.q_proj"
    a, b = torch.randn(4, 128), torch.randn(128, 4)
    noise = torch.randn(128, 8) * 1e-7
    one = LoraFactors(a=torch.cat([a, a]), b=torch.cat([b, -b], dim=1), scaling=1.0)
    two = replace(one, b=one.b + noise)
    weights = [AdapterWeights(version="x", lora={leaf: factors}) for factors in (one, two)]
    assert 0 < max(distances(*weights, BaseLayout.from_config(world.base)).values()) < 1e-4


def test_rounding_is_told_with_the_worst_tensors():
    def report(rounding: float) -> TensorReport:
        return TensorReport(delta_norm=1.0, rounding=rounding, changed=0.15, is_finite=True)

    assert rounding_warnings({"a": report(0.1), "b": report(0.2)}) == []
    (said,) = rounding_warnings({"a": report(0.3), "b": report(0.86), "c": report(0.01)})
    assert "2 of 3 changed tensors" in said and "b (86%, 15% of its entries changed), a (30%" in said
    assert "keep it as an adapter" in said and "fp32" in said
