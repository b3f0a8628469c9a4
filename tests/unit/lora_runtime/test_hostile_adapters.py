"""Whatever the files hold, reading them ends in weights or in an error of ours, and in time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save

from lora_runtime.checkpoint import fingerprint, read_adapter
from lora_runtime.errors import AdapterMissing, AdapterRejected
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.weights import AdapterWeights, is_finite
from tests.oracle.methods import METHODS
from tests.oracle.models import save_adapter, tiny_qwen2vl

LAYOUT = BaseLayout.from_model(tiny_qwen2vl())
TIED = BaseLayout.from_model(tiny_qwen2vl(tie=True))
FIELDS = (
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "bias",
    "lora_bias", "init_lora_weights", "ensure_weight_tying", "use_dora", "id2label",
)  # fmt: skip
OPTIONS = (
    "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor", "feedforward_modules", "oft_block_size",
    "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "apply_GS", "n_frequency",
    "scaling", "random_loc_seed", "delora_lambda",
)  # fmt: skip

words = st.one_of(
    st.sampled_from(
        ["q_proj", "v_proj", "lm_head", "embed_tokens", "merger", "norm", "score", "layers", "all", "lora_only", "LORA",
         "SEQ_CLS", ".*", "(?x) a #", "a)(b", r"\1", "[", "(?P<idx>a)", "{1000000}", "model.layers.0", "all-linear"]
    ),
    st.text(max_size=8),
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(0, 9), st.floats(allow_nan=False), words)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=8,
)
keys = st.lists(
    st.sampled_from(
        ["base_model", "model", "language_model", "visual", "layers", "0", "self_attn", "q_proj", "merger", "mlp",
         "lora_A", "lora_B", "lora_embedding_A", "default", "weight", "bias", "modules_to_save", "original_module",
         "base_layer", "token_adapter", "trainable_tokens_delta", "lm_head", "score", "embed_tokens", "_orig_mod", ""]
    ),
    max_size=9,
).map(".".join)  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, 3, 4, 64, 128]), max_size=3).map(tuple).filter(lambda s: math.prod(s) < 50_000)
fuzz = settings(
    max_examples=int(os.environ.get("LOOM_FUZZ_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["merger"], trainable_token_indices=[3, 5])
    return save_adapter(tiny_qwen2vl, config, tmp_path_factory.mktemp("adapter") / "original")


def check(
    folder: Path, config: dict[str, Any] | bytes, tensors: bytes, materialiser: Materialiser | None = None
) -> None:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(data)
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    for layout in (LAYOUT, TIED):
        try:
            weights = read_adapter(folder, layout, materialiser)
        except (AdapterRejected, AdapterMissing) as error:
            assert len(error.message) < 4000
            continue
        assert isinstance(weights, AdapterWeights)
        assert weights.version == fingerprint(folder)
        assert all(is_finite(tensor) for tensor in weights.tensors())
        assert weights.modules <= set(layout.leaves)


@fuzz
@given(changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_configs(original: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((original / "adapter_config.json").read_text()) | changes
    check(tmp_path, config, (original / "adapter_model.safetensors").read_bytes())


@pytest.fixture(scope="module", params=["dora", "loha", "lokr", "ia3, patterns", "oft", "hra", "fourierft", "delora"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_qwen2vl, METHODS[request.param], tmp_path_factory.mktemp("adapter") / "other")


@pytest.fixture(scope="module")
def own() -> Materialiser:
    model = tiny_qwen2vl()
    return Materialiser(lambda leaf, name: model.get_parameter(f"{leaf}.{name}").detach(), 1 << 30)


@settings(fuzz, max_examples=max(40, fuzz.max_examples // 8))
@given(changes=st.dictionaries(st.sampled_from(FIELDS + OPTIONS), values, min_size=1, max_size=3))
def test_configs_of_other_methods(other: Path, own: Materialiser, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((other / "adapter_config.json").read_text()) | changes
    check(tmp_path, config, (other / "adapter_model.safetensors").read_bytes(), own)


@fuzz
@given(where=st.integers(0, 1 << 20), what=st.binary(min_size=1, max_size=4), cut=st.integers(0, 40))
def test_damaged_configs(original: Path, tmp_path: Path, where: int, what: bytes, cut: int) -> None:
    data = (original / "adapter_config.json").read_bytes()
    at = where % len(data)
    damaged = data[:at] + what + data[at + cut :]
    check(tmp_path, damaged, (original / "adapter_model.safetensors").read_bytes())


@fuzz
@given(where=st.integers(0, 1 << 20), what=st.binary(min_size=1, max_size=9), is_header=st.booleans())
def test_damaged_tensor_files(original: Path, tmp_path: Path, where: int, what: bytes, is_header: bool) -> None:
    data = bytearray((original / "adapter_model.safetensors").read_bytes())
    reach = 8 + int.from_bytes(data[:8], "little") if is_header else len(data)
    at = where % reach
    data[at : at + len(what)] = what
    check(tmp_path, json.loads((original / "adapter_config.json").read_text()), bytes(data))


@fuzz
@given(extra=st.dictionaries(keys, shapes, min_size=1, max_size=3), drop=st.integers(0, 30))
def test_tensors_of_any_name_and_shape(
    original: Path, tmp_path: Path, extra: dict[str, tuple[int, ...]], drop: int
) -> None:
    tensors = load_file(original / "adapter_model.safetensors")
    kept = dict(list(tensors.items())[drop:]) | {name: torch.ones(shape) for name, shape in extra.items()}
    check(tmp_path, json.loads((original / "adapter_config.json").read_text()), save(kept))
