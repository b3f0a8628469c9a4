"""Tensor names and module names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.names import canonical, listed, nearest, shown, spellings, tail, unwrapped
from lora_runtime.tensor_keys import TensorKey, parse_key


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("m.q.lora_A.weight", TensorKey("m.q", "a")),
        ("m.q.lora_A.default.weight", TensorKey("m.q", "a")),
        ("m.q.lora_B.default.default.weight", TensorKey("m.q", "b")),
        ("m.q.lora_B.bias", TensorKey("m.q", "b_bias")),
        ("m.lora_A.lora_B.weight", TensorKey("m", "a")),  # an adapter may be called lora_B
        ("m.e.lora_embedding_A", TensorKey("m.e", "embedding_a")),
        ("m.e.lora_embedding_B.default", TensorKey("m.e", "embedding_b")),
        ("m.e.token_adapter.trainable_tokens_delta", TensorKey("m.e", "tokens")),
        ("m.e.token_adapter.trainable_tokens_delta.default", TensorKey("m.e", "tokens")),
        ("m.e.token_adapter.base_layer.weight", TensorKey("m.e", "parameter", "weight")),
        ("m.q.lora_magnitude_vector.default.weight", TensorKey("m.q", "magnitude")),
        ("m.q.lora_magnitude_vector", TensorKey("m.q", "magnitude")),
        ("m.q.base_layer.bias", TensorKey("m.q", "parameter", "bias")),
        ("m.original_module.mlp.0.bias", TensorKey("m.mlp.0", "original", "bias")),
        ("lm_head.weight", TensorKey("lm_head", "parameter", "weight")),
    ],
)
def test_one_reading(key: str, want: TensorKey) -> None:
    assert parse_key(key) == (want,)


def test_a_name_after_modules_to_save_may_be_an_adapter_or_a_child() -> None:
    readings = parse_key("merger.modules_to_save.mlp.mlp.0.weight")
    assert [reading.module for reading in readings] == ["merger.mlp.mlp.0", "merger.mlp.0", "merger.0", "merger"]


def test_a_low_rank_part_inside_a_saved_module() -> None:
    readings = parse_key("merger.modules_to_save.default.mlp.0.lora_A.default.weight")
    assert TensorKey("merger.mlp.0", "a") in readings


@pytest.mark.parametrize(
    "key",
    ["", "weight", "m.q.lora_A", "m.q.lora_A.bias", "m.lora_A.a.b.c.d.weight", "m.q.running_mean", "lora_A.weight"],
)
def test_no_reading(key: str) -> None:
    assert parse_key(key) == ()


@given(st.text(alphabet="ab.", max_size=30))
def test_any_name_can_be_read(text: str) -> None:
    parse_key(text)
    parse_key(f"{text}.lora_A.{text}.weight")
    parse_key(f"{text}.modules_to_save.{text}.weight")


LEAVES = [
    "lm_head",
    "model.language_model.embed_tokens",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.visual.blocks.1.attn.qkv",
    "model.visual.merger.mlp.0",
]
PREFIXES = ["", "base_model.model.", "base_model.model.base_model.model.", "module.", "_orig_mod.", "model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", LEAVES)
def test_every_spelling_has_the_canonical_name(name: str, prefix: str) -> None:
    for spelling in spellings(name):
        assert canonical(prefix + spelling) == name


@pytest.mark.parametrize("name", LEAVES)
def test_what_the_trained_model_called_it(name: str) -> None:
    for spelling in spellings(name):
        assert unwrapped(f"base_model.model.{spelling}") == spelling
        assert unwrapped(f"module.base_model.model._orig_mod.{spelling}") == spelling


def test_wrappers_inside_a_name() -> None:
    assert canonical("model.visual._orig_mod.merger._checkpoint_wrapped_module.mlp.0") == "model.visual.merger.mlp.0"


def test_a_name_of_containers_alone_keeps_one() -> None:
    assert tail("base_model.model") == "model"


def test_near_names_come_best_first() -> None:
    assert nearest("model.language_model.layers.0.self_attn.q_prj", LEAVES)[0] == LEAVES[2]


def test_messages_stay_short() -> None:
    assert len(shown("x" * 10_000)) < 200
    assert listed([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
