"""Adapters that are refused: which error, and that its message says what, where and what to do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_runtime.checkpoint import fingerprint, outline_adapter, read_adapter
from lora_runtime.errors import (
    AdapterMissing,
    LoomError,
    MalformedAdapter,
    MissingTensors,
    NonFiniteWeights,
    ShapeMismatch,
    UnknownModules,
    UnsupportedAdapter,
)
from lora_runtime.layout import BaseLayout
from tests.oracle.models import save_adapter, tiny_qwen2vl

LAYOUT = BaseLayout.from_model(tiny_qwen2vl())
Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.language_model.embed_tokens"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on q_proj and a convolution, a saved merger, trained tokens, and a head."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "patch_embed.proj"],
        modules_to_save=["merger", "score"],
        trainable_token_indices=[3, 70, 5],
    )
    return save_adapter(lambda: tiny_qwen2vl(num_labels=3), config, tmp_path_factory.mktemp("adapter") / "original")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to spoil."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copy / name).write_bytes((original / name).read_bytes())
    yield copy


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors by key; None removes one."""
    file = folder / "adapter_model.safetensors"
    found = load_file(file) | tensors
    save_file({key: tensor for key, tensor in found.items() if tensor is not None}, file)


def refusal(error: type[LoomError], folder: Path, match: str) -> LoomError:
    with pytest.raises(error, match=match) as caught:
        read_adapter(folder, LAYOUT)
    assert type(caught.value) is error
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.message, again.facts) == (caught.value.message, caught.value.facts)
    assert len(caught.value.message) < 2500
    return caught.value


def test_the_original_is_accepted(folder: Path) -> None:
    weights = read_adapter(folder, LAYOUT)
    assert set(weights.heads) == {"score"}
    assert weights.touches_vision
    assert weights.version == fingerprint(folder)


class TestOptions:
    @pytest.mark.parametrize(
        "option",
        [
            {"use_qalora": True},
            {"alora_invocation_tokens": [1, 2]},
            {"megatron_config": {"tensor_model_parallel_size": 2}},
            {"layer_replication": [[0, 1]]},
            {"target_parameters": ["experts.gate_up_proj"]},
            {"use_bdlora": {"nblocks": 2}},
            {"arrow_config": {"top_k": 2}},
            {"kasa_config": {"beta": 0.1}},
            {"monteclora_config": {"n": 1}},
            {"velora_config": {"num_groups": 2}},
            {"option_of_a_later_peft": 1},
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "pissa_niter_16"},
            {"init_lora_weights": "olora"},
            {"init_lora_weights": "corda"},
            {"init_lora_weights": "loftq"},
            {"init_lora_weights": "lora_ga"},
            {"task_type": "TOKEN_CLS"},
        ],
        ids=str,
    )
    def test_not_served(self, folder: Path, option: dict[str, Any]) -> None:
        edit(folder, **option)
        error = refusal(UnsupportedAdapter, folder, next(iter(option)))
        assert error.facts["options"] == list(option)

    @pytest.mark.parametrize("peft_type", ["ADALORA", "VERA", "PREFIX_TUNING", None, 5, ["LORA"]])
    def test_other_methods(self, folder: Path, peft_type: Any) -> None:
        edit(folder, peft_type=peft_type)
        refusal(UnsupportedAdapter, folder, r"LORA \(with DoRA\), LOHA, LOKR, .* are served")

    @pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
    def test_starts_that_leave_the_base_alone(self, folder: Path, init: Any) -> None:
        edit(folder, init_lora_weights=init)
        read_adapter(folder, LAYOUT)

    def test_options_that_are_off_or_inert(self, folder: Path) -> None:
        edit(folder, lora_dropout=0.3, fan_in_fan_out=True, option_of_a_later_peft=False, runtime_config={"a": 1})
        read_adapter(folder, LAYOUT)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"r": 0},
            {"r": -4},
            {"r": "4"},
            {"r": 4.5},
            {"r": True},
            {"r": 10**30},
            {"lora_alpha": "big"},
            {"lora_alpha": None},
            {"target_modules": 5},
            {"target_modules": {"q_proj": 1}},
            {"target_modules": ["q_proj", ""]},
            {"target_modules": ["q_proj", 3]},
            {"target_modules": "("},
            {"modules_to_save": "merger"},
            {"modules_to_save": [""]},
            {"modules_to_save": ["a("]},
            {"rank_pattern": {"q_proj": 0}},
            {"rank_pattern": {"*": 4}},
            {"rank_pattern": ["q_proj"]},
            {"alpha_pattern": {"q_proj": "8"}},
            {"bias": "some"},
            {"trainable_token_indices": [-1]},
            {"trainable_token_indices": ["3"]},
            {"trainable_token_indices": [10**20]},
            {"layers_to_transform": "all"},
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        ],
        ids=str,
    )
    def test_values_of_a_wrong_kind(self, folder: Path, wrong: dict[str, Any]) -> None:
        edit(folder, **wrong)
        refusal(MalformedAdapter, folder, r"adapter_config\.json is wrong at")


class TestNames:
    def test_a_target_with_a_near_name(self, folder: Path) -> None:
        edit(folder, target_modules=["q_proj", "patch_embed.proj", "self_attn.v_prj"])
        error = refusal(UnknownModules, folder, r"'self_attn\.v_prj' \(did you mean .*v_proj")
        assert list(error.facts["unmatched"]) == ["self_attn.v_prj"]

    def test_a_pattern_that_matches_nothing(self, folder: Path) -> None:
        edit(folder, target_modules=".*c_attn")
        refusal(UnknownModules, folder, "c_attn")

    def test_all_unknown_names_in_one_message(self, folder: Path) -> None:
        edit(folder, modules_to_save=["merger", "score", "mergr"], trainable_token_indices={"embed_tokns": [3, 70, 5]})
        error = refusal(UnknownModules, folder, r"2 modules.*mergr.*embed_tokns")
        assert set(error.facts["unmatched"]) == {"mergr", "embed_tokns"}

    def test_a_norm_cannot_take_low_rank(self, folder: Path) -> None:
        edit(folder, target_modules=r".*(q_proj|patch_embed\.proj|layers\.0\.input_layernorm)")
        refusal(UnsupportedAdapter, folder, r"layers\.0\.input_layernorm")

    def test_all_unmatched_tensors_in_one_message(self, folder: Path) -> None:
        extra = {f"base_model.model.model.layers.{i}.mlp.gate.weight": torch.ones(2) for i in range(40)}
        change(folder, **extra)
        error = refusal(UnknownModules, folder, r"40 tensors .*gate.* and 32 more")
        assert len(error.facts["unmatched"]) == 40

    def test_names_of_any_length(self, folder: Path) -> None:
        change(folder, **{f"{'x' * 50_000}.{i}.lora_A.weight": torch.ones(2, 2) for i in range(20)})
        refusal(UnknownModules, folder, "20 tensors")

    def test_two_tensors_for_one_place(self, folder: Path) -> None:
        change(folder, **{f"{Q_PROJ}.lora_A.default.weight": torch.ones(4, 128)})
        refusal(UnknownModules, folder, r"the same place.*q_proj\.lora_A")

    def test_the_bases_own_parameters_alone(self, folder: Path) -> None:
        change(folder, **{"base_model.model.model.visual.blocks.0.original_module.attn.qkv.bias": torch.ones(192)})
        refusal(UnknownModules, folder, "original_module")

    def test_dora_magnitudes(self, folder: Path) -> None:
        change(folder, **{f"{Q_PROJ}.lora_magnitude_vector": torch.ones(128)})
        refusal(UnsupportedAdapter, folder, "DoRA")

    def test_tokens_that_the_config_does_not_name(self, folder: Path) -> None:
        edit(folder, trainable_token_indices=None)
        refusal(UnknownModules, folder, r"trains tokens of model\.language_model\.embed_tokens")

    @pytest.mark.parametrize(
        "name", ["score.dense.weight", "score.out_proj.bias", "score.lora_A.weight", "score.0.weight"]
    )
    def test_heads_that_are_not_one_linear(self, folder: Path, name: str) -> None:
        change(folder, **{f"base_model.model.{name}": torch.ones(3, 128)})
        refusal(UnsupportedAdapter, folder, r"'score' is not one Linear")


class TestMissing:
    @pytest.mark.parametrize(
        ("key", "named"),
        [
            (f"{Q_PROJ}.lora_A.weight", "layers.0.self_attn.q_proj.lora_A.weight"),
            (f"{Q_PROJ}.lora_B.weight", "layers.0.self_attn.q_proj.lora_B.weight"),
            ("base_model.model.model.visual.merger.ln_q.bias", "model.visual.merger.ln_q.bias"),
            ("base_model.model.score.weight", "score.weight"),
            (f"{EMBEDDING}.token_adapter.trainable_tokens_delta", "embed_tokens.token_adapter.trainable_tokens_delta"),
        ],
    )
    def test_a_tensor(self, folder: Path, key: str, named: str) -> None:
        change(folder, **{key: None})
        error = refusal(MissingTensors, folder, named)
        assert len(error.facts["missing"]) == 1

    def test_promised_biases(self, folder: Path) -> None:
        edit(folder, bias="lora_only", lora_bias=True)
        error = refusal(MissingTensors, folder, r"q_proj\.bias")
        assert sum(name.endswith("lora_B.bias") for name in error.facts["missing"]) == 3
        assert sum(name.endswith("q_proj.bias") for name in error.facts["missing"]) == 2

    def test_a_head_of_which_only_the_bias_is_there(self, folder: Path) -> None:
        change(folder, **{"base_model.model.score.weight": None, "base_model.model.score.bias": torch.ones(3)})
        refusal(MissingTensors, folder, r"score\.weight")


class TestShapes:
    def test_another_rank_than_the_config(self, folder: Path) -> None:
        edit(folder, r=8)
        error = refusal(ShapeMismatch, folder, r"q_proj\.lora_A is \(4, 128\), wanted \(8, 128\)")
        assert len(error.facts["tensors"]) == 6, "all of one kind at once"

    @pytest.mark.parametrize(
        ("key", "shape"),
        [
            (f"{Q_PROJ}.lora_A.weight", (4, 64)),
            (f"{Q_PROJ}.lora_A.weight", (512,)),
            (f"{Q_PROJ}.lora_A.weight", ()),
            (f"{Q_PROJ}.lora_A.weight", (4, 0)),
            (f"{Q_PROJ}.lora_B.weight", (4, 128)),
            (f"{Q_PROJ}.lora_B.weight", (128, 4, 1)),
            ("base_model.model.model.visual.patch_embed.proj.lora_A.weight", (4, 96)),
            ("base_model.model.model.visual.merger.mlp.0.weight", (128, 256)),
            ("base_model.model.score.weight", (3, 64)),
            ("base_model.model.score.weight", (128,)),
            ("base_model.model.score.bias", (4,)),
            (f"{EMBEDDING}.token_adapter.trainable_tokens_delta", (2, 128)),
        ],
    )
    def test_a_tensor(self, folder: Path, key: str, shape: tuple[int, ...]) -> None:
        change(folder, **{key: torch.ones(shape)})
        refusal(ShapeMismatch, folder, "wanted")

    @pytest.mark.parametrize("indices", [[3, 70, 3], [3, 70, 320]])
    def test_tokens(self, folder: Path, indices: list[int]) -> None:
        edit(folder, trainable_token_indices=indices)
        refusal(ShapeMismatch, folder, "must be distinct and below 320")

    def test_labels(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"id2label": {"0": "cat", "1": "dog"}}')
        refusal(ShapeMismatch, folder, "2 labels; the head has 3")


class TestValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("key", [f"{Q_PROJ}.lora_B.weight", "base_model.model.model.visual.merger.mlp.0.weight"])
    def test_no_numbers(self, folder: Path, key: str, value: float) -> None:
        tensor = load_file(folder / "adapter_model.safetensors")[key]
        tensor[0, 0] = value
        change(folder, **{key: tensor})
        assert refusal(NonFiniteWeights, folder, key).facts["tensors"] == [key]
        # An outline is of names and shapes: it reads no weights, and whoever serves them does.
        modules = outline_adapter(folder, LAYOUT).modules
        assert any(key.startswith(f"base_model.model.{module}.") for module in modules)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
    def test_types_that_are_not_served(self, folder: Path, dtype: torch.dtype) -> None:
        change(folder, **{f"{Q_PROJ}.lora_A.weight": torch.ones(4, 128).to(dtype)})
        refusal(UnsupportedAdapter, folder, "not of a served type")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_the_stored_type_is_kept(self, folder: Path, dtype: torch.dtype) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        change(folder, **{key: tensor.to(dtype) for key, tensor in stored.items()})
        weights = read_adapter(folder, LAYOUT)
        assert {t.dtype for t in weights.tensors()} == {dtype, torch.int64}, "int64 are the token ids"


class TestFiles:
    def test_no_folder(self, tmp_path: Path) -> None:
        refusal(AdapterMissing, tmp_path / "nowhere", r"no adapter_config\.json in the adapter's folder")

    def test_a_file_for_a_folder(self, folder: Path) -> None:
        refusal(AdapterMissing, folder / "adapter_model.safetensors", r"no adapter_config\.json")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
    def test_a_path_that_cannot_be(self, folder: Path, name: str) -> None:
        refusal(AdapterMissing, folder / name, r"no adapter_config\.json")

    def test_no_tensors(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        refusal(AdapterMissing, folder, r"no adapter_model\.safetensors")
        with pytest.raises(AdapterMissing):
            fingerprint(folder)

    def test_a_pickle_is_never_opened(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        refusal(MalformedAdapter, folder, "Convert it with safetensors")

    def test_shards(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00002.safetensors")
        (folder / "adapter_model.safetensors.index.json").write_text("{}")
        refusal(UnsupportedAdapter, folder, "several shards")

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_pipe_does_not_block(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refusal(AdapterMissing, folder, name)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_loop_of_links(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)
        refusal(AdapterMissing, folder, name)

    def test_links_to_files_as_caches_have_them(self, folder: Path, tmp_path: Path) -> None:
        cached = tmp_path / "cached"
        cached.mkdir()
        for file in folder.iterdir():
            (cached / file.name).symlink_to(file)
        assert read_adapter(cached, LAYOUT).version == read_adapter(folder, LAYOUT).version

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            '{"r": NaN, "peft_type": "LORA"}',
            '{"r": 4, "r": 8}',
            "[" * 200_000,
            '{"a":' * 100_000,
            '{"r": ' + "9" * 10_000 + "}",
            "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
        ],
        ids=["empty", "cut", "list", "null", "nan", "twice", "deep", "deep objects", "huge", "garbage"],
    )
    def test_no_json(self, folder: Path, text: str) -> None:
        (folder / "adapter_config.json").write_text(text, encoding="latin-1")
        refusal(MalformedAdapter, folder, r"adapter_config\.json")
        with pytest.raises(MalformedAdapter):
            fingerprint(folder)

    def test_a_giant_config(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"r": "' + "x" * (5 << 20) + '"}')
        refusal(MalformedAdapter, folder, "larger than")

    def test_truncated_at_every_place(self, folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        data = file.read_bytes()
        for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
            file.write_bytes(data[:size])
            refusal(MalformedAdapter, folder, "damaged or no safetensors")

    @pytest.mark.parametrize(
        "header",
        [
            {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
            {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
            {"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}},
            {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 16]}},
            {"x": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
            {"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
            {"x": [1, 2, 3]},
            {
                "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "y": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            },
        ],
    )
    def test_headers_that_lie(self, folder: Path, header: dict[str, Any]) -> None:
        text = json.dumps(header).encode()
        (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        refusal(MalformedAdapter, folder, "damaged or no safetensors")

    def test_a_giant_header(self, folder: Path) -> None:
        with open(folder / "adapter_model.safetensors", "wb") as file:
            file.write((1 << 40).to_bytes(8, "little"))
            file.truncate(1 << 41)
        refusal(MalformedAdapter, folder, "claims a header of")

    def test_no_tensor_at_all(self, folder: Path) -> None:
        save_file({}, folder / "adapter_model.safetensors")
        refusal(MissingTensors, folder, "not in the file")


class TestFingerprint:
    def test_the_layout_of_the_json_means_nothing(self, folder: Path) -> None:
        before = fingerprint(folder)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        config["target_modules"].reverse()
        file.write_text(json.dumps(dict(reversed(config.items())), indent=7))
        assert fingerprint(folder) == before

    def test_the_order_of_patterns_means_something(self, folder: Path) -> None:
        edit(folder, alpha_pattern={"q_proj": 2, ".*q_proj": 3})
        before, one = fingerprint(folder), read_adapter(folder, LAYOUT)
        edit(folder, alpha_pattern={".*q_proj": 3, "q_proj": 2})
        after, other = fingerprint(folder), read_adapter(folder, LAYOUT)
        name = Q_PROJ.removeprefix("base_model.model.")
        assert one.lora[name].scaling != other.lora[name].scaling
        assert before != after

    def test_one_bit_of_a_tensor(self, folder: Path) -> None:
        before = fingerprint(folder)
        file = folder / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        assert fingerprint(folder) != before
